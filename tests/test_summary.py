"""summary.json of a run made by hand: every number worked out on paper."""

import json
from typing import Any

import pytest
import two_arms
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.records import Query, bucket_gap_s, gap_bucket
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.summary import COUNTS, EXPECTED, TIMES, summarise_arms, validity
from fanmark.loadgen.table import lines

SERVER = {"reconciled": True, "alone": True, "reason": "4 counters equal"}
CLIENT: dict[str, Any] = {"verdict": "ok", "reasons": []}


def arms() -> dict[str, Any]:
    return summarise_arms(two_arms.scenario(), reduced(two_arms.queries()))


def means(arm: dict[str, Any]) -> dict[str, float | None]:
    return {name: found["mean"] if found else None for name, found in arm["per_query"].items()}


def test_queries_are_counted_by_their_outcome_and_warm_up_is_left_out() -> None:
    found = arms()
    assert found["single"]["queries"] == {"started": 3, "completed": 3, "failed": 0, "abandoned": 0}
    assert found["debate"]["queries"] == {"started": 3, "completed": 2, "failed": 1, "abandoned": 0}
    assert found["debate"]["errors"] == {"http_5xx": 1} and found["single"]["errors"] == {}
    assert found["debate"]["params"] == {"agents": 2, "rounds": 1}
    assert [arm["baseline"] for arm in found.values()] == [True, False]


def test_resources_of_the_baseline_are_means_over_its_three_queries() -> None:
    expected = {
        "calls": 1, "tool_calls": 0, "input_tokens": 100, "cached_tokens": 128 / 3, "fresh_tokens": 172 / 3,
        "output_tokens": 58 / 3, "reasoning_tokens": None, "latency_s": 2.5, "first_answer_s": 2 / 3, "work_s": 7.25 / 3,
        "critical_path_s": 7.25 / 3, "tool_s": 0, "client_s": 0.25 / 3, "limited_s": 0, "parallelism": 1, "depth": 1, "width": 1,
        "retries": 0,
        "gpu_s": None, "gpu_waste_s": None, "joules": None, "dollars": (132 + 64.4 + 104.4) / 3 * 1e-6,
    }  # fmt: skip
    assert means(arms()["single"]) == pytest.approx(expected)


def test_resources_of_the_debate_are_means_over_its_two_completed_queries() -> None:
    expected = {
        "calls": 3, "tool_calls": 1, "input_tokens": 400, "cached_tokens": 160, "fresh_tokens": 240, "output_tokens": 83,
        "reasoning_tokens": None, "latency_s": 8, "first_answer_s": 5, "work_s": 11.25, "critical_path_s": 8, "tool_s": 0.75,
        "client_s": 0, "limited_s": 0, "parallelism": 11.25 / 8, "depth": 2, "width": 2, "retries": 0,
        "gpu_s": None, "gpu_waste_s": None, "joules": None,
        "dollars": (240 + 16 + 166) * 1e-6,
    }  # fmt: skip
    assert means(arms()["debate"]) == pytest.approx(expected)
    latency = arms()["debate"]["per_query"]["latency_s"]
    assert latency == {"mean": 8.0, "p50": 8.0, "p90": None, "p99": None, "max": 8.0, "n": 2}


def test_load_is_what_ran_between_the_first_due_and_the_last_done() -> None:
    single = arms()["single"]
    assert single["load"] == {
        "offered_qps": 0.5,
        "start_delay_s": {"mean": 0.0, "p50": 0.0, "p90": None, "p99": None, "max": 0.0, "n": 3},
        "held_back": 0,
        "completed_qps": 3 / 6,
        "good_qps": 2 / 6,
        "calls_per_s": 3 / 6,
        "input_tokens_per_s": 300 / 6,
        "output_tokens_per_s": 58 / 6,
        "queries_in_flight": {"mean": 7.5 / 6, "max": 2},
        "calls_in_flight": {"mean": 7.25 / 6, "max": 2},
    }
    assert single["window"]["start_at"] == 0.0 and single["window"]["end_at"] == 6.0
    assert single["window"]["steady"] is None
    debate = arms()["debate"]["load"]
    assert debate["completed_qps"] == pytest.approx(2 / 9)
    assert debate["calls_per_s"] == pytest.approx(8 / 9)  # the failed query's calls were work too
    assert debate["input_tokens_per_s"] == pytest.approx(900 / 9)
    assert debate["queries_in_flight"] == pytest.approx({"mean": 18 / 9, "max": 3})
    # calls: 3 + 4 + 4, 2 + 4 + 4, 1 + 2; at 2.5 two of each query are running
    assert debate["calls_in_flight"] == pytest.approx({"mean": 24 / 9, "max": 6})


