"""What a report shows of a run, from its folder alone: the summary, and of the records what a page can hold."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import Call, Query, gap_bucket, lines_of
from fanmark.loadgen.samples import Sample, read_samples
from fanmark.loadgen.summary import SCHEMA
from fanmark.loadgen.unrecorded import left_of

_MOST_TTFT = (
    200_000  # lines of calls.jsonl that are read for the distribution of times to first token: of more, every n-th
)


@dataclass(frozen=True)
class Shown:
    """A query that is drawn: of median latency, or of a latency that nine in ten are below."""

    word: Literal["typical", "slow"]
    query: Query


@dataclass(frozen=True)
class Facts:
    """All that is shown of a run. Latencies and times to first token are counted by log bucket (records.gap_bucket), by arm. `left`: where
    the records are, if not here; what takes them is not shown then."""

    summary: Mapping[str, Any]
    scenario: str
    samples: Sequence[Sample]
    latency: Mapping[str, Counter[int]]
    ttft: Mapping[str, Counter[int]]
    shown: Mapping[str, Sequence[Shown]]
    left: str | None = None


class _Timed(msgspec.Struct):
    """Of a call, what its time to first token needs."""

    query: int
    arm: str
    kind: str
    sent_at: float | None = None
    first_at: float | None = None
    error: str | None = None


def gather(folder: Path) -> Facts:
    """Reads a run's folder; what is held does not grow with its calls. Raises ScenarioError where it holds no ended run."""
    try:
        summary = msgspec.json.decode((folder / "summary.json").read_bytes())
        scenario = (folder / "scenario.toml").read_text()
    except (OSError, msgspec.DecodeError) as e:
        raise ScenarioError(
            f"{folder}: holds no run that has ended ({e}): give the folder that a run or a simulation has left"
        ) from None
    if summary.get("schema") != SCHEMA:
        raise ScenarioError(
            f"{folder}: its summary is of schema {summary.get('schema')!r}, this version reads {SCHEMA}"
        )
    if left := left_of(folder, summary):
        return Facts(summary, scenario, read_samples(folder), {}, {}, {}, left)
    latencies: dict[str, list[tuple[float, int]]] = {name: [] for name in summary["arms"]}
    for query in lines_of(folder / "queries.jsonl", Query):
        if not query.warmup and query.outcome == "completed":
            latencies[query.arm].append((query.done_at - query.due_at, query.query))
    chosen = {name: _chosen(sorted(found)) for name, found in latencies.items()}
    completed = {name: {number for _, number in found} for name, found in latencies.items()}
    ttft, calls = _calls(folder, completed, chosen)
    shown: dict[str, list[Shown]] = {name: [] for name in summary["arms"]}
    for query in lines_of(folder / "queries.jsonl", Query):
        word = chosen[query.arm].get(query.query)
        if word is not None:
            for call in calls[query.arm, query.query]:
                (query.calls if call.retry_at is None else query.retried).append(call)
            shown[query.arm].append(Shown(word, query))
    for each in shown.values():
        each.sort(key=lambda one: one.word, reverse=True)
    return Facts(
        summary, scenario, read_samples(folder),
        {name: Counter(gap_bucket(seconds) for seconds, _ in found) for name, found in latencies.items()},
        ttft, shown,
    )  # fmt: skip


def _chosen(ordered: Sequence[tuple[float, int]]) -> dict[int, Literal["typical", "slow"]]:
    """The numbers of the queries that are drawn; of an arm with one query there is no slow one."""
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {ordered[math.ceil(0.9 * last)][1]: "slow", ordered[last // 2][1]: "typical"}


def _calls(
    folder: Path, completed: Mapping[str, set[int]], chosen: Mapping[str, Mapping[int, str]]
) -> tuple[dict[str, Counter[int]], dict[tuple[str, int], list[Call]]]:
    """Times to first token of the completed queries' calls, and all calls of the chosen queries, in one pass."""
    ttft: dict[str, Counter[int]] = {name: Counter() for name in completed}
    calls: dict[tuple[str, int], list[Call]] = {(arm, n): [] for arm, numbers in chosen.items() for n in numbers}
    whole, timed = msgspec.json.Decoder(Call), msgspec.json.Decoder(_Timed)
    drawn = {msgspec.json.encode({"query": n, "arm": arm})[:-1]: (arm, n) for arm, n in calls}
    path = folder / "calls.jsonl"
    every = _every(path)
    with path.open("rb") as file:
        for i, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            key = drawn.get(line[: line.find(b',"call":')])
            if key is not None:
                calls[key].append(whole.decode(line))
            if i % every == 0:
                call = timed.decode(line)
                told = call.kind == "call" and call.error is None and call.sent_at is not None
                if told and call.first_at is not None and call.query in completed[call.arm]:
                    ttft[call.arm][gap_bucket(call.first_at - (call.sent_at or 0.0))] += 1
    return ttft, calls


def _every(path: Path) -> int:
    """1 where the file is small enough to be read whole; its lines are some 1,000 bytes long."""
    return 1 + path.stat().st_size // (_MOST_TTFT * 1000)
