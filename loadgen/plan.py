"""`fanmark plan`: the least number of replicas that meets the deadline, by looks at fleets in virtual time. Decided in fleet_search.py.

Rules of the file:
1. A look is one window (trial.py) of one arm at so many replicas; each look has a seed of its own, the same for every number of replicas,
   so that fleets are put before the same queries.
2. The guess that a search begins with is the load over what one replica carries: queries so many at a time on one replica of each target,
   as many as still meet the deadline. One at a time says what a query takes where it meets nobody.
3. Of further burstinesses a coarser answer will do.
4. What one more knob would do is told where it matters: at the largest number that fails, else at the answer; seed for seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fanmark.agents.runtime import Topology
from fanmark.loadgen.capacity import CALL, LONGER, QUERY, Found, Look, along, objectives_of, points_of
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.fleet_search import next_look, shared_out
from fanmark.loadgen.lanes.virtual import Service
from fanmark.loadgen.objective import calls_good, in_time
from fanmark.loadgen.plan_table import binding, extra_s
from fanmark.loadgen.planned import MOST_AT_A_TIME, Demand, Knobs, at_a_time, fleet, offered
from fanmark.loadgen.records import Query
from fanmark.loadgen.reduced import Reduced
from fanmark.loadgen.scenario import Arm, Objective, Scenario
from fanmark.loadgen.search import Search, first_look
from fanmark.loadgen.statistics import distribution, occupancy
from fanmark.loadgen.steadiness import over_capacity
from fanmark.loadgen.trial import Trial, try_out

RHO = 0.95  # of what one replica carried in the pilot a fleet is first thought to carry


@dataclass(frozen=True)
class Options:
    """How a plan is searched for. `cell`: replicas of a fleet that are looked at, at most."""

    demand: Demand
    knobs: Knobs
    burstiness: Sequence[float] = (1.0, 2.0)
    seeds: int = 2
    most_replicas: int = 1000
    within: float = 0.05
    most_looks: int = 3
    cell: int = 4
    queries: int = 200  # of a look, at least


@dataclass(frozen=True)
class Seen:
    """A look, and what else is known of it: figures by target, latencies, sums of the calls' times a query."""

    look: Look
    figures: Found


