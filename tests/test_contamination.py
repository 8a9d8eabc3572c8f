"""The limit of cached tokens, against an unbounded prefix cache that keeps prompts and replies in blocks of 16 tokens."""

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.contamination import ANYONE, Crowd, Explained, Prompt

BLOCK = 16
Words = tuple[Hashable, ...]


def words(name: Hashable, tokens: int, common: int = 0) -> Words:
    """The tokens of a message: the first `common` (at most 15) are worded alike in all, the others are its own."""
    shared = min(common, tokens, BLOCK - 1)
    return tuple(("common", i) for i in range(shared)) + tuple((name, i) for i in range(shared, tokens))


@dataclass
class Cache:
    """Blocks by salt and all tokens up to their end; nothing is ever evicted."""

    blocks: set[tuple[Hashable, Words]] = field(default_factory=set)

    def keep(self, salt: Hashable, tokens: Words) -> None:
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            self.blocks.add((salt, tokens[:end]))

    def hit(self, salt: Hashable, tokens: Words) -> int:
        found = 0
        while found + BLOCK <= len(tokens) and (salt, tokens[: found + BLOCK]) in self.blocks:
            found += BLOCK
        return found


@dataclass
class Client:
    """What the run does with Explained: `calls` in flight are computed, and answered, in any order."""

    cache: Cache
    explained: Explained = field(default_factory=Explained)

    def send(self, salt: Hashable, query: Hashable, messages: Sequence[Words], first_own: int) -> Prompt:
        return self.explained.sent(salt, query, [(m, len(m)) for m in messages], first_own)

    def compute(self, salt: Hashable, messages: Sequence[Words], reply: Words) -> int:
        tokens = tuple(token for message in messages for token in message)
        cached = self.cache.hit(salt, tokens)
        self.cache.keep(salt, tokens + reply)
        return cached

    def answer(self, prompt: Prompt, reply: Words) -> int:
        limit = self.explained.limit(prompt)
        self.explained.replied(prompt, reply)
        return limit


@dataclass
class Query:
    """A query of random rounds: every call reads the shared texts, the question, and some of what was written before."""

    name: Hashable
    salt: Hashable
    rng: random.Random
    client: Client
    history: list[Words] = field(default_factory=list)

    def length(self) -> int:
        return self.rng.choice([1, 3, 15, 16, 17, 31, 32, 33, 50])

    def prompt(self, i: int, chain: Sequence[Words]) -> tuple[list[Words], int]:
        """The messages, and which is the first that no other query has."""
        role = [words(("role", i), 9, 15)] * (self.rng.random() < 0.3)
        shared = [*role, words("system", 37)] if self.rng.random() < 0.5 else [words("system", 37), *role]
        if self.rng.random() < 0.2:
            shared.append(words("instruction", 21, 7))
        question = [words(("question", self.name), 45, 6)] * (self.rng.random() < 0.8)
        read = list(chain) if self.rng.random() < 0.5 else self.rng.sample(self.history, len(self.history) // 2)
        own = [*question, *read, *[words(("late", i), 5, 3)] * (self.rng.random() < 0.5)]
        return [*shared, *own], len(shared)

    def steps(self) -> Iterator[int]:
        """Gives after every event by how many tokens the cache exceeded the limit."""
        chain: list[Words] = []
        for k in range(self.rng.randint(1, 4)):
            calls, waiting = [], []
            for i in range(self.rng.randint(1, 4)):
                messages, first_own = self.prompt(i, chain)
                prompt = self.client.send(self.salt, self.name, messages, first_own)
                calls.append((prompt, messages, words((self.name, k, i), self.length(), self.rng.randint(0, 15))))
                yield 0
            self.rng.shuffle(calls)
            for prompt, messages, reply in calls:
                waiting.append((prompt, messages, reply, self.client.compute(self.salt, messages, reply)))
                yield 0
            self.rng.shuffle(waiting)
            for prompt, messages, reply, cached in waiting:
                yield cached - self.client.answer(prompt, reply)
                self.history.append(reply)
                chain = [m for m in messages if m[0][0] in (self.name, "question")] + [reply]  # type: ignore[index]
        self.client.explained.forget(self.name)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 3))
def test_own_traffic_never_exceeds_its_limit(seed: int, queries: int, salts: int) -> None:
    rng = random.Random(seed)
    client = Client(Cache())
    running = [
        Query(("q", i), f"salt-{i % salts}", random.Random(f"{seed}/{i}"), client).steps() for i in range(queries)
    ]
    while running:
        steps = rng.choice(running)
        try:
            assert next(steps) <= 0
        except StopIteration:
            running.remove(steps)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 200))
