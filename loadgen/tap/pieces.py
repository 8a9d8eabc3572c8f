"""A text in pieces by which prompts are alike, so that what they share is shared again when they are made again: a prompt that is one text,
as those of completions are, and the beginnings of a chat's messages. Pure.

1. A reply, or a tool's result, of the same query that stands in a completion's prompt is a piece of its own.
2. What lies between is cut each 256 characters (some 64 tokens), beyond 4,096 each 512, beyond 16,384 each 2,048: so less than an eighth
   of a long beginning is taken for different.
3. A piece's id is a hash of all up to its end: equal ids are equal beginnings.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

from fanmark.loadgen.quoting import SHORT
from fanmark.loadgen.recording import Said as Told
from fanmark.loadgen.tap.seen import Seen

_GRID = ((4_096, 256), (16_384, 512))  # up to so many characters, pieces of so many
_COARSE = 2_048  # of what is longer
_CHARS_A_TOKEN = 4


def pieces(salt: bytes, text: str, told: Told, earlier: Sequence[Seen]) -> list[tuple[Told, Seen | None]]:
    """The message `told` cut, each piece with the call of `earlier` ones whose reply it is. Their lengths are near enough for now."""
    digest, found = blake2b(digest_size=8, key=salt), []
    for start, end, source in _cuts(text, earlier):
        digest.update(text[start:end].encode(errors="surrogatepass"))
        tokens = -(-(end - start) // _CHARS_A_TOKEN)
        author = told.author if source is None else "assistant"
        found.append((Told(digest.copy().hexdigest(), tokens, author), source))
    return found


def beginnings(salt: bytes, text: str, tokens: int) -> list[tuple[str, int]]:
    """The ids of what a message of so many tokens begins with, itself left out, each with the tokens that it is longer than the one before,
    near enough: as the text is."""
    digest, found = blake2b(digest_size=8, key=salt), []
    for start, end in _grid(0, len(text)):
        if end < len(text):
            digest.update(text[start:end].encode(errors="surrogatepass"))
            found.append((digest.copy().hexdigest(), tokens * end // len(text) - tokens * start // len(text)))
    return found


def ending(found: Sequence[Told], tokens: int) -> list[Told]:
    """Messages or pieces that add up to so many tokens: where they do not, for each is as long as it was when it was met first, the last is
    another text."""
    kept, off = list(found), tokens - sum(told.tokens for told in found)
    while off and kept:
        last = kept.pop()
        off += last.tokens
        if off > 0:
            kept.append(Told(f"{last.id}-{off}", off, last.author))
            break
    return kept


def _cuts(text: str, earlier: Sequence[Seen]) -> Iterator[tuple[int, int, Seen | None]]:
    """From where to where each piece goes, and whose reply it is."""
    at = 0
    for start, source in sorted(_replies(text, earlier), key=lambda each: each[0]):
        if start >= at:
            yield from ((a, b, None) for a, b in _grid(at, start))
            at = start + len(source.text)
            yield start, at, source
    yield from ((a, b, None) for a, b in _grid(at, len(text)))


def _replies(text: str, earlier: Sequence[Seen]) -> Iterator[tuple[int, Seen]]:
    for seen in earlier:
        if len(seen.text) >= SHORT and (start := text.find(seen.text)) >= 0:
            yield start, seen


def _grid(start: int, end: int) -> Iterator[tuple[int, int]]:
    at = start
    while at < end:
        upto = min(end, at + next((size for limit, size in _GRID if at - start < limit), _COARSE))
        yield at, upto
        at = upto
