"""Windows: when a lead-in ends, what a verdict rests on, and whole runs with a duration in virtual time."""

import asyncio
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import two_arms
from hypothesis import given
from hypothesis import strategies as st

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.arrivals import open_loop
from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.counters import Reading
from fanmark.loadgen.dry_run import plan
from fanmark.loadgen.lanes.virtual import Service, VirtualEndpoint
from fanmark.loadgen.pilot import matched
from fanmark.loadgen.records import Journal, Query, Window, read_queries, read_windows
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.run import Run
from fanmark.loadgen.scenario import Scenario, Target
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.steadiness import Verdict, judge, rise_z
from fanmark.loadgen.summary import summarise_arms, validity
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.window import grace_s, lead_in, p90
from fanmark.servers.profiles import load_profile

LEAD_INS = [
    # latencies by arm, elapsed, warm-up by arm, duration, where it stands
    ({}, 5.0, {0: 2}, 30.0, "on"),  # nothing has ended
    ({0: [3.0]}, 6.0, {0: 2}, 30.0, "on"),  # one of two
    ({0: [3.0, 3.0]}, 5.9, {0: 2}, 30.0, "on"),  # not yet 2 x p90
    ({0: [3.0, 3.0]}, 6.0, {0: 2}, 30.0, "over"),
    ({0: [3.0]}, 6.0, {0: 0}, 30.0, "over"),  # without a warm-up one must have ended all the same
    ({0: [1.0, 1.0]}, 9.0, {0: 2, 1: 2}, 30.0, "on"),  # the other arm
    ({0: [1.0] * 9, 1: [4.0] * 9}, 7.9, {0: 2, 1: 2}, 30.0, "on"),  # 2 x p90 of all
    ({0: [1.0] * 9, 1: [4.0] * 9}, 8.0, {0: 2, 1: 2}, 30.0, "over"),
    ({0: [1.0, 2, 3, 4, 5, 6, 9, 9]}, 49.9, {0: 99}, 30.0, "on"),  # the longest of the first five is 5
    ({0: [1.0, 2, 3, 4, 5, 6, 99, 99, 99]}, 50.0, {0: 2}, 30.0, "given up"),
    ({0: [1.0, 2, 3, 4, 5, 6, 99, 99, 99]}, 50.0, {0: 2}, 60.0, "on"),  # it may be as long as the window
    ({0: [1.0, 2, 3, 4, 5, 6, 99, 99, 99]}, 50.0, {0: 2, 1: 2}, 30.0, "given up"),  # whatever the other arm may come to
    ({0: [1.0] * 9}, 50.0, {0: 2, 1: 2}, 30.0, "on"),  # one has ended its lead-in, the other's first query takes long
    ({}, 599.0, {0: 2}, 30.0, "on"),
    ({}, 600.0, {0: 2}, 30.0, "given up"),
]


@pytest.mark.parametrize(("seen", "elapsed_s", "warmup", "duration_s", "stands"), LEAD_INS)
def test_a_lead_in_ends_when_the_system_is_filled_or_never_will_be(
    seen: dict[int, list[float]], elapsed_s: float, warmup: dict[int, int], duration_s: float, stands: str
) -> None:
    assert lead_in(seen, elapsed_s, warmup, duration_s) == stands


def test_the_grace_is_three_long_latencies_and_half_a_minute_at_least() -> None:
    assert p90([5.0]) == 5.0 and p90(range(1, 11)) == 9 and p90(range(1, 101)) == 90
    assert grace_s([]) == grace_s([2.0] * 50) == 30.0
    assert grace_s([20.0] * 50) == 60.0


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_rise_is_counted_by_pairs(values: list[int]) -> None:
    n = len(values)
    excess = sum((b > a) - (b < a) for i, b in enumerate(values) for a in values[:i])
    expected = excess / (n * (n - 1) * (2 * n + 5) / 18) ** 0.5 if n > 2 else 0.0
    assert rise_z(values) == pytest.approx(expected)


