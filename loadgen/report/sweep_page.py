"""The report of a sweep as one HTML page: goodput and attainment along the axis, arms overlaid. Pure, but for the page's style."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanmark.loadgen import crossing, plan_table, sweep_table
from fanmark.loadgen.report import svg
from fanmark.loadgen.report.page import document
from fanmark.loadgen.report.svg import Scale, esc, line, text
from fanmark.loadgen.table import short

_HEIGHT = 210
_TOP = 30  # above the field, for the knees' labels
_MARKS = ("●○", "■□", "▲△", "◆◇", "▼▽")  # of an arm: what passes, and what does not
Found = Mapping[str, Any]


def page(found: Found) -> str:
    """The whole page of a sweep.json."""
    axis = found["axis"]
    title = f"{found['name']}: {', '.join(found['arms'])} over {axis['key']}"
    clock = "in virtual time, on the engine model" if found["clock"] == "virtual" else "in real time"
    body = [f"<h1>{esc(title)}</h1>"]
    if found["ended"] is not None:
        body.append(f'<p class="warning">⚠ {esc(found["ended"]["reason"])}</p>')
    answers = [*sweep_table.headlines(found), *(crossing.lines(found["find"], axis) if "find" in found else [])]
    body += [f'<p class="answer">{esc(each)}</p>' for each in answers]
    body += [f"<p>{esc(note)}</p>" for note in [f"Measured {clock}, seed {found['seed']}.", *found["notes"]]]
    if (rows := sweep_table.along_rows(found)) is not None:
        body.append(f"<section><h2>Against the baseline</h2>{amplification(found)}{svg.table(rows)}</section>")
    body += _planned(found) if "plan" in found else []
    for objective, about in found["objectives"].items():
        answer = svg.table(sweep_table.answer_rows(found, objective)) if axis["seeks"] else ""
        charts = svg.grid([goodput(found, objective), attainment(found, objective)])
        points = svg.table(sweep_table.point_rows(found, objective), "all points")
        body.append(f"<section><h2>On {esc(about['title'])}</h2>{answer}{charts}{points}</section>")
    if "plan" not in found:
        body.append(f"<section><h2>The runs</h2>{_runs(found)}</section>")
    return document(title, "".join(body))


def _planned(found: Found) -> list[str]:
    """What a plan says of each arm beside its points."""
    sections = []
    for name, arm in found["arms"].items():
        plan = arm["plan"]
        beside = filter(None, [plan_table.measured_line(plan)])
        said = (plan["binds"]["said"], plan_table.cost_line(plan), *beside, plan_table.simulated_line(plan))
        tables = (plan_table.plan_rows(plan), plan_table.burstiness_rows(plan), plan_table.what_if_rows(plan))
        inside = "".join(f"<p>{esc(each)}</p>" for each in said) + "".join(svg.table(rows) for rows in tables)
        sections.append(f"<section><h2>{esc(name)}: what binds, and what else would help</h2>{inside}</section>")
    return sections


@dataclass(frozen=True)
class _Series:
    """One arm's line: x, y and what its mark says; `band` the low and high y of each."""

    name: str
    points: Sequence[tuple[float, float, bool]]
    band: Sequence[tuple[float, float]] = ()
    knee: tuple[float, str] | None = None


def amplification(found: Found) -> str:
    """The ratios to the baseline along the key, a figure for each resource."""
    figures = []
    for key, title in sweep_table.RATIOS.items():
        series = []
        for name, arm in found["arms"].items():
            known = [(e["x"], e["amplification"][key]) for e in arm["along"] if not arm["baseline"]]
            known = [(x, each) for x, each in known if each is not None and each["ratio"] is not None]
            if known:
                bands = [(each["low"] or each["ratio"], each["high"] or each["ratio"]) for _, each in known]
                series.append(_Series(name, [(x, each["ratio"], True) for x, each in known], bands))
        if series:
            most = max(high for each in series for _, high in each.band)
            figures.append(
                _chart(found, f"{title}, times the baseline's", f"ratio-{key}", series, Scale(0.0, 1.05 * most))
            )
    return svg.grid(figures)


def goodput(found: Found, objective: str) -> str:
    """Good queries/s along the axis, each arm's knee marked."""
    series = []
    for name, points in _points(found, objective).items():
        knee = found["arms"][name]["on"][objective]["knee"]
        mark = None if knee is None else (knee["x"], f"{name}: {short(knee['goodput_qps'])}/s")
        series.append(_Series(name, [(p["x"], p["goodput_qps"], p["verdict"] == "pass") for p in points], (), mark))
    height = svg.log_scale(
        y for each in series for _, y, _ in each.points
    )  # arms may lie far apart; none is at the foot
    return _chart(found, "Good queries/s; knees are marked", f"{objective}-goodput", series, height)


