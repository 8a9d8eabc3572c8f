"""Messages as what goes over the wire, each exactly as long as the scenario says, by the target's own tokenizer.

Rules of the file:
1. A message costs its text and its share of the chat template; the first message also bears what the template adds to every prompt. Its
   text is shortened by that, so that the prompt's length is the sum of the messages' lengths. With token-id prompts there is no template.
2. The same message is always the same text, or prefix caches would not share it: texts are made once and kept.
3. Prose fills a text up, and a few words of one token each at its end; each text is counted by the target before it is used, twice as a
   rule. How much prose a token is was measured on a sample, once: not from text to text, or the same text would not come out the same.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from fanmark.agents.runtime import Author, Message
from fanmark.loadgen.errors import CallError, ScenarioError
from fanmark.loadgen.questions import CHARS_PER_TOKEN
from fanmark.servers.prose import LEAST_PROSE_CHARS, Prose, cut, filler, spread, sum_up

Count = Callable[[str], Awaitable[int]]


class Text(NamedTuple):
    """What a message says, before it is made as long as it must be: `stem`, then prose drawn from `seed`, `tokens` in all (its share of
    the template included). `first`: it opens the prompt; `opening` is the salted line that then comes before the stem, if any. `whole`:
    the stem as it is, however long, and nothing after it. `begins`: seeds of prose that comes before the stem, as in other texts, each
    about so many tokens long."""

    author: Author
    stem: str
    tokens: int
    seed: str
    first: bool = False
    opening: str = ""
    whole: bool = False
    begins: tuple[tuple[str, int], ...] = ()

    def beginning(self, prose: Callable[[str, int], str], chars_per_token: float) -> str:
        """All that comes before what it is filled up with."""
        begun = " ".join(prose(seed, round(tokens * chars_per_token)) for seed, tokens in self.begins)
        stem = f"{begun} {self.stem}".strip() if begun else self.stem
        return f"{self.opening}\n{stem}" if self.opening else stem


class Part(NamedTuple):
    """One message as sent: a chat message's text, or token ids. `size` is what it adds to the prompt, None where that is not known.
    `fields`: what else a chat message says, for tool calls."""

    content: str | list[int]
    size: int | None
    fields: Mapping[str, Any] = MappingProxyType({})

    @property
    def seen(self) -> str:
        """All that it says, as a text of its own."""
        return f"{self.content}{json.dumps(self.fields)}" if self.fields else str(self.content)

    @property
    def most(self) -> int:
        """Its size, or a bound where that is not known."""
        return len(self.seen) if self.size is None else self.size


def tool_fields(message: Message) -> dict[str, Any]:
    """What a chat message says beside its text: the tool calls that it asks for, or the one that it answers."""
    if message.answers is not None:
        return {"tool_call_id": message.answers}
    asked = [
        {"id": ask.id, "type": "function", "function": {"name": ask.name, "arguments": ask.arguments}}
        for ask in message.asks
    ]
    return {"tool_calls": asked} | ({} if message.text else {"content": None})


class Tokenizer(Protocol):
    """The target's own tokenizer, or the stub's in process."""

    async def encode(self, text: str) -> list[int]:
        """Token ids of a bare text."""

    async def count_chat(self, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]] = ()) -> int:
        """Tokens of a chat prompt, template and generation prompt included."""


class Prompts(Protocol):
    """Makes the parts of a prompt. `exact` is False where lengths are approximate."""

    exact: bool

    async def part(self, text: Text) -> Part: ...

    def forget(self, seed: str) -> None: ...

    async def reply_part(self, author: Author, text: str, ids: list[int] | None) -> Part: ...

    async def reply_size(self, author: Author, text: str) -> tuple[int, int] | None: ...

    def minimum(self, author: Author, first: bool) -> int: ...


class Template(NamedTuple):
    """A chat template's share by author, and what it adds to every prompt with and without a system message."""

    system: int
    user: int
    assistant: int
    with_system: int
    without_system: int

    def share(self, author: Author, first: bool) -> int:
        own: int = getattr(self, author)
        return own + (self.with_system if author == "system" else self.without_system) * first


