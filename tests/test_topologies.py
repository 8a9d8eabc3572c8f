"""Every topology costs what its closed form says, and what the published formulas say, for any parameters: no tolerance."""

import ast
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_lists import Lists, count
from topology_recorder import KINDS, Recorder, record

import fanmark.agents
from fanmark.agents import topologies

Lengths = Mapping[str, int]
Counts = tuple[int, int, int, int, int, int]  # calls, tool calls, input, output, depth, width

few, some = st.integers(1, 4), st.integers(0, 5)
owners = st.sampled_from(["shared", "own"])
positions, transcripts = st.sampled_from(["head", "tail"]), st.sampled_from(["last", "full"])

PARAMS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "single": {},
    "reasoning": {"effort": st.integers(2, 20)},
    "self-consistency": {"samples": st.integers(1, 9), "one_request": st.booleans()},
    "debate": {
        "agents": few,
        "rounds": few,
        "judge": st.sampled_from(["none", "last", "all"]),
        "transcript": transcripts,
        "role_position": positions,
        "system": owners,
        "neighbours": st.one_of(st.just("all"), st.integers(0, 5)),
        "groups": few,
        "stage_rounds": st.integers(1, 3),
        "stop_probability": st.sampled_from([0.0, 0.4, 1.0]),
        "stop_from": st.integers(0, 3),
    },
    "two-sided-debate": {"rounds": st.integers(1, 6), "stop_probability": st.floats(0, 1), "system": owners},
    "round-robin": {"agents": few, "rounds": few, "system": owners},
    "reflection": {"rounds": some, "stop_probability": st.floats(0, 1), "system": owners},
    "planner": {"steps": st.integers(1, 6)},
    "tool-chain": {"tool_calls": st.integers(0, 12), "tools_per_step": few},
    "orchestrator": {
        "workers": few,
        "waves": st.integers(1, 3),
        "tool_calls": some,
        "tools_per_step": few,
        "citations": st.booleans(),
    },
    "tree-of-thought": {"depth": few, "samples": st.integers(1, 3), "beam": few, "votes": st.integers(0, 3)},
    "mixture-of-agents": {"layers": st.integers(2, 5), "agents": few, "system": owners},
    "map-reduce": {"chunks": st.integers(1, 20), "fan_in": st.integers(2, 5)},
    "coding-agent": {"tool_calls": st.integers(0, 20), "context_limit": st.integers(0, 700)},
    "panel": {
        "specialists": few,
        "rounds": few,
        "leader_in_rounds": st.booleans(),
        "transcript": transcripts,
        "role_position": positions,
        "system": owners,
    },
    "tools-only": {"tool_calls": st.integers(0, 12)},
}


def single(p: Any, w: Lengths, rec: Recorder) -> Counts:
    return 1, 0, w["P"], w["answer"], 1, 1


def reasoning(p: Any, w: Lengths, rec: Recorder) -> Counts:
    return 1, 0, w["P"], p.effort * w["answer"], 1, 1


def self_consistency(p: Any, w: Lengths, rec: Recorder) -> Counts:
    n = 1 if p.one_request else p.samples
    return n, 0, n * w["P"], p.samples * w["answer"], 1, n


def debate(p: Any, w: Lengths, rec: Recorder) -> Counts:
    n, o, f = p.agents, w["answer"], w["instruction"]
    r = rounds_held(p, rec, p.stop_from)
    read = n * r * (w["P"] + w["role"])
    for i in range(n):
        told = 0  # of what it was told so far
        for number in range(1, r):
            news = f + o * (1 + others_heard(p, i, number))
            told = told + news if p.transcript == "full" else news
            read += told
    if p.judge == "none":
        return n * r, 0, read, n * r * o, r, n
    heard = n * o * (r if p.judge == "all" else 1)
    read += w["P"] + heard + w["judge_instruction"]
    return n * r + 1, 0, read, n * r * o + w["judge_answer"], r + 1, n


def rounds_held(p: Any, rec: Recorder, first: int = 1) -> int:
    rounds = 1
    while rounds < p.rounds and not (rounds >= first and rec.chance("stop", rounds) < p.stop_probability):
        rounds += 1
    return rounds


def others_heard(p: Any, i: int, number: int) -> int:
    """How many other agents' answers of round `number` agent i is told."""
    if p.groups > 1 and number % p.stage_rounds == 0:
        speakers = min(p.groups, p.agents)  # the first of each group
        return speakers - (i < speakers)
    group = sum(j % p.groups == i % p.groups for j in range(p.agents))
    return group - 1 if p.neighbours == "all" else min(p.neighbours, group - 1)


