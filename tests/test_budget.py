"""Budgets, limits and errors that are too many: laws of the deciders, and whole runs whose journal is the judge."""

import json
import math
from collections import Counter, deque
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_process import running_stub
from test_run import fanmark, lines

from fanmark.agents import topologies
from fanmark.loadgen.budget import (
    LAST_CALLS,
    MINUTE_S,
    Cost,
    Failures,
    Limiter,
    Purse,
    real_cost,
    untold_cost,
    worst_case,
)
from fanmark.loadgen.cli import exit_code
from fanmark.loadgen.dry_run import check_guarded, plan, totals
from fanmark.loadgen.errors import CallError, ScenarioError
from fanmark.loadgen.lanes.http import HttpError
from fanmark.loadgen.lanes.sse import Usage
from fanmark.loadgen.prices import Prices
from fanmark.loadgen.scenario import Budget, Limits, Scenario
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import Options, simulate

TABLE = topologies()
PRICES = {"input": 0.3, "cached_input": 0.03, "output": 1.2}


@given(
    st.floats(1e-4, 0.1) | st.none(),
    st.integers(1, 60_000) | st.none(),
    st.integers(1, 30) | st.none(),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 900), st.floats(0, 1), st.integers(0, 5)), max_size=60),
)
def test_no_cap_is_exceeded_whatever_ends_when(
    dollars: float | None, tokens: int | None, calls: int | None, sent: list[tuple[int, int, float, int]]
) -> None:
    """Calls with their worst cases come and end in any order; each costs what it wrote, of a prompt that was partly cached."""
    prices = Prices(**PRICES)
    purse = Purse(Budget(dollars=dollars, tokens=tokens, calls=calls))
    under_way: deque[tuple[Cost, Cost]] = deque()
    for prompt, most, share, ends in sent:
        worst = worst_case({"max_tokens": most}, prompt, prices)
        details = {"cached_tokens": round(prompt * share)}
        usage = Usage(prompt, round(most * share), None)
        real = real_cost(usage, prices)
        assert details["cached_tokens"] <= prompt and all(a <= b for a, b in zip(real, worst, strict=True))
        room = purse.room(worst)
        if room == "now":
            purse.hold(worst)
            under_way.append((worst, real))
        elif room == "later":
            assert under_way  # somebody will give something back
        for _ in range(min(ends, len(under_way))):
            purse.settle(*under_way.popleft())
        total = purse.spent.plus(purse.held)
        for cap, value in ((dollars, total.dollars), (tokens, total.tokens), (calls, total.calls)):
            assert cap is None or value <= cap + 1e-9


@given(
    st.integers(0, 10_000), st.integers(1, 500), st.integers(1, 8), st.floats(0, 10), st.floats(0, 10), st.floats(0, 10)
)
def test_the_worst_case_is_all_read_afresh_and_all_written(
    prompt: int, most: int, samples: int, fresh: float, cached: float, output: float
) -> None:
    prices = Prices(input=fresh, cached_input=cached, output=output)
    body = {"max_tokens": most, "n": samples}
    worst = worst_case(body, prompt, prices)
    assert worst == worst_case({"max_completion_tokens": most, "n": samples, "max_tokens": 0}, prompt, prices)
    assert (worst.calls, worst.tokens) == (1, prompt + most * samples)
    assert worst.dollars == pytest.approx((prompt * max(fresh, cached) + most * samples * output) / 1e6)
    assert real_cost(Usage(prompt, most * samples), prices).dollars <= worst.dollars + 1e-12
    assert worst_case(body, prompt, None) == (1, prompt + most * samples, 0.0)


UNTOLD: list[tuple[bool, BaseException | None, bool]] = [
    # was it sent, how it ended, whether it may have cost something
    (False, CallError("stream_cut", ""), False),
    (True, CallError("connect", ""), False),
    (True, HttpError(400, ""), False),
    (True, HttpError(429, ""), False),
    (True, HttpError(503, ""), False),
    (True, HttpError(500, ""), True),
    (True, CallError("timeout", ""), True),
    (True, CallError("stream_cut", ""), True),
    (True, None, True),  # a reply without counts
    (True, TimeoutError(), True),
]


