"""Lengths, counts and latencies that are a number or a distribution. Pure: randomness comes in as a generator."""

import math
import random
from typing import Literal

import msgspec


class Dist(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution with `mean` and coefficient of variation `cv` (standard deviation / mean), cut to [min, max].

    "exponential" has cv 1 and "constant" 0, whatever `cv` says; "uniform" spans mean (1 +- sqrt(3) cv).
    """

    dist: Literal["constant", "uniform", "exponential", "lognormal", "gamma"]
    mean: float
    cv: float = 0.5
    min: float = 0.0
    max: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.mean < math.inf and 0 <= self.cv <= 1000 and 0 <= self.min <= self.max):
            raise ValueError("mean, cv and min must be numbers of at least 0, cv at most 1000, max at least min")


def draw(value: float | Dist, rng: random.Random) -> float:
    """One value; a plain number is itself."""
    if not isinstance(value, Dist):
        return value
    mean, cv = value.mean, value.cv
    if mean == 0 or value.dist == "constant":
        drawn = mean
    elif value.dist == "exponential":
        drawn = rng.expovariate(1 / mean)
    elif cv < 1e-6:
        drawn = mean
    elif value.dist == "uniform":
        drawn = mean * (1 + math.sqrt(3) * cv * (2 * rng.random() - 1))
    elif value.dist == "lognormal":
        sigma2 = math.log1p(cv * cv)
        drawn = rng.lognormvariate(math.log(mean) - sigma2 / 2, math.sqrt(sigma2))
    else:
        drawn = rng.gammavariate(1 / cv**2, mean * cv**2)
    return min(max(drawn, value.min), value.max)


def draw_int(value: int | Dist, *seed: object) -> int:
    """One whole number, the same for the same seed (any number of words), whatever else is drawn elsewhere."""
    if not isinstance(value, Dist):
        return value
    return round(draw(value, random.Random("/".join(map(str, seed)))))
