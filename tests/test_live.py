"""The progress line: numbers of a known tally."""

import http.client
import io
import math
import re
from collections import Counter
from itertools import pairwise

import pytest
from rich.console import Console

from fanmark.loadgen.course import MOST_SAMPLES, Course
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.live import Progress
from fanmark.loadgen.metrics_server import serve
from fanmark.loadgen.records import Call, Query, gap_bucket
from fanmark.loadgen.report.live_page import LivePage
from fanmark.loadgen.samples import ArmSample, Sample, ServerSample
from fanmark.loadgen.tally import Tally


def test_a_line_says_what_is_done_and_what_runs() -> None:
    clock = [2.0]
    tally = Tally({"single": "single", "debate": "debate"}, "single")
    progress = Progress(Course(tally, 8, lambda: clock[0]), io.StringIO())
    warm = Call(query=-1, arm="single", call=1, after=[], kind="call", role="agent", round=1, due_at=0.0)
    tally.call_started(warm)
    assert progress.line() == "   2.0 s  warming up, 1 calls in flight"
    tally.call_finished(warm)
    for arm, calls in (("single", 1), ("debate", 9)):
        tally.query_started(arm)
        for i in range(calls):
            call = Call(query=0, arm=arm, call=i + 1, after=[], kind="call", role="agent", round=1, due_at=0.0)
            tally.call_started(call)
            call.input_tokens, call.output_tokens = 500, 100
            tally.call_finished(call)
        resources = dict.fromkeys(
            ("input_tokens", "cached_tokens", "fresh_tokens", "output_tokens", "reasoning_tokens")
        )
        tally.query_finished(
            Query(
                query=0, arm=arm, warmup=False, due_at=0.0, started_at=0.0, done_at=4.0, outcome="completed",
                resources={**resources, "calls": calls, "latency_s": 4.0}, expected={"calls": calls}, mismatches=[], seed="",
            )
        )  # fmt: skip
    clock[0] = 4.0
    said = "   4.0 s  2 of 8 queries done, 0 calls in flight, tokens/s in 2,500 out 500, calls: debate 9.00x"
    assert progress.line() == said
    tally.clients = {0: ClientState(), 1: ClientState(verdict="strained")}
    assert progress.line() == said.replace("2,500 out 500", "0 out 0") + ", client strained"


def test_before_its_start_a_run_has_lasted_no_time() -> None:
    course = Course(Tally({"single": "single"}, "single"), 8, lambda: -0.04)
    assert Progress(course, io.StringIO()).line().startswith("   0.0 s  ")


def test_the_view_fits_80_columns_and_says_what_a_watcher_needs() -> None:
    """Twelve queries of each arm: the ratio of calls is 9 for sure, that of output tokens has an interval, that of a time has none."""
    tally = Tally({"single": "single", "debate": "debate"}, "single")
    course = Course(tally, 24, lambda: 30.0)
    for second in (1.0, 2.0):
        for i in range(6):
            _query(tally, "single", 1, 100 + i, latency_s=2.0)
            _query(tally, "debate", 9, 100 + i, latency_s=8.0)
        targets = {"default": ServerSample(running=12.0, waiting=3.0, kv_use=0.345), "silent": None}
        # in flight at one of the two samples
        course.add(Sample(second, targets, {"debate": ArmSample(int(second) % 2, 7)}))
    assert course.point("debate") == (12.0, 7.0) and course.point("single") is None
    _query(tally, "debate", 9, None, latency_s=None)
    console = Console(file=io.StringIO(), width=80)
    console.print(Progress(course, _Utf8()).view())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in shown.split("\n")]
    assert max(map(len, lines)) <= 80
    assert lines[0] == "30 s   24 of 24 queries done, 1 failed   client ok"
    assert lines[1] == "server   12 running, 3 waiting, KV 34%"
    work = {line.split()[0]: line.split()[1:] for line in lines[3:7]}
    # queries/s, calls/s and tokens/s over the second between the samples
    assert work["single"] == ["12", "0", "0", "0", "6", "6", "600", "615"]
    assert work["debate"] == ["12", "1", "0", "0", "6", "54", "5,400", "5,535"]
    cost = {line.split()[0]: line.split()[1:] for line in lines[9:] if line}
    half = (
        math.exp(1.959964 * math.sqrt(2 * (35 / 12) / 11) / 102.5) - 1
    )  # equal arms: both have 2 x each of 100 ... 105
    assert cost["single"] == ["baseline", "0.5", "-", "2", "-"]
    assert cost["debate"] == ["9.00x", "±0%", "9.00x", "±0%", "9.00x", f"±{half:.0%}", "4.00x", "0.5", "-", "8", "-"]
    assert half > 0.005


class _Utf8(io.StringIO):
    encoding = "utf-8"


def _query(tally: Tally, arm: str, calls: int, tokens: int | None, latency_s: float | None) -> None:
    tally.query_started(arm)
    for i in range(calls):
        call = Call(query=0, arm=arm, call=i + 1, after=[], kind="call", role="agent", round=1, due_at=0.0)
        tally.call_started(call)
        call.sent_at, call.first_at, call.done_at = 0.0, 0.5, 1.0
        call.input_tokens, call.output_tokens = 100, tokens
        call.error = "http_5xx" if tokens is None else None
        tally.call_finished(call)
    known = {"calls": calls, "input_tokens": 100 * calls, "latency_s": latency_s}
    resources = dict.fromkeys(("cached_tokens", "fresh_tokens", "reasoning_tokens")) | known
    resources["output_tokens"] = None if tokens is None else tokens * calls
    tally.query_finished(
        Query(
            query=0, arm=arm, warmup=False, due_at=0.0, started_at=0.0, done_at=4.0,
            outcome="failed" if tokens is None else "completed",
            resources=resources, expected={"calls": calls}, mismatches=[], seed="",
        )
    )  # fmt: skip


