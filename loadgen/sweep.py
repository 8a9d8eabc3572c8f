"""A sweep: run after run along an axis, each a full run's folder, until what is sought is found. What is next is decided by others.

Rules of the file:
1. Along a load each arm runs by itself, in a window that is at least 5 deadlines long (or as long as `load.duration` says). Along any other
   key the scenario runs as it is, once at each value.
2. A look is a run of its own in OUT/points. What is there is read and not run again; what was cut short there is put aside first. Looks at
   one point have seeds of their own. sweep.json is written after each run, so that nothing is lost.
3. A budget is of the whole sweep: each run gets what all those in the folder have left.
4. Runs in virtual time may be made elsewhere (shared_out.py), and their files are left in OUT/points when they are needed: what was done
   ahead for nothing leaves none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from fanmark.loadgen import crossing
from fanmark.loadgen.capacity import LONGER, SCHEMA, Found, Look, arms_part, looks_of, objectives_of, points_of
from fanmark.loadgen.cost_part import capacity_figure
from fanmark.loadgen.crossing import Wanted
from fanmark.loadgen.ranges import CONCURRENCY, Axis
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario import Arm, Budget, Scenario
from fanmark.loadgen.search import Ask, Point, Search, first_look, may_follow, next_ask
from fanmark.loadgen.shared_out import Search as Steps
from fanmark.loadgen.shared_out import Task, Want, Workers, carried_out
from fanmark.loadgen.simulated import leave
from fanmark.loadgen.sweep_folder import NAME, POINTS, degraded, done, put_aside, spent, write_json
from fanmark.loadgen.table import number

LEAST_DEADLINES = 5.0

# a run, to be left in a folder; gives its summary, and what files it has not left there
Measure = Callable[[Scenario, Path], Task]


@dataclass
class Sweep:
    """What is swept, where, and what was found so far. `at` gives the scenario with another value of the axis' key. `about` goes into
    sweep.json. A search ends where its ends are `within` of each other, and looks at a point `most` times at most."""

    scenario: Scenario
    axis: Axis
    out: Path
    measure: Measure
    at: Callable[[Any], Scenario]
    about: Mapping[str, Any]
    tell: Callable[[str], None]
    most: int = 4
    within: float = 0.05
    wanted: Wanted | None = None  # of --find
    looks: dict[str, list[Look]] = field(default_factory=dict)
    along: list[Found] = field(default_factory=list)
    ended: Mapping[str, str] | None = None
    notes: dict[str, None] = field(default_factory=dict)
    wrong: bool = False  # a run's counts differ

    @property
    def seeks(self) -> bool:
        """Whether the highest load is sought."""
        return self.axis.of_load and self.wanted is None

    def run(self, workers: Workers | None = None) -> None:
        """All of it, or what there was until it ended."""
        self.looks = {arm.name: [] for arm in self.scenario.arms}
        self.write(partial=True)
        if self.seeks:
            searches = [(arm, search) for arm in self.scenario.arms for search in self._searches()]
            carried_out([self._over_load(arm, search) for arm, search in searches], workers)
        else:
            while self.ended is None and (values := self._next_values()):
                carried_out([self._at_value(value) for value in values], workers)

    def _over_load(self, arm: Arm, search: Search) -> Steps[None]:
        """An arm by itself, to where it no longer meets its objectives."""
        for objective in self._objectives():
            while self.ended is None and (ask := next_ask(search, self._points(arm, search, objective))) is not None:
                yield from self._look(arm, ask, self._likely(arm, search, objective, ask))

    def _at_value(self, value: Any) -> Steps[None]:
        """The whole scenario at a value."""
        if self.ended is not None:
            return
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        x = float(value) if numeric else float((self.axis.values or ()).index(value))
        name = f"{self.axis.key}={value}".replace("/", "_")
        summary = yield from self._run(name, self.at(value))
        if summary is None:
            return
        self.along.append({"x": x, "value": value, "run": f"{POINTS}/{name}", "summary": summary})
        self.tell(f"point    {self.axis.key} = {value}")
        if self.scenario.objective is not None:
            queries = read_queries(self.out / POINTS / name)
            for arm, look in looks_of(summary, queries, self.scenario.objective, x, f"{POINTS}/{name}").items():
                self.looks[arm].append(look)
        self.write(partial=True)

    def _next_values(self) -> Sequence[Any]:
        """Those that are looked at in any case, in whatever order."""
        if self.wanted is not None:
            points = [crossing.read(self.wanted, each["x"], each["summary"]) for each in self.along]
            return crossing.next_values(self.wanted, self.axis, points, self.within)
        seen = [each["value"] for each in self.along]
        return [value for value in self.axis.values or () if value not in seen]

    def _replicas(self, arm: str) -> int:
        """Of the servers that an arm's calls go to."""
        if not self.scenario.targets:
            return self.scenario.stub.replicas
        own = next(each for each in self.scenario.arms if each.name == arm)
        names = set(own.targets.values()) | ({own.target or "default"} if "default" not in own.targets else set())
        return sum(len(self.scenario.targets[name].replicas) for name in names if name in self.scenario.targets)

    def _objectives(self) -> dict[str, Found]:
        return objectives_of(self.scenario.objective) if self.scenario.objective is not None else {}

    def _search(self) -> Search:
        target = self.scenario.objective.attainment if self.scenario.objective is not None else 0.5
        first = first_look(target) if target < 1 else 1
        low, high = self.axis.low, self.axis.high
        return Search(low, high, target, integer=self.axis.integer, within=self.within, first=first, most=self.most)

    def _searches(self) -> list[Search]:
        """One over the whole range; of given values one at each, which ends with its verdict."""
        values = self.axis.values
        return [self._search()] if values is None else [replace(self._search(), low=x, high=x, looks=1) for x in values]

    def _points(self, arm: Arm, search: Search, objective: str) -> list[Point]:
        return points_of([each for each in self.looks[arm.name] if search.low <= each.x <= search.high], objective)

    def _likely(self, arm: Arm, search: Search, objective: str, ask: Ask) -> Iterator[Task]:
        """What the search may look at after this. How long a closed loop takes for a second look, the first says."""
        points = self._points(arm, search, objective)
        for then, before in may_follow(lambda after: next_ask(search, after), points, ask, search.target):
            folder = self.out / POINTS / _name(arm, then.x, before)
            if not (before and self.axis.key == CONCURRENCY) and done(folder) is None:
                yield self.measure(self._alone(arm, then, before, None), folder)

    def _look(self, arm: Arm, ask: Ask, likely: Iterable[Task]) -> Steps[None]:
        before = [look for look in self.looks[arm.name] if look.x == ask.x]
        name, qps = _name(arm, ask.x, len(before)), before[-1].offered_qps if before else None
        look = yield from self._one_look(arm, ask, self._alone(arm, ask, len(before), qps), name, likely)
        if look is not None and look.over_capacity and not self._fails(look):
            longer = self._alone(arm, Ask(ask.x, LONGER * look.queries), len(before), qps)
            look = yield from self._one_look(arm, ask, longer, f"{name}-longer", ())
        if look is None:
            return
        self.looks[arm.name].append(look)
        told = ", ".join(f"{look.good(kind)} of {look.queries} in time per {kind}" for kind in look.met)
        self.tell(
            f"point    {arm.name} at {number(ask.x)} {self.axis.unit}: {told}{' (over capacity)' * look.over_capacity}"
        )
        self.write(partial=True)

    def _one_look(
        self, arm: Arm, ask: Ask, scenario: Scenario, name: str, likely: Iterable[Task]
    ) -> Steps[Look | None]:
        summary = yield from self._run(name, scenario, likely)
        if summary is None:
            return None
        assert self.scenario.objective is not None
        queries = read_queries(self.out / POINTS / name)
        return looks_of(summary, queries, self.scenario.objective, ask.x, f"{POINTS}/{name}")[arm.name]

    def _fails(self, look: Look) -> bool:
        """Whether what was counted fails an objective, whatever piled up."""
        target = self._search().target
        counted = [point for name in look.met for point in points_of([replace(look, over_capacity=False)], name)]
        return any(point.verdict(target) == "fail" for point in counted)

    def _alone(self, arm: Arm, ask: Ask, look: int, seen_qps: float | None) -> Scenario:
        """One arm with the server to itself, at x, long enough for so many queries, by what an earlier look took, if there was one."""
        load, objective = self.scenario.load_of(arm), self.scenario.objective
        assert objective is not None
        seconds = self.scenario.load.duration or LEAST_DEADLINES * objective.query_seconds
        qps = seen_qps if self.axis.key == CONCURRENCY else ask.x
        if self.axis.key == CONCURRENCY:
            users = int(ask.x) if load.users is not None else None
            load = msgspec.structs.replace(load, mode="closed", concurrency=int(ask.x), users=users)
        else:
            load = msgspec.structs.replace(load, mode="open", rate=ask.x)
        if qps:
            seconds = max(seconds, ask.queries / qps)
        load = msgspec.structs.replace(
            load, stages=[], queries=None, duration=seconds, arms="apart", match="queries", repeats=1
        )
        own = msgspec.structs.replace(arm, rate=None, concurrency=None, queries=None, baseline=True)
        seed = self.scenario.seed + look
        return msgspec.structs.replace(self.scenario, arms=[own], load=load, seed=seed, threshold=[])

    def _run(self, name: str, scenario: Scenario, likely: Iterable[Task] = ()) -> Steps[Mapping[str, Any] | None]:
        """The summary of a run that is there already, or is run now; None where the sweep ends with it."""
        folder = self.out / POINTS / name
        summary = done(folder)
        if summary is None:
            if folder.exists():
                put_aside(folder)
            budget, over = self._left()
            if over is not None:
                self.ended = {"why": "budget", "reason": over}
                return None
            measured, files = yield Want(self.measure(msgspec.structs.replace(scenario, budget=budget), folder), likely)
            leave(folder, files)
            summary = measured
        if summary["ended"] is not None and summary["ended"]["why"] != "errors":
            self.ended = summary["ended"]
            return None
        if degraded(summary):
            self.ended = {
                "why": "errors",
                "reason": f"{POINTS}/{name}: a worker died; the same command goes on with that run",
            }
            return None
        for tick, said in (("counted", "counts differ"), ("client_ok", "the client was the limit")):
            if summary["validity"][tick] is False:
                self.wrong = self.wrong or tick == "counted"
                self.notes[f"{POINTS}/{name}: {said}: {summary['validity']['reasons'][tick]}"] = None
        if summary["ended"] is not None:
            self.notes[f"{POINTS}/{name}: {summary['ended']['reason']}"] = None
        return summary

    def _left(self) -> tuple[Budget | None, str | None]:
        """What the runs in the folder have left of the budget, and which cap is reached."""
        caps = self.scenario.budget
        if caps is None:
            return None, None
        taken = [spent(folder) for folder in sorted((self.out / POINTS).glob("*"))]
        left: dict[str, Any] = {}
        for i, key in enumerate(("dollars", "tokens", "calls")):
            cap = getattr(caps, key)
            left[key] = None if cap is None else cap - sum(each[i] for each in taken)
            if left[key] is not None and left[key] <= 0:
                return None, f"[budget] {key} = {cap:g}: the runs so far have taken it all"
        return Budget(**left), None

    def write(self, *, partial: bool) -> Found:
        """sweep.json as far as it is known. Raises LostError."""
        axis, seeks = self.axis, self.seeks
        found: Found = {
            "schema": SCHEMA,
            "partial": partial,
            "ended": self.ended,
            "name": self.scenario.name,
            "seed": self.scenario.seed,
            **self.about,
            "objectives": self._objectives(),
            "axis": {
                "key": axis.key,
                "unit": axis.unit,
                "low": axis.low,
                "high": axis.high,
                "integer": axis.integer,
                "values": None if axis.values is None else list(axis.values),
                "seeks": "highest" if seeks else None,
            },
            "arms": arms_part(self._search(), self.looks, self._objectives(), self.scenario.baseline.name, seeks=seeks),
            "notes": sorted(self.notes),
        }
        for name, arm in found["arms"].items():
            for on in arm["on"].values():
                on["capacity_s"] = capacity_figure(on["capacity"], self._replicas(name), str(self.about.get("clock")))
            if not seeks:
                arm["along"] = [_figures(each, name) for each in sorted(self.along, key=lambda each: each["x"])]
        if self.wanted is not None and self.along:
            points = [crossing.read(self.wanted, each["x"], each["summary"]) for each in self.along]
            found["find"] = crossing.found(self.wanted, points)
        write_json(self.out / NAME, found)
        return found


def _name(arm: Arm, x: float, number: int) -> str:
    """Of a run's folder: the look with this number at x."""
    return f"{arm.name}-{x:.6g}-{number + 1}"


def _figures(measured: Found, arm: str) -> Found:
    """What a key's value made of an arm."""
    found = measured["summary"]["arms"][arm]
    means = {name: None if each is None else each["mean"] for name, each in found["per_query"].items()}
    return {key: measured[key] for key in ("x", "value", "run")} | {
        "per_query": means,
        "amplification": found["amplification"],
        "load": {key: found["load"].get(key) for key in ("offered_qps", "completed_qps", "good_qps")},
    }