def attainment(found: Found, objective: str) -> str:
    """The share in time along the axis with its band, and the target."""
    series = [
        _Series(
            name,
            [(p["x"], p["attainment"] or 0.0, p["verdict"] == "pass") for p in points],
            [(p["low"], p["high"]) for p in points],
        )
        for name, points in _points(found, objective).items()
    ]
    target = found["objectives"][objective]["attainment"]
    title = "Share in time, with its 95 % band; dotted: the target"
    return _chart(found, title, f"{objective}-attainment", series, Scale(0.0, 1.0), target)


def _chart(
    found: Found, title: str, name: str, series: Sequence[_Series], height: Scale, target: float | None = None
) -> str:
    xs = [x for each in series for x, _, _ in each.points]
    if not xs:
        return ""
    scale = svg.log_scale(xs) if min(xs) > 0 else Scale(min(xs), max(xs) + 1.0)
    bottom = _TOP + _HEIGHT
    parts = svg.axis(scale, _TOP, bottom, "", short)
    for value in height.ticks():
        parts += [line(0, _y(height, value), 100, _y(height, value), "grid")]
        parts += [text(0, _y(height, value) - 3, short(value) if target is None else f"{value:.0%}", "tick")]
    if target is not None:
        parts.append(line(0, _y(height, target), 100, _y(height, target), "curve waits"))
    for i, each in enumerate(series):
        parts += _drawn(each, i, scale, height)
    marks = {f"{_MARKS[i % len(_MARKS)]} {each.name}": svg.curve_kind(i) for i, each in enumerate(series)}
    rows = [["", found["axis"]["unit"], title.split(",")[0].split(";")[0]]]
    rows += [[each.name, sweep_table.x_of(found, x), short(y)] for each in series for x, y, _ in each.points]
    label = f"{title}, along {found['axis']['unit']}, a line for each arm. The table below has the numbers"
    across = "" if scale.log else ", in order" if found["axis"]["values"] else ""
    said = f"<p>across: {esc(found['axis']['unit'])}{across}. Filled marks pass, hollow ones do not.</p>"
    if series[0].band and target is None:
        said = (
            f"<p>across: {esc(found['axis']['unit'])}{across}. The band is the 95 % interval, where there is one.</p>"
        )
    return svg.figure(title, svg.key(marks), svg.picture(label, bottom + 20, parts), said, svg.numbers(name, rows))


def _drawn(series: _Series, i: int, scale: Scale, height: Scale) -> list[str]:
    """Band, line, marks and knee of the i-th series."""
    parts = []
    xs = [scale.at(x) for x, _, _ in series.points]
    if series.band:
        edge = [(x, height.at(low)) for x, (low, _) in zip(xs, series.band, strict=True)]
        edge += [(x, height.at(high)) for x, (_, high) in reversed(list(zip(xs, series.band, strict=True)))]
        path = " ".join(f"{x:.2f},{100 - y:.2f}" for x, y in edge)
        parts.append(
            f'<svg x="0" y="{_TOP}" width="100%" height="{_HEIGHT}" viewBox="0 0 100 100" preserveAspectRatio="none">'
            f'<polygon points="{path}" class="band c{i % 6}"/></svg>'
        )
    ys = [height.at(y) / 100 for _, y, _ in series.points]
    parts.append(svg.curve(list(zip(xs, ys, strict=True)), _TOP, _HEIGHT, svg.curve_kind(i)))
    for x, (_, y, passes) in zip(xs, series.points, strict=True):
        parts.append(text(x, _y(height, y) + 4, _MARKS[i % len(_MARKS)][not passes], "mark"))
    if series.knee is not None:
        at, words = scale.at(series.knee[0]), series.knee[1]
        parts += [line(at, _TOP, at, _TOP + _HEIGHT, "knee"), text(at, _TOP - 4 - 13 * (i % 2), words, "label")]
    return parts


def _points(found: Found, objective: str) -> dict[str, Sequence[Found]]:
    arms = found["arms"].items()
    return {name: arm["on"][objective]["points"] for name, arm in arms if arm["on"][objective]["points"]}


def _y(height: Scale, value: float) -> float:
    return _TOP + _HEIGHT * (1 - height.at(value) / 100)


def _runs(found: Found) -> str:
    """The folder of each run, for who wants to see more of it."""
    rows = [["folder", "arm", found["axis"]["unit"]]]
    for arm, each in found["arms"].items():
        along = [(e["x"], [e["run"]]) for e in each.get("along", ())]
        along = along or [(p["x"], p["runs"]) for points in list(each["on"].values())[:1] for p in points["points"]]
        rows += [[run, arm, sweep_table.x_of(found, x)] for x, runs in along for run in runs]
    return svg.numbers("runs", rows, "Each has a report of its own")
