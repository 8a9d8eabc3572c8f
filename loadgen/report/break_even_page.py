"""The report of a break-even as one HTML page: net demand against fan-out. Pure, but for the page's style."""

from collections.abc import Mapping
from typing import Any

from fanmark.loadgen.break_even import SUB_QUERIES, answer, lines
from fanmark.loadgen.report import svg
from fanmark.loadgen.report.page import document
from fanmark.loadgen.report.svg import Scale, esc, line, rect, text
from fanmark.loadgen.table import short

_TOP, _HEIGHT = 30, 260


def page(found: Mapping[str, Any]) -> str:
    """The whole page of a break-even.json."""
    title = f"{found['new']} for {found['old']}: {found['arm']} over {found['key']}"
    said = "".join(f'<p class="answer">{esc(each)}</p>' for each in answer(found))
    how = (
        f"<p>In virtual time, on the engine model, means of {found['seeds']} seeds. D = F / e in capacity seconds at the same objective: "
        "above 1 the new model needs more replicas than the old one did, for as many questions.</p>"
    )
    rows = "\n".join(lines(found)[len(answer(found)) + 1 :])
    return document(title, f"<h1>{esc(title)}</h1>{said}{how}{_chart(found)}<pre>{esc(rows)}</pre>")


def _chart(found: Mapping[str, Any]) -> str:
    points = found["points"]
    across = svg.log_scale(p["x"] for p in points)
    height = svg.log_scale(
        [1.0, *(p["low"] or p["demand"] for p in points), *(p["high"] or p["demand"] for p in points)]
    )
    parts = svg.axis(across, _TOP, _TOP + _HEIGHT, "", short)
    low, high = (across.at(min(max(edge, points[0]["x"]), points[-1]["x"])) for edge in SUB_QUERIES)
    if high > low:
        parts += [
            rect(low, _TOP, high - low, _HEIGHT, "band c3"),
            text((low + high) / 2, _TOP + 14, "10 to 50", "label"),
        ]
    for value in height.ticks():
        parts += [line(0, _y(height, value), 100, _y(height, value), "grid")]
        parts += [text(0, _y(height, value) - 3, f"{short(value)}x", "tick")]
    parts.append(line(0, _y(height, 1.0), 100, _y(height, 1.0), "curve waits"))
    curve = [(across.at(p["x"]), height.at(p["demand"]) / 100) for p in points]
    parts.append(svg.curve(curve, _TOP, _HEIGHT, svg.curve_kind(0)))
    for p in points:
        x = across.at(p["x"])
        if p["low"] is not None:
            parts.append(line(x, _y(height, p["low"]), x, _y(height, p["high"]), "ink"))
        parts.append(text(x, _y(height, p["demand"]) + 4, "●", "mark"))
    for each in found["crossings"]:
        x = across.at(each["x"])
        first, last = each["interval"] or each["between"]
        ends = [across.at(points[i]["x"] if end is None else end) for i, end in ((0, first), (-1, last))]
        parts.append(rect(ends[0], _TOP, ends[1] - ends[0], _HEIGHT, "band c0"))
        parts += [line(x, _TOP, x, _TOP + _HEIGHT, "knee"), text(x, _TOP - 6, f"D = 1 at {short(each['x'])}", "label")]
    label = "Net demand against fan-out, both by factors. The table below has the numbers"
    note = (
        f"<p>across: {esc(found['key'])}. Dotted: D = 1, as many replicas as before. Shaded: the 10 to 50 sub-queries of the claim, and "
        "about the crossing its interval.</p>"
    )
    return svg.figure("Net demand D", svg.picture(label, _TOP + _HEIGHT + 20, parts), note)


def _y(height: Scale, value: float) -> float:
    return _TOP + _HEIGHT * (1 - height.at(value) / 100)