async def measure_template(tokenizer: Tokenizer) -> Template:
    """The template's shares, from a few probes. Raises ScenarioError when they do not add up, as they must."""
    word = "word"
    n = len(await tokenizer.encode(word))

    async def count(authors: str) -> int:
        names = {"s": "system", "u": "user", "a": "assistant"}
        return await tokenizer.count_chat([{"role": names[a], "content": word} for a in authors])

    u, uu, uau, uauau, su, suau = await asyncio.gather(*map(count, ("u", "uu", "uau", "uauau", "su", "suau")))
    user = uu - u - n
    try:
        system = await count("ssu") - su - n
    except CallError:  # a template that takes one system message only: its share goes with the first
        system = 0
    template = Template(
        system=system,
        user=user,
        assistant=uau - uu - n,
        with_system=su - system - user - 2 * n,
        without_system=u - user - n,
    )
    if uauau - uau != uau - u or suau - su != uau - u or min(template) < 0:
        raise ScenarioError("the chat template's shares do not add up")
    return template


class _Kept:
    """Parts by text: each is made once, also when siblings ask for it at the same time. One that could not be made is tried again. Of a
    recording's texts, which are without number, those that were used last are kept: others are made again, and come out the same."""

    def __init__(self, make: Callable[[Text], Awaitable[Part]]) -> None:
        self._make = make
        self.kept_tokens = 4_000_000  # of a recording's texts, at most
        self._recorded_tokens = 0
        self._of: dict[
            str, dict[Text, Part | asyncio.Future[Part]]
        ] = {}  # by the seed's first two names: a query's own are together

    async def part(self, text: Text) -> Part:
        """The message as sent."""
        owner = "/".join(text.seed.split("/", 2)[:2])
        parts = self._of.setdefault(owner, {})
        part = parts.get(text)
        if owner.endswith("/recorded"):
            self._use_recorded(parts, text)
        if isinstance(part, Part):  # without a turn of the loop, in which thousands of others may be served first
            return part
        if part is None:
            part = parts[text] = asyncio.ensure_future(self._make(text))
        try:
            made = await asyncio.shield(part)
        except CallError:
            if parts.get(text) is part:
                del parts[text]
            raise
        if text in parts:
            parts[text] = made
        return made

    def _use_recorded(self, parts: dict[Text, Part | asyncio.Future[Part]], text: Text) -> None:
        """It is the last that was used now; where it is not there yet, room is made for it."""
        if text in parts:
            parts[text] = parts.pop(text)
            return
        self._recorded_tokens += text.tokens
        while self._recorded_tokens > self.kept_tokens and parts:
            oldest = next(iter(parts))
            del parts[oldest]
            self._recorded_tokens -= oldest.tokens

    def forget(self, seed: str) -> None:
        """Drops the texts of one query, by its seed: two names with a / between them."""
        self._of.pop(seed, None)


class ChatPrompts(_Kept):
    """Chat messages. With a tokenizer their lengths are exact, without one they are so many characters. `words` are one token each;
    `count_part` counts at once, where the parts of a text have as many tokens as the whole."""

    def __init__(
        self,
        words: Sequence[str],
        tokenizer: Tokenizer | None,
        template: Template | None,
        chars_per_token: float = CHARS_PER_TOKEN,
        count_part: Callable[[str], int] | None = None,
    ) -> None:
        super().__init__(self._made)
        self._words = words
        self._count_part = count_part
        self._prose = Prose()
        self._chars_per_token = chars_per_token
        self._tokenizer = tokenizer
        self._template = template
        self.exact = template is not None

    def minimum(self, author: Author, first: bool) -> int:
        """The least length of such a message: its share of the template and a token of text."""
        return 1 + (self._template.share(author, first) if self._template else 0)

    async def _made(self, text: Text) -> Part:
        stem = text.beginning(self._prose.text, self._chars_per_token)
        if text.whole:
            return await self._whole(text.author, stem, text.first)
        if self._template is None:
            chars = max(1, round(text.tokens * self._chars_per_token))
            content = f"{stem} {self._prose.text(text.seed, chars + LEAST_PROSE_CHARS)}".lstrip()
            return Part(cut(content, chars) or content[:chars], None)
        n = text.tokens - self._template.share(text.author, text.first)
        salted = len(await self._tokenizer.encode(text.opening)) if text.opening and self._tokenizer else 0
        if n < 1 + salted:
            least = self.minimum(text.author, text.first) + salted
            raise ScenarioError(
                f"a {text.author} message of {text.tokens} tokens: the target's chat template needs {least}"
            )

        async def count(content: str) -> int:
            counted = await self.reply_size(text.author, content)
            return counted[1] if counted else 0

        def prose(chars: int) -> str:
            return self._prose.text(text.seed, chars)

        words = filler(self._words, text.seed)
        if self._count_part is not None and self._count_part(stem) <= n:
            return Part(sum_up(stem, n, prose, self._chars_per_token, words, self._count_part), text.tokens)
        return Part(await compose(stem, n, prose, self._chars_per_token, words, count), text.tokens)

    async def _whole(self, author: Author, content: str, first: bool) -> Part:
        counted = await self.reply_size(author, content)
        if counted is None or self._template is None:
            return Part(content, None)
        return Part(content, counted[1] + self._template.share(author, first))

    async def reply_part(self, author: Author, text: str, ids: list[int] | None) -> Part:
        """A reply or a tool's result goes back as it is; its size is asked for after the query."""
        return Part(text, None)

    async def reply_size(self, author: Author, text: str) -> tuple[int, int] | None:
        """(what a message with this text adds to a prompt, tokens of the text alone)."""
        if self._tokenizer is None or self._template is None:
            return None
        message = {"role": author, "content": text}
        if author == "system":
            user = {"role": "user", "content": "word"}
            total = await self._tokenizer.count_chat([message, user]) - len(await self._tokenizer.encode("word"))
            return total - self._template.user, total - self._template.user - self._template.share("system", True)
        total = await self._tokenizer.count_chat([message])
        size = total - self._template.without_system
        return size, size - self._template.share(author, False)


