"""Prompts as long as asked by a server's own count of the whole, for many templates and ways to cut words into tokens."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.agents.runtime import Author
from fanmark.loadgen.errors import CallError, ScenarioError
from fanmark.loadgen.prompts import (
    ChatPrompts,
    Template,
    Text,
    TokenPrompts,
    measure_prose,
    measure_template,
)
from fanmark.loadgen.tokenizers import LocalTokenizer
from fanmark.servers.prose import Prose, filler
from fanmark.servers.tokenizer import Tokenizer as StubTokenizer
from fanmark.servers.tokenizer import vocabulary

T = TypeVar("T")

PROSE = Prose()
WORDS = ["tree", "river", "stone", "of", "seven", "night", "and", "paper", "door", "wind", "salt", "lamp"] + [
    a + b for a in "bcdfgklmnprst" for b in ("ale", "ode", "in", "ust", "ark", "oom")
]
STEMS = (
    "Why?",
    "You are the careful internationalization analyst: check every step, define your terms, say how sure you are.",
    "Extraordinarily    spaced  notwithstanding\nlines, and counterrevolutionaries",
    "",
)


def run(coroutine: Awaitable[T]) -> T:
    async def main() -> T:
        return await coroutine

    return asyncio.run(main())


@dataclass
class Server:
    """A server's tokenizer. A word costs a token for every `letters` letters or part of them, one more at the start of a text if it is
    longer than four; an end of line costs one. The template adds `shares` to each message by author, `opening` tokens to every prompt,
    and its own system message where none is given."""

    letters: int = 6
    shares: Mapping[str, int] = field(default_factory=lambda: {"system": 4, "user": 5, "assistant": 6})
    opening: int = 3
    own_system: int = 0
    one_system: bool = False
    start_costs: bool = True
    asked: int = 0
    ids: dict[str, int] = field(default_factory=dict)

    def tokens(self, text: str) -> list[int]:
        pieces = []
        for i, line in enumerate(text.split("\n")):
            pieces += ["\n"] * (i > 0)
            for j, word in enumerate(line.split()):
                first = self.start_costs and i == j == 0 and len(word) > 4
                pieces += ["^"] * first + [word[k : k + self.letters] for k in range(0, len(word), self.letters)]
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        own = self.own_system if messages[0]["role"] != "system" else 0
        return self.opening + own + sum(self.shares[m["role"]] + len(self.tokens(m["content"])) for m in messages)

    async def encode(self, text: str) -> list[int]:
        self.asked += 1
        await asyncio.sleep(0)
        return self.tokens(text)

    async def count_chat(self, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]] = ()) -> int:
        self.asked += 1
        await asyncio.sleep(0)
        if self.one_system and sum(m["role"] == "system" for m in messages) > 1:
            raise CallError("http_4xx", "one system message only")
        return self.count(messages)


SERVERS = {
    "a template of zero tokens": lambda: Server(shares=Counter(), opening=0),
    "shares by author and an opening": lambda: Server(),
    "a system message of its own": lambda: Server(own_system=21, shares={"system": 3, "user": 9, "assistant": 2}),
    "one system message only": lambda: Server(one_system=True),
    "short pieces": lambda: Server(letters=4),
    "no cost of the start": lambda: Server(start_costs=False),
}


def chat(server: Server) -> ChatPrompts:
    one_token = [word for word in WORDS if len(word) <= server.letters]
    return ChatPrompts(one_token, server, run(measure_template(server)))


@pytest.mark.parametrize("name", SERVERS)
def test_the_templates_shares_are_found(name: str) -> None:
    server = SERVERS[name]()
    found = run(measure_template(server))
    system = 0 if server.one_system else server.shares["system"]
    assert found == Template(
        system=system,
        user=server.shares["user"],
        assistant=server.shares["assistant"],
        with_system=server.opening + server.shares["system"] - system,
        without_system=server.opening + server.own_system,
    )


class Uneven(Server):
    """A template that charges later turns more."""

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        return super().count(messages) + len(messages) ** 2


class Shrinking(Server):
    """A template that drops the text of all but the last turn of an assistant."""

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        kept = [m for i, m in enumerate(messages) if m["role"] != "assistant" or i == last]
        return super().count(kept)


@pytest.mark.parametrize("server", [Uneven(), Shrinking()])
def test_a_template_that_does_not_add_up_is_refused(server: Server) -> None:
    with pytest.raises(ScenarioError, match=r"^the chat template's shares do not add up$"):
        run(measure_template(server))


authors = st.sampled_from(["user", "assistant"])
bodies = st.lists(st.tuples(authors, st.integers(3, 150), st.sampled_from(STEMS)), max_size=4)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(SERVERS)),
    st.sampled_from(["system", "user"]),
    st.integers(3, 150),
    st.sampled_from(STEMS),
    st.sampled_from(["", "[3f9a-debate]"]),
    bodies,
)
def test_a_prompt_is_as_long_as_its_messages_by_the_servers_own_count(
    name: str, head: Author, head_tokens: int, stem: str, opening: str, rest: list[tuple[Author, int, str]]
) -> None:
    server = SERVERS[name]()
    prompts = chat(server)
    assert prompts.exact
    share = 4 + prompts.minimum(head, True)  # 4: what the longest first piece and a lone word may cost
    texts = [Text(head, stem, share + head_tokens, "7/0/first", True, opening)]
    texts += [Text(a, s, prompts.minimum(a, False) + n, f"7/0/{i}") for i, (a, n, s) in enumerate(rest)]

    async def made() -> list[Any]:
        return await asyncio.gather(*(prompts.part(text) for text in texts))

    parts = run(made())
    assert [part.size for part in parts] == [text.tokens for text in texts]
    messages = [{"role": text.author, "content": part.content} for text, part in zip(texts, parts, strict=True)]
    for n in range(1, len(messages) + 1):
        assert server.count(messages[:n]) == sum(text.tokens for text in texts[:n])


@given(
    st.sampled_from(sorted(SERVERS)),
    st.sampled_from(["system", "user"]),
    st.lists(st.tuples(authors, st.sampled_from(STEMS[:3]), st.booleans()), min_size=1, max_size=5),
    st.sampled_from(["", "[3f9a-debate]"]),
)
def test_texts_that_go_as_they_are_are_as_long_as_the_server_says(
    name: str, head: Author, said: list[tuple[Author, str, bool]], opening: str
) -> None:
    server = SERVERS[name]()
    prompts = chat(server)
    texts = [Text(head, said[0][1], 0, "7/0/question", True, opening, whole=True)]
    for i, (author, stem, whole) in enumerate(said[1:]):  # some that are made stand between them
        tokens = 0 if whole else prompts.minimum(author, False) + 40
        texts.append(Text(author, stem, tokens, f"7/{i}/other", whole=whole))

    async def made() -> list[Any]:
        return await asyncio.gather(*(prompts.part(text) for text in texts))

    parts = run(made())
    if opening:
        assert parts[0].content == f"{opening}\n{said[0][1]}"
    assert all(part.content == text.stem for text, part in zip(texts[1:], parts[1:], strict=True) if text.whole)
    messages = [{"role": text.author, "content": part.content} for text, part in zip(texts, parts, strict=True)]
    for n in range(1, len(messages) + 1):
        assert server.count(messages[:n]) == sum(part.size for part in parts[:n])


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(("author", "first"), [("system", True), ("user", True), ("user", False), ("assistant", False)])
def test_too_short_a_message_is_refused_with_its_minimum_and_the_minimum_can_be_had(
    name: str, author: Author, first: bool
) -> None:
    server = SERVERS[name]()
    prompts = chat(server)
    least = prompts.minimum(author, first)
    told = f"^a {author} message of {least - 1} tokens: the target's chat template needs {least}$"
    with pytest.raises(ScenarioError, match=told):
        run(prompts.part(Text(author, "Why?", least - 1, "s", first)))
    part = run(prompts.part(Text(author, "Why?", least, "s", first)))
    before = [] if first else [{"role": "user", "content": "tree"}]
    longer = server.count([*before, {"role": author, "content": str(part.content)}])
    assert longer - (server.count(before) if before else 0) == least


def test_the_stem_leads_and_is_cut_at_a_word() -> None:
    prompts = chat(Server(start_costs=False))
    long = run(prompts.part(Text("user", STEMS[1], 200, "s", True))).content
    assert isinstance(long, str) and long.startswith(STEMS[1] + " ")
    short = run(prompts.part(Text("user", STEMS[1], 14, "s", True))).content
    # 6 tokens of text: "You are the careful" has 5, and the next word alone would have 4
    assert isinstance(short, str) and short.startswith("You are the careful ") and len(short.split()) == 5
    opened = run(prompts.part(Text("user", "Why?", 60, "s", True, "[3f9a]"))).content
    assert isinstance(opened, str) and opened.startswith("[3f9a]\nWhy? ")


def test_a_tokenizer_that_gives_no_such_length_is_told() -> None:
    class Pairs(Server):
        """Every word costs two tokens."""

        def tokens(self, text: str) -> list[int]:
            return [piece for piece in super().tokens(text) for _ in "ab"]

    server = Pairs(start_costs=False)
    prompts = ChatPrompts(WORDS, server, Template(0, 0, 0, 0, 0))
    server.shares, server.opening = Counter(), 0
    told = 'no text of 11 tokens can be made for the target\'s tokenizer: use api = "completions"'
    with pytest.raises(ScenarioError) as caught:
        run(prompts.part(Text("user", "Why?", 11, "s")))
    assert str(caught.value) == told


@pytest.mark.parametrize("author", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", SERVERS)
def test_what_a_reply_adds_to_a_prompt_is_asked_from_the_server(name: str, author: Author) -> None:
    server = SERVERS[name]()
    if author == "system" and server.one_system:
        return  # such a message stands first, where its share is the prompt's
    prompts = chat(server)
    text = "notwithstanding the lamp"
    found = run(prompts.reply_size(author, text))
    assert found is not None
    part = run(prompts.reply_part(author, text, None))
    assert (part.content, part.size) == (text, None)
    assert found[1] == len(server.tokens(text))
    if author != "system":
        before = [{"role": "user", "content": "tree"}]
        assert found[0] == server.count([*before, {"role": author, "content": text}]) - server.count(before)
    else:
        after = [{"role": "user", "content": "tree"}]
        assert found[0] == server.count([{"role": author, "content": text}, *after]) - server.shares["user"] - 1


@pytest.mark.parametrize("tokens", [1, 2, 5, 20, 300])
def test_without_a_tokenizer_four_and_a_half_characters_are_taken_for_a_token(tokens: int) -> None:
    prompts = ChatPrompts(WORDS, None, None)
    assert not prompts.exact and prompts.minimum("system", True) == 1
    for stem in STEMS:
        part = run(prompts.part(Text("user", stem, tokens, "s")))
        content = str(part.content)
        assert part.size is None and content and 4.5 * tokens - 24 <= len(content) <= 4.5 * tokens + 1
        assert content.startswith(stem) or stem.startswith(content)
    assert run(prompts.reply_size("user", "a b")) is None


@pytest.mark.parametrize("name", SERVERS)
def test_a_text_costs_few_counts(name: str) -> None:
    server = SERVERS[name]()
    prompts = ChatPrompts(["tree"], server, run(measure_template(server)), run(measure_prose(server)))
    before, texts = server.asked, [Text("user", STEMS[0], 200, f"7/{i}/question") for i in range(60)]
    for text in texts:
        part = run(prompts.part(text))
        assert len(str(part.content).split("tree")) < 40  # of 200: the rest is prose
    assert (server.asked - before) / len(texts) <= 2.5


@given(st.integers(1, 60) | st.integers(1, 900), st.sampled_from(STEMS), st.integers(0, 10**6), st.floats(3, 6))
def test_texts_by_counting_parts_are_exact_and_prose(tokens: int, stem: str, seed: int, chars: float) -> None:
    local = StubTokenizer(vocabulary())
    counted = (Template(0, 0, 0, 0, 0), chars, local.count)
    part = run(ChatPrompts(vocabulary(), LocalTokenizer(local), *counted).part(Text("user", stem, tokens, f"{seed}")))
    assert isinstance(part.content, str) and local.count(part.content) == tokens == part.size


@given(st.integers(0, 400), st.sampled_from(STEMS), st.sampled_from(["", "[3f9a]"]))
def test_token_prompts_have_any_length(tokens: int, stem: str, opening: str) -> None:
    server = Server()
    prompts = TokenPrompts(list(range(1000, 1256)), server)
    part = run(prompts.part(Text("system", stem, tokens, "s", True, opening)))
    assert isinstance(part.content, list) and part.size == len(part.content) == tokens
    head = server.tokens(f"{opening}\n{stem}" if opening else stem)
    n = min(len(head), tokens)
    assert part.content[:n] == head[:n]
    assert sum(1000 <= i < 1256 for i in part.content[n:]) <= len(part.content) / 3 + 10  # the rest is prose


@pytest.mark.parametrize("name", [*SERVERS, "the stub's", "token ids"])
@given(
    pieces=st.lists(st.integers(20, 80), min_size=1, max_size=4),
    more=st.lists(st.integers(1, 200), min_size=2, max_size=2),
)
@settings(max_examples=15)
def test_messages_that_begin_alike_share_that_and_no_more(name: str, pieces: list[int], more: list[int]) -> None:
    """Each is exactly as long as it must be, or nothing but its beginning; then they part."""
    local = StubTokenizer(vocabulary())
    server = SERVERS[name]() if name in SERVERS else Server()
    prompts: ChatPrompts | TokenPrompts = TokenPrompts(range(1000, 1256), server)
    if name == "the stub's":
        prompts = ChatPrompts(vocabulary(), LocalTokenizer(local), Template(0, 0, 0, 0, 0), 4.5, local.count)
    elif name in SERVERS:
        prompts = chat(server)
    begins = tuple((f"1/recorded/{i}", tokens) for i, tokens in enumerate(pieces))
    texts = [Text("user", "", 12 + sum(pieces) + n, f"1/recorded/{'ab'[i]}", begins=begins) for i, n in enumerate(more)]
    parts = [run(prompts.part(text)) for text in texts]
    assert [part.size for part in parts] == [text.tokens for text in texts]
    if isinstance(prompts, ChatPrompts) and name in SERVERS:
        share = prompts.minimum("user", False) - 1
        assert [len(server.tokens(str(part.content))) + share for part in parts] == [text.tokens for text in texts]
    shared = texts[0].beginning(PROSE.text, prompts._chars_per_token)
    least = min(len(str(part.content)) for part in parts)
    if isinstance(prompts, ChatPrompts):
        for part in parts:  # a beginning that was too long is cut at a word, and a few words fill it up
            text = str(part.content)
            assert text[: len(shared)][: len(text) - 40] == shared[: len(text) - 40]
        assert least < len(shared) + 25 or len({str(part.content)[: len(shared) + 25] for part in parts}) == 2
    else:
        head = server.tokens(shared)[: sum(pieces)]
        assert all(part.content[: len(head)] == head for part in parts)


def test_token_prompts_take_a_replys_own_ids() -> None:
    server = Server()
    prompts = TokenPrompts([1, 2], server)
    assert prompts.minimum("user", True) == 1 and prompts.exact
    assert run(prompts.reply_part("assistant", "lamp", [5, 6]))[:2] == ([5, 6], 2)
    assert run(prompts.reply_part("user", "lamp", None))[:2] == (server.tokens("lamp"), 1)
    assert run(prompts.reply_size("user", "lamp")) is None


def runs_of(words: list[Any], n: int) -> set[tuple[Any, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


seeds_of_texts = st.lists(st.text("abc/7", min_size=1, max_size=8), min_size=2, max_size=4, unique=True)


@settings(max_examples=20)
@given(seeds_of_texts, st.sampled_from(["prose", "words"]))
def test_texts_of_different_seeds_share_no_16_tokens(seeds: list[str], kind: str) -> None:
    local = StubTokenizer(vocabulary())

    def tokens(seed: str) -> list[Any]:
        words = filler(WORDS, seed)
        return local.encode(PROSE.text(seed, 4_000)) if kind == "prose" else [next(words) for _ in range(800)]

    seen: set[tuple[Any, ...]] = set()
    for seed in seeds:
        assert len(tokens(seed)) >= 800 and not seen & runs_of(tokens(seed), 16)
        seen |= runs_of(tokens(seed), 16)
    assert tokens(seeds[0]) == tokens(seeds[0])


@given(st.text(max_size=8), st.integers(0, 3_000), st.integers(0, 3_000))
def test_a_longer_prose_begins_as_the_shorter(seed: str, chars: int, more: int) -> None:
    short, long = PROSE.text(seed, chars), PROSE.text(seed, chars + more)
    assert long.startswith(short) and chars - 24 <= len(short) <= chars


def test_prose_is_spans_of_the_novel() -> None:
    novel = " " + " ".join((files("fanmark.servers") / "prose.txt").read_text().split()) + " "
    words, spans = PROSE.text("7/0/question", 1_000).split(" "), 0
    while words:
        n = 1
        while n < len(words) and f" {' '.join(words[: n + 1])} " in novel:
            n += 1
        words, spans = words[n:], spans + 1
    assert 24 <= spans <= 36  # of 31 characters on average, the space before each included


def test_the_same_text_is_made_once_and_is_always_the_same() -> None:
    server = Server()
    prompts = chat(server)
    text = Text("user", STEMS[1], 300, "7/1/question", True)

    async def twice() -> list[Any]:
        return list(await asyncio.gather(prompts.part(text), prompts.part(text)))

    one, other = run(twice())
    asked = server.asked
    assert one is other is run(prompts.part(text)) and server.asked == asked
    assert run(chat(Server()).part(text)) == one
    for changed in (text._replace(seed="7/2/question"), text._replace(tokens=301), text._replace(first=False)):
        assert run(prompts.part(changed)).content != one.content


def test_the_texts_of_a_query_are_forgotten_and_no_others() -> None:
    server = Server()
    prompts = chat(server)
    texts = [Text("user", "Why?", 40, seed) for seed in ("7/1/question", "7/10/question", "7/role/1", "17/1/question")]
    before = [run(prompts.part(text)) for text in texts]
    prompts.forget("7/1")
    asked = server.asked
    assert [run(prompts.part(text)) for text in texts[1:]] == before[1:] and server.asked == asked
    assert run(prompts.part(texts[0])) == before[0] and server.asked > asked


def test_a_text_that_could_not_be_made_is_tried_again() -> None:
    class Failing(Server):
        """Fails once where it is told to."""

        fails = False

        async def count_chat(self, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]] = ()) -> int:
            if self.fails:
                self.fails = False
                raise CallError("timeout", "no reply within 30 s")
            return await super().count_chat(messages, tools)

    server = Failing()
    prompts = chat(server)
    text = Text("system", "Be brief.", 40, "7/system", True)

    async def both() -> list[Any]:
        return list(await asyncio.gather(prompts.part(text), prompts.part(text), return_exceptions=True))

    server.fails = True
    assert [type(failed) for failed in run(both())] == [CallError, CallError]
    assert run(prompts.part(text)).size == 40


def test_one_who_gives_up_waiting_does_not_spoil_it_for_the_others() -> None:
    prompts = chat(Server())
    text = Text("user", "Why?", 40, "s")

    async def first_cancelled() -> Any:
        tasks = [asyncio.ensure_future(prompts.part(text)) for _ in range(2)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
        return tasks[1].result()

    assert run(first_cancelled()).size == 40


def test_of_a_recordings_texts_the_last_are_kept_and_others_come_out_the_same() -> None:
    """Each is a fifth of what is kept: the first is used again and again, so that it stays; the second is not."""
    server = Server()
    prompts = TokenPrompts(list(range(1000, 1256)), server)
    prompts.kept_tokens = 500
    texts = [Text("user", "", 100, f"1/recorded/{i}") for i in range(6)]

    async def main() -> tuple[list[int], Sequence[int] | str, Sequence[int] | str]:
        first, second = await prompts.part(texts[0]), await prompts.part(texts[1])
        for text in texts[2:]:
            await prompts.part(text)
            assert await prompts.part(texts[0]) is first
        again = await prompts.part(texts[1])
        assert again is not second
        kept = [i for i, text in enumerate(texts) if text in prompts._of["1/recorded"]]
        return kept, second.content, again.content

    kept, before, after = run(main())
    assert kept == [0, 1, 3, 4, 5] and before == after
