"""What one query asks for: lengths and parameters drawn from (seed, query index), the same in every arm. Pure."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from fanmark.agents.runtime import Author, Expected, Key, Message, Topology
from fanmark.loadgen.arms import resolve_params
from fanmark.loadgen.lengths import Dist, draw_int
from fanmark.loadgen.questions import Question, about_tokens, asked
from fanmark.loadgen.scenario import KINDS, RUN_KINDS, Arm, Scenario, Workload
from fanmark.loadgen.users import QUESTION, TOLD

SYSTEM = (
    "You are one of several assistants that answer questions for engineers and planners. Think step by step, state your assumptions, "
    "prefer facts and figures to opinions, and say what you do not know. Some messages go on in scraps of a novel: pay them no attention."
)
QUESTIONS = (
    "Should a city of half a million people replace its diesel buses by trams, by electric buses or by neither? Compare cost and risk.",
    "A warehouse ships 4,000 parcels a day and is late with one in twenty. What would you measure first, and what would you change?",
    "A river floods a town every ten years or so. Is it better to build higher walls, to give the river room, or to move the houses?",
    "Is it wise for a small country to build a nuclear power station now, or should it wait for cheaper storage? Argue with numbers.",
    "A hospital has beds for 300 patients and 340 on most winter days. Which three steps would help most within a year?",
    "How should a software team of twelve decide whether to rewrite an old billing system or to keep mending it?",
    "A farm of 200 hectares loses soil every spring. Which crops, machines and rules would you try first, and how would you judge them?",
    "Why do queues in supermarkets feel longer than they are, and what could a manager do about it without more staff?",
)

UNITS = {"recorded": 1, "reply": 1, "result": 1}  # what is as long as it was recorded is so many times as long as this


@dataclass(frozen=True, slots=True)
class Demand:
    """One query of one arm: its number (negative: warm-up), drawn lengths by kind, its topology and the params as drawn; in a mix, which
    part of the arm it is; of a file's questions the one that is asked."""

    arm: str
    query: int
    lengths: Mapping[str, int]
    params: Any
    seed: str
    topology: Topology
    part: str | None = None
    asked: Question | None = None

    @property
    def system(self) -> str:
        """What the system message says that all agents share."""
        return SYSTEM if self.asked is None or self.asked.system is None else self.asked.system

    @property
    def question(self) -> str:
        """The question."""
        if self.asked is not None:
            return self.asked.text
        return f"{QUESTIONS[self.query % len(QUESTIONS)]} Use the tools you have, if any."

    def message(self, key: Key, text: str, author: Author = "user", *, per_query: bool = False) -> Message:
        """A message as the topology asks for it; see agents' Runtime."""
        if self.asked is not None and (key == ("question",) or (key[0] == "system" and self.asked.system is not None)):
            return Message(key, author, text, about_tokens(text), per_query=True)
        if per_query:  # the number comes first, so that no two queries share a block from here on
            text = f"Question {self.query}. {text}"
        return Message(key, author, text, self.lengths[str(key[0])], per_query=per_query)

    def tokens(self, key: Key) -> int:
        """How long a message is as drawn; what cannot be drawn, the tools' schemas, is 0."""
        return self.lengths.get(str(unquoted(key)[0]), 0)

    def chance(self, *name: str | int) -> float:
        """A number in [0, 1) out of the query's seed, by name."""
        return random.Random("/".join(map(str, (self.seed, "chance", *name)))).random()


def unquoted(key: Key) -> Key:
    """The key of the message that a quote repeats, or of the message itself."""
    return key[1:] if key[0] == "quoted" else key


def draw_demand(scenario: Scenario, arm: Arm, topologies: Mapping[str, Topology], query: int) -> Demand:
    """The demand of query number `query`; equal for equal (scenario seed, number), whatever the arm draws elsewhere."""
    name, part = arm.name, None
    if arm.mix:
        weights = [each.weight for each in arm.mix]
        (arm,) = random.Random(f"{scenario.seed}/{query}/mix").choices(arm.mix, weights)
        part = arm.name
    topology = topologies[arm.topology]
    by_model = topology.by_model if scenario.tools.decide == "model" else None
    workload = scenario.workload_of(arm)
    lengths = (
        _constants(workload)
        or {
            kind: draw_int(getattr(workload, kind), scenario.seed, "run" if kind in RUN_KINDS else query, kind)
            for kind in KINDS
        }
        | UNITS
    )
    params = resolve_params(
        topology, arm.params, arm.name, lambda key, dist: draw_int(dist, scenario.seed, query, "params", key)
    )
    if topology.of_query is not None:
        params = topology.of_query(params, query)
    if by_model is not None:
        topology, params = by_model, dataclasses.replace(params, tool_calls=scenario.tools.max_tool_calls)
    demand = Demand(name, query, lengths, params, f"{scenario.seed}/{query}", topology, part)
    question = asked(scenario.questions, query)
    return demand if question is None else _asking(demand, question)


def _asking(demand: Demand, question: Question) -> Demand:
    """The demand with a question of a file, whose own limit holds for what a judge answers where there is one, else for every answer."""
    lengths = {**demand.lengths, "question": about_tokens(question.text)}
    if question.system is not None:
        lengths["system"] = about_tokens(question.system)
    asking = dataclasses.replace(demand, lengths=lengths, asked=question)
    if question.max_tokens is not None:
        expected = demand.topology.expected
        writes = {"judge_answer": 1} if expected is None else expected(demand.params, asking).writes
        final = {"judge_answer"} if writes.get("judge_answer") else {"answer"}
        for kind in final | ({"answer"} if expected is None else set()):
            lengths[kind] = min(lengths[kind], question.max_tokens)
    return asking


def word_for_word(message: Message, query: int, questions: Sequence[Question]) -> Sequence[tuple[Author, str]] | None:
    """What a message of query number `query` says as a file has it, author by author; None where its text is made."""
    key = message.key
    if key[0] == TOLD:
        query, key = int(key[1]), key[2:]
    question = asked(questions, query)
    if question is None:
        return None
    if key == QUESTION:
        return question.messages
    return [("system", message.text)] if key[0] == "system" and question.system is not None else None


@lru_cache(64)
def _constants(workload: Workload) -> Mapping[str, int] | None:
    """The lengths where none is drawn: the same for all queries, which may be thousands at a time."""
    given = {kind: getattr(workload, kind) for kind in KINDS}
    return None if any(isinstance(length, Dist) for length in given.values()) else MappingProxyType(given | UNITS)


def expected_tokens(
    expected: Expected, lengths: Mapping[str, int], sizes: Mapping[Key, int | None]
) -> tuple[int, int | None]:
    """(output, input) tokens by the closed form. `sizes` are the messages' real sizes; what is not in it is as long as drawn.
    Input is None where a size is not known."""
    output = sum(count * lengths[kind] for kind, count in expected.writes.items())
    total = 0
    if not expected.input_known:
        return output, None
    for key, count in expected.reads.items():
        written = unquoted(key)
        size = sizes[key] if key in sizes else lengths.get(str(written[0]), 0) * expected.times.get(written, 1)
        if size is None:
            return output, None
        total += count * size
    return output, total
