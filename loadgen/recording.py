"""A recording: what an agent system did, in the form in which it can be re-enacted (agents/replay.py). The tap writes it, a run
of a scenario with `record = true`, and the importers (imports/).

It is a folder with the `queries.jsonl` and `calls.jsonl` of a run (records.py). A line of a call also says what the call read, in order:

    "messages": [{"id": "9f2ac04d", "tokens": 300, "author": "system"}, {"id": "", "tokens": 120, "author": "assistant", "source": 1}]

Rules of the form:
1. `id` names a text: equal ids are equal texts, in all queries of the folder. It is a salted hash (text_id), which tells nothing of the
   text. All that stands before the messages in a prompt, as tools' schemas do, is a message too.
2. `tokens` is the message's length in the prompt, with its share of a chat template. They add up to the call's `input_tokens`.
3. `source` is the number of the call or tool call of the same query whose reply or result the message is, null for all others.
4. The lines of a query's calls stand together, and in both files queries come in the same order, as the Journal writes them.
5. `due_at` is when the agent wanted the call, `done_at` when it had all of the reply; `after` are those that it waited for.
6. Only what succeeded is re-enacted: not the queries that failed or were warm-up, nor calls with an `error`, nor attempts that were sent
   again (`retry_at`). What waited for such a call waits for what that one had waited for.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents.replay import TOPOLOGY, Enacted, Params
from fanmark.agents.runtime import Author, Key, Message, Topology
from fanmark.agents.steps import Read, Step
from fanmark.loadgen.demand import unquoted
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.prompts import Part
from fanmark.loadgen.records import Call, Journal, Query
from fanmark.loadgen.scenario import Arm

RECORDED = "recorded"  # the kind of a text that is made up
INSTANT_S = 0.001  # what an agent takes less than is a client's own time, not a pause


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message of a recorded prompt. `begins`: ids of texts that it begins with, each with the tokens by which it is longer than the one
    before, near enough."""

    id: str
    tokens: int
    author: Author = "user"
    source: int | None = None
    begins: tuple[tuple[str, int], ...] = ()


class RecordedCall(Call, kw_only=True):
    """A line of calls.jsonl that says what the call read; None of a tool call, and where that was not kept."""

    messages: list[Said] | None = None


def text_id(salt: bytes, text: str | bytes) -> str:
    """The id of a text: 64 bits of a hash that nobody can repeat who has not the salt, which is kept nowhere."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return blake2b(data, digest_size=8, key=salt).hexdigest()


def said_of(
    prompt: Sequence[tuple[Key, Author, Part]],
    messages: Iterable[Message],
    tools: Part | None,
    written: Mapping[Key, int],
    salt: str,
) -> list[Said]:
    """A prompt of a run as it is recorded. `messages` are what it was made of; `tools`, the schemas, lead a chat prompt; `written` tells
    how long replies are."""
    of = {message.key: message for message in messages}
    found: list[Said] = []
    if tools is not None and not any(key == ("tools",) for key, _, _ in prompt):
        found.append(Said(text_id(salt.encode(), "tools"), tools.size or 0, "system"))
    for key, author, part in prompt:
        message = of.get(key)
        size = part.size
        if size is None and message is not None:
            size = written.get(unquoted(key), message.tokens)
        source = None if message is None else message.source
        found.append(Said(text_id(salt.encode(), part.seen) if source is None else "", size or 0, author, source))
    return found


class Recorder:
    """Writes a recording, query by query; close it at the end. Raises ScenarioError where the folder holds one or cannot be written."""

    def __init__(self, folder: Path, arm: str) -> None:
        if (folder / "queries.jsonl").exists():
            raise ScenarioError(f"--out {folder}: holds another run: give a new folder, or remove it first")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(folder)
        except OSError as e:
            raise ScenarioError(f"--out {folder}: cannot be written ({e.strerror}): give another folder") from None
        self._folder, self._arm = folder, arm
        self.queries = self.calls = 0

    def add(self, calls: Sequence[RecordedCall], due_at: float) -> None:
        """One query with all its calls and tool calls, numbered from 1; the query's own numbers are put into them."""
        for call in calls:
            call.query, call.arm = self.queries, self._arm
        done_at = max((call.done_at or call.due_at for call in calls), default=due_at)
        self._journal.write(
            Query(
                query=self.queries, arm=self._arm, warmup=False, due_at=due_at, started_at=due_at, done_at=done_at,
                outcome="completed", resources={}, expected={}, mismatches=[], seed="", calls=list(calls),
            )
        )  # fmt: skip
        self.queries, self.calls = self.queries + 1, self.calls + len(calls)
        if self.queries % 1000 == 0:
            self._journal.flush()

    def discard(self) -> None:
        """Takes back what was written."""
        self._journal.close()
        for name in ("queries.jsonl", "calls.jsonl"):
            (self._folder / name).unlink()

    def close(self) -> None:
        """Writes what is left. Raises LostError."""
        try:
            self._journal.flush()
        finally:
            self._journal.close()


