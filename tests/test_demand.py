"""Demands: the same for a query number whatever the arm, other ones for other numbers, and tokens by the closed form."""

from statistics import fmean
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.agents.runtime import Expected
from fanmark.loadgen.demand import UNITS, Demand, draw_demand, expected_tokens, unquoted
from fanmark.loadgen.scenario import KINDS, Scenario
from fanmark.loadgen.scenario_check import check

TABLE = topologies()


def scenario(lengths: dict[str, Any], seed: int = 7, **debate: Any) -> Scenario:
    arms = [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", **debate},
        {"name": "chain", "topology": "tool-chain"},
    ]
    return check({"seed": seed, "workload": lengths, "arm": arms}, "f.toml", TABLE)


def demands(found: Scenario, query: int) -> list[Demand]:
    return [draw_demand(found, arm, TABLE, query) for arm in found.arms]


VARIED: dict[str, dict[str, Any]] = {
    "system": {"dist": "uniform", "mean": 300},
    "question": {"dist": "lognormal", "mean": 200, "min": 5},
    "answer": {"dist": "gamma", "mean": 150, "min": 40, "max": 400},
    "tool_result": {"dist": "exponential", "mean": 250},
}


def test_query_i_has_the_same_lengths_and_texts_in_every_arm() -> None:
    found = scenario(VARIED)
    for query in range(-2, 30):
        single, *others = demands(found, query)
        for other in others:
            assert (other.lengths, other.seed, other.question) == (single.lengths, single.seed, single.question)
            assert other.chance("stop", 3) == single.chance("stop", 3)


def test_an_arms_own_length_changes_that_length_alone() -> None:
    plain, own = scenario(VARIED), scenario(VARIED, workload={"answer": 80})
    for query in range(10):
        before, after = demands(plain, query)[1], demands(own, query)[1]
        assert after.lengths == {**before.lengths, "answer": 80}


def test_queries_differ_and_the_same_one_is_always_the_same() -> None:
    found = scenario(VARIED)
    drawn = [demands(found, query)[0] for query in range(40)]
    assert drawn == [demands(found, query)[0] for query in range(40)]
    assert len({demand.lengths["question"] for demand in drawn}) > 25
    assert len({demand.message(("question",), demand.question, per_query=True).text for demand in drawn}) == 40
    assert drawn != [demands(scenario(VARIED, seed=8), query)[0] for query in range(40)]


def test_system_and_role_are_drawn_once_a_run() -> None:
    found = scenario({"system": {"dist": "uniform", "mean": 300}, "role": {"dist": "uniform", "mean": 30}})
    assert len({(d.lengths["system"], d.lengths["role"]) for query in range(20) for d in demands(found, query)}) == 1
    other = scenario({"system": {"dist": "uniform", "mean": 300}}, seed=8)
    assert demands(other, 0)[0].lengths["system"] != demands(found, 0)[0].lengths["system"]


@pytest.mark.parametrize("kind", ["question", "answer", "tool_result"])
def test_drawn_lengths_have_the_mean_that_was_asked_for(kind: str) -> None:
    found = scenario(VARIED)
    drawn = [draw_demand(found, found.arms[0], TABLE, i).lengths[kind] for i in range(1500)]
    assert fmean(drawn) == pytest.approx(VARIED[kind]["mean"], rel=0.05)
    assert min(drawn) >= VARIED[kind].get("min", 0) and max(drawn) <= VARIED[kind].get("max", 10**6)


def test_every_kind_of_message_has_a_length() -> None:
    assert set(demands(scenario({}), 0)[0].lengths) == {*KINDS, *UNITS}


def test_a_count_that_is_a_distribution_is_drawn_once_a_query() -> None:
    found = scenario({}, agents={"dist": "uniform", "mean": 5, "cv": 0.4, "min": 2, "max": 8})
    agents = [demands(found, query)[1].params.agents for query in range(200)]
    assert set(agents) == {2, 3, 4, 5, 6, 7, 8} and fmean(agents) == pytest.approx(5, rel=0.05)
    assert agents == [demands(found, query)[1].params.agents for query in range(200)]
    assert {demands(found, query)[1].params.rounds for query in range(9)} == {2}


def test_a_chance_is_a_number_by_name() -> None:
    demand = demands(scenario({}), 0)[0]
    drawn = [demand.chance("stop", i) for i in range(1000)]
    assert fmean(drawn) == pytest.approx(0.5, abs=0.04) and min(drawn) >= 0 and max(drawn) < 1
    assert demand.chance("stop", 1) == drawn[1] != demand.chance("go", 1)


def test_a_message_of_one_query_starts_with_its_number() -> None:
    demand = Demand("a", 12, {"question": 9, "role": 3}, None, "7/12", TABLE["single"])
    own = demand.message(("question",), "Why?", per_query=True)
    assert (own.text, own.tokens, own.per_query, own.author) == ("Question 12. Why?", 9, True, "user")
    common = demand.message(("role", 2), "You doubt.", "system")
    assert (common.text, common.tokens, common.per_query, common.author) == ("You doubt.", 3, False, "system")


def test_a_quote_is_as_long_as_what_it_quotes() -> None:
    demand = Demand("a", 0, {"answer": 9}, None, "7/0", TABLE["single"])
    assert demand.tokens(("quoted", "answer", 1, 2)) == demand.tokens(("answer", 1, 2)) == 9
    assert demand.tokens(("tools",)) == 0
    assert unquoted(("quoted", "answer", 1)) == unquoted(("answer", 1)) == ("answer", 1)


FORM = Expected(
    calls=3,
    depth=2,
    width=2,
    writes={"answer": 2, "judge_answer": 1},
    reads={
        ("system",): 3,
        ("question",): 3,
        ("tools",): 1,
        ("answer", 1): 1,
        ("quoted", "answer", 2): 1,
        ("tool_result", 0): 2,
    },
    times={("answer", 2): 3},
)
LENGTHS = {"system": 300, "question": 200, "answer": 50, "judge_answer": 70, "tool_result": 90}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # as drawn: 3 x 300 + 3 x 200 + 50 + 3 x 50 + 2 x 90; tools have no length of their own
        ({}, (170, 1880)),
        # what is known is taken as it is: schemas of 400, a result of 100, an answer that came back as 52
        ({("tools",): 400, ("tool_result", 0): 100, ("answer", 1): 52}, (170, 2302)),
        # a quote has a size of its own
        ({("quoted", "answer", 2): 55}, (170, 1785)),
        # one unknown size leaves the sum unknown
        ({("tools",): None}, (170, None)),
    ],
)
def test_tokens_by_the_closed_form(sizes: dict[Any, int | None], expected: tuple[int, int | None]) -> None:
    assert expected_tokens(FORM, LENGTHS, sizes) == expected