@pytest.mark.parametrize(("was_sent", "error", "costs"), UNTOLD)
def test_what_is_taken_for_a_call_that_said_no_counts(was_sent: bool, error: BaseException | None, costs: bool) -> None:
    worst = Cost(1, 500, 0.25)
    assert untold_cost(worst, was_sent, error) == (worst if costs else Cost(1, 0, 0.0))


@settings(max_examples=40)
@given(
    st.integers(1, 12) | st.none(),
    st.integers(100, 3000) | st.none(),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 100), st.floats(0.1, 90), st.floats(0, 1)), max_size=40),
)
def test_no_minute_has_more_than_it_may_and_nobody_waits_longer_than_needed(
    requests: int | None, tokens: int | None, calls: list[tuple[float, int, float, float]]
) -> None:
    limiter = Limiter(Limits(requests_per_minute=requests, tokens_per_minute=tokens))
    now, out = 0.0, list[tuple[float, int]]()
    most_requests, most_tokens = requests or math.inf, tokens or math.inf
    for pause_s, size, _, share in calls:
        now += pause_s
        waited = False
        while (wait_s := limiter.wait_s(size, now)) > 0:
            assert wait_s < math.inf
            now, waited = now + wait_s, True
        last = [n for at, n in out if at > now - MINUTE_S]
        assert len(last) + 1 <= most_requests and sum(last) + size <= most_tokens
        if waited:  # a moment before, there was no room
            before = [n for at, n in out if at > now - MINUTE_S - 2e-6]
            assert len(before) + 1 > most_requests or sum(before) + size > most_tokens
        entry = limiter.admit(size, now)
        real = round(size * share)
        limiter.settle(entry, real)  # what it did not write is free again
        out.append((now, real))


def test_limits_by_hand() -> None:
    limiter = Limiter(Limits(requests_per_minute=3, calls_in_flight=2))
    first = limiter.admit(10, 0.0)
    second = limiter.admit(10, 5.0)
    assert limiter.wait_s(10, 6.0) == math.inf  # until one has ended
    limiter.settle(first, 10)
    assert limiter.wait_s(10, 6.0) == 0
    limiter.admit(10, 6.0)
    limiter.settle(second, 10)
    assert limiter.wait_s(10, 7.0) == pytest.approx(53.0, abs=1e-5)
    assert limiter.wait_s(10, 60.0) == 0.0
    shares = [Limiter(Limits(tokens_per_minute=1000), i, 3) for i in range(3)]
    assert [share.fits(333) for share in shares] == [True] * 3
    assert [share.fits(334) for share in shares] == [True, False, False]


@given(st.integers(1, 20), st.lists(st.booleans(), max_size=80))
def test_a_run_ends_when_so_many_of_the_last_calls_failed(twentieths: int, failed: list[bool]) -> None:
    failures = Failures(twentieths / LAST_CALLS)
    for i, bad in enumerate(failed, start=1):
        last = failed[max(0, i - LAST_CALLS) : i]
        assert failures.add("timeout" if bad else None) == (i >= LAST_CALLS and sum(last) >= twentieths)


def test_failures_are_told_by_class() -> None:
    failures = Failures(0.5)
    for i in range(20):
        failures.add(None if i % 2 else "timeout" if i < 6 else "http_5xx")
    assert failures.told("HTTP 500:\n  no") == (
        "10 of the last 20 calls failed (http_5xx 7, timeout 3; the last: HTTP 500: no): [load] abort_on_errors = 0.5 ends the run"
    )


def scenario(load: dict[str, Any], target: dict[str, Any] | None = None, **more: Any) -> Scenario:
    arms: list[dict[str, Any]] = [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", "agents": 3},
        {"name": "chain", "topology": "tool-chain", "tool_calls": {"dist": "uniform", "mean": 4, "min": 1, "max": 7}},
    ]
    lengths = {
        "answer": {"dist": "lognormal", "mean": 60, "cv": 0.6, "min": 8, "max": 300},
        "question": {"dist": "gamma", "mean": 120, "cv": 0.7, "min": 10, "max": 500},
        "tool_result": {"dist": "exponential", "mean": 80, "min": 5, "max": 400},
        "judge_answer": 50,
        "action": 20,
    }
    raw = {"load": load, "arm": arms, "workload": lengths, "tools": {"latency_s": 0.01}, **more}
    if target is not None:
        raw["target"] = {"url": "http://h/v1", **target}
    return check(raw, "f.toml", TABLE)


