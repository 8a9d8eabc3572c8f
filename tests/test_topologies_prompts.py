"""What each call reads, in order: every topology at a small size, as its source's conventions have it.

A line is `role@round: prompt -> reply`, or `=>` for a tool call; 'quoted' is another's reply as a user message. S system, Q question,
D tools' schemas, F instruction, O answer, J judge's answer; all other kinds by name.
"""

from typing import Any

import pytest
from topology_recorder import KINDS, Recorder, record

from fanmark.agents import topologies
from fanmark.agents.runtime import Key

CASES: list[tuple[str, dict[str, Any], str]] = [
    (
        "self-consistency",
        {"samples": 2},
        """
        sampler@1: S Q -> O.0
        sampler@1: S Q -> O.1
        """,
    ),
    (
        "debate",
        {"agents": 2, "rounds": 2, "judge": "all"},
        """
        agent-1@1: S Q role.0 -> O.1.0
        agent-2@1: S Q role.1 -> O.1.1
        agent-1@2: S Q F 'O.1.0' 'O.1.1' role.0 -> O.2.0
        agent-2@2: S Q F 'O.1.0' 'O.1.1' role.1 -> O.2.1
        judge@3: S Q 'O.1.0' 'O.1.1' 'O.2.0' 'O.2.1' judge_instruction -> J
        """,
    ),
    (
        "debate",
        {"agents": 2, "rounds": 3, "transcript": "full", "role_position": "head"},
        """
        agent-1@1: role.0 S Q -> O.1.0
        agent-2@1: role.1 S Q -> O.1.1
        agent-1@2: role.0 S Q O.1.0 F 'O.1.1' -> O.2.0
        agent-2@2: role.1 S Q O.1.1 F 'O.1.0' -> O.2.1
        agent-1@3: role.0 S Q O.1.0 F 'O.1.1' O.2.0 F 'O.2.1' -> O.3.0
        agent-2@3: role.1 S Q O.1.1 F 'O.1.0' O.2.1 F 'O.2.0' -> O.3.1
        judge@4: S Q 'O.3.0' 'O.3.1' judge_instruction -> J
        """,
    ),
    (
        "debate",
        {"agents": 4, "neighbours": 2, "judge": "none", "system": "own"},
        """
        agent-1@1: S.0 Q role.0 -> O.1.0
        agent-2@1: S.1 Q role.1 -> O.1.1
        agent-3@1: S.2 Q role.2 -> O.1.2
        agent-4@1: S.3 Q role.3 -> O.1.3
        agent-1@2: S.0 Q F 'O.1.0' 'O.1.1' 'O.1.3' role.0 -> O.2.0
        agent-2@2: S.1 Q F 'O.1.0' 'O.1.1' 'O.1.2' role.1 -> O.2.1
        agent-3@2: S.2 Q F 'O.1.1' 'O.1.2' 'O.1.3' role.2 -> O.2.2
        agent-4@2: S.3 Q F 'O.1.0' 'O.1.2' 'O.1.3' role.3 -> O.2.3
        """,
    ),
    (
        "debate",
        {"agents": 4, "groups": 2, "stage_rounds": 2, "rounds": 3, "judge": "none"},
        """
        agent-1@1: S Q role.0 -> O.1.0
        agent-2@1: S Q role.1 -> O.1.1
        agent-3@1: S Q role.2 -> O.1.2
        agent-4@1: S Q role.3 -> O.1.3
        agent-1@2: S Q F 'O.1.0' 'O.1.2' role.0 -> O.2.0
        agent-2@2: S Q F 'O.1.1' 'O.1.3' role.1 -> O.2.1
        agent-3@2: S Q F 'O.1.0' 'O.1.2' role.2 -> O.2.2
        agent-4@2: S Q F 'O.1.1' 'O.1.3' role.3 -> O.2.3
        agent-1@3: S Q F 'O.2.0' 'O.2.1' role.0 -> O.3.0
        agent-2@3: S Q F 'O.2.0' 'O.2.1' role.1 -> O.3.1
        agent-3@3: S Q F 'O.2.0' 'O.2.1' 'O.2.2' role.2 -> O.3.2
        agent-4@3: S Q F 'O.2.0' 'O.2.1' 'O.2.3' role.3 -> O.3.3
        """,
    ),
    (
        "debate",
        {"agents": 1, "rounds": 9, "stop_probability": 1, "stop_from": 2, "transcript": "full", "judge": "last"},
        """
        agent-1@1: S Q role.0 -> O.1.0
        agent-1@2: S Q O.1.0 F role.0 -> O.2.0
        judge@3: S Q 'O.2.0' judge_instruction -> J
        """,
    ),
    (
        "two-sided-debate",
        {"rounds": 2},
        """
        affirmative@1: S Q -> O.affirmative.1
        negative@1: S Q 'O.affirmative.1' -> O.negative.1
        judge@1: S Q 'O.affirmative.1' 'O.negative.1' -> J.judge.1
        affirmative@2: S Q O.affirmative.1 'O.negative.1' 'J.judge.1' -> O.affirmative.2
        negative@2: S Q 'O.affirmative.1' O.negative.1 'J.judge.1' 'O.affirmative.2' -> O.negative.2
        judge@2: S Q 'O.affirmative.1' 'O.negative.1' J.judge.1 'O.affirmative.2' 'O.negative.2' -> J.judge.2
        """,
    ),
    (
        "round-robin",
        {"agents": 2, "rounds": 2},
        """
        agent-1@1: S Q -> O.0
        agent-2@1: S Q 'O.0' -> O.1
        agent-1@2: S Q O.0 'O.1' -> O.2
        agent-2@2: S Q 'O.0' O.1 'O.2' -> O.3
        """,
    ),
    (
        "reflection",
        {"rounds": 2},
        """
        writer@0: S Q -> O.0
        critic@1: S Q 'O.0' -> critique.1
        writer@1: S Q O.0 'critique.1' -> O.1
        critic@2: S Q 'O.1' -> critique.2
        writer@2: S Q O.1 'critique.2' -> O.2
        """,
    ),
    (
        "reflection",
        {"rounds": 5, "stop_probability": 1},
        """
        writer@0: S Q -> O.0
        critic@1: S Q 'O.0' -> critique.1
        writer@1: S Q O.0 'critique.1' -> O.1
        """,
    ),
    (
        "planner",
        {"steps": 2},
        """
        planner@0: S Q -> plan
        executor@1: S Q 'plan' F.1 -> O.1
        executor@2: S Q 'plan' 'O.1' F.2 -> O.2
        planner@3: S Q 'plan' 'O.1' 'O.2' -> O.3
        """,
    ),
    (
        "tool-chain",
        {"tool_calls": 3, "tools_per_step": 2},
        """
        agent@1: S D Q -> action.0
        agent@1: action.0 => tool_result.0
        agent@1: action.0 => tool_result.1
        agent@2: S D Q action.0 tool_result.0 tool_result.1 -> action.2
        agent@2: action.2 => tool_result.2
        agent@3: S D Q action.0 tool_result.0 tool_result.1 action.2 tool_result.2 -> O
        """,
    ),
    (
        "orchestrator",
        {"workers": 2, "waves": 2, "tool_calls": 1},
        """
        lead@1: S Q -> plan.1
        worker-1@1: S D F.1.1 -> action.0
        worker-2@1: S D F.1.2 -> action.1
        worker-1@1: action.0 => tool_result.0
        worker-2@1: action.1 => tool_result.1
        worker-1@1: S D F.1.1 action.0 tool_result.0 -> O.1.1
        worker-2@1: S D F.1.2 action.1 tool_result.1 -> O.1.2
        lead@2: S Q plan.1 'O.1.1' 'O.1.2' -> plan.2
        worker-1@2: S D F.2.1 -> action.2
        worker-2@2: S D F.2.2 -> action.3
        worker-1@2: action.2 => tool_result.2
        worker-2@2: action.3 => tool_result.3
        worker-1@2: S D F.2.1 action.2 tool_result.2 -> O.2.1
        worker-2@2: S D F.2.2 action.3 tool_result.3 -> O.2.2
        lead@3: S Q plan.1 'O.1.1' 'O.1.2' plan.2 'O.2.1' 'O.2.2' -> J
        """,
    ),
    (
        "orchestrator",
        {"workers": 1, "tool_calls": 3, "tools_per_step": 2, "citations": True},
        """
        lead@1: S Q -> plan.1
        worker-1@1: S D F.1.1 -> action.0
        worker-1@1: action.0 => tool_result.0
        worker-1@1: action.0 => tool_result.1
        worker-1@1: S D F.1.1 action.0 tool_result.0 tool_result.1 -> action.2
        worker-1@1: action.2 => tool_result.2
        worker-1@1: S D F.1.1 action.0 tool_result.0 tool_result.1 action.2 tool_result.2 -> O.1.1
        lead@2: S Q plan.1 'O.1.1' -> J
        citer@3: S Q 'O.1.1' 'J' -> J.cited
        """,
    ),
    (
        "tree-of-thought",
        {"depth": 2, "samples": 2, "beam": 1, "votes": 1},
        """
        thinker@1: S Q -> O.1.0
        thinker@1: S Q -> O.1.1
        voter@1: S Q 'O.1.0' F -> vote.1.0.0
        voter@1: S Q 'O.1.1' F -> vote.1.1.0
        thinker@2: S Q 'O.1.0' -> O.2.0
        thinker@2: S Q 'O.1.0' -> O.2.1
        voter@2: S Q 'O.1.0' 'O.2.0' F -> vote.2.0.0
        voter@2: S Q 'O.1.0' 'O.2.1' F -> vote.2.1.0
        """,
    ),
    (
        "mixture-of-agents",
        {"layers": 3, "agents": 2},
        """
        proposer-1@1: S Q -> O.1.0
        proposer-2@1: S Q -> O.1.1
        proposer-1@2: S Q F 'O.1.0' 'O.1.1' -> O.2.0
        proposer-2@2: S Q F 'O.1.0' 'O.1.1' -> O.2.1
        aggregator@3: S Q F 'O.2.0' 'O.2.1' -> O.3
        """,
    ),
    (
        "map-reduce",
        {"chunks": 3, "fan_in": 2},
        """
        mapper@1: S chunk.0 -> O.0.0
        mapper@1: S chunk.1 -> O.0.1
        mapper@1: S chunk.2 -> O.0.2
        reducer@2: S Q 'O.0.0' 'O.0.1' -> O.1.0
        reducer@2: S Q 'O.0.2' -> O.1.1
        reducer@3: S Q 'O.1.0' 'O.1.1' -> O.2.0
        """,
    ),
    (
        "coding-agent",
        {"tool_calls": 3, "context_limit": 6},
        """
        agent@1: S D Q -> action.0
        agent@1: action.0 => tool_result.0
        agent@2: S D Q action.0 tool_result.0 -> action.1
        agent@2: action.1 => tool_result.1
        compactor@3: S D Q action.0 tool_result.0 action.1 tool_result.1 compaction_instruction -> compaction.1
        agent@3: S D Q 'compaction.1' -> action.2
        agent@3: action.2 => tool_result.2
        agent@4: S D Q 'compaction.1' action.2 tool_result.2 -> O
        """,
    ),
    (
        "panel",
        {"specialists": 1, "rounds": 2, "transcript": "full", "role_position": "head"},
        """
        leader@0: S Q F.plan -> plan
        specialist-1@1: role.specialist-1 S Q 'plan' -> turn.1.specialist-1
        leader@1: role.leader S Q 'plan' -> turn.1.leader
        specialist-1@2: role.specialist-1 S Q 'plan' 'turn.1.specialist-1' 'turn.1.leader' F.discuss -> turn.2.specialist-1
        leader@2: role.leader S Q 'plan' 'turn.1.specialist-1' 'turn.1.leader' F.discuss -> turn.2.leader
        leader@3: S Q 'plan' 'turn.1.specialist-1' 'turn.1.leader' 'turn.2.specialist-1' 'turn.2.leader' F.conclude -> J
        """,
    ),
    (
        "panel",
        {"specialists": 1, "rounds": 2},
        """
        leader@0: S Q F.plan -> plan
        specialist-1@1: S Q 'plan' role.specialist-1 -> turn.1.specialist-1
        leader@1: S Q 'plan' role.leader -> turn.1.leader
        specialist-1@2: S Q 'plan' 'turn.1.specialist-1' 'turn.1.leader' F.discuss role.specialist-1 -> turn.2.specialist-1
        leader@2: S Q 'plan' 'turn.1.specialist-1' 'turn.1.leader' F.discuss role.leader -> turn.2.leader
        leader@3: S Q 'plan' 'turn.2.specialist-1' 'turn.2.leader' F.conclude -> J
        """,
    ),
    (
        "panel",
        {"specialists": 1, "rounds": 1, "system": "own"},
        """
        leader@0: S.leader Q F.plan -> plan
        specialist-1@1: S.specialist-1 Q 'plan' role.specialist-1 -> turn.1.specialist-1
        leader@1: S.leader Q 'plan' role.leader -> turn.1.leader
        leader@2: S.leader Q 'plan' 'turn.1.specialist-1' 'turn.1.leader' F.conclude -> J
        """,
    ),
    (
        "panel",
        {"specialists": 2, "rounds": 1, "leader_in_rounds": False},
        """
        leader@0: S Q F.plan -> plan
        specialist-1@1: S Q 'plan' role.specialist-1 -> turn.1.specialist-1
        specialist-2@1: S Q 'plan' role.specialist-2 -> turn.1.specialist-2
        leader@2: S Q 'plan' 'turn.1.specialist-1' 'turn.1.specialist-2' F.conclude -> J
        """,
    ),
    (
        "tools-only",
        {"tool_calls": 2},
        """
        agent@1: Q => tool_result.0
        agent@2: tool_result.0 => tool_result.1
        """,
    ),
]
SHORT = {"system": "S", "question": "Q", "tools": "D", "instruction": "F", "answer": "O", "judge_answer": "J"}


