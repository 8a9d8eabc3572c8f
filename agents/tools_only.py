"""Tools only: tool calls one after another, and no call of a model. What the tools alone cost."""

from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Runtime, Topology, at_least


@dataclass(frozen=True, slots=True)
class Params:
    """`tool_calls` in all."""

    tool_calls: int = 12

    def __post_init__(self) -> None:
        at_least(0, tool_calls=self.tool_calls)


async def run(rt: Runtime, p: Params) -> None:
    before = rt.question
    for n in range(p.tool_calls):
        before = await rt.call_tool(writes=("tool_result", n), request=before, role="agent", round=n + 1)


def expected(p: Params, _: Drawn) -> Expected:
    """No call, t tool calls."""
    return Expected(calls=0, tool_calls=p.tool_calls, depth=0, width=0, writes={}, reads={})


TOPOLOGY = Topology(
    "tools-only", "tool calls in turn, and no call of a model", Params, run, expected, "tool --> tool --> tool"
)
