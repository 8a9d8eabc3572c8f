"""Walks through a query without sending anything: which calls its topology makes, and what they read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fanmark.agents.runtime import Author, Key, Message, ToolLike, Topology
from fanmark.loadgen.demand import Demand
from fanmark.loadgen.users import Turn, turn_of, with_told


@dataclass(frozen=True, slots=True)
class Made:
    """One call of the walk: who makes it, what it reads and writes. `depth` counts calls on the longest chain up to it; of its reply
    `again_tokens` are read again, all but the reasoning."""

    role: str
    round: int
    depth: int
    prompt: list[Message]
    reply: Message
    again_tokens: int

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
    told: Sequence[Turn]
    made: list[Made] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)  # of calls and tool calls by number, the first of which is 1

    @property
    def system(self) -> Message:
        return self.message(("system",), self.demand.system, "system")

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
        samples: int = 1,
        reasoning: bool = False,
        after: Iterable[Message] = (),
        **_: Any,
    ) -> Message:
        messages = with_told(prompt, self.told)
        depth = 1 + self._depth([*messages, *after])
        if tools and self.demand.tokens(("tools",)) > 0:
            place = 1 if messages and messages[0].author == "system" else 0
            messages.insert(place, Message(("tools",), "system", "", self.demand.tokens(("tools",))))
        length = self.demand.lengths[str(writes[0])]
        reply = Message(writes, "assistant", "", length * times, self._number(depth))
        again_tokens = length * samples * (1 if reasoning else times)
        self.made.append(Made(role, round, depth, messages, reply, again_tokens))
        return reply

    async def call_tool(
        self,
        *,
        writes: Key,
        request: Message,
        after: Iterable[Message] = (),
        like: ToolLike | None = None,
        **_: Any,
    ) -> Message:
        number = self._number(self._depth([request, *after]))
        tokens = self.demand.lengths["tool_result"] if like is None else like.tokens
        return Message(writes, "user", "", tokens, number)

    async def pause(self, seconds: float) -> None:
        """Takes no time."""

    def _depth(self, read: Iterable[Message]) -> int:
        return max((self.depths[m.source - 1] for m in read if m.source is not None), default=0)

    def _number(self, depth: int) -> int:
        self.depths.append(depth)
        return len(self.depths)


async def walk(topology: Topology, demand: Demand, told: Sequence[Turn] = ()) -> list[Made]:
    """The calls of one query, in an order in which they can be made. The tools' schemas stand in their prompts where `demand` has a length
    of ("tools",). `told`: the turns before it in its session."""
    walked = _Walk(demand, told)
    await topology.run(walked, demand.params)
    return walked.made


async def walk_turn(demand: Demand, told: Sequence[Turn]) -> Turn | None:
    """The query as the later turns of its session tell it; None where it makes no call."""
    made = await walk(demand.topology, demand, told)
    if not made:
        return None
    question = _Walk(demand, told).question
    answer = Message(made[-1].reply.key, "assistant", "", made[-1].again_tokens)
    return turn_of(demand.query, question, answer)
