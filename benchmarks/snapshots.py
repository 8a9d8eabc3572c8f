"""How far one driver goes: what the snapshots of 1,000 workers weigh, and what adding them up costs it.

    python benchmarks/snapshots.py [--workers 1000] [--seconds 30] [--kinds 20] [--full buckets|all]

All in this process: each worker's tally is filled with calls as a run would fill it (three arms, two targets, eight tools, times that
spread widely), packed and pickled each second. What is timed, in CPU time, is the driver's part: reading a second's snapshots, and adding
them up. The goal is 50 ms for adding up 1,000, and a driver whose memory does not grow with the run. `--kinds`: so many workers are filled,
and the others tell the same as one of them. `--full` begins where no run gets: `buckets` with every log bucket of every counter met, from a
microsecond to a day, which is all that can grow with time; `all` with as many roles and tools made up as are told apart, too.
"""

import argparse
import pickle
import random
import resource
import time

from fanmark.loadgen.health import ClientState
from fanmark.loadgen.link import pickled, snapshot
from fanmark.loadgen.metrics import CALL_OUTCOMES, TOOL_OUTCOMES
from fanmark.loadgen.records import Call, Query, gap_bucket
from fanmark.loadgen.sums import Packer, Sums
from fanmark.loadgen.tally import MOST_NAMES, SECONDS, Histogram, Tally

ARMS = {"single": "single", "debate": "debate", "mcp-chain": "tool-chain"}
GOAL_S = 0.050
DAY_S = 86_400.0


def second_of(rng: random.Random, tally: Tally, state: ClientState, number: int) -> None:
    """What a worker does in a second: two queries of each arm, with ten calls and a tool call each."""
    for arm in ARMS:
        for query in (2 * number, 2 * number + 1):
            tally.query_started(arm)
            for n in range(10):
                first_s, all_s = rng.lognormvariate(-2, 0.6), rng.lognormvariate(0.5, 0.6)
                call = Call(
                    query=query, arm=arm, call=n, after=[], kind="call", role=f"agent-{n % 4}", round=1,
                    target=("small", "big")[n % 2], due_at=0.0, sent_at=rng.lognormvariate(-8, 1), first_at=first_s,
                    done_at=first_s + all_s, input_tokens=800, cached_tokens=400, output_tokens=200,
                    gaps={gap_bucket(rng.lognormvariate(-4, 0.2)): 20 for _ in range(10)},
                )  # fmt: skip
                tally.call_started(call)
                tally.call_finished(call)
            tool = Call(
                query=query, arm=arm, call=10, after=[9], kind="tool_call", role="agent", round=1, bytes=900,
                tool=f"tool-{rng.randrange(8)}", due_at=0.0, sent_at=0.0, done_at=rng.lognormvariate(-2, 0.5),
            )  # fmt: skip
            tally.call_started(tool)
            tally.call_finished(tool)
            known = {"latency_s": rng.lognormvariate(1.5, 0.5), "calls": 10.0, "tool_calls": 1.0, "work_s": 9.0}
            tokens = {"input_tokens": 8e3, "cached_tokens": 4e3, "fresh_tokens": 4e3, "output_tokens": 2e3}
            tally.query_finished(
                Query(
                    query=query,
                    arm=arm,
                    warmup=False,
                    due_at=0.0,
                    started_at=0.0,
                    done_at=5.0,
                    outcome="completed",
                    resources=known | tokens | {"reasoning_tokens": None},
                    expected={"calls": 10},
                    mismatches=[],
                    seed="",
                )
            )
    for _ in range(20):
        state.loop_lag[gap_bucket(rng.lognormvariate(-8, 0.5))] += 1


def fill(tally: Tally, state: ClientState, *, names: bool) -> None:
    """All that can ever be counted, once."""
    buckets = range(gap_bucket(0.0), gap_bucket(DAY_S) + 1)
    for counter in (
        state.loop_lag,
        tally.send_delay,
        tally.ttft,
        *(counter for arm in tally.arms.values() for counter in (arm.ttft, arm.latency)),
    ):
        counter.update(dict.fromkeys(buckets, 1))
    for arm in tally.arms.values() if names else ():
        for name in (f"made up {n}" for n in range(MOST_NAMES + 1)):
            arm.calls.update({(name, target, outcome): 1 for target in ("small", "big") for outcome in CALL_OUTCOMES})
            arm.tool_calls.update({(name, outcome): 1 for outcome in TOOL_OUTCOMES})
            arm.tool_bytes[name] += 1
            for times in (arm.tool_s, arm.tool_queued_s):
                times[name] = Histogram(SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--kinds", type=int, default=20)
    parser.add_argument("--full", choices=["buckets", "all"])
    given = parser.parse_args()
    rng, kinds = random.Random(7), given.kinds
    tallies = [Tally(ARMS, "single") for _ in range(kinds)]
    packers, states = [Packer(tally) for tally in tallies], [ClientState() for _ in range(kinds)]
    for tally, state in zip(tallies, states, strict=True) if given.full else ():
        fill(tally, state, names=given.full == "all")
    sums, whole, clients = Sums(), Tally(ARMS, "single"), dict[int, ClientState]()
    print(f"{given.workers} workers, 6 queries and 66 calls a second each")
    print("second  bytes a snapshot  pack, ms  read all, ms  add up, ms  held, MB")
    slowest_s = 0.0
    for second in range(1, given.seconds + 1):
        for tally, state in zip(tallies, states, strict=True):
            second_of(rng, tally, state, second)
        at = time.process_time()
        data = [pickled(snapshot(packer, state)) for packer, state in zip(packers, states, strict=True)]
        pack_s = (time.process_time() - at) / kinds
        at = time.process_time()
        for worker in range(given.workers):
            told = pickle.loads(data[worker % kinds])
            sums.take(worker, told.sums)
            clients[worker] = told.state
        read_s = time.process_time() - at
        at = time.process_time()
        sums.into(whole)
        add_s = time.process_time() - at
        slowest_s = max(slowest_s, add_s)
        if second in (1, 2, 3, 5, 10, 20, 50, 100, 200, 300, 500, 1_000, 2_000, 3_000) or second == given.seconds:
            size = sum(map(len, data)) / kinds
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{second:6} {size:17,.0f} {pack_s * 1e3:9.2f} {read_s * 1e3:13.1f} {add_s * 1e3:11.1f} {memory:9.0f}"
            )
    done = sum(arm.completed for arm in whole.arms.values())
    assert done == 6 * given.seconds * given.workers, done
    print(f"adding up: {slowest_s * 1e3:.1f} ms at most (the goal: {GOAL_S * 1e3:.0f} ms for 1,000 workers)")


if __name__ == "__main__":
    main()
