"""Progress while a run goes on: a live table on a terminal, a line every few seconds elsewhere. Always on standard error."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from fanmark.loadgen.health import worst
from fanmark.loadgen.table import number
from fanmark.loadgen.tally import Tally

if TYPE_CHECKING:
    from rich.table import Table

_LINE_EVERY_S = 5.0


def tell(line: str, out: TextIO | None) -> None:
    """Prints a line of progress where it is wanted, and while somebody reads it."""
    if out is not None:
        with suppress(BrokenPipeError):
            print(line, file=out, flush=True)


class Progress:
    """Reads a Tally. `total` is the number of queries, None where a duration is given; `now` is the run's clock."""

    def __init__(self, tally: Tally, total: int | None, now: Callable[[], float], out: TextIO) -> None:
        self._tally = tally
        self._total = total
        self._now = now
        self._out = out
        self._before = (now(), 0, 0)

    async def show(self) -> None:
        """Shows progress until cancelled."""
        if not self._out.isatty():
            while True:
                await asyncio.sleep(_LINE_EVERY_S)
                tell(self.line(), self._out)
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(file=self._out), refresh_per_second=4, transient=True) as live:
            while True:
                live.update(self._table())
                await asyncio.sleep(0.5)

    def _rates(self) -> tuple[float, float]:
        """Tokens/s in and out since the last look."""
        arms = self._tally.arms.values()
        read, written = (sum(arm.tokens[kind] for arm in arms) for kind in ("input", "output"))
        at = self._now()
        before_at, before_read, before_written = self._before
        self._before = (at, read, written)
        seconds = max(at - before_at, 1e-9)
        return (read - before_read) / seconds, (written - before_written) / seconds

    def _verdict(self) -> str:
        return worst([state.verdict for state in self._tally.clients.values()])

    def line(self) -> str:
        """Everything in one line."""
        read, written = self._rates()
        arms = self._tally.arms
        done = sum(arm.completed for arm in arms.values())
        of = f" of {self._total}" if self._total is not None else ""
        flying = sum(arm.calls_in_flight for arm in arms.values())
        ratios = ", ".join(
            f"{name} {ratio:.2f}x"
            for name in arms
            if name != self._tally.baseline and (ratio := self._tally.amplification(name, "calls")) is not None
        )
        failed = sum(arm.finished["failed"] for arm in arms.values())
        again = sum(arm.retries for arm in arms.values())
        verdict = self._verdict()
        if not any(arm.started for arm in arms.values()):
            return f"{self._now():6.1f} s  warming up, {flying} calls in flight"
        return (
            f"{self._now():6.1f} s  {done}{of} queries done"
            + (f", {failed} failed" if failed else "")
            + (f", {again} calls sent again" if again else "")
            + f", {flying} calls in flight, tokens/s in {number(read)} out {number(written)}"
            + (f", calls: {ratios}" if ratios else "")
            + (f", client {verdict}" if verdict != "ok" else "")
        )

    def _table(self) -> "Table":
        from rich.table import Table

        read, written = self._rates()
        table = Table(
            title=f"{self._now():.0f} s   tokens/s in {number(read)} out {number(written)}   client {self._verdict()}",
            title_justify="left",
        )
        for column in ("arm", "done", "failed", "running", "calls in flight", "calls", "tokens out", "latency"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for name, arm in self._tally.arms.items():
            ratios = [self._tally.amplification(name, resource) for resource in ("calls", "output_tokens", "latency_s")]
            shown = (
                ["baseline", "", ""] if name == self._tally.baseline else [f"{r:.2f}x" if r else "-" for r in ratios]
            )
            counts = (arm.completed, arm.finished["failed"], arm.in_flight, arm.calls_in_flight)
            table.add_row(name, *map(str, counts), *shown)
        return table
