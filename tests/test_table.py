"""What a run prints at its end: figures, ratios, columns, and the whole of a run made by hand."""

import pytest
import two_arms

from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.summary import summarise_arms, validity
from fanmark.loadgen.table import columns, lines, number, ratio


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),  # unknown
        (0, "0"),
        (9.0, "9"),  # whole numbers stay whole
        (12345.0, "12,345"),
        (1234567.0, "1,234,567"),
        (12345.6, "12,346"),
        (123.45, "123.5"),
        (99.994, "99.99"),
        (1.005, "1.00"),
        (0.12345, "0.1235"),
        (0.00012, "0.0001200"),
        (0.000100267, "0.0001003"),
        (-3.25, "-3.25"),
    ],
)
def test_numbers_have_three_or_four_figures(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "-"),  # no ratio: the baseline has none of it, or it is unknown
        ({"ratio": 9.0, "low": 9.0, "high": 9.0}, "9.00x [9.00, 9.00]"),
        ({"ratio": 2.346, "low": 2.1, "high": 2.555}, "2.35x [2.10, 2.56]"),
        ({"ratio": 0.5, "low": None, "high": None}, "0.50x"),  # no interval
    ],
)
def test_ratios_show_their_interval(found: dict[str, float] | None, text: str) -> None:
    assert ratio(found) == text


def test_columns_are_as_wide_as_they_need() -> None:
    assert columns([["", "a", "bb"], ["row", "100", "2"], ["x", "", ""]]) == ["       a  bb", "row  100   2", "x"]


def test_the_whole_of_a_run_made_by_hand() -> None:
    arms = summarise_arms(two_arms.scenario(), reduced(two_arms.queries()))
    server = {"reconciled": None, "alone": None, "reason": "1 calls ended without the server's count"}
    ticks = validity(arms, server, {"verdict": "client-limited", "reasons": ["p99 of loop lag is 40.0 ms"]}, 0)
    assert lines(two_arms.whole(arms, ticks)) == EXPECTED.strip("\n").split("\n")


def test_several_targets_of_an_arm_stand_apart() -> None:
    """Two queries of two agents (3 and 4 s, 2 and 4 s) on one, and a judge (4 s) on another, who is half of the critical path."""
    queries = two_arms.queries()
    for query in queries:
        for call in query.calls:
            call.target = "big" if call.role == "judge" else call.target
    arms = summarise_arms(two_arms.scenario(), reduced(queries))
    ticks = validity(arms, {"reconciled": None, "alone": None, "reason": ""}, {"verdict": "ok", "reasons": []}, 0)
    told = lines(two_arms.whole(arms, ticks))
    assert told[told.index("by target") :][1:4] == [
        "per query    calls  input  cached  output  TTFT p50, s  latency p50, s  of critical paths",
        "debate: big      1    200      96      31            1               4              50.0%",
        "debate: t        2    200      64      52            1            3.50              50.0%",
    ]


