"""Self-consistency (Wang et al. 2022, arXiv 2203.11171): n samples of the same prompt; the client counts their votes, with no call.

sample i:  reads S, Q
`one_request`: one call with n choices, which reads its prompt once.
"""

from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import Drawn, Expected, Key, Runtime, Topology, at_least, enough, together


@dataclass(frozen=True, slots=True)
class Params:
    """`one_request`: all samples by one call (`n` in its body). `wait_for`: with so many samples the others are given up."""

    samples: int = 5
    one_request: bool = False
    wait_for: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, wait_for=enough(self.wait_for, self.samples))
        if self.one_request and self.wait_for != "all":
            raise ValueError(f"wait_for = {self.wait_for}: not with one_request, whose samples come as one reply")


async def run(rt: Runtime, p: Params) -> None:
    prompt = [rt.system, rt.question]
    if p.one_request:
        await rt.infer(prompt, writes=("answer",), role="sampler", samples=p.samples)
    else:
        await together((rt.infer(prompt, writes=("answer", i), role="sampler") for i in range(p.samples)), p.wait_for)


def expected(p: Params, _: Drawn) -> Expected:
    """n calls at once, each S + Q in and O out; or 1 call, S + Q in and n O out."""
    n = 1 if p.one_request else p.samples
    reads: dict[Key, int] = {("system",): n, ("question",): n}
    late = enough(p.wait_for, n) < n
    return Expected(calls=n, depth=1, width=n, writes={"answer": p.samples}, reads=reads, at_most=late)


TOPOLOGY = Topology(
    "self-consistency",
    "n samples of one prompt; the client counts votes",
    Params,
    run,
    expected,
    "Q ==> A | A | A | A | A",
)
