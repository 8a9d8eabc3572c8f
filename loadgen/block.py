"""A block of a schedule: arms that run at once, and their queries under way."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from fanmark.loadgen.records import Phase, Query
from fanmark.loadgen.scenario import Arm


class Block:
    """Arms that run at once, and their queries under way. Without a window all but the warm-up counts."""

    def __init__(
        self,
        arms: Sequence[Arm],
        repeat: int,
        counted_from: int,
        uncounted_from: int,
        session_from: int = 0,
        *,
        windowed: bool,
    ) -> None:
        self.arms = arms
        self.repeat = repeat
        self.windowed = windowed
        self.session_from = session_from
        self.place_from = max(counted_from, uncounted_from) if windowed else counted_from
        self.start_at: float | None = None
        self.end_at: float | None = None
        self.running: dict[asyncio.Task[Query], Phase] = {}
        self._counted_from = counted_from
        self._uncounted_from = uncounted_from

    def phase(self, at: float) -> Phase:
        """That of a query which is due at this instant."""
        if not self.windowed:
            return "window"
        if self.start_at is None or at < self.start_at:
            return "lead-in"
        return "window" if self.end_at is None or at < self.end_at else "lead-out"

    def number(self, phase: Phase, i: int) -> int:
        """Of a phase's query number i. Lead-in and lead-out take the negative numbers in turn, a warm-up all."""
        if phase == "window":
            return self._counted_from + i
        return -1 - self._uncounted_from - (2 * i + (phase == "lead-out") if self.windowed else i)


async def together(parts: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once, begun one a turn: thousands in one would keep the loop from all else."""
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(part)
            await asyncio.sleep(0)


async def answered(query: "asyncio.Task[Query]") -> None:
    """Until the query has ended, whatever became of it."""
    ended = asyncio.get_running_loop().create_future()  # asyncio.wait takes 1 KB for the same
    query.add_done_callback(partial(_tell, ended))
    await ended


def _tell(ended: "asyncio.Future[None]", task: "asyncio.Task[Query]") -> None:
    if not ended.done():
        ended.set_result(None)


async def ended(tasks: Iterable["asyncio.Task[Query]"]) -> None:
    """Waits for all, whatever becomes of them."""
    left = set(tasks)
    if left:
        await asyncio.wait(left)
