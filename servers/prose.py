"""Prose to fill texts with: short spans of a public-domain novel (prose.txt) at seeded places, one after another.

Rules of the file:
1. Equal seeds give equal prose, and a longer text begins as the shorter one does.
2. A span has at most 36 characters, so that no 16 tokens come out of one span: two seeds must meet in two spans that follow each other
   to share a block of a prefix cache. Of 10 million pairs of texts of 800 tokens none shared 16 tokens in a row by our stub's
   tokenizer; 4.5 million pairs shared 18 such runs by a byte-pair one (cl100k).
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import shake_128
from importlib.resources import files
from struct import unpack
from typing import TypeVar

from fanmark.servers.tokenizer import Tokenizer, vocabulary

W = TypeVar("W")

LEAST_PROSE_CHARS = 24  # less is not worth it

_LOOKED_AT = 38  # characters from a span's place on; the words at both ends are cut
_SPAN_CHARS = 30  # a span and the space before it, a little less than on average


class Prose:
    """The novel, read when it is first asked for."""

    @cached_property
    def _novel(self) -> str:
        text = files("fanmark.servers").joinpath("prose.txt").read_text()
        return text.replace("\n\n", " ").replace("\n", " ")

    @property
    def sample(self) -> str:
        """Enough of it to see how many tokens it takes."""
        return self.text("sample", 4_000)

    def text(self, seed: str, chars: int) -> str:
        """Prose of at most `chars` characters, of which a word at most is missing."""
        novel = self._novel
        end, spans = len(novel) - _LOOKED_AT, 2 + chars // _SPAN_CHARS
        while True:
            places = unpack(f"<{spans}I", shake_128(seed.encode()).digest(4 * spans))
            looked_at = [novel[(at := place % end) : at + _LOOKED_AT] for place in places]
            found = " ".join([each[each.find(" ") + 1 : each.rfind(" ")] for each in looked_at])
            if len(found) >= chars:
                return cut(found, chars)
            spans += 1 + spans // 16


def cut(text: str, chars: int) -> str:
    """The text's first `chars` characters, as far as whole words go."""
    return text if len(text) <= chars else text[: max(0, chars) + 1].rpartition(" ")[0]


def filler(words: Sequence[W], seed: str) -> Iterator[W]:
    """An endless stream of words, the same for the same seed; two seeds share no run of 16 tokens but by a chance below 1e-30."""
    draw, n = random.Random(seed).getrandbits, len(words)
    bits = n.bit_length()
    while True:
        place = draw(bits)
        if place < n:
            yield words[place]


def spread(tokens: int) -> float:
    """By how many tokens prose of the right number of characters may well be off: a standard deviation or so."""
    return 0.6 * math.sqrt(tokens)


def sum_up(
    stem: str,
    tokens: int,
    prose: Callable[[int], str],
    chars_per_token: float,
    words: Iterator[str],
    count: Callable[[str], int],
) -> str:
    """A text of exactly `tokens`, where parts can be counted: a stem that fits, too much prose, and of that the last words left out."""
    chars = round((tokens + spread(tokens)) * chars_per_token) - len(stem)
    body = prose(chars) if chars >= LEAST_PROSE_CHARS else ""
    over = count(stem) + count(body) - tokens
    if over > 0:
        body, *left_out = body.rsplit(" ", over)
        over -= count(" ".join(left_out))
    if over > 0:  # it had too few words
        body, over = "", over - count(body)
    return " ".join(part for part in (stem, body, *(next(words) for _ in range(-over))) if part)


class Filler:
    """Texts of exactly so many of our stub's tokens."""

    def __init__(self) -> None:
        self._prose = Prose()
        self._tokenizer = Tokenizer(vocabulary())

    @cached_property
    def _chars_per_token(self) -> float:
        return len(self._prose.sample) / self._tokenizer.count(self._prose.sample)

    def text(self, tokens: int, seed: int | str) -> str:
        """Prose, the same for the same seed."""

        def prose(chars: int) -> str:
            return self._prose.text(f"result {seed}", chars)

        words = filler(self._tokenizer.words, f"result {seed}")
        return sum_up("", tokens, prose, self._chars_per_token, words, self._tokenizer.count)
