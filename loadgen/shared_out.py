"""Work that needs nothing but its arguments, shared out over processes, here or on a Ray cluster: simulations, each with a seed."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fanmark.agents import topologies
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.user_topology import table_of

A = TypeVar("A")
B = TypeVar("B")


def each(function: Callable[[A], B], given: Sequence[A], workers: int) -> list[B]:
    """What a module's own function makes of each, in their order; by so many processes. What one raises is raised."""
    if workers == 1:
        return [function(one) for one in given]
    with ProcessPoolExecutor(min(workers, len(given)), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, given))


async def each_on_ray(function: Callable[[A], B], given: Sequence[A], address: str, version: str) -> list[B]:
    """The same, by the processors of a cluster. Raises FanmarkError."""
    from fanmark.loadgen.ray_cluster import connected

    async with connected(address, version) as cluster:
        return await cluster.each(function, given)


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
    """Writes a simulation's files into its folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