def test_a_closed_loop_offers_what_it_started() -> None:
    closed = two_arms.scenario(load={"mode": "closed", "concurrency": 2})
    assert summarise_arms(closed, reduced(two_arms.queries()))["single"]["load"]["offered_qps"] == pytest.approx(3 / 6)


def test_times_of_calls() -> None:
    single, debate = (arms()[name]["per_call"] for name in ("single", "debate"))
    assert single["ttft_s"]["mean"] == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert single["tpot_s"]["mean"] == pytest.approx(0.1) and single["tpot_s"]["n"] == 3
    assert single["latency_s"]["mean"] == pytest.approx(7.25 / 3)
    assert single["itl_s"]["n"] == 30 and single["itl_s"]["p50"] == bucket_gap_s(gap_bucket(0.11))
    assert single["connect_s"] is None  # nothing is told of connections
    # tool calls are none, and the failed query's calls are left out
    assert debate["ttft_s"] == {"mean": 1.0, "p50": 1.0, "p90": None, "p99": None, "max": 1.0, "n": 6}
    assert debate["latency_s"]["mean"] == pytest.approx((3 + 4 + 4 + 2 + 4 + 4) / 6)


# resource: the debate's total over its two completed queries, the failed one's included, against the baseline's mean
RATIOS = {
    "calls": (6 + 2) / 2 / 1,
    "input_tokens": (800 + 100) / 2 / 100,
    "cached_tokens": (320 + 64) / 2 / (128 / 3),
    "fresh_tokens": (480 + 36) / 2 / (172 / 3),
    "output_tokens": (166 + 21) / 2 / (58 / 3),
    "depth": 2.0,  # a failed query has no depth to add
    "width": 2.0,
    "latency_s": 8 / 2.5,
    "first_answer_s": 5 / (2 / 3),
    "work_s": 11.25 / (7.25 / 3),
    "critical_path_s": 8 / (7.25 / 3),
    "parallelism": 11.25 / 8,
    "client_s": 0.0,
}


def test_amplification_is_total_cost_over_completed_queries() -> None:
    found = arms()["debate"]["amplification"]
    assert set(found) == {*COUNTS, *TIMES}
    for name, ratio in RATIOS.items():
        assert found[name]["ratio"] == pytest.approx(ratio), name
    for name in (
        "tool_calls",
        "reasoning_tokens",
        "tool_s",
        "gpu_s",
        "joules",
    ):  # the baseline has none, or it is unknown
        assert found[name] is None


def test_intervals_are_of_counts_alone() -> None:
    found = arms()["debate"]["amplification"]
    for name in TIMES:
        if found[name] is not None:
            assert (found[name]["low"], found[name]["high"]) == (None, None)
            assert found[name]["method"] == "one short run, no interval"
    for name in ("calls", "input_tokens"):  # every pair has the same ratio: no width
        ratio = RATIOS[name]
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((ratio, ratio))
        assert found[name]["method"] == "paired bootstrap over queries"
    # with 83 always, the ratios go from all but one draw of 31, beside a 16, to all of 11, times what was lost
    lost = 187 / 166
    assert found["output_tokens"]["low"] == pytest.approx(83 / ((31 + 31 + 16) / 3) * lost)
    assert found["output_tokens"]["high"] == pytest.approx(83 / 11 * lost)


def test_the_baseline_against_itself_is_one() -> None:
    found = arms()["single"]["amplification"]
    for name in ("calls", "input_tokens", "output_tokens", "dollars", "latency_s"):
        assert found[name]["ratio"] == pytest.approx(1.0)
    assert (found["output_tokens"]["low"], found["output_tokens"]["high"]) == (1.0, 1.0)


def test_an_unknown_resource_is_null_and_its_ratio_too() -> None:
    queries = two_arms.queries()
    queries[4].resources |= {"cached_tokens": None, "fresh_tokens": None}
    found = summarise_arms(two_arms.scenario(), reduced(queries))["debate"]
    assert found["per_query"]["cached_tokens"] is None and found["per_query"]["fresh_tokens"] is None
    assert found["amplification"]["cached_tokens"] is None
    assert found["amplification"]["input_tokens"]["ratio"] == pytest.approx(4.5)


def test_an_unknown_cost_of_the_baseline_leaves_no_ratio() -> None:
    queries = two_arms.queries()
    queries[1].resources |= {"dollars": None}
    found = summarise_arms(two_arms.scenario(), reduced(queries))
    assert found["single"]["per_query"]["dollars"] is None and found["debate"]["per_query"]["dollars"] is not None
    assert found["debate"]["amplification"]["dollars"] is None


