"""Walks through a query without sending anything: which calls its topology makes, and what they read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fanmark.agents.runtime import Author, Key, Message, Topology
from fanmark.loadgen.demand import SYSTEM, Demand


@dataclass(frozen=True, slots=True)
class Made:
    """One call of the walk: who makes it, what it reads and writes. `depth` counts calls on the longest chain up to it."""

    role: str
    round: int
    depth: int
    prompt: list[Message]
    reply: Message

    @property
    def input_tokens(self) -> int:
        return sum(message.tokens for message in self.prompt)

    @property
    def context_tokens(self) -> int:
        """The prompt and the reply together."""
        return self.input_tokens + self.reply.tokens


@dataclass
class _Walk:
    """A Runtime whose calls and tool calls end at once, as long as drawn. A quote is the reply itself."""

    demand: Demand
    made: list[Made] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)  # of calls and tool calls by number, the first of which is 1

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

    async def infer(
        self,
        prompt: Iterable[Message],
        *,
        writes: Key,
        role: str,
        round: int = 1,
        tools: bool = False,
        times: int = 1,
        after: Iterable[Message] = (),
        **_: Any,
    ) -> Message:
        messages = list(prompt)
        depth = 1 + self._depth([*messages, *after])
        if tools and self.demand.tokens(("tools",)) > 0:
            place = 1 if messages and messages[0].author == "system" else 0
            messages.insert(place, Message(("tools",), "system", "", self.demand.tokens(("tools",))))
        reply = Message(writes, "assistant", "", self.demand.lengths[str(writes[0])] * times, self._number(depth))
        self.made.append(Made(role, round, depth, messages, reply))
        return reply

    async def call_tool(self, *, writes: Key, request: Message, **_: Any) -> Message:
        number = self._number(self._depth([request]))
        return Message(writes, "user", "", self.demand.lengths["tool_result"], number)

    def _depth(self, read: Iterable[Message]) -> int:
        return max((self.depths[m.source - 1] for m in read if m.source is not None), default=0)

    def _number(self, depth: int) -> int:
        self.depths.append(depth)
        return len(self.depths)


async def walk(topology: Topology, demand: Demand) -> list[Made]:
    """The calls of one query, in an order in which they can be made. The tools' schemas stand in their prompts where `demand` has a length
    of ("tools",)."""
    walked = _Walk(demand)
    await topology.run(walked, demand.params)
    return walked.made
