"""A queue whose truth is known by long runs, as a run's records: two arms share `servers` first come, first served. A query of `single` is
one call, one of `chain` three in a row; half of a call's length is its query's own, the same in both arms."""

import random
from functools import partial
from heapq import heapify, heappop, heappush, heapreplace

from fanmark.loadgen.amplification import Counted
from fanmark.loadgen.records import Call, Phase, Query, Window
from fanmark.loadgen.reduced import QueryKind, reduced
from fanmark.loadgen.steadiness import judge

CHAIN = {"single": 1, "chain": 3}
SHAPE = 4.0  # of the calls' gamma distribution: coefficient of variation 0.5, mean 1 s


def crowd(
    seed: str, busy: float, servers: int, lead_in_s: float, window_s: float, repeat: int = 1, first: int = 0
) -> dict[str, list[Query]]:
    """The queries of a repeat, by arm, numbered from `first`. `busy`: how much arrives, as a share of what the servers can do."""
    rng = random.Random(f"{seed}/{repeat}")
    rate = busy * servers / sum(CHAIN.values())
    parts: list[tuple[Phase, float, float]] = [
        ("lead-in", 0.0, lead_in_s),
        ("window", lead_in_s, lead_in_s + window_s),
        ("lead-out", lead_in_s + window_s, 2 * lead_in_s + window_s),
    ]
    waiting: list[tuple[float, int, Query, float]] = []
    found: dict[str, list[Query]] = {arm: [] for arm in CHAIN}
    for arm in CHAIN:
        for phase, start_at, end_at in parts:
            at, i = start_at + rng.expovariate(rate), 0
            while at < end_at:
                own_s = random.Random(f"{seed}/{repeat}/{phase}/{i}").gammavariate(SHAPE, 1 / SHAPE)
                number = first + i if phase == "window" else -1 - first - 2 * i - (phase == "lead-out")
                query = Query(
                    query=number, arm=arm, warmup=phase != "window", phase=phase, repeat=repeat, due_at=at,
                    started_at=at, done_at=at, outcome="completed", resources={}, expected={}, mismatches=[], seed="",
                )  # fmt: skip
                found[arm].append(query)
                waiting.append((at, len(waiting), query, own_s))
                at, i = at + rng.expovariate(rate), i + 1
    _serve(waiting, servers, rng)
    return found


def _serve(waiting: list[tuple[float, int, Query, float]], servers: int, rng: random.Random) -> None:
    """Lets the calls through; each query gets its calls and its latency."""
    heapify(waiting)
    free_at = [0.0] * servers
    while waiting:
        at, order, query, own_s = heappop(waiting)
        done_at = max(at, free_at[0]) + 0.5 * own_s + 0.5 * rng.gammavariate(SHAPE, 1 / SHAPE)
        heapreplace(free_at, done_at)
        query.calls.append(
            Call(
                query=query.query,
                arm=query.arm,
                call=len(query.calls) + 1,
                after=[],
                kind="call",
                role="",
                round=1,
                due_at=at,
                sent_at=at,
                done_at=done_at,
            )
        )
        if len(query.calls) < CHAIN[query.arm]:
            heappush(waiting, (done_at, order, query, own_s))
        else:
            query.done_at = done_at
            query.resources = {"latency_s": done_at - query.due_at}


def counted(seed: str, busy: float, servers: int, lead_in_s: float, window_s: float, repeats: int = 1) -> list[Counted]:
    """What a summary is made of, of `chain` and of `single`."""
    queries: dict[str, list[Query]] = {arm: [] for arm in CHAIN}
    windows, verdicts = [], {arm: [] for arm in CHAIN}  # type: ignore[var-annotated]
    first = 0
    for repeat in range(1, repeats + 1):
        found = crowd(seed, busy, servers, lead_in_s, window_s, repeat, first)
        window = Window(
            repeat=repeat, arms=list(CHAIN), lead_in_at=0.0, start_at=lead_in_s, end_at=lead_in_s + window_s
        )
        windows.append(window)
        both = reduced([*found["single"], *found["chain"]])
        for arm, mine in found.items():
            own = both.queries.where(partial(_of_arm, name=arm))
            verdicts[arm].append(judge(own, both.queries, both.calls, window, open_loop=True))
            queries[arm] += [q for q in mine if not q.warmup]
        first += max(sum(not q.warmup for q in mine) for mine in found.values())
    return [Counted(reduced(queries[arm]).queries, windows, verdicts[arm]) for arm in ("chain", "single")]


def _of_arm(kind: QueryKind, name: str) -> bool:
    return kind.arm == name


def truth(busy: float, servers: int, seconds: float) -> tuple[float, float]:
    """Of one long run: the ratio of the mean latencies, and the p90 of the longer one."""
    found = crowd("truth", busy, servers, 200.0, seconds)
    latencies = {arm: sorted(q.done_at - q.due_at for q in mine if not q.warmup) for arm, mine in found.items()}
    means = {arm: sum(mine) / len(mine) for arm, mine in latencies.items()}
    return means["chain"] / means["single"], latencies["chain"][int(0.9 * len(latencies["chain"]))]