def _name(key: Key) -> str:
    if key[0] == "quoted":
        return f"'{_name(key[1:])}'"
    return ".".join([SHORT.get(str(key[0]), str(key[0])), *map(str, key[1:])])


@pytest.mark.parametrize("name, params, prompts", CASES)
def test_prompts_in_order(name: str, params: dict[str, Any], prompts: str) -> None:
    topology = topologies()[name]
    recorder = record(topology, topology.params(**params), Recorder(dict.fromkeys(KINDS, 1)))
    seen = [
        f"{m.role}@{m.round}: {' '.join(map(_name, m.reads))} {'->' if m.is_call else '=>'} {_name(m.writes)}"
        for m in recorder.made
    ]
    assert seen == [line.strip() for line in prompts.strip().splitlines()]


@pytest.mark.parametrize("votes, waited_for", [(0, {1, 2}), (1, {1, 3, 4})])
def test_a_level_of_thoughts_waits_for_all_of_the_level_before(votes: int, waited_for: set[int]) -> None:
    topology = topologies()["tree-of-thought"]
    params = topology.params(depth=2, samples=2, beam=1, votes=votes)
    recorder = record(topology, params, Recorder(dict.fromkeys(KINDS, 1)))
    assert [m.after for m in recorder.made if m.role == "thinker" and m.round == 2] == [waited_for, waited_for]


