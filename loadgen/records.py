"""What was measured: a Call, a ToolCall or a Query, written once and never edited; and the journal that keeps them on disk.

All instants (`_at`) are seconds since the run's start (warm-up comes first) on the run's own monotonic clock. Token counts are the
server's; None is "the server did not say", never 0.
"""

import hashlib
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

import msgspec

from fanmark.loadgen.errors import LostError

Outcome = Literal["completed", "failed", "abandoned"]
Phase = Literal["lead-in", "window", "lead-out"]  # only the queries of the window count

R = TypeVar("R")

WINDOWS, SNAPSHOTS = "windows.jsonl", "snapshots.jsonl"
# what summary.json rests on
KEPT = ("queries.jsonl", "calls.jsonl", WINDOWS, SNAPSHOTS, "samples.jsonl", "scenario.toml", "questions.jsonl")
_COPIED_BYTES = 1 << 20
_encoder = msgspec.json.Encoder()

GAP_BASE = 1.002  # a bucket of token gaps is 0.2 % wide: a gap is known to 0.1 %, which of 20 ms is 0.02 ms
JOINED, JOINED_FROM = 10, 21  # buckets
_BUCKETS_PER_E = 1 / math.log(GAP_BASE)


def gap_bucket(gap_s: float) -> int:
    """The log bucket of a token gap: floor(ln(gap) / ln(1.002)), with all gaps under 1 us in one."""
    return math.floor(math.log(max(gap_s, 1e-6)) * _BUCKETS_PER_E)


def bucket_gap_s(bucket: int) -> float:
    """The geometric middle of a bucket, in seconds."""
    return float(GAP_BASE ** (bucket + 0.5))


