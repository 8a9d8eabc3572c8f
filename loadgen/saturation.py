"""Which gives way first as the query rate rises, the model's servers or the tools', from records and samples. Pure.

Rules of the file:
1. A level is the time at one query rate: a stage of the load, a part of a ramp, or without stages all that counts. A call belongs to the
   level in which it was sent.
2. What waits is told by the side itself: a tool call's `queued_s`; of the model's servers the mean number of waiting requests x time, which
   by Little's law is the time that requests waited. A side that tells nothing is known by growth alone: how much longer its calls took than
   in the first level (to the first token, by role and round; a tool call's whole, by tool), where that is more than chance.
3. A side gives way at the first level where it waits for more than a tenth of the time that the arm's calls and tool calls took, or where
   more than a tenth of its calls fail. Where both do, it is the one that waits longer.
4. What is not known is None: a side with fewer than ten calls in a level, or one that is known by growth alone, in the first.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fanmark.loadgen.arrivals import of_arm
from fanmark.loadgen.operating_point import Span, spans
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import CallKind, QueryKind, Reduced, Rows, seconds
from fanmark.loadgen.samples import Sample
from fanmark.loadgen.scenario import Arm, Scenario, Stage

GIVES = 0.1
RAMP_PART_S = 10.0
LEAST_CALLS, LEAST_SAMPLES = 10, 3
SIDES = ("tools", "model")


@dataclass(frozen=True)
class Level:
    """The time at one rate, in all repeats."""

    qps: float
    times: list[Span]

    def holds(self, at: float) -> bool:
        return any(a <= at < b for a, b in self.times)

    @property
    def seconds(self) -> float:
        return math.fsum(b - a for a, b in self.times)


def saturation(
    scenario: Scenario,
    arm: Arm,
    run: Reduced,
    windows: Sequence[Window],
    qps: float,
    samples: Sequence[Sample],
) -> dict[str, Any] | None:
    """`saturation` of an arm in summary.json; None where it called no tool. `run` is that of all arms, `windows` are its own, `qps` is
    what it was offered. `first`: "tools", "model", "neither" or None (not known); `qps` and `level`: where, of "neither" the highest."""
    own = run.where(lambda kind: kind.arm == arm.name)
    if not len(own.calls.where(lambda kind: kind.kind == "tool_call")):
        return None
    counted = own.queries.where(lambda kind: not kind.warmup)
    stages = scenario.load.stages
    levels = _staged(scenario, arm, counted) if stages else [Level(qps, spans(counted, windows))]
    targets = {kind.target for kind, _ in own.calls.kinds() if kind.kind == "call" and not kind.retried}
    calls, others = _sent(own), _sent(run).where(lambda kind: kind.target in targets)
    told: list[dict[str, Any]] = []
    first: Side | None = None
    for level in levels:
        mine = Side(calls, level)
        beside = sum(map(level.holds, others["at"]))
        at_times = [sample for sample in samples if level.holds(sample.at)]
        told.append(
            {"qps": level.qps, "times": [list(span) for span in level.times]}
            | {"tools": _tools(mine, first), "model": _model(mine, first, beside, at_times, targets)}
        )
        first = mine if first is None else first
    return _verdict(told) | {"levels": told}


def _staged(scenario: Scenario, arm: Arm, counted: Rows[QueryKind]) -> list[Level]:
    """The levels of the stages. A repeat begins before its first query by as much as that query's arrival says."""
    starts = []
    for repeat, mine in sorted(counted.by(lambda kind: kind.repeat).items()):
        starts.append(min(mine["due_at"]) - next(of_arm(scenario, arm, repeat)))
    return [Level(qps, [(at + a, at + b) for at in starts]) for a, b, qps in levels_of(scenario.load.stages)]


def levels_of(stages: Sequence[Stage]) -> list[tuple[float, float, float]]:
    """Start, end and mean rate of each stage; a ramp is cut into parts of 10 s at least."""
    found, start_at = [], 0.0
    for stage in stages:
        to = stage.rate if stage.to is None else stage.to
        parts = 1 if to == stage.rate else max(1, int(stage.seconds / RAMP_PART_S))
        for i in range(parts):
            middle = stage.rate + (to - stage.rate) * (i + 0.5) / parts
            found.append((start_at + stage.seconds * i / parts, start_at + stage.seconds * (i + 1) / parts, middle))
        start_at += stage.seconds
    return found


def _sent(run: Reduced) -> Rows[CallKind]:
    """All that was asked of a server, or would have been but for it."""
    return run.calls.where(lambda kind: kind.refused is None)


@dataclass(frozen=True)
class Side:
    """Calls, as far as a level holds them: all of them, or those of one side."""

    calls: Rows[CallKind]
    level: Level

    def where(self, test: Callable[[CallKind], bool]) -> "Side":
        return Side(self.calls.where(test), self.level)

    def taken(self, times: Iterable[float | None]) -> Iterator[float]:
        """Of as many times as there are calls the known ones of those that the level holds."""
        beside = zip(self.calls["at"], times, strict=True)
        return (seconds for at, seconds in beside if seconds is not None and self.level.holds(at))

    def seconds(self) -> Iterator[float]:
        return self.taken(seconds(self.calls))

    def ttft_s(self) -> Iterator[float]:
        first = self.calls.rows("at", "first_at")
        return self.taken(None if first_at is None else first_at - at for at, first_at in first)

    def __len__(self) -> int:
        return sum(map(self.level.holds, self.calls["at"]))


