"""A column of numbers, in as few bytes as they need."""

import math
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_CODES = "bhiqd"
_WIDER = dict(pairwise(_CODES))
_NONE: dict[str, float] = {code: -(1 << (8 * array(code).itemsize - 1)) for code in _WIDER} | {"d": math.nan}
_SMALL = 100  # a float that is a whole number no larger, mostly 0.0, is kept in a byte


class Column:
    """Numbers in bytes, until one of them needs more. Whole numbers stay whole."""

    __slots__ = ("_floats", "_none", "_values", "unknown")

    def __init__(self) -> None:
        self._values: array[Any] = array("b")
        self._none = _NONE["b"]
        self._floats = False  # what lies here as whole numbers
        self.unknown = 0

    def append(self, value: float | None) -> None:
        """One more."""
        if value is None:
            self.unknown += 1
            self._values.append(self._none)
            return
        try:
            if value != self._none:
                self._values.append(value)
                return
        except (OverflowError, TypeError):
            if isinstance(value, float) and value.is_integer() and abs(value) < _SMALL:
                self._floats = True
                self._values.append(int(value))
                return
        self._widen(_WIDER[self._values.typecode] if isinstance(value, int) else "d")
        self.append(value)

    def extend(self, other: "Column") -> None:
        """All of another one, behind these."""
        code = max(self._values.typecode, other._values.typecode, key=_CODES.index)
        if self._values.typecode != code:
            self._widen(code)
        none, rest = self._none, other._values
        same = rest.typecode == code
        self._values.extend(rest if same else (none if value == other._none else value for value in rest))
        self._floats |= other._floats
        self.unknown += other.unknown

    def _widen(self, code: str) -> None:
        none, self._none = self._none, _NONE[code]
        self._values = array(code, (self._none if value == none else value for value in self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        if self.unknown:
            return (value if known else None for value, known in zip(self._plain(), self._known(), strict=True))
        return self._plain()

    def known(self) -> Iterator[Any]:
        """Those that are not None."""
        return (value for value in self if value is not None) if self.unknown else self._plain()

    def _plain(self) -> Iterator[Any]:
        return map(float, self._values) if self._floats else iter(self._values)

    def _known(self) -> Iterator[bool]:
        none = self._none
        return (value == value and value != none for value in self._values)
