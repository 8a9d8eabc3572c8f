"""What a query takes of a replica that is as full as the objective allows: capacity seconds, in virtual time.

An arm has a replica to itself, in a closed loop: N of its queries at a time, the next as soon as one ends. With N the replica fills up,
queries/s rise, and latency rises. The N that counts is the one with the most good queries/s of those at which the objective is met;
with or without one, N rises no further where requests wait for room, or twice as many bring hardly more.

    capacity_s = seconds of the replica / good queries, both between two ends of queries when N are always under way

Rules of the file:
1. Its parts are the engine's own account (servers/engine/attribution.py) over the same time: fresh prefill, decode, the reading of the KV
   cache for it, what preemptions wasted; and `idle_s`, in which no step ran. They sum to capacity_s. There is no slack in it: the batch is
   what the objective allows, and a step's time is all its requests'.
2. A ratio of two arms' capacity seconds splits into the arm's parts over the baseline's capacity_s: parts that sum to the ratio.
3. Nothing is written; the same scenario and seed give the same figures.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean, stdev
from typing import Any

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.objective import calls_good, in_time
from fanmark.loadgen.records import Begun, Call, Query, Window
from fanmark.loadgen.run import Run
from fanmark.loadgen.scenario import Arm, Load, Objective, Scenario
from fanmark.loadgen.simulate import services_of, stand_in
from fanmark.loadgen.statistics import student_t
from fanmark.loadgen.tally import Tally
from fanmark.servers.engine.attribution import Account, Accounting
from fanmark.servers.engine.events import ReplicaStatistics

MOST_AT_ONCE = 4096
SEEDS = 5
LEAST_QUERIES = 40  # that are measured; and at least three times as many as are under way
GROWS = 1.1  # twice as many queries at a time that bring fewer more than that bring no more
NEAR = 1.1  # so near is the N that meets the objective to one that does not


@dataclass(frozen=True)
class Filled:
    """A replica with `at_once` queries of one arm always under way, a query: seconds, joules, and the share that met the objective."""

    arm: str
    profile: str
    at_once: int
    queries: int
    attainment: float
    replica_s: float  # of one replica, per query
    busy_s: float
    account: Account
    joules: float | None
    calls_in_flight: float
    tpot_s: float | None
    latency_s: float
    full: bool  # requests wait for room at the end, or were preempted
    input_tokens: float
    cached_tokens: float
    output_tokens: float
    tool_calls: float

    @property
    def met_qps(self) -> float:
        """Good queries/s of a replica."""
        return self.attainment / self.replica_s

    @property
    def capacity_s(self) -> float | None:
        """Seconds of a replica per good query; None where none is good."""
        return self.replica_s / self.attainment if self.attainment else None

    @property
    def is_busy(self) -> bool:
        """Whether a step ran all the time, but for rounding."""
        return self.busy_s > self.replica_s * (1 - 1e-9)

    def parts(self) -> dict[str, float]:
        """What capacity_s consists of."""
        mine = self.account
        # Steps that are scheduled ahead lie a little beyond the ends: no more than there is
        share = (self.replica_s / self.busy_s if self.is_busy else 1.0) / self.attainment if self.attainment else 0.0
        return {
            "decode_s": mine.output_s * share,
            "prefill_s": mine.prefill_s * share,
            "kv_read_s": mine.context_s * share,
            "waste_s": mine.waste_s * share,
            "idle_s": (self.replica_s - self.busy_s) / self.attainment if self.attainment and not self.is_busy else 0.0,
        }

    def told(self) -> dict[str, Any]:
        """As a part of JSON."""
        found = asdict(self)
        del found["account"]
        return found | {"capacity_s": self.capacity_s, "good_qps": self.met_qps, "parts": self.parts()}


def capacity(
    scenario: Scenario, topologies: Mapping[str, Topology], arm: str, *, at_once: int | None = None
) -> Filled | None:
    """The arm at its capacity on the scenario's objective (see the head of the file), or with `at_once` queries at a time. The profile is
    the scenario's (simulate.with_profile puts another in). None: even one query at a time does not meet the objective."""
    if at_once is not None:
        return filled(scenario, topologies, arm, at_once)
    objective, looks = scenario.objective, dict[int, Filled]()

    def passes(n: int) -> bool:
        looks[n] = filled(scenario, topologies, arm, n)
        return objective is None or looks[n].attainment >= objective.attainment

    low, high = 0, None
    n = 1
    while n <= MOST_AT_ONCE:
        if not passes(n):
            high = n
            break
        before, low = low, n
        if looks[n].full or (before and looks[n].met_qps < GROWS * looks[before].met_qps):
            break
        n *= 2
    while high is not None and low and not looks[low].full and high > max(low + 1, NEAR * low):
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    met = [look for look in looks.values() if objective is None or look.attainment >= objective.attainment]
    return max(met, key=lambda look: look.met_qps, default=None)


