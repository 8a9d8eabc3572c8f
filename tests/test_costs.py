"""What a query costs: GPU time told or taken by a profile, and dollars by tokens, by GPU hours and by tool calls."""

from typing import Any

import pytest
from two_arms import call, query, scenario

from fanmark.loadgen.call_record import take
from fanmark.loadgen.cost_part import cost_part, rows
from fanmark.loadgen.costs import dollars, resources
from fanmark.loadgen.lanes.sse import Details, Reply, Usage, Work
from fanmark.loadgen.prices import Prices
from fanmark.loadgen.records import Call
from fanmark.loadgen.reduced import reduced
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


def one(number: int, outcome: str = "completed", **known: Any) -> Any:
    made = asked()
    made.gpu_s = made.joules = None
    for name, value in known.items():
        setattr(made, name, value)
    done = query("single", number, [made], 0.0, 2.0, outcome=outcome, expected={})
    done.resources = resources([made], 0.0, 2.0, {"t": Prices(**TOKENS, **OWN)}, per_tool_call=None)
    return done


def part(queries: list[Any]) -> dict[str, Any]:
    prices = {"url": "http://h/v1", "prices": {**TOKENS, **OWN}}
    given = scenario(target=prices)
    return cost_part(given.baseline, given, reduced(queries, given.objective), good=1)


def test_costs_are_totals_over_completed_queries_and_say_how_they_are_known() -> None:
    told = {"gpu_waste_s": 0.01, "joules": 60.0}
    found = part([one(0, gpu_s=0.1, **told), one(1, gpu_s=0.3, **told), one(2, "failed", gpu_s=0.2, **told)])
    a_second = 4 * 3.0 / 3600
    values = {name: figure["value"] for name, figure in found.items()}
    assert values == pytest.approx({
        "gpu_s": 0.3, "gpu_waste_s": 0.015, "occupancy_s": 3.0, "joules": 90.0, "measured_joules": None, "dollars": 0.3 * a_second,
        "dollars_per_1000_good": 600 * a_second, "break_even_utilisation": 0.6 * a_second / (3 * 84e-6),
    })  # fmt: skip
    kinds = {name: figure["kind"] for name, figure in found.items()}
    assert kinds == {**dict.fromkeys(values, "simulated"), "occupancy_s": "measured", "measured_joules": None}
    assert all(figure["definition"] for figure in found.values())


def test_what_is_taken_by_weights_is_assumed_and_what_is_unknown_stays_so() -> None:
    assumed = part([one(0, gpu_s=0.1), one(1, gpu_s=0.3)])
    assert assumed["gpu_s"]["kind"] == assumed["dollars"]["kind"] == "assumed"
    assert (assumed["joules"]["value"], assumed["joules"]["kind"]) == (None, None)
    unknown = part([one(0, gpu_s=0.1), one(1)])
    assert {name for name, figure in unknown.items() if figure["value"] is not None} == {"occupancy_s"}
    assert rows({"single": {"cost": unknown}}, str) == []
    shown = rows({"single": {"cost": assumed}}, str)
    assert shown[0] == ["", "single", "", ""] and shown[1][:3] == ["GPU time, s", "0.2", "assumed"]
