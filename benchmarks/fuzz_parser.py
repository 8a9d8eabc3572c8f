"""Mutated and re-split streams through the parsers of the HTTP lanes; the streams and what must hold of them are in tests/stream_fuzz.py.

usage: python benchmarks/fuzz_parser.py [--streams N] [--seed S] [--processes N]

Printed: how many streams, what they came to by class, and the seconds. A finding is printed with its number and seed, and the exit is 1.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import stream_fuzz

BLOCK = 2_000


def check_block(given: tuple[int, int, int]) -> tuple[Counter[str], list[str]]:
    """Outcomes by class of one block of numbers, and what was found."""
    seed, first, last = given
    streams = stream_fuzz.recorded()
    outcomes: Counter[str] = Counter()
    findings = []
    for number in range(first, last):
        try:
            outcomes[stream_fuzz.check(number, seed, streams)] += 1
        except Exception as e:
            findings.append(f"stream {number} of seed {seed}: {type(e).__name__}: {e}"[:1000])
    return outcomes, findings


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--streams", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = options.parse_args()
    blocks = [(given.seed, i, min(i + BLOCK, given.streams)) for i in range(0, given.streams, BLOCK)]
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    started_s = time.monotonic()
    with multiprocessing.Pool(given.processes) as pool:
        for found, wrong in pool.imap_unordered(check_block, blocks):
            outcomes += found
            findings += wrong
    seconds = time.monotonic() - started_s
    print(f"{given.streams:,} streams of seed {given.seed} in {seconds:.0f} s, {len(findings)} findings")
    for kind, times in outcomes.most_common():
        print(f"  {kind:13} {times:9,}")
    print("\n".join(findings[:20]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
