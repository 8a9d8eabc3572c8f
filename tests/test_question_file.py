"""Questions of a file: read with their mistakes, asked word for word and in order, as long as the target says, on both clocks."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from make_arithmetic import questions as arithmetic
from stub_process import running_stub

from fanmark.agents import topologies
from fanmark.loadgen import dry_run, session
from fanmark.loadgen.contamination import pieces
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lanes.virtual import VirtualEndpoint
from fanmark.loadgen.question_file import read_questions, write_questions
from fanmark.loadgen.questions import Question
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.scenario_check import check, read
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.walk import walk
from fanmark.servers.tokenizer import Tokenizer, vocabulary

TABLE = topologies()
SHOTS = "Here is how it is done, twice over, so that the next one can be done in the same way: two and two are four, six and three nine. "
LINES: list[dict[str, Any]] = [
    {"prompt": f"{SHOTS}What is 2 + 2?", "answer": 4},
    {"messages": [{"role": "user", "content": f"{SHOTS}Ready?"}, {"role": "assistant", "content": "Yes, I am."},
                  {"role": "user", "content": "What is 6 x 7?"}], "answer": "42", "max_tokens": 9},
    {"prompt": f"{SHOTS}Is the sky blue on the whole, by day, in \u00bbsummer\u00ab?"},
]  # fmt: skip
SYSTEM = {"role": "system", "content": "You add and multiply, and say the number alone."}
TOLD = [
    {"messages": [SYSTEM, *line.get("messages", [{"role": "user", "content": line.get("prompt")}])]} for line in LINES
]
ARMS: list[dict[str, Any]] = [
    {"name": "single", "topology": "single", "baseline": True},
    {"name": "debate", "topology": "debate", "agents": 2, "rounds": 2, "system": "own"},
    {"name": "chain", "topology": "tool-chain", "tool_calls": 2},
]
WORKLOAD = {"system": 20, "answer": 12, "judge_answer": 12, "action": 8, "tool_result": 24, "file": "q.jsonl"}


def scenario(folder: Path, lines: list[Any], **more: Any) -> Scenario:
    folder.mkdir(exist_ok=True)
    (folder / "q.jsonl").write_text("".join(f"{json.dumps(line)}\n\n" for line in lines))
    load = {"mode": "closed", "concurrency": 2, "queries": 7, "warmup": 1}
    raw = {"arm": ARMS, "workload": WORKLOAD, "load": load, "seed": 3} | more
    return check(raw, str(folder / "f.toml"), TABLE)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r'line 2: is not JSON \(.*\): give an object a line, \{"prompt": "What is 6 x 7\?", "answer": "42"\}'),
        ("[1]", r"line 2: is \[1\]: give an object a line, .*"),
        ('{"answer": "4"}', "line 2: give either prompt or messages, .*"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "line 2: give either prompt or messages, .*"),
        ('{"prompt": "a", "anwser": "4"}', "line 2: unknown key 'anwser': did you mean 'answer'\\?"),
        ('{"prompt": ""}', 'line 2: prompt = "": must be a text in quotes, not an empty one'),
        ('{"prompt": "a", "max_tokens": 0}', "line 2: max_tokens = 0: must be a whole number of at least 1"),
        ('{"prompt": "a", "answer": [4]}', r"line 2: answer = \[4\]: must be a text in quotes or a whole number or a number"),
        ('{"messages": [{"role": "tool", "content": "b"}]}',
         r'line 2: \[\[messages\]\] number 1 role = "tool": must be one of "assistant", "system", "user"'),
        ('{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}',
         'line 2: messages: the last one must be a question: give it the role "user"'),
        ('{"messages": [{"role": "user", "content": "b"}, {"role": "system", "content": "c"}]}',
         "line 2: messages: a system message that is not the first: give one, or none"),
        ('{"messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}',
         "line 2: messages: line 2 has a system message and line 1 has none: give it to all or none"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt": "What?"}}\n{line}\n')
    with pytest.raises(ScenarioError) as caught:
        read_questions(path, "f.toml: [workload] file")
    assert "\n" not in str(caught.value)
    with pytest.raises(ScenarioError, match=f"^{path}: {said}$"):
        read_questions(path, "f.toml: [workload] file")


def test_a_file_that_is_not_there_or_empty_is_told_by_the_scenarios_key(tmp_path: Path) -> None:
    with pytest.raises(
        ScenarioError, match=r'f\.toml: \[workload\] file = "q.jsonl": is empty: give a question a line'
    ):
        scenario(tmp_path, [])
    (tmp_path / "q.jsonl").unlink()
    raw = {"arm": ARMS, "workload": {"file": "q.jsonl"}}
    with pytest.raises(ScenarioError, match=r'file = "q.jsonl": cannot be read \(No such file or directory\): give a '):
        check(raw, str(tmp_path / "f.toml"), TABLE)
    with pytest.raises(ScenarioError, match=r'arm \'debate\': workload file = "q.jsonl": all arms are asked the same'):
        scenario(tmp_path, LINES, arm=[ARMS[0], ARMS[1] | {"workload": {"file": "q.jsonl"}}])


@pytest.mark.parametrize("lines", [LINES, TOLD])
def test_what_is_written_is_read_again(tmp_path: Path, lines: list[Any]) -> None:
    found = scenario(tmp_path, lines).questions
    write_questions(tmp_path / "again.jsonl", found)
    assert read_questions(tmp_path / "again.jsonl", "f.toml") == found and len(found) == 3
    assert [question.answer for question in found] == (["4", "42", None] if lines is LINES else [None] * 3)


def test_lines_are_asked_in_order_over_and_over_and_each_limits_its_own_answer(tmp_path: Path) -> None:
    found = scenario(tmp_path, LINES)
    for query in range(-4, 9):
        demands = [draw_demand(found, arm, TABLE, query) for arm in found.arms]
        question = found.questions[query % 3]
        for demand in demands:
            assert demand.asked == question
            asked = demand.message(("question",), demand.question, per_query=True)
            assert (asked.text, asked.per_query) == (question.text, True)
            final = "judge_answer" if demand.arm == "debate" else "answer"
            capped = {final: 9} if question.max_tokens else {}
            drawn = {"answer": 12, "judge_answer": 12} | capped
            assert {kind: demand.lengths[kind] for kind in drawn} == drawn


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("tools-only", "tree-of-thought", "replay")])
def test_the_limit_holds_for_the_last_call_of_every_topology(name: str) -> None:
    """A tree of thought ends with votes, tools alone with none, and a replay as was recorded."""
    arms = [ARMS[0], {"name": "own", "topology": name}]
    base = check({"arm": arms, "workload": {"answer": 30, "judge_answer": 31}}, "f.toml", TABLE)
    found = msgspec.structs.replace(base, questions=[Question((("user", "Why?"),), max_tokens=5)])
    demand = draw_demand(found, found.arms[1], TABLE, 0)
    last = asyncio.run(walk(demand.topology, demand))[-1].reply
    times = demand.params.effort if name == "reasoning" else 1
    assert last.tokens == 5 * times


def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The messages of all calls in virtual time from here on."""
    bodies: list[list[tuple[str, str]]] = []
    send = VirtualEndpoint.send

    async def recorded(self: VirtualEndpoint, body: Any, *rest: Any) -> Any:
        bodies.append([(m["role"], m["content"]) for m in body["messages"]])
        return await send(self, body, *rest)

    monkeypatch.setattr(VirtualEndpoint, "send", recorded)
    return bodies


