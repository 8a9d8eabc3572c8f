"""A Mooncake-like trace of so many requests, imported and replayed in virtual time: how long it takes, and in how much memory.

    python benchmarks/replay_trace.py 100000      # each step is a process of its own, whose peak memory is told

The trace: a shared first block, conversations whose prompts grow block by block, single requests between them; Poisson arrivals. Prompts
are short (about 900 tokens), for it is the bookkeeping that is measured.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK = 512
RUN = """
import resource, sys
from fanmark.loadgen import cli
sys.argv = ["fanmark", *sys.argv[1:]]
try:
    cli.main()
finally:
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", file=sys.stderr)
"""


def rows(n: int, rate: float, seed: int = 1) -> Iterator[dict[str, object]]:
    """Requests in the order of their arrivals."""
    rng, at, next_block = random.Random(seed), 0.0, 1
    open_conversations: list[list[int]] = []
    for _ in range(n):
        at += rng.expovariate(rate)
        blocks = [0]
        if open_conversations and rng.random() < 0.6:
            blocks = open_conversations.pop(rng.randrange(len(open_conversations)))
        blocks = [*blocks, next_block]  # the last is not full: as it goes on, it is another
        next_block += 2
        if len(blocks) < 4 and len(open_conversations) < 200:
            open_conversations.append([*blocks[:-1], next_block - 1])
        length = BLOCK * (len(blocks) - 1) + rng.randint(1, BLOCK)
        yield {
            "timestamp": round(at * 1000), "input_length": length, "output_length": rng.randint(1, 64),
            "hash_ids": blocks,
        }  # fmt: skip


def timed(*arguments: str) -> None:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if line.startswith("peak")]
    print(
        f"{arguments[0]}: {time.perf_counter() - started:.0f} s, {told[0] if told else done.stderr[-500:]}", flush=True
    )
    print("\n".join(f"    {line}" for line in done.stdout.splitlines()[:9]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("requests", type=int)
    parser.add_argument("--rate", type=float, default=40.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "trace.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(args.requests, args.rate))
        (folder / "replay.toml").write_text(
            'name = "replay"\n[stub]\napi = "completions"\n[[arm]]\nname = "trace"\ntopology = "replay"\npath = "trace"\nbaseline = true\n'
            '[load]\nprocess = "replay"\nwarmup = 0\n'
        )
        timed("import", "mooncake", str(folder / "trace.jsonl"), "--out", str(folder / "trace"))
        timed("simulate", str(folder / "replay.toml"), "--out", str(folder / "run"))


if __name__ == "__main__":
    main()
