"""Whole runs in virtual time: what the engine was asked for is what the closed form and the lists of messages say. No tolerance."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from message_lists import Lists, count
from test_topologies import PARAMS

from fanmark.agents import topologies
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.lanes.virtual_tools import schema_tokens
from fanmark.loadgen.scenario import ANSWER_KINDS, KINDS
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import Options, simulate

TABLE = topologies()
SETS = 25
RESOURCES = ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width")
SINGLE = {"name": "single", "topology": "single", "baseline": True}
# the tools' schemas alone fill the small contexts of the tests without a server
OTHERS = {"coding-agent": {"tool_calls": st.integers(0, 12), "context_limit": st.integers(1300, 2200)}}


def arms(name: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    """So many arms of one topology, each with its own parameters and lengths, and not all the same, which hypothesis would try first. A
    length of 0 is no message; what a call writes has none."""
    own = {kind: st.integers(1 if kind in (*ANSWER_KINDS, "system") else 0, 40) for kind in KINDS}
    params = st.fixed_dictionaries(OTHERS.get(name, PARAMS[name]))
    drawn = st.tuples(params, st.fixed_dictionaries(own))
    varied = st.lists(drawn, min_size=SETS, max_size=SETS).filter(
        lambda sets: len({str(one) for one in sets}) > SETS / 2
    )
    return varied.map(
        lambda sets: [
            {"name": f"a{i}", "topology": name, **params, "workload": lengths}
            for i, (params, lengths) in enumerate(sets)
        ]
    )


def measured(line: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(line[resource] for resource in RESOURCES)


@pytest.mark.parametrize("name", PARAMS)
@settings(max_examples=1, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_run_counts_what_the_closed_form_and_the_lists_say(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """25 random sets of parameters and lengths; two queries of each, and so two draws of a stop."""
    load = {"queries": 2, "rate": 100, "warmup": 0}
    raw = {"arm": [SINGLE, *data.draw(arms(name))], "load": load, "seed": data.draw(st.integers(0, 99))}
    scenario = check(raw, "f.toml", TABLE)
    out = tmp_path_factory.mktemp("virtual") / "run"
    assert simulate(scenario, TABLE, Options(out, "0", [])).summary["validity"]["counted"] is True
    lines = [json.loads(line) for line in (out / "queries.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (SETS + 1)
    by_name = {arm.name: arm for arm in scenario.arms}
    for line in lines:
        arm = by_name[line["arm"]]
        demand = draw_demand(scenario, arm, TABLE, line["query"])
        lists = Lists({**demand.lengths, "tools": schema_tokens()}, partial(demand.chance, "stop"))
        assert line["outcome"] == "completed"
        assert measured(line["resources"]) == measured(line["expected"]) == count(arm.topology, demand.params, lists)
