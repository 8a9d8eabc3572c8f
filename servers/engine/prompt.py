"""A prompt in parts, one a message, so that what was worked out for a prefix of messages can be remembered."""

from collections.abc import Sequence
from typing import overload


class Prompt(Sequence[int]):
    """Token ids of messages, end to end; reads like one list of them.

    Give the very same list object for the same message again: that is how it is recognised. The lists must not change afterwards.
    """

    __slots__ = ("_length", "parts")

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        self.parts = parts
        self._length = sum(map(len, parts))

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<Prompt of {self._length} tokens in {len(self.parts)} messages>"

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """A token, or a list of tokens. What is near the end is found fastest."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return self._after(start)[: max(0, stop - start)] if step == 1 else self._after(0)[index]
        if not -self._length <= index < self._length:
            raise IndexError(f"token {index} of {self._length}")
        return self._after(index % self._length)[0]

    def _after(self, start: int) -> list[int]:
        """The tokens from `start` on."""
        tail: list[Sequence[int]] = []
        at = self._length
        for part in reversed(self.parts):
            if at <= start:
                break
            at -= len(part)
            tail.append(part)
        tokens = [token for part in reversed(tail) for token in part]
        return tokens[max(0, start - at) :] if start < self._length else []
