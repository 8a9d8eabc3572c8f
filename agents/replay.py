"""Replay: re-enacts a recorded query, step for step: what an agent system did once, at another time, load or server.

each step:  waits for the steps it waited for, then for `pause_s` (the agent's own time), then is made
call:       reads made-up texts of the recorded lengths, equal where the recorded ones were, and the replay's own replies and results
            where it read replies and results; writes as many tokens as were written
tool call:  takes as long, and returns as many tokens
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fanmark.agents.runtime import Author, Drawn, Expected, Key, Message, Runtime, ToolLike, Topology, together
from fanmark.agents.steps import Read, Step


@dataclass(frozen=True, slots=True)
class Params:
    """`path` is a recorded folder; of its arms only `arm`, where that is given. Query i re-enacts recorded query i modulo their number, in
    the order in which they started."""

    path: str = ""
    arm: str = ""


@dataclass(frozen=True, slots=True)
class Enacted(Params):
    """What one query re-enacts: its steps, each after those that it waited for."""

    steps: Sequence[Step] = ()


async def run(rt: Runtime, p: Params) -> None:
    steps = p.steps if isinstance(p, Enacted) else ()
    ended = {step.writes: asyncio.Event() for step in steps}
    said: dict[Key, Message] = {}
    await together(enact(rt, step, ended, said) for step in steps)


async def enact(rt: Runtime, step: Step, ended: dict[Key, asyncio.Event], said: dict[Key, Message]) -> None:
    """One step: what it writes goes into `said`."""
    for key in step.after:
        await ended[key].wait()
    if step.pause_s > 0:
        await rt.pause(step.pause_s)
    after, role = [said[key] for key in step.after], step.role
    if step.is_call:
        prompt = [message_of(rt, read, said, first=i == 0) for i, read in enumerate(step.reads)]
        reply = await rt.infer(
            prompt,
            writes=step.writes,
            role=role,
            round=step.round,
            times=step.sample_tokens,
            samples=step.samples,
            after=after,
        )
    else:
        request, like = after[0] if after else rt.question, ToolLike(step.seconds, step.tokens)
        reply = await rt.call_tool(
            writes=step.writes, request=request, role=role, round=step.round, after=after, like=like
        )
    said[step.writes] = reply
    ended[step.writes].set()


def message_of(rt: Runtime, read: Read, said: dict[Key, Message], *, first: bool) -> Message:
    """The message as it is sent now. Only the first may be the system's, as chat templates want it."""
    if read.key in said:
        return said[read.key] if read.as_read == read.key else rt.quote(said[read.key])
    author: Author = "user" if read.author == "tool" or (read.author == "system" and not first) else read.author
    return Message(read.key, author, "", read.tokens, begins=read.begins)


def expected(p: Params, _: Drawn) -> Expected:
    """What was recorded, counted."""
    steps = p.steps if isinstance(p, Enacted) else ()
    depths: dict[Key, int] = {}
    for step in steps:
        depths[step.writes] = step.is_call + max((depths[key] for key in step.after), default=0)
    calls = [step for step in steps if step.is_call]
    return Expected(
        calls=len(calls),
        tool_calls=len(steps) - len(calls),
        depth=max(depths.values(), default=0),
        width=max(Counter(depths[step.writes] for step in calls).values(), default=0),
        writes={"reply": sum(step.sample_tokens * step.samples for step in calls)},
        reads=Counter(read.as_read for step in calls for read in step.reads),
        times={read.key: read.tokens for step in calls for read in step.reads},
    )


TOPOLOGY = Topology("replay", "re-enacts queries that were recorded", Params, run, expected, "Q --> as recorded")
