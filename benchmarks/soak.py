"""Does a run's memory grow with the calls that it has made? An hour's worth of them, as fast as the client can.

usage: python benchmarks/soak.py [--calls N] [--virtual]

`fanmark run` drives a single pass and a debate (9 calls a query, each reading the answers before) in a closed loop against
truth_stub.c, until N calls are made (an hour at 100 a second); with --virtual `fanmark simulate` does, on the engine model. 6,000 calls
stand for a minute: printed is the memory then, and at the end how far above the first minute are the last one, the most that the command
ever held, with the summary, the report and all that they are made of, and the most that `fanmark verify` holds of the folder.
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


def most_mb(process: subprocess.Popen[bytes]) -> float:
    """The most that a process held, once it has ended."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_maxrss / 1024


def by_minute(client: "subprocess.Popen[bytes]", journal: Path, most_calls: int) -> list[float]:
    """Its memory each minute while calls go on; summing up apart."""
    while not journal.exists():
        time.sleep(0.05)
    found: list[float] = []
    calls = 0
    with journal.open("rb") as lines:
        while client.poll() is None and calls < most_calls - CALLS_A_MINUTE:
            time.sleep(0.1)
            calls += sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
            while len(found) < calls // CALLS_A_MINUTE:
                found.append(memory_mb(client.pid))
                print(f"minute {len(found):3}  {found[-1]:6.1f} MB", flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--calls", type=int, default=60 * CALLS_A_MINUTE)
    options.add_argument("--virtual", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        scenario, out = folder / "soak.toml", folder / "run"
        scenario.write_text(SCENARIO.format(queries=given.calls // CALLS_A_PAIR))
        fanmark = [sys.executable, "-m", "fanmark.loadgen.cli"]
        stub = None if given.virtual else TruthStub(build(folder), Mode(144, given.calls, 8, 5, 1))
        flags = ["simulate"] if stub is None else ["run", "--quiet", f"--target={stub.url}"]
        started_s = time.monotonic()
        client = subprocess.Popen(
            [*fanmark, *flags, str(scenario), f"--out={out}"], stdout=subprocess.DEVNULL, preexec_fn=on_core(1)
        )
        memory = by_minute(client, out / "calls.jsonl", given.calls)
        seconds = time.monotonic() - started_s
        most = most_mb(client)
        if stub is not None:
            stub.truth()
        verifying = subprocess.Popen([*fanmark, "verify", str(out)], stdout=subprocess.DEVNULL)
        verified = most_mb(verifying)
    print(f"{given.calls:,} calls, {given.calls / seconds:,.0f} a second, exit code {client.returncode}")
    print(f"last minute above the first: {memory[-1] - memory[0]:.1f} MB (must 50)")
    print(f"most ever held: {most:.1f} MB, {most - memory[0]:.1f} MB above the first minute (must 50)")
    print(f"fanmark verify: {verified:.1f} MB at most, exit code {verifying.returncode}")


if __name__ == "__main__":
    main()