@pytest.mark.parametrize("lines", [LINES, TOLD])
def test_a_question_is_sent_word_for_word_and_as_long_as_it_is(
    tmp_path: Path, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies, found = sent(monkeypatch), scenario(tmp_path / "f", lines)
    summary = simulate(found, TABLE, Options(tmp_path / "run", "test", [])).summary
    validity = summary["validity"]
    assert (validity["counted"], validity["reconciled"], validity["uncontaminated"]) == (True, True, True)
    tokenizer = Tokenizer(vocabulary())
    for query in read_queries(tmp_path / "run"):
        question = found.questions[query.query % 3]
        length = sum(tokenizer.count(text) for _, text in question.messages)
        if query.arm == "single":
            system = 20 if question.system is None else tokenizer.count(question.system)
            assert query.resources["input_tokens"] == query.expected["input_tokens"] == system + length
    for body in bodies:
        roles = [role for role, _ in body]
        asked = [list(q.messages) for q in found.questions if list(q.messages) == body[1 : 1 + len(q.messages)]]
        assert len(asked) == 1 and roles[0] == "system"
        if lines is TOLD:  # as it is, or after the agent's own name
            assert body[0][1].removeprefix("0: ").removeprefix("1: ") == SYSTEM["content"]
    assert read_questions(tmp_path / "run" / "questions.jsonl", "run") == found.questions
    raw, source = read(str(tmp_path / "run" / "scenario.toml"))
    assert check(raw, source, TABLE).questions == found.questions


@pytest.mark.real
@pytest.mark.parametrize(("api", "lines"), [("chat", LINES), ("chat", TOLD), ("completions", LINES)])
def test_a_run_over_a_file_counts_and_explains_its_cache(tmp_path: Path, api: str, lines: list[Any]) -> None:
    with running_stub("--time-scale", "0.05") as server:
        target = {"url": f"{server.url}/v1", "api": api}
        found = scenario(tmp_path / "f", lines, target=target, arm=ARMS[:2])
        options = session.Options(tmp_path / "run", 0, "asked", "test", [], None)
        summary = asyncio.run(session.run(found, TABLE, options)).summary
    validity = summary["validity"]
    assert (validity["counted"], validity["reconciled"], validity["uncontaminated"]) == (True, True, True)
    # 3 lines for 8 queries, and the lines begin alike: that is in the cache
    assert summary["arms"]["single"]["per_query"]["cached_tokens"]["mean"] > 16
    assert {query.outcome for query in read_queries(tmp_path / "run")} == {"completed"}


def test_the_bundled_questions_are_those_of_the_seed() -> None:
    raw, source = read("arithmetic")
    found = check(raw, source, TABLE)
    assert [q.answer for q in found.questions] == [line["answer"] for line in arithmetic()]
    assert [q.text for q in found.questions] == [line["prompt"] for line in arithmetic()]
    assert [line.split(":")[0] for line in found.approximate()] == ["240 questions of a file", 'lengths = "natural"']
    planned = dry_run.plan(found, TABLE)
    assert planned["votes"]["calls"] == 5 * planned["single"]["calls"] == 300


def test_pieces_bound_what_two_texts_share() -> None:
    text = "a b\u00e4c " * 20
    assert b"".join(piece for piece, _ in pieces(text)) == text.encode()  # type: ignore[misc]
    assert sum(most for _, most in pieces(text)) == len(text.encode())
    assert pieces(list(range(40))) == [(tuple(range(16)), 16), (tuple(range(16, 32)), 16), (tuple(range(32, 40)), 8)]
