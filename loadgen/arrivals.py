"""When queries start: pure pacing, in seconds since the run's start."""

import random
from collections.abc import Iterator
from itertools import count, takewhile

from fanmark.loadgen.scenario import Load


def constant(rate: float, phase: float = 0.0) -> Iterator[float]:
    """Equal steps of 1 / rate, the first at phase / rate (0 <= phase < 1)."""
    return ((i + phase) / rate for i in count())


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Independent exponential gaps of mean 1 / rate, before the first arrival too."""
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def open_loop(load: Load, seed: int, arm: str, place: float) -> Iterator[float]:
    """The start times of one arm's queries: `load.queries` of them, or those before `load.duration`. Each arm draws its own; `place`
    in [0, 1) keeps the constant arrivals of several arms apart."""
    rng = random.Random(f"{seed}/arrivals/{arm}")
    times = constant(load.rate, place) if load.process == "constant" else poisson(load.rate, rng)
    if load.queries is not None:
        return (at for _, at in zip(range(load.queries), times, strict=False))
    duration = load.duration or 0.0
    return takewhile(lambda at: at < duration, times)