def test_only_extended_reasoning_reasons() -> None:
    for name, topology in topologies().items():
        recorder = record(topology, topology.params(), Recorder(dict.fromkeys(KINDS, 1)))
        assert {m.reasoning for m in recorder.calls} <= {name == "reasoning"}


@pytest.mark.parametrize(("name", "params"), [("debate", {"agents": 9}), ("panel", {"specialists": 9})])
@pytest.mark.parametrize("whose", ["shared", "own"])
def test_no_two_agents_have_the_same_text(name: str, params: dict[str, Any], whose: str) -> None:
    """Else they would share what only one of them reads."""
    topology = topologies()[name]
    recorder = record(topology, topology.params(system=whose, **params), Recorder(dict.fromkeys(KINDS, 1)))
    for kind in ("role", "system"):
        texts = [" ".join(m.text.split()[:3]) for key, m in recorder.messages.items() if key[0] == kind]
        assert len(set(texts)) == len(texts) >= (9 if kind == "role" or whose == "own" else 1)


@pytest.mark.parametrize("name", [name for name in topologies() if name != "replay"])
def test_messages_of_one_query_alone(name: str) -> None:
    """Question, chunks and workers' tasks open a prompt's own part, so they differ from query to query; nothing else of ours does."""
    topology = topologies()[name]
    recorder = record(topology, topology.params(), Recorder(dict.fromkeys(KINDS, 1)))
    own = {str(key[0]) for key, message in recorder.messages.items() if message.per_query}
    assert own == {"question"} | {"map-reduce": {"chunk"}, "orchestrator": {"instruction"}}.get(name, set())
    made = [message for message in recorder.messages.values() if message.source is None]
    assert len({message.text for message in made}) >= len({message.key[0] for message in made}), "a text for each kind"
