"""Do the intervals hold what they promise, and the verdicts too? On systems whose truth is known from one long run.

python benchmarks/coverage.py queue        # a queue, from idle to nearly full: a minute
python benchmarks/coverage.py engine       # whole runs on the engine model in virtual time: some minutes
python benchmarks/coverage.py capacity     # runs past the engine's capacity, and runs shorter than their lead-in
python benchmarks/coverage.py counts       # tokens, paired by query
"""

import math
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from crowd import counted, truth

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.amplification import amplification
from fanmark.loadgen.simulate import Options, simulate

SEEDS = 200
ARMS = [
    {"name": "single", "topology": "single", "baseline": True},
    {"name": "reflection", "topology": "reflection", "rounds": 1},
]
SHORT = {
    "system": 16,
    "question": 48,
    "instruction": 8,
    "answer": {"dist": "lognormal", "mean": 12, "cv": 0.5, "min": 2, "max": 60},
    "critique": 6,
}
SLOTS = 4  # of the small engine: so many requests run at a time, the others wait


def simulated(seed: int, load: Mapping[str, Any], slots: int | None = None) -> dict[str, Any]:
    """`arms` of a run's summary; with `slots`, on an engine that runs no more requests than these at a time."""
    with tempfile.TemporaryDirectory() as folder:
        profile = "qwen3-30b-a3b@h100"
        if slots is not None:
            text = (resources.files("fanmark.servers.profiles") / "fitted" / f"{profile}.toml").read_text()
            small = re.sub(r"max_num_seqs = \d+", f"max_num_seqs = {slots}", text)
            profile = f"{folder}/small.toml"
            Path(profile).write_text(small)
        raw = {
            "name": "coverage",
            "seed": seed,
            "arm": ARMS,
            "workload": SHORT,
            "load": load,
            "stub": {"profile": profile},
        }
        scenario = scenario_check.check(raw, "coverage", topologies())
        found: dict[str, Any] = simulate(scenario, topologies(), Options(Path(folder) / "run", "", [])).summary["arms"]
    return found


class Covered:
    """How often intervals held the truth, by method, and how often there was none."""

    def __init__(self, true: float) -> None:
        self.true = true
        self.held: dict[str, list[bool | None]] = {}

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """One interval, if there is one."""
        held = None if found["low"] is None else bool(found["low"] <= self.true <= found["high"])
        self.held.setdefault(name, []).append(held)

    def told(self) -> str:
        """By method, the share of the intervals that held, and the number of runs that gave one."""
        parts = []
        for name, all_held in self.held.items():
            held = [each for each in all_held if each is not None]
            parts.append(f"{name} {sum(held) / max(len(held), 1):.1%} of {len(held)}")
        return ", ".join(parts)


def queue() -> None:
    """Batch means of one window, and t over 5 repeats, at loads from a third to nine tenths."""
    for busy, servers in ((0.3, 4), (0.3, 16), (0.6, 4), (0.6, 16), (0.8, 4), (0.8, 16), (0.9, 4)):
        true, long_s = truth(busy, servers, 200_000.0 if servers == 4 else 50_000.0)
        covered = Covered(true)
        for seed in range(SEEDS):
            for name, windows, repeats in (
                ("batch means of 25 p90", 25, 1),
                ("of 60 p90", 60, 1),
                ("repeats of 13 p90", 13, 5),
            ):
                arms = counted(str(seed), busy, servers, 3 * long_s, windows * long_s, repeats)
                covered.add(name, amplification(arms[0], arms[1], "latency_s", seed, interleaved=True) or {})
        print(f"{busy:.0%} busy, {servers:2d} servers: ratio {true:.3f}: {covered.told()}", flush=True)


def engine() -> None:
    """The same on whole runs in virtual time: on an engine with room, and on a small one that is busy."""
    for slots, rate in ((None, 6), (SLOTS, 6)):
        load = {"rate": rate, "warmup": 2}
        long_runs = [simulated(10_000 + i, {**load, "duration": 2000}, slots)["reflection"] for i in range(3)]
        long_run = long_runs[0]
        covered = Covered(math.fsum(each["amplification"]["latency_s"]["ratio"] for each in long_runs) / 3)
        steady = 0
        for seed in range(SEEDS):
            one = simulated(seed, {**load, "duration": 26}, slots)["reflection"]
            covered.add("batch means", one["amplification"]["latency_s"])
            steady += one["window"]["steady"]
            five = simulated(seed, {**load, "duration": 15, "repeats": 5}, slots)["reflection"]
            covered.add("repeats", five["amplification"]["latency_s"])
        p90_s, in_flight = long_run["per_query"]["latency_s"]["p90"], long_run["load"]["calls_in_flight"]["mean"]
        told = (
            f"ratio {covered.true:.3f}, p90 {p90_s:.2f} s, {in_flight:.1f} calls in flight, {steady} of {SEEDS} steady"
        )
        print(f"engine with {slots or 'all its'} slots: {told}: {covered.told()}", flush=True)


def capacity() -> None:
    """20 runs each below and past the capacity of the small engine; runs that are shorter than their lead-in."""
    for rate in (4.0, 10.0, 14.0):
        over = steady = 0
        for seed in range(20):
            arms = simulated(seed, {"rate": rate, "duration": 24, "warmup": 2}, SLOTS)
            over += all(arm["window"]["reason"].startswith("over capacity") for arm in arms.values())
            steady += all(arm["window"]["steady"] for arm in arms.values())
            completed = sum(arm["load"]["completed_qps"] for arm in arms.values())
        print(
            f"{2 * rate:g} queries/s offered, {completed:.1f} completed: over capacity {over} of 20, steady {steady}",
            flush=True,
        )
    steady = 0
    for seed in range(20):
        arms = simulated(seed, {"rate": 10, "duration": 1, "warmup": 2})
        steady += any(arm["window"]["steady"] for arm in arms.values())
    print(f"windows of 1 s after lead-ins of 2 s: {steady} of 20 called steady", flush=True)


def counts() -> None:
    """Tokens of queries with drawn lengths, by the bootstrap over queries."""
    load = {"mode": "closed", "concurrency": 8, "warmup": 0}
    long_run = simulated(10_000, {**load, "queries": 10_000})["reflection"]["amplification"]
    names = ("output_tokens", "input_tokens")
    covered = {name: Covered(long_run[name]["ratio"]) for name in names}
    for seed in range(SEEDS):
        found = simulated(seed, {**load, "queries": 40})["reflection"]["amplification"]
        for name in names:
            covered[name].add(f"{name}, 40 queries: {found[name]['method']}", found[name])
    for each in covered.values():
        print(f"ratio {each.true:.4f}: {each.told()}", flush=True)


if __name__ == "__main__":
    {"queue": queue, "engine": engine, "capacity": capacity, "counts": counts}[sys.argv[1]]()
