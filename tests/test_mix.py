"""An arm made of several topologies: each query is one of its parts, by weight and seed, and equals that part's closed form."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.loadgen import dry_run
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario import resolved
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.session import _without_none
from fanmark.loadgen.simulate import Options, simulate

TABLE = topologies()
PARTS: list[dict[str, Any]] = [
    {"weight": 6, "topology": "single"},
    {
        "weight": 3,
        "topology": "tool-chain",
        "tool_calls": {"dist": "uniform", "mean": 3, "cv": 0.4, "min": 1, "max": 5},
    },
    {"weight": 1, "topology": "debate", "name": "small-debate", "agents": 2, "workload": {"answer": 40}},
]


def scenario(parts: Any = PARTS, **own: Any) -> Any:
    arms = [{"name": "single", "topology": "single", "baseline": True}, {"name": "product", "mix": parts, **own}]
    load = {"mode": "closed", "concurrency": 4, "queries": 40, "warmup": 0}
    return check({"arm": arms, "workload": {"answer": 20}, "load": load, "seed": 3}, "mix.toml", TABLE)


def test_parts_come_by_weight_and_seed() -> None:
    found = scenario()
    arm = found.arms[1]
    drawn = [draw_demand(found, arm, TABLE, i) for i in range(3000)]
    share = {part: n / 3000 for part, n in Counter(demand.part for demand in drawn).items()}
    assert share == pytest.approx({"single": 0.6, "tool-chain": 0.3, "small-debate": 0.1}, abs=0.03)
    assert [demand.part for demand in drawn] == [draw_demand(found, arm, TABLE, i).part for i in range(3000)]
    assert {demand.lengths["answer"] for demand in drawn if demand.part == "small-debate"} == {40}
    assert {demand.lengths["answer"] for demand in drawn if demand.part != "small-debate"} == {20}
    assert {demand.params.tool_calls for demand in drawn if demand.part == "tool-chain"} == set(range(1, 6))


def test_each_query_equals_its_parts_closed_form(tmp_path: Path) -> None:
    found = simulate(scenario(), TABLE, Options(tmp_path / "run", "test", [])).summary
    arm = found["arms"]["product"]
    assert found["validity"]["counted"] is True and arm["expected"]["mismatches"] == 0
    assert arm["topology"] == "mix" and arm["queries"]["completed"] == 40
    queries = [query for query in read_queries(tmp_path / "run") if query.arm == "product"]
    for part, calls in (("single", {1}), ("small-debate", {5})):
        mine = [query for query in queries if query.part == part]
        assert {query.resources["calls"] for query in mine} == calls
        assert arm["by_part"][part]["queries"] == len(mine) > 0
        assert arm["by_part"][part]["calls"]["mean"] in calls
    chains = [query for query in queries if query.part == "tool-chain"]
    assert all(query.resources["calls"] == (query.resources["tool_calls"] or 0) + 1 for query in chains)
    assert found["arms"]["single"]["by_part"] is None
    planned = dry_run.plan(scenario(), TABLE)["product"]
    for name in ("calls", "tool_calls", "output_tokens"):
        assert planned[name] == sum(query.resources[name] or 0 for query in queries)


def test_a_resolved_mix_is_the_same_mix() -> None:
    found = scenario(workload={"question": 90}, max_calls=20)
    again = check(_without_none(resolved(found)), "again.toml", TABLE)
    assert again.arms == found.arms
    assert [found.workload_of(part).question for part in found.arms[1].mix] == [90] * 3


@pytest.mark.parametrize(
    ("parts", "own", "said"),
    [
        ([PARTS[0]], {}, r"mix: give two or more \[\[arm.mix\]\]"),
        ("single", {}, r"mix: give two or more"),
        ([PARTS[0], 5], {}, "mix number 2: must be a table"),
        ([PARTS[0], {"topology": "debat"}], {}, 'mix number 2: topology = "debat": must be one of single, '),
        ([PARTS[0], {"topology": "single"}], {}, "mix number 2: name = 'single' is given twice"),
        (
            [PARTS[0], {"topology": "debate", "baseline": True}],
            {},
            "mix number 2: unknown key 'baseline': allowed are agents, ",
        ),
        ([PARTS[0], {"topology": "debate", "weight": -1}], {}, "mix number 2: weight = -1: "),
        ([PARTS[0] | {"weight": 0}, {"topology": "debate", "weight": 0}], {}, "mix: all weights are 0"),
        (PARTS, {"topology": "single"}, 'topology = "single" beside mix: give it to the parts'),
        (PARTS, {"agents": 3}, "agents = 3 beside mix: give it to the parts"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(parts: Any, own: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=rf"^mix.toml: arm 'product': {said}"):
        scenario(parts, **own)