class _Query(msgspec.Struct):
    query: int
    arm: str
    warmup: bool
    due_at: float
    started_at: float
    outcome: str


class _Place(msgspec.Struct):
    query: int
    arm: str
    kind: str
    error: str | None = None
    messages: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def told(self) -> bool:
        """Whether it says what it read, if it is a call."""
        return self.kind != "call" or self.error is not None or bytes(self.messages) != b"null"


class Recording:
    """A recorded folder, of which the places of its queries are remembered (24 bytes each) and all else is read when it is asked for.
    Raises ScenarioError for a folder that cannot be re-enacted."""

    def __init__(self, folder: Path, arm: str = "") -> None:
        self.folder = folder
        self.left_out = 0  # queries that failed, or of which nothing succeeded
        self.calls_tools = False
        self._starts, self._from, self._bytes = array("d"), array("q"), array("q")
        arms: set[str] = set()
        try:
            self._index(arm, arms)
        except (OSError, msgspec.MsgspecError) as e:
            reason = e.strerror if isinstance(e, OSError) else str(e)
            raise self._error(f"holds no recording ({reason}): it must have queries.jsonl and calls.jsonl") from None
        if not self._starts:
            known = (
                f"there are {', '.join(sorted(arms))}" if arm and arms else "give a folder in which a query succeeded"
            )
            raise self._error(f"no query{f' of arm {arm!r}' if arm else ''} can be re-enacted: {known}")
        first_at = min(self._starts)
        order: Iterable[int] = sorted(range(len(self._starts)), key=self._starts.__getitem__)
        places = array("q", order)
        self._starts = array("d", (self._starts[i] - first_at for i in places))
        self._from, self._bytes = (array("q", (each[i] for i in places)) for each in (self._from, self._bytes))

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        return f"<Recording {self.folder}: {len(self)} queries>"

    def starts_s(self) -> Iterator[float]:
        """When the queries started, since the first one did."""
        return iter(self._starts)

    @property
    def lap_s(self) -> float:
        """How long a lap takes: until the first query comes again as one more would have come, on average."""
        return self._starts[-1] * len(self) / max(1, len(self) - 1)

    def steps(self, query: int) -> tuple[Step, ...]:
        """What query number `query`, modulo their number, did. Each lap has texts of its own, as other users' would be: what is found in
        a cache is what the recorded queries shared, and not that they come again."""
        lap, i = divmod(query, len(self))
        with (self.folder / "calls.jsonl").open("rb") as file:
            file.seek(self._from[i])
            lines = file.read(self._bytes[i]).splitlines()
        return steps_of([_decoder.decode(line) for line in lines], lap)

    def _index(self, arm: str, arms: set[str]) -> None:
        """Notes where the calls stand of each query that can be re-enacted."""
        groups = groupby(_places(self.folder / "calls.jsonl"), key=lambda found: (found[0].arm, found[0].query))
        group = next(groups, None)
        decoder = msgspec.json.Decoder(_Query)
        with (self.folder / "queries.jsonl").open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                query = decoder.decode(line)
                arms.add(query.arm)
                mine = []
                if group is not None and group[0] == (query.arm, query.query):
                    mine = list(group[1])
                    group = next(groups, None)
                if query.warmup or (arm and query.arm != arm):
                    continue
                if query.outcome != "completed" or all(call.error is not None for call, _, _ in mine):
                    self.left_out += 1
                    continue
                if not all(call.told for call, _, _ in mine):
                    raise self._error(
                        "its calls do not say what they read: record with a tap, or run it with record = true"
                    )
                self.calls_tools |= any(call.kind == "tool_call" for call, _, _ in mine)
                self._starts.append(query.due_at)
                self._from.append(mine[0][1])
                self._bytes.append(mine[-1][2] - mine[0][1])

    def _error(self, text: str) -> ScenarioError:
        return ScenarioError(f"{self.folder}: {text}")


_decoder = msgspec.json.Decoder(RecordedCall)


def _places(path: Path) -> Iterator[tuple[_Place, int, int]]:
    """Each whole line of calls.jsonl: whose it is, and from where to where it goes."""
    decoder, at = msgspec.json.Decoder(_Place), 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line), at, at + len(line)
            at += len(line)


