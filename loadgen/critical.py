"""What a query's latency was spent on, from its records alone. Pure."""

import math
from collections.abc import Mapping

from fanmark.loadgen.records import Query, critical_path
from fanmark.loadgen.retries import lost_s

PARTS = ("waiting", "prefill", "decode", "tools", "client")


def spent_s(query: Query) -> dict[str, float]:
    """Seconds of the query's latency by part; they add up to it. Along the critical path: `waiting` is between due and sent, and between
    attempts; `prefill` between sent and the first token, the server's queue included; `decode` from there to the last token; `tools` the
    tool calls. `client` is the rest: what lies between the path's calls and before the first."""
    lost = lost_s(query.retried)
    found = dict.fromkeys(PARTS, 0.0)
    for call in critical_path(query.needed, lost):
        found["waiting"] += lost.get(call.call, 0.0)
        if call.sent_at is None or call.done_at is None:
            continue
        found["waiting"] += call.sent_at - call.due_at
        if call.kind == "tool_call":
            found["tools"] += call.seconds
            continue
        first_at = call.done_at if call.first_at is None else call.first_at
        found["prefill"] += first_at - call.sent_at
        found["decode"] += call.done_at - first_at
    found["client"] = query.done_at - query.due_at - math.fsum(found.values())
    return found


def shares(spent: Mapping[str, float]) -> dict[str, float] | None:
    """By part, its share of the latency of all queries, `spent` on it in sum; None where there is none."""
    total_s = math.fsum(spent.values())
    return {name: spent[name] / total_s for name in PARTS} if total_s else None
