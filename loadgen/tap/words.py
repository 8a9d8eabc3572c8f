"""What a tapped run says beside what any run does: how its queries are spread, and how calls were found to be one query. Pure."""

from collections.abc import Mapping
from typing import Any

from fanmark.loadgen.tap.ids import METHODS

SPREAD = (
    ("calls", "calls"), ("tool_calls", "tool calls"), ("input_tokens", "input tokens"), ("cached_tokens", "  cached"),
    ("fresh_tokens", "  fresh"), ("output_tokens", "output tokens"), ("depth", "depth"), ("width", "width"), ("latency_s", "latency, s"),
)  # fmt: skip
METHOD = {
    "header": "X-Fanmark-Query",
    "baggage": "W3C baggage",
    "traceparent": "traceparent",
    "session": "session header",
    "metadata": "session in the body",
    "prompt_cache_key": "prompt_cache_key",
    "user": "user",
    "content": "content",
    "none": "not attributed",
}


def tables(summary: Mapping[str, Any], number: Any) -> dict[str, list[list[str]]]:
    """Both tables by their titles; none where nothing was tapped."""
    if "tap" not in summary:
        return {}
    return {
        "How queries are spread": spread_rows(summary, number),
        "How calls were found to be one query": attribution_rows(summary, number),
    }


def spread_rows(summary: Mapping[str, Any], number: Any) -> list[list[str]]:
    """Quantiles of what a tapped query takes, below a row of titles; those without support are dashes."""
    per_query = next(arm for arm in summary["arms"].values() if arm["baseline"])["per_query"]
    rows = [["a query", "mean", "p50", "p90", "p99", "max"]]
    for name, title in SPREAD:
        found = per_query[name]
        if found is not None:
            rows.append([title, *(number(found[key]) for key in ("mean", "p50", "p90", "p99", "max"))])
    return rows


def attribution_rows(summary: Mapping[str, Any], number: Any) -> list[list[str]]:
    """Calls and tool calls by the method by which they were attributed, with its share, below a row of titles."""
    kinds = summary["tap"]["attributed"]
    rows = [["attributed by", "calls", "", "tool calls", ""]]
    for method in METHODS:
        row = [METHOD[method]]
        for kind in ("call", "tool_call"):
            whole, mine = sum(kinds[kind].values()), kinds[kind].get(method, 0)
            row += [number(mine), f"{mine / whole:.1%}" if whole else "-"]
        if any(kinds[kind].get(method) for kind in kinds):
            rows.append(row)
    return rows


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What else is to be known of how it was recorded, a line each."""
    tap = summary["tap"]
    found = {
        f"{tap['by_time']} calls and tool calls do not show what they waited for: they count as after the call at whose end nothing of "
        "their query was in flight": tap["by_time"],
        f"{tap['reopened']} queries went on after they had ended: --idle above {tap['idle_s']:g} keeps them whole": tap[
            "reopened"
        ],
        f"{tap['unread']} requests could not be read: they passed, and are in no count": tap["unread"],
        f"{tap['untold']} requests passed while the recording was late, and were not recorded, or not their "
        "replies: true figures are higher, and queries with such a call count as failed (untold)": tap["untold"],
    }
    if tap["lengths"] == "counted in part":
        found[
            f"the target did not count {tap['by_size']} messages in time: their lengths are shared out by their size"
        ] = True
    return [text for text, count in found.items() if count]