def stream(due: list[float], latency_s: list[float], **more: Any) -> list[Query]:
    """Queries of one call each; those due from 20 s to 120 s are counted."""
    found = []
    for i, (at, took_s) in enumerate(zip(due, latency_s, strict=True)):
        phase = "lead-in" if at < 20 else "window" if at < 120 else "lead-out"
        made = two_arms.call(1, (at, at + 0.1, at + took_s), (100, 0, 10))
        found.append(two_arms.query("single", i, [made], at, at + took_s, phase=phase, **more))
        found[-1].warmup = phase != "window"
    return found


WINDOW = Window(repeat=1, arms=["single"], lead_in_at=0.0, start_at=20.0, end_at=120.0)
DUE = [i / 2 for i in range(280)]  # two a second until 140


def judged(
    queries: list[Query],
    window: Window = WINDOW,
    kv: list[tuple[float, float]] | None = None,
    *,
    open_loop: bool = True,
) -> Verdict:
    run = reduced(queries)
    return judge(run.queries, run.queries, run.calls, window, kv, open_loop=open_loop)


def test_a_steady_stream_is_steady_and_obeys_littles_law() -> None:
    verdict = judged(stream(DUE, [4.0] * 280))
    assert (verdict.steady, verdict.over_capacity) == (True, False)
    assert verdict.littles_law_off_pct == pytest.approx(0.0, abs=1e-9)
    assert verdict.reason == "calls in flight 8 and 8 in its halves, L = 8, lambda x W = 8"


def grown(at: float) -> float:
    return 4.0 if at < 70 else 5.0


UNSTEADY: dict[str, tuple[list[float], Window, list[tuple[float, float]] | None, str]] = {
    "calls in flight": (
        [grown(at) for at in DUE], WINDOW, None, "calls in flight 8 in its first half, 9.83 in its second"),
    "KV use": (
        [4.0] * 280, WINDOW, [(at, 0.5 if at < 70 else 0.6) for at in range(140)],
        "KV use 50.0% in its first half, 60.0% in its second"),
    "a short window": (
        [21.0] * 280, WINDOW, None, "the window (100 s) is shorter than 5 mean query latencies (21.0 s each)"),
    "a long lead-in": (
        [4.0] * 280, Window(repeat=1, arms=["single"], lead_in_at=-81.0, start_at=20.0, end_at=120.0), None,
        "the window (100 s) is shorter than its lead-in (101 s)"),
    "a lead-in without an end": (
        [4.0] * 280, Window(repeat=1, arms=["single"], lead_in_at=0.0, start_at=20.0, end_at=120.0, given_up=True), None,
        "the lead-in was given up after 20 s, latency kept growing"),
    "Little's law": (  # those before the window were long, those in it are short
        [40.0 if at < 20 else 2.0 for at in DUE], WINDOW, None, "queries in flight, lambda x W = 4"),
}  # fmt: skip


@pytest.mark.parametrize(("latency_s", "window", "kv", "reason"), UNSTEADY.values(), ids=UNSTEADY)
def test_what_is_not_steady_says_why(
    latency_s: list[float], window: Window, kv: list[tuple[float, float]] | None, reason: str
) -> None:
    queries = stream(DUE, latency_s)
    verdict = judged(queries, window, kv)
    assert verdict.steady is False and not verdict.over_capacity
    assert reason in verdict.reason


def test_halves_of_the_kv_use_may_differ_by_a_tenth_or_a_hundredth_of_the_cache() -> None:
    queries = stream(DUE, [4.0] * 280)
    for first, second in ((0.5, 0.55), (0.005, 0.014)):
        kv = [(at, first if at < 70 else second) for at in range(140)]
        assert judged(queries, WINDOW, kv).steady is True


