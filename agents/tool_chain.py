"""Tool chain (ReAct, MCP): one agent acts, reads the tool's result, acts again, and answers.

    step i:  reads S, D, Q, then all actions and results so far; writes one action a tool call
    answer:  reads all of it
S system, D the tools' schemas, Q question. With `tools_per_step` > 1 the tool calls of a step run at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Key, Message, Runtime, Topology, at_least, together


@dataclass(frozen=True, slots=True)
class Params:
    """`tool_calls` in all; steps = ceil(tool_calls / tools_per_step)."""

    tool_calls: int = 12
    tools_per_step: int = 1

    def __post_init__(self) -> None:
        at_least(0, tool_calls=self.tool_calls)
        at_least(1, tools_per_step=self.tools_per_step)


async def run(rt: Runtime, p: Params) -> None:
    context, steps = [rt.system, rt.question], steps_of(p.tool_calls, p.tools_per_step)
    for step, numbers in enumerate(steps, start=1):
        context = await act(rt, context, step, numbers, role="agent")
    await rt.infer(context, writes=("answer",), role="agent", round=len(steps) + 1, tools=True)


def steps_of(tool_calls: int, tools_per_step: int, first: int = 0) -> list[range]:
    """The numbers of the tool calls of each step, from `first` on."""
    end = first + tool_calls
    return [range(n, min(n + tools_per_step, end)) for n in range(first, end, tools_per_step)]


async def act(
    rt: Runtime, context: list[Message], round: int, numbers: range, role: str, after: Iterable[Message] = ()
) -> list[Message]:
    """One step: the agent writes one action for each of `numbers`, the tools run at once; gives the context grown by all of it."""
    action = await rt.infer(
        context, writes=("action", numbers[0]), role=role, round=round, tools=True, times=len(numbers), after=after
    )
    results = await together(
        rt.call_tool(writes=("tool_result", n), request=action, role=role, round=round) for n in numbers
    )
    return [*context, action, *results]


def reads_of(steps: Sequence[range]) -> dict[Key, int]:
    """How often a chain's actions and results are read: what step k of s adds, by the s - k later steps and by the call at its end."""
    reads: dict[Key, int] = {}
    for k, numbers in enumerate(steps):
        reads["action", numbers[0]] = len(steps) - k
        reads |= {("tool_result", n): len(steps) - k for n in numbers}
    return reads


def expected(p: Params, _: Drawn) -> Expected:
    """t tool calls in s steps: s + 1 calls, one after another, all of which read S, D and Q."""
    steps = steps_of(p.tool_calls, p.tools_per_step)
    reads: dict[Key, int] = {(kind,): len(steps) + 1 for kind in ("system", "tools", "question")} | reads_of(steps)
    return Expected(
        calls=len(steps) + 1,
        tool_calls=p.tool_calls,
        depth=len(steps) + 1,
        width=1,
        writes={"action": p.tool_calls, "answer": 1},
        reads=reads,
        times={("action", numbers[0]): len(numbers) for numbers in steps},
    )


async def run_by_model(rt: Runtime, p: Params) -> None:
    """The model asks for tools, reads what they say, and answers when it asks for none; after so many tool calls it may ask for no more."""
    context, turn, made = [rt.system, rt.question], 1, 0
    while True:
        may_call = made < p.tool_calls
        reply = await rt.infer(
            context, writes=("answer", turn), role="agent", round=turn, tools=True, may_call=may_call
        )
        if not (may_call and reply.asks):
            return
        results = await together(
            rt.call_tool(writes=("tool_result", made + i), request=reply, role="agent", round=turn, ask=ask)
            for i, ask in enumerate(reply.asks)
        )
        context, turn, made = [*context, reply, *results], turn + 1, made + len(results)


def bound_by_model(p: Params, _: Drawn) -> Expected:
    """At most one turn a tool call, and the answer. How much is read is the model's and the tools' affair."""
    turns = p.tool_calls + 1
    return Expected(
        calls=turns,
        tool_calls=p.tool_calls,
        depth=turns,
        width=1,
        writes={"answer": turns},
        reads={("system",): turns, ("tools",): turns, ("question",): turns},
        at_most=True,
        input_known=False,
    )


BY_MODEL = Topology("tool-chain", "the model decides which tools to call", Params, run_by_model, bound_by_model)

TOPOLOGY = Topology(
    "tool-chain",
    "one agent acts, reads the tool's result, acts again, and answers",
    Params,
    run,
    expected,
    "Q --> [act --> tool] x steps --> A",
    BY_MODEL,
)
