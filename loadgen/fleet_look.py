"""One look at a fleet in virtual time, and the pilot's before it: what needs nothing but its arguments, and can be done anywhere.

Rules of the file:
1. A look is one window (trial.py) of one arm at so many replicas; each look has a seed of its own, the same for every number of replicas,
   so that fleets are put before the same queries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fanmark.agents import topologies
from fanmark.agents.runtime import Topology
from fanmark.loadgen.capacity import CALL, LONGER, QUERY, Found, Look, objectives_of
from fanmark.loadgen.critical import spent_s
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lanes.virtual import Service
from fanmark.loadgen.objective import calls_good, in_time
from fanmark.loadgen.planned import Demand, Knobs, at_a_time, fleet, offered
from fanmark.loadgen.records import Query
from fanmark.loadgen.reduced import Reduced
from fanmark.loadgen.scenario import Arm, Objective, Scenario
from fanmark.loadgen.statistics import distribution, occupancy
from fanmark.loadgen.steadiness import over_capacity
from fanmark.loadgen.trial import Trial, try_out
from fanmark.loadgen.user_topology import table_of


@dataclass(frozen=True)
class Case:
    """What all looks of a plan have in common. `topologies` None: found anew where the look is, for they cannot be sent."""

    scenario: Scenario
    arm: Arm
    services: Mapping[str, Service]
    demand: Demand
    cell: int
    topologies: Mapping[str, Topology] | None = None

    @property
    def objective(self) -> Objective:
        assert self.scenario.objective is not None
        return self.scenario.objective


@dataclass(frozen=True)
class Asked:
    """Look number `number` at so many replicas. `weights`: requests that a query has in flight at each target; `alone_s`: what a query
    takes that meets nobody."""

    case: Case
    replicas: int
    knobs: Knobs
    queries: int
    number: int
    weights: Mapping[str, float]
    alone_s: float


@dataclass(frozen=True)
class Seen:
    """A look, and what else is known of it: figures by target, latencies, sums of the calls' times a query. `sums`: what was simulated."""

    look: Look
    figures: Found
    sums: Mapping[str, float]


@dataclass(frozen=True)
class Piloted:
    """Queries so many at a time on one replica of each target: their share in time, figures, and requests in flight by target."""

    attainment: float
    figures: Found
    weights: dict[str, float]
    sums: Mapping[str, float]


def piloted(asked: tuple[Case, int]) -> Piloted:
    """Raises ScenarioError where the arm cannot be planned."""
    case, at_once = asked
    services = {name: replace(service, replicas=1) for name, service in case.services.items()}
    trial = _trial(case, at_a_time(case.scenario, case.arm, at_once), services)
    share = _mean([in_time(query, case.objective) for query in trial.counted])
    return Piloted(share, _figures(trial), _weights(trial, services), _sums([trial]))


def looked(asked: Asked) -> Seen:
    """Raises ScenarioError where the arm cannot be planned."""
    case, knobs, demand = asked.case, asked.knobs, asked.case.demand
    part = fleet(asked.replicas, case.services, asked.weights, knobs, case.cell)
    seed, trials = case.scenario.seed + asked.number, list[Trial]()
    qps = None if demand.rate is not None else demand.planned / (asked.alone_s + 1e-9)
    for times in (1, LONGER):  # what piles up in a short window may be chance: a longer one shows more of it if not
        scenario = offered(case.scenario, case.arm, demand, part.share, knobs, times * asked.queries, seed, qps)
        trials.append(trial := _trial(case, scenario, part.services))
        window = trial.windows[0]
        over = window.given_up or (demand.rate is not None and _over_capacity(trial, case.objective))
        if not over:
            break
    counted = sorted(trial.counted, key=lambda query: query.due_at)
    met = {QUERY: [in_time(q, case.objective) for q in counted], CALL: [calls_good(q, case.objective) for q in counted]}
    calls = occupancy(_spans(trial.queries), window.start_at, window.end_at)["mean"]
    offered_qps = (scenario.load.rate if demand.rate is not None else len(counted) / window.seconds) / part.share
    look = Look(
        x=float(asked.replicas),
        run=f"seed {seed}",
        met={name: met[name] for name in objectives_of(case.objective)},
        offered_qps=offered_qps,
        calls_in_flight=calls / part.share,
        over_capacity=over,
    )
    return Seen(look, _figures(trial), _sums(trials))


def _trial(case: Case, scenario: Scenario, services: Mapping[str, Service]) -> Trial:
    table = case.topologies if case.topologies is not None else table_of(scenario, topologies())
    trial = try_out(scenario, table, services)
    if not trial.counted or any(query.error is not None and "timeout" not in query.error for query in trial.queries):
        why = next((query.error for query in trial.queries if query.error), "no query ended")
        raise ScenarioError(f"{scenario.source}: arm {case.arm.name!r}: cannot be planned: {' '.join(why.split())}")
    return trial


def _sums(trials: Sequence[Trial]) -> dict[str, float]:
    """What was simulated, in numbers."""
    calls = (call.kind == "call" for trial in trials for query in trial.queries for call in query.calls)
    return {
        "queries": sum(len(trial.queries) for trial in trials),
        "calls": sum(calls),
        "seconds": math.fsum(max((query.done_at for query in trial.queries), default=0.0) for trial in trials),
        "looks": len(trials),
    }


def _figures(trial: Trial) -> Found:
    """Latency of the counted queries, the time that a query's calls took in sum, by part, and what the engines did."""
    counted = trial.counted
    latencies_s = [query.done_at - query.due_at for query in counted]
    told = distribution(latencies_s) or {}
    calls = [call for query in counted for call in query.calls if call.first_at is not None and call.done_at]
    first_s = math.fsum((call.first_at or 0.0) - (call.sent_at or 0.0) for call in calls)
    rest_s = math.fsum((call.done_at or 0.0) - (call.first_at or 0.0) for call in calls)
    return {
        "latency_s": _mean(latencies_s),
        "latency_p90_s": told.get("p90"),
        "latency_max_s": max(latencies_s, default=None),
        "to_first_token_s": first_s / len(counted),
        "decode_s": rest_s / len(counted),
        "tools_s": math.fsum(query.resources["tool_s"] or 0.0 for query in counted) / len(counted),
        "queries_per_s": len(counted) / trial.seconds,
        "targets": {name: use.told(trial.seconds) for name, use in trial.accounts.items()},
        "critical_tools_s": _mean([spent_s(query)["tools"] for query in counted]),
    }


def _weights(trial: Trial, services: Mapping[str, Service]) -> dict[str, float]:
    """Requests that a query has in flight at each target."""
    busy = dict.fromkeys(services, 0.0)
    for query in trial.counted:
        for call in query.calls:
            if call.kind == "call":
                busy[call.target or "default"] += call.seconds
    return {name: max(seconds, 1e-9) for name, seconds in busy.items()}


def _over_capacity(trial: Trial, objective: Objective) -> bool:
    reduced = Reduced(objective)
    for query in trial.queries:
        reduced.add(query)
    return over_capacity(reduced.queries, trial.windows[0])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _spans(queries: Sequence[Query]) -> list[tuple[float, float]]:
    return [
        (call.sent_at, call.done_at)
        for query in queries
        for call in query.calls
        if call.kind == "call" and call.sent_at is not None and call.done_at is not None
    ]
