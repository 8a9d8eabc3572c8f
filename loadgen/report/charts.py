"""The pictures of a report but for the swim-lanes and the timeline: each a figure with the table of its numbers. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fanmark.loadgen import table
from fanmark.loadgen.claims import rows as claim_rows
from fanmark.loadgen.critical import PARTS
from fanmark.loadgen.records import bucket_gap_s
from fanmark.loadgen.report import svg
from fanmark.loadgen.report.svg import Scale, axis, esc, figure, key, line, picture, rect, text
from fanmark.loadgen.table import group_rows, number, recorded, short
from fanmark.loadgen.tally import Histogram

_MOST_POINTS = 250  # of a curve
_MOST_ROWS = 40  # of a picture


def amplification(arms: Mapping[str, Any], name: str) -> str:
    """A bar for each resource of each arm, from 1x to the ratio on a log scale, with its interval. All arms have one scale."""
    found = {
        arm: [
            (title.strip().removesuffix(", s"), each["amplification"][r])
            for r, title in table.ROWS
            if _has_ratio(each["amplification"][r])
        ]
        for arm, each in arms.items()
        if not each["baseline"]
    }
    bounds = [
        value
        for rows in found.values()
        for _, each in rows
        for value in (each["ratio"], each["low"], each["high"])
        if value
    ]
    scale = svg.log_scale(bounds, beside=(1.0, 10.0))
    figures = [
        figure(arm, _ratio_bars(arm, rows, scale), svg.numbers(f"{name}-{i}", _ratio_rows(rows))) if rows else ""
        for i, (arm, rows) in enumerate(found.items())
    ]
    return svg.grid(figures)


def _has_ratio(found: Mapping[str, Any] | None) -> bool:
    return found is not None and found["ratio"] is not None and found["ratio"] > 0


def _ratio_rows(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    """The ratios with their intervals and where those come from."""
    return [["", "ratio", "low", "high", "interval"]] + [
        [title, f"{r['ratio']:.2f}x", *("-" if r[b] is None else f"{r[b]:.2f}x" for b in ("low", "high")), r["method"]]
        for title, r in rows
    ]


def _ratio_bars(arm: str, rows: Sequence[tuple[str, Mapping[str, Any]]], scale: Scale) -> str:
    bottom = 30 * len(rows) + 4
    parts = axis(scale, 0, bottom, "x", lambda value: f"{value:g}")
    for i, (title, found) in enumerate(rows):
        y, one, at = 30 * i, scale.at(1.0), scale.at(found["ratio"])
        parts += [
            rect(min(one, at), y + 16, abs(at - one), 9, "c0"),
            line(at, y + 14, at, y + 27, "ink"),
            svg.text(0, y + 12, f"{title}: {table.ratio(found)}", "label"),
        ]
        if found["low"] is not None:
            low, high = scale.at(found["low"]), scale.at(found["high"])
            parts += [line(low, y + 20.5, high, y + 20.5, "ink")]
            parts += [line(x, y + 17, x, y + 24, "ink") for x in (low, high)]
    parts.append(line(scale.at(1.0), 0, scale.at(1.0), bottom, "ink thin"))
    said = ", ".join(f"{title} {table.ratio(found)}" for title, found in rows)
    return picture(f"What a {arm} query costs against the baseline: {said}", bottom + 18, parts)


def cumulative(title: str, arms: Mapping[str, Counter[int]], rows: svg.Rows, name: str) -> str:
    """The share of values at or below each time, by arm. `rows` are the quantiles."""
    known = {arm: counts for arm, counts in arms.items() if counts}
    if not known:
        return ""
    scale = svg.log_scale([bucket_gap_s(b) for counts in known.values() for b in (min(counts), max(counts))])
    parts, kinds = axis(scale, 4, 164, " s", lambda value: f"{value:g}"), {}
    for share in (0.0, 0.5, 0.9):
        y = 164 - 160 * share
        parts += [line(0, y, 100, y, "grid"), text(0, y - 3, f"{share:.0%}", "tick")]
    for i, (arm, counts) in enumerate(known.items()):
        kinds[arm] = svg.curve_kind(i)
        parts.append(svg.curve(_steps(counts, scale), 4, 160, kinds[arm]))
    label = f"{title}, by arm. The table below has the quantiles"
    return figure(title, key(kinds), picture(label, 182, parts), svg.numbers(name, rows))


def _steps(counts: Counter[int], scale: Scale) -> list[tuple[float, float]]:
    total, seen = sum(counts.values()), 0
    points = [(scale.at(bucket_gap_s(min(counts))), 0.0)]
    for bucket in sorted(counts):
        x = scale.at(bucket_gap_s(bucket))
        before, seen = seen, seen + counts[bucket]
        points += [(x, before / total), (x, seen / total)]
    stride = 1 + len(points) // _MOST_POINTS
    return [*points[::stride], (100.0, 1.0)]


def quantile_rows(arms: Mapping[str, Any], part: str, resource: str) -> list[list[str]]:
    """Quantiles by arm, in seconds, as the summary has them."""
    columns = ("mean", "p50", "p90", "p99", "max", "n")
    rows = [["", *columns]]
    for arm, each in arms.items():
        found = each[part][resource] or dict.fromkeys(columns)
        rows.append([arm, *(number(found[column]) for column in columns)])
    return rows


def stacked(label: str, rows: Sequence[tuple[str, Sequence[float]]], kinds: Mapping[str, str], unit: str) -> str:
    """A bar for each row, its parts one after another, all on one scale. Only the table tells parts below 1 %, and rows beyond 40."""
    shown = rows[:_MOST_ROWS]
    most = max((sum(values) for _, values in shown), default=0.0) or 1.0
    bottom, parts = 32 * len(shown) + 2, []
    scale = Scale(0.0, most)
    parts += axis(scale, 0, bottom, unit, lambda value: f"{value:,.10g}")
    for i, (title, values) in enumerate(shown):
        x = 0.0
        for kind, value in zip(kinds.values(), values, strict=True):
            parts.append(rect(x, 32 * i + 16, scale.at(value), 11, kind))
            x += scale.at(value)
        told = [
            f"{word} {short(value)}" for word, value in zip(kinds, values, strict=True) if value > sum(values) / 100
        ]
        parts.append(text(0, 32 * i + 12, f"{title}: {', '.join(told) or 'none'}", "label"))
    more = f"<p>{len(rows) - len(shown)} more are in the table.</p>" if len(rows) > len(shown) else ""
    return key(kinds) + picture(label, bottom + 18, parts) + more


def spread(title: str, histogram: Histogram, name: str) -> str:
    """A bar for each bucket from the least that holds something to the greatest: how many queries had so much."""
    filled = [i for i, count in enumerate(histogram.counts) if count]
    if not filled:
        return ""
    ends = ["", *(short(bound) for bound in histogram.bounds)]
    rows = [
        (f"up to {ends[i + 1]}" if i < len(histogram.bounds) else f"above {ends[i]}", [float(histogram.counts[i])])
        for i in range(filled[0], filled[-1] + 1)
    ]
    picture_ = stacked(f"{title}. The table below has the numbers", rows, {"queries": "c0"}, "")
    return figure(title, picture_, svg.numbers(name, [["", "queries"], *([row, number(n)] for row, (n,) in rows)]))


def spent(arms: Mapping[str, Any], name: str) -> str:
    """What the mean latency was spent on along the critical path, by arm, in seconds."""
    rows, shares = [], [["", "latency, s", *PARTS]]
    for arm, each in arms.items():
        latency = each["per_query"]["latency_s"]
        if each["critical_path"] is None or latency is None:
            continue
        found = [max(0.0, each["critical_path"][part]) for part in PARTS]
        rows.append((arm, [share * latency["mean"] for share in found]))
        shares.append([arm, number(latency["mean"]), *(f"{each['critical_path'][part]:.1%}" for part in PARTS)])
    if not rows:
        return ""
    kinds = dict(zip(PARTS, ("c5", "c1 hatched", "c0", "c2 crossed", "c4"), strict=True))
    label = "What the latency of a mean query was spent on, in seconds. The table below has the shares"
    picture_ = stacked(label, rows, kinds, " s")
    return figure("What the latency was spent on, along the critical path", picture_, svg.numbers(name, shares))


def tokens(arms: Mapping[str, Any], name: str) -> str:
    """Tokens of a mean query by role, by round and, where there are several, by target, a figure for each arm."""
    figures = []
    for i, (arm, each) in enumerate(arms.items()):
        queries = recorded(each)
        for group in ("by_role", "by_round", "by_target"):
            if not each[group] or not queries or (group == "by_target" and len(each[group]) == 1):
                continue
            word = group.removeprefix("by_")
            titles = {n: f"round {n}" if group == "by_round" else n for n in sorted(each[group], key=_in_order)}
            cached = all(found["cached_tokens"] is not None for found in each[group].values())
            kinds = {"cached": "c1 hatched", "fresh": "c0", "output": "c2 crossed"}
            if not cached:
                kinds = {"input": "c0", "output": "c2 crossed"}
            rows = [(title, _per_query(each[group][n], queries, cached=cached)) for n, title in titles.items()]
            label = f"Tokens of a mean {arm} query by {word}. The table below has the numbers"
            picture_ = stacked(label, rows, kinds, "")
            behind = svg.numbers(f"{name}-{i}-{word}", group_rows(each[group], titles, queries))
            figures.append(figure(f"{arm}: tokens of a query by {word}", picture_, behind))
    return svg.grid(figures)


def _in_order(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (-1, name)


def _per_query(found: Mapping[str, Any], queries: int, *, cached: bool) -> list[float]:
    read, known, wrote = (found[kind] or 0 for kind in ("input_tokens", "cached_tokens", "output_tokens"))
    parts = [known, read - known, wrote] if cached else [read, wrote]
    return [part / queries for part in parts]


def claims(arms: Mapping[str, Any]) -> str:
    """The claims under test, each with its source, against what was measured."""
    found = {name: each["claim"] for name, each in arms.items() if each["claim"] is not None}
    told = [
        f"<p><strong>{esc(n)}</strong>: {esc(c['text'])}<br>source: {esc(c['source'])}</p>" for n, c in found.items()
    ]
    rows = [row for name, claim in found.items() for row in claim_rows(name, claim, number)]
    return "".join(told) + (svg.table([["", "claimed", "measured", ""], *rows], "claims under test") if rows else "")
