"""The tools' part of summary.json, from records and from what the tool servers listed. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fanmark.loadgen.reduced import CallKind, Rows, on_critical_path_s, seconds
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


def tools_part(listing: Listing | None, calls: Rows[CallKind]) -> dict[str, Any] | None:
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
        "sessions": sessions(calls),
    }


def sessions(calls: Rows[CallKind]) -> dict[str, Any]:
    """Sessions that calls had to start, warm-up included: with "shared", those that replaced a lost one; the run's own are not among
    them."""
    started = calls.where(lambda kind: kind.opened_session)
    return {
        "count": len(started),
        "failed": len(started.where(lambda kind: not kind.sent)),
        "start_s": distribution(started.known("session_s")),
    }


def by_tool(calls: Rows[CallKind], critical_s: float) -> dict[str, Any]:
    """`by_tool` of an arm: over all its counted queries, as a tool's failure is told by those that failed. `refused`:
    calls of the model that were not made, by why. `critical_share` is the tool's part of the critical paths of the completed ones."""
    tools = calls.where(lambda kind: kind.kind == "tool_call").by(lambda kind: kind.tool or "?")
    return {tool: _tool(mine, critical_s) for tool, mine in sorted(tools.items())}


def _tool(calls: Rows[CallKind], critical_s: float) -> dict[str, Any]:
    refused = calls.where(lambda kind: kind.refused is not None)
    wrong = calls.where(lambda kind: kind.error is not None or kind.tool_error)
    return {
        "calls": len(calls) - len(refused),
        "refused": dict(refused.counts(lambda kind: kind.refused)),
        "errors": dict(wrong.counts(lambda kind: kind.error or "tool_error")),
        "latency_s": distribution(seconds(calls.where(lambda kind: kind.error is None and kind.refused is None))),
        "queued_s": distribution(calls.known("queued_s")),
        "bytes": distribution(calls.known("bytes")),
        "critical_share": on_critical_path_s(calls) / critical_s if critical_s else None,
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
