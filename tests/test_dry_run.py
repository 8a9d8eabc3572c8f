"""What a run would send, worked out on paper for constant lengths, and bounded for drawn ones."""

import json
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.loadgen.dry_run import lines, plan, told, totals
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.scenario_check import check

TABLE = topologies()
# S 300, Q 200, role 20, instruction 40, answer 200, judge 40 and 300, action 60, tool result 300
SINGLE: dict[str, Any] = {"name": "single", "topology": "single", "baseline": True}
SCHEMAS = 1381  # tokens of the embedded tools' schemas, which stand in each prompt of the chain
DEBATE: dict[str, Any] = {"name": "debate", "topology": "debate"}
CHAIN: dict[str, Any] = {"name": "chain", "topology": "tool-chain"}
TEN = {"process": "constant", "rate": 2, "queries": 10}


def scenario(load: dict[str, Any], *arms: dict[str, Any], **more: Any) -> Scenario:
    return check({"load": load, "arm": list(arms) or [SINGLE, DEBATE, CHAIN], **more}, "f.toml", TABLE)


PER_QUERY = {
    # S + Q
    "single": {"calls": 1, "tool_calls": 0, "input_tokens": 500, "output_tokens": 200},
    # 4 x (S + Q + role), 4 x (S + Q + instruction + 4 answers + role), S + Q + 4 answers + judge's instruction
    "debate": {
        "calls": 9,
        "tool_calls": 0,
        "input_tokens": 4 * 520 + 4 * 1360 + 1340,
        "output_tokens": 8 * 200 + 300,
    },
    # 13 x (S + the schemas + Q), and 0 to 12 actions with their results
    "chain": {
        "calls": 13,
        "tool_calls": 12,
        "input_tokens": 13 * (500 + SCHEMAS) + 78 * 360,
        "output_tokens": 12 * 60 + 200,
    },
}


def test_totals_are_the_closed_forms_times_the_queries() -> None:
    found = plan(scenario(TEN), TABLE)
    for name, per_query in PER_QUERY.items():
        assert {key: found[name][key] for key in per_query} == {key: 10 * n for key, n in per_query.items()}
        assert found[name]["queries"] == 10
    # the longest prompt with its reply: S + Q + answer; the judge's; the last step's
    assert [arm["longest_context_tokens"] for arm in found.values()] == [
        700,
        1340 + 300,
        500 + SCHEMAS + 12 * 360 + 200,
    ]
    # at worst all ten at once, four of a debate's agents beside each other
    assert [arm["peak_calls_in_flight"] for arm in found.values()] == [10, 40, 10]
    # the last of ten at 2 a second; arms start a third of a step apart
    assert [arm["seconds"] for arm in found.values()] == pytest.approx([4.5, 4.5 + 1 / 6, 4.5 + 2 / 6])
    assert [arm["dollars"] for arm in found.values()] == [None, None, None]
    json.dumps(found, allow_nan=False)


def test_dollars_by_the_targets_prices() -> None:
    prices = {"input": 1.0, "cached_input": 0.1, "output": 2.0}
    found = plan(scenario(TEN, target={"url": "http://h/v1", "prices": prices}), TABLE)
    assert found["single"]["dollars"] == pytest.approx((5000 * 1 + 2000 * 2) / 1e6)  # nothing is taken for cached
    two = {"big": {"url": "http://b/v1", "prices": prices}, "small": {"url": "http://s/v1"}}
    arms = [
        SINGLE | {"target": "big"},
        DEBATE | {"target": "small"},
        CHAIN | {"targets": {"agent": "big", "default": "small"}},
    ]
    found = plan(scenario(TEN, *arms, targets=two), TABLE)
    assert found["single"]["dollars"] == pytest.approx(0.009)
    assert found["debate"]["dollars"] is None  # no prices
    # its agent's calls all go to the big one
    assert found["chain"]["dollars"] == pytest.approx(10 * (13 * (500 + SCHEMAS) + 78 * 360 + 2 * 920) / 1e6)
    found = plan(
        scenario(
            TEN, SINGLE | {"target": "small"}, DEBATE | {"targets": {"judge": "big", "default": "big"}}, targets=two
        ),
        TABLE,
    )
    assert found["debate"]["dollars"] == pytest.approx(
        10 * (8860 + 2 * 1900) / 1e6
    )  # by a walk: what by the closed form


CACHES: dict[str, list[float | None]] = {
    # Q; Q + 4 roles, F + 4 answers + 4 roles, 4 answers + the judge's instruction; each step's action and result. S is warm
    "arm": [200, 280 + 920 + 840, 200 + 12 * 300],
    "warm": [200, 280 + 920 + 840, 200 + 12 * 300],
    "query": [500, 580 + 920 + 840, 500 + SCHEMAS + 12 * 300],
    "call": [500, 8860, 13 * (500 + SCHEMAS) + 78 * 360],
    "run": [None, None, None],  # what one arm computes serves another
}


@pytest.mark.parametrize(("cache", "per_query"), CACHES.items())
def test_what_a_perfect_cache_leaves_to_be_computed(cache: str, per_query: list[float | None]) -> None:
    found = plan(scenario(TEN | {"queries": 40}, workload={"cache": cache}), TABLE)
    assert [arm["fresh_tokens_at_best"] for arm in found.values()] == [n and 40 * n for n in per_query]


def test_without_warm_up_the_first_query_computes_what_all_share() -> None:
    found = plan(scenario(TEN | {"warmup": 0}), TABLE)
    assert found["single"]["fresh_tokens_at_best"] == 300 + 10 * 200


