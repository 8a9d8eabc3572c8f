"""Coding agent with context compaction (SWE-agent, arXiv 2405.15793; Claude Code): a tool chain whose context is summed up when it is full.

step i:   reads S, D, Q, the last summary, then all actions and results since; writes one action
compact:  before a step or the answer, when the context is above `context_limit` and holds actions: reads it and an instruction, writes
          a summary, with which the context starts afresh
answer:   reads the context
"""

from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Key, Runtime, Topology, at_least
from fanmark.agents.tool_chain import act, reads_of

COMPACT = (
    "The context is nearly full. Sum up the work so far for yourself, as all else will be dropped: the task, what was found out, which "
    "files and lines matter, what was changed, what failed and why, and what comes next. Leave out what is no longer needed."
)


@dataclass(frozen=True, slots=True)
class Params:
    """`context_limit` in tokens, the tools' schemas included."""

    tool_calls: int = 60
    context_limit: int = 60000

    def __post_init__(self) -> None:
        at_least(0, tool_calls=self.tool_calls, context_limit=self.context_limit)


async def run(rt: Runtime, p: Params) -> None:
    compact = rt.message(("compaction_instruction",), COMPACT)
    context = start = [rt.system, rt.question]
    compactions = 0
    for n in range(p.tool_calls + 1):
        if len(context) > len(start) and size(rt, *(m.key for m in context)) > p.context_limit:
            writes = ("compaction", compactions := compactions + 1)
            summary = await rt.infer([*context, compact], writes=writes, role="compactor", round=n + 1, tools=True)
            context = start = [rt.system, rt.question, rt.quote(summary)]
        if n < p.tool_calls:
            context = await act(rt, context, n + 1, range(n, n + 1), role="agent")
    await rt.infer(context, writes=("answer",), role="agent", round=p.tool_calls + 1, tools=True)


def size(drawn: Drawn, *context: Key) -> int:
    """Tokens of a context, the tools' schemas included."""
    return sum(drawn.tokens(key) for key in (("tools",), *context))


def segments(p: Params, drawn: Drawn) -> list[list[range]]:
    """The tool calls of each context, from one compaction to the next, one a step."""
    found: list[list[range]] = [[]]
    tokens = size(drawn, ("system",), ("question",))
    for n in range(p.tool_calls + 1):
        if found[-1] and tokens > p.context_limit:
            tokens = size(drawn, ("system",), ("question",), ("quoted", "compaction", len(found)))
            found.append([])
        if n < p.tool_calls:
            found[-1].append(range(n, n + 1))
            tokens += drawn.tokens(("action", n)) + drawn.tokens(("tool_result", n))
    return found


def expected(p: Params, drawn: Drawn) -> Expected:
    """A tool chain for each segment between compactions, which ends in a compaction or the answer; all its calls read S, D, Q and the
    summary before it. Exact for the sizes that the query's messages turned out to have."""
    parts = segments(p, drawn)
    calls, compactions = p.tool_calls + len(parts), len(parts) - 1
    reads: dict[Key, int] = {(kind,): calls for kind in ("system", "tools", "question")}
    reads["compaction_instruction",] = compactions
    for i, steps in enumerate(parts):
        reads |= reads_of(steps)
        if i > 0:
            reads["quoted", "compaction", i] = len(steps) + 1
    return Expected(
        calls=calls,
        tool_calls=p.tool_calls,
        depth=calls,
        width=1,
        writes={"action": p.tool_calls, "compaction": compactions, "answer": 1},
        reads=reads,
    )


TOPOLOGY = Topology(
    "coding-agent",
    "a tool chain that sums its context up when it is full",
    Params,
    run,
    expected,
    "Q --> [act --> tool] x n --> sum up --> [act --> tool] x n --> A",
)
