"""The folder of a sweep: sweep.json, scenario.toml, and the runs in points/, each a folder of its own."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen import scenario_check
from fanmark.loadgen.capacity import SCHEMA, Found
from fanmark.loadgen.compare import differences
from fanmark.loadgen.errors import LostError, ScenarioError
from fanmark.loadgen.mistakes import show
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.session import write_scenario
from fanmark.loadgen.user_topology import with_users

NAME, POINTS = "sweep.json", "points"
SCENARIO = "scenario.toml"
_MAY_DIFFER = ("budget",)


def open_folder(out: Path, scenario: Scenario, key: str, clock: str, topologies: Mapping[str, Topology]) -> bool:
    """Makes the folder; True where it holds a part of the same sweep already. Raises ScenarioError where it holds other results."""
    if (out / "queries.jsonl").exists() or (out / "summary.json").exists():
        raise ScenarioError(f"--out {out}: holds a run: give a new folder, or remove it first")
    if not (out / NAME).exists():
        if (out / POINTS).exists():
            raise ScenarioError(
                f"--out {out}: holds {POINTS} of an unknown sweep: give a new folder, or remove it first"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_scenario(out, scenario)
        except OSError as e:
            raise ScenarioError(f"--out {out}: cannot be written ({e.strerror}): give another folder") from None
        return False
    before, found = _before(out, topologies)
    other = {
        "what is swept": (found["axis"]["key"], key),
        "clock": (found["clock"], clock),
        "name": (found["name"], scenario.name),
        **differences(before, scenario),
    }
    for what, (a, b) in other.items():
        if a != b and what.split(".")[0] not in _MAY_DIFFER:
            raise ScenarioError(
                f"--out {out}: holds a sweep of another scenario: {what} was {show(a)}, and is {show(b)}: give a new folder, "
                "or the same scenario to go on"
            )
    return True


def _before(out: Path, topologies: Mapping[str, Topology]) -> tuple[Scenario, Found]:
    """The scenario of the sweep in the folder, and its sweep.json."""
    source = str(out / SCENARIO)
    try:
        found = msgspec.json.decode((out / NAME).read_bytes())
        raw = tomllib.loads((out / SCENARIO).read_text())
    except (OSError, ValueError) as e:
        raise ScenarioError(f"--out {out}: holds a sweep that cannot be read ({e}): give a new folder") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ScenarioError(f"--out {out}: {NAME} is not of {SCHEMA}: give a new folder")
    return scenario_check.check(raw, source, with_users(raw, source, topologies)), found


def write_json(path: Path, found: Found) -> None:
    """The whole of it, or what stood there before. Raises LostError."""
    beside = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        os.replace(beside, path)
    except OSError as e:
        raise LostError(f"{path}: cannot be written ({e.strerror}): the runs are in {path.parent / POINTS}") from None


def done(folder: Path) -> Mapping[str, Any] | None:
    """The summary of a run that came to its end, with all of its workers."""
    try:
        summary: Mapping[str, Any] = msgspec.json.decode((folder / "summary.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    whole = summary["ended"] is None or summary["ended"]["why"] == "errors"
    return summary if whole and not degraded(summary) else None


def degraded(summary: Mapping[str, Any]) -> bool:
    """Whether a worker died: then less was asked of the servers than the point says."""
    return bool(summary["client"].get("degraded"))


def put_aside(folder: Path) -> None:
    """Moves what was cut short out of the way."""
    names = (folder.with_name(f"{folder.name}.cut-{i}") for i in range(1, 10_000))
    folder.rename(next(name for name in names if not name.exists()))


def spent(folder: Path) -> tuple[float, int, int]:
    """Dollars, tokens and calls of a run. What a call that failed took is not told: it counts as the run's largest."""
    dollars, tokens, calls, untold, unpriced = 0.0, 0, 0, 0, 0
    largest, dearest = 0, 0.0
    for query in read_queries(folder) if (folder / "queries.jsonl").exists() else ():
        whole = True
        for call in (*query.retried, *query.calls):
            if call.kind != "call" or call.sent_at is None:
                continue
            calls += 1
            if call.input_tokens is None:
                untold, whole = untold + 1, False
                continue
            tokens += call.input_tokens + (call.output_tokens or 0)
            largest = max(largest, call.input_tokens + (call.output_tokens or 0))
        price = query.resources.get("dollars")
        if whole and price is not None:
            dollars, dearest = dollars + price, max(dearest, price)
        else:
            unpriced += 1
    return dollars + unpriced * dearest, tokens + untold * largest, calls
