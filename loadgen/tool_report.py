"""The tools' part of summary.json, from records and from what the tool servers listed. Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fanmark.loadgen.records import Call, Query, critical_path
from fanmark.loadgen.saturation import line
from fanmark.loadgen.statistics import distribution


@dataclass(frozen=True, slots=True)
class Listing:
    """What a run's tools are: schemas as they go into a prompt, of all that the servers list and of those that are exposed; `tokens` that
    these add to a call's prompt, by target (None: not known)."""

    servers: int
    transport: str
    session: str
    listed: Sequence[Mapping[str, Any]]
    exposed: Sequence[Mapping[str, Any]]
    tokens: Mapping[str, int | None]


def tools_part(listing: Listing | None, queries: Iterable[Query]) -> dict[str, Any] | None:
    """`tools` of summary.json; None where no arm has any."""
    if listing is None:
        return None
    tokens = listing.tokens
    return {
        "servers": listing.servers,
        "transport": listing.transport,
        "session": listing.session,
        "listed": {"tools": len(listing.listed), "bytes": len(msgspec.json.encode(listing.listed))},
        "exposed": {
            "tools": len(listing.exposed),
            "bytes": len(msgspec.json.encode(listing.exposed)) if listing.exposed else 0,
            "tokens": next(iter(tokens.values())) if len(tokens) == 1 else dict(tokens),
        },
        "sessions": sessions(queries),
    }


def sessions(queries: Iterable[Query]) -> dict[str, Any]:
    """Sessions that calls had to start, warm-up included: with "shared", those that replaced a lost one; the run's own are not among
    them."""
    started = [call for query in queries for call in query.calls if call.opened_session]
    return {
        "count": len(started),
        "failed": sum(call.sent_at is None for call in started),
        "start_s": distribution([call.session_s for call in started if call.session_s is not None]),
    }


def by_tool(queries: Sequence[Query]) -> dict[str, Any]:
    """`by_tool` of an arm: over all its counted queries, as a tool's failure is told by those that failed. `refused`:
    calls of the model that were not made, by why. `critical_share` is the tool's
    part of the critical paths of the completed ones."""
    calls: dict[str, list[Call]] = defaultdict(list)
    for query in queries:
        for call in query.calls:
            if call.kind == "tool_call":
                calls[call.tool or "?"].append(call)
    critical_s, total_s = Counter[str](), 0.0
    for query in queries:
        if query.outcome == "completed":
            total_s += query.resources["critical_path_s"] or 0.0
            for call in critical_path(query.needed):
                if call.kind == "tool_call":
                    critical_s[call.tool or "?"] += call.seconds  # type: ignore[assignment]  # a Counter of floats
    return {
        tool: {
            "calls": sum(call.refused is None for call in mine),
            "refused": dict(Counter(call.refused for call in mine if call.refused is not None)),
            "errors": dict(Counter(call.error or "tool_error" for call in mine if call.error or call.tool_error)),
            "latency_s": distribution([call.seconds for call in mine if call.error is None and call.refused is None]),
            "queued_s": distribution([call.queued_s for call in mine if call.queued_s is not None]),
            "bytes": distribution([call.bytes for call in mine if call.bytes is not None]),
            "critical_share": critical_s[tool] / total_s if total_s else None,
        }
        for tool, mine in sorted(calls.items())
    }


def tool_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the tools weighed and how they did: a line for the listing, and one for each arm that called some."""
    part = summary.get("tools")
    if part is None:
        return []
    shown, started = part["exposed"], part["sessions"]
    tokens = shown["tokens"]
    weight = (
        "tokens by target" if isinstance(tokens, dict) else "tokens unknown" if tokens is None else f"{tokens:,} tokens"
    )
    text = f"tools    {shown['tools']} of {part['listed']['tools']} in the prompts: {shown['bytes']:,} bytes, {weight} a call"
    if started["count"]:
        failed = f", {started['failed']} failed" if started["failed"] else ""
        text += f"; {started['count']} sessions started in {started['start_s']['mean'] * 1e3:.1f} ms each{failed}"
    found = [text]
    for name, arm in summary["arms"].items():
        tools = arm["by_tool"]
        if not tools:
            continue
        calls = sum(tool["calls"] for tool in tools.values())
        text = f"{'':<8} {name}: {calls:,} calls of {sum(tool['calls'] > 0 for tool in tools.values())} tools"
        for key, word in (("latency_s", "on average"), ("queued_s", "of it in the server's queue")):
            known = [tool[key] for tool in tools.values() if tool[key] is not None]
            if known:
                mean_s = sum(each["mean"] * each["n"] for each in known) / sum(each["n"] for each in known)
                text += f", {mean_s * 1e3:,.1f} ms {word}"
        for key in ("errors", "refused"):
            told = Counter[str]()
            for tool in tools.values():
                told.update(tool[key])
            if told:
                text += f", {key}: " + ", ".join(f"{kind} {n}" for kind, n in sorted(told.items()))
        found.append(text)
        if arm.get("saturation") is not None and (arm["saturation"]["first"] or len(arm["saturation"]["levels"]) > 1):
            found.append(f"{'':<8} {name}: {line(arm['saturation'])}")
    return found