def two_sided_debate(p: Any, w: Lengths, rec: Recorder) -> Counts:
    rounds = rounds_held(p, rec)
    prompt = read = 0
    for _ in range(rounds):
        for words in ("answer", "answer", "judge_answer"):
            read += w["P"] + prompt
            prompt += w[words]
    return 3 * rounds, 0, read, prompt, 3 * rounds, 1


def round_robin(p: Any, w: Lengths, rec: Recorder) -> Counts:
    k = p.agents * p.rounds
    return k, 0, k * w["P"] + w["answer"] * k * (k - 1) // 2, k * w["answer"], k, 1


def reflection(p: Any, w: Lengths, rec: Recorder) -> Counts:
    k, o, c = rounds_held(p, rec) if p.rounds else 0, w["answer"], w["critique"]
    read = w["P"] + k * ((w["P"] + o) + (w["P"] + o + c))
    return 1 + 2 * k, 0, read, o + k * (c + o), 1 + 2 * k, 1


def planner(p: Any, w: Lengths, rec: Recorder) -> Counts:
    m, plan, o = p.steps, w["plan"], w["answer"]
    read = w["P"] + m * (w["P"] + plan + w["instruction"]) + o * m * (m - 1) // 2 + w["P"] + plan + m * o
    return m + 2, 0, read, plan + (m + 1) * o, m + 2, 1


def tool_chain(p: Any, w: Lengths, rec: Recorder) -> Counts:
    context, read, left, calls = w["P"] + w["tools"], 0, p.tool_calls, 1
    while left:
        n = min(left, p.tools_per_step)
        read, context = read + context, context + n * (w["action"] + w["tool_result"])
        left, calls = left - n, calls + 1
    return calls, p.tool_calls, read + context, p.tool_calls * w["action"] + w["answer"], calls, 1


def orchestrator(p: Any, w: Lengths, rec: Recorder) -> Counts:
    v, n, t, o, plan = p.waves, p.workers, p.tool_calls, w["answer"], w["plan"]
    start = w["system"] + w["tools"] + w["instruction"]
    steps, worker, context, left = 0, start, start, t
    while left:
        now = min(left, p.tools_per_step)
        steps, left, context = steps + 1, left - now, context + now * (w["action"] + w["tool_result"])
        worker += context
    read = (v + 1) * w["P"] + (plan + n * o) * v * (v + 1) // 2 + v * n * worker
    written = v * plan + v * n * (t * w["action"] + o) + w["judge_answer"]
    calls, depth = v * (1 + n * (steps + 1)) + 1, v * (steps + 2) + 1
    if p.citations:
        read += w["P"] + v * n * o + w["judge_answer"]
        return calls + 1, v * n * t, read, written + w["judge_answer"], depth + 1, n
    return calls, v * n * t, read, written, depth, n


def tree_of_thought(p: Any, w: Lengths, rec: Recorder) -> Counts:
    k, votes, o = p.samples, p.votes, w["answer"]
    states, calls, read, written, width = 1, 0, 0, 0, 0
    for level in range(1, p.depth + 1):
        if level > 1:
            states = min(p.beam, k * states)
        calls += states * k * (1 + votes)
        read += states * k * (w["P"] + (level - 1) * o + votes * (w["P"] + level * o + w["instruction"]))
        written += states * k * (o + votes * w["vote"])
        width = max(width, states * k, states * k * votes)
    return calls, 0, read, written, p.depth * (1 + (votes > 0)), width


def mixture_of_agents(p: Any, w: Lengths, rec: Recorder) -> Counts:
    layers, n, o = p.layers, p.agents, w["answer"]
    read = n * w["P"] + ((layers - 2) * n + 1) * (w["P"] + w["instruction"] + n * o)
    calls = (layers - 1) * n + 1
    return calls, 0, read, calls * o, layers, n


def map_reduce(p: Any, w: Lengths, rec: Recorder) -> Counts:
    calls, levels, left = p.chunks, 0, p.chunks
    read = p.chunks * (w["system"] + w["chunk"])
    while left > 1:
        groups = (left + p.fan_in - 1) // p.fan_in
        read += groups * w["P"] + left * w["answer"]
        calls, levels, left = calls + groups, levels + 1, groups
    return calls, 0, read, calls * w["answer"], 1 + levels, p.chunks


def coding_agent(p: Any, w: Lengths, rec: Recorder) -> Counts:
    """A simulation of the context as a list of sizes; tools have results of their own length."""
    fixed = [w["system"], w["tools"], w["question"]]
    context, kept, calls, read, written = list(fixed), len(fixed), 0, 0, 0
    for n in range(p.tool_calls + 1):
        if sum(context) > p.context_limit and len(context) > kept:
            calls, read = calls + 1, read + sum(context) + w["compaction_instruction"]
            written += w["compaction"]
            context = [*fixed, w["compaction"]]
            kept = len(context)
        calls, read = calls + 1, read + sum(context)
        written += w["action"] if n < p.tool_calls else w["answer"]
        context += [w["action"], rec.sizes[n % len(rec.sizes)] if rec.sizes else w["tool_result"]]
    return calls, p.tool_calls, read, written, calls, 1


