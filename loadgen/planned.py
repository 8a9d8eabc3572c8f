"""What is planned: the demand, and the fleets that it is put before. Pure.

A large fleet is looked at by a cell of it: so many of its replicas with their share of the load, behind the same router. A router has less
to choose from in a cell, and fewer queries even each other out, so that a cell errs towards more replicas.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fanmark.loadgen.fleet_search import shared_out
from fanmark.loadgen.lanes.virtual import Service
from fanmark.loadgen.scenario import Arm, Load, Scenario
from fanmark.servers.engine.routing import Policy

LEAST_DEADLINES = 4.0  # a window is so many deadlines long at least
PILOT_QUERIES, MOST_AT_A_TIME = 20, 512


@dataclass(frozen=True)
class Demand:
    """Queries per second, or users with a pause of `think_s` between queries; as planned for, after growth and at the peak."""

    rate: float | None
    users: int | None
    peak: float = 1.0
    growth: float = 0.0

    @property
    def factor(self) -> float:
        return self.peak * (1.0 + self.growth)

    @property
    def planned(self) -> float:
        """Queries per second, or users."""
        return (self.rate if self.rate is not None else float(self.users or 0)) * self.factor


@dataclass(frozen=True)
class Knobs:
    """What of a fleet is not its size. `overrides` of the engines' settings, by target."""

    router: Policy = "round_robin"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    burstiness: float = 1.0  # variance of the arrivals over their mean; 1: Poisson


@dataclass(frozen=True)
class Fleet:
    """What one look is at: what stands at each target, and the share of the whole that it is."""

    services: dict[str, Service]
    share: float


def fleet(replicas: int, base: Mapping[str, Service], weights: Mapping[str, float], knobs: Knobs, cell: int) -> Fleet:
    """So many replicas in all, or a cell of them where there is one target."""
    parts = shared_out(replicas, weights)
    looked_at = min(replicas, cell) if len(parts) == 1 else sum(parts.values())
    if len(parts) == 1:
        parts = dict.fromkeys(parts, looked_at)
    services = {
        name: Service(
            service.profile, parts[name], knobs.router, {**service.overrides, **knobs.overrides.get(name, {})}
        )
        for name, service in base.items()
    }
    return Fleet(services, looked_at / max(replicas, looked_at))


def offered(
    scenario: Scenario, arm: Arm, demand: Demand, share: float, knobs: Knobs, queries: int, seed: int, qps: float | None
) -> Scenario:
    """One arm with this share of the demand, in a window long enough for so many queries. `qps`: what a closed loop was seen to ask."""
    assert scenario.objective is not None
    deadline_s, load = scenario.objective.query_seconds, scenario.load_of(arm)
    seconds = LEAST_DEADLINES * deadline_s
    if demand.rate is not None:
        rate = demand.planned * share
        seconds = max(seconds, queries / rate)
        bursts: dict[str, Any] = {"process": "poisson"}
        if knobs.burstiness != 1.0:
            bursts = {"process": "gamma", "gap_cv": math.sqrt(knobs.burstiness)}
        load = Load(rate=rate, duration=seconds, warmup=_filled(rate * deadline_s), **bursts)
    else:
        users = max(1, math.ceil(demand.planned * share - 1e-9))
        if qps:
            seconds = max(seconds, queries / (qps * share))
        load = msgspec.structs.replace(
            load, mode="closed", users=users, concurrency=users, queries=None, duration=seconds, warmup=_filled(users),
        )  # fmt: skip
    return _alone(scenario, arm, load, seed)


def _filled(in_flight: float) -> int:
    """So many queries must have ended before a window begins: about as many as may be in flight."""
    return max(10, min(2000, math.ceil(in_flight)))


def at_a_time(scenario: Scenario, arm: Arm, queries: int) -> Scenario:
    """A few queries of the arm, so many at a time: the pilot's load. One at a time meets nobody."""
    n = PILOT_QUERIES if queries == 1 else max(PILOT_QUERIES, 4 * queries)
    load = Load(mode="closed", concurrency=queries, queries=n, warmup=1 if queries == 1 else 0)
    return _alone(scenario, arm, load, scenario.seed)


def _alone(scenario: Scenario, arm: Arm, load: Load, seed: int) -> Scenario:
    load = msgspec.structs.replace(load, query_timeout_s=scenario.load.query_timeout_s)
    own = msgspec.structs.replace(arm, rate=None, concurrency=None, queries=None, warmup=None, baseline=True)
    return msgspec.structs.replace(
        scenario, arms=[own], load=load, seed=seed, threshold=[], budget=None, targets=_unlimited(scenario)
    )


def _unlimited(scenario: Scenario) -> dict[str, Any]:
    return {name: msgspec.structs.replace(t, limits=None, retries=0) for name, t in scenario.targets.items()}
