"""An arm's cost of a query against the baseline's: one ratio for each resource, with an interval of its kind. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fanmark.loadgen.records import Query, Window
from fanmark.loadgen.statistics import paired_ratio
from fanmark.loadgen.steadiness import Verdict

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
    found = paired_ratio(own, against, seed)
    if found is None:
        return None
    factor = own_waste / base_waste
    found["ratio"] *= factor
    if name in TIMES and (arm.over_capacity or base.over_capacity):
        return {"ratio": None, "low": None, "high": None, "method": "over capacity"}
    if name in TIMES:
        return found | {"low": None, "high": None, "method": "one short run, no interval"}
    if found["low"] is not None:
        found |= {"low": found["low"] * factor, "high": found["high"] * factor}
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