@dataclass
class Planner:
    """Plans one arm. `sums` counts what was simulated."""

    scenario: Scenario
    arm: Arm
    topologies: Mapping[str, Topology]
    services: Mapping[str, Service]
    options: Options
    tell: Callable[[str], None]
    weights: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=lambda: {"queries": 0, "calls": 0, "seconds": 0.0, "looks": 0})
    alone: Found = field(default_factory=dict)

    def plan(self) -> Found:
        """`arms.NAME` of the result, with `plan` in it."""
        guess, found = self.pilot(), dict[str, Found]()
        seen: dict[str, list[Seen]] = {}
        for burstiness in self.options.burstiness:
            name = f"{burstiness:g}"
            knobs = replace(self.options.knobs, burstiness=burstiness)
            search = self.target if not seen else replace(self.target, within=2 * self.options.within, looks=1, most=2)
            seen[name] = self.search(search, knobs, guess)
            found[name] = along(search, [each.look for each in seen[name]], QUERY)
            guess = round(found[name]["knee"]["x"]) if found[name]["knee"] else guess
        first = next(iter(found))
        knobs = replace(self.options.knobs, burstiness=self.options.burstiness[0])
        told = {
            "burstiness": {name: _numbers(each) for name, each in found.items()},
            "alone": self.alone,
            "at": self.at(seen[first], found[first]),
            "missed": self.missed(seen[first], found[first]),
            "what_if": self.what_if(knobs, seen[first], found[first]),
            "simulated": dict(self.sums),
        }
        return {"on": {QUERY: found[first]}, "plan": told}

    # Looks

    def pilot(self) -> int:
        """A first guess of the number of replicas; `alone` and `weights` on the way."""
        services = {name: replace(service, replicas=1) for name, service in self.services.items()}
        assert self.scenario.objective is not None
        at_once, carried = 1, 0.0
        while at_once <= MOST_AT_A_TIME:
            trial = self._trial(at_a_time(self.scenario, self.arm, at_once), services)
            share, latency_s = _share(trial, self.scenario), _mean([q.done_at - q.due_at for q in trial.counted])
            if at_once == 1:
                self.alone = {"attainment": share, **self._figures(trial)}
            elif share < self.scenario.objective.attainment:
                break
            carried = at_once / latency_s if latency_s else carried
            self.weights = self._weights(trial)
            at_once *= 2
        demand, qps = self.options.demand, self.options.demand.planned
        if demand.rate is None:
            qps /= self.alone["latency_s"] + _mean_of(self.scenario.load.think_s)
        return max(1, math.ceil(qps / (RHO * carried)))

    def search(self, search: Search, knobs: Knobs, guess: int) -> list[Seen]:
        """All looks until the least number of replicas is known."""
        seen: list[Seen] = []
        while (ask := next_look(search, guess, points_of([each.look for each in seen], QUERY))) is not None:
            before = [each for each in seen if each.look.x == ask.x]
            seen.append(self.look(int(ask.x), knobs, ask.queries, len(before)))
            look = seen[-1].look
            said = f"{look.good(QUERY)} of {look.queries} in time"
            self.tell(
                f"look     {self.arm.name}, burstiness {knobs.burstiness:g}, {look.x:g} replicas: {said}"
                f"{' (over capacity)' * look.over_capacity}"
            )
        return seen

    @property
    def target(self) -> Search:
        """What is sought."""
        objective, options = self.scenario.objective, self.options
        assert objective is not None
        return Search(
            low=float(len(self.services)),
            high=float(options.most_replicas),
            target=objective.attainment,
            seeks="least",
            integer=True,
            within=options.within,
            first=max(options.queries, first_look(objective.attainment)),
            looks=options.seeds,
            most=max(options.seeds, options.most_looks),
        )

    def look(self, replicas: int, knobs: Knobs, queries: int, number: int) -> Seen:
        """Look number `number` at so many replicas."""
        part = fleet(replicas, self.services, self.weights, knobs, self.options.cell)
        seed, demand = self.scenario.seed + number, self.options.demand
        qps = None if demand.rate is not None else demand.planned / (self.alone["latency_s"] + 1e-9)
        objective = self.scenario.objective
        assert objective is not None
        for times in (1, LONGER):  # what piles up in a short window may be chance: a longer one shows more of it if not
            scenario = offered(self.scenario, self.arm, demand, part.share, knobs, times * queries, seed, qps)
            trial = self._trial(scenario, part.services)
            window = trial.windows[0]
            over = window.given_up or (demand.rate is not None and _over_capacity(trial, objective))
            if not over:
                break
        counted = sorted(trial.counted, key=lambda query: query.due_at)
        met = {QUERY: [in_time(q, objective) for q in counted], CALL: [calls_good(q, objective) for q in counted]}
        calls = occupancy(_spans(trial.queries), window.start_at, window.end_at)["mean"]
        offered_qps = (scenario.load.rate if demand.rate is not None else len(counted) / window.seconds) / part.share
        look = Look(
            x=float(replicas),
            run=f"seed {seed}",
            met={name: met[name] for name in objectives_of(objective)},
            offered_qps=offered_qps,
            calls_in_flight=calls / part.share,
            over_capacity=over,
        )
        return Seen(look, self._figures(trial))

    def _trial(self, scenario: Scenario, services: Mapping[str, Service]) -> Trial:
        trial = try_out(scenario, self.topologies, services)
        self.sums["looks"] += 1
        self.sums["queries"] += len(trial.queries)
        self.sums["calls"] += sum(call.kind == "call" for query in trial.queries for call in query.calls)
        self.sums["seconds"] += max((query.done_at for query in trial.queries), default=0.0)
        if not trial.counted or any(
            query.error is not None and "timeout" not in query.error for query in trial.queries
        ):
            why = next((query.error for query in trial.queries if query.error), "no query ended")
            raise ScenarioError(f"{scenario.source}: arm {self.arm.name!r}: cannot be planned: {why}")
        return trial

    def _figures(self, trial: Trial) -> Found:
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
            "critical_tools_s": _mean([_tools_on_path(query) for query in counted]),
        }

    def _weights(self, trial: Trial) -> dict[str, float]:
        """Requests that a query has in flight at each target."""
        busy = dict.fromkeys(self.services, 0.0)
        for query in trial.counted:
            for call in query.calls:
                if call.kind == "call":
                    busy[call.target or "default"] += call.seconds
        return {name: max(seconds, 1e-9) for name, seconds in busy.items()}

    # What follows

    def at(self, seen: Sequence[Seen], answer: Found) -> Found | None:
        """The figures of the first look at the answer, else at the largest number that was looked at."""
        x = answer["knee"]["x"] if answer["knee"] else max(each.look.x for each in seen)
        return self._told(next(each for each in seen if each.look.x == x))

    def _told(self, one: Seen) -> Found:
        replicas = int(one.look.x)
        return {"replicas": replicas, "by_target": shared_out(replicas, self.weights), **one.figures}

    def missed(self, seen: Sequence[Seen], answer: Found) -> Found | None:
        """The figures of the first look at the largest number that fails; None where none fails."""
        x = answer["bracket"]["low"]
        one = next((each for each in seen if each.look.x == x), None)
        return None if one is None else self._told(one)

    def what_if(self, knobs: Knobs, seen: Sequence[Seen], answer: Found) -> list[Found]:
        """One change each, where the objective is just missed."""
        fails = answer["bracket"]["low"]
        x = int(fails if fails is not None else answer["knee"]["x"] if answer["knee"] else seen[-1].look.x)
        base = next(each for each in seen if each.look.x == x)
        found = []
        for change, changed in changes(knobs, self.services):
            one = self.look(x, changed, self.target.first, 0)
            found.append({"change": change, "replicas": x} | _compared(base, one))
            self.tell(f"what if  {self.arm.name}, {x} replicas, {change}: {found[-1]['attainment']:.1%} in time")
        return found