class TokenPrompts(_Kept):
    """Token-id prompts: any length from 0, exact on every server that takes them."""

    exact = True

    def __init__(self, word_ids: Sequence[int], tokenizer: Tokenizer, chars_per_token: float = CHARS_PER_TOKEN) -> None:
        super().__init__(self._made)
        self._word_ids = word_ids
        self._tokenizer = tokenizer
        self._prose = Prose()
        self._chars_per_token = chars_per_token

    def minimum(self, author: Author, first: bool) -> int:
        return 1

    async def _made(self, text: Text) -> Part:
        stem = text.beginning(self._prose.text, self._chars_per_token)
        if text.whole:
            ids = await self._tokenizer.encode(stem)
            return Part(ids, len(ids))
        chars = round((text.tokens + spread(text.tokens)) * self._chars_per_token)
        ids = (await self._tokenizer.encode(f"{stem} {self._prose.text(text.seed, chars)}"))[: text.tokens]
        words = filler(self._word_ids, text.seed)
        return Part([*ids, *(next(words) for _ in range(text.tokens - len(ids)))], text.tokens)

    async def reply_part(self, author: Author, text: str, ids: list[int] | None) -> Part:
        """A reply's own ids; a tool's result is encoded as the target would."""
        if ids is None:
            ids = await self._tokenizer.encode(text)
        return Part(ids, len(ids))

    async def reply_size(self, author: Author, text: str) -> tuple[int, int] | None:
        return None


async def measure_prose(tokenizer: Tokenizer) -> float:
    """Characters of prose a token, by this tokenizer."""
    sample = Prose().sample
    tokens = len(await tokenizer.encode(sample))
    return len(sample) / max(1, tokens)


async def compose(
    stem: str, tokens: int, prose: Callable[[int], str], chars_per_token: float, words: Iterator[str], count: Count
) -> str:
    """A text of exactly `tokens` by `count`: the stem, prose (of so many characters) and words of one token each; or the stem cut at a
    word. Raises ScenarioError if it cannot be had."""
    chars = round((tokens - spread(tokens)) * chars_per_token) - len(stem)
    body = prose(chars) if chars >= LEAST_PROSE_CHARS else ""
    ends: list[str] = []
    for _ in range(12):
        text = " ".join(part for part in (stem, body, *ends) if part)
        off = (await count(text) if text else 0) - tokens
        if off == 0:
            return text
        if off < 0:
            ends += [next(words) for _ in range(-off)]
        elif off <= len(ends):
            del ends[-off:]
        elif body:
            body = cut(body, len(body) - round((off - len(ends)) * chars_per_token) - LEAST_PROSE_CHARS)
            ends = []
        else:
            stem, ends = await _cut_stem(stem, tokens, count), []
    raise ScenarioError(f'no text of {tokens} tokens can be made for the target\'s tokenizer: use api = "completions"')


async def _cut_stem(stem: str, tokens: int, count: Count) -> str:
    """The most words of the stem that fit."""
    words = stem.split(" ")
    low, high = 0, len(words) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if await count(" ".join(words[:middle])) <= tokens else (low, middle - 1)
    return " ".join(words[:low])
