"""Extended reasoning: one call thinks before it answers (OpenAI o1, DeepSeek-R1; arXiv 2501.12948). Deep work, nothing in parallel.

call:  reads S, Q; writes `effort` times an answer, all but the last share of it as reasoning tokens
"""

from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Runtime, Topology, at_least


@dataclass(frozen=True, slots=True)
class Params:
    """`effort`: output in answers' lengths; 1 is a single pass."""

    effort: int = 8

    def __post_init__(self) -> None:
        at_least(1, effort=self.effort)


async def run(rt: Runtime, p: Params) -> None:
    await rt.infer([rt.system, rt.question], writes=("answer",), role="agent", times=p.effort, reasoning=True)


def expected(p: Params, _: Drawn) -> Expected:
    """1 call: reads S + Q, writes effort x O."""
    return Expected(calls=1, depth=1, width=1, writes={"answer": p.effort}, reads={("system",): 1, ("question",): 1})


TOPOLOGY = Topology(
    "reasoning", "one call thinks long and answers", Params, run, expected, "Q --> think, think, think, A"
)