@pytest.mark.parametrize("excess", [1.1, 1.5, 3.0])
def test_latency_that_grows_with_the_queue_is_over_capacity(excess: float) -> None:
    """Of two a second 2 / excess are served: a query that is due at t waits for t x (excess - 1)."""
    queries = stream(DUE, [4.0 + at * (excess - 1) for at in DUE])
    verdict = judged(queries)
    assert (verdict.steady, verdict.over_capacity) == (False, True)
    assert verdict.reason.startswith("over capacity: more arrives than is served")
    assert not judged(queries, open_loop=False).over_capacity  # users wait for answers


@pytest.mark.parametrize("served", [0, 20, 90])
def test_what_is_abandoned_took_longer_than_all_that_ended(served: int) -> None:
    """Of the two hundred in the window, those after the first few are given up at one instant: the later, the sooner."""
    queries = stream(DUE, [4.0 if at < 20 + served / 2 else 200.0 - at for at in DUE])
    for query in queries:
        if query.due_at >= 20 + served / 2:
            query.outcome = "abandoned"
    verdict = judged(queries)
    assert verdict.over_capacity and verdict.reason.startswith("over capacity")


def test_a_window_without_a_query_is_not_steady() -> None:
    assert judged([]).reason == "no query was due in the window"


ARMS = """
[[arm]]
name = "single"
topology = "single"
baseline = true
[[arm]]
name = "debate"
topology = "debate"
agents = 2
[workload]
system = 20
question = 40
answer = {dist = "lognormal", mean = 20, cv = 0.4, min = 5, max = 60}
judge_answer = 20
"""


def checked(folder: Path, load: str) -> Scenario:
    (folder / "load.toml").write_text(f"{ARMS}[load]\n{load}")
    raw, source = scenario_check.read(str(folder / "load.toml"))
    return scenario_check.check(raw, source, topologies())


def run(folder: Path, load: str) -> tuple[dict[str, Any], list[Query], list[Window]]:
    """The summary, the queries in the order of their due times, and the windows."""
    summary = simulate(checked(folder, load), topologies(), Options(folder / "run", "test", [])).summary
    queries = sorted(read_queries(folder / "run"), key=lambda q: q.due_at)
    return summary, queries, read_windows(folder / "run")


def test_what_is_due_in_the_window_counts_and_nothing_else(tmp_path: Path) -> None:
    summary, queries, (window,) = run(tmp_path, "duration = 20\nrate = 2\nwarmup = 3")
    assert window.end_at - window.start_at == pytest.approx(20.0) and not window.given_up
    assert window.rates == {"single": 2.0, "debate": 2.0} and window.arms == ["single", "debate"]
    for query in queries:
        inside = window.start_at <= query.due_at < window.end_at
        assert (query.phase == "window") == inside == (not query.warmup) == (query.query >= 0)
    lead_in = [q for q in queries if q.phase == "lead-in"]
    for arm in ("single", "debate"):
        assert sum(q.arm == arm and q.done_at <= window.start_at for q in lead_in) >= 3
    ended = [q.done_at - q.due_at for q in lead_in if q.done_at <= window.start_at - 0.1]
    assert window.start_at - window.lead_in_at >= 2 * p90(ended)
    # arrivals go on until the last counted query has ended, and what had begun is let go
    last = max(q.done_at for q in queries if not q.warmup)
    assert any(window.end_at <= q.due_at < last for q in queries) and max(q.due_at for q in queries) < last + 0.5
    assert all(q.outcome == "completed" for q in queries) and summary["validity"]["reconciled"] is True
    arm = summary["arms"]["debate"]
    assert arm["window"]["start_at"] == window.start_at and arm["window"]["end_at"] == window.end_at
    done = sum(q.arm == "debate" and window.start_at <= q.done_at <= window.end_at for q in queries)
    assert arm["load"]["completed_qps"] == pytest.approx(done / 20) and arm["load"]["offered_qps"] == 2.0


