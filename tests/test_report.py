"""The report: a page that needs nothing else, whose numbers are the summary's and the records', in text, tables and pictures."""

import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Node, loaded, parse

from fanmark.agents import topologies
from fanmark.loadgen import cli, scenario_check
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import critical_path, read_queries
from fanmark.loadgen.report import gather as gathering
from fanmark.loadgen.report.gather import gather
from fanmark.loadgen.report.svg import Scale, figure, log_scale, numbers, picture
from fanmark.loadgen.report.svg import text as svg_text
from fanmark.loadgen.report.swimlane import lanes
from fanmark.loadgen.report.timeline import binned
from fanmark.loadgen.report.write import render
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.table import TICKS, number, ratio

NASTY = '<b>"x"</b>&amp;<script>alert(1)</script>'


def simulated(out: Path, *settings: str) -> Path:
    raw, source = scenario_check.read("quickstart")
    scenario_check.override_load(raw, 30, None, 1.0, None, None)
    scenario_check.override(raw, settings)
    simulate(scenario_check.check(raw, source, topologies()), topologies(), Options(out, "0", [], {"note": NASTY}))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 queries of each arm of the quickstart, in virtual time: enough for a p90, too few for a p99."""
    return simulated(tmp_path_factory.mktemp("simulated") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> Node:
    return parse((run / "report.html").read_text())


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def section(page: Node, title: str) -> Node:
    return next(node for node in page.all("section") if node.children[0].text == title)


def test_the_page_needs_nothing_else_and_runs_nothing(page: Node) -> None:
    assert loaded(page) == [] and page.all("script") == []
    assert page.all("html")[0].attributes["lang"] == "en" and len(page.all("h1")) == 1
    policy = page.all("meta", http_equiv="Content-Security-Policy") or page.all("meta")
    assert any("default-src 'none'" in node.attributes.get("content", "") for node in policy)
    style = page.all("style")[0].text
    assert "prefers-color-scheme:dark" in style and "@media print" in style and "http" not in style


def test_what_comes_from_elsewhere_is_text(page: Node) -> None:
    cells = {row[0]: row[1] for row in section(page, "To repeat this run").all("table")[1].rows()}
    assert cells["labels.note"] == NASTY


words = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)


@settings(max_examples=50)
@given(st.lists(st.tuples(words, words), min_size=1), words)
def test_whatever_a_cell_holds_is_read_as_it_was_written(rows: list[tuple[str, str]], title: str) -> None:
    found = parse(figure(title, picture(title, 10, [svg_text(50, 5, title)]), numbers("id", rows, title)))
    assert found.all("table")[0].rows() == [list(row) for row in rows]
    assert (
        found.all("text")[0].text
        == found.all("svg")[0].attributes["aria-label"]
        == found.all("figcaption")[0].text
        == title
    )


def test_every_picture_says_what_it_shows_and_has_its_numbers_beside_it(page: Node) -> None:
    pictures = [node for node in page.all("svg") if node.attributes.get("role") == "img"]
    assert len(pictures) > 15
    assert all(len(node.attributes["aria-label"]) > 20 for node in pictures)
    figures = page.all("figure")
    assert len(figures) == len(pictures)
    assert all(len(figure.all("table")[0].rows()) > 1 for figure in figures)
    # whatever else is drawn is not read aloud, or part of a picture
    inner = [node for figure in pictures for node in figure.all("svg")]
    for node in page.all("svg"):
        assert node in inner or node.attributes.get("aria-hidden") == "true"


def test_the_answer_comes_first_with_the_load_that_it_holds_at(page: Node, summary: dict[str, Any]) -> None:
    said = [node.text for node in page.all("p", class_="answer")]
    base = summary["arms"]["single"]["load"]
    for name, sentence in zip(("debate", "mcp-chain"), said, strict=True):
        load, ratios = summary["arms"][name]["load"], summary["arms"][name]["amplification"]
        assert sentence == (
            f"At {number(load['completed_qps'])} queries/s, {number(load['calls_in_flight']['mean'])} calls in flight (single: "
            f"{number(base['completed_qps'])} queries/s, {number(base['calls_in_flight']['mean'])} calls in flight), one {name} query "
            f"costs {ratios['calls']['ratio']:.2f}x the calls, {ratios['output_tokens']['ratio']:.2f}x the output tokens and "
            f"{ratios['latency_s']['ratio']:.2f}x the latency of a single query."
        )


def test_all_ticks_stand_there_with_their_reasons(page: Node, summary: dict[str, Any]) -> None:
    items = [node.text for node in page.all("ul", class_="ticks")[0].children]
    validity = summary["validity"]
    for key, title in TICKS.items():
        if key in validity:
            word = {True: "ok", False: "FAILED", None: "not known"}[validity[key]]
            assert any(f"{word}: {title} {validity['reasons'][key]}" in item for item in items), key


def test_ratios_and_means_are_the_summarys(page: Node, summary: dict[str, Any]) -> None:
    cost, arms = section(page, "What a query costs"), summary["arms"]
    rows = {row[0]: row[1:] for row in cost.all("table")[-1].rows()}
    for title, key in (
        ("calls", "calls"),
        ("fresh", "fresh_tokens"),
        ("latency, s", "latency_s"),
        ("work, s", "work_s"),
    ):
        expected = [number(arms["single"]["per_query"][key]["mean"])]
        for name in ("debate", "mcp-chain"):
            expected += [number(arms[name]["per_query"][key]["mean"]), ratio(arms[name]["amplification"][key])]
        assert rows[title] == expected
    assert rows["queries/s"][1] == number(arms["debate"]["load"]["completed_qps"])


def test_bars_are_as_long_as_the_ratios(page: Node, summary: dict[str, Any]) -> None:
    """On a log scale from 1x: the bar of the arm with the ratio r ends where the axis has r."""
    figure = next(f for f in page.all("figure") if f.children[0].text == "debate")
    grid = {t.text: float(t.attributes["x"][:-1]) for t in figure.all("text", class_="tick")}
    per_decade = grid["100x"] - grid["10x"]
    bars = [(float(r.attributes["x"][:-1]), float(r.attributes["width"][:-1])) for r in figure.all("rect")]
    found = summary["arms"]["debate"]["amplification"]
    labels = [t.text for t in figure.all("text", class_="label")]
    for resource, title in (("calls", "calls"), ("output_tokens", "output tokens"), ("latency_s", "latency")):
        i = next(i for i, label in enumerate(labels) if label == f"{title}: {ratio(found[resource])}")
        assert bars[i][0] == pytest.approx(grid["1x"], abs=0.01)
        assert bars[i][1] == pytest.approx(per_decade * math.log10(found[resource]["ratio"]), abs=0.01)


def test_quantiles_are_the_summarys_and_unknown_where_they_are(page: Node, summary: dict[str, Any]) -> None:
    tables = section(page, "How long it takes").all("table")
    for table, part, resource in ((tables[0], "per_query", "latency_s"), (tables[1], "per_call", "ttft_s")):
        for name, arm in summary["arms"].items():
            found = arm[part][resource]
            row = next(row for row in table.rows() if row[0] == name)
            assert row[1:] == [number(found[c]) for c in ("mean", "p50", "p90", "p99", "max", "n")]
    assert tables[0].rows()[1][4] == "-"


def test_the_curves_hold_every_counted_query_and_call(run: Path, summary: dict[str, Any]) -> None:
    facts = gather(run)
    for name, arm in summary["arms"].items():
        assert sum(facts.latency[name].values()) == arm["per_query"]["latency_s"]["n"] == 30
        assert sum(facts.ttft[name].values()) == arm["per_call"]["ttft_s"]["n"]


def test_of_a_long_run_every_so_manieth_call_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gather(run)
    monkeypatch.setattr(gathering, "_MOST_TTFT", 100)
    few = gather(run)
    counts = [sum(sum(each.values()) for each in facts.ttft.values()) for facts in (whole, few)]
    assert 50 < counts[1] <= 100 < counts[0]
    as_it_was = [[(s.word, s.query.query, len(s.query.calls)) for s in f.shown["mcp-chain"]] for f in (whole, few)]
    assert as_it_was[0] == as_it_was[1] and as_it_was[0][0][2] == 25


def test_the_typical_query_is_of_median_latency_and_the_slow_one_of_the_slowest_tenth(run: Path) -> None:
    facts = gather(run)
    for name, shown in facts.shown.items():
        ordered = sorted((q.done_at - q.due_at, q.query) for q in read_queries(run) if q.arm == name and not q.warmup)
        place = {one.word: [n for _, n in ordered].index(one.query.query) for one in shown}
        assert place == {"typical": 14, "slow": 27}  # of 30; three are at least so slow


def test_a_swim_lane_has_all_calls_and_marks_the_critical_path(run: Path, page: Node) -> None:
    queries = {(q.arm, q.query): q for q in read_queries(run)}
    figures = [f for f in page.all("figure") if "typical debate" in f.children[0].text]
    assert len(figures) == 1
    figure = figures[0]
    query = queries["debate", int(figure.all("summary")[0].text.rpartition(" ")[2])]
    assert (
        figure.children[0].text
        == f"A typical debate query, of median latency: {number(query.done_at - query.due_at)} s"
    )
    assert [t.text for t in figure.all("text", class_="label")] == ["agent-1", "agent-2", "agent-3", "agent-4", "judge"]
    rows = {row[0]: row for row in figure.all("table")[0].rows()[1:]}
    path = critical_path(query.needed)
    assert len(rows) == len(query.calls) == 9
    for call in query.calls:
        row = rows[str(call.call)]
        assert ("critical path" in row[1]) == (call in path)
        assert row[4:8] == [
            f"{at - query.due_at:.3f}" for at in (call.due_at, call.sent_at, call.first_at, call.done_at) if at
        ]
        assert row[8:11] == [number(call.input_tokens), number(call.cached_tokens), number(call.output_tokens)]
    marked = figure.all("rect", class_="critical")
    scale = Scale(0.0, query.done_at - query.due_at)
    widths = [float(rect.attributes["width"][:-1]) for rect in marked]
    assert sorted(widths) == pytest.approx(sorted(scale.at(call.seconds) for call in path), abs=0.001)


def test_tokens_by_role_add_up_to_a_query(page: Node, summary: dict[str, Any]) -> None:
    figure = next(f for f in page.all("figure") if f.children[0].text == "debate: tokens of a query by role")
    rows = figure.all("table")[0].rows()
    for column, resource in ((1, "calls"), (2, "input_tokens"), (3, "cached_tokens"), (4, "output_tokens")):
        total = sum(float(row[column].replace(",", "")) for row in rows[1:])
        assert total == pytest.approx(summary["arms"]["debate"]["per_query"][resource]["mean"], rel=0.01), resource


def test_what_repeats_the_run_is_there(run: Path, page: Node, summary: dict[str, Any]) -> None:
    whole = section(page, "To repeat this run")
    cells = {row[0]: row[1] for row in whole.all("table")[0].rows()}
    assert cells["seed"] == str(summary["run"]["seed"]) and cells["version"] == summary["run"]["version"]
    assert whole.all("pre")[0].text == (run / "scenario.toml").read_text()


def test_a_run_that_failed_says_so_before_its_answer_is_believed(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in run.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    found = json.loads((run / "summary.json").read_text())
    found["validity"]["reconciled"] = False
    found["validity"]["reasons"]["reconciled"] = "prompt_tokens differ"
    found["ended"] = {"why": "budget", "reason": "dollars reached"}
    found["arms"]["debate"]["amplification"]["latency_s"] = {
        "ratio": None,
        "low": None,
        "high": None,
        "method": "over capacity",
    }
    found["arms"]["mcp-chain"]["queries"]["completed"] = 0
    (broken / "summary.json").write_text(json.dumps(found))
    page = parse(render([broken], "html"))
    assert [node.text for node in page.all("p", class_="warning")] == [
        "⚠ The run was cut short (budget): dollars reached.",
        "⚠ Not to be trusted as it stands: reconciled failed, see below.",
    ]
    said = [node.text for node in page.all("p", class_="answer")]
    assert said[0].endswith("the output tokens of a single query; its latency is not compared: over capacity.")
    assert said[1] == "What one mcp-chain query costs is not known: no mcp-chain query completed."
    first = page.all("ul", class_="ticks")[0].children[0]
    assert first.text.endswith("FAILED: reconciled prompt_tokens differ") and first.attributes["class"] == "bad"


def test_a_run_without_a_completed_query_has_a_report(tmp_path: Path) -> None:
    out = simulated(tmp_path / "run", "load.query_timeout_s=0.001")
    page = parse((out / "report.html").read_text())
    assert "no debate query completed" in page.all("p", class_="answer")[0].text


def test_several_runs_stand_below_each_other(run: Path, tmp_path: Path) -> None:
    other = simulated(tmp_path / "other", "seed=8")
    page = parse(render([run, other], "html"))
    assert [link.attributes["href"] for link in page.all("a")] == ["#run1", "#run2"]
    assert len(page.all("article")) == 2


def test_markdown_has_the_same_tables(run: Path, page: Node) -> None:
    text = render([run], "md")
    lines = text.split("\n")
    assert lines[2] == page.all("p", class_="answer")[0].text
    html = section(page, "What a query costs").all("table")[-1].rows()
    start = lines.index("## What a query costs") + 2
    table = lines[start : start + len(html) + 1]
    cells = [[cell.strip().replace("\\", "") for cell in line[1:-1].split(" | ")] for line in table]
    assert [cells[0], *cells[2:]] == html
    assert NASTY not in text and "\\<b\\>" in text


def cli_report(*args: str) -> None:
    cli.app(["report", *args], standalone_mode=False)


def test_the_command_writes_where_it_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    cli_report(str(run))
    assert (run / "report.html").read_bytes() == before
    cli_report(str(run), "--format", "md")
    assert "# quickstart: 90 queries" in capsys.readouterr().out
    cli_report(str(run), str(run), "--out", str(tmp_path / "both.html"))
    assert (tmp_path / "both.html").read_text().count("<article") == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{run}", "--format", "pdf"], "--format pdf: must be html or md"),
        (["{run}", "{run}"], "--out: 2 runs in one page need the name of a file"),
        (["{run}/.."], "holds no run that has ended"),
    ],
)
def test_what_cannot_be_reported_is_one_line(run: Path, args: list[str], said: str) -> None:
    with pytest.raises(ScenarioError, match=re.escape(said)):
        cli_report(*(arg.format(run=run) for arg in args))


def test_another_schema_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("scenario.toml", "queries.jsonl", "calls.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "summary.json").write_text('{"schema": "fanmark.summary/0"}')
    with pytest.raises(ScenarioError, match=re.escape("fanmark.summary/0")):
        gather(tmp_path)


@pytest.mark.parametrize(
    ("values", "low", "high", "ticks"),
    [
        ([9.0, 103.0], 5, 200, [5, 10, 20, 50, 100, 200]),
        ([1.0, 1.0], 1, 10, [1, 2, 5, 10]),
        ([0.003, 4000.0], 0.002, 5000, [0.01, 0.1, 1, 10, 100, 1000]),
        ([2.0, 2.0], 2, 20, [2, 5, 10, 20]),
    ],
)
def test_log_scales_begin_and_end_at_round_values(
    values: list[float], low: float, high: float, ticks: list[float]
) -> None:
    scale = log_scale(values)
    assert (scale.low, scale.high) == pytest.approx((low, high))
    assert scale.ticks() == pytest.approx(ticks)
    assert scale.at(scale.low) == 0.0 and scale.at(scale.high) == pytest.approx(100.0)


@pytest.mark.parametrize("high", [0.0007, 0.9, 1.0, 3.3, 18.0, 61.0, 4321.0])
def test_linear_scales_have_a_few_round_ticks(high: float) -> None:
    ticks = Scale(0.0, high).ticks()
    assert 2 <= len(ticks) <= 11 and ticks[0] == 0.0 and ticks[-1] <= high * 1.0001


def test_calls_of_a_role_that_overlap_get_lanes_of_their_own(run: Path) -> None:
    found = lanes(next(q for q in read_queries(run) if q.arm == "debate").calls)
    assert [name for name, _ in found] == ["agent-1", "agent-2", "agent-3", "agent-4", "judge"]
    at_once = [msgspec.structs.replace(call, role="worker") for _, lane in found for call in lane]
    several = lanes(at_once)
    assert [name for name, _ in several] == ["worker", "", "", ""]
    assert sum(len(lane) for _, lane in several) == 9


def test_a_timeline_of_many_samples_is_of_means() -> None:
    at, series = binned([1.0, 2.0, 3.0, 4.0, 5.0], {"a": [1.0, 3.0, None, None, 7.0]}, 3)
    assert at == [2.0, 4.0, 5.0] and series == {"a": [2.0, None, 7.0]}
