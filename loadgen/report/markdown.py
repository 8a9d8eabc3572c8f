"""The report of one run or several as Markdown: what is text and table in the page. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fanmark.loadgen import frozen, table
from fanmark.loadgen.claims import rows as claim_rows
from fanmark.loadgen.cost_part import rows as cost_rows
from fanmark.loadgen.report import words
from fanmark.loadgen.report.charts import quantile_rows
from fanmark.loadgen.report.gather import Facts
from fanmark.loadgen.table import number
from fanmark.loadgen.tap.words import tables as tap_tables
from fanmark.loadgen.thresholds import lines as threshold_lines


def report(runs: Sequence[tuple[str, Facts]]) -> str:
    """The runs below each other; each with what it is called."""
    return "\n".join(line for _, facts in runs for line in run(facts))


def run(facts: Facts) -> Iterable[str]:
    """The lines of a run."""
    summary = facts.summary
    arms = summary["arms"]
    yield f"# {_safe(words.title(summary))}"
    for each in words.warnings(summary):
        yield f"\n**{_safe(each)}**"
    for each in words.answers(summary):
        yield f"\n{_safe(each)}"
    if summary["label"]:
        yield f"\n{_safe(frozen.line(summary['label']))}"
    head, *rows = table.amplification_rows(arms)
    titles = ["per query", *(title or "against the baseline" for title in head[1:])]
    yield from _table("Is it valid?", [["", "tick", "reason"], *table.ticks(summary["validity"])], "---")
    yield from _table("What a query costs", [titles, *([row[0].strip(), *row[1:]] for row in rows)])
    yield from (f"\n{_safe(each)}" for each in table.intervals(arms))
    told = tap_tables(summary, table.number) or {
        "Expected (closed form) against measured, per query": table.expected_rows(arms)
    }
    for title, told_rows in told.items():
        yield from _table(title, [[cell.strip() for cell in row] for row in told_rows])
    if costs := cost_rows(arms, table.number):
        yield from _table("Cost per query", costs)
    if fidelity := table.fidelity_rows(arms):
        yield from _table("Fidelity of the replay", fidelity)
    if found := threshold_lines(summary):
        yield from _block("Thresholds", found)
    if quality := table.quality_rows(arms):
        yield from _table("Right answers", quality)
    yield from _claims(arms)
    yield from _table("Query latency, s", quantile_rows(arms, "per_query", "latency_s"))
    yield from _table("Time to first token, s", quantile_rows(arms, "per_call", "ttft_s"))
    yield from _block("Client, server and what must be told", table.checks(summary))
    yield from _table("To repeat this run", words.repeat_rows(summary), "---")
    yield from _table("Client, servers and labels", words.environment_rows(summary), "---")
    yield from _block("scenario.toml", facts.scenario.rstrip().split("\n"))
    yield ""


def _claims(arms: Mapping[str, Any]) -> Iterable[str]:
    found = {name: arm["claim"] for name, arm in arms.items() if arm["claim"] is not None}
    rows = [row for name, claim in found.items() for row in claim_rows(name, claim, number)]
    if found:
        yield from _table("Claims", [["", "claimed", "measured", ""], *rows])
        for name, claim in found.items():
            yield f"\n{_safe(name)}: {_safe(claim['text'])} Source: {_safe(claim['source'])}"


def _table(title: str, rows: Sequence[Sequence[str]], columns: str = "---:") -> Iterable[str]:
    head, *body = rows
    yield f"\n## {title}\n"
    for row in (head, ["---", *[columns] * (len(head) - 1)], *body):
        yield f"| {' | '.join(_cell(cell) for cell in row)} |"


def _block(title: str, lines: Sequence[str]) -> Iterable[str]:
    """As it is; the fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(line) - len(line.lstrip("`")) for line in lines), default=0))
    yield f"\n## {title}\n\n{fence}"
    yield from lines
    yield fence


def _safe(text: str) -> str:
    """What a line of Markdown or the HTML in it would take for its own stands as it is."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def _cell(text: str) -> str:
    return text if text.strip("-:") == "" else _safe(text)
