"""The shapes of load, each as a whole run in virtual time: when queries start, what is delayed, what is given up."""

import json
from pathlib import Path
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.simulate import Options, simulate

ARM = "[[arm]]\nname = 'single'\ntopology = 'single'\nbaseline = true\n[workload]\nanswer = 50\n"


def run(folder: Path, load: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The arm's summary, and its queries but for the warm-up in the order in which they were due."""
    (folder / "load.toml").write_text(f"{ARM}[load]\nwarmup = 0\n{load}")
    raw, source = scenario_check.read(str(folder / "load.toml"))
    scenario = scenario_check.check(raw, source, topologies())
    summary = simulate(scenario, topologies(), Options(folder / "run", "test", [])).summary
    rows = [json.loads(line) for line in (folder / "run" / "queries.jsonl").read_text().splitlines()]
    return summary["arms"]["single"], sorted(rows, key=lambda row: row["due_at"])


def test_a_replay_starts_queries_at_the_times_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "times.txt").write_text("0.5\n0\n3.25\n")
    arm, rows = run(tmp_path, "process = 'replay'\narrivals = 'times.txt'\n")
    assert [row["due_at"] for row in rows] == [0.0, 0.5, 3.25]
    assert [row["started_at"] for row in rows] == [0.0, 0.5, 3.25]
    assert arm["queries"]["completed"] == 3
    assert "arrivals = [" in (tmp_path / "run" / "scenario.toml").read_text()  # repeats without the file


@pytest.mark.parametrize("line", ["x", "-1", "nan", "inf"])
def test_a_replay_of_what_is_no_time_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "times.txt").write_text(f"0.5\n{line}\n")
    with pytest.raises(ScenarioError, match=f"line 2 is '{line}': give a start time in seconds, 0 or more"):
        run(tmp_path, "process = 'replay'\narrivals = 'times.txt'\n")


def test_stages_end_the_run_with_the_last_one(tmp_path: Path) -> None:
    stages = "process = 'constant'\n[[load.stages]]\nseconds = 4\nrate = 1\n[[load.stages]]\nseconds = 2\nrate = 5\n"
    _, rows = run(tmp_path, stages)
    assert [row["due_at"] for row in rows] == pytest.approx([0, 1, 2, 3] + [4 + i / 5 for i in range(10)])


def test_a_guard_delays_and_says_so(tmp_path: Path) -> None:
    """Three queries due at once, one at a time: latency counts from the due time, and the delay is told apart."""
    arm, rows = run(tmp_path, "process = 'replay'\narrivals = [0.0, 0.0, 0.0]\nmax_in_flight = 1\n")
    starts, ends = sorted(row["started_at"] for row in rows), sorted(row["done_at"] for row in rows)
    assert starts == pytest.approx([0.0, ends[0], ends[1]])
    assert arm["load"]["start_delay_s"]["max"] == pytest.approx(ends[1])
    assert arm["load"]["held_back"] == 2
    assert arm["per_query"]["latency_s"]["max"] == pytest.approx(ends[2])


def test_a_query_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    arm, rows = run(tmp_path, "queries = 2\nquery_timeout_s = 0.1\n")
    assert arm["queries"] == {"started": 2, "completed": 0, "failed": 2, "abandoned": 0}
    assert [row["done_at"] - row["started_at"] for row in rows] == pytest.approx([0.1, 0.1])
    assert arm["failures"] == {"timeout: no final answer within 0.1 s": 2}