def changes(knobs: Knobs, services: Mapping[str, Service]) -> list[tuple[str, Knobs]]:
    """What else could be turned, one at a time."""
    from fanmark.servers.replica_of import serving_config

    found: list[tuple[str, Knobs]] = []
    for router in ("least_loaded", "prefix_affinity"):
        if router != knobs.router:
            found.append((f"router {router}", replace(knobs, router=router)))
    more: dict[str, dict[str, Any]] = {"KV blocks +10 %": {}, "max_num_seqs x2": {}}
    for name, service in services.items():
        config = serving_config(service.profile, service.overrides)
        more["KV blocks +10 %"][name] = {"num_blocks": round(1.1 * config.num_blocks)}
        more["max_num_seqs x2"][name] = {"max_num_seqs": 2 * config.max_num_seqs}
    return [*found, *((change, replace(knobs, overrides=each)) for change, each in more.items())]


def _compared(base: Seen, one: Seen) -> Found:
    share = one.look.good(QUERY) / one.look.queries
    before = base.look.good(QUERY) / base.look.queries
    return {
        "attainment": share,
        "before": before,
        "latency_s": one.figures["latency_s"],
        "latency_before_s": base.figures["latency_s"],
    }


def _numbers(answer: Found) -> Found:
    knee, bracket = answer["knee"], answer["bracket"]
    return {
        "replicas": int(knee["x"]) if knee else None,
        "fails_at": None if bracket["low"] is None else int(bracket["low"]),
        "undecided": [int(x) for x in bracket["undecided"]],
        "points": answer["points"],
    }


def _share(trial: Trial, scenario: Scenario) -> float:
    assert scenario.objective is not None
    return _mean([in_time(query, scenario.objective) for query in trial.counted])


def _over_capacity(trial: Trial, objective: Objective) -> bool:
    reduced = Reduced(objective)
    for query in trial.queries:
        reduced.add(query)
    return over_capacity(reduced.queries, trial.windows[0])


def _tools_on_path(query: Query) -> float:
    from fanmark.loadgen.critical import spent_s

    return spent_s(query)["tools"]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _mean_of(length: Any) -> float:
    return float(getattr(length, "mean", length))


def _spans(queries: Sequence[Query]) -> list[tuple[float, float]]:
    return [
        (call.sent_at, call.done_at)
        for query in queries
        for call in query.calls
        if call.kind == "call" and call.sent_at is not None and call.done_at is not None
    ]


def finished(planner: Planner, spare: int, gpu_hour: float | None) -> Found:
    """An arm's plan with what binds it and what it costs."""
    scenario, demand, options = planner.scenario, planner.options.demand, planner.options
    found = planner.plan()
    assert scenario.objective is not None
    plan, at = found["plan"], found["plan"]["at"]
    what, said = binding(plan, objectives_of(scenario.objective)[QUERY])
    plan["binds"] = {"what": what, "said": said, "extra_s": extra_s(plan, plan["missed"] or at)}
    knee = found["on"][QUERY]["knee"]
    plan["replicas"] = int(knee["x"]) if knee else None
    plan["with_spare"] = int(knee["x"]) + spare if knee else None
    plan["cell"] = options.cell if at["replicas"] > options.cell and len(planner.services) == 1 else None
    hour = _per_hour(planner, at["by_target"], spare, gpu_hour) if knee else None
    qps = (
        demand.rate
        if demand.rate is not None
        else at["queries_per_s"] * (at["replicas"] / min(at["replicas"], options.cell))
    )
    per_hour = 3600.0 * qps * (1.0 + demand.growth) if demand.rate is not None else 3600.0 * qps
    plan["cost"] = {
        "per_hour": hour,
        "per_1000_queries": None if hour is None else 1000.0 * hour / per_hour,
        "basis": f"{plan['with_spare']} replicas, of which {spare} to spare; {per_hour:,.0f} queries an hour",
    }
    return found


def _per_hour(planner: Planner, replicas: Mapping[str, int], spare: int, gpu_hour: float | None) -> float | None:
    """Dollars of the fleet; the spare is one of the dearest replicas. None where a price is missing."""
    each: dict[str, float] = {}
    for name, service in planner.services.items():
        target, settings = planner.scenario.targets.get(name), service.profile.settings
        prices = target.prices if target is not None else None
        if prices is not None and prices.replica_s is not None:
            each[name] = 3600.0 * prices.replica_s
        elif gpu_hour is not None:
            each[name] = gpu_hour * settings.tensor_parallel * settings.data_parallel
        else:
            return None
    return sum(each[name] * replicas[name] for name in each) + spare * max(each.values())