def test_a_windows_demand_is_planned_whatever_the_lead_in_was(tmp_path: Path) -> None:
    load = "duration = 20\nrate = 2\nwarmup = "
    scenario = checked(tmp_path, f"{load}3")
    planned = plan(scenario, topologies())
    for warmup in (3, 9):
        (tmp_path / str(warmup)).mkdir()
        summary, queries, (window,) = run(tmp_path / str(warmup), f"{load}{warmup}")
        for i, (name, arm) in enumerate(summary["arms"].items()):
            counted = [q for q in queries if q.arm == name and not q.warmup]
            times = list(open_loop(scenario.load, scenario.seed, name, i / 2))
            assert [q.due_at - window.start_at for q in counted] == pytest.approx(times)
            assert [q.query for q in counted] == list(range(len(times)))
            sums = {r: sum(q.resources[r] or 0 for q in counted) for r in ("calls", "input_tokens", "output_tokens")}
            assert sums == {resource: planned[name][resource] for resource in sums}
            assert arm["queries"]["started"] == planned[name]["queries"]


def test_a_closed_loops_users_go_on_until_what_counts_has_ended(tmp_path: Path) -> None:
    summary, queries, (window,) = run(tmp_path, "duration = 20\nmode = 'closed'\nconcurrency = 3")
    for name, arm in summary["arms"].items():
        mine = [q for q in queries if q.arm == name]
        assert all((window.start_at <= q.due_at < window.end_at) == (not q.warmup) for q in mine)
        assert {q.phase for q in mine} == {"lead-in", "window", "lead-out"}
        assert arm["load"]["queries_in_flight"]["mean"] == pytest.approx(3.0)
        assert arm["window"]["littles_law_off_pct"] == pytest.approx(0.0, abs=10)


def test_past_its_capacity_an_arm_has_no_ratio_of_times(tmp_path: Path) -> None:
    """One query at a time takes 0.4 s of a debate and less of a single pass: four a second of each are too many."""
    summary, _, _ = run(tmp_path, "duration = 20\nrate = 4\nmax_in_flight = 1")
    debate = summary["arms"]["debate"]
    assert debate["window"]["steady"] is False and debate["window"]["reason"].startswith("over capacity")
    assert summary["validity"]["steady"] is False
    for name in ("latency_s", "work_s", "critical_path_s"):
        nothing = {"ratio": None, "low": None, "high": None, "method": "over capacity"}
        assert debate["amplification"][name] == nothing
    assert debate["amplification"]["calls"]["ratio"] == 5.0  # counts are free of load
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    "load", ["queries = 4\nrate = 4\nwarmup = 2", "duration = 4\nrate = 2", "queries = 4\nmode = 'closed'"]
)
@pytest.mark.parametrize("arms", ["interleaved", "apart"])
def test_repeats_are_runs_of_their_own_with_new_questions(tmp_path: Path, load: str, arms: str) -> None:
    load = f"{load}\nrepeats = 3\narms = '{arms}'"
    summary, queries, windows = run(tmp_path, load)
    assert len({(q.arm, q.query) for q in queries}) == len(queries)  # no number comes twice
    counted = [q for q in queries if not q.warmup]
    firsts = [
        {min(q.query for q in counted if (q.arm, q.repeat) == (arm, r)) for arm in ("single", "debate")}
        for r in (1, 2, 3)
    ]
    assert all(len(first) == 1 for first in firsts) and len(set.union(*firsts)) == 3  # numbers stay paired
    if "closed" not in load or "queries" in load:
        planned = plan(checked(tmp_path, load), topologies())
        for name in ("single", "debate"):
            mine = [q for q in counted if q.arm == name]
            sums = {r: sum(q.resources[r] or 0 for q in mine) for r in ("calls", "input_tokens", "output_tokens")}
            assert sums == {resource: planned[name][resource] for resource in sums}
            before = planned[name]["warmup"]
            assert before["input_tokens"] in (
                None,
                sum(q.resources["input_tokens"] or 0 for q in queries if q.warmup and q.arm == name),
            )
    for repeat in (1, 2, 3):  # each is as cold as the first
        for arm in ("single", "debate"):
            mine = [q for q in queries if (q.arm, q.repeat) == (arm, repeat)]
            assert min(call.cached_tokens or 0 for q in mine for call in q.calls if not call.after) == 0
    found = summary["arms"]["debate"]["amplification"]["latency_s"]
    few, short = "one short run, no interval", "repeats of less than 12 x the p90 query latency, no interval"
    assert found["method"] == (short if "duration" in load else few) and found["low"] is None
    assert len(summary["arms"]["debate"]["window"]["repeats"]) == 3
    assert len(windows) == ({"interleaved": 3, "apart": 6}[arms] if "duration" in load else 0)
    if arms == "apart":  # one at a time, and every repeat has both
        blocks = [(q.repeat, q.arm) for q in queries]
        assert len([1 for a, b in pairwise(blocks) if a != b]) == 5


