"""When results were handled, by number of batch: from it, the gaps between a request's tokens without a note for each token."""

from bisect import bisect_right
from collections.abc import Sequence

Gaps = list[tuple[float, int]]  # (seconds, how many)


class Timeline:
    """Grows at its end; `forget` cuts what no unfinished request needs any more."""

    def __init__(self) -> None:
        self._numbers: list[int] = []  # first batch of each entry
        self._ends_at: list[float] = []  # when the last batch of the entry was handled
        self._gaps: Gaps = []  # time to a batch from the one before it, on average over the entry; batches
        self._next = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, batches: int, at: float) -> None:
        """The next `batches` results were handled, evenly, the last of them `at`."""
        before = self._ends_at[-1] if self._ends_at else at
        self._numbers.append(self._next)
        self._ends_at.append(at)
        self._gaps.append(((at - before) / batches, batches))
        self._next += batches

    def at(self, number: int) -> float:
        """When the result of a batch was handled."""
        entry = bisect_right(self._numbers, number) - 1
        gap, batches = self._gaps[entry]
        return self._ends_at[entry] - gap * (self._numbers[entry] + batches - 1 - number)

    def gaps(self, spans: Sequence[tuple[int, int]]) -> Gaps:
        """Gaps between the tokens that the batches of `spans` (first, last) brought, one token each."""
        gaps: Gaps = []
        before = -1
        for first, last in spans:
            if before >= 0:
                gaps.append((self.at(first) - self.at(before), 1))
            if last > first:
                gaps += self._within(first + 1, last)
            before = last
        return gaps

    def _within(self, first: int, last: int) -> Gaps:
        start, stop = bisect_right(self._numbers, first) - 1, bisect_right(self._numbers, last)
        gaps = self._gaps[start:stop]
        skipped = first - self._numbers[start]
        if skipped:
            gaps[0] = (gaps[0][0], gaps[0][1] - skipped)
        beyond = self._numbers[stop - 1] + self._gaps[stop - 1][1] - 1 - last
        if beyond:
            gaps[-1] = (gaps[-1][0], gaps[-1][1] - beyond)
        return gaps

    def forget(self, number: int) -> None:
        """Nobody will ask about batches before `number`."""
        entry = max(0, bisect_right(self._numbers, number) - 1)
        del self._numbers[:entry], self._ends_at[:entry], self._gaps[:entry]
