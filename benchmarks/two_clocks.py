"""One scenario in both clocks: `fanmark run` against the embedded servers, slowed by a time scale, and `fanmark simulate`.

usage: python benchmarks/two_clocks.py [SCENARIO] [--time-scale S] [--round-trip SECONDS] [load flags and --set KEY=VALUE of both commands]

Printed: per arm the mean latency of a query, and TTFT, latency and TPOT of a call, in the engine's seconds, and by how much real time is
off. What HTTP, MCP and the client take in real time is S times smaller in the engine's seconds; of it, virtual time knows the tools' round
trip alone (--round-trip is in wall seconds, and passed on as that / S).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMPARED = (
    ("query latency, s", "per_query", "latency_s"),
    ("call TTFT, s", "per_call", "ttft_s"),
    ("call latency, s", "per_call", "latency_s"),
    ("call TPOT, s", "per_call", "tpot_s"),
)


def both(flags: list[str], time_scale: float, round_trip_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """summary.json in real time and in virtual time."""
    with tempfile.TemporaryDirectory() as folder:
        real = ["run", *flags, "--quiet", "--set", f"stub.time_scale={time_scale:g}"]
        virtual = ["simulate", *flags, "--set", f"tools.round_trip_s={round_trip_s / time_scale:g}"]
        found = []
        for name, command in (("virtual", virtual), ("real", real)):
            line = [sys.executable, "-m", "fanmark.loadgen.cli", *command, "--json", "--out", str(Path(folder) / name)]
            found.append(json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout))
    return found[1], found[0]


def differences(real: dict[str, Any], virtual: dict[str, Any]) -> list[tuple[str, str, float, float, float]]:
    """(arm, what, real, virtual, off in per cent), of means."""
    rows = []
    for name, arm in real["arms"].items():
        for title, part, key in COMPARED:
            a, b = arm[part][key]["mean"], virtual["arms"][name][part][key]["mean"]
            rows.append((name, title, a, b, 100.0 * (a / b - 1.0)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("--time-scale", type=float, default=5.0)
    parser.add_argument("--round-trip", type=float, default=0.002)
    own, flags = parser.parse_known_args()
    real, virtual = both(flags, own.time_scale, own.round_trip)
    for name, title, a, b, off in differences(real, virtual):
        print(f"{name:12} {title:17} real {a:9.4f}  virtual {b:9.4f}  {off:+6.2f} %")
    for name, found in (("real", real), ("virtual", virtual)):
        ticks = {key: found["validity"][key] for key in found["validity"] if key != "reasons"}
        print(f"{name}: {found['run']['seconds']:.1f} s, {ticks}")
    print(
        "; ".join(
            f"{key}: {text}" for key, text in real["validity"]["reasons"].items() if "time" in key or "client" in key
        )
    )


if __name__ == "__main__":
    main()