def spent(out: Path, prices: dict[str, float]) -> Cost:
    """What a run's journal says that it cost, in cents and all."""
    tokens = dollars = n = 0.0
    for call in lines(out / "calls.jsonl"):
        if call["kind"] == "call" and call["sent_at"] is not None:
            n += 1
            read, cached, written = (call[key] for key in ("input_tokens", "cached_tokens", "output_tokens"))
            tokens += read + written
            dollars += (read - cached) * prices["input"] + cached * prices["cached_input"] + written * prices["output"]
    return Cost(round(n), round(tokens), dollars / 1e6)


def simulated(given: Scenario, out: Path) -> dict[str, Any]:
    return simulate(given, TABLE, Options(out, "test", [])).summary


@pytest.mark.slow
def test_dollars_hold_at_two_hundred_calls_in_flight_with_limits_beside_them(tmp_path: Path) -> None:
    cap, minute = 0.2, 500_000
    given = scenario(
        {"mode": "closed", "concurrency": 120, "queries": 900, "warmup": 0},
        {"prices": PRICES, "limits": {"tokens_per_minute": minute, "calls_in_flight": 200}},
        budget={"dollars": cap},
    )
    found = simulated(given, tmp_path)
    cost = spent(tmp_path, PRICES)
    assert cap * 0.9 < cost.dollars <= cap
    assert found["ended"]["why"] == "budget" and found["ended"]["reason"].startswith(
        "[budget] dollars = 0.2 is reached: "
    )
    assert (found["partial"], exit_code(found, False)) == (True, 4)
    calls = [call for call in lines(tmp_path / "calls.jsonl") if call["kind"] == "call"]
    sent = [call for call in calls if call["sent_at"] is not None]
    edges = sorted([(call["sent_at"], 1) for call in sent] + [(call["done_at"], -1) for call in sent])
    assert max(accumulate(step for _, step in edges)) == 200
    busiest, inside, window = 0, 0, deque[tuple[float, int]]()
    for at, tokens in sorted((call["sent_at"], call["input_tokens"] + call["output_tokens"]) for call in sent):
        window.append((at, tokens))
        inside += tokens
        while window[0][0] <= at - MINUTE_S:
            inside -= window.popleft()[1]
        busiest = max(busiest, inside)
    assert 0.9 * minute < busiest <= minute
    assert {call["error"] for call in calls} <= {None, "budget", "cancelled"}
    failed = Counter(row["error"].partition(":")[0] for row in lines(tmp_path / "queries.jsonl") if row["error"])
    assert set(failed) == {"budget"}
    # no query starts after the first that failed for want of money
    rows = lines(tmp_path / "queries.jsonl")
    first_at = min(row["done_at"] for row in rows if row["outcome"] == "failed")
    assert max(row["started_at"] for row in rows) <= first_at
    # what the limits cost is told apart, and nobody is blamed for it
    waits = [call["limited_s"] for call in sent]
    assert max(waits) > 0
    single = found["arms"]["single"]["per_query"]
    assert single["limited_s"]["mean"] > 0
    for row in rows:
        if row["arm"] == "single" and row["outcome"] == "completed":
            r = row["resources"]
            assert r["latency_s"] == pytest.approx(r["limited_s"] + r["work_s"] + r["client_s"], abs=1e-9)
            assert r["client_s"] - (row["started_at"] - row["due_at"]) < 0.05


@pytest.mark.parametrize(
    ("api", "load"),
    [("chat", {}), ("completions", {"arms": "apart"}), ("chat", {"mode": "closed", "concurrency": 4, "repeats": 2})],
)
def test_a_dry_run_and_the_run_agree_on_calls_and_tokens(tmp_path: Path, api: str, load: dict[str, Any]) -> None:
    given = scenario({"rate": 4, "queries": 25, "warmup": 3, **load}, stub={"api": api})
    planned = plan(given, TABLE)
    found = simulated(given, tmp_path)
    for name, arm in found["arms"].items():
        for key in ("calls", "tool_calls", "input_tokens", "output_tokens"):
            measured = arm["per_query"][key]
            assert round(measured["mean"] * measured["n"]) == planned[name][key]
        assert arm["queries"]["completed"] == planned[name]["queries"] == 25 * load.get("repeats", 1)
    cost, whole = spent(tmp_path, PRICES), totals(planned)
    assert (cost.calls, cost.tokens) == (whole["calls"], whole["input_tokens"] + whole["output_tokens"])  # type: ignore[operator]