def _with_workers(*states: ClientState) -> Course:
    tally = Tally({"single": "single", "debate": "debate"}, "single")
    tally.clients = dict(enumerate(states))
    return Course(tally, 24, lambda: 30.0)


def _seen(course: Course, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(Progress(course, _Utf8()).view(height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_several_workers_have_a_row_each() -> None:
    lags = Counter({gap_bucket(0.0042): 99})
    course = _with_workers(
        ClientState(lags, cpu_share=0.256, queries_running=7, queries_done=120),
        ClientState(lags, lost_at=12.3, verdict="client-limited", cpu_share=0.9, queries_running=3, queries_done=44),
        ClientState(verdict="strained", node="10.0.0.4"),
    )
    lines = _seen(course, 24)
    assert lines[0] == "30 s   0 of 24 queries done   client-limited, 1 of 3 workers lost"
    assert [line.split() for line in lines[-3:]] == [
        ["0", "ok", "26%", "7", "120", "4.2"],
        ["1", "lost", "at", "12", "s", "-", "-", "44", "-"],
        ["2", "on", "10.0.0.4", "strained", "-", "0", "0", "-"],
    ]
    page = LivePage(course, "a run").body()
    assert "client-limited, 1 of 3 workers lost." in page
    assert '<th scope="row">2 on 10.0.0.4</th><td>strained</td>' in page and "<td>lost at 12 s</td>" in page
    alone = _with_workers(ClientState(verdict="strained"))
    assert "By worker" not in LivePage(alone, "a run").body() and len(_seen(alone, 24)) == len(lines) - 6


@pytest.mark.parametrize("height", [18, 24, 40])
def test_of_many_workers_the_worst_are_shown_and_the_others_counted(height: int) -> None:
    """Worker i burns i %; 30 and up are strained, 7 is lost."""
    states = [ClientState(verdict="strained" if i >= 30 else "ok", cpu_share=i / 100) for i in range(40)]
    states[7] = ClientState(verdict="client-limited", lost_at=1.0)
    lines = _seen(_with_workers(*states), height)
    assert len(lines) < height and max(map(len, lines)) <= 80
    title = next(i for i, line in enumerate(lines) if line.startswith("worker"))
    rows = lines[title + 1 :]
    assert [int(row.split()[0]) for row in rows[:-1]] == [7, *range(39, 29, -1), *range(29, 7, -1)][: len(rows) - 1]
    strained = max(0, 11 - (len(rows) - 1))
    others = 40 - (len(rows) - 1)
    assert len(_with_workers(*states).workers(39)) == 40 == len(_with_workers(*states).workers(40))
    told = ([f"{strained} strained"] if strained else []) + [f"{others - strained} ok"]
    assert " ".join(rows[-1].split()) == f"{others} others {', '.join(told)}"


def test_a_long_course_keeps_ever_fewer_samples() -> None:
    course = Course(Tally({"single": "single"}, "single"), None, lambda: 0.0)
    for second in range(10 * MOST_SAMPLES):
        course.add(Sample(float(second), {}, {}))
    kept = [sample.at for sample in course.samples]
    assert MOST_SAMPLES / 2 <= len(kept) <= MOST_SAMPLES
    assert {b - a for a, b in pairwise(kept)} == {16.0}
    assert kept[0] == 0.0 and course.latest is not None and course.latest.at == 10 * MOST_SAMPLES - 1


def test_the_port_tells_a_browser_nothing_that_came_by_a_foreign_name() -> None:
    """A name that its owner has bent to 127.0.0.1 makes a browser send that name. A scraper may come by any."""
    course = Course(Tally({"single": "single"}, "single"), 24, lambda: 30.0)
    port, stop = serve({"/metrics": lambda _: ("text/plain", b"sums"), **LivePage(course, "a run").pages()}, 0)
    try:
        for path, name, status in (
            ("/", f"127.0.0.1:{port}", 200),
            ("/", f"localhost:{port}", 200),
            ("/live", f"[::1]:{port}", 200),
            ("/live", f"evil.example:{port}", 403),
            ("/", "127.0.0.1.evil.example:80", 403),
            ("/metrics", f"load:{port}", 200),
            ("/other", f"localhost:{port}", 404),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", path, headers={"Host": name})
            reply = connection.getresponse()
            assert reply.status == status, (path, name)
            if status == 200:
                assert reply.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
            assert (b"a run, running for 30 s" in reply.read()) == (status == 200 and path != "/metrics")
            connection.close()
    finally:
        stop()


def test_the_page_of_a_tap_shows_how_queries_are_spread() -> None:
    """Three queries of 9 calls and one of 30, each as deep as wide; nobody told of cached tokens."""
    tally = Tally({"tapped": "replay", "unattributed": "replay"}, "tapped", compared=False)
    for calls in (9, 9, 9, 30):
        _query(tally, "tapped", calls, 700, latency_s=1.0)
    page = LivePage(Course(tally, None, lambda: 1.0), "tap").body()
    for title, rows in (
        ("calls", ["up to 10: queries 3", "up to 16: none", "up to 25: none", "up to 50: queries 1"]),
        ("tool calls", ["up to 0: queries 4"]),
        ("output tokens", ["up to 10,000: queries 3", "up to 20,000: none", "up to 50,000: queries 1"]),
    ):
        figure = page.split(f"<figcaption>Queries by {title}</figcaption>")[1].split("</figure>")[0]
        assert re.findall(r'class="label">([^<]*)<', figure) == rows
    assert "Queries by cached tokens" not in page
