"""What a query costs: GPU time told or taken by a profile, and dollars by tokens, by GPU hours and by tool calls."""

from typing import Any

import pytest
from two_arms import call

from fanmark.loadgen.call_record import take
from fanmark.loadgen.costs import dollars, resources
from fanmark.loadgen.lanes.sse import Details, Reply, Usage, Work
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Prices
from fanmark.servers.engine.attribution import Weights

WEIGHTS = Weights(128, 2e-5, 0.0, 2e-4, 3e-8)
TOKENS = {"input": 1.0, "cached_input": 0.1, "output": 2.0}
OWN = {"gpu_hour": 3.0, "gpus": 4}


def reply(usage: Usage) -> Reply:
    return Reply("", None, 1.0, 1.0, 2.0, usage, "length", {}, 0)


def asked(**more: Any) -> Call:
    return call(1, (0.0, 1.0, 2.0), (100, 40, 10), **more)


def test_gpu_time_is_as_told_else_by_the_profiles_weights_else_unknown() -> None:
    counts = Usage(100, 10, Details(cached_tokens=40))
    told, taken, unknown = (asked() for _ in range(3))
    uncounted = call(1, (0.0, 1.0, 2.0), (100, None, 10))
    take(told, reply(Usage(100, 10, fanmark=Work(0.5, 0.1, 30.0))), WEIGHTS)
    assert (told.gpu_s, told.gpu_waste_s, told.joules) == (0.5, 0.1, 30.0)
    take(taken, reply(counts), WEIGHTS)
    assert taken.gpu_s == pytest.approx(60 * 2e-5 + 9 * 2e-4 + 3e-8 * sum(range(101, 110)))
    assert (taken.gpu_waste_s, taken.joules) == (None, None)
    take(unknown, reply(counts))
    assert unknown.gpu_s is None
    take(uncounted, reply(Usage(100, 10)), WEIGHTS)  # cached tokens are not told
    assert uncounted.gpu_s is None


def test_several_samples_share_their_prompt() -> None:
    both = asked(samples=2)
    take(both, reply(Usage(100, 20, Details(cached_tokens=0))), WEIGHTS)
    assert both.gpu_s == pytest.approx(100 * 2e-5 + 2 * (9 * 2e-4 + 3e-8 * sum(range(101, 110))))


BILLS = {
    "by tokens": ({"t": Prices(**TOKENS)}, None, (60 + 4 + 20) * 1e-6),
    "a cached token costs as any other where it has no price": (
        {"t": Prices(input=1.0, output=2.0)}, None, (100 + 20) * 1e-6,
    ),
    "by GPU time": ({"t": Prices(**OWN)}, None, 0.5 * 4 * 3.0 / 3600),
    "with both one pays for the GPUs": ({"t": Prices(**TOKENS, **OWN)}, None, 0.5 * 4 * 3.0 / 3600),
    "and for tool calls": ({"t": Prices(**OWN)}, 0.01, 0.5 * 4 * 3.0 / 3600 + 0.03),
    "nobody asked": ({"t": None}, None, None),
    "tools alone say nothing of calls": ({"t": None}, 0.01, None),
    "no prices at all for this target": ({"u": Prices(**TOKENS)}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BILLS)
def test_a_bill(case: str) -> None:
    prices, per_tool_call, bill = BILLS[case]
    made = asked()
    made.gpu_s = 0.5
    assert dollars([made], prices, 3, per_tool_call) == (None if bill is None else pytest.approx(bill))


def test_gpu_time_that_is_not_known_has_no_price() -> None:
    assert dollars([asked()], {"t": Prices(**OWN)}) is None
    found = resources([asked()], 0.0, 2.0, {"t": Prices(**OWN)})
    assert (found["gpu_s"], found["joules"], found["dollars"]) == (None, None, None)
