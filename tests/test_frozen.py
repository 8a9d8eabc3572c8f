"""The frozen scenario: its file never changes, a whole run of it has a label, and any other says why it has none."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.loadgen.frozen import FROZEN, label, line
from fanmark.loadgen.report.svg import esc
from fanmark.loadgen.report.write import render
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.scenario_check import check, read
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.verify import verify


def scenario(**load: Any) -> Scenario:
    raw, source = read("fanmark-1")
    return check(raw | {"load": raw["load"] | load}, source, topologies())


pytestmark = pytest.mark.slow  # a whole run of it is ten thousand calls in virtual time


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frozen") / "run"
    simulate(scenario(), topologies(), Options(out, "0", []))
    return out


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_file_is_what_it_was(name: str) -> None:
    text = files("fanmark.loadgen").joinpath("scenarios", f"{name}.toml").read_bytes()
    assert hashlib.sha256(text).hexdigest() == FROZEN[name]
    assert len(read(name)[0]["arm"]) == 6


def test_a_whole_run_has_a_label_of_its_figures(whole: Path) -> None:
    found = json.loads((whole / "summary.json").read_text())
    arms, text = found["arms"], found["label"]["text"]
    assert (found["label"]["quotable"], found["label"]["reasons"]) == (True, [])
    assert text.startswith("fanmark-1 0d046fe3 (simulated), qwen3-30b-a3b on engine model: reasoning ")
    for name in ("reasoning", "debate", "panel", "tool-chain", "orchestrator"):
        ratios = [arms[name]["amplification"][each] for each in ("output_tokens", "latency_s")]
        assert f"{name} {ratios[0]['ratio']:.1f}x/{ratios[1]['ratio']:.1f}x" in text
        assert all(each["low"] < each["ratio"] < each["high"] for each in ratios)
    in_flight = sum(arm["load"]["calls_in_flight"]["mean"] for arm in arms.values())
    assert f"({arms['single']['per_query']['latency_s']['mean']:.2f} s) at {in_flight:.2f} calls in flight" in text
    assert not verify(whole, topologies()).differ
    assert esc(text) in render([whole], "html")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"partial": True, "ended": {"why": "interrupted", "reason": ""}}, "the run was cut short (interrupted)"),
        ({"run": {"time_scale": 10.0}}, "the stub's time ran 10 times as fast"),
        ({"validity": {"steady": False, "reasons": {"steady": "uneven"}}}, "steady failed (uneven)"),
        (
            {"validity": {"reconciled": None, "reasons": {"reconciled": "no counters"}}},
            "reconciled is not known (no counters)",
        ),
        (
            {"arms": {"debate": {"amplification": {"latency_s": {"low": None, "method": "over capacity"}}}}},
            "debate: its latency_s ratio has no interval (over capacity)",
        ),
    ],
)
def test_what_is_not_sound_is_named_in_its_place(whole: Path, change: dict[str, Any], reason: str) -> None:
    summary = merged(json.loads((whole / "summary.json").read_text()), change)
    found = label(scenario(), summary)
    assert found is not None
    assert (found["quotable"], found["text"], found["reasons"]) == (False, None, [reason])
    assert line(found) == f"label    not quotable: {reason}"


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return old | {key: merged(old[key], value) if isinstance(old[key], dict) else value for key, value in new.items()}


def test_a_changed_scenario_is_another(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    found = label(scenario(concurrency=3), summary)
    assert found is not None
    assert found["reasons"] == ["the scenario was changed: load.concurrency is 3 and not 2"]
    raw, source = read("quickstart")
    assert label(check(raw, source, topologies()), summary) is None


def test_another_server_and_a_budget_do_not_change_it(whole: Path) -> None:
    raw, source = read("fanmark-1")
    elsewhere = {"target": {"url": "http://127.0.0.1:1/v1"}, "budget": {"calls": 10**6}}
    found = label(check(raw | elsewhere, source, topologies()), json.loads((whole / "summary.json").read_text()))
    assert found is not None
    assert found["quotable"]
