"""Which faults strike which request, and when."""

import re

import pytest

from fanmark.servers.faults import SPARED, Doom, Fault, FaultError, FaultPlan, fault_from, parse_fault

TEXTS = [
    ("429:rate=0.1,retry_after_s=2", Fault("429", rate=0.1, retry_after_s=2)),
    ("stall : tokens=3, seconds=0.5", Fault("stall", tokens=3, seconds=0.5)),
    ("engine-death:after_s=1,until_s=2", Fault("engine-death", after_s=1, until_s=2)),
    ("no-done", Fault("no-done")),
]


@pytest.mark.parametrize(("text", "fault"), TEXTS)
def test_a_fault_reads_from_text(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault
    assert fault_from(fault.describe()) == fault


WRONG = [
    ("flood", "unknown fault 'flood'; there is: 429, 429-bare"),
    ("429:rate=2", "fault 429: rate = 2 must lie between 0 and 1"),
    ("429:often=2", "a fault has a kind and rate, after_s"),
    ("429:rate", "fault '429:rate': 'rate' is not key=value"),
    ("429:rate=much", "fault 429: rate = 'much' is not a number"),
    ("stall:after_s=3,until_s=2", "fault stall: 0 <= after_s < until_s must hold, got 3 and 2"),
    ("slow-down:rate=0.5", "fault slow-down takes no rate"),
    ("slow-down:factor=0", "factor > 0"),
]


@pytest.mark.parametrize(("text", "why"), WRONG)
def test_an_impossible_fault_says_why(text: str, why: str) -> None:
    with pytest.raises(FaultError, match=re.escape(why)):
        parse_fault(text)


def test_a_rate_strikes_its_share_and_the_same_requests_each_time() -> None:
    first, again = (FaultPlan([Fault("500", rate=0.2)], seed=3) for _ in range(2))
    struck = [n for n in range(2000) if first.doom(n, 0).status == 500]
    assert 330 < len(struck) < 470
    assert struck == [n for n in range(2000) if again.doom(n, 0).status == 500]
    assert first.struck == [len(struck)]


def test_a_window_bounds_a_fault() -> None:
    plan = FaultPlan([Fault("503", after_s=10, until_s=20)])
    assert [plan.doom(1, at).status for at in (9.9, 10, 19.9, 20)] == [0, 503, 503, 0]
    assert plan.doom(1, 0) is SPARED


def test_several_faults_add_up_but_a_refused_request_meets_no_more() -> None:
    plan = FaultPlan([Fault("slow-admission", seconds=2), Fault("stall", tokens=4), Fault("429"), Fault("no-usage")])
    assert plan.doom(0, 0) == Doom(status=429, retry_after_s=1, admission_s=2, stall_after=4, stall_s=1)
    assert plan.struck == [1, 1, 1, 0]


def test_faults_of_the_engine_go_by_their_window() -> None:
    plan = FaultPlan([Fault("engine-death", after_s=5, until_s=8), Fault("slow-down", factor=3, after_s=2)])
    assert [plan.engine_dead(at) for at in (4.9, 5, 8)] == [False, True, False]
    assert [plan.slow_down(at) for at in (1, 2)] == [1, 3]
    assert [plan.next_turn(at) for at in (0, 2, 5, 8)] == [2, 5, 8, None]
    assert plan.doom(0, 6) is SPARED
