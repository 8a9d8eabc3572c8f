"""The server's counters against the client's sums."""

from typing import Any

import pytest

from fanmark.loadgen.reconcile import client_sums, reconcile
from fanmark.loadgen.records import Call


def call(tokens: tuple[int | None, ...] = (100, 64, 20), error: str | None = None, **more: Any) -> Call:
    read, cached, wrote = tokens
    given: dict[str, Any] = {"kind": "call", "sent_at": 1.0, "done_at": 2.0} | more
    return Call(
        query=0, arm="a", call=1, after=[], role="agent", round=1, due_at=1.0, input_tokens=read,
        cached_tokens=cached, output_tokens=wrote, error=error, **given,
    )  # fmt: skip


TWO = [call(), call((50, 0, 10)), call((None, None, None), kind="tool_call")]
BEFORE = {"prompt_tokens": 1000.0, "generation_tokens": 500.0, "prompt_tokens_cached": 0.0, "request_success": 7.0}
AFTER = {"prompt_tokens": 1150.0, "generation_tokens": 530.0, "prompt_tokens_cached": 64.0, "request_success": 9.0}


def without(counters: dict[str, float], *names: str) -> dict[str, float]:
    return {name: value for name, value in counters.items() if name not in names}


CASES: dict[str, tuple[Any, Any, list[Call], bool | None, bool | None, str]] = {
    "every counter grew by what the client counted": (BEFORE, AFTER, TWO, True, True, "4 counters equal"),
    "a server that was fresh names no counter before": ({}, {**AFTER, "prompt_tokens": 150, "generation_tokens": 30,
     "request_success": 2}, TWO, True, True, "4 counters equal"),
    "a target without counters": (None, None, TWO, None, None, "the target exposes no counters"),
    "counters that went away": (BEFORE, None, TWO, None, None, "the target exposes no counters"),
    "counters of another kind": ({}, {"preemptions": 3.0}, TWO, None, None, "no counter to compare"),
    "a counter that this server lacks is not compared": (
        BEFORE, without(AFTER, "prompt_tokens_cached"), TWO, True, True, "3 counters equal"),
    "another client's prompt": (
        BEFORE, {**AFTER, "prompt_tokens": 1151.0}, TWO, False, False, "prompt_tokens differ"),
    "another client's call": (BEFORE, {**AFTER, "request_success": 10.0, "generation_tokens": 540.0}, TWO, False, False,
     "generation_tokens, request_success differ"),
    "a server that counted less did no other's work": (
        BEFORE, {**AFTER, "generation_tokens": 529.0}, TWO, False, True, "generation_tokens differ"),
    "usage without cached tokens leaves that counter out": (
        BEFORE, AFTER, [call((100, None, 20)), call((50, None, 10))], True, True, "3 counters equal"),
    "usage that never came leaves nothing to hold the tokens against": (
        BEFORE, AFTER, [call((None, None, None))] * 2, None, True, "calls came back without usage"),
    "a call that was cut off is the server's to count": (
        BEFORE, {**AFTER, "prompt_tokens": 1250.0, "request_success": 10.0},
        [*TWO, call((None, None, None), "stream_cut")], None, None, "1 calls ended without the server's count"),
    "a call that was cut off before the server counted it": (
        BEFORE, AFTER, [*TWO, call((None, None, None), "timeout")], None, True,
        "1 calls ended without the server's count"),
    "a call that was never sent": (
        BEFORE, AFTER, [*TWO, call((None, None, None), "connect", sent_at=None)], True, True, "4 counters equal"),
    "a tool call that failed": (
        BEFORE, AFTER, [*TWO, call((None, None, None), "tool_transport", kind="tool_call")], True, True,
        "4 counters equal"),
    "nothing was sent and nothing counted": (BEFORE, BEFORE, [], True, True, "4 counters equal"),
    "nothing was sent and yet it counted": (
        BEFORE, AFTER, [], False, False,
        "prompt_tokens, generation_tokens, prompt_tokens_cached, request_success differ"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "calls", "reconciled", "alone", "reason"), CASES.values(), ids=CASES)
def test_reconcile(
    before: Any, after: Any, calls: list[Call], reconciled: bool | None, alone: bool | None, reason: str
) -> None:
    found = reconcile(before, after, calls)
    assert (found["reconciled"], found["alone"], found["reason"]) == (reconciled, alone, reason)


def test_both_sides_of_a_counter_stand_in_the_summary() -> None:
    found = reconcile(BEFORE, {**AFTER, "prompt_tokens": 1165.0}, [call(), call((50, None, 10))])
    assert found["prompt_tokens"] == {"client": 150, "server": 165.0, "off_pct": 10.0}
    assert found["generation_tokens"] == {"client": 30, "server": 30.0, "off_pct": 0.0}
    assert found["prompt_tokens_cached"] == {"client": None, "server": 64.0, "off_pct": None}
    assert found["request_success"] == {"client": 2, "server": 2.0, "off_pct": 0.0}


def test_the_clients_sums_are_of_calls_that_ended_well() -> None:
    calls = [*TWO, call((7, 7, 7), "stream_cut")]
    assert client_sums(calls) == {
        "prompt_tokens": 150,
        "generation_tokens": 30,
        "prompt_tokens_cached": 64,
        "request_success": 2,
    }


def test_a_call_with_several_samples_is_so_many_of_the_servers() -> None:
    # usage tells the prompt once, and all that was written
    assert client_sums([call((100, 0, 60), samples=3), call()]) == {
        "prompt_tokens": 400,
        "generation_tokens": 80,
        "prompt_tokens_cached": None,  # the second sample may have read the first one's prompt from the cache
        "request_success": 4,
    }
