"""The KV cache in blocks, with prefix caching, as vLLM's block pool behaves.

Rules of the file (each read off vLLM 0.32's behaviour, and replayed against recordings of it):
1. A block holds `block_size` tokens. A full block is known by a hash chained over everything before it, the salt included.
2. One block, the null block, is never handed out: `num_blocks - 1` are usable.
3. Free blocks stand in one queue. A freed block without a hash goes to its front, one with a hash to its end, a request's last
   block before its first; new blocks are taken from the front, which forgets the hash of what stood there.
4. A hit takes whole blocks only; of several blocks of one hash it takes the one that has had it longest.

Physical block numbers decide nothing, so there are none. What is kept is runs of consecutive blocks of one chain that always share
their holders (`_Run`); a hit that ends inside a run splits it. So a request costs as many operations as its prefix has joints, not
as it has blocks. Not pretty: two requests that compute the same block both keep it (as in vLLM), hence `_later` and `shadowed`.
"""

from collections.abc import Iterable, Sequence

from fanmark.servers.engine.prompt import Prompt

_PAGE_BLOCKS = (64, 8)  # sizes of the pages in which chains are remembered


def salt_root(salt: str) -> int:
    """The parent hash of a first block. Hashes of ints, unlike those of strings, are the same in every process."""
    return hash(tuple(salt.encode()))


def chained(parent: int, tokens: Iterable[int], block_size: int) -> list[int]:
    """The hashes of the full blocks of `tokens`, each over its parent's and its own tokens."""
    hashes = []
    for block in zip(*[iter(tokens)] * block_size, strict=False):
        parent = hash((parent, block))
        hashes.append(parent)
    return hashes


class _Prefix:
    """Some messages that prompts have begun with: what the hashes of the next message's blocks go on from."""

    __slots__ = ("left", "next", "parent")

    def __init__(self, parent: int, left: list[int]) -> None:
        self.parent = parent  # hash of its last full block
        self.left = left  # tokens behind that
        # By identity of the next message: the message (kept, so that its identity stays its own), its hashes, the longer prefix
        self.next: dict[int, tuple[Sequence[int], list[int], _Prefix]] = {}


class HashChains:
    """Block hashes of prompts, remembered, since agents send the same prefixes again and again: by message where a prompt is in
    parts (`prompt.Prompt`), which is fastest; else by pages of 64 blocks and of 8. Of so many tokens at most: then all are forgotten."""

    def __init__(self, block_size: int, *, remembered: int = 4_000_000) -> None:
        self._size = block_size
        self._pages: dict[int, list[int]] = {}
        self._prefixes: dict[str, _Prefix] = {}
        self._known_tokens = 0
        self._limit = remembered

    def of(self, tokens: Sequence[int], salt: str) -> list[int]:
        """The hashes of the full blocks of `tokens`, in order."""
        if isinstance(tokens, Prompt):
            return self._of_parts(tokens.parts, salt)
        parent, start, chain = salt_root(salt), 0, list[int]()
        for blocks in _PAGE_BLOCKS:
            page = blocks * self._size
            for at in range(start, len(tokens) - page + 1, page):
                hashes = self._page(parent, tuple(tokens[at : at + page]))
                chain += hashes
                parent = hashes[-1]
            start = len(chain) * self._size
        return chain + chained(parent, tokens[start:], self._size)

    def _page(self, parent: int, tokens: tuple[int, ...]) -> list[int]:
        key = hash((parent, tokens))
        hashes = self._pages.get(key)
        if hashes is None:
            hashes = chained(parent, tokens, self._size)
            self._make_room(len(tokens))
            self._pages[key] = hashes
        return hashes

    def _make_room(self, tokens: int) -> None:
        self._known_tokens += tokens
        if self._known_tokens > self._limit:
            self._known_tokens = tokens
            self._pages.clear()
            self._prefixes.clear()

    def _of_parts(self, parts: Sequence[Sequence[int]], salt: str) -> list[int]:
        prefix = self._prefixes.get(salt)
        if prefix is None:
            prefix = self._prefixes[salt] = _Prefix(salt_root(salt), [])
        chain: list[int] = []
        for part in parts:
            known = prefix.next.get(id(part))
            if known is None:
                tokens = [*prefix.left, *part]
                hashes = chained(prefix.parent, tokens, self._size)
                longer = _Prefix(hashes[-1] if hashes else prefix.parent, tokens[len(hashes) * self._size :])
                self._make_room(len(part))  # what is forgotten may be the prefix itself, which then is of no more use
                known = prefix.next[id(part)] = (part, hashes, longer)
            chain += known[1]
            prefix = known[2]
        return chain


