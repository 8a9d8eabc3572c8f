"""The measures of a replay, by hand."""

from typing import Any

import pytest
import two_arms

from fanmark.agents.steps import Step
from fanmark.loadgen.fidelity import MEASURES, fidelity
from fanmark.loadgen.records import Call
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.summary import summarise_arms

ASKS = Step(("reply", 1), 10, input_tokens=100, cached_tokens=0)
LOOKS = Step(("result", 2), 30, after=(("reply", 1),), seconds=2.0)
SAYS = Step(("reply", 3), 20, after=(("reply", 1), ("result", 2)), pause_s=1.0, input_tokens=140, cached_tokens=96)


def call(number: int, after: list[int], due_at: float, done_at: float, **more: Any) -> Call:
    given: dict[str, Any] = {"kind": "call", "role": "agent", "round": 1} | more
    return Call(query=0, arm="r", call=number, after=after, due_at=due_at, sent_at=due_at, done_at=done_at, **given)


def made(**more: Any) -> list[Call]:
    """As recorded, but for what is said of the last call."""
    return [
        call(1, [], 5.0, 6.0, input_tokens=100, cached_tokens=0, output_tokens=10),
        call(2, [1], 6.0, 8.0, kind="tool_call"),
        call(3, [1, 2], 9.0, 10.0, **{"input_tokens": 140, "cached_tokens": 96, "output_tokens": 20} | more),
    ]


def told(calls: list[Call]) -> dict[str, float | None]:
    return fidelity([ASKS, LOOKS, SAYS], calls, started_at=5.0)


def off(**measures: Any) -> dict[str, Any]:
    return dict.fromkeys(MEASURES, 1.0) | measures


def test_as_recorded() -> None:
    assert told(made()) == off()


def test_each_measure_tells_its_own() -> None:
    assert told(made(input_tokens=120)) == off(input_tokens=220 / 240)
    assert told(made(output_tokens=30)) == off(output_tokens=30 / 40)
    assert told(made(cached_tokens=48)) == off(overlap=pytest.approx(1 - 48 / 240))
    assert told(made(cached_tokens=None)) == off(overlap=None)
    late = made()
    late[2].due_at, late[2].done_at = 11.0, 12.0  # 3 s after the tool's result, and not 1 s
    assert told(late) == off(gaps=pytest.approx(1 - (2 - 0.005) / (3 + 2)))
    slow = made()
    slow[1].done_at, slow[2].due_at = 8.5, 9.5  # the tool took 2.5 s
    assert told(slow) == off(gaps=pytest.approx(1 - (0.5 - 0.005) / (1 + 2.5)))


def test_a_few_milliseconds_are_the_clients() -> None:
    calls = made()
    calls[0].due_at, calls[2].due_at = 5.004, 9.004
    assert told(calls) == off()


def test_what_is_missing_is_set_against_nothing() -> None:
    assert told(made()[:2]) == off(
        structure=2 / 3,
        calls=2 / 3,
        input_tokens=100 / 240,
        output_tokens=10 / 30,
        overlap=1 - 96 / 240,
        gaps=pytest.approx(1 - (1 - 0.005) / 3),
    )
    assert fidelity([], [], 0.0) == off()


def test_who_waited_for_others_stands_elsewhere() -> None:
    calls = made()
    calls[2].after = [1]
    found = told(calls)
    assert (found["structure"], found["calls"]) == (2 / 3, 1.0)


def test_siblings_are_told_apart_by_their_lengths_alone() -> None:
    steps = [Step(("reply", n), tokens, input_tokens=5, cached_tokens=0) for n, tokens in ((1, 10), (2, 20))]
    calls = [call(n, [], 0.0, 1.0, input_tokens=5, cached_tokens=0, output_tokens=o) for n, o in ((1, 20), (2, 10))]
    assert fidelity(steps, calls, 0.0) == off()


def test_means() -> None:
    queries = two_arms.queries()
    queries[4].fidelity, queries[5].fidelity = off(), off(calls=0.5, overlap=None)
    arms = summarise_arms(two_arms.scenario(), reduced(queries))
    assert (arms["single"]["fidelity"], arms["debate"]["fidelity"]) == (None, off(calls=0.75, overlap=None))