def panel(p: Any, w: Lengths, rec: Recorder) -> Counts:
    n, f, start = p.specialists + p.leader_in_rounds, w["instruction"], w["P"] + w["plan"]
    read, heard = w["P"] + f, 0
    for r in range(p.rounds):
        read += n * (start + w["role"] + (heard * w["turn"] + f if r else 0))
        heard = heard + n if p.transcript == "full" else n
    read += start + heard * w["turn"] + f
    return n * p.rounds + 2, 0, read, w["plan"] + n * p.rounds * w["turn"] + w["judge_answer"], p.rounds + 2, n


def tools_only(p: Any, w: Lengths, rec: Recorder) -> Counts:
    return 0, p.tool_calls, 0, 0, 0, 0


FORMULAS: dict[str, Callable[[Any, Lengths, Recorder], Counts]] = {
    name: globals()[name.replace("-", "_")] for name in PARAMS
}


@pytest.mark.parametrize("name", PARAMS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_run_closed_form_and_published_formula_agree(name: str, data: st.DataObject) -> None:
    topology = topologies()[name]
    p = data.draw(st.builds(topology.params, **PARAMS[name]))
    lengths = data.draw(st.fixed_dictionaries({kind: st.integers(0, 60) for kind in KINDS}))
    recorder = Recorder(lengths, seed=data.draw(st.integers(0, 99)))
    assert topology.expected is not None
    form = topology.expected(p, recorder)  # before the run: for sizes as drawn
    record(topology, p, recorder)

    assert topology.expected(p, recorder) == form
    assert +Counter(form.reads) == recorder.reads
    written = {kind: count * lengths[kind] for kind, count in form.writes.items()}
    assert +Counter(written) == +recorder.writes
    sizes = {key: recorder.tokens(key) for key in form.reads}
    read = sum(count * sizes[key] for key, count in form.reads.items())
    counted = (form.calls, form.tool_calls, read, sum(written.values()), form.depth, form.width)
    assert counted == recorder.counts()
    lists = Lists(lengths, lambda r: recorder.chance("stop", r))
    assert counted == count(name, p, lists)
    assert counted == FORMULAS[name](p, {**lengths, "P": lengths["system"] + lengths["question"]}, recorder)
    assert recorder.peak == form.width, "siblings are not launched together"


@settings(max_examples=30, deadline=None)
@given(
    p=st.builds(topologies()["coding-agent"].params, **PARAMS["coding-agent"]),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=9),
)
def test_coding_agent_compacts_by_the_real_sizes_of_real_results(p: Any, sizes: list[int]) -> None:
    topology = topologies()["coding-agent"]
    lengths = {kind: 20 for kind in KINDS}
    recorder = record(topology, p, Recorder(lengths, sizes=sizes))
    assert topology.expected is not None
    form = topology.expected(p, recorder)
    read = sum(count * recorder.tokens(key) for key, count in form.reads.items())
    written = sum(count * lengths[kind] for kind, count in form.writes.items())
    found = (form.calls, form.tool_calls, read, written, form.depth, form.width)
    assert found == recorder.counts() == coding_agent(p, {**lengths, "P": 40}, recorder)
    assert found == count("coding-agent", p, Lists(lengths, lambda _: 0.0, sizes))


def test_actions_of_several_tools_are_as_many_lengths() -> None:
    """Expected.times says how long a message is where it is not one length of its kind."""
    topology = topologies()["tool-chain"]
    p = topology.params(tool_calls=5, tools_per_step=3)
    lengths = dict.fromkeys(KINDS, 7)
    recorder = record(topology, p, Recorder(lengths))
    assert topology.expected is not None
    form = topology.expected(p, recorder)
    read = sum(count * lengths[str(key[0])] * form.times.get(key, 1) for key, count in form.reads.items())
    assert read == recorder.counts()[2]


ROUNDS_OF_CALLS: dict[str, Callable[[int], float]] = {
    "two-sided-debate": lambda calls: calls / 3,
    "reflection": lambda calls: (calls - 1) / 2,
    "debate": lambda calls: (calls - 1) / 4,
}


