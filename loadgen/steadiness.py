"""Was the system steady while it was counted, and did it keep up with its arrivals? Judged from the records alone. Pure."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import CallKind, QueryKind, Rows, in_flight
from fanmark.loadgen.statistics import occupancy

HALVES_APART = 0.10  # calls in flight, or KV use, may differ by so much of their mean between the window's halves
KV_LEAST = 0.01  # a KV use that differs by less than this share of the whole cache does not differ
LITTLE_OFF = 0.05  # L and lambda x W may differ by so much
LEAST_LATENCIES = 5.0  # a window is at least so many mean query latencies long

# Over capacity: by the order of their due times latencies rise, by more than chance; a part of what arrived in the window is still there at
# its end, on top of what was there before; and that part is large, or the later half's latencies are longer by more than a trifle. Where
# most were abandoned there is nothing to rank: then a large part that is left says it all.
RISE_Z = 3.0
LEFT_SHARE, LARGE_SHARE = 0.05, 0.2
RISE_HALVES = 1.1
_LOOKED_AT = 2000  # queries, evenly chosen


@dataclass(frozen=True)
class Verdict:
    """On one arm in one window. `steady` None: not knowable."""

    steady: bool | None
    reason: str
    littles_law_off_pct: float | None
    over_capacity: bool = False


def judge(
    queries: Rows[QueryKind],
    beside: Rows[QueryKind],
    calls: Rows[CallKind],
    window: Window,
    kv: Sequence[tuple[float, float]] | None = None,
    *,
    open_loop: bool,
) -> Verdict:
    """`queries` are all of the arm's, `beside` all of the arms that shared the window and `calls` theirs, lead-in and lead-out included.
    `kv` is KV use between 0 and 1 at instants, None where no server told it."""
    counted = queries.where(lambda kind: not kind.warmup)
    if not len(counted):
        return Verdict(False, "no query was due in the window", None)
    mean_s = math.fsum(done_at - due_at for due_at, done_at in counted.rows("due_at", "done_at")) / len(counted)
    in_flight = occupancy(queries.rows("due_at", "done_at"), window.start_at, window.end_at)["mean"]
    by_rate = len(counted) / window.seconds * mean_s
    off = in_flight / by_rate - 1 if by_rate else None
    wrong = []
    over = open_loop and any(over_capacity(mine, window) for mine in beside.by(lambda kind: kind.arm).values())
    if over:
        wrong.append("over capacity: more arrives than is served, and latency has no mean")
    if window.given_up:
        wrong.append(
            f"the lead-in was given up after {window.start_at - window.lead_in_at:.0f} s, latency kept growing"
        )
    if window.seconds < window.start_at - window.lead_in_at:
        wrong.append(
            f"the window ({window.seconds:.0f} s) is shorter than its lead-in ({window.start_at - window.lead_in_at:.0f} s)"
        )
    if window.seconds < LEAST_LATENCIES * mean_s:
        wrong.append(
            f"the window ({window.seconds:.0f} s) is shorter than 5 mean query latencies ({mean_s:.1f} s each)"
        )
    halves = _halves_of_calls(calls, window)
    if _apart(*halves) > HALVES_APART:
        wrong.append(f"calls in flight {halves[0]:.3g} in its first half, {halves[1]:.3g} in its second")
    if (
        kv is not None
        and (use := _halves_of_samples(kv, window)) is not None
        and abs(use[1] - use[0]) > KV_LEAST
        and _apart(*use) > HALVES_APART
    ):
        wrong.append(f"KV use {use[0]:.1%} in its first half, {use[1]:.1%} in its second")
    if off is not None and abs(off) > LITTLE_OFF:
        wrong.append(f"L = {in_flight:.3g} queries in flight, lambda x W = {by_rate:.3g}")
    reason = (
        "; ".join(wrong)
        or f"calls in flight {halves[0]:.3g} and {halves[1]:.3g} in its halves, L = {in_flight:.3g}, lambda x W = {by_rate:.3g}"
    )
    return Verdict(not wrong, reason, None if off is None else 100.0 * off, over)


def over_capacity(queries: Rows[QueryKind], window: Window) -> bool:
    """Whether more of an arm arrived in the window than was served. One that was abandoned took longer than all that ended."""
    counted = queries.where(lambda kind: not kind.warmup)
    there = [
        sum(due_at <= at < done_at for due_at, done_at in queries.rows("due_at", "done_at"))
        for at in (window.start_at, window.end_at)
    ]
    left = there[1] - there[0]
    if left <= LEFT_SHARE * len(counted):
        return False
    by_due_at = sorted(
        (due_at, math.inf if kind.outcome == "abandoned" else done_at - due_at)
        for kind, mine in counted.kinds()
        for due_at, done_at in mine.rows("due_at", "done_at")
    )
    latencies_s = [latency_s for _, latency_s in by_due_at]
    large = left > LARGE_SHARE * len(counted)
    if large and 2 * latencies_s.count(math.inf) > len(counted):
        return True
    middle = len(latencies_s) // 2
    early, late = latencies_s[:middle], latencies_s[middle:]
    if not early or not (large or sum(late) / len(late) > RISE_HALVES * sum(early) / len(early)):
        return False
    return rise_z(latencies_s[:: -(-len(latencies_s) // _LOOKED_AT)]) > RISE_Z


def rise_z(values: Sequence[float]) -> float:
    """Mann-Kendall: how many standard deviations more pairs rise than fall, of values in the order of time."""
    n, excess = len(values), 0
    if n < 3:
        return 0.0
    seen: list[float] = []
    for value in values:
        excess += bisect.bisect_left(seen, value) - (len(seen) - bisect.bisect_right(seen, value))
        bisect.insort(seen, value)
    return excess / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def _halves_of_calls(calls: Rows[CallKind], window: Window) -> tuple[float, float]:
    middle = window.start_at + window.seconds / 2
    halves = ((window.start_at, middle), (middle, window.end_at))
    first, second = (occupancy(in_flight(calls), a, b)["mean"] for a, b in halves)
    return first, second


def _halves_of_samples(samples: Sequence[tuple[float, float]], window: Window) -> tuple[float, float] | None:
    middle = window.start_at + window.seconds / 2
    halves = [[v for at, v in samples if a <= at < b] for a, b in ((window.start_at, middle), (middle, window.end_at))]
    return None if not all(halves) else (math.fsum(halves[0]) / len(halves[0]), math.fsum(halves[1]) / len(halves[1]))


def _apart(first: float, second: float) -> float:
    """How far two means lie apart, as a share of the mean of both."""
    return abs(second - first) / ((first + second) / 2) if first + second else 0.0
