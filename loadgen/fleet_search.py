"""Which number of replicas is looked at next, and how replicas are shared out over several targets. Pure.

Rules of the file:
1. The search is search.py's for the least x; it begins at a guess and not at the end of the range, for a fleet that is far too small takes
   longest to simulate. From the guess it goes up until a number passes and down until one fails.
2. Of several targets the next replica goes where most requests are in flight for each that is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fanmark.loadgen.search import Ask, Point, Search, next_ask, pooled

UP, DOWN = 1.2, 0.85
UP_FAR = 1.6  # where the first steps did not reach
FEW = 3


def next_look(search: Search, guess: int, points: Sequence[Point]) -> Ask | None:
    """The next look, None where the search has ended. `points` are one for each look."""
    seen = pooled(points)
    if not seen:
        return Ask(float(min(max(guess, int(search.low)), int(search.high))), search.first)
    verdicts = [point.verdict(search.target) for point in seen]
    failed = [point.x for point, verdict in zip(seen, verdicts, strict=True) if verdict == "fail"]
    for point, verdict in zip(seen, verdicts, strict=True):
        if verdict == "undecided" and point.looks < search.most:
            return Ask(point.x, search.first)
    lowest, highest = seen[0].x, seen[-1].x
    if "pass" not in verdicts and highest < search.high:
        factor = UP if len(seen) < FEW else UP_FAR
        return Ask(min(search.high, max(highest + 1, float(round(highest * factor)))), search.first)
    if not failed and lowest > search.low:
        return Ask(max(search.low, min(lowest - 1, float(round(lowest * DOWN)))), search.first)
    return next_ask(replace(search, low=max(failed, default=lowest)), points)


def shared_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`total` replicas over targets of such weights; each has one at least, so that there may be more."""
    found = dict.fromkeys(weights, 1)
    for _ in range(total - len(found)):
        most = max(found, key=lambda name: weights[name] / found[name])
        found[most] += 1
    return found
