"""A run's records, reduced as they are read to what summing up needs: numbers in columns. Nothing else of them is kept.

Rules of the file:
1. Each query and each call is a row. What of it has few values (an arm, an outcome, a role, an error) is its kind, and rows of one kind lie
   together: to choose rows is to choose kinds.
2. What has many values is a column, in as few bytes as its numbers need. An unknown one is None, never 0.
3. What takes a query as a whole, such as its critical path, is worked out while it is at hand, in `Reduced.add`.
4. What follows from a part of the queries can be joined to what follows from others, and is then what follows from all (`joined`).
5. A new resource of per_query comes in by costs.resources and its name in costs.COUNTS or TIMES. What else of a query or a call is to be
   summed up is a field of QueryKind or CallKind if it has few values, else a name in _QUERY or _CALL with its value in `add`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

from fanmark.loadgen.column import Column
from fanmark.loadgen.costs import COUNTS, EXPECTED, TIMES, spent
from fanmark.loadgen.critical import spent_s
from fanmark.loadgen.fidelity import MEASURES
from fanmark.loadgen.objective import calls_good
from fanmark.loadgen.records import Call, Outcome, Query, critical_path
from fanmark.loadgen.retries import lost_s
from fanmark.loadgen.scenario import Objective
from fanmark.loadgen.unrecorded import LastSnapshot, Unrecorded, by_arm

_QUERY = (
    "number",
    "session",
    "due_at",
    "done_at",
    "start_delay_s",
    *(f"expected_{name}" for name in EXPECTED),
    *(f"fidelity_{name}" for name in MEASURES),
    *COUNTS,
    *TIMES,
)
_CALL = (
    "at",
    "first_at",
    "done_at",
    "send_delay_s",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "connect_s",
    "session_s",
    "queued_s",
    "bytes",
    "coalesced",
    "chunks",
    "worker",
    "critical",
)


class QueryKind(NamedTuple):
    """What rows of queries have in common. `in_time`: all its calls met the objective for calls; `differs` from its closed form."""

    arm: str
    warmup: bool
    outcome: Outcome
    repeat: int
    part: str | None
    turn: int | None
    stopped: str | None
    correct: bool | None
    in_time: bool
    differs: bool
    bound: bool
    output_bound: bool
    replayed: bool


class CallKind(NamedTuple):
    """What rows of calls and tool calls have in common; `outcome` is their query's. `retried`: it was sent again. Repeats follow each
    other, so that time tells them apart. Where a call was never sent, its column `at` is when it was due."""

    arm: str
    warmup: bool
    outcome: Outcome
    kind: str
    role: str
    round: int
    target: str | None
    tool: str | None
    sent: bool
    retried: bool
    finish: str | None
    samples: int
    error: str | None
    tool_error: bool
    refused: str | None
    opened_session: bool

    @property
    def needed(self) -> bool:
        """Whether the outcome rests on it (Query.needed)."""
        return not self.retried and (self.outcome != "completed" or self.error != "cancelled")

    @property
    def ended(self) -> bool:
        """Whether it is a call that was answered."""
        return self.kind == "call" and self.error is None and self.sent


Kind = TypeVar("Kind", QueryKind, CallKind)
Group = TypeVar("Group")


class Rows(Generic[Kind]):
    """Rows by kind, in columns of these names."""

    def __init__(self, names: Sequence[str], parts: dict[Kind, dict[str, Column]] | None = None) -> None:
        self._names = names
        self._parts: dict[Kind, dict[str, Column]] = {} if parts is None else parts

    def add(self, kind: Kind, values: Iterable[float | None]) -> None:
        """A row."""
        part = self._parts.get(kind)
        if part is None:
            part = self._parts[kind] = {name: Column() for name in self._names}
        for column, value in zip(part.values(), values, strict=True):
            column.append(value)

    def join(self, other: "Rows[Kind]") -> None:
        """All of others, behind these."""
        for kind, theirs in other._parts.items():
            part = self._parts.setdefault(kind, {name: Column() for name in self._names})
            for name, column in theirs.items():
                part[name].extend(column)

    def where(self, test: Callable[[Kind], bool]) -> "Rows[Kind]":
        """Those of some kinds."""
        return Rows(self._names, {kind: part for kind, part in self._parts.items() if test(kind)})

    def by(self, group: Callable[[Kind], Group]) -> "dict[Group, Rows[Kind]]":
        """In groups of kinds."""
        found: dict[Group, dict[Kind, dict[str, Column]]] = {}
        for kind, part in self._parts.items():
            found.setdefault(group(kind), {})[kind] = part
        return {name: Rows(self._names, parts) for name, parts in found.items()}

    def counts(self, word: Callable[[Kind], Group]) -> Counter[Group]:
        """How many there are by a word that their kind says."""
        found: Counter[Group] = Counter()
        for kind, part in self._parts.items():
            found[word(kind)] += _length(part)
        return found

    def kinds(self) -> "Iterator[tuple[Kind, Rows[Kind]]]":
        """Each kind with its rows."""
        return ((kind, Rows(self._names, {kind: part})) for kind, part in self._parts.items())

    def __len__(self) -> int:
        return sum(map(_length, self._parts.values()))

    def __getitem__(self, name: str) -> Iterator[Any]:
        """A column."""
        return chain.from_iterable(part[name] for part in self._parts.values())

    def known(self, name: str) -> Iterator[Any]:
        """Of a column what is known."""
        return chain.from_iterable(part[name].known() for part in self._parts.values())

    def unknown(self, name: str) -> int:
        """How many of a column are not known."""
        return sum(part[name].unknown for part in self._parts.values())

    def total(self, name: str) -> float | None:
        """The sum of a column; None where one is not known."""
        return None if self.unknown(name) else sum(self[name])

    def mean(self, name: str) -> float | None:
        """The mean of a column; None where one is not known, or there is none."""
        return math.fsum(self[name]) / len(self) if len(self) and not self.unknown(name) else None

    def rows(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Some columns side by side."""
        return zip(*(self[name] for name in names), strict=True)

    def clear(self) -> None:
        """Gives their memory back, whoever else has chosen some of them."""
        for part in self._parts.values():
            part.clear()
        self._parts.clear()


