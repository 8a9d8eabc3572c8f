"""Whether a plan holds: n stub replicas behind a real router meet the objective, n - 1 do not. In real time, slowed down.

usage: python benchmarks/plan_truth.py [--time-scale S] [--queries N] [MIX ...]

For each mix the plan is made in virtual time; then `fanmark run` puts the same load before n and n - 1 stubs behind a router, on this
machine.
Printed: the plan, what was measured of both, and the CPU that the client took of a core.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HEAD = """
name = "{name}"
[workload]
answer = {{ dist = "lognormal", mean = 60, cv = 0.4, min = 16 }}
system = 100
[tools]
latency_s = {{ dist = "lognormal", mean = 0.1, cv = 0.5 }}
[[arm]]
name = "mix"
baseline = true
mix = [ {parts} ]
[objective]
query_seconds = {deadline}
attainment = 0.9
[load]
rate = {rate}
"""
MIXES = {  # parts, queries/s, deadline
    "chat-debate": ('{ name = "a", topology = "single" }, { name = "b", topology = "debate", agents = 3, rounds = 1 }', 2.7, 3.5),
    "chat-chain": ('{ name = "a", topology = "single" }, { name = "b", topology = "tool-chain", tool_calls = 4 }', 3.5, 4.0),
    "research": ('{ name = "a", topology = "orchestrator", workers = 3, tool_calls = 2 }, { name = "b", topology = "reflection" }', 1, 7.0),
}  # fmt: skip


def fanmark(*flags: str) -> dict:
    """The JSON that the command prints."""
    found = subprocess.run([sys.executable, "-m", "fanmark.loadgen.cli", *flags], capture_output=True, text=True)
    if not found.stdout:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("mixes", nargs="*", default=list(MIXES))
    options.add_argument("--time-scale", type=float, default=10.0)
    options.add_argument("--queries", type=int, default=200)
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp())
    for name in given.mixes:
        parts, rate, deadline = MIXES[name]
        file = folder / f"{name}.toml"
        file.write_text(HEAD.format(name=name, parts=parts, deadline=deadline, rate=rate))
        plan = fanmark(
            "plan",
            str(file),
            "--rate",
            str(rate),
            "--burstiness",
            "1",
            "--json",
            "--quiet",
            "--within",
            "0",
            "--out",
            str(folder / f"{name}-plan"),
        )
        told = plan["arms"]["mix"]["plan"]
        n, fails = told["replicas"], told["burstiness"]["1"]["fails_at"]
        print(f"{name}: planned {n} replicas, {fails} fail", flush=True)
        for replicas in sorted({n, fails} - {None}):
            settings = [
                f"stub.replicas={replicas}",
                f"stub.time_scale={given.time_scale:g}",
                f"load.warmup={round(rate * deadline)}",
            ]
            flags = [flag for setting in settings for flag in ("--set", setting)]
            out = folder / f"{name}-{replicas}"
            run = fanmark(
                "run",
                str(file),
                "--duration",
                str(given.queries / rate),
                *flags,
                "--json",
                "--quiet",
                "--out",
                str(out),
            )
            arm, client = run["arms"]["mix"], run["client"]
            share, wall_s = arm["objective"], run["run"]["seconds"] * given.time_scale
            print(
                f"    {replicas} in real time: {share['attainment']:.1%} [{share['low']:.1%}, {share['high']:.1%}] of "
                f"{arm['queries']['started']} in time; client {client['verdict']}, {client['cpu_s'] / wall_s:.2f} of a core",
                flush=True,
            )


if __name__ == "__main__":
    main()
