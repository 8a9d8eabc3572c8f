"""What a perfect prefix cache leaves to be computed: equal to a count over whole token sequences, to the published formulas where their
prompts are ours, and, within a block a call, to what the engine computes."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topologies import PARAMS, others_heard

from fanmark.agents import topologies
from fanmark.loadgen.demand import Demand, draw_demand
from fanmark.loadgen.lanes.virtual_tools import schema_tokens
from fanmark.loadgen.prefix import PrefixCache
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario import KINDS, Arm, Scenario
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.walk import Made, walk

TABLE = topologies()
BLOCK = 16
LENGTHS = st.fixed_dictionaries({kind: st.integers(0, 60) for kind in (*KINDS, "tools")})


def walked(name: str, params: Any, lengths: Mapping[str, int], query: int = 0) -> list[Made]:
    return asyncio.run(walk(TABLE[name], Demand("a", query, lengths, params, f"7/{query}", TABLE[name])))


def params_of(name: str) -> st.SearchStrategy[Any]:
    return st.builds(TABLE[name].params, **PARAMS[name])


def tokens(made: Sequence[Any]) -> tuple[Any, ...]:
    """Every token of some messages, each different from all others."""
    return tuple((message.key, i) for message in made for i in range(message.tokens))


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def counted(calls: Sequence[Made], together: bool) -> int:
    """By brute force: each prompt's longest beginning that some earlier prompt with its reply also has."""
    fresh, before = 0, list[tuple[int, tuple[Any, ...]]]()
    for made in sorted(calls, key=lambda made: made.depth):
        prompt = tokens(made.prompt)
        known = [sequence for depth, sequence in before if depth < made.depth or not together]
        fresh += len(prompt) - max((common(prompt, sequence) for sequence in known), default=0)
        before.append((made.depth, tokens([*made.prompt, made.reply])))
    return fresh


@pytest.mark.parametrize("name", PARAMS)
@settings(max_examples=15)
@given(data=st.data())
def test_message_by_message_is_token_by_token(name: str, data: st.DataObject) -> None:
    calls = walked(name, data.draw(params_of(name)), data.draw(LENGTHS))
    for together in (False, True):
        assert PrefixCache().fresh_tokens(calls, 0, together=together) == counted(calls, together)


@pytest.mark.parametrize("name", PARAMS)
@settings(max_examples=15)
@given(data=st.data())
def test_the_walk_is_the_closed_form(name: str, data: st.DataObject) -> None:
    params, lengths = data.draw(params_of(name)), data.draw(LENGTHS)
    calls = walked(name, params, lengths)
    expected = TABLE[name].expected
    assert expected is not None
    form = expected(params, Demand("a", 0, lengths, params, "7/0", TABLE["single"]))
    assert (len(calls), max((made.depth for made in calls), default=0)) == (form.calls, form.depth)
    widths: dict[int, int] = defaultdict(int)
    for made in calls:
        widths[made.depth] += 1
    assert max(widths.values(), default=0) == form.width


Miss = Callable[[Any, Mapping[str, int]], int]


def chain_miss(p: Any, w: Mapping[str, int]) -> int:
    return w["P"] + w["tools"] + p.tool_calls * w["tool_result"]


def debate_miss(p: Any, w: Mapping[str, int]) -> int:
    """Full history, roles at the head: every agent computes its own prompt and, a round, F and what others said. The judge starts anew."""
    n, rounds = p.agents, p.rounds
    heard = sum(w["instruction"] + others_heard(p, i, r) * w["answer"] for i in range(n) for r in range(1, rounds))
    return n * (w["role"] + w["P"]) + heard


def last_round_miss(p: Any, w: Mapping[str, int]) -> int:
    """Last round only, roles at the tail, all share the rest: once a round, in agent order, and each agent's own text."""
    n, rounds = p.agents, p.rounds
    once = w["P"] + (w["instruction"] if rounds > 1 else 0) + (rounds - 1) * n * w["answer"]
    return once + n * rounds * w["role"]


def orchestrator_miss(p: Any, w: Mapping[str, int]) -> int:
    worker = w["instruction"] + p.tool_calls * w["tool_result"]
    once = w["P"] + (w["tools"] if p.workers else 0)
    return once + p.waves * p.workers * (worker + w["answer"])


def tree_miss(p: Any, w: Mapping[str, int]) -> int:
    """P and F of each candidate that is voted on: thoughts follow the prompt that wrote them."""
    states, fresh = 1, w["P"]
    for level in range(1, p.depth + 1):
        states = states if level == 1 else min(p.beam, p.samples * states)
        fresh += states * p.samples * (w["instruction"] if p.votes else 0)
    return fresh


