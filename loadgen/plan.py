"""`fanmark plan`: the least number of replicas that meets the deadline, by looks at fleets in virtual time. Decided in fleet_search.py.

Rules of the file:
1. What is simulated is asked for (fleet_look.py) and may be done anywhere (shared_out.py); what follows from it is decided here, in one
   order.
2. The guess that a search begins with is the load over what one replica carries: queries so many at a time on one replica of each target,
   as many as still meet the deadline. One at a time says what a query takes where it meets nobody.
3. Of further burstinesses a coarser answer will do.
4. What one more knob would do is told where it matters: at the largest number that fails, else at the answer; seed for seed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from fanmark.agents.runtime import Topology
from fanmark.loadgen.capacity import QUERY, Found, along, objectives_of, points_of
from fanmark.loadgen.fleet_look import Asked, Case, Piloted, Seen, looked, piloted
from fanmark.loadgen.fleet_search import next_look, shared_out
from fanmark.loadgen.lanes.virtual import Service
from fanmark.loadgen.plan_table import binding, extra_s
from fanmark.loadgen.planned import MOST_AT_A_TIME, Demand, Knobs
from fanmark.loadgen.scenario import Arm, Scenario
from fanmark.loadgen.search import Ask, Search, first_look, may_follow
from fanmark.loadgen.shared_out import Search as Steps
from fanmark.loadgen.shared_out import Task, Want

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


@dataclass
class Planner:
    """Plans one arm. `topologies` None: they are found where a look is. `sums` counts what was simulated."""

    scenario: Scenario
    arm: Arm
    topologies: Mapping[str, Topology] | None
    services: Mapping[str, Service]
    options: Options
    tell: Callable[[str], None]
    weights: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=lambda: {"queries": 0, "calls": 0, "seconds": 0.0, "looks": 0})
    alone: Found = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.case = Case(
            self.scenario, self.arm, self.services, self.options.demand, self.options.cell, self.topologies
        )

    def plan(self) -> Steps[Found]:
        """`arms.NAME` of the result, with `plan` in it."""
        guess = yield from self.pilot()
        found, seen = dict[str, Found](), dict[str, list[Seen]]()
        what_if: list[tuple[str, Task]] = []
        for burstiness in self.options.burstiness:
            name = f"{burstiness:g}"
            knobs = replace(self.options.knobs, burstiness=burstiness)
            search = self.target if not seen else replace(self.target, within=2 * self.options.within, looks=1, most=2)
            seen[name] = yield from self.search(search, knobs, guess, [task for _, task in what_if])
            found[name] = along(search, [each.look for each in seen[name]], QUERY)
            guess = round(found[name]["knee"]["x"]) if found[name]["knee"] else guess
            what_if = what_if or self.what_if(knobs, seen[name], found[name])
        first = next(iter(found))
        told = {
            "burstiness": {name: _numbers(each) for name, each in found.items()},
            "alone": self.alone,
            "at": self.at(seen[first], found[first]),
            "missed": self.missed(seen[first], found[first]),
            "what_if": (yield from self.compared(what_if, seen[first])),
            "simulated": dict(self.sums),
        }
        return {"on": {QUERY: found[first]}, "plan": told}

    # Looks

    def pilot(self) -> Steps[int]:
        """A first guess of the number of replicas; `alone` and `weights` on the way."""
        at_once, carried = 1, 0.0
        while at_once <= MOST_AT_A_TIME:
            more = [n for n in (2 * at_once, 4 * at_once) if n <= MOST_AT_A_TIME]
            found: Piloted = yield Want(self._pilot(at_once), [self._pilot(n) for n in more])
            self._count(found.sums)
            latency_s = found.figures["latency_s"]
            if at_once == 1:
                self.alone = {"attainment": found.attainment, **found.figures}
            elif found.attainment < self.case.objective.attainment:
                break
            carried = at_once / latency_s if latency_s else carried
            self.weights = found.weights
            at_once *= 2
        demand, qps = self.options.demand, self.options.demand.planned
        if demand.rate is None:
            qps /= self.alone["latency_s"] + _mean_of(self.scenario.load.think_s)
        return max(1, math.ceil(qps / (RHO * carried)))

    def search(self, search: Search, knobs: Knobs, guess: int, later: Sequence[Task]) -> Steps[list[Seen]]:
        """All looks until the least number of replicas is known. `later`: what is needed after that in any case."""
        seen: list[Seen] = []
        while (ask := next_look(search, guess, points_of([each.look for each in seen], QUERY))) is not None:
            number = sum(each.look.x == ask.x for each in seen)
            likely = chain(later, self._likely(search, knobs, guess, seen, ask))
            found: Seen = yield Want(self._look(int(ask.x), knobs, ask.queries, number), likely)
            self._count(found.sums)
            seen.append(found)
            look = found.look
            said = f"{look.good(QUERY)} of {look.queries} in time"
            self.tell(
                f"look     {self.arm.name}, burstiness {knobs.burstiness:g}, {look.x:g} replicas: {said}"
                f"{' (over capacity)' * look.over_capacity}"
            )
        return seen

    def _likely(self, search: Search, knobs: Knobs, guess: int, seen: Sequence[Seen], ask: Ask) -> Iterator[Task]:
        points = points_of([each.look for each in seen], QUERY)
        for then, number in may_follow(lambda after: next_look(search, guess, after), points, ask, search.target):
            yield self._look(int(then.x), knobs, then.queries, number)

    @property
    def target(self) -> Search:
        """What is sought."""
        objective, options = self.case.objective, self.options
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

    def _pilot(self, at_once: int) -> Task:
        return Task(piloted, (self.case, at_once))

    def _look(self, replicas: int, knobs: Knobs, queries: int, number: int) -> Task:
        return Task(looked, Asked(self.case, replicas, knobs, queries, number, self.weights, self.alone["latency_s"]))

    def _count(self, sums: Mapping[str, float]) -> None:
        for name, value in sums.items():
            self.sums[name] += value

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

    def what_if(self, knobs: Knobs, seen: Sequence[Seen], answer: Found) -> list[tuple[str, Task]]:
        """One change each, where the objective is just missed."""
        fails = answer["bracket"]["low"]
        x = int(fails if fails is not None else answer["knee"]["x"] if answer["knee"] else seen[-1].look.x)
        return [
            (change, self._look(x, changed, self.target.first, 0)) for change, changed in changes(knobs, self.services)
        ]

    def compared(self, what_if: Sequence[tuple[str, Task]], seen: Sequence[Seen]) -> Steps[list[Found]]:
        """What each change made of it."""
        found = []
        for i, (change, task) in enumerate(what_if):
            one: Seen = yield Want(task, [later for _, later in what_if[i + 1 :]])
            self._count(one.sums)
            x = int(one.look.x)
            base = next(each for each in seen if each.look.x == x)
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


def _mean_of(length: Any) -> float:
    return float(getattr(length, "mean", length))


def finished(planner: Planner, spare: int, gpu_hour: float | None) -> Steps[Found]:
    """An arm's plan with what binds it and what it costs."""
    scenario, demand, options = planner.scenario, planner.options.demand, planner.options
    found = yield from planner.plan()
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
