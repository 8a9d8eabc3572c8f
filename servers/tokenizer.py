"""The stub's tokenizer: additive, so that every length can be had exactly and costs no vocabulary file.

Rules of the file:
1. A token is up to 12 letters, up to 3 digits or up to 2 other characters; white space separates and is itself free.
2. Texts are encoded apart: `encode(a) + encode(b)` is the prompt made of the messages a and b (no template).
3. `encode(decode(ids)) == ids` for ids of the vocabulary, so an answer comes back as exactly the tokens it was written in.
The sizes are near those of a real byte-pair tokenizer (some 4 bytes a token), but only near.
"""

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from zlib import crc32

_PIECE = re.compile(r"[A-Za-z]{1,12}|[0-9]{1,3}|[^\sA-Za-z0-9]{1,2}")
_HASHED_IDS = 1 << 20
_REMEMBERED_PIECES = 100_000


def vocabulary() -> list[str]:
    """The words of one token each that answers and filler are made of, in the order of their ids."""
    return files("fanmark.servers").joinpath("words.txt").read_text().split()


class _Ids(dict[str, int]):
    """Ids by piece; one outside the vocabulary gets a hashed id above it, and is remembered while there is room."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__((word, i) for i, word in enumerate(words))
        self._first_hashed = len(words)

    def __missing__(self, piece: str) -> int:
        found = self._first_hashed + crc32(piece.encode()) % _HASHED_IDS
        if len(self) < _REMEMBERED_PIECES:
            self[piece] = found
        return found


class Tokenizer:
    """Turns text into token ids and answers back into text; remembers the ids of the texts it met last."""

    def __init__(self, words: Sequence[str], *, remembered_texts: int = 20_000) -> None:
        self.words = list(words)
        self._ids = _Ids(self.words)
        self._remembered: dict[str, list[int]] = {}
        self._limit = remembered_texts

    def encode(self, text: str) -> list[int]:
        """Token ids of one text. Do not change the list."""
        ids = self._remembered.get(text)
        if ids is None:
            known = self._ids
            ids = [known[piece] for piece in _PIECE.findall(text)]
            if len(self._remembered) >= self._limit:
                self._remembered.clear()
            self._remembered[text] = ids
        return ids

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(_PIECE.findall(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, one space between; ids outside the vocabulary have no text and read as `?`."""
        words = self.words
        return " ".join(words[i] if i < len(words) else "?" for i in ids)