def _length(part: dict[str, Column]) -> int:
    return len(next(iter(part.values())))


def seconds(calls: Rows[CallKind]) -> Iterator[float]:
    """Times in flight (Call.seconds)."""
    for kind, mine in calls.kinds():
        for at, done_at in mine.rows("at", "done_at"):
            yield done_at - at if kind.sent and done_at is not None else 0.0


def in_flight(calls: Rows[CallKind]) -> Iterator[tuple[float, float]]:
    """When calls were sent and done; of those that were."""
    sent = calls.where(lambda kind: kind.kind == "call" and kind.sent)
    return ((at, done_at) for at, done_at in sent.rows("at", "done_at") if done_at is not None)


def on_critical_path_s(calls: Rows[CallKind]) -> float:
    """The time of those that their query's answer waited for."""
    return math.fsum(s for s, critical in zip(seconds(calls), calls["critical"], strict=True) if critical)


def ttft_s(calls: Rows[CallKind]) -> Iterator[float]:
    """Times to the first token, of calls that were sent and had one."""
    sent = calls.where(lambda kind: kind.sent)
    return (first_at - at for at, first_at in sent.rows("at", "first_at") if first_at is not None)


@dataclass
class Sums:
    """What of an arm's counted queries is summed up as it comes: of the completed ones token gaps of calls, and what latency was spent
    on (critical.spent_s); of all the time that was lost between attempts, and why queries failed."""

    gaps: Counter[int] = field(default_factory=Counter)
    spent_s: Counter[str] = field(default_factory=Counter)
    lost_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    def join(self, other: "Sums") -> None:
        """Those of other queries too."""
        self.gaps.update(other.gaps)
        self.spent_s.update(other.spent_s)
        self.lost_s += other.lost_s
        self.failures.update(other.failures)


