"""Which request holds which blocks under which hashes, at every moment as if each had been entered when it was filled.

The blocks that lazy requests (decoders.py) fill are entered late: when the request stops being lazy, when a lookup comes to where they
would be, or just before another request enters the same hashes, so that of several copies the oldest stays the first.
"""

from fanmark.servers.engine.batch import EngineConfig, Sequence
from fanmark.servers.engine.decoders import Decoders
from fanmark.servers.engine.kv import HashChains, Hit, KVCache
from fanmark.servers.engine.request import Request


class Ledger:
    """The KV cache and those whose blocks in it grow by themselves. `lag`: steps on their way when the last was scheduled."""

    def __init__(self, config: EngineConfig) -> None:
        self.kv = KVCache(config.num_blocks, prefix_caching=config.prefix_caching)
        self.decoders = Decoders(config.block_size)
        self.lag = 0
        self._chains = HashChains(config.block_size)
        self._size = config.block_size
        self._caching = config.prefix_caching
        self._blocked: tuple[Sequence, int] | None = None  # head of the queue, and how many free blocks it takes
        self._blocked_chain: set[int] = set()

    def chain(self, request: Request) -> list[int]:
        return self._chains.of(request.prompt, request.salt) if self._caching else []

    def take(self, sequence: Sequence, blocks: int, tokens: int, number: int) -> None:
        """In batch `number`: new blocks for a walker's first `tokens` tokens; those full of known tokens get their hashes."""
        if blocks > 0:
            sequence.table.blocks += blocks
            self.kv.take(blocks)
        self.fill(sequence, min(tokens, sequence.tokens), number, scheduling=True)

    def fill(self, sequence: Sequence, tokens: int, number: int, *, scheduling: bool = False) -> None:
        """Hash the full blocks of a request's first `tokens` tokens, after those of lazy ones that had the same before.

        Those have what they have once batch `number` is scheduled; while it is being scheduled, only those admitted before.
        """
        table, full = sequence.table, tokens // self._size
        if full <= table.cached or not self._caching:
            return
        chain = sequence.hashes(full, self._size)
        for other in self.decoders.on_chain(chain, sequence.root, full - 1):
            if other is not sequence and _was_before(other, sequence):
                self._catch_up(other, number - (scheduling and other.order > sequence.order))
        if self._blocked is not None and not self._blocked_chain.isdisjoint(chain[table.cached : full]):
            self._blocked = None  # the head of the queue may now hit what others hold
        self.kv.commit(table, chain, full)

    def committed(self, sequence: Sequence, number: int) -> int:
        """Tokens of a lazy request whose blocks have hashes once batch `number` is scheduled: those known by then."""
        return sequence.offset + min(number, sequence.last) + 1 - self.lag

    def _catch_up(self, sequence: Sequence, number: int) -> bool:
        """Enter the blocks that a lazy request has filled; whether there are any."""
        before = sequence.table.cached
        self.fill(sequence, self.committed(sequence, number), number)
        self.decoders.lazy[sequence] = sequence.last_hash
        return sequence.table.cached > before

    def join(self, sequence: Sequence, number: int) -> None:
        """A walker has become lazy with batch `number`."""
        self.decoders.join(sequence, number)
        if self._blocked and sequence.last_hash in self._blocked_chain:
            self._blocked = None

    # The head of the queue

    def admissible(self, sequence: Sequence, number: int, spare: int) -> Hit | None:
        """The cached prefix of a request if all its known tokens fit with it and `spare` free blocks to spare, else None."""
        full = (sequence.tokens - 1) // self._size
        hit, settled = self._lookup(sequence, full, number)
        needed = -(-sequence.tokens // self._size) - hit.blocks + hit.free + spare
        self._blocked = None
        if needed <= self.kv.free:
            return hit
        if settled:
            self._blocked, self._blocked_chain = (sequence, needed), {*sequence.chain, sequence.root}
        return None

    def _lookup(self, sequence: Sequence, full: int, number: int) -> tuple[Hit, bool]:
        """The longest cached prefix, of at most `full` blocks; and whether no running request may go on just where it ends."""
        if not self._caching:
            return self.kv.lookup((), 0), True
        chain = sequence.hashes(full, self._size)
        while True:
            hit = self.kv.lookup(chain, full)
            others = self.decoders.on_chain(chain, sequence.root, hit.blocks) if hit.blocks < full else []
            if not any([self._catch_up(other, number) for other in others]):
                return hit, not others

    def still_blocked(self, head: Sequence) -> bool:
        """Whether the head of the queue lacked blocks when last asked, and nothing has changed since that could help it.

        Not to be asked when nobody runs: then no blocks are spared.
        """
        return self._blocked is not None and self._blocked[0] is head and self._blocked[1] > self.kv.free


def _was_before(other: Sequence, sequence: Sequence) -> bool:
    """Whether `other`, which is lazy, filled each block before `sequence` did, if they have the same ones."""
    if not sequence.lazy:
        return True
    return other.offset > sequence.offset or (other.offset == sequence.offset and other.order < sequence.order)
