"""Simulations of one scenario that are done elsewhere: with the next seeds, or at the points of a sweep."""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents import topologies
from fanmark.loadgen.errors import ScenarioError, writing
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.user_topology import table_of


def simulated(task: tuple[Scenario, Options]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A simulation's summary and files, made without a place of its own on the disk."""
    scenario, options = task
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        found = simulate(scenario, table_of(scenario, topologies()), replace(options, out=out))
        return found.summary, {path.name: path.read_bytes() for path in out.iterdir()}


def seeds(scenario: Scenario, options: Options, count: int) -> list[tuple[Scenario, Options]]:
    """So many tasks, which differ in their seed."""
    return [(msgspec.structs.replace(scenario, seed=scenario.seed + i), options) for i in range(count)]


def check_free(folders: Iterable[Path]) -> None:
    """Raises ScenarioError where one holds a run: the tasks are done elsewhere, and would find out too late."""
    for folder in folders:
        if (folder / "queries.jsonl").exists() or (folder / "summary.json").exists():
            raise ScenarioError(f"--out {folder}: holds another run: give a new folder, or remove it first")


def leave(out: Path, files: dict[str, bytes]) -> None:
    """Writes a simulation's files into its folder; last the summary, by which it is known that all are there. Raises LostError."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, data in sorted(files.items(), key=lambda item: item[0] == "summary.json"):
            (out / name).write_bytes(data)