def _tools(mine: Side, first: Side | None) -> dict[str, Any]:
    calls = mine.where(lambda kind: kind.kind == "tool_call")
    ended = calls.where(lambda kind: kind.error is None)
    queued = array("d", ended.taken(ended.calls["queued_s"]))
    wait_s = math.fsum(queued) if queued else _growth(ended, first, lambda kind: kind.tool, Side.seconds)
    latency_s = array("d", ended.seconds())
    return {
        "calls": len(calls),
        **_shares(calls, mine, wait_s, "queue" if queued else "growth", ("tool_transport",)),
        "latency_s": fmean(latency_s) if latency_s else None,
        "queued_s": fmean(queued) if queued else None,
        "in_service": (math.fsum(latency_s) - math.fsum(queued)) / mine.level.seconds if queued else None,
    }


def _model(
    mine: Side, first: Side | None, beside: int, samples: Sequence[Sample], targets: set[str | None]
) -> dict[str, Any]:
    """`beside`: the calls of all arms to these targets, which wait in the same queues."""
    calls = mine.where(lambda kind: kind.kind == "call")
    begun = calls.where(lambda kind: kind.error is None)
    waiting, kv_use = (_gauge(samples, targets, name) for name in ("waiting", "kv_use"))
    wait_s = None
    if waiting is not None:
        wait_s = fmean(waiting) * mine.level.seconds * len(calls) / beside if beside else 0.0
    else:
        wait_s = _growth(begun, first, lambda kind: (kind.role, kind.round), Side.ttft_s)
    ttft_s = array("d", begun.ttft_s())
    return {
        "calls": len(calls),
        **_shares(calls, mine, wait_s, "growth" if waiting is None else "queue", None),
        "ttft_s": fmean(ttft_s) if ttft_s else None,
        "waiting_share": None if waiting is None else fmean(n > 0 for n in waiting),
        "kv_use_max": max(kv_use) / len(targets) if kv_use and targets else None,
    }


def _gauge(samples: Sequence[Sample], targets: set[str | None], name: str) -> list[float] | None:
    """The targets' sum of what their servers tell; None where one of them does not."""
    found = []
    for sample in samples:
        told: list[float | None] = [getattr(sample.targets.get(target or ""), name, None) for target in targets]
        known = [value for value in told if value is not None]
        if len(known) == len(told):
            found.append(math.fsum(known))
    return found if len(found) >= LEAST_SAMPLES else None


def _shares(calls: Side, mine: Side, wait_s: float | None, by: str, errors: Sequence[str] | None) -> dict[str, Any]:
    """A side's waiting as a share of the time that all calls and tool calls took, and its failures; `errors` None: all but what was given
    up."""
    count = len(calls)
    known = count >= LEAST_CALLS
    took_s = math.fsum(mine.seconds())
    failed = calls.where(
        lambda kind: kind.error in errors if errors else kind.error not in (None, "cancelled", "budget")
    )
    return {
        "wait_share": min(wait_s / took_s, 1.0) if known and wait_s is not None and took_s else None,
        "by": by,
        "failed_share": len(failed) / count if known else None,
    }


def _growth(
    calls: Side, first: Side | None, key: Callable[[CallKind], Any], times: Callable[[Side], Iterator[float]]
) -> float | None:
    """How much longer the calls took than the first level's of their kind; 0 where that may be chance (two standard errors)."""
    if first is None:
        return None
    kinds = {kind.kind for kind, _ in calls.calls.kinds()}
    ended = first.calls.where(lambda kind: kind.error is None and kind.kind in kinds)
    before = {name: array("d", times(Side(mine, first.level))) for name, mine in ended.by(key).items()}
    means = {name: fmean(mine) for name, mine in before.items() if mine}
    grown = array("d")
    for name, mine in calls.calls.by(key).items():
        if name in means:
            grown.extend(took_s - means[name] for took_s in times(Side(mine, calls.level)))
    count = sum(map(len, before.values()))
    if len(grown) < LEAST_CALLS or count < LEAST_CALLS:
        return None
    chance_s = 2 * stdev(grown) * math.sqrt(1 / len(grown) + 1 / count)
    return math.fsum(grown) if fmean(grown) > chance_s else 0.0


def _gives(side: Mapping[str, Any]) -> bool:
    return max(side["wait_share"] or 0.0, side["failed_share"] or 0.0) > GIVES


def _verdict(levels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for level in levels:
        giving = [side for side in SIDES if _gives(level[side])]
        if giving:
            first = max(giving, key=lambda side: (level[side]["wait_share"] or 0.0, level[side]["failed_share"] or 0.0))
            return {"first": first, "qps": level["qps"], "level": levels.index(level)}
    highest = max(range(len(levels)), key=lambda i: levels[i]["qps"])
    known = all(levels[highest][side]["wait_share"] is not None for side in SIDES)
    return {"first": "neither" if known else None, "qps": levels[highest]["qps"], "level": highest}


def line(found: Mapping[str, Any]) -> str:
    """The verdict in words, with what each side waited."""
    level = found["levels"][found["level"]]
    at = f"{found['qps']:.3g} queries/s"
    head = {
        "tools": f"the tools give way first, at {at}",
        "model": f"the model gives way first, at {at}",
        "neither": f"neither tools nor model give way up to {at}",
    }.get(found["first"], f"which gives way first, tools or model, is not known up to {at}")
    told = []
    for side in SIDES:
        share, failed = level[side]["wait_share"], level[side]["failed_share"]
        text = f"at the {side} {'not known' if share is None else f'{share:.0%}'}"
        told.append(text + (f" and {failed:.0%} failed" if failed else ""))
    return f"{head}: of the calls' time is waiting {', '.join(told)}"
