"""Walks through a query without sending anything: which calls its topology makes, and what they read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fanmark.agents.runtime import Author, Key, Message, Topology
from fanmark.loadgen.demand import SYSTEM, Demand


@dataclass(frozen=True, slots=True)
class Made:
    """One call of the walk: who makes it, what it reads, and its prompt and reply together."""

    role: str
    prompt: list[Message]
    context_tokens: int


@dataclass
class _Walk:
    """A Runtime whose calls and tool calls end at once, as long as drawn. Replies have source 0."""

    demand: Demand
    made: list[Made] = field(default_factory=list)

    @property
    def system(self) -> Message:
        return self.message(("system",), SYSTEM, "system")

    @property
    def question(self) -> Message:
        return self.message(("question",), self.demand.question, per_query=True)

    def tokens(self, key: Key) -> int:
        return self.demand.tokens(key)

    def chance(self, *name: str | int) -> float:
        return self.demand.chance(*name)

    def message(self, key: Key, text: str, author: Author = "user", *, per_query: bool = False) -> Message:
        return Message(key, author, text, self.demand.lengths[str(key[0])], per_query=per_query)

    def quote(self, reply: Message) -> Message:
        return reply

    async def infer(self, prompt: Iterable[Message], *, writes: Key, role: str, times: int = 1, **_: Any) -> Message:
        messages, tokens = list(prompt), self.demand.lengths[str(writes[0])] * times
        self.made.append(Made(role, messages, sum(message.tokens for message in messages) + tokens))
        return Message(writes, "assistant", "", tokens, 0)

    async def call_tool(self, *, writes: Key, **_: Any) -> Message:
        return Message(writes, "user", "", self.demand.lengths["tool_result"], 0)


async def walk(topology: Topology, demand: Demand) -> list[Made]:
    """The calls of one query, in the order in which they are made."""
    walked = _Walk(demand)
    await topology.run(walked, demand.params)
    return walked.made
