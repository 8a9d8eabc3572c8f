"""The dashboards' panels as one page, without a Grafana: python dashboards/preview.py PROMETHEUS --start S --end S > preview.html

Asks the Prometheus at this address for every query, over Unix times S, and draws what it says at the panels' places: enough to see whether
a panel shows what it should. Variables stand for all of their values. Lines differ by their strokes, and each is named with its last value.
"""

import argparse
import html
import json
import math
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BOARDS = ("fan-out", "server", "run")
RANGE = "[30s]"
POINTS = 120
STROKES = ("none", "6 3", "2 2", "8 3 2 3", "1 3", "12 4")
COLOURS = ("#1f6fb2", "#c4571a", "#2f7d4f", "#7a4fa3", "#a3353f", "#5b5b5b")
UNITS = {
    "percentunit": (100.0, " %"),
    "reqps": (1.0, "/s"),
    "bytes": (1e-6, " MB"),
    "Bps": (1e-3, " kB/s"),
    "s": (1.0, " s"),
}
STYLE = """body{font:14px system-ui,sans-serif;margin:16px;max-width:1400px;color:#1c1c1c;background:#fff}
.grid{display:grid;grid-template-columns:repeat(24,1fr);gap:10px}
section{border:1px solid #c8c8c8;border-radius:4px;padding:8px;overflow:hidden}h3{margin:0;font-size:14px}
p{margin:2px 0 6px;color:#555;font-size:12px}
svg{width:100%;height:150px;display:block}table{width:100%;border-collapse:collapse;font-size:12px}td:last-child{text-align:right}
.bar{background:#cfe1f2;white-space:nowrap}.row{grid-column:1/-1;font-weight:600;border:0;padding:4px 0}.none{color:#a3353f}"""

Points = list[tuple[float, float]]
Ask = Callable[[str], list[tuple[dict[str, str], Points]]]


def filled(expr: str) -> str:
    """A query with all values of its variables."""
    return re.sub(r"\$\w+", ".*", expr.replace("[$__rate_interval]", RANGE))


def asking(url: str, start_at: float, end_at: float) -> Ask:
    """What asks this Prometheus over that time."""

    def ask(expr: str) -> list[tuple[dict[str, str], Points]]:
        step = max((end_at - start_at) / POINTS, 0.25)
        told = urllib.parse.urlencode({"query": expr, "start": start_at, "end": end_at, "step": step})
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{told}", timeout=30) as reply:
            found = json.load(reply)["data"]["result"]
        series = [(each["metric"], [(float(at), float(v)) for at, v in each["values"] if v != "NaN"]) for each in found]
        return [(labels, points) for labels, points in series if points]

    return ask


def named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend).strip()


def shown(value: float, unit: str) -> str:
    factor, suffix = UNITS.get(unit, (1.0, unit.removeprefix("suffix:") if unit.startswith("suffix:") else ""))
    value *= factor
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + suffix


def panel_html(panel: dict[str, Any], ask: Ask, start_at: float, end_at: float) -> str:
    """One panel at its place."""
    box, unit = panel["gridPos"], panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
    lines = [
        (named(target["legendFormat"], labels), points)
        for target in panel["targets"]
        for labels, points in ask(filled(target["expr"]))
    ]
    top = max((value for _, points in lines for _, value in points if math.isfinite(value)), default=0.0)
    picture = drawn(lines, start_at, end_at, top) if panel["type"] == "timeseries" and lines else ""
    rows = "".join(row(name, points[-1][1], top, unit, i, panel["type"]) for i, (name, points) in enumerate(lines))
    none = "" if lines else '<p class="none">no data</p>'
    return (
        f'<section style="grid-column:{box["x"] + 1}/span {box["w"]}"><h3>{html.escape(panel["title"])}</h3>'
        f"<p>{html.escape(panel['description'])}</p>{picture}{none}<table>{rows}</table></section>"
    )


def row(name: str, last: float, top: float, unit: str, i: int, kind: str) -> str:
    """A line of the legend: how the line is drawn, its name and its last value."""
    stroke = f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-dasharray="{STROKES[i // len(COLOURS) % len(STROKES) or i % len(STROKES)]}"'
    key = f'<svg style="width:30px;height:8px;display:inline" viewBox="0 0 30 8"><path d="M0 4H30" stroke-width="2" {stroke}/></svg> '
    width = f' class="bar" style="width:{100 * last / top:.0f}%;display:block"' if kind == "bargauge" and top else ""
    return (
        f"<tr><td><span{width}>{key if kind == 'timeseries' else ''}{html.escape(name)}</span></td>"
        f"<td>{shown(last, unit)}</td></tr>"
    )


def drawn(lines: Sequence[tuple[str, Points]], start_at: float, end_at: float, top: float) -> str:
    """The lines over time, from 0 to the largest value."""
    paths = []
    for i, (_, points) in enumerate(lines):
        places = [
            (600 * (at - start_at) / (end_at - start_at), 145 - 140 * min(value / (top or 1), 1))
            for at, value in points
            if math.isfinite(value)
        ]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dash = STROKES[i // len(COLOURS) % len(STROKES) or i % len(STROKES)]
        paths.append(
            f'<path d="{path}" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.5" stroke-dasharray="{dash}" '
            'vector-effect="non-scaling-stroke"/>'
        )
    return f'<svg viewBox="0 0 600 150" preserveAspectRatio="none" role="img">{"".join(paths)}</svg>'


def page(ask: Ask, start_at: float, end_at: float) -> str:
    """All dashboards below each other."""
    parts = []
    for name in BOARDS:
        board = json.loads((FOLDER / f"{name}.json").read_text())
        parts.append(
            f'<h1>{html.escape(board["title"])}</h1><p>{html.escape(board["description"])}</p><div class="grid">'
        )
        for panel in board["panels"]:
            if panel["type"] == "row":
                parts.append(f'<div class="row">{html.escape(panel["title"])}</div>')
            else:
                parts.append(panel_html(panel, ask, start_at, end_at))
        parts.append("</div>")
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fanmark dashboards</title><style>{STYLE}</style>'
    )
    return head + "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("prometheus")
    parser.add_argument("--start", type=float, required=True)
    parser.add_argument("--end", type=float, required=True)
    given = parser.parse_args()
    print(page(asking(given.prometheus, given.start, given.end), given.start, given.end))
    return 0


if __name__ == "__main__":
    sys.exit(main())
