"""Queries whose records are not here: where they were left, and of those that are lost what the last snapshot of their worker tells, a
line of snapshots.jsonl for each such worker. Pure but for that file.

What is summed up query by query (quantiles, intervals, ratios of times, load) rests on records and on nothing else: sums are never
mixed in.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fanmark.loadgen.costs import COUNTS, TIMES
from fanmark.loadgen.errors import writing
from fanmark.loadgen.records import GAP_BASE, JOINED, SNAPSHOTS, lines_of

if TYPE_CHECKING:
    from fanmark.loadgen.tally import ArmTally

NOT_SHOWN = (
    ": figures follow from them all the same, but no query is drawn, no span sent, and nothing can be verified here"
)
_NAMED = 3  # places, of many


class Unrecorded(msgspec.Struct, kw_only=True):
    """Of an arm. `sums` are the resources of completed queries, of which so many have `known` each; `latency` counts their latencies by
    log bucket, to within 2 %; `errors` are calls and tool calls that failed, by class."""

    started: int
    completed: int
    failed: int
    abandoned: int
    mismatched: int
    errors: dict[str, int]
    sums: dict[str, float]
    known: dict[str, int]
    latency: dict[int, int]

    @property
    def queries(self) -> dict[str, int]:
        """As `queries` of an arm in summary.json."""
        return {name: getattr(self, name) for name in ("started", "completed", "failed", "abandoned")}

    @property
    def means(self) -> dict[str, dict[str, float] | None]:
        """Of the completed queries; None where one does not know it."""
        n = self.completed
        return {
            name: {"mean": self.sums[name] / n, "n": n} if n and self.known.get(name) == n else None
            for name in (*COUNTS, *TIMES)
        }

    def good(self, query_seconds: float) -> int:
        """How many completed within their deadline: those of all buckets that end before it, so never too many."""
        ends_s = {bucket: GAP_BASE ** ((bucket // JOINED + 1) * JOINED) for bucket in self.latency}
        return sum(times for bucket, times in self.latency.items() if ends_s[bucket] <= query_seconds)


class LastSnapshot(msgspec.Struct, kw_only=True):
    """A line of snapshots.jsonl. `lost_at` is when the worker died."""

    worker: int
    node: str | None
    lost_at: float | None
    arms: dict[str, Unrecorded]

    @property
    def queries(self) -> dict[str, dict[str, int]]:
        """`lost_queries` of the worker in summary.json."""
        return {name: arm.queries for name, arm in self.arms.items()}


def unrecorded(arm: "ArmTally") -> Unrecorded:
    """What an arm's sums tell; what was in flight is abandoned."""
    errors: Counter[str] = Counter()
    for (_, _, outcome), times in arm.calls.items():
        errors[outcome] += times
    for (_, outcome), times in arm.tool_calls.items():
        errors[outcome] += times
    for word in ("completed", "cancelled", "malformed", "unknown", "not_allowed", "limit"):
        del errors[word]
    return Unrecorded(
        started=arm.started, completed=arm.completed, failed=arm.finished["failed"],
        abandoned=arm.finished["abandoned"] + arm.in_flight, mismatched=arm.mismatched, errors=dict(errors),
        sums=dict(arm.sums), known=dict(arm.known), latency=dict(arm.latency),
    )  # fmt: skip


def by_arm(told: Iterable[LastSnapshot]) -> dict[str, Unrecorded]:
    """All workers' together, of the arms that have any."""
    found: dict[str, list[Unrecorded]] = {}
    for each in told:
        for name, mine in each.arms.items():
            if mine.started:
                found.setdefault(name, []).append(mine)
    return {name: _together(parts) for name, parts in found.items()}


def _together(parts: Sequence[Unrecorded]) -> Unrecorded:
    def total(name: str) -> Any:
        held = [getattr(part, name) for part in parts]
        if isinstance(held[0], int):
            return sum(held)
        whole: Counter[Any] = Counter()
        for each in held:
            whole.update(each)
        return dict(whole)

    return Unrecorded(**{name: total(name) for name in Unrecorded.__struct_fields__})


def write_snapshots(folder: Path, told: Sequence[LastSnapshot]) -> None:
    """snapshots.jsonl, where there is anything to tell. Raises LostError."""
    if told:
        with writing(folder):
            (folder / SNAPSHOTS).write_bytes(msgspec.json.Encoder().encode_lines(told))


def read_snapshots(folder: Path) -> list[LastSnapshot]:
    """Of a run's folder; mostly there are none."""
    path = folder / SNAPSHOTS
    return list(lines_of(path, LastSnapshot)) if path.exists() else []


def left_at(journals: Mapping[str, str | None]) -> str:
    """Where the records of a run are that its workers kept."""
    found = [f"worker {worker}: {place}" for worker, place in journals.items() if place is not None]
    more = f" and {len(found) - _NAMED} more (client.by_worker)" if len(found) > _NAMED else ""
    return f"the records are where they were written ({'; '.join(found[:_NAMED])}{more})"


def left_of(folder: Path, summary: Mapping[str, Any]) -> str | None:
    """The same of a run's folder; None where they are in it."""
    journals = {worker: each.get("journal") for worker, each in summary.get("client", {}).get("by_worker", {}).items()}
    kept = not (folder / "queries.jsonl").exists() and any(place is not None for place in journals.values())
    return left_at(journals) if kept else None
