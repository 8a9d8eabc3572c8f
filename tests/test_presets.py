"""Presets: every one is a scenario that holds, an arm's own keys override it, and a claim is held against what was found."""

import io
from pathlib import Path
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.agents.presets import presets
from fanmark.loadgen.claims import held
from fanmark.loadgen.dry_run import plan
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lengths import Dist, draw_int
from fanmark.loadgen.results import print_result
from fanmark.loadgen.scenario import Arm, Scenario
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.summary import COUNTS, TIMES

TABLE = topologies()
SINGLE: dict[str, Any] = {"name": "single", "topology": "single", "baseline": True}


def scenario(arm: dict[str, Any], **more: Any) -> Scenario:
    return check({"arm": [SINGLE, {"name": "a", **arm}], "load": {"queries": 4, "rate": 1}, **more}, "f.toml", TABLE)


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_an_arm(name: str) -> None:
    preset = presets()[name]
    found = scenario({"preset": name})
    arm = found.arms[1]
    assert (arm.preset, arm.topology, arm.params, arm.workload) == (
        name,
        preset.topology,
        preset.params,
        preset.workload,
    )
    assert preset.source and preset.summary
    planned = plan(found, TABLE)["a"]
    assert planned["calls"] >= 4 and (planned["claim"] is None) == (preset.claim is None)
    if preset.claim is not None:
        assert 0 < preset.claim.low <= preset.claim.high and set(preset.claim.resources) <= {*COUNTS, *TIMES}


def test_an_arms_own_keys_and_lengths_override() -> None:
    arm = scenario({"preset": "du-debate", "agents": 5, "workload": {"question": 90}}).arms[1]
    assert arm.params == {**presets()["du-debate"].params, "agents": 5}
    assert arm.workload == {"system": 0, "role": 0, "question": 90, "instruction": 240}
    again = scenario({"preset": "du-debate", "topology": "debate", "agents": 5, "workload": {"question": 90}}).arms[1]
    assert again == arm  # a resolved scenario names both


def test_an_arm_that_is_asked_other_questions_than_the_baseline_is_told() -> None:
    [line] = scenario({"preset": "du-debate"}).unlike_baseline()  # whose question is as long, without a system message
    assert line.startswith("a: its system lengths are not the baseline's")
    assert scenario({"preset": "du-debate"}, workload={"system": 0}).unlike_baseline() == []
    assert scenario({"preset": "grok-4", "workload": {"answer": 90}}).unlike_baseline() == []


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such preset": ({"preset": "grok"}, f'preset = "grok": must be one of {", ".join(presets())}'),
    "another topology": (
        {"preset": "moa", "topology": "debate"},
        'topology = "debate" with preset = "moa": that is a mixture-of-agents: leave one of the two out',
    ),
    "another topology's key": ({"preset": "moa", "rounds": 2}, "unknown key 'rounds'"),
    "no table": ({"preset": "moa", "workload": 3}, "workload = 3: must be a table"),
}


@pytest.mark.parametrize(("arm", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_with_a_preset(arm: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario(arm)
    assert str(caught.value).startswith(f"f.toml: arm 'a': {told}")


def test_tools_are_called_as_often_as_the_claim_says() -> None:
    """Every number from 10 to 50 is drawn, and none beyond."""
    given = presets()["tools-10-50"].params["tool_calls"]
    drawn = {draw_int(Dist(**given), 1, i) for i in range(2000)}
    assert drawn == set(range(10, 51))


def test_traced_tool_calls_have_the_traces_mean_and_median() -> None:
    given = presets()["coding-tracelab"].params["tool_calls"]
    drawn = sorted(draw_int(Dist(**given), 1, i) for i in range(20000))
    assert sum(drawn) / len(drawn) == pytest.approx(10.8, rel=0.1)
    assert drawn[len(drawn) // 2] == 2


def test_game_of_24_writes_its_papers_tokens() -> None:
    assert plan(scenario({"preset": "tot-game24"}), TABLE)["a"]["output_tokens"] == 4 * 5500


@pytest.mark.parametrize(
    ("value", "where"), [(None, None), (1.49, "below"), (1.5, "within"), (2.5, "within"), (2.51, "above")]
)
def test_where_a_value_stands_to_a_claim(value: float | None, where: str | None) -> None:
    claim = held(Arm("a", "panel", preset="grok-4"), lambda unit, _: value if unit == "x" else None)
    assert claim is not None
    assert {(at["value"], at["is"]) for at in claim["measured"].values()} == {(value, where)}
    assert held(Arm("a", "panel"), lambda *_: value) is None


def test_a_claim_is_told_beside_what_was_measured(tmp_path: Path) -> None:
    found = scenario({"preset": "grok-4"}, workload={"answer": 40, "turn": 5})
    result = simulate(found, TABLE, Options(tmp_path / "run", "0", []))
    arms = result.summary["arms"]
    assert arms["single"]["claim"] is None
    measured = arms["a"]["claim"]["measured"]
    for resource in ("calls", "input_tokens", "fresh_tokens", "output_tokens", "latency_s", "work_s"):
        assert measured[resource]["value"] == arms["a"]["amplification"][resource]["ratio"]
    assert measured["dollars"] == {"value": None, "is": None}  # no prices
    to = io.StringIO()
    print_result(result.summary, tmp_path / "run", to)
    printed = to.getvalue()
    assert "a: a query costs 1.5 to 2.5 times a single pass, not 4 times" in printed
    assert "a calls          1.50 to 2.50x       10x  above" in printed
    assert "dollars " not in printed.split("claims under test")[1]
