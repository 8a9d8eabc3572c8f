"""Capacity seconds: what a query takes of a full replica, against the engine's own account, and MoE against dense as measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.loadgen.calibrate import load_grid, run_row
from fanmark.loadgen.capacity_seconds import Filled, capacity, filled, marginal, waterfall
from fanmark.loadgen.cli_cost import cost
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import with_profile
from fanmark.servers.profiles import load_profile

DATA = Path(__file__).parent / "data" / "h100"
SMALL = {
    "system": 64,
    "question": 64,
    "role": 8,
    "instruction": 8,
    "answer": 40,
    "judge_answer": 40,
    "judge_instruction": 8,
}


def scenario(**more: Any) -> Scenario:
    arms = [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", "agents": 3},
        {"name": "chain", "topology": "tool-chain", "tool_calls": 2, "workload": {"tool_result": 200}},
    ]
    raw = {"arm": arms, "load": {"rate": 1, "queries": 5}, "workload": SMALL, "tools": {"latency_s": 0.05, "expose": 0}}
    return check(raw | more, "f.toml", topologies())


@pytest.mark.parametrize("arm", ["single", "debate", "chain"])
def test_what_is_measured_at_saturation_is_the_engines_own_account(arm: str) -> None:
    found = filled(scenario(), topologies(), arm, 24)
    assert found.replica_s == pytest.approx(found.busy_s, rel=0.03)
    assert found.account.attributed_s == pytest.approx(found.busy_s, rel=1e-9)
    assert found.account.slack_s == pytest.approx(0.0, abs=1e-12)
    assert sum(found.parts().values()) == pytest.approx(found.capacity_s, rel=1e-9)
    # Work in hand is power in use: an H100 at work takes 100 to 700 W
    assert found.joules is not None and 100 < found.joules / found.busy_s < 700


def test_the_waterfall_sums_to_the_ratio() -> None:
    looks = {arm: filled(scenario(), topologies(), arm, n) for arm, n in (("single", 24), ("debate", 8))}
    found = waterfall(looks["debate"], looks["single"])
    assert found is not None
    assert sum(found["parts"].values()) == pytest.approx(found["ratio"])
    assert sum(found["added"].values()) == pytest.approx(found["ratio"] - 1.0)
    # Seven calls of as many output tokens each, on longer contexts, in batches about as full
    assert 6.0 < found["ratio"] < 11.0


def test_the_fuller_the_cheaper_and_the_objective_says_how_full() -> None:
    alone, full = (filled(scenario(), topologies(), "single", n) for n in (1, 32))
    assert alone.replica_s > 4 * full.replica_s
    deadline = scenario(objective={"query_seconds": 1.1 * full.latency_s, "attainment": 0.9})
    found = capacity(deadline, topologies(), "single")
    assert found is not None and found.capacity_s is not None
    assert found.latency_s <= 1.1 * full.latency_s
    assert found.at_once >= 32 and found.capacity_s <= full.replica_s * 1.02
    assert capacity(scenario(objective={"query_seconds": 0.9 * alone.latency_s}), topologies(), "single") is None


def test_the_same_scenario_gives_the_same_figures() -> None:
    once, again = (filled(scenario(), topologies(), "debate", 5) for _ in range(2))
    assert isinstance(once, Filled) and once.told() == again.told()


def test_preemptions_are_waste_in_the_waterfall() -> None:
    starved = scenario(workload={**SMALL, "answer": 9000, "question": 4000})
    found = filled(starved, topologies(), "single", 20)  # 13,000 tokens each, and room for 172,000
    assert found.parts()["waste_s"] > 0.0


MEASURED = {1: 5.2, 16: 1.55, 64: 1.2}  # times as many tokens/s that Qwen3-30B-A3B decodes as Qwen3-32B, on one H100


@pytest.mark.parametrize("batch", sorted(MEASURED))
def test_moe_against_dense_by_batch_is_as_measured_on_an_h100(batch: int) -> None:
    names = {"moe30b": "qwen3-30b-a3b@h100", "dense32b": "qwen3-32b@h100"}
    real, predicted = [], []
    for grid_name, profile in names.items():
        grid = load_grid(DATA / f"{grid_name}.calib.json")
        row = next(row for row in grid.decode if (row.b, row.ctx) == (batch, 128))
        gaps, _, _ = run_row(row, grid.output_tokens(row), load_profile(profile))
        real.append(row.p50)
        predicted.append(sorted(gaps)[len(gaps) // 2])
    assert real[1] / real[0] == pytest.approx(MEASURED[batch], rel=0.04)
    assert predicted[1] / predicted[0] == pytest.approx(MEASURED[batch], rel=0.05)


def test_cheaper_by_decode_is_not_as_much_cheaper_a_query() -> None:
    """The dense model's query costs more where the batch is small; the gap closes as the batch grows."""
    ratios = []
    for at_once in (1, 32):
        costs = [
            filled(with_profile(scenario(), name), topologies(), "single", at_once).replica_s
            for name in ("qwen3-30b-a3b@h100", "qwen3-32b@h100")
        ]
        ratios.append(costs[1] / costs[0])
    assert ratios[0] > 4.0 > 2.0 > ratios[1] > 1.0


