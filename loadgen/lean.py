"""Records in little memory, for who reads all of a long run's at once: what is equal is one object, token gaps are packed."""

from array import array
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, TypeVar

_V = TypeVar("_V")
_PAIR_BYTES = 2 * array("q").itemsize


class PackedGaps(Mapping[int, int]):
    """A call's token gaps by log bucket, in a third of a dict's memory or less; they cannot be changed."""

    __slots__ = ("_packed",)

    def __init__(self, gaps: Mapping[int, int]) -> None:
        self._packed = array("q", [*gaps.keys(), *gaps.values()]).tobytes()

    def __getitem__(self, bucket: int) -> int:
        return self._unpacked()[bucket]

    def __iter__(self) -> Iterator[int]:
        return iter(self._unpacked())

    def __len__(self) -> int:
        return len(self._packed) // _PAIR_BYTES

    def items(self) -> ItemsView[int, int]:
        return self._unpacked().items()

    def values(self) -> ValuesView[int]:
        return self._unpacked().values()

    def _unpacked(self) -> dict[int, int]:
        numbers, n = memoryview(self._packed).cast("q"), len(self)
        return dict(zip(numbers[:n], numbers[n:], strict=True))


class _Named:
    """The names of a row's values are held once for all rows, as attributes' are."""


def row(values: Mapping[str, _V]) -> dict[str, _V]:
    """A dict that shares its keys with those made of rows with the same names."""
    named = _Named()
    for name, value in values.items():
        setattr(named, name, value)
    return vars(named)


class Shared:
    """One object for all that are equal. Nobody may change one."""

    def __init__(self) -> None:
        self._of: dict[Any, Any] = {}

    def word(self, word: str | None) -> str | None:
        """A word of which there are few."""
        found: str | None = self._of.setdefault(word, word)
        return found

    def numbers(self, numbers: list[int]) -> list[int]:
        """A list of which there are few."""
        found: list[int] = self._of.setdefault(tuple(numbers), numbers)
        return found