@pytest.mark.parametrize("probability, mean", [(0.0, 4.0), (0.25, 2.734375), (0.5, 1.875), (1.0, 1.0)])
@pytest.mark.parametrize("name", ROUNDS_OF_CALLS)
def test_a_query_stops_as_often_as_asked(name: str, probability: float, mean: float) -> None:
    """E[R] = (1 - (1 - p)^M) / p with M = 4; 2,000 seeds, whose mean is within 0.1 (four standard errors at the most)."""
    topology = topologies()[name]
    p = topology.params(rounds=4, stop_probability=probability)
    assert topology.expected is not None
    rounds = [ROUNDS_OF_CALLS[name](topology.expected(p, Recorder({}, seed)).calls) for seed in range(2000)]
    assert sum(rounds) / len(rounds) == pytest.approx(mean, abs=0.1)


def test_consensus_is_not_reached_before_its_first_round() -> None:
    """From round r0 = 3 of at most 6, p = 0.5: E[R] = 2 + (1 - 0.5^4) / 0.5."""
    topology = topologies()["debate"]
    p = topology.params(rounds=6, stop_probability=0.5, stop_from=3)
    assert topology.expected is not None
    rounds = [(topology.expected(p, Recorder({}, seed)).calls - 1) / 4 for seed in range(2000)]
    assert min(rounds) == 3 and sum(rounds) / len(rounds) == pytest.approx(2 + 1.875, abs=0.1)


@pytest.mark.parametrize("name", PARAMS)
def test_defaults_are_those_of_the_manual(name: str) -> None:
    defaults: dict[str, tuple[Any, ...]] = {
        "single": (),
        "reasoning": (8,),
        "self-consistency": (5, False),
        "debate": (4, 2, "last", "last", "tail", "shared", "all", 1, 2, 0, 1),
        "two-sided-debate": (3, 0, "shared"),
        "round-robin": (3, 2, "shared"),
        "reflection": (2, 0, "shared"),
        "planner": (5,),
        "tool-chain": (12, 1),
        "orchestrator": (4, 1, 6, 1, False),
        "tree-of-thought": (3, 5, 5, 3),
        "mixture-of-agents": (3, 6, "shared"),
        "map-reduce": (16, 4),
        "coding-agent": (60, 60000),
        "panel": (3, 2, True, "last", "tail", "shared"),
        "tools-only": (12,),
    }
    params = topologies()[name].params
    assert params() == params(*defaults[name])


MISTAKES = [
    ("reasoning", {"effort": 0}, "effort = 0: must be at least 1"),
    ("debate", {"neighbours": -1}, "neighbours = -1: must be at least 0"),
    ("debate", {"groups": 0}, "groups = 0: must be at least 1"),
    ("debate", {"stop_probability": -0.5}, "stop_probability = -0.5: must be from 0 to 1"),
    ("reflection", {"stop_probability": 2}, "stop_probability = 2: must be from 0 to 1"),
    ("self-consistency", {"samples": 0}, "samples = 0: must be at least 1"),
    ("two-sided-debate", {"stop_probability": 1.5}, "stop_probability = 1.5: must be from 0 to 1"),
    ("round-robin", {"agents": 0}, "agents = 0: must be at least 1"),
    ("reflection", {"rounds": -1}, "rounds = -1: must be at least 0"),
    ("planner", {"steps": 0}, "steps = 0: must be at least 1"),
    ("orchestrator", {"waves": 0}, "waves = 0: must be at least 1"),
    ("tree-of-thought", {"votes": -1}, "votes = -1: must be at least 0"),
    ("mixture-of-agents", {"layers": 1}, "layers = 1: must be at least 2"),
    ("map-reduce", {"fan_in": 1}, "fan_in = 1: must be at least 2"),
    ("coding-agent", {"context_limit": -1}, "context_limit = -1: must be at least 0"),
    ("panel", {"specialists": 0}, "specialists = 0: must be at least 1"),
    ("tools-only", {"tool_calls": -1}, "tool_calls = -1: must be at least 0"),
]


@pytest.mark.parametrize("name, params, said", MISTAKES)
def test_impossible_params_are_refused_in_words(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        topologies()[name].params(**params)


FILES = sorted(path for folder in fanmark.agents.__path__ for path in Path(folder).glob("*.py"))
SHAPES = [path for path in FILES if path.name not in ("__init__.py", "runtime.py", "presets.py", "steps.py")]


def test_every_file_is_a_topology_of_the_table() -> None:
    assert sorted(path.stem.replace("_", "-") for path in SHAPES) == sorted(topologies()) == sorted([*PARAMS, "replay"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_agents_import_the_standard_library_and_agents_only(path: Path) -> None:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.append(node.module or "")
    assert [
        n for n in names if not n.startswith("fanmark.agents") and n.split(".")[0] not in sys.stdlib_module_names
    ] == []


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.name)
def test_a_topology_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 120