def opened(path: str, arm: str) -> Recording:
    """The recording in a folder, which is read through once, as long as it does not change."""
    file = Path(path) / "calls.jsonl"
    return _opened(path, arm, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(16)
def _opened(path: str, arm: str, _: int) -> Recording:
    return Recording(Path(path), arm)


def recording_of(arm: Arm) -> Recording | None:
    """What an arm, or the first part of its mix that does, re-enacts."""
    for part in arm.mix or [arm]:
        if part.topology == TOPOLOGY.name and "path" in part.params:
            return opened(part.params["path"], part.params.get("arm", ""))
    return None


def keep_enacted(raw: dict[str, Any], source: str) -> None:
    """Leaves those arms out of a tap's own scenario of which nothing succeeded, unless that is all of them."""
    kept = []
    for arm in raw["arm"]:
        with suppress(ScenarioError):
            opened(str(Path(source).parent / arm["path"]), arm["arm"])
            kept.append(arm)
    if kept:
        raw["arm"] = [{**arm, "baseline": i == 0} for i, arm in enumerate(kept)]


def with_recordings(arms: Iterable[Any], source: str, table: Mapping[str, Topology]) -> dict[str, Topology]:
    """The table with a `replay` that knows the recordings which the arms name; their paths are relative to the scenario's. The arms then
    name them by absolute path. Raises ScenarioError."""
    found: dict[Params, Recording] = {}
    for arm in arms:
        if not isinstance(arm, dict) or arm.get("topology") != TOPOLOGY.name:
            continue
        where = f"{source}: arm {arm.get('name', TOPOLOGY.name)!r}: path = {arm.get('path')!r}"
        if not isinstance(arm.get("path"), str) or not isinstance(arm.get("arm", ""), str):
            raise ScenarioError(f"{where}: give the folder of a recording (and arm = NAME, where it has several)")
        arm["path"] = str((Path(source).parent / arm["path"]).resolve())
        params = Params(arm["path"], arm.get("arm", ""))
        try:
            found[params] = opened(params.path, params.arm)
        except ScenarioError as e:
            raise ScenarioError(f"{where}: {e}") from None

    def of_query(params: Params, query: int) -> Enacted:
        return Enacted(params.path, params.arm, found[params].steps(query))

    return {**table, TOPOLOGY.name: replace(TOPOLOGY, of_query=of_query)} if found else dict(table)


def steps_of(calls: Iterable[RecordedCall], lap: int = 0) -> tuple[Step, ...]:
    """A query's calls as steps; it started with the first of them. `lap` sets its texts apart, if it is not 0."""
    calls = sorted((call for call in calls if call.retry_at is None), key=lambda call: call.call)
    there = {call.call: call for call in calls if call.error is None and call.done_at is not None}
    keys: dict[int, Key] = {n: ("reply" if call.kind == "call" else "result", n) for n, call in there.items()}
    before: dict[int, set[int]] = {}
    for call in calls:  # of one that is left out: what it had waited for
        waited = call.after + [said.source for said in call.messages or () if said.source is not None]
        before[call.call] = {m for n in waited if n < call.call for m in ({n} if n in there else before.get(n, ()))}
    start_at = min((call.due_at for call in there.values()), default=0.0)
    results = {said.source: said.tokens for call in there.values() for said in call.messages or ()}
    found = []
    for n, call in there.items():
        pause_s = call.due_at - max((there[m].done_at or 0.0 for m in before[n]), default=start_at)
        is_call = call.kind == "call"
        found.append(
            Step(
                writes=keys[n],
                tokens=max(1, call.output_tokens or 0) if is_call else results.get(n, 0),
                role=call.role,
                round=call.round,
                after=tuple(keys[m] for m in sorted(before[n])),
                pause_s=pause_s if pause_s >= INSTANT_S else 0.0,
                seconds=0.0 if is_call else call.seconds,
                samples=call.samples,
                input_tokens=call.input_tokens,
                cached_tokens=call.cached_tokens,
                reads=tuple(_read(said, there, call, keys, lap) for said in call.messages or () if said.tokens > 0),
            )
        )
    return tuple(found)


def _read(
    said: Said, there: Mapping[int, RecordedCall], reader: RecordedCall, keys: Mapping[int, Key], lap: int
) -> Read:
    """A reply counts as such only as long as it was written: one whose reasoning is left out, or that was cut, is another text."""
    source = there.get(said.source) if said.source is not None and said.source < reader.call else None
    if source is not None and (source.kind == "tool_call" or source.output_tokens == said.tokens):
        return Read(keys[source.call], said.tokens, said.author)
    begins = tuple((_text_key(id, lap), tokens) for id, tokens in said.begins)
    return Read(_text_key(said.id or f"{reader.query}-{said.source}", lap), said.tokens, said.author, begins)


def _text_key(named: str, lap: int) -> Key:
    return (RECORDED, named, lap) if lap else (RECORDED, named)
