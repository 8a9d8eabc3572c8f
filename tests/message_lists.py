"""Every topology once more, as plain lists of messages: no coroutines, no keys, no closed forms. What the tests count by.

S, Q, D, F, O and the other letters are lengths, as in the papers' formulas; a message is its length and the depth of the call behind it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Counts = tuple[int, int, int, int, int, int]
Chance = Callable[[int], float]
"""A number in [0, 1) for the stop after a round."""


class Msg(NamedTuple):
    tokens: int
    depth: int = 0


@dataclass
class Lists:
    """The calls and tool calls of one query. `w` are lengths by kind, `sizes` those of tool results where they have their own."""

    w: Mapping[str, int]
    chance: Chance
    sizes: Sequence[int] = ()
    calls: list[tuple[int, int, int]] = field(default_factory=list)  # in, out, depth
    tool_calls: int = 0

    def __getitem__(self, kind: str) -> Msg:
        return Msg(self.w[kind])

    def call(self, prompt: Iterable[Msg], kind: str, times: int = 1, after: Iterable[Msg] = ()) -> Msg:
        read = list(prompt)
        depth = 1 + max(message.depth for message in [*read, *after, Msg(0)])
        self.calls.append((sum(message.tokens for message in read), self.w[kind] * times, depth))
        return Msg(self.w[kind] * times, depth)

    def tool(self, depth: int) -> Msg:
        self.tool_calls += 1
        n = self.tool_calls - 1
        return Msg(self.sizes[n % len(self.sizes)] if self.sizes else self.w["tool_result"], depth)

    def ends(self, p: Any, r: int, first: int = 1) -> bool:
        return r == p.rounds or (r >= first and self.chance(r) < p.stop_probability)

    def counts(self) -> Counts:
        at = Counter(depth for _, _, depth in self.calls)
        read, written = sum(call[0] for call in self.calls), sum(call[1] for call in self.calls)
        return len(self.calls), self.tool_calls, read, written, max(at, default=0), max(at.values(), default=0)


def single(q: Lists, p: Any) -> None:
    q.call([q["system"], q["question"]], "answer")


def reasoning(q: Lists, p: Any) -> None:
    q.call([q["system"], q["question"]], "answer", p.effort)


def self_consistency(q: Lists, p: Any) -> None:
    prompt = [q["system"], q["question"]]
    if p.one_request:
        q.call(prompt, "answer", p.samples)
    else:
        for _ in range(p.samples):
            q.call(prompt, "answer")


def audience(p: Any, i: int, r: int) -> list[int]:
    """Whom agent i hears after round r, itself included, in order."""
    if p.groups > 1 and r % p.stage_rounds == 0:
        return sorted(set(range(min(p.groups, p.agents))) | {i})
    near = {i}
    for step in range(1, p.agents):  # outwards on the ring of all, the lower number first
        for j in sorted({(i - step) % p.agents, (i + step) % p.agents}):
            same = j % p.groups == i % p.groups
            if same and (p.neighbours == "all" or len(near) <= p.neighbours):
                near.add(j)
    return sorted(near)


def debate(q: Lists, p: Any) -> None:
    heads = [q["role"], q["system"], q["question"]]
    tails: list[Msg] = []
    if p.role_position == "tail":
        heads, tails = heads[1:], heads[:1]
    contexts: list[list[Msg]] = [[] for _ in range(p.agents)]
    everything: list[Msg] = []
    for r in range(1, p.rounds + 1):
        answers = [q.call([*heads, *context, *tails], "answer") for context in contexts]
        everything += answers
        if q.ends(p, r, p.stop_from):
            break
        for i in range(p.agents):
            heard = audience(p, i, r)
            if p.transcript == "last":
                contexts[i] = [q["instruction"], *(answers[j] for j in heard)]
            else:
                contexts[i] = [*contexts[i], answers[i], q["instruction"], *(answers[j] for j in heard if j != i)]
    if p.judge != "none":
        read = everything if p.judge == "all" else answers
        q.call([q["system"], q["question"], *read, q["judge_instruction"]], "judge_answer")


def two_sided_debate(q: Lists, p: Any) -> None:
    transcript = [q["system"], q["question"]]
    for r in range(1, p.rounds + 1):
        for kind in ("answer", "answer", "judge_answer"):
            transcript.append(q.call(transcript, kind))
        if q.ends(p, r):
            break


def round_robin(q: Lists, p: Any) -> None:
    transcript = [q["system"], q["question"]]
    for _ in range(p.rounds * p.agents):
        transcript.append(q.call(transcript, "answer"))


def reflection(q: Lists, p: Any) -> None:
    start = [q["system"], q["question"]]
    draft = q.call(start, "answer")
    for r in range(1, p.rounds + 1):
        critique = q.call([*start, draft], "critique")
        draft = q.call([*start, draft, critique], "answer")
        if q.ends(p, r):
            break


def planner(q: Lists, p: Any) -> None:
    context = [q["system"], q["question"]]
    context.append(q.call(context, "plan"))
    for _ in range(p.steps):
        context.append(q.call([*context, q["instruction"]], "answer"))
    q.call(context, "answer")


def chain(q: Lists, context: list[Msg], tool_calls: int, at_once: int, after: Sequence[Msg] = ()) -> list[Msg]:
    """A tool chain up to its answer: the context in which that is written."""
    while tool_calls > 0:
        now = min(at_once, tool_calls)
        action = q.call(context, "action", now, after)
        context = [*context, action, *(q.tool(action.depth) for _ in range(now))]
        tool_calls -= now
    return context


def tool_chain(q: Lists, p: Any) -> None:
    start = [q["system"], q["tools"], q["question"]]
    q.call(chain(q, start, p.tool_calls, p.tools_per_step), "answer")


def orchestrator(q: Lists, p: Any) -> None:
    lead, reports = [q["system"], q["question"]], list[Msg]()
    for _ in range(p.waves):
        plan = q.call(lead, "plan")
        wave = []
        for _ in range(p.workers):
            start = [q["system"], q["tools"], q["instruction"]]
            context = chain(q, start, p.tool_calls, p.tools_per_step, [plan])
            wave.append(q.call(context, "answer", after=[plan]))
        lead, reports = [*lead, plan, *wave], [*reports, *wave]
    final = q.call(lead, "judge_answer")
    if p.citations:
        q.call([q["system"], q["question"], *reports, final], "judge_answer")


def tree_of_thought(q: Lists, p: Any) -> None:
    start = [q["system"], q["question"]]
    states: list[list[Msg]] = [[]]
    waited: list[Msg] = []
    for _ in range(p.depth):
        grown = [[*path, q.call([*start, *path], "answer", after=waited)] for path in states for _ in range(p.samples)]
        votes = [q.call([*start, *path, q["instruction"]], "vote") for path in grown for _ in range(p.votes)]
        waited = votes if p.votes else [path[-1] for path in grown]
        states = grown[: p.beam]


def mixture_of_agents(q: Lists, p: Any) -> None:
    prompt = [q["system"], q["question"]]
    for _ in range(p.layers - 1):
        outputs = [q.call(prompt, "answer") for _ in range(p.agents)]
        prompt = [q["system"], q["question"], q["instruction"], *outputs]
    q.call(prompt, "answer")


def map_reduce(q: Lists, p: Any) -> None:
    left = [q.call([q["system"], q["chunk"]], "answer") for _ in range(p.chunks)]
    while len(left) > 1:
        taken = [left[at : at + p.fan_in] for at in range(0, len(left), p.fan_in)]
        left = [q.call([q["system"], q["question"], *some], "answer") for some in taken]


def coding_agent(q: Lists, p: Any) -> None:
    fixed = [q["system"], q["tools"], q["question"]]
    summary: list[Msg] = []
    work: list[Msg] = []
    for n in range(p.tool_calls + 1):
        if work and sum(message.tokens for message in [*fixed, *summary, *work]) > p.context_limit:
            summary = [q.call([*fixed, *summary, *work, q["compaction_instruction"]], "compaction")]
            work = []
        if n == p.tool_calls:
            q.call([*fixed, *summary, *work], "answer")
        else:
            work = chain(q, [*fixed, *summary, *work], 1, 1)[len(fixed) + len(summary) :]


def panel(q: Lists, p: Any) -> None:
    plan = q.call([q["system"], q["question"], q["instruction"]], "plan")
    opening = [q["system"], q["question"], plan]
    heard: list[Msg] = []
    for r in range(p.rounds):
        prompt = [*opening, *heard, q["role"], *([q["instruction"]] if r else [])]
        turns = [q.call(prompt, "turn") for _ in range(p.specialists + p.leader_in_rounds)]
        heard = [*heard, *turns] if p.transcript == "full" else turns
    q.call([*opening, *heard, q["instruction"]], "judge_answer")


def tools_only(q: Lists, p: Any) -> None:
    for _ in range(p.tool_calls):
        q.tool(0)


def count(name: str, p: Any, lists: Lists) -> Counts:
    """(calls, tool calls, input tokens, output tokens, depth, width) of a query of topology `name`."""
    globals()[name.replace("-", "_")](lists, p)
    return lists.counts()
