"""Progress while a run goes on: a live view on a terminal, a line every few seconds elsewhere. Always on standard error."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from fanmark.loadgen.course import WORKER_COLUMNS, Course, of_arm
from fanmark.loadgen.table import number, short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_LINE_EVERY_S = 5.0
RATIOS = {
    "calls": "calls",
    "input_tokens": "input\ntokens",
    "output_tokens": "output\ntokens",
    "latency_s": "latency",
}


def tell(line: str, out: TextIO | None) -> None:
    """Prints a line of progress where it is wanted, and while somebody reads it."""
    if out is not None:
        with suppress(BrokenPipeError):
            print(line, file=out, flush=True)


class Progress:
    """Shows a Course."""

    def __init__(self, course: Course, out: TextIO) -> None:
        self._course = course
        self._out = out
        self._before = (course.now(), 0, 0)

    async def show(self) -> None:
        """Shows progress until cancelled."""
        if not self._out.isatty():
            while True:
                await asyncio.sleep(_LINE_EVERY_S)
                tell(self.line(), self._out)
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._out)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self.view(console.height), refresh=True)
                await asyncio.sleep(0.5)

    def _tokens_per_s(self) -> tuple[float, float]:
        """In and out, since the last look."""
        arms = self._course.tally.arms.values()
        read, written = (sum(arm.tokens[kind] for arm in arms) for kind in ("input", "output"))
        at = self._course.now()
        before_at, before_read, before_written = self._before
        self._before = (at, read, written)
        seconds = max(at - before_at, 1e-9)
        return (read - before_read) / seconds, (written - before_written) / seconds

    def _done(self) -> str:
        of = f" of {self._course.total}" if self._course.total is not None else ""
        failed, again = self._course.failed, sum(arm.retries for arm in self._course.tally.arms.values())
        return (
            f"{self._course.done}{of} queries done"
            + (f", {failed} failed" if failed else "")
            + (f", {again} calls sent again" if again else "")
        )

    def line(self) -> str:
        """Everything in one line."""
        read, written = self._tokens_per_s()
        course, tally = self._course, self._course.tally
        flying = sum(arm.calls_in_flight for arm in tally.arms.values())
        ratios = ", ".join(
            f"{name} {ratio:.2f}x"
            for name in tally.arms
            if name != tally.baseline and (ratio := tally.amplification(name, "calls")) is not None
        )
        if not any(arm.started for arm in tally.arms.values()):
            return f"{course.now():6.1f} s  warming up, {flying} calls in flight"
        return (
            f"{course.now():6.1f} s  {self._done()}"
            + f", {flying} calls in flight, tokens/s in {number(read)} out {number(written)}"
            + (f", calls: {ratios}" if ratios else "")
            + (f", {course.client}" if course.verdict != "ok" else "")
        )

    def view(self, height: int = 24) -> "Group":
        """Tables that fit 80 columns, what is most needed above them, and as many workers as there are lines for."""
        from rich.console import Group

        course = self._course
        servers = [f"server   {told}" for told in course.servers().values()]
        if len(servers) > 1:
            servers = [f"{name[:8]:<8} {told}" for name, told in course.servers().items()]
        head = f"{course.now():.0f} s   {self._done()}   {course.client}"
        taken = len(servers) + 2 * len(course.tally.arms) + 12  # the workers' titles and last row included
        workers = course.workers(max(2, height - taken))
        below: list[Table | str] = ["", _of(workers)] if workers else []
        return Group(head, *servers, "", self._work(), "", self._cost(), *below)

    def _work(self) -> "Table":
        table = _columns(
            [
                "done",
                "failed",
                "queries\nrunning",
                "calls\nin flight",
                "queries\n/s",
                "calls\n/s",
                "tokens/s\nin",
                "tokens/s\nout",
            ]
        )
        for name, arm in self._course.tally.arms.items():
            counts = (arm.completed, arm.finished["failed"], arm.in_flight, arm.calls_in_flight)
            table.add_row(name, *map(str, counts), *map(short, self._course.rates(name) or [None] * 4))
        return table

    def _cost(self) -> "Table":
        tally = self._course.tally
        table = _columns([*RATIOS.values(), "TTFT, s\np50 p99", "latency, s\np50 p99"])
        for name, arm in tally.arms.items():
            shown = ["baseline", "", "", ""] if name == tally.baseline else [self._ratio(name, r) for r in RATIOS]
            times = [f"{short(q['p50'])} {short(q['p99'])}" for q in of_arm(arm).values()]
            table.add_row(name, *shown, *times)
        return table

    def _ratio(self, arm: str, resource: str) -> str:
        """`9.18x +-3%`: a ratio, and half of its interval where it has one."""
        tally = self._course.tally
        ratio, interval = tally.amplification(arm, resource), tally.interval(arm, resource)
        if ratio is None:
            return "-"
        shown = f"{ratio:.1f}x" if ratio >= 100 else f"{ratio:.2f}x"
        if interval is None:
            return shown
        return f"{shown} {'±' if _wide(self._out) else '+-'}{(interval[1] - interval[0]) / 2 / ratio:.0%}"


def _wide(out: TextIO) -> bool:
    return (getattr(out, "encoding", None) or "").lower().startswith("utf")


def _of(workers: Sequence[Sequence[str]]) -> "Table":
    table = _columns(WORKER_COLUMNS[1:], WORKER_COLUMNS[0], 24)
    for row in workers:
        table.add_row(*row)
    return table


def _columns(titles: Sequence[str], first: str = "arm", width: int = 14) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, justify="left", no_wrap=True, vertical="bottom", max_width=width)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
    return table