@pytest.mark.parametrize(("name", "short"), [("calls", 0), ("calls", 1), ("tokens", 0), ("tokens", 1)])
def test_a_budget_of_what_the_dry_run_says_is_just_enough(tmp_path: Path, name: str, short: int) -> None:
    load = {"mode": "closed", "concurrency": 5, "queries": 12, "warmup": 1}
    whole = totals(plan(scenario(load), TABLE))
    planned = {"calls": whole["calls"], "tokens": (whole["input_tokens"] or 0) + (whole["output_tokens"] or 0)}
    found = simulated(scenario(load, budget={name: round(planned[name] or 0) - short}), tmp_path)
    assert (found["partial"], exit_code(found, False)) == ((True, 4) if short else (False, 0))
    assert (getattr(spent(tmp_path, PRICES), name) == planned[name]) is not bool(short)


def test_queries_that_have_begun_are_answered(tmp_path: Path) -> None:
    """What is left goes to those under way: a run that ends at its budget has whole queries to show, of all arms."""
    found = simulated(scenario({"rate": 20, "queries": 40, "warmup": 0}, budget={"calls": 90}), tmp_path)
    rows = lines(tmp_path / "queries.jsonl")
    assert {arm: [r["outcome"] for r in rows if r["arm"] == arm].count("completed") > 2 for arm in found["arms"]} == {
        arm: True for arm in found["arms"]
    }
    assert all(row["resources"]["calls"] == 0 for row in rows if row["outcome"] == "failed")
    assert len(rows) < 40 and found["ended"]["why"] == "budget"
    assert 90 - 8 < spent(tmp_path, PRICES).calls <= 90


def test_a_call_that_no_minute_has_room_for_ends_the_run(tmp_path: Path) -> None:
    found = simulated(scenario({"queries": 3, "rate": 1}, {"limits": {"tokens_per_minute": 300}}), tmp_path)
    assert found["ended"]["why"] == "budget" and "more than a minute may have" in found["ended"]["reason"]
    assert spent(tmp_path, PRICES).calls == 0


BUDGET_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no cap": ({"budget": {}}, "[budget]: no cap is given: give dollars, tokens or calls"),
    "dollars of the stub": (
        {"budget": {"dollars": 2}},
        "[budget] dollars = 2: the embedded stub costs nothing: give tokens or calls",
    ),
    "dollars without prices": (
        {"budget": {"dollars": 2}, "target": {}},
        "[budget] dollars = 2: [target] has no prices: give prices = { input = ..., output = ... }, in dollars per million tokens",
    ),
    "nothing to spend": ({"budget": {"calls": 0}}, "[budget] calls = 0: must be a whole number of at least 1"),
    "a limit of nothing": (
        {"target": {"limits": {"calls_in_flight": 0}}},
        "[target.limits] calls_in_flight = 0: must be a whole number of at least 1",
    ),
    "an unknown limit": (
        {"target": {"limits": {"rpm": 3}}},
        "[target.limits]: unknown key 'rpm': allowed are calls_in_flight, requests_per_minute, tokens_per_minute",
    ),
    "more errors than all": (
        {"load": {"abort_on_errors": 2}},
        "[load] abort_on_errors = 2: must be true or false or a number of at least 0 and of at most 1",
    ),
}


@pytest.mark.parametrize(("more", "told"), BUDGET_MISTAKES.values(), ids=BUDGET_MISTAKES)
def test_a_mistake_in_a_budget_is_told_with_its_mend(more: dict[str, Any], told: str) -> None:
    with pytest.raises(Exception) as caught:
        scenario(**({"load": {}} | more))
    assert str(caught.value) == f"f.toml: {told}"


@pytest.mark.real
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_whose_server_dies_ends_by_itself(tmp_path: Path, workers: int) -> None:
    """Half of the last 20 calls is too many; all workers end when one has seen so much."""
    arms = '[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n[load]\nmode = "closed"\nconcurrency = 4\nwarmup = 0\n'
    (tmp_path / "f.toml").write_text(arms)
    with running_stub("--time-scale", "0.2", "--fault", "500:rate=0.9", "--fault-seed", "3") as stub:
        flags = [
            "--target",
            f"{stub.url}/v1",
            "--queries",
            "100000",
            "--workers",
            str(workers),
            "--out",
            str(tmp_path / "run"),
        ]
        done = fanmark("run", str(tmp_path / "f.toml"), *flags)
    assert done.returncode == 1, done.stderr
    said = next(line for line in done.stdout.splitlines() if line.startswith("ERRORS: "))
    assert "of the last 20 calls failed (http_5xx " in said and said.endswith(
        "[load] abort_on_errors = 0.5 ends the run"
    )
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (found["partial"], found["ended"]["why"]) == (True, "errors")
    assert 20 <= found["arms"]["single"]["queries"]["started"] < 1000


