"""Dashboards and rules against the metrics that exist: by name, and in a real Prometheus that scrapes a run."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, opened
from free_port import free_port
from prometheus_client.parser import text_string_to_metric_families
from running_prometheus import Prometheus, needs_prometheus, needs_promtool, scraping
from test_run import BRIEF, started

from fanmark.loadgen.metrics import Metrics, Told
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.trace_headers import trace_id
from fanmark.servers.tool_metrics import ToolMetrics
from fanmark.servers.vllm_metrics import Engine, EngineMetrics

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "dashboards"
RULES = FOLDER / "rules" / "fanmark.rules.yaml"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
RANGE = "[30s]"


def exprs(board: dict[str, Any]) -> list[str]:
    """Every PromQL expression of a dashboard."""
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return queries + [each["expr"] for each in board["annotations"]["list"]]


def filled(expr: str, **chosen: str) -> str:
    """The expression with values for its variables: all of them, where none is chosen."""
    expr = expr.replace("[$__rate_interval]", RANGE)
    return re.sub(r"\$(\w+)", lambda found: chosen.get(found[1], ".*"), expr)


def test_the_dashboards_are_as_generated() -> None:
    assert sorted(BOARDS) == ["fan-out", "run", "server"]
    command = [sys.executable, str(FOLDER / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=lambda v: v if isinstance(v, str) else v["title"])
def test_a_panel_can_be_read_without_asking(board: str, panel: dict[str, Any]) -> None:
    assert panel["title"] and len(panel["description"]) > 10
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    letters = [target["refId"] for target in panel["targets"]]
    assert all(letters) and len(set(letters)) == len(letters)
    for target in panel["targets"]:
        assert target["legendFormat"] and target["datasource"]["uid"] == "${datasource}"
    legends = [target["legendFormat"] for target in panel["targets"]]
    assert len(set(legends)) == len(legends), "two lines of one name"
    if panel["type"] == "timeseries":
        assert panel["options"]["legend"]["showLegend"]


@pytest.mark.parametrize("board", BOARDS)
def test_panels_have_numbers_and_places_of_their_own(board: str) -> None:
    panels = BOARDS[board]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and all(panel["id"] > 0 for panel in panels)
    boxes = [panel["gridPos"] for panel in panels]
    assert all(box["x"] >= 0 and box["x"] + box["w"] <= 24 for box in boxes)
    for a, b in combinations(boxes, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


@pytest.mark.parametrize("board", BOARDS)
def test_variables_that_are_used_are_defined_and_the_reverse(board: str) -> None:
    found = BOARDS[board]
    defined = {variable["name"] for variable in found["templating"]["list"]}
    text = json.dumps([found["panels"], found["annotations"]])
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == defined >= {"arm", "target", "datasource"}
    assert len({b["uid"] for b in BOARDS.values()}) == len(BOARDS)


@pytest.mark.parametrize("what", ["calls", "tool_calls", "depth", "tokens"])
def test_how_queries_are_spread_has_a_panel(what: str) -> None:
    assert any(
        e.startswith("histogram_quantile") and f"fanmark_query_{what}_bucket" in e for e in exprs(BOARDS["fan-out"])
    )


def declared() -> set[str]:
    """Names of all metrics that a run, its stub and its tool server tell."""
    names = set()
    for text in (
        Metrics(Tally({"a": "single"}, "a"), Told("r")).scrape("")[1].decode(),
        EngineMetrics("m", 4096, {}, 1.0).render(Engine()),
        ToolMetrics().render(0, []),
    ):
        for family in text_string_to_metric_families(text):
            ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            names |= {family.name + end for end in ends}
    return names


METRIC = re.compile(r"\b(?:fanmark_|vllm:)\w+")


@pytest.mark.parametrize("board", BOARDS)
def test_no_panel_asks_for_a_metric_that_does_not_exist(board: str) -> None:
    asked = {name for expr in exprs(BOARDS[board]) for name in METRIC.findall(expr)}
    assert asked and asked <= declared()


def test_rules_ask_only_for_metrics_that_exist() -> None:
    text = RULES.read_text()
    recorded = set(re.findall(r"record: (\S+)", text))
    lines = [line for line in text.splitlines() if not re.search(r"record:|alert:|name:|summary:|description:|#", line)]
    plain = re.sub("|".join(map(re.escape, sorted(recorded))), "", "\n".join(lines))
    assert set(METRIC.findall(plain)) <= declared()
    assert not [expr for board in BOARDS.values() for expr in exprs(board) for name in recorded if name in expr]


@needs_promtool
def test_rules_do_what_their_tests_say() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULES.with_name("fanmark.test.yaml"))]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    alerts = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    tests = RULES.with_name("fanmark.test.yaml").read_text()
    assert {alert for alert in alerts if f"alertname: {alert}" in tests} == alerts  # each is seen to fire


@needs_promtool
@pytest.mark.parametrize(
    ("rule", "other"),
    [
        ("share1m > 0.01", "share1m > 0.03"),
        ("> 0.95", "> 0.98"),
        ("validity == 0", "validity == 1"),
        ('client-limited"} == 1', 'client-limited"} == 2'),
        ("for: 1m", "for: 9m"),
        ('outcome="completed"', 'outcome!="completed"'),
    ],
)
def test_a_rule_that_is_changed_fails_its_test(rule: str, other: str, tmp_path: Path) -> None:
    shutil.copy(RULES.with_name("fanmark.test.yaml"), tmp_path)
    changed = RULES.read_text().replace(rule, other)
    assert changed != RULES.read_text()
    (tmp_path / RULES.name).write_text(changed)
    command = ["promtool", "test", "rules", str(tmp_path / "fanmark.test.yaml")]
    assert subprocess.run(command, capture_output=True).returncode == 1


SCENARIO = """name = "watched"
[[arm]]
name = "single"
topology = "single"
baseline = true
[[arm]]
name = "debate"
topology = "debate"
[[arm]]
name = "mcp-chain"
topology = "tool-chain"
[load]
stages = [{ seconds = 6, rate = 1.0 }, { seconds = 6, rate = 1.5 }]
process = "constant"
queries = 14
"""


@pytest.mark.real
@needs_prometheus
def test_every_query_of_every_panel_and_rule_returns_data_of_a_run(tmp_path: Path) -> None:
    port, scenario = free_port(), tmp_path / "watched.toml"
    scenario.write_text(SCENARIO)
    start_at, give_up_at = time.time(), time.monotonic() + 90
    flags = [str(scenario), "--metrics-port", str(port), "--metrics-hold", "80", "--quiet", *BRIEF]
    with scraping(port, tmp_path, RULES) as prometheus, started(tmp_path / "run", *flags) as process:
        while not prometheus.series("fanmark_validity", start_at, time.time()):  # told with the run's end
            assert process.poll() is None and time.monotonic() < give_up_at
            time.sleep(0.2)
        rules = ask_all(prometheus, start_at)
        check_variables(prometheus, start_at)
        check_picture(prometheus, start_at, tmp_path / "preview.html")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 0
    run_id = json.loads((tmp_path / "run" / "summary.json").read_text())["run"]["id"]
    traces = {trace_id(run_id, arm, i) for arm in ("single", "debate", "mcp-chain") for i in range(14)}
    assert rules["traces"] and rules["traces"] <= traces
    assert rules["firing"] <= {"FanmarkTickFailed", "FanmarkClientStrained", "FanmarkClientLimited"}


def check_picture(prometheus: Prometheus, start_at: float, path: Path) -> None:
    """The dashboards without a Grafana: every panel is drawn, and a browser takes the page."""
    asked = [prometheus.url, "--start", str(start_at), "--end", str(time.time())]
    done = subprocess.run([sys.executable, str(FOLDER / "preview.py"), *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path.write_text(done.stdout)
    assert done.stdout.count("<section") == len(PANELS) and "no data" not in done.stdout
    lines = sum(len(panel["targets"]) for _, panel in PANELS if panel["type"] == "timeseries")
    assert done.stdout.count('vector-effect="non-scaling-stroke"') >= lines
    if CHROMIUM is not None:
        assert opened(path.as_uri()).count("<section") == len(PANELS)


def ask_all(prometheus: Prometheus, start_at: float) -> dict[str, set[str]]:
    """Every expression has a series with a number in it; the traces that were kept, and the alerts that fire."""
    end_at = time.time()
    empty = [
        (name, expr)
        for name, board in BOARDS.items()
        for expr in map(filled, exprs(board))
        if not prometheus.series(expr, start_at, end_at)
    ]
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    empty += [("rules", name) for name in recorded if not prometheus.series(name, start_at, end_at)]
    assert not empty and len(recorded) == 6
    kept = prometheus.get(
        "query_exemplars", query="fanmark_query_duration_seconds_bucket", start=str(start_at), end=str(end_at)
    )
    traces = {exemplar["labels"]["trace_id"] for series in kept for exemplar in series["exemplars"]}
    firing = {rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] == "firing"}
    return {"traces": traces, "firing": firing}


def check_variables(prometheus: Prometheus, start_at: float) -> None:
    """Each offers what there is, and choosing one value leaves the others' series out."""
    wanted = {
        "arm": {"single", "debate", "mcp-chain"},
        "target": {"default"},
        "resource": {"calls", "input_tokens", "output_tokens", "cached_tokens", "fresh_tokens", "latency_s", "work_s"},
        "model": {"qwen3-30b-a3b"},
    }
    variables = {v["name"]: v["query"] for board in BOARDS.values() for v in board["templating"]["list"]}
    for name, values in wanted.items():
        found = re.fullmatch(r"label_values\((\S+), (\w+)\)", variables[name])
        assert found is not None
        assert set(prometheus.get(f"label/{found[2]}/values", **{"match[]": found[1]})) == values
    expr = next(e for e in exprs(BOARDS["fan-out"]) if "started" in e)
    chosen = prometheus.series(filled(expr, arm="debate"), start_at, time.time())
    assert {series["labels"]["arm"] for series in chosen} == {"debate"}
    ratio = prometheus.series(
        filled(exprs(BOARDS["fan-out"])[1], resource="calls", arm="debate"), start_at, time.time()
    )
    assert [(series["labels"]["resource"], series["values"][-1]) for series in ratio] == [("calls", 9.0)]
    for target, some in (("default", True), ("other", False)):
        expr = next(e for e in exprs(BOARDS["fan-out"]) if "ttft" in e)
        assert bool(prometheus.series(filled(expr, target=target), start_at, time.time())) is some