def test_five_repeats_give_an_interval(tmp_path: Path) -> None:
    summary, queries, _ = run(tmp_path, "queries = 3\nrate = 4\nrepeats = 5")
    found = summary["arms"]["debate"]["amplification"]["latency_s"]
    means = {
        (arm, r): [q.done_at - q.due_at for q in queries if (q.arm, q.repeat, q.warmup) == (arm, r, False)]
        for arm in ("single", "debate")
        for r in range(1, 6)
    }
    logs = [math.log(sum(means["debate", r]) / sum(means["single", r])) for r in range(1, 6)]
    half = 2.776445 * statistics.stdev(logs) / 5**0.5  # Student's t with 4 degrees of freedom
    low, high = found["ratio"] * math.exp(-half), found["ratio"] * math.exp(half)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6)
    assert found["method"] == "t over 5 repeats" and found["low"] < found["ratio"] < found["high"]
    assert summary["arms"]["single"]["amplification"]["latency_s"]["low"] == 1.0


class Busy(VirtualEndpoint):
    """A target at which somebody else's two requests run until an instant."""

    def __init__(self, until: float) -> None:
        super().__init__("default", Target(url=""), Service(load_profile("qwen3-30b-a3b@h100")))
        self._until = until

    async def reading(self, timeout_s: float = 10.0) -> Reading:
        told = await super().reading(timeout_s)
        busy = asyncio.get_running_loop().time() < self._until
        return Reading(told.server, {**told.values, "running": 2.0 if busy else 0.0})


@pytest.mark.parametrize(("until", "begins_at", "noted"), [(9.0, 9.0, 0), (1000.0, 30.0, 1)])
def test_an_arm_apart_waits_until_the_server_is_empty(
    tmp_path: Path, until: float, begins_at: float, noted: int
) -> None:
    scenario = checked(tmp_path, "mode = 'closed'\nqueries = 1\nwarmup = 0\narms = 'apart'")
    journal = Journal(tmp_path)

    async def main() -> list[str]:
        endpoint, tally = Busy(until), Tally({"single": "single", "debate": "debate"}, "single")
        now = asyncio.get_running_loop().time
        run = Run(scenario, topologies(), {"default": endpoint}, None, tally, journal, "r", now)
        assert await run.execute() is None
        return endpoint.notes

    notes = run_virtually(main())
    journal.close()
    first, second = sorted(read_queries(tmp_path), key=lambda q: q.due_at)
    assert max(begins_at, first.done_at) <= second.due_at < begins_at + first.done_at + 0.5
    said = "default: 2 requests were still there 30 s after an arm's last query: somebody else's?"
    assert notes.count(said) == noted