class _Run:
    """Consecutive cached blocks of one chain with the same holders; in the free queue when nobody holds it."""

    __slots__ = ("after", "before", "hashes", "holders", "shadowed", "start")

    def __init__(self, start: int, hashes: list[int]) -> None:
        self.start = start  # index in the chain of its first block
        self.hashes = hashes
        self.holders: set[Table] = set()
        self.shadowed = 0  # blocks of it whose hash another block has had for longer
        self.before = self.after = self


class Table:
    """The blocks one request holds: `cached` of them in runs, in the order of the chain, the rest without a hash."""

    __slots__ = ("blocks", "cached", "runs")

    def __init__(self) -> None:
        self.blocks = 0
        self.cached = 0
        self.runs: list[_Run] = []


class Hit:
    """What a prefix lookup found: `blocks` blocks, of which `free` lie in the free queue. Valid until the cache changes."""

    __slots__ = ("blocks", "chain", "free", "parts")

    def __init__(self, chain: Sequence[int]) -> None:
        self.chain = chain
        self.parts: list[tuple[int, int]] = []  # (first block, blocks), each within one run
        self.blocks = 0
        self.free = 0


class KVCache:
    """Blocks to hold, to share and to take back. Counts are blocks; it never fails half way: ask `free` first."""

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks = {num_blocks}: give at least 2, one of them is vLLM's null block")
        self.total = num_blocks - 1
        self.free = self.total
        self.prefix_caching = prefix_caching
        self._blank = self.total  # free blocks without a hash: always the front of the queue
        self._queue = _Run(0, [])  # ring of free runs; this is its sentinel
        self._first: dict[int, _Run] = {}  # hash -> the run with the block that has had it longest
        self._later: dict[int, list[_Run]] = {}  # further runs with a block of the same hash, oldest first

    def __repr__(self) -> str:
        return f"<KVCache {self.total - self.free} of {self.total} blocks held, {len(self._first)} hashes>"

    @property
    def usage(self) -> float:
        """vLLM's kv_cache_usage_perc: 1 - free / total, where cached blocks that nobody holds count as free."""
        return 1.0 - self.free / self.total

    def lookup(self, chain: Sequence[int], limit: int) -> Hit:
        """The longest cached prefix of `chain`, of at most `limit` blocks. Changes nothing."""
        hit = Hit(chain)
        first, at = self._first, 0
        limit = min(limit, len(chain)) if self.prefix_caching else 0
        while at < limit:
            run = first.get(chain[at])
            if run is None:
                break
            offset = at - run.start
            length = 1  # where an older copy may own some of its blocks: one by one
            if not run.shadowed:
                length = _common(run.hashes, offset, chain, at, min(len(run.hashes) - offset, limit - at))
            hit.parts.append((at, length))
            if not run.holders:
                hit.free += length
            at += length
        hit.blocks = at
        return hit

    def hold(self, table: Table, hit: Hit) -> None:
        """Give the blocks of a hit to an empty table."""
        first, chain = self._first, hit.chain
        for at, length in hit.parts:
            run = first[chain[at]]
            if at > run.start:
                self._split(run, at - run.start)
                run = first[chain[at]]
            if length < len(run.hashes):
                self._split(run, length)
                run = first[chain[at]]
            if not run.holders:
                self._unlink(run)
                self.free -= len(run.hashes)
            run.holders.add(table)
            table.runs.append(run)
        table.blocks = table.cached = hit.blocks

    def take(self, blocks: int) -> None:
        """Take new blocks from the front of the free queue, for a table that counts them itself; there must be as many."""
        self.free -= blocks
        blank = min(blocks, self._blank)
        self._blank -= blank
        if blocks > blank:
            self._evict(blocks - blank)

    def commit(self, table: Table, chain: Sequence[int], full_blocks: int) -> None:
        """Give the table's first `full_blocks` blocks their hashes (those that have none yet)."""
        if full_blocks <= table.cached or not self.prefix_caching:
            return
        run = table.runs[-1] if table.runs else None
        if run is None or len(run.holders) > 1:
            run = _Run(table.cached, [])
            run.holders.add(table)
            table.runs.append(run)
        new = chain[table.cached : full_blocks]
        run.hashes += new
        if self._first.keys().isdisjoint(new):
            self._first.update(dict.fromkeys(new, run))
        else:
            for block_hash in new:
                if self._first.setdefault(block_hash, run) is not run:
                    self._later.setdefault(block_hash, []).append(run)
                    run.shadowed += 1
        table.cached = full_blocks

    def release(self, table: Table) -> None:
        """Take everything back; the table is empty afterwards."""
        blank = table.blocks - table.cached
        self._blank += blank
        self.free += blank
        tail = self._queue
        for run in reversed(table.runs):
            run.holders.remove(table)
            if not run.holders:
                self.free += len(run.hashes)
                run.before, run.after = tail.before, tail
                tail.before.after = run
                tail.before = run
        table.runs.clear()
        table.blocks = table.cached = 0

    def _evict(self, blocks: int) -> None:
        while blocks:
            run = self._queue.after
            keep = max(0, len(run.hashes) - blocks)
            gone = run.hashes[keep:]
            del run.hashes[keep:]
            blocks -= len(gone)
            if self._later:
                for block_hash in gone:
                    self._forget(block_hash, run)
            else:
                for block_hash in gone:
                    del self._first[block_hash]
            if not run.hashes:
                self._unlink(run)

    def _forget(self, block_hash: int, run: _Run) -> None:
        later = self._later.get(block_hash)
        if later is None:
            del self._first[block_hash]
        elif self._first[block_hash] is run:
            heir = self._first[block_hash] = later.pop(0)
            heir.shadowed -= 1
        else:
            later.remove(run)
            run.shadowed -= 1
        if later is not None and not later:
            del self._later[block_hash]

    def _split(self, run: _Run, at: int) -> None:
        """Cut a run before its block `at`; the shorter part becomes a new run."""
        moved_is_head = at <= len(run.hashes) - at
        if moved_is_head:
            moved = _Run(run.start, run.hashes[:at])
            del run.hashes[:at]
            run.start += at
        else:
            moved = _Run(run.start + at, run.hashes[at:])
            del run.hashes[at:]
        self._reindex(run, moved)
        moved.holders = set(run.holders)
        for table in run.holders:
            place = table.runs.index(run)
            table.runs.insert(place if moved_is_head else place + 1, moved)
        if not run.holders:  # the tail goes first in the queue, as it is evicted first
            neighbour = run.after if moved_is_head else run
            moved.before, moved.after = neighbour.before, neighbour
            neighbour.before.after = moved
            neighbour.before = moved

    def _reindex(self, run: _Run, moved: _Run) -> None:
        first = self._first
        if not run.shadowed:
            for block_hash in moved.hashes:
                first[block_hash] = moved
            return
        for block_hash in moved.hashes:
            if first[block_hash] is run:
                first[block_hash] = moved
            else:
                later = self._later[block_hash]
                later[later.index(run)] = moved
                moved.shadowed += 1
        run.shadowed -= moved.shadowed

    def _unlink(self, run: _Run) -> None:
        run.before.after = run.after
        run.after.before = run.before
        run.before = run.after = self._queue  # no cycle: it goes when it is dropped, garbage collector or not


def _common(hashes: list[int], offset: int, chain: Sequence[int], at: int, length: int) -> int:
    """How many of `length` blocks from the two places on are equal, given that the first are. Chained, so bisection does."""
    if hashes[offset + length - 1] == chain[at + length - 1]:
        return length
    low, high = 1, length - 1  # low are equal; high + 1 are not
    while low < high:
        middle = (low + high + 1) // 2
        if hashes[offset + middle - 1] == chain[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
