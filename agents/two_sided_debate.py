"""Two-sided debate (MAD, Liang et al. 2023, arXiv 2305.19118): two sides argue in turn, a judge ends it as soon as it is satisfied.

round r:  affirmative, negative, judge, one after another; each reads S, Q and all that was said so far: its own words as its own,
          the others' as messages to it
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import (
    Drawn,
    Expected,
    Key,
    Message,
    Runtime,
    Topology,
    at_least,
    is_probability,
    stopped,
    system_key,
    systems,
)

SPEAKERS = {"affirmative": "answer", "negative": "answer", "judge": "judge_answer"}
"""Who speaks in a round, in this order, and the kind of what they say."""


@dataclass(frozen=True, slots=True)
class Params:
    """At most `rounds`. After each but the last, the judge ends the debate with `stop_probability`, drawn from the query's seed.
    `system`: one system message for all three, or one each."""

    rounds: int = 3
    stop_probability: float = 0.0
    system: Literal["shared", "own"] = "shared"

    def __post_init__(self) -> None:
        at_least(1, rounds=self.rounds)
        is_probability(stop_probability=self.stop_probability)


async def run(rt: Runtime, p: Params) -> None:
    own = dict(zip(SPEAKERS, systems(rt, SPEAKERS, p.system), strict=True))
    said: list[tuple[str, Message]] = []
    for r in range(1, p.rounds + 1):
        for speaker, kind in SPEAKERS.items():
            heard = [words if by == speaker else rt.quote(words) for by, words in said]
            prompt = [own[speaker], rt.question, *heard]
            said.append((speaker, await rt.infer(prompt, writes=(kind, speaker, r), role=speaker, round=r)))
        if stopped(rt, r, p.rounds, p.stop_probability):
            return


def expected(p: Params, drawn: Drawn) -> Expected:
    """3 calls a round, one after another, R rounds until the judge is satisfied. What is said as number j of 3R is read 3R - j times,
    R - r of them by its own speaker."""
    last = next(r for r in range(1, p.rounds + 1) if stopped(drawn, r, p.rounds, p.stop_probability))
    calls = 3 * last
    reads: Counter[Key] = Counter({("question",): calls})
    for speaker in SPEAKERS:
        reads[system_key(speaker, p.system)] += last
    for r in range(1, last + 1):
        for place, (speaker, kind) in enumerate(SPEAKERS.items(), start=1):
            own, all_told = last - r, calls - 3 * (r - 1) - place
            reads.update({(kind, speaker, r): own, ("quoted", kind, speaker, r): all_told - own})
    writes = {"answer": 2 * last, "judge_answer": last}
    return Expected(calls=calls, depth=calls, width=1, writes=writes, reads=reads)


TOPOLOGY = Topology(
    "two-sided-debate",
    "two sides argue in turn until the judge is satisfied",
    Params,
    run,
    expected,
    "Q --> [for --> against --> J] x rounds",
)
