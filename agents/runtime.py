"""What a topology is handed, and what stands beside it. Standard library only.

A topology is an async function `run(rt, params)`. It composes prompts out of messages, asks `rt` to infer and to call tools, and waits
for what it needs. It knows nothing of servers, clocks, tokenizers, metrics or files. A message remembers which call produced it,
which gives every call's dependencies without asking the topology.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")

Key = tuple[str | int, ...]
"""Names a message within its query: first its kind, whose length is in [workload], then what tells it from its siblings."""

Author = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolAsk:
    """A tool call that a reply asks for, as the model wrote it: `arguments` should be a JSON object, and need not be one."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolLike:
    """A tool call as it was once: how long it took, and how many tokens it said."""

    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a prompt. `tokens` is its length as drawn (0: there is no such message); `text` is the instruction that the
    length is filled up from, or a reply's own text; `source` is the number of the call or tool call that produced it. `per_query`: it
    is not the same in every query. `asks`: the tool calls that a reply asks for; `answers`: the id of the one that a result belongs to.
    `begins`: texts that it begins with, as other messages may, by their keys, each about so many tokens long."""

    key: Key
    author: Author
    text: str
    tokens: int
    source: int | None = None
    per_query: bool = False
    asks: tuple[ToolAsk, ...] = ()
    answers: str | None = None
    begins: tuple[tuple[Key, int], ...] = ()


class Drawn(Protocol):
    """What was drawn for one query: known to its topology while it runs, and to the closed form of what it must cost."""

    def tokens(self, key: Key) -> int:
        """How long a message of the query is: as it came, if it is there, else as drawn. ("tools",) are the tools' schemas."""

    def chance(self, *name: str | int) -> float:
        """A number in [0, 1) out of the query's seed, the same whenever it is asked for by this name."""


class Runtime(Drawn, Protocol):
    """The world of one query, as its topology sees it."""

    @property
    def system(self) -> Message:
        """The system message that all agents of all queries share."""

    @property
    def question(self) -> Message:
        """The user's question."""

    def message(self, key: Key, text: str, author: Author = "user", *, per_query: bool = False) -> Message:
        """A message of kind `key[0]`, as long as the workload says: `text`, cut or filled up with words. It is the same in all queries,
        but with `per_query`: then its start already differs, so that queries share no part of it."""

    def quote(self, reply: Message) -> Message:
        """Another agent's reply as a user message; its key is ("quoted", *reply.key)."""

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
        """One call. The reply is `times` the length of kind `writes[0]`; with `reasoning`, all but the last share of it are reasoning
        tokens. `samples`: so many replies to one reading of the prompt, as one. `tools`: the tools' schemas stand in the prompt.
        `may_call`: the model may ask for tool calls, which the reply then holds. `after`: messages it waited for but does not read."""

    async def call_tool(
        self,
        *,
        writes: Key,
        request: Message,
        role: str,
        round: int = 1,
        ask: ToolAsk | None = None,
        after: Iterable[Message] = (),
        like: ToolLike | None = None,
    ) -> Message:
        """One tool call that `request` led to; the tool's own result comes back as a user message. `ask`: the one that the model asked for,
        whose result, or why there is none, comes back as the tool's message. `after`: what else it waited for. `like`: an embedded tool
        takes as long, and says as much."""

    async def pause(self, seconds: float) -> None:
        """The agent's own time passes, on the run's clock."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What one query must cost, by formula.

    `writes`: how often each kind's length is written by a call (output tokens = sum of count x length). `reads`: in how many prompts
    each message stands (input tokens = sum of count x size); the tools' schemas are the message ("tools",). `times`: how many lengths
    of its kind a message has, where it is not one. `depth` counts calls on the longest chain of dependencies, `width` is the largest
    number of calls at one depth. `at_most`: these are bounds, since those that are late are given up, or the model decides.
    `input_known`: input tokens follow from `reads`.
    """

    calls: int
    depth: int
    width: int
    writes: Mapping[str, int]
    reads: Mapping[Key, int]
    tool_calls: int = 0
    times: Mapping[Key, int] = field(default_factory=dict)
    at_most: bool = False
    input_known: bool = True


@dataclass(frozen=True, slots=True)
class Topology:
    """A row of the table of topologies. `params` is a frozen dataclass whose mistakes are ValueErrors; an int in it may be a
    distribution in the scenario, which is drawn once a query. `by_model`: the same where the model decides on the tool calls, at most
    `params.tool_calls` of them. `sketch` draws the shape: `-->` one after another, `==>` all at once.
    `by_client`: its calls go by a client of its own, in real time only; the parameters that the run itself gives it. `of_query`: the
    parameters as they are for the query of this number."""

    name: str
    summary: str
    params: type[Any]
    run: Callable[[Runtime, Any], Coroutine[Any, Any, None]]
    expected: Callable[[Any, Drawn], Expected] | None = None
    sketch: str = ""
    by_model: "Topology | None" = None
    by_client: tuple[str, ...] | None = None
    of_query: Callable[[Any, int], Any] | None = None


async def together(coroutines: Iterable[Coroutine[Any, Any, T]], wait_for: int | Literal["all"] = "all") -> list[T]:
    """Runs all at once and gives their results in order. The first failure cancels the rest and is raised as it is. With `wait_for` as soon
    as so many have ended the others are cancelled, and are not among the results."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
            needed = enough(wait_for, len(tasks))
            while sum(task.done() for task in tasks) < needed < len(tasks):
                await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
            if needed < len(tasks):
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks if not task.cancelled()]


def enough(wait_for: int | Literal["all"], n: int) -> int:
    """How many of n are waited for."""
    return n if wait_for == "all" else min(wait_for, n)


def systems(rt: Runtime, names: Iterable[str | int], whose: Literal["shared", "own"]) -> list[Message]:
    """Each agent's system message: the one that all share, or one of its own, which differs from the first word on."""
    if whose == "shared":
        return [rt.system for _ in names]
    return [rt.message(("system", name), f"{name}: {rt.system.text}", "system") for name in names]


def system_key(name: str | int, whose: Literal["shared", "own"]) -> Key:
    """The key of an agent's system message."""
    return ("system",) if whose == "shared" else ("system", name)


@dataclass(frozen=True, slots=True)
class Seat:
    """Where an agent speaks from: its system message, and its own text, which stands before everything ("head": nothing is shared with the
    others) or after it ("tail": all before it is shared)."""

    system: Message
    role: Message
    position: Literal["head", "tail"]

    def prompt(self, said: Iterable[Message]) -> list[Message]:
        """What the agent reads when all this was said to it."""
        return [self.role, self.system, *said] if self.position == "head" else [self.system, *said, self.role]


def seats(
    rt: Runtime,
    roles: Iterable[tuple[str | int, str]],
    position: Literal["head", "tail"],
    whose: Literal["shared", "own"],
) -> list[Seat]:
    """A seat for each agent of `roles`: its name and its own text."""
    author: Author = "system" if position == "head" else "user"
    return [
        Seat(system, rt.message(("role", name), text, author), position)
        for name, text in roles
        for system in systems(rt, [name], whose)
    ]


def stopped(drawn: Drawn, r: int, rounds: int, probability: float, first: int = 1) -> bool:
    """Whether round r is the last: it is number `rounds`, or the query's seed stops here; not before round `first`."""
    return r >= rounds or (r >= first and drawn.chance("stop", r) < probability)


def is_probability(**values: float) -> None:
    """Raises ValueError naming the first value outside [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: must be from 0 to 1")


def at_least(minimum: int, **values: int) -> None:
    """Raises ValueError naming the first value below `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} = {value}: must be at least {minimum}")
