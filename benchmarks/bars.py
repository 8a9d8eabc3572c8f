"""What `fanmark run` costs and how true its times are, against a server that knows when it sent (truth_stub.c; needs Linux and gcc).

usage: python benchmarks/bars.py [--rounds N] [--only NAME ...]

Each bar is one run of the command on one core, with the server on another: `single` in a closed loop, replies of forced length. CPU and
memory are the system's account of the whole command, start-up included. `off` is how far a quantile of the summary lies from the server's
own. Printed is every round, beside what must be reached and what is aimed at; on a shared machine the smallest cost is nearest the truth.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCENARIO = """name = "bars"
[workload]
system = 0
question = 30
answer = {tokens}
[[arm]]
name = "single"
topology = "single"
baseline = true
[load]
mode = "closed"
warmup = 0
"""


@dataclass(frozen=True)
class Mode:
    """A load: `queries` on `streams` streams, of `tokens` chunks each, the first after `ttft_ms`, then one every `gap_ms`."""

    streams: int
    queries: int
    tokens: int
    ttft_ms: float = 0.0
    gap_ms: float = 0.0


MODES = {
    "start": Mode(10, 10, 128),
    "a": Mode(64, 2000, 128),
    "b": Mode(256, 1000, 256, 200, 20),
    "c": Mode(1000, 1000, 256, 200, 20),
    "5000": Mode(5000, 5000, 50, 1000, 125),
}
CPU, RATE, MEMORY = "CPU ms per 1,000 chunks", "chunks/s", "memory MB"
TTFT_OFF = ("ttft p50 ms off", "ttft p99 ms off")
GAP_OFF = ("gap p50 ms off", "gap p99 ms off")
BARS: dict[str, dict[str, tuple[float, float]]] = {  # what must be reached, and what is aimed at
    "start": {"CPU s": (0.8, 0.4)},
    "a": {CPU: (12, 9), RATE: (100_000, 130_000)},
    "b": {CPU: (30, 22)},
    "c": {TTFT_OFF[0]: (1, 0.1), TTFT_OFF[1]: (5, 0.5), GAP_OFF[0]: (0.5, 0.05), GAP_OFF[1]: (5, 0.3)},
    "5000": {TTFT_OFF[0]: (1, 0.1), TTFT_OFF[1]: (5, 0.5), GAP_OFF[1]: (5, 0.3), MEMORY: (150, 60)},
}


def on_core(core: int, *, first: bool = False) -> Any:
    """What a child does before it starts: takes its core, and as far as it may, its place before other work."""

    def prepare() -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
        with contextlib.suppress(OSError):
            if first:
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
            os.nice(-10)
            Path("/proc/self/autogroup").write_text("-10")  # a session's nice counts only inside it

    return prepare


class TruthStub:
    """The server as a process of its own."""

    def __init__(self, built: Path, mode: Mode) -> None:
        pauses = [str(int(ms * 1000)) for ms in (mode.ttft_ms, mode.gap_ms)]
        self._process = subprocess.Popen(
            [built, str(mode.tokens), *pauses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=on_core(0, first=True),
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{self._process.stdout.readline().strip()}/v1"

    def truth(self) -> dict[str, Any]:
        """Ends it; what it did."""
        found: dict[str, Any] = json.loads(self._process.communicate()[0])
        return found


def build(folder: Path) -> Path:
    """The server, compiled."""
    subprocess.run(["gcc", "-O2", "-o", folder / "truth_stub", HERE / "truth_stub.c"], check=True)
    return folder / "truth_stub"


def measure(built: Path, mode: Mode, folder: Path) -> tuple[dict[str, float], str]:
    """All figures of one run, and what the client says of itself."""
    scenario = folder / "bars.toml"
    scenario.write_text(SCENARIO.format(tokens=mode.tokens))
    stub = TruthStub(built, mode)
    flags = {"target": stub.url, "concurrency": mode.streams, "queries": mode.queries, "out": folder / "run"}
    command = [sys.executable, "-m", "fanmark.loadgen.cli", "run", str(scenario), "--quiet", "--json"]
    client = subprocess.Popen(
        command + [f"--{name}={value}" for name, value in flags.items()],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=on_core(1),
    )
    _, status, used = os.wait4(client.pid, 0)
    client.returncode = os.waitstatus_to_exitcode(status)
    truth = stub.truth()
    if client.returncode or truth["calls"] != mode.queries:
        raise SystemExit(f"exit code {client.returncode}, {truth['calls']} of {mode.queries} calls")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    cpu_s = used.ru_utime + used.ru_stime
    found = {
        "CPU s": cpu_s,
        CPU: cpu_s / truth["chunks"] * 1e6,
        RATE: truth["chunks"] / truth["seconds"],
        MEMORY: used.ru_maxrss / 1024,
    }
    per_call = summary["arms"]["single"]["per_call"]
    for names, kind in ((TTFT_OFF, "ttft"), (GAP_OFF, "gap")):
        reported = per_call["ttft_s" if kind == "ttft" else "itl_s"]
        for name, quantile in zip(names, ("p50", "p99"), strict=True):
            if reported[quantile] is not None:
                found[name] = abs(reported[quantile] * 1e3 - truth[f"{kind}_ms"][quantile])
    return found, "; ".join([summary["client"]["verdict"], *summary["client"]["reasons"]])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=list(MODES), default=list(MODES))
    given = options.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # a connection is a file
    with tempfile.TemporaryDirectory() as scratch:
        built = build(Path(scratch))
        for name in given.only:
            mode, rounds = MODES[name], []
            for i in range(given.rounds):
                folder = Path(scratch) / f"{name}-{i}"
                folder.mkdir()
                rounds.append(measure(built, mode, folder))
            paced = f", first after {mode.ttft_ms:g} ms, then every {mode.gap_ms:g} ms" if mode.gap_ms else ""
            print(f"{name}: {mode.queries:,} replies of {mode.tokens} chunks on {mode.streams:,} streams{paced}")
            for bar, (must, target) in BARS[name].items():
                values = "  ".join(f"{found[bar]:10,.2f}" for found, _ in rounds)
                print(f"  {bar:24}{values}   must {must:,}, target {target:,}")
            print(f"  {'client':24}{' | '.join(sorted({said for _, said in rounds}))}", flush=True)


if __name__ == "__main__":
    main()