def test_a_pilot_sees_to_it_that_all_arms_have_as_many_calls_in_flight(tmp_path: Path) -> None:
    load = "duration = 100\nrate = 4\nprocess = 'constant'\nmatch = 'calls'"
    summary, queries, (window,) = run(tmp_path, load)
    single, debate = (summary["arms"][name]["load"] for name in ("single", "debate"))
    assert single["offered_qps"] == window.rates["single"] == 4.0
    assert debate["offered_qps"] == window.rates["debate"] < 4.0 / 5
    assert debate["calls_in_flight"]["mean"] == pytest.approx(single["calls_in_flight"]["mean"], rel=0.05)
    assert any(note.startswith("rates were matched by a pilot: single 4 queries/s (") for note in summary["notes"])
    pilot = [q for q in queries if q.repeat == 0]
    assert pilot and all(q.warmup and q.done_at <= window.lead_in_at for q in pilot)
    assert len({(q.arm, q.query) for q in queries}) == len(queries)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.floats(0.01, 99), st.floats(0.01, 99)), min_size=1),
    st.data(),
)
def test_matched_rates_give_all_arms_the_baselines_calls_in_flight(
    arms: dict[str, tuple[float, float]], data: st.DataObject
) -> None:
    rates, calls_s = ({arm: pair[i] for arm, pair in arms.items()} for i in (0, 1))
    base = data.draw(st.sampled_from(sorted(arms)))
    found, apart = matched(rates, calls_s, base)
    in_flight = rates[base] * calls_s[base]
    assert all(found[arm] * calls_s[arm] == pytest.approx(in_flight) for arm in arms)
    assert apart == pytest.approx(max(abs(rates[arm] * calls_s[arm] / in_flight - 1) for arm in arms), abs=1e-9)
    assert matched({"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 0.0}, "a") == (
        {"a": 2.0, "b": 1.0},
        0.0,
    )  # nothing was seen of b


@pytest.mark.parametrize(
    ("at", "reason"), [(1.0, "the run was ended before its window began"), (9.0, "the run was cut short; ")]
)
def test_a_run_that_is_ended_early_is_not_steady(tmp_path: Path, at: float, reason: str) -> None:
    scenario = checked(tmp_path, "duration = 60\nrate = 2\nwarmup = 9")
    journal = Journal(tmp_path)

    async def main() -> float:
        endpoint, tally = Busy(0.0), Tally({"single": "single", "debate": "debate"}, "single")
        now = asyncio.get_running_loop().time
        run = Run(scenario, topologies(), {"default": endpoint}, None, tally, journal, "r", now)
        asyncio.get_running_loop().call_later(at, run.stop.ask)
        assert await run.execute() is not None
        return now()

    seconds = run_virtually(main())
    journal.close()
    assert at <= seconds < at + 6.0  # what had begun has the grace of an interrupt
    arms = summarise_arms(scenario, reduced(read_queries(tmp_path)), read_windows(tmp_path), (), seconds)
    for arm in arms.values():
        assert arm["window"]["reason"].startswith(reason) and arm["window"]["steady"] is not True
    for query in read_queries(tmp_path):
        assert query.due_at <= at


def test_a_window_is_shown_in_the_validity(tmp_path: Path) -> None:
    arms = {
        "a": {"window": {"steady": False, "reason": "x; y", "littles_law_off_pct": 9.0}},
        "b": {"window": {"steady": False, "reason": "x", "littles_law_off_pct": None}},
    }
    server, client = {"reconciled": True, "alone": True}, {"verdict": "ok", "reasons": []}
    whole = {"expected": {"calls": 1, "mismatches": 0, "approximate": False}, "queries": {"completed": 1}}
    told = validity({name: {**arm, **whole} for name, arm in arms.items()}, server, client, 0)
    assert (told["steady"], told["reasons"]["steady"]) == (False, "x; a: y")
    arms["b"]["window"] |= {"steady": True, "littles_law_off_pct": -3.0}
    told = validity({name: {**arm, **whole} for name, arm in arms.items()}, server, client, 0)
    assert (told["steady"], told["reasons"]["steady"]) == (False, "a: x; a: y")
    arms["a"]["window"] |= {"steady": True, "littles_law_off_pct": 1.0}
    told = validity({name: {**arm, **whole} for name, arm in arms.items()}, server, client, 0)
    assert told["steady"] is True and told["reasons"]["steady"].endswith("at most 3.0 % apart")
