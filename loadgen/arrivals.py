"""When queries start: pure pacing, in seconds since the schedule's start.

A process gives arrivals at the unit rate, as ages: 1.0 is where one query is due on average. A rate, or stages of rates, turns an age
into a time: that at which the integral of the rate reaches it. So every process can be had at every course of the rate.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, takewhile

import msgspec

from fanmark.loadgen.recording import recording_of
from fanmark.loadgen.scenario import Arm, Load, Scenario, Stage


def constant(phase: float = 0.0) -> Iterator[float]:
    """Equal steps, the first at `phase` (0 <= phase < 1)."""
    return (i + phase for i in count())


def poisson(rng: random.Random) -> Iterator[float]:
    """Independent exponential gaps, before the first arrival too."""
    return _summed(lambda: rng.expovariate(1.0))


def gamma(rng: random.Random, gap_cv: float) -> Iterator[float]:
    """Independent gamma gaps with this coefficient of variation: above 1 arrivals come in bursts, at 1 they are Poisson's."""
    shape = 1.0 / gap_cv**2
    return _summed(lambda: rng.gammavariate(shape, 1.0 / shape))


def _summed(gap: Callable[[], float]) -> Iterator[float]:
    at = 0.0
    while True:
        at += gap()
        yield at


def staged(ages: Iterator[float], stages: Sequence[Stage]) -> Iterator[float]:
    """Times of the ages, stage after stage; ends with the last stage. Within one of T seconds from rate a to b, age grows by
    a t + (b - a) t^2 / (2 T)."""
    age = next(ages)
    start_at = passed = 0.0
    for stage in stages:
        first, last = stage.rate, stage.rate if stage.to is None else stage.to
        total = (first + last) / 2 * stage.seconds
        while age - passed < total:
            yield start_at + _into(age - passed, first, (last - first) / stage.seconds)
            age = next(ages)
        start_at, passed = start_at + stage.seconds, passed + total


def _into(age: float, rate: float, slope: float) -> float:
    """The t at which rate t + slope t^2 / 2 = age, in the form that does not cancel."""
    return 2 * age / (rate + math.sqrt(max(0.0, rate * rate + 2 * slope * age))) if age else 0.0


def open_loop(load: Load, seed: int, arm: str, place: float) -> Iterator[float]:
    """The start times of one arm's queries: `load.queries` of them, or those before `load.duration`. Each arm draws its own; `place`
    in [0, 1) keeps the constant arrivals of several arms apart."""
    if load.process == "replay":
        return iter(load.arrivals if isinstance(load.arrivals, list) else [])
    rng = random.Random(f"{seed}/arrivals/{arm}")
    processes: dict[str, Callable[[], Iterator[float]]] = {
        "constant": lambda: constant(place),
        "poisson": lambda: poisson(rng),
        "gamma": lambda: gamma(rng, load.gap_cv),
    }
    ages = processes[load.process]()
    times = staged(ages, load.stages) if load.stages else (age / load.rate for age in ages)
    if load.queries is not None:
        return islice(times, load.queries)
    end_at = math.inf if load.duration is None else load.duration
    return takewhile(lambda at: at < end_at, times)


def of_arm(scenario: Scenario, arm: Arm, repeat: int, phase: str = "window") -> Iterator[float]:
    """When an arm's queries start in an open loop's repeat, since the phase began; before and after the window without end. Those of the
    window are the same however long the lead-in was."""
    load, place = scenario.load_of(arm), 0.0
    if load.process == "replay" and load.arrivals is None:
        return _recorded(scenario, arm, load)
    if load.arms == "interleaved":
        place = scenario.arms.index(arm) / len(scenario.arms)
    stream = arm.name + of_repeat(repeat)
    if phase != "window":
        load, stream = msgspec.structs.replace(load, duration=None, queries=None), f"{stream}/{phase}"
    return open_loop(load, scenario.seed, stream, place)


def _recorded(scenario: Scenario, arm: Arm, load: Load) -> Iterator[float]:
    """The start times of what the arm re-enacts, or, if it does not, of what the first arm does that does; lap after lap."""
    found = [recording for each in (arm, *scenario.arms) if (recording := recording_of(each)) is not None]
    lap_s = found[0].lap_s
    times = (lap * lap_s + at for lap in count() for at in found[0].starts_s())
    return islice((at / load.speed for at in times), load.queries)


def of_repeat(repeat: int) -> str:
    """What tells a repeat's random streams from the first one's."""
    return f"/{repeat}" if repeat > 1 else ""


def counted_numbers(scenario: Scenario) -> dict[str, list[int] | None]:
    """By arm, the numbers of its counted queries, repeat after repeat: none comes twice, and a repeat's first is the same in all arms. None
    where the server decides how many there will be."""
    found: dict[str, list[int] | None] = {arm.name: [] for arm in scenario.arms}
    first: int | None = 0
    for repeat in range(1, scenario.load.repeats + 1):
        counts: list[int | None] = []
        for arm in scenario.arms:
            load, listed = scenario.load_of(arm), found[arm.name]
            open_n = (
                None if load.match == "calls" and not arm.baseline else sum(1 for _ in of_arm(scenario, arm, repeat))
            )
            n = open_n if load.mode == "open" else load.queries
            counts.append(n)
            found[arm.name] = (
                None if first is None or n is None or listed is None else [*listed, *range(first, first + n)]
            )
        known = [n for n in counts if n is not None]
        first = first + max(known) if first is not None and len(known) == len(counts) else None
    return found
