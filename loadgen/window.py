"""When a window begins and what is waited for after it: decisions, given what was seen so far. Pure.

What counts is the queries that are due in the window. Before it lies the lead-in, until the system is filled; after it the lead-out,
in which arrivals go on, so that the last counted query meets the same crowd as the first.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

LEAD_IN_LATENCIES = 2.0  # the lead-in takes at least so many times the p90 query latency seen so far
MOST_LATENCIES = (
    10.0  # and is given up after so many times the longest of the first latencies, or the duration if that is longer
)
FIRST = 5  # so many queries of an arm are the first
MOST_SILENCE_S = 600.0  # or after so long, where no query of an arm has ended at all
GRACE_LATENCIES = 3.0  # after the window, counted queries get so many times the p90 query latency,
GRACE_LEAST_S = 30.0  # and at least so long


class Seen:
    """The queries of a block that have ended, by arm, as all workers told of them: latencies, and the time that their calls took in sum."""

    def __init__(self) -> None:
        self.latencies_s: dict[int, list[float]] = defaultdict(list)
        self.calls_s: dict[int, list[float]] = defaultdict(list)

    def take(self, said: Sequence[float]) -> None:
        """Triples of an arm's number, a latency and a sum of calls' times, one after another."""
        for arm, latency_s, calls_s in zip(*[iter(said)] * 3, strict=True):
            self.latencies_s[int(arm)].append(latency_s)
            self.calls_s[int(arm)].append(calls_s)

    def all_s(self) -> list[float]:
        """The latencies of all arms."""
        return [latency_s for latencies_s in self.latencies_s.values() for latency_s in latencies_s]


def p90(latencies_s: Iterable[float]) -> float:
    """Of few, nearly the longest: rank n x 0.9 counted up."""
    ordered = sorted(latencies_s)
    return ordered[max(0, -(-9 * len(ordered) // 10) - 1)]


Stands = Literal["on", "over", "given up"]


def lead_in(
    seen: Mapping[int, Sequence[float]], elapsed_s: float, warmup: Mapping[int, int], duration_s: float
) -> Stands:
    """Where the lead-in stands: over when it is for all arms, given up when it is for one. `seen`: latencies by arm in the order of their
    ends; `warmup`: how many must have ended, of each arm."""
    stands = {_of_arm(seen.get(arm, ()), elapsed_s, least, duration_s) for arm, least in warmup.items()}
    return "given up" if "given up" in stands else "on" if "on" in stands else "over"


def _of_arm(latencies_s: Sequence[float], elapsed_s: float, least: int, duration_s: float) -> Stands:
    if not latencies_s:
        return "given up" if elapsed_s >= max(duration_s, MOST_SILENCE_S) else "on"
    if len(latencies_s) >= least and elapsed_s >= LEAD_IN_LATENCIES * p90(latencies_s):
        return "over"
    return "given up" if elapsed_s >= max(duration_s, MOST_LATENCIES * max(latencies_s[:FIRST])) else "on"


def grace_s(latencies_s: Sequence[float]) -> float:
    """How long counted queries may take after the window, by the latencies seen until its end. What then still runs is abandoned."""
    return max(GRACE_LEAST_S, GRACE_LATENCIES * p90(latencies_s)) if latencies_s else GRACE_LEAST_S
