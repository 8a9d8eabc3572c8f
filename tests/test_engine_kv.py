"""The KV cache in runs behaves as one kept block by block."""

import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.servers.engine.kv import HashChains, KVCache, Table, chained, salt_root
from fanmark.servers.engine.prompt import Prompt


class Blocks:
    """vLLM's block pool, block by block: a list for the free queue, front first."""

    def __init__(self, total: int) -> None:
        self.queue = list(range(total))
        self.refs = [0] * total
        self.hash: list[int | None] = [None] * total
        self.found: dict[int, list[int]] = {}

    def lookup(self, chain: list[int], limit: int) -> list[int]:
        hit = []
        for block_hash in chain[:limit]:
            if not self.found.get(block_hash):
                break
            hit.append(self.found[block_hash][0])
        return hit

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.refs[block] == 0:
                self.queue.remove(block)
            self.refs[block] += 1

    def take(self, count: int) -> list[int]:
        taken, self.queue = self.queue[:count], self.queue[count:]
        for block in taken:
            old = self.hash[block]
            if old is not None:
                self.found[old].remove(block)
                self.hash[block] = None
            self.refs[block] = 1
        return taken

    def commit(self, block: int, block_hash: int) -> None:
        self.hash[block] = block_hash
        self.found.setdefault(block_hash, []).append(block)

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.refs[block] -= 1
        freed = [block for block in reversed(blocks) if self.refs[block] == 0]
        self.queue = (
            [b for b in freed if self.hash[b] is None] + self.queue + [b for b in freed if self.hash[b] is not None]
        )


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(3, 24))
def test_runs_behave_as_single_blocks(data: Any, total: int) -> None:
    kv, plain = KVCache(total + 1), Blocks(total)
    tables: list[tuple[Table, list[int], list[int]]] = []  # table, blocks of the plain one, chain
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.integers(0, 2))
        if action == 0:  # a request over few different contents, so that prefixes and copies are shared
            chain = chained(0, data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8)), 1)
            limit = data.draw(st.integers(0, len(chain)))
            hit, expected = kv.lookup(chain, limit), plain.lookup(chain, limit)
            assert (hit.blocks, hit.free) == (len(expected), sum(plain.refs[block] == 0 for block in expected))
            table = Table()
            kv.hold(table, hit)
            plain.hold(expected)
            tables.append((table, expected, chain))
        elif tables:
            index = data.draw(st.integers(0, len(tables) - 1))
            table, blocks, chain = tables[index]
            if action == 1:
                count = min(data.draw(st.integers(0, 4)), kv.free)
                kv.take(count)
                table.blocks += count
                blocks += plain.take(count)
                full = min(data.draw(st.integers(0, len(chain))), len(blocks))
                for place in range(table.cached, full):
                    plain.commit(blocks[place], chain[place])
                kv.commit(table, chain, full)
            else:
                kv.release(table)
                plain.release(blocks)
                del tables[index]
        assert kv.free == len(plain.queue)
        assert set(kv._first) == {block_hash for block_hash, having in plain.found.items() if having}
    assert kv.usage == pytest.approx(1 - len(plain.queue) / total)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=90), min_size=1, max_size=6),
    st.sampled_from(["", "salt"]),
    st.integers(1, 5),
)
def test_remembered_chains_are_those_worked_out_anew(messages: list[list[int]], salt: str, size: int) -> None:
    tokens = [token for message in messages for token in message]
    chains, expected = HashChains(size, remembered=8), chained(salt_root(salt), tokens, size)
    for _ in range(2):
        assert chains.of(tokens, salt) == chains.of(tuple(tokens), salt) == expected
        for end in range(1, len(messages) + 1):
            prompt = Prompt(messages[:end])
            assert chains.of(prompt, salt) == expected[: len(prompt) // size]


def test_what_is_remembered_has_a_bound() -> None:
    """Long messages are given back as short ones are: it is their tokens that count."""
    chains, messages = HashChains(16, remembered=1000), [[i] * 300 for i in range(20)]

    def counts() -> list[int]:
        return [sys.getrefcount(message) for message in messages]

    before = counts()
    for i in range(len(messages)):
        chains.of(Prompt([messages[i]]), "")
    kept = [now - then for now, then in zip(counts(), before, strict=True)]
    assert kept[-1] == 1 and 1 <= sum(kept) <= 3


def test_another_salt_or_another_beginning_is_another_chain() -> None:
    chains = HashChains(2)
    base = chains.of([1, 2, 3, 4], "")
    assert not set(base) & set(chains.of([1, 2, 3, 4], "x"))
    assert not set(base) & set(chains.of([9, 2, 3, 4], ""))
    assert chains.of([1, 2, 9, 9], "")[0] == base[0]


def test_a_prompt_reads_like_its_tokens() -> None:
    messages = [[1, 2, 3], [], [4], [5, 6]]
    prompt, tokens = Prompt(messages), [1, 2, 3, 4, 5, 6]
    assert list(prompt) == tokens and len(prompt) == 6 and prompt[-1] == 6
    for start in range(-7, 8):
        for stop in range(-7, 8):
            assert prompt[start:stop] == tokens[start:stop]
    assert prompt[::-2] == tokens[::-2]
    with pytest.raises(IndexError, match="token 6 of 6"):
        prompt[6]


def test_a_cache_of_the_null_block_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks = 1: give at least 2"):
        KVCache(1)