def filled(scenario: Scenario, topologies: Mapping[str, Topology], arm: str, at_once: int) -> Filled:
    """A replica with so many queries of the arm at a time."""
    measured = max(LEAST_QUERIES, 3 * at_once)
    own = next(each for each in scenario.arms if each.name == arm)
    own = msgspec.structs.replace(own, rate=None, concurrency=None, queries=None, warmup=None, baseline=True)
    load = Load(mode="closed", concurrency=at_once, queries=measured + 4 * at_once, warmup=0)
    alone = msgspec.structs.replace(
        scenario, arms=[own], load=load, threshold=[], budget=None, record=False,
        targets={name: msgspec.structs.replace(t, limits=None, retries=0, urls=[], url=None) for name, t in scenario.targets.items()},
        stub=msgspec.structs.replace(scenario.stub, replicas=1),
    )  # fmt: skip
    return run_virtually(_filled(alone, topologies, at_once, measured))


async def _filled(scenario: Scenario, topologies: Mapping[str, Topology], at_once: int, measured: int) -> Filled:
    full = Accounting(slack=False)
    services = {name: replace(service, accounting=full) for name, service in services_of(scenario).items()}
    endpoints, tools = await stand_in(scenario, topologies, services)
    arm, now = scenario.arms[0], asyncio.get_running_loop().time
    lanes = {name: endpoint.lane for name, endpoint in endpoints.items()}
    ends: list[tuple[float, dict[str, ReplicaStatistics]]] = []
    queries: list[Query] = []

    class Ends:
        """Looks at the engines when the first query that counts begins to be waited for, and when the last has ended."""

        def begin(self, query: Begun) -> None: ...

        def window(self, window: Window) -> None: ...

        def write(self, query: Query) -> None:
            queries.append(query)
            if len(queries) in (at_once, at_once + measured):
                ends.append((now(), {name: lane.replica.statistics() for name, lane in lanes.items()}))
            if len(ends) == 2:
                run.stop.at_once()

    run = Run(
        scenario, topologies, endpoints, tools, Tally({arm.name: arm.topology}, arm.name), Ends(), "capacity", now
    )
    await run.execute()
    (start_at, before), (end_at, after) = ends
    mine = queries[at_once : at_once + measured]
    calls = [call for query in mine for call in query.calls if call.kind == "call" and call.done_at is not None]
    used = [name for name in lanes if any(call.target == name for call in calls)]  # another arm's target costs nothing
    pairs = [(after[name], before[name]) for name in used]
    account = Account()
    for one, other in pairs:
        account += (one.account or Account()) - (other.account or Account())
    known = all(services[name].profile.energy_known for name in used)
    n = len(mine)
    return Filled(
        arm=arm.name,
        profile=", ".join(dict.fromkeys(services[name].profile.name for name in used)),
        at_once=at_once,
        queries=n,
        attainment=sum(_met(query, scenario.objective) for query in mine) / n,
        replica_s=(end_at - start_at) * len(used) / n,
        busy_s=sum(one.busy_s - other.busy_s for one, other in pairs) / n,
        account=Account(*(getattr(account, f.name) / n for f in fields(Account))),
        joules=sum(one.joules - other.joules for one, other in pairs) / n if known else None,
        calls_in_flight=sum(call.seconds for call in calls) / (end_at - start_at),
        tpot_s=_tpot_s(calls),
        latency_s=sum(query.done_at - query.due_at for query in mine) / n,
        full=any(engine.waiting for one in after.values() for engine in one.engines)
        or _preemptions(after.values()) > _preemptions(before.values()),
        input_tokens=sum(call.input_tokens or 0 for call in calls) / n,
        cached_tokens=sum(call.cached_tokens or 0 for call in calls) / n,
        output_tokens=sum(call.output_tokens or 0 for call in calls) / n,
        tool_calls=sum(query.resources["tool_calls"] or 0 for query in mine) / n,
    )


