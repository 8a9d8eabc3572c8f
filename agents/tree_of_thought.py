"""Tree of thought, breadth first (Yao et al. 2023, arXiv 2305.10601): grow every state by k thoughts, vote, keep the best b, d times.

thought at level l:  reads S, Q, the l - 1 thoughts on its path
vote at level l:     reads S, Q, the l thoughts of the candidate's path, F
All thoughts of a level at once, then all its votes at once; the next level waits for all of them. Since the counts must not hang on what
a model finds, the first b candidates are kept. No final call.
"""

from collections import Counter
from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Key, Message, Runtime, Topology, at_least, together

VOTE = (
    "The messages above are one line of thought towards the answer, step by step. Judge whether it can lead to a correct and complete "
    "answer. Reply with one word, sure, likely or impossible, and the reason in a few more."
)


@dataclass(frozen=True, slots=True)
class Params:
    """`samples` thoughts for every state, `votes` on each of them, `beam` states kept a level."""

    depth: int = 3
    samples: int = 5
    beam: int = 5
    votes: int = 3

    def __post_init__(self) -> None:
        at_least(1, depth=self.depth, samples=self.samples, beam=self.beam)
        at_least(0, votes=self.votes)


async def run(rt: Runtime, p: Params) -> None:
    vote_on = rt.message(("instruction",), VOTE)
    beam: list[list[Message]] = [[]]
    seen: list[Message] = []

    async def think(level: int, i: int) -> list[Message]:
        path = beam[i // p.samples]
        prompt = [rt.system, rt.question, *path]
        thought = await rt.infer(prompt, writes=("answer", level, i), role="thinker", round=level, after=seen)
        return [*path, rt.quote(thought)]

    async def vote(level: int, i: int, v: int, path: list[Message]) -> Message:
        prompt = [rt.system, rt.question, *path, vote_on]
        return await rt.infer(prompt, writes=("vote", level, i, v), role="voter", round=level)

    for level in range(1, p.depth + 1):
        paths = await together(think(level, i) for i in range(len(beam) * p.samples))
        votes = await together(vote(level, i, v, path) for i, path in enumerate(paths) for v in range(p.votes))
        beam, seen = paths[: p.beam], votes or [path[-1] for path in paths]


def expected(p: Params, _: Drawn) -> Expected:
    """n_1 = 1, n_l = min(b, k n_{l-1}) states: sum of n_l k (1 + v) calls, depth 2 d (d without votes), width max of n_l k max(1, v).
    A candidate is read by its v votes and, if it is kept, by the 1 + v calls of each candidate that grows out of it."""
    thoughts, width = 0, 0
    reads: Counter[Key] = Counter()
    beam: list[list[Key]] = [[]]
    for level in range(1, p.depth + 1):
        paths: list[list[Key]] = []
        for i in range(len(beam) * p.samples):
            path, own = beam[i // p.samples], ("quoted", "answer", level, i)
            reads.update({key: 1 + p.votes for key in path} | {own: p.votes})
            paths.append([*path, own])
        thoughts += len(paths)
        width = max(width, len(paths) * max(1, p.votes))
        beam = paths[: p.beam]
    votes = thoughts * p.votes
    reads.update({("system",): thoughts + votes, ("question",): thoughts + votes, ("instruction",): votes})
    return Expected(
        calls=thoughts + votes,
        depth=p.depth * (2 if p.votes else 1),
        width=width,
        writes={"answer": thoughts, "vote": votes},
        reads=reads,
    )


TOPOLOGY = Topology(
    "tree-of-thought",
    "grow thoughts, vote on each, keep the best, level by level",
    Params,
    run,
    expected,
    "Q ==> thoughts ==> votes --> the best ==> thoughts ==> votes",
)
