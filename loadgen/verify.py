"""Recomputes summary.json from the other files of a run's folder, and says where the two differ.

What client and servers told of themselves (loop lag, CPU, counters, versions) is in no record: it is taken as told, and listed. What was
made of it, such as how far a counter is off, is recomputed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen import frozen, health, records, scenario_check
from fanmark.loadgen.cost_part import all_simulated
from fanmark.loadgen.costs import mismatches, resources_of
from fanmark.loadgen.counters import Reading
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import Query
from fanmark.loadgen.reduced import CallKind, Reduced, Rows, reduced
from fanmark.loadgen.results import counted_calls, recomputable
from fanmark.loadgen.samples import read_samples
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.server_side import account
from fanmark.loadgen.summary import SCHEMA
from fanmark.loadgen.thresholds import judged
from fanmark.loadgen.tool_report import sessions
from fanmark.loadgen.unrecorded import LastSnapshot, left_of, read_snapshots
from fanmark.loadgen.user_topology import with_users

SAME = 1e-9  # another machine's logarithm may differ in the last bits
_WHOLE = (
    "arms",
    "validity",
    "files",
    "retokenized_pct",
    "thresholds",
    "label",
)  # in these nothing may stand that was not recomputed
_SHOWN = 20  # differences of a run that are told one by one

Place = tuple[str, ...]
Flat = dict[Place, Any]


@dataclass(frozen=True)
class Verified:
    """`figures`: how many of summary.json were recomputed; `queries`: whose costs were; `differ`: a line for each that is not equal;
    `told`: the parts of summary.json that are in no record."""

    figures: int
    queries: int
    differ: list[str]
    told: list[str]


def load(
    folder: Path,
    topologies: Mapping[str, Topology],
    look: Callable[[Query, Scenario], None] = lambda query, scenario: None,
) -> tuple[dict[str, Any], Scenario, Reduced]:
    """Summary, scenario and records of a run that has ended; `look` sees each query before it is reduced. Raises ScenarioError where the
    folder holds none."""
    try:
        summary = msgspec.json.decode((folder / "summary.json").read_bytes())
        raw, source = scenario_check.read(str(folder / "scenario.toml"))
        if summary.get("schema") != SCHEMA:
            raise ScenarioError(
                f"{folder}: its summary is of schema {summary.get('schema')!r}, this version reads {SCHEMA}"
            )
        if left := left_of(folder, summary):
            raise ScenarioError(f"{folder}: {left}: only what --journals collect has brought here can be read again")
        known = topologies if raw.get("tapped") is True else with_users(raw, source, topologies)
        scenario = scenario_check.check(raw, source, known)
        run = reduced((), scenario.objective, read_snapshots(folder))
        for query in records.read_queries(folder):
            look(query, scenario)
            run.add(query)
        return summary, scenario, run
    except (OSError, msgspec.MsgspecError) as e:
        raise ScenarioError(
            f"{folder}: holds no run that has ended ({e}): give the folder that a run or a simulation has left"
        ) from None


def verify(folder: Path, topologies: Mapping[str, Topology]) -> Verified:
    """Raises ScenarioError where the folder holds no run that can be read."""
    differ: list[str] = []
    summary, scenario, run = load(folder, topologies, lambda query, scenario: differ.extend(_cost(query, scenario)))
    try:
        found = _recomputed(folder, scenario, run, summary)
    except (KeyError, TypeError, AttributeError) as e:
        raise ScenarioError(f"{folder}/summary.json: is not whole ({type(e).__name__}: {e})") from None
    mine: Flat = dict(_flat(msgspec.json.decode(msgspec.json.encode(found))))
    theirs: Flat = dict(_flat(summary))
    for place in [*mine, *(place for place in theirs if place not in mine and place[0] in _WHOLE)]:
        # what an earlier version did not tell of is null
        if place in mine and _equal(theirs.get(place), mine[place]):
            continue
        said, recomputed = (_show(flat[place]) if place in flat else "missing" for flat in (theirs, mine))
        differ.append(f"{'.'.join(place)}: the summary says {said}, the records {recomputed}")
    return Verified(len(mine), len(run.queries), differ, _not_recomputed(theirs, mine))


def lines(folder: Path, found: Verified) -> list[str]:
    """What is said of a run."""
    told = f"told by client and servers, not recomputed: {', '.join(found.told)}"
    if not found.differ:
        return [
            f"{folder}: {found.figures:,} figures and the costs of {found.queries:,} queries, all equal",
            f"  {told}",
        ]
    more = len(found.differ) - _SHOWN
    return [
        f"{folder}: {len(found.differ):,} differ, of {found.figures:,} figures and the costs of {found.queries:,} queries",
        *(f"  {line}" for line in found.differ[:_SHOWN]),
        *([f"  and {more:,} more"] if more > 0 else []),
        f"  {told}",
    ]


def _cost(query: Query, scenario: Scenario) -> Iterator[str]:
    """Puts what the query's calls cost in place of what its record says, and tells where that differs."""
    where = f"queries.jsonl, {query.arm} query {query.query}"
    cost = resources_of(query, scenario)
    for name in cost.keys() | query.resources.keys():
        said, found = query.resources.get(name), cost.get(name)
        if not _equal(said, found):
            yield f"{where}: {name} is {_show(said)}, its calls say {_show(found)}"
    query.resources = cost
    off = mismatches(query) if query.outcome == "completed" else []
    if off != query.mismatches:
        yield f"{where}: mismatches are {_show(query.mismatches)}, its calls and its closed form say {_show(off)}"
    query.mismatches = off