def test_an_arms_own_number_of_queries() -> None:
    found = plan(scenario({"queries": 5}, SINGLE | {"queries": 3}, DEBATE), TABLE)
    assert [arm["queries"] for arm in found.values()] == [3, 5]
    assert found["single"]["input_tokens"] == 3 * 500


@pytest.mark.parametrize(
    ("load", "queries", "seconds", "peak"),
    [
        ({"mode": "open", "process": "constant", "rate": 2, "duration": 3.0}, 6, 2.5, 6),
        ({"mode": "closed", "concurrency": 4, "queries": 9}, 9, None, 4),
        # how many a closed loop gets done in a time is the server's to say
        ({"mode": "closed", "concurrency": 4, "duration": 30.0}, None, 30.0, 4),
    ],
)
def test_loops(load: dict[str, Any], queries: int | None, seconds: float | None, peak: int) -> None:
    found = plan(scenario(load, SINGLE), TABLE)["single"]
    assert (found["queries"], found["seconds"], found["peak_calls_in_flight"]) == (queries, seconds, peak)
    assert found["longest_context_tokens"] == 700
    known = None if queries is None else queries * 500
    assert found["input_tokens"] == known


def test_poisson_arrivals_are_those_of_the_run() -> None:
    found = plan(scenario({"rate": 2, "duration": 50.0}, SINGLE), TABLE)["single"]
    assert 70 < found["queries"] < 130 and found["seconds"] < 50
    assert found == plan(scenario({"rate": 2, "duration": 50.0}, SINGLE), TABLE)["single"]


def test_drawn_lengths_are_those_of_the_run() -> None:
    workload = {"answer": {"dist": "lognormal", "mean": 200, "cv": 0.5, "min": 20, "max": 400}, "system": 0}
    found = plan(scenario({"queries": 40, "rate": 1}, SINGLE, DEBATE, workload=workload), TABLE)
    assert found["single"]["input_tokens"] == 40 * 200
    assert found["single"]["output_tokens"] == pytest.approx(40 * 200, rel=0.2)
    assert 200 + 300 < found["single"]["longest_context_tokens"] <= 200 + 400
    # the debate writes the same answers, eight of each, and a verdict
    assert found["debate"]["output_tokens"] == 8 * found["single"]["output_tokens"] + 40 * 300


@pytest.mark.parametrize("name", [name for name in TABLE if name != "replay"])
def test_every_topology_can_be_planned(name: str) -> None:
    arms = [SINGLE, {"name": "other", "topology": name}]
    found = plan(scenario({"queries": 3, "rate": 1}, *arms), TABLE)["other"]
    assert found["queries"] == 3 and found["calls"] + found["tool_calls"] >= 3
    assert (found["longest_context_tokens"] > 0) == (found["calls"] > 0) == (found["input_tokens"] > 0)


def test_the_plan_as_a_table() -> None:
    assert lines(plan(scenario(TEN, SINGLE, DEBATE), TABLE)) == [
        "                        single  debate",
        "queries                     10      10",
        "calls                       10      90",
        "tool calls                   0       0",
        "input tokens             5,000  88,600",
        "fresh tokens at best     2,000  20,400",
        "output tokens            2,000  19,000",
        "longest context tokens     700   1,640",
        "peak calls in flight        10      40",
        "seconds                   4.50    4.75",
        "dollars                      -       -",
        "",
        "whole run, with 4 queries of warm-up: 120 calls, 112,320 tokens in, 25,200 tokens out, dollars unknown (no prices)",
    ]


def test_the_whole_run_is_told_with_its_warm_up() -> None:
    target = {"url": "http://h/v1", "prices": {"input": 1.0, "output": 2.0}}
    planned = plan(scenario(TEN | {"warmup": 3}, SINGLE, DEBATE | {"warmup": 0}, target=target), TABLE)
    assert (planned["single"]["warmup"]["calls"], planned["debate"]["warmup"]["calls"]) == (3, 0)
    found = totals(planned)
    assert found == pytest.approx(
        {
            "calls": 13 + 90,
            "input_tokens": 13 * 500 + 10 * 8860,
            "output_tokens": 13 * 200 + 10 * 1900,
            "dollars": (13 * (500 + 2 * 200) + 10 * (8860 + 2 * 1900)) / 1e6,
        }
    )
    assert told(found) == "103 calls, 95,100 tokens in, 21,600 tokens out, $0.14"
    endless = plan(scenario({"mode": "closed", "duration": 30.0}, SINGLE), TABLE)
    assert told(totals(endless)) == "as many calls as it takes"


def test_a_claim_stands_beside_the_closed_forms() -> None:
    arms = [SINGLE, {"name": "panel", "preset": "grok-4"}]
    found = plan(scenario(TEN, *arms), TABLE)
    assert found["single"]["claim"] is None
    claim = found["panel"]["claim"]
    assert (claim["unit"], claim["low"], claim["high"]) == ("x", 1.5, 2.5)
    # 10 calls; plan, 4 turns, 4 turns, conclusion in: 540 + 4 x 670 + 4 x 1110 + 1090; 150 + 8 x 100 + 300 out
    # fresh, where S is warm: Q + F; Q + plan + 4 roles; 4 turns + F + 4 roles; 4 turns + F
    known = {"calls": 10.0, "input_tokens": 8750 / 500, "fresh_tokens": (240 + 230 + 520 + 440) / 200}
    known["output_tokens"] = 1250 / 200
    assert {name: at["value"] for name, at in claim["measured"].items() if at["value"] is not None} == known
    assert {at["is"] for at in claim["measured"].values()} == {"above", None}
    text = "\n".join(lines(found))
    assert "panel calls          1.50 to 2.50x                 10x  above" in text
