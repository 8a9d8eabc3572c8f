"""AIPerf's dag_jsonl: conversations that branch, a JSON object a line; export_dag.py writes it.

    {"session_id": "root", "turns": [{"messages": [{"role": "user", "content": "..."}], "max_tokens": 128, "forks": ["a", "b"]}]}

(github.com/ai-dynamo/aiperf, docs/benchmark-modes/dag.md and src/aiperf/dataset/loader/dag_jsonl_models.py.) A conversation that no other
names is a query, with all that it branches into. A turn reads all before it and its own `messages`, waits for the turn before and `delay`
(ms), and for what is spawned until it (`join_at`, else the next turn). A fork reads on where its parent's turn ended, a spawn begins
anew. With context_mode "message_array_with_responses" a turn reads its own messages alone. An orchestrator sends nothing: each of its
`rounds` waits for all of the one before, and `think_time_ms`. A turn without `max_tokens` is refused: how much it writes would be the
model's to say. Texts are known and token counts are not: they are taken from the texts' lengths. There are no times.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fanmark.loadgen.imports.trace import Trace, author_of, made
from fanmark.loadgen.questions import CHARS_PER_TOKEN
from fanmark.loadgen.recording import RecordedCall, Said, text_id

OWN_MESSAGES = "message_array_with_responses"


class Fork(msgspec.Struct):
    child: str
    background: bool = False


class Spawn(msgspec.Struct):
    children: list[str]
    join_at: int | None = None


class Turn(msgspec.Struct):
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    forks: list[str | Fork] = []
    spawns: list[str | Spawn] = []
    delay: float = 0.0


class Round(msgspec.Struct):
    spawns: list[str]
    think_time_ms: float | None = None


class Conversation(msgspec.Struct):
    session_id: str
    turns: list[Turn] = []
    orchestrator: bool = False
    spawns: list[str] = []
    rounds: int | list[Round] | None = None
    think_time_ms: float | None = None
    context_mode: str | None = None
    pre_session_spawns: list[str] = []


def read(trace: Trace) -> Iterator[tuple[float, list[RecordedCall]]]:
    """Query after query, in the order of the file, which is held as a whole."""
    decoder = msgspec.json.Decoder(Conversation)
    there: dict[str, Conversation] = {}
    for found in map(decoder.decode, trace.lines()):
        if there.setdefault(found.session_id, found) is not found:
            raise ValueError(f"{found.session_id} is there twice")
    named = {name for conversation in there.values() for name in _named(conversation)}
    for name, conversation in there.items():
        if name not in named:
            walk = _Walk(there)
            walk.conversation(conversation, [], 0.0, [])
            yield 0.0, walk.calls
    trace.note(
        f"{CHARS_PER_TOKEN:g} characters are taken for a token; there are no times: give a rate or a concurrency"
    )


def _named(conversation: Conversation) -> Iterator[str]:
    yield from (*conversation.spawns, *conversation.pre_session_spawns)
    for part in conversation.rounds if isinstance(conversation.rounds, list) else []:
        yield from part.spawns
    for turn in conversation.turns:
        yield from (child for fork in turn.forks for child in _children(fork))
        yield from (child for spawn in turn.spawns for child in _children(spawn))


def _children(branch: str | Fork | Spawn) -> list[str]:
    if isinstance(branch, str):
        return [branch]
    return [branch.child] if isinstance(branch, Fork) else branch.children


@dataclass
class _Walk:
    """One query. Calls take no time, so that what lies between them is what was written as delay."""

    there: Mapping[str, Conversation]
    calls: list[RecordedCall] = field(default_factory=list)
    under: list[str] = field(default_factory=list)  # the branch that is made, from the root on

    def conversation(
        self, conversation: Conversation, after: Iterable[int], at: float, history: Iterable[Said]
    ) -> list[int]:
        """Makes its calls and those of its branches; gives the last of all that it ends with."""
        for name in conversation.pre_session_spawns:
            self._branch(name, after, at, [])
        if conversation.orchestrator:
            return self._rounds(conversation, list(after), at)
        said, waits, ends, joins = list(history), list(after), list[int](), dict[int, list[int]]()
        for i, turn in enumerate(conversation.turns):
            waits += joins.pop(i, [])
            if conversation.context_mode == OWN_MESSAGES:
                said = []
            said += [*_tools(turn), *map(_said, turn.messages)]
            due_at = max([at, *(self.calls[n - 1].done_at or 0.0 for n in waits)]) + turn.delay / 1000
            number = self._call(conversation, turn, waits, due_at, said)
            said = [*said, Said("", turn.max_tokens or 0, "assistant", number)]
            waits = [number]
            for fork in turn.forks:
                ends += self._branch(_children(fork)[0], [number], due_at, said)
            for spawn in turn.spawns:
                joined = [n for name in _children(spawn) for n in self._branch(name, [number], due_at, [])]
                at_turn = spawn.join_at if isinstance(spawn, Spawn) and spawn.join_at is not None else i + 1
                joins.setdefault(at_turn, []).extend(joined)
        return [*waits, *ends, *(n for joined in joins.values() for n in joined)]

    def _rounds(self, conversation: Conversation, after: list[int], at: float) -> list[int]:
        rounds = conversation.rounds
        listed = rounds if isinstance(rounds, list) else [Round(conversation.spawns)] * (rounds or 1)
        for i, part in enumerate(listed):
            began_at = max([at, *(self.calls[n - 1].done_at or 0.0 for n in after)])
            before = listed[i - 1] if i else part  # the time to think lies behind a round, and before the first
            think_ms = before.think_time_ms if before.think_time_ms is not None else conversation.think_time_ms
            began_at += (think_ms or 0.0) / 1000
            after = [n for name in part.spawns for n in self._branch(name, after, began_at, [])]
        return after

    def _branch(self, name: str, after: Iterable[int], at: float, history: Iterable[Said]) -> list[int]:
        if name not in self.there:
            raise ValueError(f"branches into {name!r}, which is not there")
        if name in self.under:
            raise ValueError(f"{name} branches into itself: {' -> '.join([*self.under, name])}")
        self.under.append(name)
        ends = self.conversation(self.there[name], after, at, history)
        self.under.pop()
        return ends

    def _call(
        self, conversation: Conversation, turn: Turn, waits: Iterable[int], due_at: float, said: Iterable[Said]
    ) -> int:
        if turn.max_tokens is None:
            raise ValueError(f"{conversation.session_id}: a turn has no max_tokens: give it one, for its length")
        number, messages = len(self.calls) + 1, list(said)
        self.calls.append(
            made(
                number, set(waits), due_at, due_at,
                output_tokens=turn.max_tokens, messages=messages, role=conversation.session_id,
            )
        )  # fmt: skip
        return number


def _said(message: Mapping[str, Any]) -> Said:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    author = str(message.get("role", "user"))
    return Said(text_id(b"", f"{author} {text}"), max(1, round(len(text) / CHARS_PER_TOKEN)), author_of(author))


def _tools(turn: Turn) -> list[Said]:
    """The schemas, as a message."""
    if not turn.tools:
        return []
    text = msgspec.json.encode(turn.tools).decode()
    return [Said(text_id(b"", text), max(1, round(len(text) / CHARS_PER_TOKEN)), "system")]
