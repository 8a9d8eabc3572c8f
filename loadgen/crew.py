"""Who carries out a run together: one process alone, or several workers that share whole queries out and wait for each other.

The schedule is computed by all and shared by none: each worker knows all arrivals and takes those that are its own. Whatever all must
decide alike (when an arm starts, when its window does) is decided in a meeting: all say what they know and get one instant back.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol


class Met(NamedTuple):
    """What a meeting gives to each of its members: one instant of the run's clock, and what all said, in the order of the workers."""

    at: float
    said: list[float]


class Crew(Protocol):
    """The workers of a run, as one of them sees them: the one with this `index` of `count`."""

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    async def meet(self, say: Sequence[float] = ()) -> Met:
        """Waits until all workers have come here as often as this one has; those that died are not waited for."""


class Alone:
    """A run in one process: nobody to wait for."""

    index, count = 0, 1

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now

    async def meet(self, say: Sequence[float] = ()) -> Met:
        """At once."""
        return Met(self._now(), list(say))


def share(total: int, crew: Crew) -> int:
    """How many of `total` are this worker's: shares differ by one at most, and add up."""
    return len(range(crew.index, total, crew.count))
