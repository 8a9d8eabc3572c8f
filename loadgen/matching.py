"""What arms are matched by: queries, calls in flight (pilot.py), or a fraction of each arm's own capacity, which a sweep has found."""

from pathlib import Path

import msgspec

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.mistakes import show
from fanmark.loadgen.scenario import Load, Scenario

_SWEEP = "sweep.json"


class Capacity(msgspec.Struct, frozen=True):
    """Best good queries/s of an arm, and its bounds; None: beyond the range that was swept."""

    qps: float
    low: float | None
    high: float | None


class _On(msgspec.Struct):
    capacity: Capacity | None


class _Arm(msgspec.Struct):
    on: dict[str, _On]


class _Sweep(msgspec.Struct):
    arms: dict[str, _Arm]
    clock: str


def swept(path: Path, where: str) -> tuple[dict[str, Capacity], str]:
    """What a sweep found that each arm carries on the query's deadline, and by which clock. Raises ScenarioError."""
    path = path / _SWEEP if path.is_dir() else path
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Sweep)
    except (OSError, msgspec.DecodeError) as e:
        raise ScenarioError(f"{where}: no sweep can be read there ({e}): give the folder of a fanmark sweep") from None
    known = {
        name: capacity
        for name, arm in found.arms.items()
        if "query" in arm.on and (capacity := arm.on["query"].capacity) is not None
    }
    return known, found.clock


def with_capacity(load: Load, source: str) -> Load:
    """The load with its capacities, queries/s by arm, read from the sweep that found them. Raises ScenarioError."""
    if not isinstance(load.capacity, str):
        return load
    found, _ = swept(Path(source).parent / load.capacity, f"{source}: [load] capacity = {show(load.capacity)}")
    known = {name: capacity.qps for name, capacity in found.items()}
    return msgspec.structs.replace(load, capacity=known)


def _check_capacity(scenario: Scenario, source: str) -> None:
    load, where = scenario.load, f'{source}: [load] match = "capacity"'
    if load.mode == "closed" or load.process == "replay" or load.stages:
        raise ScenarioError(f"{where} sets the rates of an open loop: not of a closed one, a replay or stages")
    if not isinstance(load.capacity, dict):
        raise ScenarioError(f"{where}: give capacity as the folder of a fanmark sweep, or as queries/s of each arm")
    for arm in scenario.arms:
        if arm.name not in load.capacity:
            known = f"only of {', '.join(load.capacity)}" if load.capacity else "of none"
            raise ScenarioError(f"{where}: the capacity of {arm.name!r} is not known, {known}: sweep it, or give it")
        if arm.rate is not None:
            raise ScenarioError(
                f'{source}: arm {arm.name!r}: rate = {arm.rate:g} with [load] match = "capacity", which sets it: leave it out'
            )


def check_match(scenario: Scenario, source: str) -> None:
    """What sets rates needs an open loop with rates, and nothing else that sets them. Raises ScenarioError."""
    load = scenario.load
    if load.match == "capacity":
        _check_capacity(scenario, source)
    if load.match != "calls":
        return
    if load.mode == "closed" or load.process == "replay" or load.stages or load.duration is None:
        raise ScenarioError(
            f'{source}: [load] match = "calls" sets the rates of an open loop by a pilot: give rate and duration '
            "(not concurrency, queries, stages or a replay)"
        )
    for arm in scenario.arms:
        if arm.queries is not None or (arm.rate is not None and not arm.baseline):
            key = "queries" if arm.queries is not None else "rate"
            raise ScenarioError(
                f'{source}: arm {arm.name!r}: {key} = {getattr(arm, key):g} with [load] match = "calls": the pilot sets the rate '
                "of all arms but the baseline, for one duration: leave it out"
            )
