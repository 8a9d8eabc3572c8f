"""The progress line: numbers of a known tally."""

import io

from fanmark.loadgen.health import ClientState
from fanmark.loadgen.live import Progress
from fanmark.loadgen.records import Call, Query
from fanmark.loadgen.tally import Tally


def test_a_line_says_what_is_done_and_what_runs() -> None:
    clock = [2.0]
    tally = Tally({"single": "single", "debate": "debate"}, "single")
    progress = Progress(tally, 8, lambda: clock[0], io.StringIO())
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