def test_expected_is_the_mean_of_the_closed_form() -> None:
    found = arms()
    assert found["debate"]["expected"] == {
        **two_arms.EXPECTED,
        "mismatches": 0,
        "at_most": False,
        "output_at_most": False,
        "approximate": False,
    }
    assert found["single"]["expected"]["output_tokens"] == pytest.approx(58 / 3)
    queries = two_arms.queries()
    queries[4].mismatches = ["calls", "depth"]
    queries[5].expected = two_arms.EXPECTED | {"input_tokens": None}
    other = summarise_arms(two_arms.scenario(), reduced(queries))["debate"]["expected"]
    assert other["mismatches"] == 1  # queries, not resources
    assert other["input_tokens"] is None and other["approximate"] is True and other["calls"] == 3


def test_parts_by_role_round_and_target() -> None:
    debate = arms()["debate"]
    roles = debate["by_role"]
    assert list(roles) == ["agent-1", "agent-2", "judge"]
    assert {name: part["calls"] for name, part in roles.items()} == {"agent-1": 2, "agent-2": 2, "judge": 2}
    assert {name: part["critical_share"] for name, part in roles.items()} == {
        "agent-1": 0,
        "agent-2": 0.5,
        "judge": 0.5,
    }
    judge = roles["judge"]
    assert (judge["input_tokens"], judge["cached_tokens"], judge["output_tokens"]) == (400, 192, 62)
    assert (judge["ttft_s"]["mean"], judge["latency_s"]["mean"]) == (1.0, 4.0)
    assert {k: part["calls"] for k, part in debate["by_round"].items()} == {"1": 4, "2": 2}
    assert debate["by_target"]["t"]["calls"] == 6 and debate["by_target"]["t"]["critical_share"] == 1.0


def test_an_objective_is_over_all_started_queries() -> None:
    found = arms()
    assert found["single"]["objective"] == pytest.approx(
        {"good": 2, "attainment": 2 / 3, "low": 0.2077, "high": 0.9385, "met": True, "per_call": None}, abs=1e-4
    )
    assert found["debate"]["objective"]["attainment"] == 0.0 and found["debate"]["objective"]["met"] is False
    assert found["debate"]["objective"]["high"] == pytest.approx(0.5615, abs=1e-4)


@pytest.mark.parametrize(
    "limits, single, debate",
    [
        ({"ttft_s": 0.6}, 2, 0),  # its third query's first token comes after 1 s, as all of the debate's do
        ({"ttft_s": 1.0}, 3, 2),  # of the debate's a query failed
        ({"tpot_s": 0.1001}, 3, 2),
        ({"tpot_s": 0.0999}, 0, 0),  # one call of several is enough to miss it
        ({"ttft_s": 0.6, "tpot_s": 0.1001}, 2, 0),
    ],
)
def test_a_query_is_good_per_call_when_all_its_calls_are(limits: dict[str, float], single: int, debate: int) -> None:
    scenario = two_arms.scenario(objective={"query_seconds": 2.0, "attainment": 0.6, **limits})
    found = summarise_arms(scenario, reduced(two_arms.queries(), scenario.objective))
    for name, good in (("single", single), ("debate", debate)):
        part = found[name]["objective"]["per_call"]
        assert (part["good"], part["attainment"], part["met"]) == (good, good / 3, good / 3 >= 0.6)
    assert found["single"]["objective"]["good"] == 2


def test_a_tools_own_error_is_counted_though_the_query_went_on() -> None:
    queries = two_arms.queries()
    queries[4].calls[2].tool_error = True
    assert summarise_arms(two_arms.scenario(), reduced(queries))["debate"]["errors"] == {"http_5xx": 1, "tool_error": 1}


def test_what_was_cancelled_is_no_error() -> None:
    queries = two_arms.queries()
    queries[6].calls[0].error = "cancelled"
    assert summarise_arms(two_arms.scenario(), reduced(queries))["debate"]["errors"] == {"http_5xx": 1}


def test_an_arm_that_completed_nothing() -> None:
    queries = [q for q in two_arms.queries() if q.arm == "single" or q.outcome == "failed"]
    found = summarise_arms(two_arms.scenario(), reduced(queries))["debate"]
    assert found["queries"] == {"started": 1, "completed": 0, "failed": 1, "abandoned": 0}
    assert set(found["per_query"].values()) == {None} and set(found["amplification"].values()) == {None}
    assert found["load"]["completed_qps"] == 0.0 and found["expected"]["calls"] is None
    nothing = summarise_arms(two_arms.scenario(), reduced([]))
    assert nothing["single"]["load"] == {} and nothing["single"]["objective"]["attainment"] is None
    json.dumps([found, nothing], allow_nan=False)


