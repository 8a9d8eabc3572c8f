"""The same arms in two runs, side by side: each resource of the second over the first, with an interval and a plain verdict. Pure, but for
the reading of the runs' folders.

Rules of the file:
1. What is compared is servers: their addresses, profiles, parameters and prices may differ, and the seed. Whatever else differs of the
   scenarios makes two questions of one, and is refused unless forced.
2. Of one seed and one scenario, query i is the same in both runs, and they are paired. The runs were not in one server at one time, so that
   times have an interval by repeats alone.
3. A verdict needs an interval that excludes 1; a gate fails only where the whole interval is beyond it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fanmark.agents.runtime import Topology
from fanmark.loadgen.amplification import LEAST_REPEATS, NO_INTERVAL, Counted, amplification, change
from fanmark.loadgen.costs import COUNTS, TIMES
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.junit import Case
from fanmark.loadgen.mistakes import show
from fanmark.loadgen.records import read_windows
from fanmark.loadgen.samples import kv_use, read_samples
from fanmark.loadgen.scenario import Scenario, resolved
from fanmark.loadgen.summary import counted_by_arm
from fanmark.loadgen.table import columns, number, ratio
from fanmark.loadgen.verify import SAME, load

SCHEMA = "fanmark.compare/1"
NO_DIFFERENCE, NOT_KNOWN = "no difference shown", "not known"
_NEITHER = ("cached_tokens", "width", "parallelism")  # more of these is neither better nor worse
_OF_SERVERS = ("target", "targets", "stub", "seed")
_BESIDE = ("name", "threshold")
_APART = 1_000_000_000  # what moves one run's query numbers away from another's: they are not paired
_GATE = re.compile(r"(\S+)\.(per_query|amplification)\.(\w+?)(?:\.(?:mean|ratio))?\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*%")
Found = dict[str, Any]


@dataclass(frozen=True)
class RunRead:
    """A run, as far as it is compared."""

    folder: str
    summary: Mapping[str, Any]
    scenario: Scenario
    arms: Mapping[str, Counted]


@dataclass(frozen=True)
class Gate:
    """--fail-if, taken apart. `bound` is a ratio: 1.05 for +5%."""

    text: str
    arm: str
    part: str
    resource: str
    over: bool
    bound: float


def read(folder: Path, topologies: Mapping[str, Topology]) -> RunRead:
    """Raises ScenarioError where the folder holds no run that has ended."""
    summary, scenario, run = load(folder, topologies)
    cut_at = summary["run"]["seconds"] if summary["ended"] is not None else None
    arms = counted_by_arm(scenario, run, read_windows(folder), kv_use(read_samples(folder)), cut_at)
    return RunRead(str(folder), summary, scenario, arms)


def gate_of(text: str, arms: Sequence[str]) -> Gate:
    """Raises ScenarioError where it cannot be judged."""
    found = _GATE.fullmatch(text.strip())
    if found is None:
        raise ScenarioError(
            f"--fail-if {text!r}: must be ARM.per_query.RESOURCE or ARM.amplification.RESOURCE, > or <, and a change in %, "
            "such as 'debate.amplification.fresh_tokens > +5%'"
        )
    arm, part, resource, sign, percent = found.groups()
    for given, known in ((arm, arms), (resource, (*COUNTS, *TIMES))):
        if given not in known:
            raise ScenarioError(f"--fail-if {text!r}: there is no {given!r}, but {', '.join(known)}")
    return Gate(text, arm, part, resource, sign == ">", 1 + float(percent) / 100)


def differences(first: Scenario, second: Scenario) -> dict[str, tuple[Any, Any]]:
    """Keys that differ, each with both values; an arm's by its name."""
    found = dict(_apart(_by_name(first), _by_name(second)))
    if first.questions != second.questions and "workload.file" not in found:
        found["workload.file"] = ("other questions", "other questions")
    return {key: values for key, values in found.items() if key.split(".")[0] not in _BESIDE}


def compare(first: RunRead, second: RunRead, *, force: bool) -> Found:
    """One comparison of the result. Raises ScenarioError where the scenarios differ and it is not forced."""
    differ = differences(first.scenario, second.scenario)
    tapped = first.scenario.tapped and second.scenario.tapped
    if tapped:  # what could not be attributed has an arm, where there was any
        differ = {key: values for key, values in differ.items() if key.split(".")[0] != "arm"}
    refused = {key: values for key, values in differ.items() if key.split(".")[0] not in _OF_SERVERS}
    if refused and not force:
        said = ", ".join(f"{key} = {_shown(b)} ({_shown(a)})" for key, (a, b) in refused.items())
        raise ScenarioError(
            f"{second.folder}: is not of the scenario of {first.folder}: {said}: compare runs of one scenario, or give --force"
        )
    names = [name for name in first.arms if name in second.arms]
    if not names:
        raise ScenarioError(f"{first.folder} and {second.folder}: have no arm in common")
    paired = not refused and "seed" not in differ and not tapped
    before = {name: replace(arm, apart=0 if paired else _APART) for name, arm in first.arms.items()}
    seed, base, base_before = second.scenario.seed, second.scenario.baseline.name, first.scenario.baseline.name
    arms: dict[str, Found] = {}
    for name in names:
        own, old = second.arms[name], before[name]
        summaries = [run.summary["arms"][name] for run in (first, second)]
        per_query = {r: amplification(own, old, r, seed, interleaved=False) for r in (*COUNTS, *TIMES)}
        amplified = {
            r: change((own, second.arms[base]), (old, before[base_before]), r, seed) for r in (*COUNTS, *TIMES)
        }
        arms[name] = {
            "load": [each["load"] for each in summaries],
            "per_query": {
                r: _figure(r, [_of(each, "per_query", r) for each in summaries], f) for r, f in per_query.items()
            },
            "amplification": {
                r: _figure(r, [_of(each, "amplification", r) for each in summaries], f) for r, f in amplified.items()
            }
            if name != base
            else {},
        }
    return {
        "runs": [_told(run) for run in (first, second)],
        "differ": {key: list(values) for key, values in differ.items()},
        "paired": paired,
        "arms": arms,
    }


