"""Distributions and intervals. Pure; numpy is imported when first used, which is after the run."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from heapq import merge
from itertools import islice
from types import MappingProxyType
from typing import Any

from fanmark.loadgen.records import bucket_gap_s

SUPPORT = {"p50": 1, "p90": 29, "p99": 299}  # the fewest samples that give the quantile
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
RESAMPLES = 2000
LEAST_SESSIONS = 50  # over 25 an interval held the truth in 87 %, over 60 in 92 % (docs/method.md)
PAIRED = "paired bootstrap over "
Z_95 = 1.959964
_SORTED_AT_ONCE = 50_000
_DRAWN_AT_ONCE = 100_000  # query numbers: what a bootstrap holds in memory does not grow with the queries

Distribution = dict[str, float | int | None]


def distribution(values: Iterable[float]) -> Distribution | None:
    """mean, p50, p90, p99, max, n of the values; a quantile without support is None, no values at all give None."""
    ordered = ascending(values)
    if not ordered:
        return None
    found: Distribution = {"mean": math.fsum(ordered) / len(ordered)}
    for name, q in QUANTILES.items():
        found[name] = _quantile(ordered, q) if len(ordered) >= SUPPORT[name] else None
    return found | {"max": ordered[-1], "n": len(ordered)}


def ascending(values: Iterable[float]) -> "array[Any]":
    """The values, sorted; whole numbers where all are. Of many there is never an object for each."""
    rest = iter(values)
    runs: list[array[Any]] = [array("q")]
    while chunk := sorted(islice(rest, _SORTED_AT_ONCE)):
        try:
            runs.append(array("q", chunk))
        except (TypeError, OverflowError):
            runs.append(array("d", chunk))
    if len(runs) == 2:
        return runs[1]
    return array("q" if all(run.typecode == "q" for run in runs) else "d", merge(*runs))


def gap_distribution(gaps: Mapping[int, int]) -> Distribution | None:
    """The same of pooled token gaps in log buckets (records.Gaps)."""
    n = sum(gaps.values())
    if n == 0:
        return None
    buckets = sorted(gaps)
    found: Distribution = {"mean": math.fsum(bucket_gap_s(b) * gaps[b] for b in buckets) / n}
    for name, q in QUANTILES.items():
        rank, seen = q * (n - 1), 0
        for bucket in buckets:
            seen += gaps[bucket]
            if seen > rank:
                break
        found[name] = bucket_gap_s(bucket) if n >= SUPPORT[name] else None
    return found | {"max": bucket_gap_s(buckets[-1]), "n": n}


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between order statistics, as numpy's default."""
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def paired_ratio(
    own: Mapping[int, float], base: Mapping[int, float], seed: int, sessions: Mapping[int, int] = MappingProxyType({})
) -> dict[str, Any] | None:
    """Ratio of means with a 95 % bootstrap interval. Query numbers are resampled, each with what both arms have of it: that takes
    out what the arms have in common, and a number that one arm did not complete still counts for the other. Queries of one of the
    `sessions` are resampled together, for a later one's prompt holds the earlier. No interval where an arm has fewer than two. None
    where the baseline's mean is 0 or an arm is empty."""
    if not own or not base:
        return None
    base_mean = math.fsum(base.values()) / len(base)
    if base_mean == 0:
        return None
    found: dict[str, Any] = {"ratio": math.fsum(own.values()) / len(own) / base_mean, "low": None, "high": None}
    too_few = found | {
        "method": f"fewer than {LEAST_SESSIONS} sessions, no interval" if sessions else "too few queries"
    }
    if min(len(own), len(base)) < 2:
        return too_few
    method = PAIRED + ("sessions" if sessions else "queries")
    if own == base:  # an arm against itself: each resample's ratio is 1
        return found | {"low": 1.0, "high": 1.0, "method": PAIRED + "queries"}
    interval = resampled([own], [base], seed, sessions)
    return too_few if interval is None else found | {"low": interval[0], "high": interval[1], "method": method}


def resampled(
    above: Sequence[Mapping[int, float]],
    below: Sequence[Mapping[int, float]],
    seed: int,
    sessions: Mapping[int, int] = MappingProxyType({}),
) -> tuple[float, float] | None:
    """95 % bootstrap interval of the product of the means `above` over that of those `below`, as `paired_ratio` has it; None where there
    is too little to resample."""
    import numpy as np

    parts = [*above, *below]
    numbers = sorted(set[int]().union(*parts))
    groups: dict[Any, list[int]] = {}
    for i in numbers if sessions else ():
        groups.setdefault(("session", sessions[i]) if i in sessions else i, []).append(i)
    if len(numbers) < 2 or (sessions and len(groups) < LEAST_SESSIONS):
        return None
    flat = (x for i in numbers for part in parts for x in (part.get(i, 0.0), i in part))
    each = np.fromiter(flat, float, 2 * len(parts) * len(numbers)).reshape(len(numbers), -1)
    rows = _summed(each, numbers, groups.values()) if sessions else each
    draw = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // len(rows))
    sums = [
        rows[draw.integers(0, len(rows), (min(at_once, RESAMPLES - done), len(rows)))].sum(axis=1)
        for done in range(0, RESAMPLES, at_once)
    ]
    columns = np.concatenate(sums).T
    totals, counts, n = columns[::2], columns[1::2], len(above)
    over = totals[:n].prod(axis=0) * counts[n:].prod(axis=0)
    under = totals[n:].prod(axis=0) * counts[:n].prod(axis=0)
    if not (under > 0).any():
        return None
    low, high = np.quantile(over[under > 0] / under[under > 0], [0.025, 0.975])
    return float(low), float(high)