EXPECTED = """
   FAILED  client ok       client-limited: p99 of loop lag is 40.0 ms
not known  reconciled      1 calls ended without the server's count
not known  alone           1 calls ended without the server's count
not known  steady          all queries are counted, no window is set
       ok  counted         5 queries equal their closed form
       ok  uncontaminated  the run's own traffic explains every cached token

per query, and against 'single' (95 % interval where there is one)
                       single     debate
calls                       1          3  4.00x [4.00, 4.00]
tool calls                  0          1                   -
input tokens              100        400  4.50x [4.50, 4.50]
  cached                42.67        160  4.50x [2.70, 7.80]
  fresh                 57.33        240  4.50x [3.27, 5.70]
output tokens           19.33         83  4.84x [3.60, 8.50]
latency, s               2.50          8               3.20x
first of answer, s     0.6667          5               7.50x
work, s                  2.42      11.25               4.66x
critical path, s         2.42          8               3.31x
dollars             0.0001003  0.0004220  4.63x [4.00, 6.22]
queries/s              0.5000     0.2222
calls in flight          1.21       2.67
latency: prefill        23.3%      25.0%
latency: decode         73.3%      75.0%
latency: client          3.3%       0.0%
times: one short run, no interval (load.repeats = 5 gives one, or interleaved arms for load.duration = 160)

expected (closed form) against measured, per query
        calls  tool calls  input tokens  output tokens  depth  width  queries  differ
single  1 / 1       0 / 0     100 / 100  19.33 / 19.33  1 / 1  1 / 1        3       0
debate  3 / 3       1 / 1     400 / 400        83 / 83  2 / 2  2 / 2        2       0

cost per query
                   single     debate
occupancy, s         2.42         12  measured  the times of its calls added up: not GPU time
dollars         0.0001003  0.0004642  measured  tokens at their price, or GPU time at gpu_hour; and tool calls
for 1,000 good     0.1504          -  measured  dollars of all its queries for 1,000 within the objective

client   ok: loop lag p50 0.5 ms, p99 3.0 ms, send delay p50 0.5 ms, max 4.0 ms, coalesced 12.5%, CPU 1.2 s, memory 80 MB
         connections: 2 new, 1,234 reused
server   prompt_tokens 1,200 = 1,200
single   objective met: 66.7% in time
debate   1 failed, 0 abandoned of 3: http_5xx 1
         1 x http_5xx: HTTP 500: no
         more than 1 % did not complete: latencies are censored
debate   objective missed: 0.0% in time
note     what must be told
"""


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        # several targets: a line for each
        (
            {
                "big": {
                    "reconciled": True,
                    "reason": "",
                    "prompt_tokens": {"client": 5, "server": 5.0, "off_pct": 0.0},
                },
                "small": {"reconciled": None, "reason": "the target exposes no counters"},
            },
            ["big      prompt_tokens 5 = 5", "small    the target exposes no counters"],
        ),
        # a counter that differs, and one that the client was not told of, which is left out
        (
            {
                "reconciled": False,
                "reason": "prompt_tokens differ",
                "prompt_tokens": {"client": 1200, "server": 1300.0, "off_pct": 8.3},
                "prompt_tokens_cached": {"client": None, "server": 64.0, "off_pct": None},
            },
            ["server   prompt_tokens 1,200 != 1,300"],
        ),
        (
            {
                "reconciled": False,
                "alone": True,
                "reason": "request_success_length differ",
                "request_success_stop": {"client": 5, "server": 5.0, "off_pct": 0.0},
                "request_success_length": {"client": 7, "server": 6.0, "off_pct": -14.3},
                "request_success_abort": {"client": None, "server": 2.0, "off_pct": None},
                "preemptions": {"client": None, "server": 3.0, "off_pct": None},
                "kv_written_tokens": 600.0,
                "kv_capacity_tokens": 1200.0,
                "kv_turnover": 0.5,
            },
            [
                "server   request_success_length 7 != 6, preemptions 3, request_success_abort 2",
                "         KV written 600 of 1,200 tokens (0.50x): the hit rate is an upper bound",
            ],
        ),
    ],
)
def test_the_servers_counters_stand_beside_the_clients(server: dict[str, object], expected: list[str]) -> None:
    arms = summarise_arms(two_arms.scenario(), reduced(two_arms.queries()))
    ticks = validity(arms, {"reconciled": True, "alone": True}, {"verdict": "ok", "reasons": []}, 0)
    printed = lines(two_arms.whole(arms, ticks, server=server))
    start = printed.index(expected[0])
    assert printed[start : start + len(expected)] == expected


def test_what_failed_is_said_first_and_what_is_unknown_before_what_holds() -> None:
    arms = summarise_arms(two_arms.scenario(), reduced(two_arms.queries()))
    server = {"reconciled": False, "alone": True, "reason": "prompt_tokens differ"}
    ticks = validity(arms, server, {"verdict": "ok", "reasons": []}, None)
    printed = lines(two_arms.whole(arms, ticks))[:6]
    assert [line.split()[0] for line in printed] == ["FAILED", "not", "not", "ok", "ok", "ok"]
    assert printed[0] == "   FAILED  reconciled      prompt_tokens differ"
    assert printed[1] == "not known  steady          all queries are counted, no window is set"


def test_a_row_that_no_arm_knows_is_left_out() -> None:
    queries = [q for q in two_arms.queries() if q.outcome == "completed"]
    for one in queries:
        one.resources |= {"dollars": None}
    arms = summarise_arms(two_arms.scenario(), reduced(queries))
    ticks = validity(arms, {"reconciled": True, "alone": True}, {"verdict": "ok", "reasons": []}, 0)
    printed = lines(two_arms.whole(arms, ticks))
    assert not any(line.startswith("dollars") for line in printed)
    assert not any("failed" in line for line in printed)