def test_marginal_seconds_are_those_that_were_not_there_without_the_query() -> None:
    quiet = scenario(load={"rate": 0.01, "queries": 4, "process": "constant", "warmup": 0})
    # Nobody meets anybody: what a query adds is all the time that a replica works on it
    alone = marginal(quiet, topologies(), "single", seeds=2)
    assert alone["value"] == pytest.approx(filled(scenario(), topologies(), "single", 1).busy_s, rel=0.1)
    busy = scenario(load={"rate": 20, "queries": 40, "warmup": 0})
    found = marginal(busy, topologies(), "single", seeds=3)
    assert found["value"] < 0.5 * alone["value"]  # it joins batches that run anyway
    assert found["low"] < found["value"] < found["high"]


def test_the_command_tells_costs_in_dollars_and_where_they_break_even(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.toml"
    path.write_text(
        "[target]\nprofile = 'qwen3-30b-a3b@h100'\n"
        "prices = { input = 1.0, cached_input = 0.5, output = 4.0, gpu_hour = 3.6, gpus = 2 }\n[tools]\ndollars_per_call = 0.01\n"
        "[[arm]]\nname = 'single'\ntopology = 'single'\nbaseline = true\n[load]\nrate = 1\nqueries = 5\n"
        "[workload]\n" + "".join(f"{key} = {value}\n" for key, value in SMALL.items())
    )
    cost(str(path), at_once=4, json=True)
    single = json.loads(capsys.readouterr().out)["arms"]["single"]
    fresh = single["input_tokens"] - single["cached_tokens"]
    assert (single["input_tokens"], single["output_tokens"]) == (128, 40)
    assert single["dollars"] == pytest.approx(single["capacity_s"] * 2 * 0.001)
    assert single["api_dollars"] == pytest.approx((fresh + 0.5 * single["cached_tokens"] + 4 * 40) / 1e6)
    assert single["break_even_utilisation"] == pytest.approx(single["dollars"] / single["api_dollars"])
    assert single["tool_dollars"] == 0.0
    cost(str(path), at_once=4, marginal=True)
    shown = capsys.readouterr().out
    assert "as full as the objective allows" in shown and "sum: the ratio" in shown


def test_a_target_that_the_arm_does_not_use_costs_it_nothing() -> None:
    targets = {"mine": {"profile": "qwen3-30b-a3b@h100"}, "other": {"profile": "qwen3-32b@h100"}}
    arm = {"name": "single", "topology": "single", "baseline": True}
    workload = {"system": 0, "question": 100, "answer": 20}
    both = check({"targets": targets, "arm": [arm | {"target": "mine"}], "workload": workload}, "f.toml", topologies())
    alone = check({"arm": [arm], "workload": workload}, "f.toml", topologies())
    found, expected = (capacity(each, topologies(), "single", at_once=4) for each in (both, alone))
    assert found is not None and expected is not None
    assert found.capacity_s == expected.capacity_s and found.profile == "qwen3-30b-a3b@h100"
