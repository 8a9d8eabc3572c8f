"""Ranges on the command line: what is swept, and over which values. Pure."""

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fanmark.loadgen.errors import ScenarioError

RATE, CONCURRENCY = "load.rate", "load.concurrency"
UNITS = {RATE: "queries/s", CONCURRENCY: "queries at a time"}
FEW = 5  # values of a range that names no number of them, where all are looked at
MOST = 1000
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})(?::([^:]*))?")
HOW = "give LO:HI, LO:HI:N for N values, or a list A,B,C"


@dataclass(frozen=True)
class Axis:
    """One key of the scenario, and its values; None: whatever is asked for between `low` and `high`."""

    key: str
    low: float
    high: float
    integer: bool
    values: tuple[Any, ...] | None

    @property
    def unit(self) -> str:
        return UNITS.get(self.key, self.key)

    @property
    def of_load(self) -> bool:
        """Whether it is the load itself, of each arm by itself."""
        return self.key in UNITS


def axis_of(key: str, text: str, flag: str) -> Axis | None:
    """The axis that KEY=TEXT names; None where the text is one plain value. Raises ScenarioError; `flag` is how the user gave it."""
    text = text.strip()
    found = _RANGE.fullmatch(text)
    if found is None:
        if "," in text and not set(text) & set("[]{}\"'"):
            return _of_list(key, text.split(","), flag)
        if re.match(rf"{_NUMBER}\s*(?::|\.\.)", text):
            raise ScenarioError(f"{flag}: is no range: {HOW}")
        return None
    integer = key == CONCURRENCY or (
        key != RATE and all(re.fullmatch(r"[+-]?\d+", part) for part in found.groups()[:2])
    )
    low, high = (float(part) for part in found.groups()[:2])
    if not low < high or not math.isfinite(high):
        raise ScenarioError(f"{flag}: goes from {low:g} to {high:g}: the first must be below the second")
    if key in UNITS and low <= 0:
        raise ScenarioError(f"{flag}: begins at {low:g}: must begin above 0")
    if integer and (low != int(low) or high != int(high)):
        raise ScenarioError(f"{flag}: must be of whole numbers")
    count = found[3]
    if count is not None and (not count.isdecimal() or not 2 <= int(count) <= MOST):
        raise ScenarioError(f"{flag}: {count!r} values: must be a number from 2 to {MOST}")
    return Axis(key, low, high, integer, None if count is None else spaced(low, high, int(count), integer))


def spaced(low: float, high: float, count: int, integer: bool) -> tuple[float | int, ...]:
    """So many values, by even factors where all are above 0, else by even steps; of whole numbers each once."""
    shares = [i / (count - 1) for i in range(count)]
    values = [low * (high / low) ** s if low > 0 else low + (high - low) * s for s in shares]
    if integer:
        return tuple(sorted({round(value) for value in values}))
    return (low, *(float(f"{value:.4g}") for value in values[1:-1]), high)


def _of_list(key: str, parts: Sequence[str], flag: str) -> Axis:
    values = tuple(_value(part.strip()) for part in parts)
    if "" in values or len(set(map(str, values))) != len(values):
        raise ScenarioError(f"{flag}: a value is empty or stands there twice: {HOW}")
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if key in UNITS:
        whole = key == CONCURRENCY
        if not numbers or any(value <= 0 or (whole and value != int(value)) for value in values):
            raise ScenarioError(f"{flag}: must be {'whole numbers' if whole else 'numbers'} above 0")
    if numbers:
        values = tuple(sorted(values))
        return Axis(key, values[0], values[-1], all(isinstance(value, int) for value in values), values)
    return Axis(key, 0, len(values) - 1, True, values)


def _value(text: str) -> Any:
    """A number, true or false, else text; as --set reads them."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