def test_a_cache_that_another_has_warmed_is_found(seed: int, queries: int, length: int) -> None:
    client = Client(Cache())
    question = words("question", 40 + length)
    client.cache.keep("salt", words("system", 37) + question)  # another client's prompt, under the same salt
    prompt = client.send("salt", 0, [words("system", 37), question], 1)
    cached = client.compute("salt", [words("system", 37), question], words("reply", 20))
    assert cached - client.answer(prompt, words("reply", 20)) == (37 + 40 + length) // 16 * 16


SYSTEM, QUESTION, ROLE, REPLY = words("system", 100), words("question", 50), words("role", 20), words("reply", 30)


def test_the_first_prompt_under_a_salt_can_have_nothing_cached() -> None:
    client = Client(Cache())
    first = client.send("a", 1, [SYSTEM, QUESTION], 1)
    assert client.explained.limit(first) == 0
    other = client.send("b", 1, [SYSTEM, QUESTION], 1)
    assert client.explained.limit(other) == 0


@pytest.mark.parametrize(
    ("query", "messages", "first_own", "limit"),
    [
        (1, [SYSTEM, QUESTION], 1, 150 + 15),  # the same prompt again
        (1, [SYSTEM, QUESTION, ROLE], 1, 150 + 15),  # grown: what comes new cannot be there
        (1, [SYSTEM, QUESTION, REPLY, ROLE], 1, 180 + 15),  # the reply stays in the cache behind its prompt
        (1, [SYSTEM, REPLY, QUESTION], 1, 100 + 15),  # but nowhere else
        (1, [ROLE, SYSTEM, QUESTION], 2, 15),  # a text before all others leaves nothing to share
        (2, [SYSTEM, QUESTION], 1, 100 + 15),  # another query shares what is common to all queries
        (2, [SYSTEM, QUESTION], 2, 100 + 15),
        (2, [], 0, 0),  # a salt of its own, and nothing of this query was there
    ],
)
def test_what_a_prompt_before_explains(query: int, messages: list[Words], first_own: int, limit: int) -> None:
    client = Client(Cache())
    client.answer(client.send("a", 1, [SYSTEM, QUESTION], 1), REPLY)
    assert client.explained.limit(client.send("a", query, messages, first_own)) == limit


def test_what_arms_share_under_one_salt_is_explained_by_the_querys_number() -> None:
    client = Client(Cache())
    client.answer(client.send("run", 3, [SYSTEM, QUESTION], 1), REPLY)  # query 3 of one arm
    assert client.explained.limit(client.send("run", 3, [SYSTEM, QUESTION], 1)) == 165  # query 3 of another
    assert client.explained.limit(client.send("run", 4, [SYSTEM, QUESTION], 1)) == 115


def test_a_sibling_that_was_sent_later_may_have_been_computed_first() -> None:
    client = Client(Cache())
    early = client.send("a", 1, [SYSTEM, QUESTION], 1)
    late = client.send("a", 1, [SYSTEM, QUESTION], 1)
    assert client.compute("a", [SYSTEM, QUESTION], REPLY) == 0  # the late one
    assert client.compute("a", [SYSTEM, QUESTION], REPLY) == 144  # the early one
    assert client.answer(early, REPLY) == 165 == client.answer(late, REPLY)


def test_a_query_that_ended_is_forgotten_and_what_all_share_is_not() -> None:
    client = Client(Cache())
    client.answer(client.send("a", 1, [SYSTEM, QUESTION], 1), REPLY)
    client.explained.forget(1)
    client.explained.forget("never seen")
    assert client.explained.limit(client.send("a", 1, [SYSTEM, QUESTION], 1)) == 115


def test_what_anyone_may_send_is_counted_in_fixed_memory() -> None:
    """A message that two queries sent is explained in both, a third query's own is not; nothing of it can be forgotten."""
    explained = Explained()
    for query in range(2):
        prompt = explained.sent("salt", ANYONE, [("shared", 100), (f"own {query}", 40)], 2)
        explained.replied(prompt, f"reply {query}", f"reply {query}")
    assert explained.limit(prompt) == 100 + 15
    again = explained.sent("salt", ANYONE, [("shared", 100), ("own 1", 40), ("reply 1", 20)], 3)
    assert explained.limit(again) == 160 + 15
    explained.forget(ANYONE)
    assert explained.limit(again) == 160 + 15
    crowd = Crowd()
    for _ in range(300):
        crowd["thing"] += 1
    assert (crowd["thing"], crowd["other"]) == (255, 0)