class Gaps:
    """Token gaps of one call, counted by log bucket. Where they are of many kinds, neighbours within 2 % are joined at their mean, lest
    each such call take kilobytes: gaps that are alike are known to 0.1 %, others to 2 %, and quantiles and means of many far better."""

    __slots__ = ("_counts", "_join_from")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._join_from = JOINED_FROM

    def add(self, gap_s: float, times: int = 1) -> None:
        """So many gaps of this length."""
        bucket = gap_bucket(gap_s)
        self._counts[bucket] = self._counts.get(bucket, 0) + times
        if len(self._counts) > self._join_from:
            self._join()

    def counts(self) -> dict[int, int]:
        """How many of each bucket."""
        if len(self._counts) > JOINED_FROM:
            self._join()
        return self._counts

    def _join(self) -> None:
        near: dict[int, list[tuple[int, int]]] = {}
        for bucket, times in self._counts.items():
            near.setdefault(bucket // JOINED, []).append((bucket, times))
        self._counts = {}
        for group in near.values():
            times = sum(n for _, n in group)
            self._counts[sum(bucket * n for bucket, n in group) // times] = times
        self._join_from = len(self._counts) + JOINED_FROM


class Call(msgspec.Struct, omit_defaults=False, kw_only=True):
    """One call (kind "call") or tool call (kind "tool_call"): a line of calls.jsonl. `due_at` is when it should have been sent, `limited_s`
    how long the target's limits, the budget, or an answer that refused a parameter kept it from that, `first_at` the first token of the
    reply (reasoning or not), `answer_at` the first that is not reasoning. `retry_at`: the attempt did not count, the next one was due then.
    `connect_s` is how long opening a connection took before `sent_at`, None where one was open. `gpu_s`, `joules` are what it took of its
    replica by attribution, `gpu_waste_s` of it after a preemption (docs/cost.md). Of a tool call: `bytes` of its result; `session_s` that
    it waited for its session before `sent_at` (None where one was open), which it opened itself (`opened_session`) or not; `queued_s` in
    the tool server's queue (None where it does not say); `refused`: why the model's own call was not made."""

    query: int
    arm: str
    call: int
    after: list[int]
    kind: Literal["call", "tool_call"]
    role: str
    round: int
    target: str | None = None
    tool: str | None = None
    due_at: float
    limited_s: float = 0.0
    sent_at: float | None = None
    connect_s: float | None = None
    first_at: float | None = None
    answer_at: float | None = None
    done_at: float | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    gpu_s: float | None = None
    gpu_waste_s: float | None = None
    joules: float | None = None
    finish: str | None = None
    attempt: int = 1
    retry_at: float | None = None
    samples: int = 1
    error: str | None = None
    message: str | None = None
    tool_error: bool = False
    bytes: int | None = None
    session_s: float | None = None
    opened_session: bool = False
    queued_s: float | None = None
    refused: Literal["malformed", "unknown", "not_allowed", "limit"] | None = None
    lane: str | None = None
    worker: int = 0
    gaps: Mapping[int, int] = {}
    coalesced: int = 0

    @property
    def seconds(self) -> float:
        """Time in flight; 0 for a call that was never sent."""
        return self.done_at - self.sent_at if self.done_at is not None and self.sent_at is not None else 0.0

    @property
    def chunks(self) -> int:
        """The chunks with tokens of a call that was sent. What came together with its first is in no gap: a reply that came all at once is
        coalesced but for one chunk."""
        return 1 + max(sum(self.gaps.values()), self.coalesced)

    @property
    def send_delay_s(self) -> float | None:
        """From due to sent, less what connecting took, which is the network's and the server's time, and what limits and budget did."""
        if self.sent_at is None:
            return None
        return max(0.0, self.sent_at - self.due_at - (self.connect_s or 0.0) - self.limited_s)


class Query(msgspec.Struct, kw_only=True):
    """One query: a line of queries.jsonl. `resources` are the per_query resources of summary.json, None where unknown; `expected` is
    the closed form of this query, with `bound` the most that it may cost; `mismatches` names the resources that differ from it. `warmup`:
    it does not count, for its `phase` is not the window. `output_bound`: of output tokens alone the closed form is a bound.
    `written_tokens` are those of replies that were read again, and `reread_tokens` what they counted then; `unexplained_tokens` were found
    in a cache though the run had not sent them. `correct`: whether the final answer is the known one, None where that cannot be judged.
    `calls` are the last attempts, one for each call; those before them are `retried`. `fidelity`: fidelity.py."""

    query: int
    arm: str
    warmup: bool
    phase: Phase = "window"
    repeat: int = 1
    due_at: float
    started_at: float
    done_at: float
    outcome: Outcome
    resources: dict[str, float | None]
    expected: dict[str, int | None]
    mismatches: list[str]
    seed: str
    error: str | None = None
    calls: list[Call] = []
    retried: list[Call] = []
    stopped: str | None = None
    bound: bool = False
    output_bound: bool = False
    written_tokens: int = 0
    reread_tokens: int = 0
    unexplained_tokens: int = 0
    part: str | None = None
    correct: bool | None = None
    session: int | None = None
    turn: int | None = None
    fidelity: dict[str, float | None] | None = None

    @property
    def needed(self) -> list[Call]:
        """The calls that the outcome rests on: in a completed query not those that were given up because enough others had answered, or a
        limit was reached."""
        return [call for call in self.calls if self.outcome != "completed" or call.error != "cancelled"]


class Begun(msgspec.Struct, array_like=True):
    """A query that has begun, as far as it is known then: a line of begun.jsonl, which is kept only while a worker works."""

    query: int
    arm: str
    phase: Phase
    repeat: int
    due_at: float
    started_at: float
    seed: str
    session: int | None = None
    turn: int | None = None


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A line of windows.jsonl: the instants between which the queries of `arms` counted. `rates` are the queries/s that each was offered,
    None in a closed loop; `given_up`: the lead-in was, because latency kept growing."""

    repeat: int
    arms: list[str]
    lead_in_at: float
    start_at: float
    end_at: float
    given_up: bool = False
    rates: dict[str, float | None] = {}

    @property
    def seconds(self) -> float:
        """How long it was counted."""
        return self.end_at - self.start_at


class Journal:
    """Appends records to queries.jsonl and calls.jsonl as they finish; a killed run loses at most what was not flushed yet. `write` only
    encodes; the disk is met in `flush`, which may be called from another thread meanwhile. With `through` each record is flushed as it
    comes; with `starts`, each query's beginning is told to the system at once, so that who reads what a killed worker left misses none.
    What fails once is over: nothing more is written, and every `flush` says so."""

    def __init__(self, folder: Path, *, starts: bool = False, through: bool = False) -> None:
        self._folder = folder
        self._queries = (folder / "queries.jsonl").open("wb", buffering=0)
        self._calls = (folder / "calls.jsonl").open("wb", buffering=0)
        self._begun = (folder / "begun.jsonl").open("wb", buffering=0) if starts else None
        self._pending: deque[tuple[bytes, bytes]] = deque()
        self._flushing = threading.Lock()
        self._through = through
        self._lost: LostError | None = None
        self.told: Callable[[Query], None] = lambda query: None  # of each query that is written

    def begin(self, query: Begun) -> None:
        """A query that begins."""
        if self._begun is not None:
            self._put(self._begun, _encoder.encode(query) + b"\n")

    def write(self, query: Query) -> None:
        """One query with all its calls, those that were sent again first."""
        self.told(query)
        calls = _encoder.encode_lines([*query.retried, *query.calls])
        row = msgspec.structs.asdict(query)
        del row["calls"], row["retried"]
        self._pending.append((calls, _encoder.encode(row) + b"\n"))
        if self._through:
            with suppress(LostError):
                self.flush()

    def window(self, window: Window) -> None:
        """A window, as soon as it is known."""
        with (self._folder / WINDOWS).open("ab") as file:
            file.write(msgspec.json.encode(window) + b"\n")

    def take(self, folder: Path) -> None:
        """All records of another journal; of the windows, which all workers know, the longest list."""
        theirs, ours = ([*_bytes(each / WINDOWS)] for each in (folder, self._folder))
        if len(theirs) > len(ours):
            (self._folder / WINDOWS).write_bytes(b"".join(theirs))
        for name, file in (("calls.jsonl", self._calls), ("queries.jsonl", self._queries)):
            with (folder / name).open("rb") as source:
                while data := source.read(_COPIED_BYTES):
                    self._put(file, data)

    def flush(self) -> None:
        """Hands what was written to the system, calls before their query; called once a second. Raises LostError."""
        with self._flushing:
            taken = [self._pending.popleft() for _ in range(len(self._pending))]
            self._put(self._calls, b"".join([calls for calls, _ in taken]))
            self._put(self._queries, b"".join([query for _, query in taken]))
            if self._lost is not None:
                raise self._lost

    def close(self) -> None:
        """Flushes what can be, and closes the files."""
        with suppress(LostError):
            self.flush()
        self._calls.close()
        self._queries.close()
        if self._begun is not None:
            self._begun.close()

    def _put(self, file: FileIO, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest and self._lost is None:
                rest = rest[file.write(rest) :]
        except OSError as e:
            self._lost = LostError(f"{self._folder}: cannot be written any more ({e.strerror})")


def in_order(calls: Iterable[Call]) -> list[Call]:
    """By number, so that each stands after those it depended on."""
    return sorted(calls, key=lambda call: call.call)


def read_begun(folder: Path) -> list[Begun]:
    """The queries that a worker had begun."""
    return list(lines_of(folder / "begun.jsonl", Begun))


def read_queries(folder: Path) -> Iterator[Query]:
    """The whole records of a run's folder one by one, each query with its calls; a last line that was cut off is left out. Calls stand in
    the order of their queries; such as have no query are passed over."""
    calls = groupby(lines_of(folder / "calls.jsonl", Call), lambda call: (call.arm, call.query))
    nothing: tuple[tuple[str, int] | None, Iterable[Call]] = (None, ())
    key, mine = next(calls, nothing)
    for query in lines_of(folder / "queries.jsonl", Query):
        own = (query.arm, query.query)
        made_some = any(query.resources.get(name) for name in ("calls", "tool_calls", "retries"))
        while key != own and key is not None and made_some:
            key, mine = next(calls, nothing)
        if key == own:
            for call in mine:
                (query.calls if call.retry_at is None else query.retried).append(call)
            key, mine = next(calls, nothing)
        yield query


def read_windows(folder: Path) -> list[Window]:
    """The windows of a run's folder; a run without a duration has none."""
    return [msgspec.json.decode(line, type=Window) for line in _bytes(folder / WINDOWS)]


def digests(folder: Path) -> dict[str, str]:
    """`files` of summary.json: the SHA-256 of each file that it rests on."""
    found = {}
    for name in KEPT:
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _bytes(path: Path) -> list[bytes]:
    """The whole lines of a small file that need not be there."""
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []


def lines_of(path: Path, kind: type[R]) -> Iterator[R]:
    """The whole lines of a file; a last one that was cut off is left out."""
    decoder = msgspec.json.Decoder(kind)
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line)


def critical_path(calls: Iterable[Call], lost_s: Mapping[int, float] = MappingProxyType({})) -> list[Call]:
    """The longest chain by time of calls and tool calls that waited for each other, in order. `lost_s` comes on
    top of a call's time."""
    by_number = {call.call: call for call in in_order(calls)}
    chain_s: dict[int, float] = {}
    before: dict[int, int] = {}
    for n, call in by_number.items():
        known = [m for m in call.after if m in chain_s]
        if known:
            before[n] = max(known, key=lambda m: chain_s[m])
        chain_s[n] = call.seconds + lost_s.get(n, 0.0) + (chain_s[before[n]] if known else 0.0)
    path: list[Call] = []
    n = max(chain_s, key=lambda m: chain_s[m], default=0)
    while n:
        path.append(by_number[n])
        n = before.get(n, 0)
    return path[::-1]


def shape(calls: Iterable[Call]) -> dict[str, int | float]:
    """Depth, width, work and critical path of one query, from its records alone.

    depth: calls on the longest chain of dependencies; width: the largest number of calls at one depth; work_s: sum of the times of all
    calls and tool calls; critical_path_s: the longest chain of them by time; tool_s: the tool calls' share of work_s.
    """
    depth: dict[int, int] = {}
    at_depth: Counter[int] = Counter()
    calls = in_order(calls)
    for call in calls:
        is_call = call.kind == "call"
        depth[call.call] = is_call + max((depth.get(n, 0) for n in call.after), default=0)
        if is_call:
            at_depth[depth[call.call]] += 1
    return {
        "depth": max(depth.values(), default=0),
        "width": max(at_depth.values(), default=0),
        "work_s": math.fsum(call.seconds for call in calls),
        "critical_path_s": math.fsum(call.seconds for call in critical_path(calls)),
        "tool_s": math.fsum(call.seconds for call in calls if call.kind == "tool_call"),
    }
