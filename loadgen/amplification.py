"""An arm's cost of a query against the baseline's: one ratio for each resource, with an interval of its kind. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanmark.loadgen.records import Query, Window
from fanmark.loadgen.statistics import Batches, by_batches, by_repeats, paired_ratio
from fanmark.loadgen.steadiness import Verdict
from fanmark.loadgen.window import p90

LEAST_REPEATS = 5
LEAST_BATCHES, MOST_BATCHES = 10, 20
BATCH_LATENCIES = 2.0  # a batch is at least so many times the p90 query latency long
NO_INTERVAL = "one short run, no interval"

COUNTS = (
    "calls",
    "tool_calls",
    "input_tokens",
    "cached_tokens",
    "fresh_tokens",
    "output_tokens",
    "reasoning_tokens",
    "depth",
    "width",
    "retries",
    "dollars",
)
TIMES = (
    "latency_s",
    "first_answer_s",
    "work_s",
    "critical_path_s",
    "tool_s",
    "client_s",
    "limited_s",
    "parallelism",
    "gpu_s",
    "joules",
)


@dataclass(frozen=True)
class Counted:
    """An arm's counted queries, its windows and the verdicts on them."""

    queries: Sequence[Query]
    windows: Sequence[Window]
    verdicts: Sequence[Verdict]

    @property
    def over_capacity(self) -> bool:
        """Whether more arrived than was served, in a repeat or in all."""
        return any(verdict.over_capacity for verdict in self.verdicts)


def amplification(arm: Counted, base: Counted, name: str, seed: int, *, interleaved: bool) -> dict[str, Any] | None:
    """Ratio of the means per completed query, what failed queries and retries spent included."""
    own, own_waste = _costs(arm.queries, name)
    against, base_waste = _costs(base.queries, name)
    if own is None or against is None:
        return None
    if name in TIMES:
        return _of_times(arm, base, name, own, against, seed, interleaved=interleaved)
    found = paired_ratio(own, against, seed)
    if found is None:
        return None
    factor = own_waste / base_waste
    found["ratio"] *= factor
    if found["low"] is not None:
        found |= {"low": found["low"] * factor, "high": found["high"] * factor}
    return found


def _of_times(
    arm: Counted,
    base: Counted,
    name: str,
    own: Mapping[int, float],
    against: Mapping[int, float],
    seed: int,
    *,
    interleaved: bool,
) -> dict[str, Any] | None:
    """A ratio of times: queries that meet in the server are not independent, so they alone say little of how far it may be off."""
    if not own or not against or not math.fsum(against.values()):
        return None
    if arm.over_capacity or base.over_capacity:
        return {"ratio": None, "low": None, "high": None, "method": "over capacity"}
    ratio = math.fsum(own.values()) / len(own) / (math.fsum(against.values()) / len(against))
    found: dict[str, Any] = {"ratio": ratio, "low": None, "high": None, "method": NO_INTERVAL}
    if arm is base:
        return found | {"low": 1.0, "high": 1.0, "method": "the baseline itself"}
    means = [_by_repeat(each, name) for each in (arm, base)]
    repeats = [r for r in means[0] if means[0][r] > 0 and means[1].get(r, 0) > 0]
    if len(repeats) >= LEAST_REPEATS:
        low, high = by_repeats([means[0][r] for r in repeats], [means[1][r] for r in repeats])
        return found | {"low": low, "high": high, "method": f"t over {len(repeats)} repeats"}
    batches = _batches(arm, base, name)
    if batches is not None:
        low, high = by_batches(*batches, paired=interleaved)
        return found | {"low": low, "high": high, "method": f"{len(batches[0])} batch means"}
    if interleaved and all(v.steady for each in (arm, base) for v in each.verdicts) and arm.verdicts and base.verdicts:
        return paired_ratio(own, against, seed)
    return found


def _by_repeat(counted: Counted, name: str) -> dict[int, float]:
    """The mean of each repeat."""
    values: dict[int, list[float]] = {}
    for query in counted.queries:
        if query.outcome == "completed":
            values.setdefault(query.repeat, []).append(query.resources[name] or 0.0)
    return {repeat: math.fsum(mine) / len(mine) for repeat, mine in values.items()}


def _batches(arm: Counted, base: Counted, name: str) -> tuple[Batches, Batches] | None:
    """Both arms' windows cut into batches of equal length, by due times; None where they are too few of a length that leaves them nearly
    independent."""
    long_s = BATCH_LATENCIES * max(
        (p90([q.done_at - q.due_at for q in each.queries]) for each in (arm, base) if each.queries), default=0.0
    )
    if not long_s:
        return None
    cut = [_cut(each, name, long_s) for each in (arm, base)]
    if min(map(len, cut)) < LEAST_BATCHES or not all(sum(total for total, _ in batches) > 0 for batches in cut):
        return None
    return cut[0], cut[1]


def _cut(counted: Counted, name: str, long_s: float) -> Batches:
    found: list[tuple[float, int]] = []
    for window in counted.windows:
        count = min(int(window.seconds / long_s), -(-MOST_BATCHES // len(counted.windows)))
        values: list[list[float]] = [[] for _ in range(count)]
        for query in counted.queries:
            if count and query.repeat == window.repeat and query.outcome == "completed":
                place = int((query.due_at - window.start_at) / window.seconds * count)
                values[min(place, count - 1)].append(query.resources[name] or 0.0)
        found += [(math.fsum(batch), len(batch)) for batch in values]
    return found


def _costs(queries: Sequence[Query], name: str) -> tuple[dict[int, float] | None, float]:
    """Values of the completed queries by number (None if one is unknown), and all queries' total over the completed ones'."""
    completed = {query.query: _cost(query, name) for query in queries if query.outcome == "completed"}
    known = {i: value for i, value in completed.items() if value is not None}
    if len(known) < len(completed):
        return None, 1.0
    total = math.fsum(known.values())
    if name not in COUNTS or name in ("depth", "width") or total == 0:
        return known, 1.0
    lost = math.fsum(_spent(query, name) for query in queries if query.outcome != "completed")
    return known, (total + lost) / total


def _cost(query: Query, name: str) -> float | None:
    """What a query cost, attempts that were sent again included: of those there are no tokens, as the server did nothing."""
    value = query.resources[name]
    return value if value is None or name != "calls" else value + len(query.retried)


def _spent(query: Query, name: str) -> float:
    """What a query that did not complete is known to have spent; of tokens at least those of its calls that ended."""
    value = _cost(query, name)
    if value is not None:
        return value
    if name == "fresh_tokens":
        return _spent(query, "input_tokens") - _spent(query, "cached_tokens")
    return math.fsum(getattr(call, name, None) or 0 for call in query.calls if call.kind == "call")
