"""Messages as what goes over the wire, each exactly as long as the scenario says, by the target's own tokenizer.

Rules of the file:
1. A message costs its text and its share of the chat template; the first message also bears what the template adds to every prompt. Its
   text is shortened by that, so that the prompt's length is the sum of the messages' lengths. With token-id prompts there is no template.
2. The same message is always the same text, or prefix caches would not share it: texts are made once and kept.
3. Words of one token each fill a text up; each text is counted again by the target before it is used.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from fanmark.agents.runtime import Author
from fanmark.loadgen.errors import CallError, ScenarioError

W = TypeVar("W")
Count = Callable[[str], Awaitable[int]]


class Text(NamedTuple):
    """What a message says, before it is made as long as it must be: `stem`, then words drawn from `seed`, `tokens` in all (its share of
    the template included). `first`: it opens the prompt; `opening` is the salted line that then comes before the stem, if any."""

    author: Author
    stem: str
    tokens: int
    seed: str
    first: bool = False
    opening: str = ""


class Part(NamedTuple):
    """One message as sent: a chat message's text, or token ids. `size` is what it adds to the prompt, None where that is not known."""

    content: str | list[int]
    size: int | None


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
    """Parts by text: each is made once, also when siblings ask for it at the same time. One that could not be made is tried again."""

    def __init__(self, make: Callable[[Text], Awaitable[Part]]) -> None:
        self._make = make
        self._of: dict[
            str, dict[Text, Part | asyncio.Future[Part]]
        ] = {}  # by the seed's first two names: a query's own are together

    async def part(self, text: Text) -> Part:
        """The message as sent."""
        parts = self._of.setdefault("/".join(text.seed.split("/", 2)[:2]), {})
        part = parts.get(text)
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
        parts[text] = made
        return made

    def forget(self, seed: str) -> None:
        """Drops the texts of one query, by its seed: two names with a / between them."""
        self._of.pop(seed, None)


class ChatPrompts(_Kept):
    """Chat messages. With a tokenizer their lengths are exact, without one a word is taken for a token."""

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer | None, template: Template | None) -> None:
        super().__init__(self._made)
        self._words = words
        self._tokenizer = tokenizer
        self._template = template
        self.exact = template is not None

    def minimum(self, author: Author, first: bool) -> int:
        """The least length of such a message: its share of the template and a token of text."""
        return 1 + (self._template.share(author, first) if self._template else 0)

    async def _made(self, text: Text) -> Part:
        stem = f"{text.opening}\n{text.stem}" if text.opening else text.stem
        words = filler(self._words, text.seed)
        if self._template is None:
            content = " ".join([*stem.split(" "), *(next(words) for _ in range(text.tokens))][: text.tokens])
            return Part(content, None)
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

        return Part(await compose(stem, n, words, count), text.tokens)

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

    def __init__(self, word_ids: Sequence[int], tokenizer: Tokenizer) -> None:
        super().__init__(self._made)
        self._word_ids = word_ids
        self._tokenizer = tokenizer

    def minimum(self, author: Author, first: bool) -> int:
        return 1

    async def _made(self, text: Text) -> Part:
        stem = f"{text.opening}\n{text.stem}" if text.opening else text.stem
        ids = (await self._tokenizer.encode(stem))[: text.tokens]
        words = filler(self._word_ids, text.seed)
        return Part([*ids, *(next(words) for _ in range(text.tokens - len(ids)))], text.tokens)

    async def reply_part(self, author: Author, text: str, ids: list[int] | None) -> Part:
        """A reply's own ids; a tool's result is encoded as the target would."""
        if ids is None:
            ids = await self._tokenizer.encode(text)
        return Part(ids, len(ids))

    async def reply_size(self, author: Author, text: str) -> tuple[int, int] | None:
        return None


def filler(words: Sequence[W], seed: str) -> Iterator[W]:
    """An endless stream of words, the same for the same seed; two seeds share no run of 16 tokens but by a chance below 1e-30."""
    draw, n = random.Random(seed).getrandbits, len(words)
    bits = n.bit_length()
    while True:  # what randrange does, at a third of its cost: all texts are made by this loop
        place = draw(bits)
        if place < n:
            yield words[place]


async def compose(stem: str, tokens: int, words: Iterator[str], count: Count) -> str:
    """A text of exactly `tokens` by `count`: the stem cut at a word, or filled up. Raises ScenarioError if it cannot be had."""
    kept = stem.split(" ")
    stem_tokens = await count(stem)
    if stem_tokens > tokens:
        low, high = 0, len(kept)  # the most words of the stem that fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if await count(" ".join(kept[:middle])) <= tokens else (low, middle - 1)
        kept = kept[:low]
        stem_tokens = await count(" ".join(kept)) if kept else 0
    filled = [next(words) for _ in range(tokens - stem_tokens)]
    for _ in range(8):
        text = " ".join([*kept, *filled])
        off = await count(text) - tokens
        if off == 0:
            return text
        filled = filled[:-off] if off > 0 else [*filled, *(next(words) for _ in range(-off))]
    raise ScenarioError(f'no text of {tokens} tokens can be made for the target\'s tokenizer: use api = "completions"')