def _recomputed(folder: Path, scenario: Scenario, run: Reduced, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What of summary.json is in the records."""
    client = _client(summary, counted_calls(run), read_snapshots(folder))
    server = _server(summary, scenario, run)
    tools = {"sessions": sessions(run.calls)} if summary["tools"] is not None else {}
    stub = summary["validity"].get("stub_on_time")
    found = recomputable(
        scenario, run, records.read_windows(folder), read_samples(folder),
        summary["run"]["seconds"] if summary["ended"] is not None else None,
        summary["client"] | client, _merged(summary["server"], server),
        None if stub is None else (stub, summary["validity"]["reasons"]["stub_on_time"]),
    )  # fmt: skip
    if summary["run"]["clock"] == "virtual":
        all_simulated(found["arms"])
    found["run"] = {"name": scenario.name, "seed": scenario.seed}
    found["partial"] = summary["ended"] is not None
    whole = {**summary, **found, "run": summary["run"]}
    found["thresholds"], found["label"] = judged(scenario.threshold, whole), frozen.label(scenario, whole)
    parts = {"client": client, "server": server, "tools": tools, "files": records.digests(folder)}
    return found | {name: part for name, part in parts.items() if part}


def _merged(told: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """`server` as told, with what was recomputed in its place."""
    if "reconciled" in told:
        return {**told, **found}
    return {name: {**part, **found.get(name, {})} for name, part in told.items()}


def _client(summary: Mapping[str, Any], calls: Rows[CallKind], snapshots: Sequence[LastSnapshot]) -> dict[str, Any]:
    if summary["run"]["clock"] == "virtual":
        return {}
    found: dict[str, float | None] = dict.fromkeys(summary["client"]["by_worker"])
    found |= {str(worker): p99_s for worker, p99_s in health.send_delay_p99_s(calls).items()}
    lost = {str(each.worker): each.queries for each in snapshots}
    by_worker = {
        worker: {"send_delay_p99_s": p99_s, "lost_queries": lost.get(worker)} for worker, p99_s in found.items()
    }
    return health.told_by(calls) | {"by_worker": by_worker}


def _server(summary: Mapping[str, Any], scenario: Scenario, run: Reduced) -> dict[str, Any]:
    """The calls' side of `server`, against the counts that the servers told."""
    told = summary["server"]
    if any(each["lost_at"] is not None for each in summary["client"].get("by_worker", {}).values()):
        return {}  # calls of a worker that died are in no record
    if "reconciled" in told:
        names = list(scenario.targets) or ["default"]
        return _against(names, told, run)
    return {name: _against(_sharing(scenario, name, summary), part, run) for name, part in told.items()}


def _sharing(scenario: Scenario, name: str, summary: Mapping[str, Any]) -> list[str]:
    """The targets that tell of themselves where this one does."""
    if summary["run"]["clock"] == "virtual":
        return [name]
    addresses = {each: target.metrics_of for each, target in scenario.targets.items()}
    return [each for each, urls in addresses.items() if urls == addresses[name]]


def _against(names: Sequence[str], told: Mapping[str, Any], run: Reduced) -> dict[str, Any]:
    counts = {name: pair["server"] for name, pair in told.items() if isinstance(pair, dict) and "server" in pair}
    if not counts:
        return {}
    capacity = {"kv_capacity_tokens": told["kv_capacity_tokens"]} if told["kv_capacity_tokens"] is not None else {}
    found = account(names, Reading("", {}), Reading("", counts | capacity), run)
    for name in counts:
        del found[name]["server"]
    return {name: value for name, value in found.items() if name != "kv_capacity_tokens"}


def _flat(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """All figures, each with its place; of an empty table the table."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, (*place, key))
    elif isinstance(value, list) and value:
        for i, part in enumerate(value):
            yield from _flat(part, (*place, str(i)))
    else:
        yield place, value


def _equal(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=SAME, abs_tol=SAME) if numbers else type(a) is type(b) and a == b


def _show(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _not_recomputed(theirs: Flat, mine: Flat) -> list[str]:
    """What of the summary has no counterpart, each part that has none at all told as one."""
    known = {place[:n] for place in mine for n in range(len(place) + 1)}
    found: dict[Place, dict[str, None]] = {}
    for place in theirs:
        if place not in mine and place[0] not in _WHOLE:
            whole = next(place[:n] for n in range(1, len(place) + 1) if place[:n] not in known or n == len(place))
            within = (
                (*whole[:-2], "*") if len(whole) > 2 else whole[:-1]
            )  # what is told of each counter and each worker
            found.setdefault(within, {})[whole[-1]] = None
    return [
        f"{'.'.join(within)} ({', '.join(names)})" if within else ", ".join(names) for within, names in found.items()
    ]
