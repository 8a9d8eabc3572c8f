"""The report of one run or several as one HTML page that needs nothing else. Pure, but that the style is read from beside this file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fanmark.loadgen import frozen, table
from fanmark.loadgen.cost_part import rows as cost_rows
from fanmark.loadgen.report import charts, svg, timeline, words
from fanmark.loadgen.report.gather import Facts
from fanmark.loadgen.report.svg import esc
from fanmark.loadgen.report.swimlane import KEY, swimlane
from fanmark.loadgen.tap.words import tables as tap_tables
from fanmark.loadgen.thresholds import lines as threshold_lines

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PATTERNS = (
    '<svg width="0" height="0" aria-hidden="true" class="defs"><defs>'
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" class="c1"/><rect width="1.6" height="5" class="over"/></pattern>'
    '<pattern id="cross" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<rect width="5" height="5" class="c2"/><circle cx="2.5" cy="2.5" r="1.2" class="over"/></pattern></defs></svg>'
)


def document(title: str, body: str, *, policy: str = _POLICY, script: str = "") -> str:
    """A whole page. It loads nothing that it does not name in its policy."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(policy)}"><meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{(_HERE / 'style.css').read_text()}</style></head>\n"
        f"<body>{_PATTERNS}<main>{body}</main>{script}</body></html>\n"
    )


def report(runs: Sequence[tuple[str, Facts]]) -> str:
    """One page with the runs below each other; each with what it is called."""
    bodies = [run(facts, f"run{i + 1}") for i, (_, facts) in enumerate(runs)]
    if len(runs) == 1:
        return document(words.title(runs[0][1].summary), bodies[0])
    items = [
        f'<li><a href="#run{i + 1}">{esc(name)}</a>: {esc(words.title(facts.summary))}</li>'
        for i, (name, facts) in enumerate(runs)
    ]
    contents = f"<nav aria-label='runs'><h1>{len(runs)} runs</h1><ul>{''.join(items)}</ul></nav>"
    return document(f"{len(runs)} runs", contents + "".join(bodies))


def run(facts: Facts, name: str) -> str:
    """A run as a section of a page; `name` is its own on the page."""
    summary = facts.summary
    arms = summary["arms"]
    head = f"<h1>{esc(words.title(summary))}</h1>"
    parts = [head, *(f'<p class="warning">⚠ {esc(each)}</p>' for each in words.warnings(summary))]
    parts += [f'<p class="answer">{esc(each)}</p>' for each in words.answers(summary)]
    parts += [f"<p>{esc(frozen.line(summary['label']))}</p>"] if summary["label"] else []
    parts += [
        _section("Is it valid?", tick_list(summary["validity"])),
        _section(
            "What a query costs",
            charts.amplification(arms, f"{name}-cost"),
            _amplification(arms),
            _NOTE,
            *(f"<p>{esc(each)}</p>" for each in table.intervals(arms)),
        ),
        *(
            [_section(title, svg.table(rows)) for title, rows in tap_tables(summary, table.number).items()]
            or [_section("Expected against measured, per query", svg.table(table.expected_rows(arms)), _EXPECTED)]
        ),
        _section("Cost per query", svg.table(costs) if (costs := cost_rows(arms, table.number)) else ""),
        _section(
            "Fidelity of the replay", _rows(table.fidelity_rows(arms), "the share that is as recorded, per query")
        ),
        _section("Thresholds", _thresholds(summary)),
        _section(
            "Right answers",
            _rows(table.quality_rows(arms), "answers against the known ones, and what was spent for each right one"),
        ),
        _section("Claims", charts.claims(arms)),
        _section("How long it takes", _times(facts, name), charts.spent(arms, f"{name}-spent")),
        _section("One query, as it went", *_queries(facts, name)),
        _section("Tokens by role and round", charts.tokens(arms, f"{name}-tokens")),
        _section("Load, server and client over time", _timeline(facts, name)),
        _section("Client, server and what must be told", _checks(summary), _client(summary["client"], name)),
        _section(
            "To repeat this run",
            svg.table(words.repeat_rows(summary), kind="words"),
            _surroundings(summary, name),
            _scenario(facts.scenario),
        ),
    ]
    return f'<article id="{name}">{"".join(parts)}</article>'


_NOTE = (
    "<p>Bars begin at 1x, the baseline; the scale is logarithmic. Whiskers are 95 % intervals, where there is one. "
    "Counts and tokens do not depend on the load; times do, and hold at the queries/s and calls in flight in the table.</p>"
)
_EXPECTED = "<p>Left the closed form of the topology, right what was counted; each query is compared on its own.</p>"


def _section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{esc(title)}</h2>{body}</section>" if body else ""