VALIDITY: dict[str, tuple[dict[str, Any], str, bool | None, str]] = {
    "all is well": ({}, "counted", True, "5 queries equal their closed form"),
    "a query differs from its closed form": (
        {"mismatches": 2}, "counted", False, "debate: 2 queries differ from the closed form"),
    "no query was completed": ({"completed": 0}, "counted", False, "debate: no query completed"),
    "both": (
        {"mismatches": 1, "completed": 0}, "counted", False,
        "debate: 1 queries differ from the closed form; debate: no query completed"),
    "lengths are approximate": (
        {"approximate": True}, "counted", True, "5 queries equal their closed form, input tokens of debate not compared"),
    "there is no closed form": (
        {"calls": None, "approximate": True}, "counted", None, "debate: no closed form"),
    "the counters differ": (
        {"server": {"reconciled": False, "alone": False, "reason": "prompt_tokens differ"}}, "reconciled", False,
        "prompt_tokens differ"),
    "another client was there": (
        {"server": {"reconciled": False, "alone": False, "reason": "prompt_tokens differ"}}, "alone", False,
        "prompt_tokens differ"),
    "a target without counters": (
        {"server": {"reconciled": None, "alone": None, "reason": "the target exposes no counters"}}, "alone", None,
        "the target exposes no counters"),
    "no window": ({}, "steady", None, "all queries are counted, no window is set"),
    "nothing cached but what was our own": (
        {}, "uncontaminated", True, "the run's own traffic explains every cached token"),
    "a warmed cache": (
        {"unexplained": 96}, "uncontaminated", False, "96 cached tokens that this run's own traffic cannot explain"),
    "a server that tells no cached tokens": (
        {"unexplained": None}, "uncontaminated", None,
        "the server reports no cached tokens"),
    "nothing was answered": (
        {"unexplained": None, "heard": False}, "uncontaminated", None, "no call that counts was answered"),
    "a client that is well": ({}, "client_ok", True, "loop lag and send delays are small"),
    "a strained client is still ok": (
        {"client": {"verdict": "strained", "reasons": ["p99 of loop lag is 6.0 ms"]}}, "client_ok", True,
        "strained: p99 of loop lag is 6.0 ms"),
    "a client that is the limit": (
        {"client": {"verdict": "client-limited", "reasons": ["a", "b"]}}, "client_ok", False,
        "client-limited: a; b"),
}  # fmt: skip


@pytest.mark.parametrize(("given_", "tick", "ok", "reason"), VALIDITY.values(), ids=VALIDITY)
def test_validity(given_: dict[str, Any], tick: str, ok: bool | None, reason: str) -> None:
    arm = {
        "expected": {"calls": 3, "mismatches": 0, "approximate": False}
        | {key: value for key, value in given_.items() if key in ("calls", "mismatches", "approximate")},
        "queries": {"completed": given_.get("completed", 5)},
        "window": {"steady": None, "reason": "all queries are counted, no window is set"},
    }
    server, client = given_.get("server", SERVER), given_.get("client", CLIENT)
    heard = given_.get("heard", True)
    found = validity({"debate": arm}, server, client, given_.get("unexplained", 0), heard=heard)
    assert (found[tick], found["reasons"][tick]) == (ok, reason)
    assert set(found) == {"counted", "reconciled", "alone", "steady", "uncontaminated", "client_ok", "reasons"}


unknown_or = st.none() | st.integers(0, 300)


@st.composite
def runs(draw: st.DrawFn) -> list[Query]:
    """Any mixture of outcomes and unknown counts."""
    queries = []
    for i in range(draw(st.integers(0, 6))):
        arm = draw(st.sampled_from(["single", "debate"]))
        calls = []
        for n in range(1, draw(st.integers(0, 3)) + 1):
            sent = draw(st.none() | st.integers(0, 9))
            read, cached = draw(unknown_or), draw(unknown_or)
            tokens = (read, cached if read is None or cached is None else min(cached, read), draw(unknown_or))
            first = None if sent is None else draw(st.none() | st.just(sent + 0.5))
            calls.append(two_arms.call(n, (sent, first, (sent or 0) + 1.0), tokens, after=range(1, n)))
        outcome = draw(st.sampled_from(["completed", "failed", "abandoned"]))
        expected = {} if outcome == "abandoned" else {name: draw(unknown_or) for name in EXPECTED}
        more = {"outcome": outcome, "expected": expected, "error": draw(st.none() | st.just("timeout: no"))}
        due = draw(st.integers(0, 9))
        queries.append(two_arms.query(arm, i, calls, float(due), due + float(draw(st.integers(0, 9))), **more))
    return queries


@settings(max_examples=40)
@given(runs())
def test_no_run_gives_a_nan_or_a_table_that_cannot_be_printed(queries: list[Query]) -> None:
    found = summarise_arms(two_arms.scenario(), reduced(queries))
    ticks = validity(found, SERVER, CLIENT, None)
    json.dumps([found, ticks], allow_nan=False)
    printed = lines(two_arms.whole(found, ticks))
    assert not any("nan" in line.split() or "None" in line for line in printed)
