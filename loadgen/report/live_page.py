"""The page that shows a run while it goes on: a browser that has it open asks for what is new each second. Made when it is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fanmark.loadgen import table
from fanmark.loadgen.course import WORKER_COLUMNS, Course, of_arm
from fanmark.loadgen.report import charts, page, svg, timeline, words
from fanmark.loadgen.report.svg import esc
from fanmark.loadgen.table import number, short
from fanmark.loadgen.tally import Histogram

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'"
_SCRIPT = (
    '<script src="/live.js"></script><noscript><p>Without scripts this page stands still: load it again.</p></noscript>'
)
_HTML = "text/html; charset=utf-8"
_NOTE = (
    "<p>So far, on a logarithmic scale. Counts have a 95 % interval from 10 queries of both arms on, wider than the report's will be; "
    "times hold at the load so far, and have none yet.</p>"
)

_MOST_WORKERS = 24

Page = Callable[[str], tuple[str, bytes]]


class LivePage:
    """Shows a Course; once its report is there, that."""

    def __init__(self, course: Course, name: str) -> None:
        self._course = course
        self._name = name

    def pages(self) -> dict[str, Page]:
        """What is served, by path."""
        script = (Path(__file__).parent / "live.js").read_bytes()
        return {
            "/": lambda _: (_HTML, self.whole().encode()),
            "/live": lambda _: (_HTML, (self._course.report or self.body()).encode()),
            "/live.js": lambda _: ("text/javascript; charset=utf-8", script),
        }

    def whole(self) -> str:
        """The page."""
        return self._course.report or page.document(self._name, self.body(), policy=_POLICY, script=_SCRIPT)

    def body(self) -> str:
        """What of the page changes."""
        course = self._course
        of = "" if course.total is None else f" of {course.total}"
        failed = f", {course.failed} failed" if course.failed else ""
        servers = [f"{name}: {told}" for name, told in course.servers().items()]
        parts = [
            f"<h1>{esc(self._name)}, running for {course.now():.0f} s</h1>",
            f'<p class="answer">{course.done}{of} queries done{failed}; {esc(course.client)}.</p>',
            *(
                f'<p class="answer">{esc(self._answer(arm))}</p>'
                for arm in course.tally.arms
                if arm != course.tally.baseline and course.tally.compared
            ),
            f"<section><h2>Now</h2>{svg.table(self._rows())}<p>{esc('; '.join(servers))}</p></section>",
            self._workers(),
            f"<section><h2>What a query costs</h2>{self._costs()}</section>",
            f"<section><h2>Over time</h2>{timeline.timelines(list(course.samples), [], 'time')}</section>",
            '<p><a href="/metrics">All sums, as Prometheus metrics</a></p>',
        ]
        return "".join(parts)

    def _answer(self, arm: str) -> str:
        tally = self._course.tally
        named = {"calls": "calls", "output_tokens": "output tokens", "latency_s": "latency"}
        told = [f"{x:.2f}x the {word}" for r, word in named.items() if (x := tally.amplification(arm, r)) is not None]
        if not told:
            return f"No {arm} query can be compared yet."
        return (
            f"So far, at {self._point(arm)} ({tally.baseline}: {self._point(tally.baseline)}), one {arm} query costs "
            f"{words.listed(told)} of a {tally.baseline} query."
        )

    def _point(self, arm: str) -> str:
        queries, calls = self._course.point(arm) or (None, None)
        return f"{short(queries)} queries/s, {short(calls)} calls in flight"

    def _rows(self) -> list[list[str]]:
        rows = [[
            "arm", "done", "failed", "queries in flight", "calls in flight", "queries/s", "calls/s", "tokens/s in", "tokens/s out",
            "TTFT p50, s", "TTFT p99, s", "latency p50, s", "latency p99, s",
        ]]  # fmt: skip
        for name, arm in self._course.tally.arms.items():
            counts = (arm.completed, arm.finished["failed"], arm.in_flight, arm.calls_in_flight)
            times = [number(found[q]) for found in of_arm(arm).values() for q in ("p50", "p99")]
            rows.append([name, *map(str, counts), *map(short, self._course.rates(name) or [None] * 4), *times])
        return rows

    def _workers(self) -> str:
        rows = self._course.workers(_MOST_WORKERS)
        head = [column.replace("\n", " ") for column in WORKER_COLUMNS]
        return f"<section><h2>By worker</h2>{svg.table([head, *rows])}</section>" if rows else ""

    def _costs(self) -> str:
        """Ratios to the baseline; of what passes a tap, which has none, what a query took so far, and how queries are spread."""
        if self._course.tally.compared:
            return charts.amplification(self._arms(), "cost") + _NOTE
        rows = [["mean per query", *(title.strip() for _, title in table.ROWS)]]
        for name, arm in self._course.tally.arms.items():
            means = [
                arm.sums[key] / arm.completed if key in arm.sums and arm.completed else None for key, _ in table.ROWS
            ]
            rows.append([name, *map(number, means)])
        return svg.table(rows) + svg.grid(
            charts.spread(title, histogram, f"spread-{i}") for i, (title, histogram) in enumerate(self._spreads())
        )

    def _spreads(self) -> list[tuple[str, Histogram]]:
        """How the queries that passed a tap are spread, those left out that could not be told to be queries."""
        arm = self._course.tally.arms[self._course.tally.baseline]
        counts = {"calls": arm.query_calls, "tool calls": arm.query_tool_calls, "depth": arm.query_depth}
        tokens = {f"{kind} tokens": histogram for kind, histogram in arm.query_tokens.items()}
        return [(f"Queries by {title}", histogram) for title, histogram in (counts | tokens).items()]

    def _arms(self) -> Mapping[str, Any]:
        """The ratios so far, as a summary has them."""
        tally = self._course.tally
        found: dict[str, Any] = {}
        for name in tally.arms:
            ratios = {}
            for resource, _ in table.ROWS:
                low, high = tally.interval(name, resource) or (None, None)
                ratio = tally.amplification(name, resource)
                ratios[resource] = {"ratio": ratio, "low": low, "high": high, "method": "so far"}
            found[name] = {"baseline": name == tally.baseline, "amplification": ratios}
        return found