def _preemptions(replicas: Iterable[ReplicaStatistics]) -> int:
    return sum(engine.num_preemptions for one in replicas for engine in one.engines)


def _tpot_s(calls: Sequence[Call]) -> float | None:
    """The mean time of a token after the first."""
    spent_s, tokens = 0.0, 0
    for call in calls:
        if call.first_at is not None and call.done_at is not None and call.output_tokens:
            spent_s, tokens = spent_s + call.done_at - call.first_at, tokens + call.output_tokens - 1
    return spent_s / tokens if tokens else None


def _met(query: Query, objective: Objective | None) -> bool:
    if objective is None:
        return query.outcome == "completed"
    of_calls = objective.ttft_s is not None or objective.tpot_s is not None
    return in_time(query, objective) and (not of_calls or calls_good(query, objective))


def waterfall(arm: Filled, base: Filled) -> dict[str, Any] | None:
    """The ratio of two arms' capacity seconds, and its parts, which sum to it; and the same parts less the baseline's own, which sum to
    ratio - 1. None where one of them has no capacity."""
    if arm.capacity_s is None or base.capacity_s is None:
        return None
    own, other = arm.parts(), base.parts()
    return {
        "ratio": arm.capacity_s / base.capacity_s,
        "parts": {name: own[name] / base.capacity_s for name in own},
        "added": {name: (own[name] - other[name]) / base.capacity_s for name in own},
    }


def marginal(scenario: Scenario, topologies: Mapping[str, Topology], arm: str, seeds: int = SEEDS) -> dict[str, Any]:
    """Busy seconds that replicas would not have had without the arm's queries, for each of them: the scenario as it is, all its arms at
    once, against the same without the arm. Chance moves steps together and apart, so that it is a mean over seeds, with its 95 % interval;
    of a small arm beside large ones that may reach below 0."""
    others = [each for each in scenario.arms if each.name != arm]
    values = []
    for seed in range(scenario.seed, scenario.seed + seeds):
        with_s, queries = run_virtually(_busy(_at_once(scenario, scenario.arms, seed), topologies, arm))
        without_s = run_virtually(_busy(_at_once(scenario, others, seed), topologies, arm))[0] if others else 0.0
        values.append((with_s - without_s) / queries)
    half_s = student_t(seeds - 1) * stdev(values) / math.sqrt(seeds) if seeds > 1 else math.inf
    mean_s = fmean(values)
    known = math.isfinite(half_s)
    return {
        "value": mean_s,
        "low": mean_s - half_s if known else None,
        "high": mean_s + half_s if known else None,
        "seeds": seeds,
    }


def _at_once(scenario: Scenario, arms: Sequence[Arm], seed: int) -> Scenario:
    kept = [msgspec.structs.replace(each, baseline=i == 0) for i, each in enumerate(arms)]
    load = msgspec.structs.replace(scenario.load, arms="interleaved", repeats=1)
    return msgspec.structs.replace(scenario, arms=kept, load=load, seed=seed, threshold=[], budget=None, record=False)


async def _busy(scenario: Scenario, topologies: Mapping[str, Topology], arm: str) -> tuple[float, int]:
    """Busy seconds of all replicas in a whole run, and how many queries of the arm there were."""
    endpoints, tools = await stand_in(scenario, topologies, services_of(scenario))
    seen = 0

    class Count:
        def begin(self, query: Begun) -> None:
            nonlocal seen
            seen += query.arm == arm

        def window(self, window: Window) -> None: ...

        def write(self, query: Query) -> None: ...

    tally = Tally({each.name: each.topology for each in scenario.arms}, scenario.baseline.name)
    now = asyncio.get_running_loop().time
    await Run(scenario, topologies, endpoints, tools, tally, Count(), "marginal", now).execute()
    return sum(endpoint.lane.replica.statistics().busy_s for endpoint in endpoints.values()), seen
