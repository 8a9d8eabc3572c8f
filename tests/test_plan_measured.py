"""`fanmark plan --measured`: what a sweep of one server found, set beside the plan."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fanmark.loadgen.cli import app
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.plan_table import measured_line

SMALL = (
    'name = "small"\n[workload]\nsystem = 0\nquestion = 30\nanswer = 10\n[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n'
    "[objective]\nquery_seconds = 2.0\nattainment = 0.9\n"
)


def planned(tmp_path: Path, sweep: Path, *flags: str) -> dict[str, object]:
    scenario = tmp_path / "small.toml"
    scenario.write_text(SMALL)
    given = [
        "plan",
        str(scenario),
        "--measured",
        str(sweep),
        "--out",
        str(tmp_path / "plan"),
        "--json",
        "--quiet",
        *flags,
    ]
    done = CliRunner().invoke(app, given, standalone_mode=False, catch_exceptions=False)
    return dict(json.loads(done.stdout)["arms"]["single"]["plan"]["measured"])


def swept(tmp_path: Path, arm: str = "single") -> Path:
    """10 good queries/s of one server, 8 at least, and no upper end: nothing failed."""
    capacity = {"qps": 10.0, "low": 8.0, "high": None}
    found = {"clock": "real", "arms": {arm: {"on": {"query": {"capacity": capacity}}}}}
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    return tmp_path


@pytest.mark.slow
def test_the_load_over_what_one_server_carried_at_the_peak(tmp_path: Path) -> None:
    told = planned(tmp_path, swept(tmp_path), "--rate", "20", "--peak", "1.5", "--burstiness", "1")
    assert (told["servers"], told["servers_low"], told["servers_high"]) == (3, None, 4)  # 30 queries/s
    line = measured_line({"measured": told})
    assert line.startswith("measured 3 [?, 4] servers, by the 10 good queries/s that one carried alone (in real time, ")
    assert measured_line({}) == ""


@pytest.mark.parametrize(
    ("arm", "flags", "said"),
    [
        ("other", ["--rate", "2"], "knows the capacity of other: sweep an arm that is planned"),
        ("single", ["--users", "2"], "is held against a rate: give --rate QPS"),
    ],
)
def test_what_cannot_be_held_against_it_is_refused(tmp_path: Path, arm: str, flags: list[str], said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        planned(tmp_path, swept(tmp_path, arm), *flags)


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no sweep can be read there"):
        planned(tmp_path, tmp_path, "--rate", "2")
