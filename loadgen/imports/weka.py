"""Weka (kv-cache-tester): agentic coding sessions with times, lengths and the hashes of each prompt's blocks, sub-agents nested.

A trace is a JSON object, one a file or one a line (github.com/callanjfox/kv-cache-tester, docs/trace_replay_tester.md; with nesting as in
AIPerf's docs/tutorials/weka-trace.md):

    {"id": "t1", "block_size": 64, "hash_id_scope": "local", "tool_tokens": 11899, "system_tokens": 2926, "requests": [
      {"t": 0.0, "type": "s", "in": 25259, "out": 86, "hash_ids": [1, 2, 3], "api_time": 2.1, "think_time": 0.0},
      {"t": 9.5, "type": "subagent", "agent_id": "a1", "subagent_type": "Explore", "requests": [ ... ]}]}

A trace is a query. A request goes on where the one ended whose prompt's whole blocks its own begin with, the longest of them: it reads
that prompt, that reply, and what is new. One that shares less, as after a compaction or in another agent, shares the messages that the
common blocks cover whole. Who waited for whom is told by times (trace.Agents). Without `api_time` a request took until the next one.
Sub-agents' times count from their marker, unless their first is not before it. Hashes mean the same in other traces only with
`hash_id_scope` "global".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import msgspec

from fanmark.agents.runtime import Author
from fanmark.loadgen.imports.trace import Agents, Trace, made
from fanmark.loadgen.recording import RecordedCall, Said, text_id


class Request(msgspec.Struct, rename={"reads": "in", "writes": "out"}):
    """A request, or the marker of a sub-agent with requests of its own."""

    t: float
    type: str
    reads: int = 0
    writes: int = 0
    hash_ids: list[int] = []
    api_time: float | None = None
    agent_id: str = ""
    subagent_type: str = "subagent"
    requests: list["Request"] = []


class Session(msgspec.Struct):
    """A trace."""

    id: str
    requests: list[Request]
    block_size: int = 64
    hash_id_scope: str = "local"
    tool_tokens: int = 0
    system_tokens: int = 0


@dataclass
class Sent:
    """A request of a session, by whom, from when to when; what it read, and whose it went on from."""

    request: Request
    role: str
    start_at: float
    end_at: float
    messages: list[Said] = field(default_factory=list)
    agent: int = 0


def read(trace: Trace) -> Iterator[tuple[float, list[RecordedCall]]]:
    """Session after session; all begin at 0."""
    decoder = msgspec.json.Decoder(Session)
    for line in trace.lines():
        session = decoder.decode(line)
        calls = calls_of(session)
        if any(request.api_time is None and request.reads for request in session.requests):
            trace.note("requests without api_time: each took until the next one, and nobody thought in between")
        if calls:
            yield calls[0].due_at, calls
    trace.note("sessions have no start times: they all begin at 0, give a rate or a concurrency")


def calls_of(session: Session) -> list[RecordedCall]:
    """A session's requests in the order of their starts."""
    sent = sorted(_flat(session.requests, "agent", 0.0), key=lambda each: each.start_at)
    last: dict[int, int] = {}  # of those that begin with these blocks, the last request
    agents, calls = Agents(), list[RecordedCall]()
    for n, each in enumerate(sent):
        before = list(accumulate(each.request.hash_ids, lambda prefix, block: hash((prefix, block)), initial=0))[1:]
        depth = next((d for d in range(len(before), 0, -1) if before[d - 1] in last), 0)
        parent = sent[last[before[depth - 1]]] if depth else None
        goes_on = parent is not None and depth >= parent.request.reads // session.block_size and depth > 0
        own = last[before[depth - 1]] + 1 if parent is not None and goes_on and parent.end_at <= each.start_at else None
        each.messages = _messages(session, each, parent, depth, goes_on=goes_on, own=own)
        each.agent = parent.agent if own is not None and parent is not None else n
        calls.append(
            made(
                n + 1, agents.after(each.start_at, own), each.start_at, each.end_at,
                output_tokens=max(1, each.request.writes), messages=each.messages, role=each.role,
            )
        )  # fmt: skip
        agents.made(each.start_at, each.end_at, n + 1, each.agent)
        last |= dict.fromkeys(before, n)
    return calls


def _flat(requests: Sequence[Request], role: str, from_at: float) -> Iterator[Sent]:
    for i, request in enumerate(requests):
        at = from_at + request.t
        if request.type == "subagent":
            nested = request.requests
            relative = bool(nested) and nested[0].t < request.t
            yield from _flat(nested, request.subagent_type, at if relative else from_at)
        elif request.reads > 0:
            following = next((r.t for r in requests[i + 1 :] if r.t >= request.t), request.t)
            yield Sent(
                request, role, at, at + request.api_time if request.api_time is not None else from_at + following
            )


def _messages(
    session: Session, each: Sent, parent: Sent | None, depth: int, *, goes_on: bool, own: int | None
) -> list[Said]:
    """What a request read that shares `depth` blocks with `parent`."""
    reads, found = each.request.reads, list[Said]()
    if parent is not None and goes_on:
        found = list(parent.messages)
        while sum(said.tokens for said in found) > reads:  # by less than a block
            found.pop()
        written = max(1, parent.request.writes)
        if own is not None and parent.request.reads + written <= reads:
            found.append(Said("", written, "assistant", own))
    elif parent is not None:
        covered = 0
        for said in parent.messages:
            covered += said.tokens
            if covered > depth * session.block_size:
                break
            found.append(said)
    head = session.tool_tokens + session.system_tokens
    if not found and 0 < head <= reads:
        found.append(_made_up(session, each, 0, head, "system"))
    start = sum(said.tokens for said in found)
    return found + ([_made_up(session, each, start, reads, "user")] if start < reads else [])


def _made_up(session: Session, each: Sent, start: int, end: int, author: Author) -> Said:
    """A text that is equal where the blocks are that it lies in, and all before them."""
    scope = "" if session.hash_id_scope == "global" else session.id
    blocks = each.request.hash_ids[: -(-end // session.block_size)]
    return Said(text_id(b"", f"{scope} {start} {blocks}"), end - start, author)
