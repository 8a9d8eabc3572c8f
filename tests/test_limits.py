"""Limits of an arm: a query that reaches one ends with what it has, its closed form is then a bound, and what it gave up is waste."""

from pathlib import Path
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import Options, simulate

WHOLE = {"calls": 9, "depth": 3, "width": 4}  # four agents, two rounds, a judge


def run(tmp_path: Path, **limits: Any) -> tuple[dict[str, Any], list[Any]]:
    raw = {
        "arm": [
            {"name": "single", "topology": "single", "baseline": True},
            {"name": "debate", "topology": "debate", **limits},
        ],
        "workload": {"answer": 50},
        "load": {"mode": "closed", "concurrency": 2, "queries": 4, "warmup": 0},
    }
    out = tmp_path / "run"
    found = simulate(check(raw, "limits.toml", topologies()), topologies(), Options(out, "test", [])).summary
    return found["arms"]["debate"], [query for query in read_queries(out) if query.arm == "debate"]


# limit: calls that are made and ended, calls that are given up with them
CASES: list[tuple[dict[str, Any], str, int, int]] = [
    # the fifth call is not started: round 1 is whole
    ({"max_calls": 4}, "max_calls", 4, 0),
    # round 2 begins with two of its calls; the third ends the query before they are answered
    ({"max_calls": 6}, "max_calls", 4, 2),
    # 4 x (300 + 200 + 20 + 50) = 2,280 tokens are spent in round 1: no call of round 2 starts
    ({"max_tokens": 2280}, "max_tokens", 4, 0),
    # one more is allowed: round 2 starts, as what it will cost is not known yet, and the judge does not
    ({"max_tokens": 2281}, "max_tokens", 8, 0),
]


@pytest.mark.parametrize(("limits", "limit", "ended", "given_up"), CASES)
def test_a_limit_ends_the_query_with_what_it_has(
    limits: dict[str, Any], limit: str, ended: int, given_up: int, tmp_path: Path
) -> None:
    arm, queries = run(tmp_path, **limits)
    assert arm["queries"] == {"started": 4, "completed": 4, "failed": 0, "abandoned": 0}
    assert arm["stopped"] == {limit: 4}
    assert arm["per_query"]["calls"]["mean"] == ended
    assert arm["expected"]["mismatches"] == 0 and arm["expected"]["calls"] == WHOLE["calls"]  # a bound, and kept
    assert (arm["waste"]["given_up"], arm["waste"]["calls"]) == (4 * given_up, 4 * given_up)
    assert arm["by_role"]["agent-1"]["output_tokens"] == 50 * 4 * (1 + (ended == 8))
    for query in queries:
        assert query.stopped == limit and len(query.needed) == ended
        assert sum(call.error == "cancelled" for call in query.calls) == given_up


STRAGGLERS: list[tuple[str, dict[str, Any], int, int]] = [
    # topology, its keys; the calls that are needed at least, and all
    ("self-consistency", {"samples": 6, "wait_for": 4}, 4, 6),
    ("mixture-of-agents", {"layers": 3, "agents": 4, "wait_for": 3}, 3 + 3 + 1, 9),
    ("orchestrator", {"workers": 4, "tool_calls": 1, "wait_for": 2}, 1 + 2 * 2 + 1, 10),
    ("debate", {"agents": 4, "rounds": 3, "wait_for": 3}, 3 * 3 + 1, 13),
    ("debate", {"agents": 4, "rounds": 3, "wait_for": 2, "transcript": "full", "judge": "all"}, 2 * 3 + 1, 13),
    ("debate", {"agents": 6, "rounds": 2, "wait_for": 4, "groups": 2, "stage_rounds": 1}, 4 * 2 + 1, 13),
    ("panel", {"specialists": 3, "rounds": 2, "wait_for": 3}, 3 * 2 + 2, 10),
]


@pytest.mark.parametrize(("topology", "params", "least", "most"), STRAGGLERS)
def test_who_is_late_is_given_up(topology: str, params: dict[str, Any], least: int, most: int, tmp_path: Path) -> None:
    """Prompts too long to be read in one step, and cached by nobody: siblings end one after another."""
    raw = {
        "arm": [
            {"name": "single", "topology": "single", "baseline": True},
            {"name": "many", "topology": topology, **params},
        ],
        "workload": {"system": 9000, "answer": 60, "cache": "call"},
        "load": {"mode": "closed", "concurrency": 1, "queries": 3, "warmup": 0},
    }
    out = tmp_path / "run"
    found = simulate(check(raw, "limits.toml", topologies()), topologies(), Options(out, "test", [])).summary
    arm = found["arms"]["many"]
    assert arm["queries"]["completed"] == 3 and found["validity"]["counted"] is True
    assert arm["expected"]["at_most"] is True and arm["expected"]["calls"] == most
    queries = [query for query in read_queries(out) if query.arm == "many"]
    assert all(query.bound and least <= query.resources["calls"] <= most for query in queries)
    given_up = sum(call.error == "cancelled" and call.kind == "call" for query in queries for call in query.calls)
    assert 0 < given_up == arm["waste"]["given_up"]
    assert found["arms"]["single"]["expected"]["at_most"] is False and found["arms"]["single"]["waste"]["given_up"] == 0


def test_no_limit_is_reached_by_what_stays_below_it(tmp_path: Path) -> None:
    arm, queries = run(tmp_path, max_calls=9, max_tokens=10**6, query_seconds=1000)
    assert arm["stopped"] == {} and {query.stopped for query in queries} == {None}
    assert arm["per_query"]["calls"]["mean"] == 9 and arm["expected"]["mismatches"] == 0


def test_a_query_out_of_time_has_what_was_answered_until_then(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    first_round_s = whole["by_round"]["1"]["latency_s"]["max"]
    arm, queries = run(tmp_path, query_seconds=first_round_s * 1.2)
    assert arm["stopped"] == {"query_seconds": 4}
    assert arm["per_query"]["latency_s"]["max"] == pytest.approx(first_round_s * 1.2, abs=1e-6)
    assert all(len(query.calls) == 8 and {call.round for call in query.needed} == {1} for query in queries)
    assert arm["waste"]["given_up"] == 16  # all of round 2


def test_a_query_without_any_answer_has_failed(tmp_path: Path) -> None:
    arm, queries = run(tmp_path, query_seconds=0.001)
    assert arm["queries"]["failed"] == 4 and arm["stopped"] == {}
    assert {query.error for query in queries} == {"timeout: query_seconds was reached before any call had ended"}
