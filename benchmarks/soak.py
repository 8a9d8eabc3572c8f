"""Does a run's memory grow with the calls that it has made? An hour's worth of them, as fast as the client can.

usage: python benchmarks/soak.py [--calls N]

`fanmark run` drives a single pass and a debate (9 calls a query, each reading the answers before) in a closed loop against
truth_stub.c, until N calls are made (an hour at 100 a second). Every 6,000 calls stand for a minute: printed is the memory then, and at the
end how far the last minute lies above the first while calls go on, and the most that the command ever held, summing up included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bars import Mode, TruthStub, build, on_core

CALLS_A_MINUTE = 6_000
CALLS_A_PAIR = 10  # a query of either arm
SCENARIO = """name = "soak"
[workload]
system = 100
question = 50
answer = 8
instruction = 20
judge_instruction = 20
judge_answer = 8
[[arm]]
name = "single"
topology = "single"
baseline = true
[[arm]]
name = "debate"
topology = "debate"
[load]
mode = "closed"
concurrency = 16
queries = {queries}
warmup = 0
"""


def memory_mb(pid: int) -> float:
    """What a process holds now; 0 where it has gone."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return 0.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--calls", type=int, default=60 * CALLS_A_MINUTE)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        scenario, journal = folder / "soak.toml", folder / "run" / "calls.jsonl"
        scenario.write_text(SCENARIO.format(queries=given.calls // CALLS_A_PAIR))
        stub = TruthStub(build(folder), Mode(144, given.calls, 8, 5, 1))
        command = [sys.executable, "-m", "fanmark.loadgen.cli", "run", str(scenario), "--quiet"]
        client = subprocess.Popen(
            [*command, f"--target={stub.url}", f"--out={journal.parent}"],
            stdout=subprocess.DEVNULL,
            preexec_fn=on_core(1),
        )
        while not journal.exists():
            time.sleep(0.05)
        by_minute: list[float] = []
        calls, started_s = 0, time.monotonic()
        with journal.open("rb") as lines:
            while client.poll() is None and calls < given.calls - CALLS_A_MINUTE:  # summing up apart
                time.sleep(0.1)
                calls += sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
                while len(by_minute) < calls // CALLS_A_MINUTE:
                    by_minute.append(memory_mb(client.pid))
                    print(f"minute {len(by_minute):3}  {by_minute[-1]:6.1f} MB", flush=True)
        seconds = time.monotonic() - started_s
        _, status, used = os.wait4(client.pid, 0)
        client.returncode = os.waitstatus_to_exitcode(status)
        truth = stub.truth()
    print(f"{truth['calls']:,} calls, {calls / seconds:,.0f} a second, exit code {client.returncode}")
    print(f"last minute above the first: {by_minute[-1] - by_minute[0]:.1f} MB (must 50)")
    print(f"most ever held, summing up included: {used.ru_maxrss / 1024:.1f} MB")


if __name__ == "__main__":
    main()
