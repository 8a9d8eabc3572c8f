"""Requests of which every step computes one token: advanced together, by counting steps, not one by one.

Batches are numbered. With n the number of the next batch and u the number of results handled, a member has `offset + n` tokens
computed and `base + max(0, u - since)` tokens known; it needs a block whenever the first is a multiple of the block size, and batch
`last` is its last. So a step or a run of steps costs one sum. The blocks it fills get their hashes only when it ends, or when somebody
could tell the difference: a lookup that comes to where they would be, or another request with the same blocks.
"""

from heapq import heappop, heappush

from fanmark.servers.engine.batch import Sequence
from fanmark.servers.engine.step_time import BatchShape


class Decoders:
    def __init__(self, block_size: int) -> None:
        self.members: dict[Sequence, None] = {}
        self.edges = [0] * block_size  # members that begin a block in a batch, by its number modulo the block size
        self.lazy: dict[
            Sequence, int
        ] = {}  # members, and those whose last batch is on its way; hash of the last hashed block
        self.ends: dict[int, list[Sequence]] = {}  # by number of the last batch, until its result is handled
        self._end_numbers: list[int] = []  # heap of the keys of `ends`, some of them gone
        self._size = block_size
        self._offsets = 0

    def shape(self, number: int) -> BatchShape:
        """The make-up of a batch of the members alone. A context counts the token being computed."""
        count = len(self.members)
        return BatchShape(0, count, self._offsets + count * (number + 1), 0.0, count)

    def join(self, sequence: Sequence, number: int) -> None:
        """Batch `number` was scheduled with a token to sample for it (and maybe the one before, too): let it go on by itself."""
        sequence.lazy = True
        sequence.base = sequence.tokens
        sequence.since = number + 1 - sequence.placeholders
        sequence.joined = number + 1
        sequence.offset = sequence.computed - (number + 1)
        sequence.last = sequence.since + sequence.last_tokens - sequence.tokens - 1
        if sequence.last not in self.ends:
            self.ends[sequence.last] = []
            heappush(self._end_numbers, sequence.last)
        self.ends[sequence.last].append(sequence)
        self.lazy[sequence] = sequence.last_hash
        if sequence.last > number:
            self.members[sequence] = None
            self.edges[-sequence.offset % self._size] += 1
            self._offsets += sequence.offset

    def leave(self, sequence: Sequence) -> None:
        """Its last batch is scheduled: take it out if it is still a member."""
        if sequence in self.members:
            del self.members[sequence]
            self.edges[-sequence.offset % self._size] -= 1
            self._offsets -= sequence.offset

    def forget(self, sequence: Sequence) -> None:
        """Take a lazy sequence out altogether."""
        self.leave(sequence)
        del self.lazy[sequence]
        ends = self.ends.get(sequence.last)
        if ends and sequence in ends:
            ends.remove(sequence)

    def on_chain(self, chain: list[int], root: int, blocks: int) -> list[Sequence]:
        """Lazy requests whose hashed blocks are a prefix of the first `blocks` blocks of a chain."""
        found = []
        for sequence, last_hash in self.lazy.items():
            cached = sequence.table.cached
            if cached <= blocks and last_hash == (chain[cached - 1] if cached else root):
                found.append(sequence)
        return found

    def blocks(self, number: int, steps: int) -> int:
        """Blocks that `steps` batches from `number` on begin."""
        size, edges = self._size, self.edges
        cycles, first = steps // size, number % size
        rest = first + steps % size
        return cycles * len(self.members) + sum(edges[first:rest]) + (sum(edges[: rest - size]) if rest > size else 0)

    def first_end(self) -> int:
        """Number of the batch that is the last one of a member; there must be one."""
        numbers = self._end_numbers
        while not self.ends.get(numbers[0]):
            self.ends.pop(heappop(numbers), None)
        return numbers[0]

    def steps_with_blocks(self, number: int, steps: int, free: int) -> int:
        """How many of `steps` batches from `number` on `free` blocks last for."""
        count, size = len(self.members), self._size
        if (steps // size + 1) * count <= free:
            return steps
        cycles = min(free // count, steps // size)
        left, done = free - cycles * count, cycles * size
        while done < steps:
            left -= self.edges[(number + done) % size]
            if left < 0:
                break
            done += 1
        return done
