"""A Runtime that answers at once, with lengths as given, and writes down every call: what the topologies' tests look at."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fanmark.agents.runtime import Author, Key, Message, ToolAsk, Topology

KINDS = (
    *("system", "question", "tools", "role", "instruction", "answer", "judge_instruction", "judge_answer", "action"),
    *("tool_result", "critique", "plan", "vote", "chunk", "turn", "compaction_instruction", "compaction"),
)


@dataclass
class Made:
    """One call or tool call. `after`: numbers of what it depended on."""

    role: str
    round: int
    reads: list[Key]
    writes: Key
    after: set[int]
    input_tokens: int
    output_tokens: int
    is_call: bool = True
    reasoning: bool = False


@dataclass
class Recorder:
    """`sizes` gives tool results lengths of their own, in the order of their numbers."""

    lengths: Mapping[str, int]
    seed: int = 0
    sizes: list[int] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0
    messages: dict[Key, Message] = field(default_factory=dict)

    @property
    def system(self) -> Message:
        return self.message(("system",), "Be brief.", "system")

    @property
    def question(self) -> Message:
        return self.message(("question",), "What is it?", per_query=True)

    def tokens(self, key: Key) -> int:
        return self.messages[key].tokens if key in self.messages else self.lengths[str(key[key[0] == "quoted"])]

    def chance(self, *name: str | int) -> float:
        return random.Random(f"{self.seed}/{name}").random()

    def message(self, key: Key, text: str, author: Author = "user", *, per_query: bool = False) -> Message:
        assert text and "{" not in text
        return self._keep(Message(key, author, text, self.lengths[str(key[0])], per_query=per_query))

    def quote(self, reply: Message) -> Message:
        return self._keep(Message(("quoted", *reply.key), "user", reply.text, reply.tokens, reply.source))

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
        may_call: bool = False,
        after: Iterable[Message] = (),
    ) -> Message:
        messages = list(prompt)
        assert all(self.messages[m.key] == m for m in messages)
        size = sum(m.tokens for m in messages) + (self.lengths["tools"] if tools else 0)
        keys = [m.key for m in messages]
        keys[1:1] = [("tools",)] if tools else []
        waited = {m.source for m in (*messages, *after) if m.source is not None}
        tokens = self.lengths[str(writes[0])] * times * samples
        number = self._made(Made(role, round, keys, writes, waited, size, tokens, reasoning=reasoning))
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        return self._keep(Message(writes, "assistant", f"reply {number}", tokens, number))

    async def pause(self, seconds: float) -> None:
        """Takes no time."""

    async def call_tool(
        self, *, writes: Key, request: Message, role: str, round: int = 1, ask: ToolAsk | None = None, **_: Any
    ) -> Message:
        n = int(writes[1])
        tokens = self.sizes[n % len(self.sizes)] if self.sizes else self.lengths["tool_result"]
        waited = set() if request.source is None else {request.source}
        number = self._made(Made(role, round, [request.key], writes, waited, 0, 0, is_call=False))
        await asyncio.sleep(0)
        return self._keep(Message(writes, "user", f"result {number}", tokens, number))

    def _made(self, made: Made) -> int:
        self.made.append(made)
        return len(self.made)

    def _keep(self, message: Message) -> Message:
        """A key names one message: the same author, text and length whenever it comes up."""
        assert self.messages.setdefault(message.key, message) == message
        return message

    @property
    def calls(self) -> list[Made]:
        return [made for made in self.made if made.is_call]

    @property
    def reads(self) -> Counter[Key]:
        """In how many prompts each message stands."""
        return Counter(key for made in self.calls for key in made.reads)

    @property
    def writes(self) -> Counter[str]:
        """Tokens written of each kind."""
        written: Counter[str] = Counter()
        for made in self.calls:
            written[str(made.writes[0])] += made.output_tokens
        return written

    def counts(self) -> tuple[int, int, int, int, int, int]:
        """(calls, tool calls, input tokens, output tokens, depth, width) of what was recorded."""
        depth: dict[int, int] = {}
        for number, made in enumerate(self.made, start=1):
            assert all(n in depth for n in made.after)
            depth[number] = made.is_call + max((depth[n] for n in made.after), default=0)
        at = Counter(depth[number] for number, made in enumerate(self.made, start=1) if made.is_call)
        calls = self.calls
        return (
            len(calls),
            len(self.made) - len(calls),
            sum(call.input_tokens for call in calls),
            sum(call.output_tokens for call in calls),
            max(at, default=0),
            max(at.values(), default=0),
        )


def record(topology: Topology, params: Any, recorder: Recorder) -> Recorder:
    """Runs the topology to its end."""
    asyncio.run(topology.run(recorder, params))
    return recorder
