"""A sweep: run after run along an axis, each a full run's folder, until what is sought is found. What is next is decided by others.

Rules of the file:
1. Along a load each arm runs by itself, in a window that is at least 5 deadlines long (or as long as `load.duration` says). Along any other
   key the scenario runs as it is, once at each value.
2. A look is a run of its own in OUT/points. What is there is read and not run again; what was cut short there is put aside first. Looks at
   one point have seeds of their own. sweep.json is written after each run, so that nothing is lost.
3. A budget is of the whole sweep: each run gets what all those in the folder have left.
"""

from collections.abc import Callable, Mapping, Sequence
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
from fanmark.loadgen.search import Ask, Search, first_look, next_ask
from fanmark.loadgen.sweep_folder import NAME, POINTS, done, put_aside, spent, write_json
from fanmark.loadgen.table import number

LEAST_DEADLINES = 5.0

Measure = Callable[[Scenario, Path], Mapping[str, Any]]  # carries a run out in a folder; gives its summary


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

    def run(self) -> None:
        """All of it, or what there was until it ended."""
        self.looks = {arm.name: [] for arm in self.scenario.arms}
        self.write(partial=True)
        if self.seeks:
            self._over_load()
        else:
            self._over_key()

    def _over_load(self) -> None:
        """Each arm by itself, to where it no longer meets its objectives."""
        for arm in self.scenario.arms:
            for objective in self._objectives():
                for search in self._searches():
                    while (ask := self._ask(search, self.looks[arm.name], objective)) is not None:
                        self._look(arm, ask)
                        if self.ended is not None:
                            return

    def _over_key(self) -> None:
        """The whole scenario at one value after another."""
        while (value := self._next_value()) is not None:
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            x = float(value) if numeric else float((self.axis.values or ()).index(value))
            name = f"{self.axis.key}={value}".replace("/", "_")
            summary = self._run(name, self.at(value))
            if summary is None:
                return
            self.along.append({"x": x, "value": value, "run": f"{POINTS}/{name}", "summary": summary})
            self.tell(f"point    {self.axis.key} = {value}")
            if self.scenario.objective is not None:
                queries = read_queries(self.out / POINTS / name)
                for arm, look in looks_of(summary, queries, self.scenario.objective, x, f"{POINTS}/{name}").items():
                    self.looks[arm].append(look)
            self.write(partial=True)

    def _next_value(self) -> Any:
        if self.wanted is not None:
            points = [crossing.read(self.wanted, each["x"], each["summary"]) for each in self.along]
            return crossing.next_value(self.wanted, self.axis, points, self.within)
        return next(iter((self.axis.values or ())[len(self.along) :]), None)

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

    def _ask(self, search: Search, looks: Sequence[Look], objective: str) -> Ask | None:
        return next_ask(search, points_of([each for each in looks if search.low <= each.x <= search.high], objective))

    def _look(self, arm: Arm, ask: Ask) -> None:
        before = [look for look in self.looks[arm.name] if look.x == ask.x]
        name = f"{arm.name}-{ask.x:.6g}-{len(before) + 1}"
        look = self._one_look(arm, ask, before, name)
        if look is not None and look.over_capacity and not self._fails(look):
            look = self._one_look(arm, Ask(ask.x, LONGER * look.queries), before, f"{name}-longer")
        if look is None:
            return
        self.looks[arm.name].append(look)
        told = ", ".join(f"{look.good(kind)} of {look.queries} in time per {kind}" for kind in look.met)
        self.tell(
            f"point    {arm.name} at {number(ask.x)} {self.axis.unit}: {told}{' (over capacity)' * look.over_capacity}"
        )
        self.write(partial=True)

    def _one_look(self, arm: Arm, ask: Ask, before: Sequence[Look], name: str) -> Look | None:
        summary = self._run(name, self._alone(arm, ask, before))
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

    def _alone(self, arm: Arm, ask: Ask, before: Sequence[Look]) -> Scenario:
        """One arm with the server to itself, at x, long enough for so many queries."""
        load, objective = self.scenario.load_of(arm), self.scenario.objective
        assert objective is not None
        seconds = self.scenario.load.duration or LEAST_DEADLINES * objective.query_seconds
        qps = before[-1].offered_qps if self.axis.key == CONCURRENCY and before else ask.x
        if self.axis.key == CONCURRENCY:
            users = int(ask.x) if load.users is not None else None
            load = msgspec.structs.replace(load, mode="closed", concurrency=int(ask.x), users=users)
            seconds = max(seconds, ask.queries / qps) if before and qps else seconds
        else:
            load = msgspec.structs.replace(load, mode="open", rate=ask.x)
            seconds = max(seconds, ask.queries / qps)
        load = msgspec.structs.replace(
            load, stages=[], queries=None, duration=seconds, arms="apart", match="queries", repeats=1
        )
        own = msgspec.structs.replace(arm, rate=None, concurrency=None, queries=None, baseline=True)
        seed = self.scenario.seed + len(before)
        return msgspec.structs.replace(self.scenario, arms=[own], load=load, seed=seed, threshold=[])

    def _run(self, name: str, scenario: Scenario) -> Mapping[str, Any] | None:
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
            summary = self.measure(msgspec.structs.replace(scenario, budget=budget), folder)
        if summary["ended"] is not None and summary["ended"]["why"] != "errors":
            self.ended = summary["ended"]
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
            "notes": list(self.notes),
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


def _figures(measured: Found, arm: str) -> Found:
    """What a key's value made of an arm."""
    found = measured["summary"]["arms"][arm]
    means = {name: None if each is None else each["mean"] for name, each in found["per_query"].items()}
    return {key: measured[key] for key in ("x", "value", "run")} | {
        "per_query": means,
        "amplification": found["amplification"],
        "load": {key: found["load"].get(key) for key in ("offered_qps", "completed_qps", "good_qps")},
    }
