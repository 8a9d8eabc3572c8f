"""`fanmark verify`: each figure of a summary follows from the records, and what was changed afterwards is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.cli import app
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.verify import lines, verify

MIXED: dict[str, Any] = {
    "name": "verified",
    "seed": 3,
    "arm": [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", "agents": 2, "rounds": 1},
        {
            "name": "mixed",
            "mix": [
                {"name": "a", "topology": "single", "weight": 2},
                {"name": "b", "topology": "tool-chain", "tool_calls": 2},
            ],
        },
    ],
    "workload": {"answer": {"dist": "lognormal", "mean": 30, "cv": 0.4, "min": 5, "max": 90}, "judge_answer": 9},
    "objective": {"query_seconds": 1.0},
    "load": {"rate": 2.0, "duration": 4, "warmup": 1, "repeats": 5},
}
FAILING = MIXED | {"load": {"mode": "closed", "concurrency": 3, "queries": 8, "query_timeout_s": 0.9, "warmup": 1}}
PRICED = MIXED | {
    "targets": {
        "a": {"url": "http://127.0.0.1:1/v1", "prices": {"input": 1.0, "output": 3.0}},
        "b": {"url": "http://127.0.0.1:2/v1", "prices": {"input": 2.0, "cached_input": 0.5, "output": 9.0}},
    },
    "arm": [
        {"name": "single", "topology": "single", "baseline": True, "target": "a"},
        {"name": "debate", "topology": "debate", "agents": 2, "rounds": 1, "targets": {"judge": "b", "default": "a"}},
    ],
    "load": {"rate": 2.0, "queries": 6, "warmup": 1},
}
USERS = MIXED | {"load": {"users": 2, "turns": 2, "think_s": 0.1, "queries": 4, "warmup": 0}}
NATURAL = PRICED | {"workload": {"lengths": "natural", "cache": "warm"}}


def simulated(raw: dict[str, Any], out: Path) -> Path:
    simulate(scenario_check.check(raw, "verified.toml", topologies()), topologies(), Options(out, "0", []))
    return out


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(MIXED, tmp_path_factory.mktemp("verified") / "run")


def leaves(value: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return [found for key, part in value.items() for found in leaves(part, (*place, key))]
    return [place]


@pytest.mark.parametrize(
    "raw", [MIXED, FAILING, PRICED, USERS, NATURAL], ids=["mixed", "failing", "priced", "users", "natural"]
)
def test_what_a_simulation_leaves_is_verified(raw: dict[str, Any], tmp_path: Path) -> None:
    found = verify(simulated(raw, tmp_path / "run"), topologies())
    assert found.differ == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    whole = [place for place in leaves(summary) if place[0] in ("arms", "validity", "files", "retokenized_pct")]
    assert found.figures > len(whole) > 300
    assert {"schema", "target", "environment"} < set(", ".join(found.told).split(", "))


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "other" if value is None or isinstance(value, str) else {"other": 1}


def copy_of(run: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    return Path(shutil.copytree(run, tmp_path / "copy"))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_figure_that_was_changed_is_named(ended: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = copy_of(ended, tmp_path)
    summary = json.loads((copy / "summary.json").read_text())
    kept = [place for place in leaves(summary) if place[0] in ("arms", "files", "retokenized_pct")]
    place = data.draw(st.sampled_from(kept))
    *within, last = place
    table = summary
    for key in within:
        table = table[key]
    table[last] = changed(table[last])
    (copy / "summary.json").write_text(json.dumps(summary))
    assert [line for line in verify(copy, topologies()).differ if line.startswith(".".join(place))]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_record_that_was_changed_is_found_by_its_file(ended: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = copy_of(ended, tmp_path)
    name = data.draw(st.sampled_from(["calls.jsonl", "queries.jsonl", "windows.jsonl", "samples.jsonl"]))
    rows = [json.loads(line) for line in (copy / name).read_text().splitlines()]
    row = data.draw(st.sampled_from(rows))
    key = data.draw(st.sampled_from([key for key, value in row.items() if isinstance(value, int | float)]))
    row[key] = changed(row[key])
    (copy / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert any(line.startswith(f"files.{name}: ") for line in verify(copy, topologies()).differ)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_call_that_was_changed_is_found_by_its_figures(ended: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whoever mends the digest too has still changed what the query cost."""
    copy = copy_of(ended, tmp_path)
    rows = [json.loads(line) for line in (copy / "calls.jsonl").read_text().splitlines()]
    counted = [row for row in rows if row["query"] >= 0 and row["kind"] == "call"]
    row = data.draw(st.sampled_from(counted))
    key = data.draw(st.sampled_from(["input_tokens", "cached_tokens", "output_tokens", "sent_at", "done_at"]))
    row[key] = changed(row[key])
    (copy / "calls.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    where = f"queries.jsonl, {row['arm']} query {row['query']}: "
    assert any(line.startswith(where) for line in verify(copy, topologies()).differ)


def test_a_call_that_is_missing_is_found(ended: Path, tmp_path: Path) -> None:
    copy = copy_of(ended, tmp_path)
    calls = (copy / "calls.jsonl").read_text().splitlines(keepends=True)
    (copy / "calls.jsonl").write_text("".join(calls[:-1]))
    missing = json.loads(calls[-1])
    differ = verify(copy, topologies()).differ
    assert any(f"{missing['arm']} query {missing['query']}: calls is " in line for line in differ)
    assert any(line.startswith("server.request_success.client: ") for line in differ)


def test_what_it_says_and_its_exit_code(ended: Path, tmp_path: Path) -> None:
    copy = copy_of(ended, tmp_path)
    text = (copy / "summary.json").read_text()
    (copy / "summary.json").write_text(text.replace('"abandoned": 0', '"abandoned": 7', 1))
    whole = CliRunner().invoke(app, ["verify", str(ended)], standalone_mode=False)
    assert whole.return_value == 0
    assert " figures and the costs of " in whole.output and ", all equal\n" in whole.output
    both = CliRunner().invoke(app, ["verify", str(ended), str(copy)], standalone_mode=False)
    assert both.return_value == 1
    assert "  arms.single.queries.abandoned: the summary says 7, the records 0\n" in both.output
    many = lines(copy, verify(copy, topologies()))
    assert many[0].startswith(f"{copy}: 1 differ, of ")


def test_what_an_earlier_version_did_not_tell_of_is_null(ended: Path, tmp_path: Path) -> None:
    copy = copy_of(ended, tmp_path)
    summary = json.loads((copy / "summary.json").read_text())
    arm = summary["arms"]["single"]
    assert arm.pop("unrecorded") is None
    (copy / "summary.json").write_text(json.dumps(summary))
    assert verify(copy, topologies()).differ == []
    del arm["queries"]["started"]
    (copy / "summary.json").write_text(json.dumps(summary))
    (differs,) = verify(copy, topologies()).differ
    assert differs.startswith("arms.single.queries.started: the summary says missing, the records ")


@pytest.mark.parametrize(
    ("name", "text"), [("summary.json", None), ("summary.json", "{}"), ("queries.jsonl", "{}\n"), ("summary.json", "{")]
)
def test_a_folder_that_holds_no_whole_run_is_refused(ended: Path, tmp_path: Path, name: str, text: str | None) -> None:
    copy = copy_of(ended, tmp_path)
    (copy / name).unlink() if text is None else (copy / name).write_text(text)
    with pytest.raises(ScenarioError):
        verify(copy, topologies())
