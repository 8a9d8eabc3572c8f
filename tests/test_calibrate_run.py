"""A run's folder read as a trace: what is left out, what waits for what, and which gap between tokens counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from fanmark.loadgen.calibrate import calibrate
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import gap_bucket
from fanmark.loadgen.run_trace import load_run
from fanmark.loadgen.traces import Trace, Trigger
from fanmark.servers.profiles import load_chip, load_model


def call(query: int, sent_at: float, **changed: Any) -> dict[str, Any]:
    stamps = {"sent_at": sent_at, "first_at": sent_at + 0.1, "done_at": sent_at + 1.0}
    sizes = {"input_tokens": 100, "cached_tokens": 0, "output_tokens": 10}
    return {"kind": "call", "arm": "a", "query": query, "call": 1, "error": None} | stamps | sizes | changed


def trace_of(folder: Path, calls: list[dict[str, Any]], scenario: str = "") -> Trace:
    (folder / "calls.jsonl").write_text("\n".join(map(json.dumps, calls)))
    (folder / "scenario.toml").write_text(scenario)
    return load_run(folder, load_model("llama-3.1-8b"), load_chip("h100"))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"error": "http_5xx"}, id="it failed"),
        pytest.param({"first_at": None}, id="no stamps"),
        pytest.param({"output_tokens": None}, id="the server did not count"),
        pytest.param({"first_at": 51.0}, id="not streamed: first and last token at once"),
        pytest.param({"samples": 3}, id="several answers in one call"),
    ],
)
def test_calls_that_do_not_tell_are_left_out_and_counted(tmp_path: Path, changed: dict[str, Any]) -> None:
    trace = trace_of(tmp_path, [call(i, 2.0 * i) for i in range(12)] + [call(25, 50.0, **changed)])
    assert len(trace.requests) == 12
    assert any("1 calls that failed or were not streamed are left out" in line for line in trace.caveats)


def test_warm_up_counts_nothing_and_every_arm_alike(tmp_path: Path) -> None:
    calls = [call(-1, 0.0), *(call(i, 2.0 + 2.0 * i) for i in range(10))]
    calls += [call(i, 40.0 + 2.0 * i, arm="b") for i in range(40)]
    trace = trace_of(tmp_path, calls)
    assert trace.weights[0] == 0.0
    assert sum(w * w for w in trace.weights[1:11]) == pytest.approx(sum(w * w for w in trace.weights[11:]))


def test_a_closed_loop_waits_for_its_arm_and_an_open_one_for_the_clock(tmp_path: Path) -> None:
    calls = [call(i, 1.5 * i) for i in range(10)]
    closed = trace_of(tmp_path, calls, '[load]\nmode = "closed"\n').triggers
    assert closed[0] is None and closed[4] == Trigger(3, 0.5)
    assert trace_of(tmp_path, calls, '[load]\nmode = "open"\n').triggers == [None] * 10


def test_a_call_waits_for_the_calls_behind_its_tool_call(tmp_path: Path) -> None:
    tool = {"kind": "tool_call", "arm": "a", "query": 0, "call": 2, "after": [1], "sent_at": 1.0, "done_at": 1.75}
    calls = [call(0, 0.0), tool, call(0, 2.0, call=3, after=[2]), *(call(i, 4.0 * i) for i in range(1, 10))]
    triggers = trace_of(tmp_path, calls, '[load]\nmode = "open"\n').triggers
    assert triggers[:2] == [None, Trigger(0, 1.0)]


def test_cached_prefixes_are_those_of_earlier_calls(tmp_path: Path) -> None:
    first, warm = call(0, 0.0, input_tokens=64), call(1, 2.0, arm="b", cached_tokens=32)
    again = call(0, 4.0, call=2, after=[1], input_tokens=128, cached_tokens=64)
    other = call(2, 6.0, cached_tokens=48)
    trace = trace_of(tmp_path, [first, warm, again, other, *(call(i, 4.0 * i) for i in range(3, 9))])
    prompts = [list(r.prompt) for r in trace.requests]
    assert trace.shared_tokens == 32 and prompts[1][:33] == [*range(32), prompts[1][32]]
    assert prompts[2][:64] == prompts[0] and prompts[3][:48] == prompts[0][:48]
    assert len({p[-1] for p in prompts}) == len(prompts)


@pytest.mark.parametrize(
    ("gaps_ms", "steady_ms"),
    [
        pytest.param({20.0: 40}, 20.0, id="even: the mean"),
        pytest.param({20.0: 30, 24.0: 10}, 21.0, id="uneven: still the mean"),
        pytest.param({20.0: 39, 200.0: 1}, 20.0, id="a stall is left out"),
        pytest.param({0.5: 1, 20.0: 39}, 20.0, id="so is a single burst"),
        pytest.param({0.5: 6, 20.0: 33, 140.0: 1}, 20.0, id="a stall that was made up for: the middle half"),
    ],
)
def test_the_gap_that_counts(tmp_path: Path, gaps_ms: dict[float, int], steady_ms: float) -> None:
    span_s = sum(ms * n for ms, n in gaps_ms.items()) / 1e3
    gaps = {gap_bucket(ms / 1e3): n for ms, n in gaps_ms.items()}
    one = call(0, 0.0, done_at=0.1 + span_s, output_tokens=41, gaps=gaps)
    trace = trace_of(tmp_path, [one, *(call(i, 20.0 * i) for i in range(1, 10))])
    assert trace.steady_s[0] == pytest.approx(steady_ms / 1e3, rel=0.01)
    assert trace.steady_s[1] is None, "10 tokens are too few"


def test_a_run_against_two_targets_is_refused(tmp_path: Path) -> None:
    lines = [json.dumps(call(i, 2.0 * i, target="big" if i % 2 else "small")) for i in range(12)]
    (tmp_path / "calls.jsonl").write_text("\n".join(lines))
    with pytest.raises(ScenarioError, match=r"calls to several targets \(big, small\): a profile is fitted on a run"):
        calibrate(tmp_path, "llama-3.1-8b", "h100")