def round_robin_miss(p: Any, w: Mapping[str, int]) -> int:
    """Every speaker its own prompt, what was said before its first turn, and then what the others said since its last."""
    n, o = p.agents, w["answer"]
    return n * w["P"] + o * n * (n - 1) // 2 + n * (p.rounds - 1) * (n - 1) * o


def reflection_miss(p: Any, w: Mapping[str, int]) -> int:
    """The critic reads every draft anew; the writer finds its first draft behind its prompt, and no later one."""
    k, o, c = p.rounds, w["answer"], w["critique"]
    return 2 * w["P"] + k * o + c + (k - 1) * (o + c) if k else w["P"]


FORMULAS: dict[str, tuple[str, dict[str, Any], Miss]] = {
    "single": ("single", {}, lambda p, w: w["P"]),
    "reasoning": ("reasoning", {}, lambda p, w: w["P"]),
    "self-consistency": ("self-consistency", {"one_request": False}, lambda p, w: w["P"]),
    "debate, full": ("debate", {"transcript": "full", "role_position": "head", "judge": "none"}, debate_miss),
    "debate, last": ("debate", {"transcript": "last", "role_position": "tail", "judge": "none"}, last_round_miss),
    "tool-chain": ("tool-chain", {"tools_per_step": 1}, chain_miss),
    "orchestrator": ("orchestrator", {"tools_per_step": 1, "citations": False}, orchestrator_miss),
    "tree-of-thought": ("tree-of-thought", {}, tree_miss),
    "mixture-of-agents": (
        "mixture-of-agents",
        {"system": "shared"},
        lambda p, w: w["P"] + w["instruction"] + (p.layers - 1) * p.agents * w["answer"],
    ),
    "round-robin": ("round-robin", {"system": "shared"}, lambda p, w: w["P"]),
    "round-robin, one system each": ("round-robin", {"system": "own"}, round_robin_miss),
    "reflection, one system each": ("reflection", {"system": "own", "stop_probability": 0.0}, reflection_miss),
    "planner": ("planner", {}, lambda p, w: w["P"] + p.steps * w["instruction"] + p.steps * w["answer"]),
}
PLAIN = {"groups": 1, "neighbours": "all", "stop_probability": 0.0, "system": "shared"}


@pytest.mark.parametrize("case", FORMULAS)
@settings(max_examples=25)
@given(data=st.data())
def test_published_formulas_hold_where_their_prompts_are_ours(case: str, data: st.DataObject) -> None:
    """No length is 0: a message that is not there would make others share more."""
    name, fixed, formula = FORMULAS[case]
    fixed = {**(PLAIN if name == "debate" else {}), **fixed}
    params = replace(data.draw(params_of(name)), **fixed)
    lengths = data.draw(st.fixed_dictionaries({kind: st.integers(1, 60) for kind in (*KINDS, "tools")}))
    w = {**lengths, "P": lengths["system"] + lengths["question"]}
    assert PrefixCache().fresh_tokens(walked(name, params, lengths), 0) == formula(params, w)


def test_what_all_queries_share_is_computed_once() -> None:
    lengths = {**dict.fromkeys(KINDS, 10), "tools": 0}
    params = TABLE["debate"].params(agents=3, rounds=1, judge="none", role_position="head")
    shared = PrefixCache()
    # each agent its own text, S and Q; then but for Q it is known
    assert [shared.fresh_tokens(walked("debate", params, lengths, i), i) for i in range(3)] == [90, 30, 30]


def test_where_roles_stand_and_whose_the_system_is_decide_what_is_shared() -> None:
    lengths = {**dict.fromkeys(KINDS, 100), "role": 20, "system": 300, "question": 200}

    def fresh(**params: Any) -> int:
        made = walked("debate", TABLE["debate"].params(judge="none", **params), lengths)
        return PrefixCache().fresh_tokens(made, 0)

    assert fresh(role_position="tail") == 500 + 100 + 4 * 100 + 8 * 20
    assert fresh(role_position="head") == 4 * (20 + 500 + 100 + 4 * 100)
    assert fresh(role_position="tail", system="own") == 4 * (500 + 100 + 4 * 100) + 8 * 20
    # an own history is not found again behind a text that moved on: full transcripts lose by roles at the tail
    tail = fresh(role_position="tail", transcript="full", rounds=3)
    head = fresh(role_position="head", transcript="full", rounds=3)
    assert head == 4 * (520 + 2 * (100 + 3 * 100))
    assert tail > head - 3 * 500


SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("single", {}),
    ("self-consistency", {"samples": 6}),
    ("debate", {}),
    ("debate", {"role_position": "head", "transcript": "full", "rounds": 3}),
    ("debate", {"agents": 6, "groups": 2, "rounds": 3, "judge": "all", "system": "own"}),
    ("debate", {"agents": 6, "neighbours": 2, "transcript": "full"}),
    ("two-sided-debate", {}),
    ("round-robin", {"system": "own"}),
    ("reflection", {}),
    ("planner", {"steps": 3}),
    ("tool-chain", {"tool_calls": 5, "tools_per_step": 2}),
    ("orchestrator", {"workers": 3, "waves": 2, "tool_calls": 2, "citations": True}),
    ("tree-of-thought", {"depth": 2, "samples": 3, "beam": 2, "votes": 2}),
    ("mixture-of-agents", {"agents": 4}),
    ("map-reduce", {"chunks": 6, "fan_in": 3}),
    ("coding-agent", {"tool_calls": 9, "context_limit": 4000}),
    ("panel", {}),
    ("panel", {"role_position": "head", "transcript": "full", "system": "own"}),
]


def scenario() -> Scenario:
    """An arm for each shape. Token-id prompts: schemas stand behind the system message."""
    single = {"name": "single", "topology": "single", "baseline": True}
    arms = [{"name": f"{name}-{i}", "topology": name, **params} for i, (name, params) in enumerate(SHAPES)]
    lengths = {"tool_result": {"dist": "lognormal", "mean": 300, "min": 1}, "answer": 120, "cache": "query"}
    load = {"queries": 2, "rate": 0.05, "warmup": 0}
    raw = {"arm": [single, *arms], "workload": lengths, "load": load, "stub": {"api": "completions"}}
    return check(raw, "f.toml", TABLE)


@pytest.fixture(scope="module")
def fresh_tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[int]]:
    """What the engine computed of each call's prompt, by arm and query, in virtual time."""
    out = tmp_path_factory.mktemp("prefix") / "run"
    simulate(scenario(), TABLE, Options(out, "0", []))
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for line in (out / "calls.jsonl").read_text().splitlines():
        call = json.loads(line)
        if call["kind"] == "call":
            found[call["arm"], call["query"]].append(call["input_tokens"] - call["cached_tokens"])
    return found


@pytest.mark.parametrize("arm", scenario().arms, ids=lambda arm: str(arm.name))
def test_the_engine_computes_what_the_formula_says_within_a_block_a_call(
    arm: Arm, fresh_tokens: dict[tuple[str, int], list[int]]
) -> None:
    """Siblings leave together and find each other's prompts all the same, as on vLLM: the first of them fills the blocks in its step."""
    for query in range(2):
        demand = draw_demand(scenario(), arm, TABLE, query)
        demand = replace(demand, lengths={**demand.lengths, "tools": schema_tokens()})
        made = asyncio.run(walk(TABLE[arm.topology], demand))
        computed = fresh_tokens[arm.name, query]
        assert len(made) == len(computed)
        assert abs(sum(computed) - PrefixCache().fresh_tokens(made, query)) <= BLOCK * len(made)


def test_siblings_that_found_nothing_would_cost_their_whole_prompts(
    fresh_tokens: dict[tuple[str, int], list[int]],
) -> None:
    """Six samples of S + Q = 500: computed once and found five times, where it might have been computed six times."""
    samples = walked(
        "self-consistency", TABLE["self-consistency"].params(samples=6), {**dict.fromkeys(KINDS, 1), "system": 499}
    )
    assert PrefixCache().fresh_tokens(samples, 0, together=True) == 6 * 500
    assert sum(fresh_tokens["self-consistency-1", 0]) <= 500 + 5 * BLOCK


def test_staggered_siblings_leave_apart_and_compute_no_less(tmp_path: Path) -> None:
    """Each of four agents leaves 0.3 s after the one before, which has its prompt in the cache by then; on this engine as well without."""

    def run(name: str, **more: Any) -> list[Any]:
        single = {"name": "single", "topology": "single", "baseline": True}
        arm = {"name": "debate", "topology": "debate", "judge": "none", **more}
        raw = {"arm": [single, arm], "load": {"queries": 1, "rate": 1, "warmup": 0}, "workload": {"cache": "query"}}
        simulate(check(raw, "f.toml", TABLE), TABLE, Options(tmp_path / name, "0", []))
        [query] = [query for query in read_queries(tmp_path / name) if query.arm == "debate"]
        assert query.mismatches == [] and (query.resources["depth"], query.resources["width"]) == (2, 4)
        return query.calls

    together, apart = run("together"), run("apart", stagger_s=0.3)
    for round in (1, 2):
        sent_at = [[call.sent_at for call in calls if call.round == round] for calls in (together, apart)]
        assert max(sent_at[0]) - min(sent_at[0]) < 0.01
        assert [b - a for a, b in pairwise(sent_at[1])] == pytest.approx([0.3] * 3)
        assert all(call.due_at == call.sent_at for call in apart)  # the wait is the arm's, no delay of the client
    fresh = [sum(call.input_tokens - call.cached_tokens for call in calls) for calls in (together, apart)]
    assert abs(fresh[0] - fresh[1]) <= BLOCK * len(apart)