@pytest.mark.real
def test_workers_share_a_budget_and_stay_below_it(tmp_path: Path) -> None:
    flags = [
        "--queries",
        "400",
        "--concurrency",
        "40",
        "--set",
        "workload.answer=4",
        "--set",
        "workload.judge_answer=4",
    ]
    flags += ["--set", "load.warmup=0", "--set", "target.prices={input=0.3, cached_input=0.03, output=1.2}"]
    arms = '[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n[[arm]]\nname = "debate"\ntopology = "debate"\n'
    (tmp_path / "f.toml").write_text(arms)
    with running_stub("--time-scale", "0.2") as stub:
        target = ["--target", f"{stub.url}/v1", "--set", "budget.dollars=0.02", "--workers", "2"]
        done = fanmark("run", str(tmp_path / "f.toml"), *target, *flags, "--json", "--out", str(tmp_path / "run"))
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    assert "dollars = 0.01 (this worker's share) is reached" in found["ended"]["reason"]
    assert f"fanmark: budget: {found['ended']['reason']}" in done.stderr.splitlines()
    assert 0.016 < spent(tmp_path / "run", PRICES).dollars <= 0.02
    assert found["server"]["reconciled"] is True  # no call that the server did not end


GUARDED = {
    "a public host with a key": ({"url": "https://api.example.com/v1", "api_key_env": "K"}, True),
    "a public replica": ({"urls": ["http://a/v1", "http://8.8.8.8/v1"], "api_key_file": "k"}, True),
    "a key in a header": ({"url": "https://h.example.com/v1", "headers": {"X-Key": {"env": "K"}}}, True),
    "a key in the query": ({"url": "https://h.example.com/v1", "query": {"key": {"env": "K"}}}, True),
    "a public host without a key": ({"url": "https://h.example.com/v1", "headers": {"X-Org": "o"}}, False),
    "a host of one's own": ({"url": "http://10.0.0.7:8000/v1", "api_key_env": "K"}, False),
}


@pytest.mark.parametrize(("target", "refused"), GUARDED.values(), ids=GUARDED)
def test_a_key_goes_to_a_public_host_within_a_budget_only(target: dict[str, Any], refused: bool) -> None:
    def given(**more: Any) -> Scenario:
        raw = {
            "load": {"queries": 10},
            "arm": [{"name": "a", "topology": "single", "baseline": True}],
            "target": target,
        }
        return check(raw | more, "f.toml", TABLE)

    check_guarded(given(budget={"tokens": 1}), TABLE)
    if not refused:
        return check_guarded(given(), TABLE)
    with pytest.raises(ScenarioError) as caught:
        check_guarded(given(), TABLE)
    url = target.get("url") or target["urls"][1]
    assert str(caught.value) == (
        f'f.toml: [target] url = "{url}": a key goes to a host that is not private, and this run may send 12 calls, 6,000 tokens in, '
        "2,400 tokens out, dollars unknown (no prices): give a [budget] or --yes"
    )
    return None


def test_the_guard_stands_in_the_command(tmp_path: Path) -> None:
    flags = [
        "--target",
        "https://api.example.invalid/v1",
        "--set",
        "target.ready_timeout_s=0.3",
        "--out",
        str(tmp_path / "run"),
    ]
    refused = fanmark("run", *flags, env={"OPENAI_API_KEY": "k3y"})
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "may send 483 calls, 1,210,861 tokens in" in refused.stderr and "give a [budget] or --yes" in refused.stderr
    going = fanmark("run", *flags, "--yes", env={"OPENAI_API_KEY": "k3y"})
    assert going.returncode == 3 and "does not answer" in going.stderr
    assert fanmark("run", *flags, "--dry-run", env={"OPENAI_API_KEY": "k3y"}).returncode == 0