def _summed(rows: Any, numbers: Sequence[int], groups: Iterable[Sequence[int]]) -> Any:
    """The rows of each group in one."""
    import numpy as np

    place = {number: i for i, number in enumerate(numbers)}
    return np.array([rows[[place[i] for i in group]].sum(axis=0) for group in groups])


def by_repeats(own: Sequence[float], base: Sequence[float], ratio: float) -> tuple[float, float]:
    """95 % interval about a ratio from the means of each repeat: Student's t on the logarithms of their ratios. It lies about the ratio of
    all repeats together, since the mean of the logarithms is off by as much as a crowd hits one arm harder than the other."""
    logs = [math.log(a / b) for a, b in zip(own, base, strict=True)]
    middle = math.fsum(logs) / len(logs)
    variance = math.fsum((x - middle) ** 2 for x in logs) / (len(logs) - 1)
    half = student_t(len(logs) - 1) * math.sqrt(variance / len(logs))
    return ratio * math.exp(-half), ratio * math.exp(half)


def ratio_interval(own: tuple[int, float, float], base: tuple[int, float, float]) -> tuple[float, float]:
    """95 % interval of the ratio of two independent means, each from its number of values, their sum and the sum of their squares: normal
    on the logarithm, its variance by the delta method."""
    log, variance = 0.0, 0.0
    for sign, (n, total, squares) in ((1.0, own), (-1.0, base)):
        mean = total / n
        log += sign * math.log(mean)
        variance += max(0.0, squares / n - mean * mean) / (n - 1) / (mean * mean)
    half = Z_95 * math.sqrt(variance)
    return math.exp(log - half), math.exp(log + half)


Batched = Mapping[int, tuple[int, float]]  # by query number, the batch that it falls into and its value


def by_batches(own: Batched, base: Batched, count: int) -> tuple[float, float]:
    """95 % interval of the ratio of two means from `count` batches that both arms have at the same times: Student's t on its logarithm.

    Let x be an arm's values over their mean, less 1. The variance is that of the batches' sums of x in one arm less those in the other, so
    that what moves both at a time falls out; less what queries of one number have in common though they fell into different batches; and
    at least what it would be if queries were independent but for their numbers."""
    own_mean, base_mean = (math.fsum(value for _, value in arm.values()) / len(arm) for arm in (own, base))
    own_off = {i: (batch, value / own_mean - 1) for i, (batch, value) in own.items()}
    base_off = {i: (batch, value / base_mean - 1) for i, (batch, value) in base.items()}
    sums = [0.0] * count
    for off, sign in ((own_off, 1 / len(own)), (base_off, -1 / len(base))):
        for batch, x in off.values():
            sums[batch] += sign * x
    by_time = math.fsum(x * x for x in sums) * count / (count - 1)
    common = [(a, b) for i, a in own_off.items() if (b := base_off.get(i)) is not None]
    pairs = len(own) * len(base)
    elsewhere = math.fsum(a[1] * b[1] for a, b in common if a[0] != b[0]) / pairs
    alone = math.fsum(x * x for _, x in own_off.values()) / len(own) ** 2
    alone += math.fsum(x * x for _, x in base_off.values()) / len(base) ** 2
    alone -= 2 * math.fsum(a[1] * b[1] for a, b in common) / pairs
    half = max(
        student_t(count - 1) * math.sqrt(max(by_time - 2 * elsewhere, by_time / 4)), Z_95 * math.sqrt(max(alone, 0.0))
    )
    middle = math.log(own_mean / base_mean)
    return math.exp(middle - half), math.exp(middle + half)


def student_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def wilson(successes: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); of so many independent ones, which need not be whole."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def occupancy(spans: Iterable[tuple[float, float]], start_at: float, end_at: float) -> dict[str, float]:
    """Mean and max of how many spans (from, to) are open between two instants."""
    starts, ends = array("d"), array("d")
    for a, b in spans:
        if b > start_at and a < end_at:
            starts.append(max(a, start_at))
            ends.append(min(b, end_at))
    open_s = math.fsum(b - a for a, b in zip(starts, ends, strict=True))
    starts = ascending(starts)
    ends = ascending(ends)
    ended = most = 0
    for begun, at in enumerate(starts, 1):
        while ended < len(ends) and ends[ended] <= at:
            ended += 1
        most = max(most, begun - ended)
    return {"mean": open_s / max(end_at - start_at, 1e-9), "max": most}
