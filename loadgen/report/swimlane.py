"""One query as it went: a lane for each role, its calls and tool calls in time, what the answer waited for underlined. Pure."""

from collections.abc import Sequence

from fanmark.loadgen.records import Call, Query, critical_path, in_order
from fanmark.loadgen.report import svg
from fanmark.loadgen.report.gather import Shown
from fanmark.loadgen.report.svg import Scale, axis, line, rect, text
from fanmark.loadgen.retries import lost_s
from fanmark.loadgen.table import number

_MOST_LANES, _MOST_ROWS = 32, 200
_LANE, _SUBLANE = 34, 20  # pixels high; those of a role that does several calls at once follow below its first
KEY = {
    "to the first token": "c1 hatched",
    "from there to the last": "c0",
    "tool call": "c2 crossed",
    "due, not sent yet": "curve waits",
    "on the critical path": "critical",
}
_WORDS = {
    "typical": "A typical {arm} query, of median latency: {seconds} s",
    "slow": "A slow {arm} query, of the slowest tenth: {seconds} s",
}


def lanes(calls: Sequence[Call]) -> list[tuple[str, list[Call]]]:
    """Calls by role in the order in which roles begin; calls of a role that overlap are in lanes of their own, which have no name."""
    by_role: dict[str, list[list[Call]]] = {}
    for call in sorted(calls, key=lambda one: (one.due_at, one.call, one.attempt)):
        own = by_role.setdefault(call.role, [])
        free = next((lane for lane in own if _end(lane[-1]) <= call.due_at), None)
        if free is None:
            own.append([call])
        else:
            free.append(call)
    return [(role if i == 0 else "", lane) for role, own in by_role.items() for i, lane in enumerate(own)]


def _end(call: Call) -> float:
    return max(at for at in (call.due_at, call.sent_at, call.done_at) if at is not None)


def swimlane(shown: Shown, name: str) -> str:
    """A figure of a query, with the table of its calls."""
    query = shown.query
    calls = [*query.retried, *query.calls]
    critical = {id(call) for call in critical_path(query.needed, lost_s(query.retried))}
    scale = Scale(0.0, max(query.done_at - query.due_at, 1e-6))
    found = lanes(calls)
    y, parts = 0, []
    for role, lane in found[:_MOST_LANES]:
        top = y + (16 if role else 2)
        if role:
            parts.append(text(0, y + 12, role, "label"))
        for call in lane:
            parts += _bar(call, query.due_at, scale, top, critical=id(call) in critical)
        y += _LANE if role else _SUBLANE
    parts = [*axis(scale, 0, y, " s", lambda value: f"{value:.6g}"), *parts]
    title = _WORDS[shown.word].format(arm=query.arm, seconds=number(query.done_at - query.due_at))
    more = f"<p>{len(found) - _MOST_LANES} more lanes are in the table.</p>" if len(found) > _MOST_LANES else ""
    label = f"{title}. {len(calls)} calls and tool calls in {len(found)} lanes; the table below has them all"
    behind = svg.numbers(name, _rows(query, calls, critical), f"The calls of query {query.query}")
    return svg.figure(title, svg.picture(label, y + 18, parts), more, behind)


def _bar(call: Call, start_at: float, scale: Scale, y: float, *, critical: bool) -> list[str]:
    if call.sent_at is None or call.done_at is None:
        return []
    due, sent, done = (scale.at(at - start_at) for at in (call.due_at, call.sent_at, call.done_at))
    first = done if call.first_at is None else scale.at(call.first_at - start_at)
    parts = [line(due, y + 6, sent, y + 6, "waits")] if sent > due else []
    if call.kind == "tool_call":
        parts.append(rect(sent, y, done - sent, 11, "c2 crossed"))
    else:
        parts += [rect(sent, y, first - sent, 11, "c1 hatched"), rect(first, y, done - first, 11, "c0")]
    if critical:
        parts.append(rect(sent, y + 12.5, done - sent, 3.5, "critical"))
    if call.error is not None:
        parts.append(text(done, y + 10, f"✕ {call.error}", "label"))
    return parts


def _rows(query: Query, calls: Sequence[Call], critical: set[int]) -> list[list[str]]:
    rows = [
        ["call", "of", "round", "after", "due, s", "sent", "first token", "done", "input", "cached", "output", "ended"]
    ]
    for call in in_order(calls)[:_MOST_ROWS]:
        instants = (call.due_at, call.sent_at, call.first_at, call.done_at)
        rows.append([
            f"{call.call}{'' if call.retry_at is None else f' (attempt {call.attempt})'}",
            f"{call.role}{f': {call.tool}' if call.tool else ''}{' (critical path)' if id(call) in critical else ''}",
            str(call.round), " ".join(map(str, call.after)) or "-",
            *("-" if at is None else f"{at - query.due_at:.3f}" for at in instants),
            *map(number, (call.input_tokens, call.cached_tokens, call.output_tokens)),
            call.error or call.finish or "-",
        ])  # fmt: skip
    if len(calls) > _MOST_ROWS:
        rows.append([f"and {len(calls) - _MOST_ROWS} more, in calls.jsonl", *[""] * (len(rows[0]) - 1)])
    return rows