class Reduced:
    """All queries of a run with their calls. Of queries that did not complete, resources are what they are known to have spent. `objective`
    says when calls were in time; `asked` counts queries by the targets of their calls; `unrecorded` are by arm the queries whose records
    are not here: they have no row."""

    def __init__(self, objective: Objective | None = None) -> None:
        self.queries: Rows[QueryKind] = Rows(_QUERY)
        self.calls: Rows[CallKind] = Rows(_CALL)
        self.sums: dict[str, Sums] = {}
        self.asked: Counter[frozenset[str | None]] = Counter()
        self.unrecorded: Mapping[str, Unrecorded] = {}
        self.written_tokens = self.reread_tokens = self.unexplained_tokens = 0
        self._objective = objective

    def add(self, query: Query) -> None:
        """A query with all its calls."""
        counted, completed = not query.warmup, query.outcome == "completed"
        critical = {call.call for call in critical_path(query.needed)} if counted and completed else set[int]()
        for retried, calls in ((True, query.retried), (False, query.calls)):
            for call in calls:
                on_path = not retried and call.call in critical
                self.calls.add(_call_kind(query, call, retried), _call_row(call, on_path))
        fidelity = query.fidelity or {}
        in_time = self._objective is None or calls_good(query, self._objective)
        kind = QueryKind(
            query.arm, query.warmup, query.outcome, query.repeat, query.part, query.turn, query.stopped, query.correct,
            in_time, bool(query.mismatches), query.bound, query.output_bound, query.fidelity is not None,
        )  # fmt: skip
        self.queries.add(kind, [
            query.query, query.session, query.due_at, query.done_at, query.started_at - query.due_at,
            *(query.expected.get(name) for name in EXPECTED),
            *(fidelity.get(name) for name in MEASURES),
            *(query.resources.get(name) if completed else spent(query, name) for name in (*COUNTS, *TIMES)),
        ])  # fmt: skip
        self.asked[frozenset(call.target for call in (*query.retried, *query.calls))] += 1
        self.written_tokens += query.written_tokens
        self.reread_tokens += query.reread_tokens
        self.unexplained_tokens += query.unexplained_tokens
        if counted:
            self._add_counted(self.sums.setdefault(query.arm, Sums()), query, completed=completed)

    def _add_counted(self, sums: Sums, query: Query, *, completed: bool) -> None:
        sums.lost_s += math.fsum(lost_s(query.retried).values())
        if query.error is not None:
            sums.failures[query.error] += 1
        if completed:
            for name, spent_for_s in spent_s(query).items():
                sums.spent_s[name] += spent_for_s  # type: ignore[assignment]  # a Counter of floats
            for call in query.calls:
                if call.kind == "call" and call.error is None and call.sent_at is not None:
                    sums.gaps.update(call.gaps)

    def join(self, other: "Reduced") -> None:
        """Other queries, behind these."""
        self.queries.join(other.queries)
        self.calls.join(other.calls)
        for arm, sums in other.sums.items():
            self.sums.setdefault(arm, Sums()).join(sums)
        self.asked.update(other.asked)
        self.written_tokens += other.written_tokens
        self.reread_tokens += other.reread_tokens
        self.unexplained_tokens += other.unexplained_tokens

    def where(self, test: Callable[[QueryKind | CallKind], bool]) -> "Reduced":
        """The queries of some kinds, with their calls."""
        found = copy(self)
        found.queries, found.calls = self.queries.where(test), self.calls.where(test)
        return found


def _call_kind(query: Query, call: Call, retried: bool) -> CallKind:
    return CallKind(
        query.arm, query.warmup, query.outcome, call.kind, call.role, call.round, call.target, call.tool,
        call.sent_at is not None, retried, call.finish, call.samples, call.error, call.tool_error, call.refused,
        call.opened_session,
    )  # fmt: skip


def _call_row(call: Call, critical: bool) -> list[float | None]:
    return [
        call.due_at if call.sent_at is None else call.sent_at, call.first_at, call.done_at, call.send_delay_s,
        call.input_tokens, call.cached_tokens, call.output_tokens, call.connect_s, call.session_s, call.queued_s,
        call.bytes, call.coalesced, call.chunks, call.worker, critical,
    ]  # fmt: skip


def reduced(queries: Iterable[Query], objective: Objective | None = None, told: Iterable[LastSnapshot] = ()) -> Reduced:
    """All of them, and what last snapshots tell of others."""
    found = Reduced(objective)
    found.unrecorded = by_arm(told)
    for query in queries:
        found.add(query)
    return found


def pieces(queries: Iterable[Query], objective: Objective | None, rows: int) -> Iterator[Reduced]:
    """All of them, some after the other, each piece of so many rows or little more."""
    piece, left = Reduced(objective), rows
    for query in queries:
        piece.add(query)
        left -= 1 + len(query.calls) + len(query.retried)
        if left <= 0:
            yield piece
            piece, left = Reduced(objective), rows
    yield piece


def joined(parts: Iterable[Reduced], told: Iterable[LastSnapshot] = ()) -> Reduced:
    """The queries of all parts, as if they had been reduced in this order; and what last snapshots tell of others."""
    found = Reduced()
    found.unrecorded = by_arm(told)
    for part in parts:
        found.join(part)
    return found