def judge(gate: Gate, comparison: Found) -> Case:
    """Fails only where the whole interval is beyond the bound."""
    found = comparison["arms"].get(gate.arm, {}).get(gate.part, {}).get(gate.resource)
    name = f"{comparison['runs'][1]['folder']}: {gate.text}"
    if found is None or found["low"] is None:
        why = "is not known" if found is None or found["ratio"] is None else found["method"]
        return Case(name, "skipped", f"cannot be judged: {why}")
    said = f"{ratio(found)}, {'more' if gate.over else 'less'} than {gate.bound:.4g}x is refused"
    beyond = found["low"] > gate.bound if gate.over else found["high"] < gate.bound
    return Case(name, "failed" if beyond else "passed", said)


def lines(found: Found) -> list[str]:
    """A comparison as text: what differs, then a table for each arm. Times stand beside the load that they were measured under."""
    first, second = found["runs"]
    said = [f"first    {_words(first)}", f"second   {_words(second)}"]
    for key, (a, b) in found["differ"].items():
        said.append(f"differs  {key}: {_shown(a)}, then {_shown(b)}")
    said.append(
        "paired   query by query"
        if found["paired"]
        else "paired   no: the seed or the scenario differs, or other queries were tapped"
    )
    for name, arm in found["arms"].items():
        rows = [[name, "first", "second", "second / first", "verdict"], *_rows(arm["per_query"], number)]
        loads = arm["load"]
        rows.append(["queries/s", *(number(load.get("completed_qps")) for load in loads), "", ""])
        flights = [load.get("calls_in_flight", {}).get("mean") for load in loads]
        rows.append(["calls in flight", *map(number, flights), "", ""])
        if arm["amplification"]:
            rows += [["against the baseline", "", "", "", ""], *_rows(arm["amplification"], _times)]
        said += ["", *columns(rows)]
        times = [each for resource, each in arm["per_query"].items() if resource in TIMES and each["low"] is None]
        for why in dict.fromkeys(each["method"] for each in times if each["method"]):
            mend = f" (load.repeats = {LEAST_REPEATS} in both runs gives one)" if why == NO_INTERVAL else ""
            said.append(f"times: {why}{mend}")
    return said


def _rows(figures: Mapping[str, Found], text: Callable[[float | None], str]) -> list[list[str]]:
    """A row for each resource of which something is known."""
    return [
        [resource, text(each["first"]), text(each["second"]), ratio(each), each["verdict"]]
        for resource, each in figures.items()
        if each["first"] or each["second"]
    ]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _figure(resource: str, values: Sequence[float | None], found: Mapping[str, Any] | None) -> Found:
    known = found or {"ratio": None, "low": None, "high": None, "method": None}
    said = NO_DIFFERENCE if list(values) == [0, 0] else verdict(resource, known)
    return {"first": values[0], "second": values[1], **known, "verdict": said}


def verdict(resource: str, found: Mapping[str, Any]) -> str:
    """better, worse, no difference shown; higher or lower where neither is good; not known."""
    if found["ratio"] is None:
        return NOT_KNOWN
    if found["low"] is None or found["low"] - SAME <= 1 <= found["high"] + SAME:
        return NO_DIFFERENCE
    words = ("lower", "higher") if resource in _NEITHER else ("better", "worse")
    return words[found["low"] > 1]


def _of(arm: Mapping[str, Any], part: str, resource: str) -> float | None:
    entry = arm[part][resource]
    return None if entry is None else entry["mean" if part == "per_query" else "ratio"]


def _told(run: RunRead) -> Found:
    validity = run.summary["validity"]
    about = run.summary["run"]
    return {
        "folder": run.folder,
        "name": about["name"],
        "clock": about["clock"],
        "seed": about["seed"],
        "partial": run.summary["partial"],
        "failed": [tick for tick, ok in validity.items() if ok is False],
    }


def _words(run: Found) -> str:
    clock = "in virtual time" if run["clock"] == "virtual" else "in real time"
    off = [f"{', '.join(run['failed'])} failed"] if run["failed"] else []
    return "; ".join([f"{run['folder']}, {clock}, seed {run['seed']}", *["partial"] * run["partial"], *off])


def _by_name(scenario: Scenario) -> dict[str, Any]:
    table = resolved(scenario)
    return table | {"arm": {arm["name"]: arm for arm in table["arm"]}}


def _apart(a: Any, b: Any, place: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The innermost keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _apart(a.get(key), b.get(key), f"{place}.{key}" if place else str(key))
    elif a != b:
        yield place, (a, b)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: part for key, part in value.items() if part is not None}
    return "not given" if value is None else show(value)
