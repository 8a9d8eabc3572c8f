"""What a query of an arm costs: `cost` of summary.json. Each figure says what it is and how it is known. Pure.

Rules of the file:
1. Costs are totals, of failed queries and retries too, over completed queries. What is not known is None.
2. `kind` is "measured", "simulated" (the engine model's account, or all of it in virtual time) or "assumed" (a profile's weights applied
   to a real server's counts).
3. Time on the GPU is never the time that calls took: that is `occupancy_s`, which counts it once for each that shared it.
4. Slack and idle time are nobody's: they stand beside the servers (`engine_slack_s`), and in no figure here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fanmark.loadgen.operating_point import spans
from fanmark.loadgen.prices import Prices
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import Reduced
from fanmark.loadgen.samples import Sample
from fanmark.loadgen.scenario import Arm, Scenario

DEFINITIONS = {
    "gpu_s": "its share of each step's time, slack and idle time left out",
    "gpu_waste_s": "of that, computed again after a preemption",
    "occupancy_s": "the times of its calls added up: not GPU time",
    "joules": "its share of each step's energy",
    "measured_joules": "energy of its servers while it ran alone, idle draw included",
    "dollars": "tokens at their price, or GPU time at gpu_hour; and tool calls",
    "dollars_per_1000_good": "dollars of all its queries for 1,000 within the objective",
    "break_even_utilisation": "use from which own GPUs cost less than the API asks",
}
TITLES = {
    "gpu_s": "GPU time, s",
    "gpu_waste_s": "  of it waste",
    "occupancy_s": "occupancy, s",
    "joules": "energy, J",
    "measured_joules": "at the meter, J",
    "dollars": "dollars",
    "dollars_per_1000_good": "for 1,000 good",
    "break_even_utilisation": "break-even use",
}


def cost_part(
    arm: Arm,
    scenario: Scenario,
    counted: Reduced,
    good: int,
    windows: Sequence[Window] = (),
    samples: Sequence[Sample] = (),
) -> dict[str, Any]:
    """`cost` of an arm, of its counted queries. `good`: how many met the objective."""
    queries = counted.queries
    completed = len(queries.where(lambda kind: kind.outcome == "completed"))
    sums = {name: _sum(counted, name) for name in ("gpu_s", "gpu_waste_s", "joules", "dollars", "work_s", "tool_s")}
    totals: dict[str, float | None] = {name: sums[name] for name in ("gpu_s", "gpu_waste_s", "joules", "dollars")}
    work_s, tool_s = sums["work_s"], sums["tool_s"]
    totals["occupancy_s"] = work_s - tool_s if work_s is not None and tool_s is not None else None
    means = {name: total / completed if total is not None and completed else None for name, total in totals.items()}
    bill = sums["dollars"]
    means["dollars_per_1000_good"] = 1000 * bill / good if bill is not None and good else None
    means["break_even_utilisation"] = _break_even(_prices(arm, scenario), counted, totals["gpu_s"])
    alone = len(scenario.arms) == 1 or scenario.load.arms == "apart"
    targets = [
        name for name in scenario.targets or ("default",) if name in (*arm.targets.values(), arm.target or "default")
    ]
    means["measured_joules"] = measured_joules(samples, spans(queries, windows), targets, completed) if alone else None
    by_gpu = "simulated" if sums["gpu_waste_s"] is not None else "assumed"
    own = any(price is not None and price.gpu_hour is not None for price in scenario.prices.values())
    kinds = dict.fromkeys(("gpu_s", "gpu_waste_s", "joules", "break_even_utilisation"), by_gpu)
    kinds["measured_joules"] = (
        "simulated" if sums["gpu_waste_s"] is not None else "measured"
    )  # the stub's meter is a model
    kinds |= dict.fromkeys(("dollars", "dollars_per_1000_good"), by_gpu if own else "measured")
    return {
        name: {
            "value": means[name],
            "kind": None if means[name] is None else kinds.get(name, "measured"),
            "definition": definition,
        }
        for name, definition in DEFINITIONS.items()
    }


def measured_joules(
    samples: Sequence[Sample], times: Sequence[tuple[float, float]], targets: Sequence[str], completed: int
) -> float | None:
    """Energy of the servers over the time in which an arm was counted and alone, over its completed queries; idle draw is in it. None where
    a target's is not told all the while."""
    whole = 0.0
    for start_at, end_at in times:
        for target in targets:
            told = [
                (sample.at, server.joules)
                for sample in samples
                if (server := sample.targets.get(target)) is not None and server.joules is not None
            ]
            inside = [each for each in told if start_at - 1.5 <= each[0] <= end_at + 1.5]
            if len(inside) < 3:
                return None
            (first_at, first), (last_at, last) = inside[0], inside[-1]
            whole += (last - first) * (end_at - start_at) / (last_at - first_at)
    return whole / completed if times and completed else None


def capacity_figure(found: Mapping[str, float | None] | None, replicas: int, clock: str) -> dict[str, Any] | None:
    """Capacity seconds of a query from the best load that a sweep saw within the objective (`capacity` of sweep.json), carried by so many
    replicas together; None where there is none."""
    if found is None or not found["qps"]:
        return None
    return {
        "value": replicas / found["qps"],
        "low": replicas / found["high"] if found["high"] else None,
        "high": replicas / found["low"] if found["low"] else None,
        "kind": "simulated" if clock == "virtual" else "measured",
        "definition": "seconds of a replica for a good query, as full as the objective allows and with nobody else on it",
    }


def all_simulated(arms: Mapping[str, Any]) -> None:
    """In virtual time nothing is measured."""
    for arm in arms.values():
        for figure in arm["cost"].values():
            figure["kind"] = "simulated" if figure["kind"] == "measured" else figure["kind"]


def _sum(counted: Reduced, name: str) -> float | None:
    """Over all counted queries; None where one that completed does not know it."""
    completed = counted.queries.where(lambda kind: kind.outcome == "completed")
    return None if completed.unknown(name) else sum(counted.queries.known(name))


def _prices(arm: Arm, scenario: Scenario) -> Prices | None:
    """The prices of an arm's one target."""
    return None if arm.targets else scenario.prices.get(arm.target or "default")


def _break_even(prices: Prices | None, counted: Reduced, gpu_s: float | None) -> float | None:
    """Where GPUs and tokens both have a price."""
    if prices is None or prices.replica_s is None or gpu_s is None:
        return None
    read, cached, written = (_sum(counted, f"{name}_tokens") for name in ("input", "cached", "output"))
    if read is None or written is None:
        return None
    asked = prices.of_tokens(read, cached or 0.0, written)
    return gpu_s * prices.replica_s / asked if asked else None


def rows(arms: Mapping[str, Any], number: Callable[[float | None], str]) -> list[list[str]]:
    """The costs that are known of any arm, how they are known and what they are, below a row of titles; nothing where only occupancy is."""
    found = []
    for name, definition in DEFINITIONS.items():
        mine = [told["cost"][name] for told in arms.values() if "cost" in told]
        if any(figure["value"] is not None for figure in mine):
            kinds = dict.fromkeys(figure["kind"] for figure in mine if figure["kind"] is not None)
            found.append([TITLES[name], *(number(figure["value"]) for figure in mine), ", ".join(kinds), definition])
    only = [row for row in found if row[0] != TITLES["occupancy_s"]]
    return [["", *(name for name, told in arms.items() if "cost" in told), "", ""], *found] if only else []