def tick_list(validity: Mapping[str, Any]) -> str:
    """The validity ticks with their reasons, what failed first."""
    signs = {"FAILED": "✗", "not known": "?", "ok": "✓"}
    rows = [
        f'<li class="{"bad" if mark == "FAILED" else ""}"><b aria-hidden="true">{signs[mark]}</b> {esc(mark)}: '
        f"<strong>{esc(tick)}</strong> {esc(reason)}</li>"
        for mark, tick, reason in table.ticks(validity)
    ]
    return f'<ul class="ticks">{"".join(rows)}</ul>'


def _amplification(arms: Mapping[str, Any]) -> str:
    head, *rows = table.amplification_rows(arms)
    titles = [title or "against the baseline" for title in head[1:]]
    return svg.table(
        [["per query", *titles], *([row[0].strip(), *row[1:]] for row in rows)], "per query, and against the baseline"
    )


def _thresholds(summary: Mapping[str, Any]) -> str:
    found = threshold_lines(summary)
    return f"<pre>{esc(chr(10).join(found))}</pre>" if found else ""


def _rows(rows: svg.Rows, caption: str) -> str:
    return svg.table(rows, caption) if rows else ""


def _times(facts: Facts, name: str) -> str:
    arms = facts.summary["arms"]
    rows = charts.quantile_rows(arms, "per_query", "latency_s"), charts.quantile_rows(arms, "per_call", "ttft_s")
    if facts.left:
        return svg.table(rows[0], "query latency, s") + svg.table(rows[1], "time to first token, s")
    return svg.grid([
        charts.cumulative("Query latency: share of queries done in time", facts.latency, rows[0], f"{name}-latency"),
        charts.cumulative("Time to first token: share of calls", facts.ttft, rows[1], f"{name}-ttft"),
    ])  # fmt: skip


def _queries(facts: Facts, name: str) -> Sequence[str]:
    figures = [
        svg.grid(swimlane(shown, f"{name}-lanes-{i}-{shown.word}") for shown in found)
        for i, found in enumerate(facts.shown.values())
        if found
    ]
    left = [f"<p>No query is drawn, nor how latencies are spread: {esc(facts.left)}.</p>"] if facts.left else []
    return [svg.key(KEY), *figures] if figures else left


def _timeline(facts: Facts, name: str) -> str:
    spans = {
        (window["start_at"], window["end_at"])
        for arm in facts.summary["arms"].values()
        for window in arm["window"].get("repeats", [arm["window"]])
        if window["start_at"] is not None
    }
    note = "<p>The shaded times are those in which queries counted.</p>" if spans else ""
    return note + timeline.timelines(facts.samples, union(spans), f"{name}-time")


def union(spans: Sequence[timeline.Span] | set[timeline.Span]) -> list[timeline.Span]:
    """Spans of time, those that overlap as one."""
    found: list[timeline.Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _checks(summary: Mapping[str, Any]) -> str:
    return f"<pre>{esc(chr(10).join(table.checks(summary)))}</pre>"


def _client(client: Mapping[str, Any], name: str) -> str:
    """The verdict's reasons, and the client's own delays and workers."""
    said = f"<p>Client: <strong>{esc(client['verdict'])}</strong>{''.join(f'; {esc(reason)}' for reason in client['reasons'])}.</p>"
    columns = ("mean", "p50", "p90", "p99", "max")
    rows = [["ms", *columns]]
    for word, key in (("loop lag", "loop_lag_s"), ("send delay", "send_delay_s")):
        found = client[key]
        if found is not None:
            rows.append([word, *("-" if found[c] is None else f"{1e3 * found[c]:.2f}" for c in columns)])
    workers = [["worker", "verdict", "loop lag p99, ms", "send delay p99, ms", "CPU, s", "memory, MB"]] + [
        [
            f"{n}{' on ' + w['node'] if w.get('node') else ''}",
            w["verdict"] if w.get("lost_at") is None else f"lost at {w['lost_at']:.1f} s",
            *("-" if w[c] is None else f"{1e3 * w[c]:.2f}" for c in ("loop_lag_p99_s", "send_delay_p99_s")),
            f"{w['cpu_s']:.1f}", f"{w['rss_mb']:.0f}",
        ]
        for n, w in client.get("by_worker", {}).items()
    ]  # fmt: skip
    shown = svg.table(rows, "the client's delays") if len(rows) > 1 else ""
    return said + shown + (svg.numbers(f"{name}-workers", workers, "By worker") if len(workers) > 1 else "")


def _surroundings(summary: Mapping[str, Any], name: str) -> str:
    rows = words.environment_rows(summary)
    return (
        svg.numbers(f"{name}-surroundings", rows, "Client, servers and labels", kind="words") if len(rows) > 1 else ""
    )


def _scenario(text: str) -> str:
    return f"<details open><summary>scenario.toml</summary><pre>{esc(text)}</pre></details>"
