"""The bundled arithmetic questions (loadgen/scenarios/arithmetic.jsonl), from a seed: `python tests/make_arithmetic.py` prints them."""

import json
import random
import sys
from collections.abc import Iterator

SEED, LINES = 6, 240
END = "Work it out step by step, and end with the number alone."


def sums(rng: random.Random) -> tuple[str, int]:
    """Of two or three numbers with up to four figures."""
    a, b, c = rng.randint(1_000, 9_999), rng.randint(100, 9_999), rng.randint(10, 999)
    return f"What is {a:,} + {b:,} - {c}?", a + b - c


def products(rng: random.Random) -> tuple[str, int]:
    a, b, c = rng.randint(12, 99), rng.randint(12, 99), rng.randint(2, 9)
    return f"What is {a} x {b} + {c} x {c}?", a * b + c * c


def boxes(rng: random.Random) -> tuple[str, int]:
    boxes, each, broken = rng.randint(8, 60), rng.randint(6, 48), rng.randint(1, 40)
    told = (
        f"A shop gets {boxes} boxes of {each} cups each, and {broken} cups are broken. How many whole cups are there?"
    )
    return told, boxes * each - broken


def journeys(rng: random.Random) -> tuple[str, int]:
    speed, hours, more, rest = 5 * rng.randint(6, 24), rng.randint(2, 9), 5 * rng.randint(4, 20), rng.randint(2, 5)
    told = f"A train goes {hours} hours at {speed} km/h and then {rest} hours at {more} km/h. How many kilometres does it go in all?"
    return told, speed * hours + more * rest


def shares(rng: random.Random) -> tuple[str, int]:
    people, each, left = rng.randint(3, 24), rng.randint(12, 90), rng.randint(0, 2)
    told = f"{people} people share {people * each + left} coins evenly, as far as that goes. How many coins does each of them get?"
    return told, each


def parcels(rng: random.Random) -> tuple[str, int]:
    days, daily, percent = rng.randint(3, 14), 100 * rng.randint(2, 30), 5 * rng.randint(1, 10)
    told = f"A warehouse sends {daily:,} parcels a day, and {percent} % of them are late. How many are late in {days} days?"
    return told, daily * percent // 100 * days


def questions() -> Iterator[dict[str, str]]:
    """So many, of each kind in turn, no two alike."""
    rng, kinds, seen = random.Random(SEED), (sums, products, boxes, journeys, shares, parcels), set[str]()
    while len(seen) < LINES:
        told, answer = kinds[len(seen) % len(kinds)](rng)
        if told not in seen:
            seen.add(told)
            yield {"prompt": f"{told} {END}", "answer": str(answer)}


if __name__ == "__main__":
    sys.stdout.writelines(json.dumps(question) + "\n" for question in questions())
