"""Single pass: one call answers the question. The baseline of every comparison."""

from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Runtime, Topology


@dataclass(frozen=True, slots=True)
class Params:
    """None."""


async def run(rt: Runtime, p: Params) -> None:
    await rt.infer([rt.system, rt.question], writes=("answer",), role="agent")


def expected(p: Params, _: Drawn) -> Expected:
    """1 call: reads S + Q, writes O."""
    return Expected(calls=1, depth=1, width=1, writes={"answer": 1}, reads={("system",): 1, ("question",): 1})


TOPOLOGY = Topology("single", "one call answers", Params, run, expected, "Q --> A")
