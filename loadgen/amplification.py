"""An arm's cost of a query against the baseline's: one ratio for each resource, with an interval of its kind. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fanmark.loadgen.costs import COUNTS, TIMES
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import QueryKind, Rows
from fanmark.loadgen.statistics import LEAST_SESSIONS, PAIRED, Batched, by_batches, by_repeats, paired_ratio, resampled
from fanmark.loadgen.steadiness import Verdict
from fanmark.loadgen.window import p90

LEAST_REPEATS = 5
LEAST_BATCHES, MOST_BATCHES = 10, 20
BATCH_LATENCIES = 2.0  # a batch is at least so many times the p90 query latency long
REPEAT_LATENCIES = (
    12.0  # and the window of one repeat of several: shorter ones still show that the server was empty before
)
SHORT_REPEATS = f"repeats of less than {REPEAT_LATENCIES:g} x the p90 query latency, no interval"
NO_INTERVAL = "one short run, no interval"


@dataclass(frozen=True)
class Counted:
    """An arm's counted queries, its windows and the verdicts on them. `apart` moves the numbers of queries and sessions away from those of
    another run, so that they are not paired with them."""

    queries: Rows[QueryKind]
    windows: Sequence[Window]
    verdicts: Sequence[Verdict]
    apart: int = 0

    @property
    def completed(self) -> Rows[QueryKind]:
        """Those of the queries that were completed."""
        return self.queries.where(lambda kind: kind.outcome == "completed")

    @property
    def p90_latency_s(self) -> float:
        """Of all that were started."""
        return p90(done_at - due_at for due_at, done_at in self.queries.rows("due_at", "done_at"))

    @property
    def over_capacity(self) -> bool:
        """Whether more arrived than was served, in most of the repeats: in one it may be chance."""
        return 2 * sum(verdict.over_capacity for verdict in self.verdicts) > len(self.verdicts)


def amplification(arm: Counted, base: Counted, name: str, seed: int, *, interleaved: bool) -> dict[str, Any] | None:
    """Ratio of the means per completed query, what failed queries and retries spent included."""
    own, own_waste = _costs(arm, name)
    against, base_waste = (own, own_waste) if arm is base else _costs(base, name)
    if own is None or against is None:
        return None
    if name in TIMES:
        return _of_times(arm, base, name, own, against, interleaved=interleaved)
    found = paired_ratio(own, against, seed, _sessions(arm, base))
    if found is None:
        return None
    factor = own_waste / base_waste
    found["ratio"] *= factor
    if found["low"] is not None:
        found |= {"low": found["low"] * factor, "high": found["high"] * factor}
    return found


def _of_times(
    arm: Counted,
    base: Counted,
    name: str,
    own: Mapping[int, float],
    against: Mapping[int, float],
    *,
    interleaved: bool,
) -> dict[str, Any] | None:
    """A ratio of times. Queries that meet in a server are not independent: a bootstrap over them, and batch means of arms that ran apart,
    were found to cover the truth too rarely where a server is busy (docs/method.md), so neither gives an interval."""
    if not own or not against or not math.fsum(against.values()):
        return None
    if arm.over_capacity or base.over_capacity:
        return {"ratio": None, "low": None, "high": None, "method": "over capacity"}
    ratio = math.fsum(own.values()) / len(own) / (math.fsum(against.values()) / len(against))
    found: dict[str, Any] = {"ratio": ratio, "low": None, "high": None, "method": NO_INTERVAL}
    if arm is base:
        return found | {"low": 1.0, "high": 1.0, "method": "the baseline itself"}
    if _short_repeats(arm, base):
        return found | {"method": SHORT_REPEATS}
    means = [_by_repeat(each, name) for each in (arm, base)]
    repeats = [r for r in means[0] if means[0][r] > 0 and means[1].get(r, 0) > 0]
    if len(repeats) >= LEAST_REPEATS:
        low, high = by_repeats([means[0][r] for r in repeats], [means[1][r] for r in repeats], ratio)
        return found | {"low": low, "high": high, "method": f"t over {len(repeats)} repeats"}
    batched = _batches(arm, base, name) if interleaved else None
    if batched is not None:
        low, high = by_batches(*batched)
        return found | {"low": low, "high": high, "method": f"{batched[2]} batch means"}
    return found


def change(
    second: tuple[Counted, Counted], first: tuple[Counted, Counted], name: str, seed: int
) -> dict[str, Any] | None:
    """How an amplification differs between two runs, from the arm and the baseline of each: ratio of the ratios, by the same rules."""
    (arm, base), (other, other_base) = second, first
    every = (arm, other_base, base, other)
    costs = [_costs(each, name) for each in every]
    values = [known for known, _ in costs if known is not None]
    if len(values) < len(every) or not all(math.fsum(each.values()) for each in values):
        return None
    found: dict[str, Any] = {"ratio": 1.0, "low": None, "high": None, "method": NO_INTERVAL}
    wholes = [math.fsum(mine.values()) / len(mine) * waste for mine, (_, waste) in zip(values, costs, strict=True)]
    found["ratio"] = wholes[0] * wholes[1] / (wholes[2] * wholes[3])  # of a run and its twin exactly 1
    interval: tuple[float, float] | None
    if name in COUNTS:
        factor = costs[0][1] * costs[1][1] / (costs[2][1] * costs[3][1])
        sessions = _sessions(*every)
        interval = resampled(values[:2], values[2:], seed, sessions) if min(map(len, values)) > 1 else None
        if interval is None:
            return found | {
                "method": f"fewer than {LEAST_SESSIONS} sessions, no interval" if sessions else "too few queries"
            }
        return found | {
            "low": interval[0] * factor,
            "high": interval[1] * factor,
            "method": PAIRED + ("sessions" if sessions else "queries"),
        }
    if any(each.over_capacity for each in every):
        return {"ratio": None, "low": None, "high": None, "method": "over capacity"}
    if _short_repeats(*every):
        return found | {"method": SHORT_REPEATS}
    means = [_by_repeat(each, name) for each in every]
    repeats = [r for r in means[0] if all(each.get(r, 0) > 0 for each in means)]
    if len(repeats) < LEAST_REPEATS:
        return found
    own, against = ([means[i][r] * means[i + 1][r] for r in repeats] for i in (0, 2))
    low, high = by_repeats(own, against, found["ratio"])
    return found | {"low": low, "high": high, "method": f"t over {len(repeats)} repeats"}


def _sessions(*arms: Counted) -> dict[int, int]:
    """The session of each query that is a turn of one."""
    numbers = ((each.apart, row) for each in arms for row in each.queries.rows("number", "session"))
    return {number + apart: session + apart for apart, (number, session) in numbers if session is not None}


def _short_repeats(*arms: Counted) -> bool:
    """Whether repeats are so short that their means lean on each other."""
    long_s = max(each.p90_latency_s for each in arms)
    windows = [window for each in arms for window in each.windows]
    return len(arms[0].windows) > 1 and min(window.seconds for window in windows) < REPEAT_LATENCIES * long_s


def _by_repeat(counted: Counted, name: str) -> dict[int, float]:
    """The mean of each repeat."""
    repeats = counted.completed.by(lambda kind: kind.repeat)
    return {repeat: math.fsum(mine.known(name)) / len(mine) for repeat, mine in repeats.items()}


def _batches(arm: Counted, base: Counted, name: str) -> tuple[Batched, Batched, int] | None:
    """The windows that both arms shared, cut into batches of equal length by due times; None where they are too few of a length that
    leaves them nearly independent."""
    lengths_s = [each.p90_latency_s for each in (arm, base)]
    most = -(-MOST_BATCHES // max(len(arm.windows), 1))
    counts = [min(int(window.seconds / (BATCH_LATENCIES * max(*lengths_s, 1e-9))), most) for window in arm.windows]
    found: list[dict[int, tuple[int, float]]] = [{}, {}]
    first = 0
    for window, count in zip(arm.windows, counts, strict=True):
        for each, batched in zip((arm, base), found, strict=True):
            mine = each.completed.where(partial(_in_repeat, repeat=window.repeat))
            for number, due_at, value in mine.rows("number", "due_at", name) if count else ():
                place = int((due_at - window.start_at) / window.seconds * count)
                batched[number] = first + min(place, count - 1), value or 0.0
        first += count
    if first < LEAST_BATCHES or not all(sum(value for _, value in batched.values()) > 0 for batched in found):
        return None
    return found[0], found[1], first


def _in_repeat(kind: QueryKind, repeat: int) -> bool:
    return kind.repeat == repeat


def _costs(arm: Counted, name: str) -> tuple[dict[int, float] | None, float]:
    """Values of the completed queries by number (None if one is unknown), and all queries' total over the completed ones'. Of calls,
    attempts that were sent again are among them; of those there are no tokens, as the server did nothing."""
    completed = arm.completed
    if completed.unknown(name):
        return None, 1.0
    names = (name, "retries") if name == "calls" else (name,)
    known = {number + arm.apart: sum(values) for number, *values in completed.rows("number", *names)}
    total = math.fsum(known.values())
    if name not in COUNTS or name in ("depth", "width") or total == 0:
        return known, 1.0
    others = arm.queries.where(lambda kind: kind.outcome != "completed")
    lost = math.fsum(value for each in names for value in others[each])
    return known, (total + lost) / total
