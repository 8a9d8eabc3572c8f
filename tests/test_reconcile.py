"""The server's counters against the client's sums."""

from typing import Any

import pytest
from two_arms import calls_of

from fanmark.loadgen.cache_account import cache_account
from fanmark.loadgen.reconcile import client_sums, draft_acceptance, reconcile
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


TOLD = dict.fromkeys(
    ("preemptions", "prefix_cache_queries", "prefix_cache_hits", "draft_tokens", "accepted_draft_tokens")
)


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
        BEFORE, {**AFTER, "prompt_tokens": 1151.0}, TWO, False, False,
        "1 prompt token more than this client sent: somebody else's, or the server counts otherwise"),
    "another client's call": (BEFORE, {**AFTER, "request_success": 10.0, "generation_tokens": 540.0}, TWO, False, False,
     "1 request and 10 output tokens more than this client sent: somebody else uses the server"),
    "another client's calls": (
        BEFORE, {"prompt_tokens": 2350.0, "generation_tokens": 590.0, "prompt_tokens_cached": 128.0,
                 "request_success": 12.0}, TWO, False, False,
        "3 requests, 1,200 prompt tokens, 60 output tokens and 64 cached tokens more than this client sent: "
        "somebody else uses the server"),
    "another client's call, and a counter that lags": (
        BEFORE, {**AFTER, "request_success": 10.0, "generation_tokens": 529.0}, TWO, False, False,
        "1 request more than this client sent: somebody else uses the server; and 1 output token less"),
    "a server that counted less did no other's work": (
        BEFORE, {**AFTER, "generation_tokens": 529.0}, TWO, False, True,
        "the server counted 1 output token less than this client"),
    "cached tokens alone are nobody's call": (
        BEFORE, {**AFTER, "prompt_tokens_cached": 80.0}, TWO, False, True,
        "the server counted 16 cached tokens more than this client"),
    "finishes of another kind": (
        {**BEFORE, "request_success_length": 1.0, "request_success_stop": 6.0},
        {**AFTER, "request_success_length": 2.0, "request_success_stop": 7.0},
        [call(finish="length"), call((50, 0, 10), finish="length")], False, True,
        "request_success_stop, request_success_length differ"),
    "finishes as they were told": (
        {**BEFORE, "request_success_length": 1.0, "request_success_stop": 6.0},
        {**AFTER, "request_success_length": 2.0, "request_success_stop": 7.0},
        [call(finish="length"), call((50, 0, 10), finish="tool_calls")], True, True, "6 counters equal"),
    "preemptions make no difference": (
        {**BEFORE, "preemptions": 0.0}, {**AFTER, "preemptions": 3.0}, TWO, True, True, "4 counters equal"),
    "a server that was started anew": (
        {**BEFORE, "preemptions": 9.0}, {**AFTER, "preemptions": 3.0}, TWO, None, None,
        "the server's counters went back: it was started anew during the run"),
    "usage without cached tokens leaves that counter out": (
        BEFORE, AFTER, [call((100, None, 20)), call((50, None, 10))], True, True, "3 counters equal"),
    "usage that never came leaves nothing to hold the tokens against": (
        BEFORE, AFTER, [call((None, None, None))] * 2, None, True, "calls came back without usage"),
    "usage that never came does not hide another's call": (
        BEFORE, {**AFTER, "request_success": 10.0}, [call((None, None, None))] * 2, False, False,
        "1 request more than this client sent: somebody else uses the server"),
    "a call that was cut off is the server's to count": (
        BEFORE, {**AFTER, "prompt_tokens": 1250.0, "request_success": 10.0},
        [*TWO, call((None, None, None), "stream_cut")], None, None,
        "the server counted 1 request and 100 prompt tokens more: 1 call ended unheard"),
    "calls that were cut off bound what the server may count": (
        BEFORE, {**AFTER, "prompt_tokens": 1250.0, "request_success": 12.0},
        [*TWO, call((None, None, None), "stream_cut"), call((None, None, None), "cancelled")], False, False,
        "3 requests and 100 prompt tokens more than this client sent, of which 2 may be calls that ended unheard: "
        "somebody else uses the server"),
    "a call that was cut off before the server counted it": (
        BEFORE, AFTER, [*TWO, call((None, None, None), "timeout")], True, True, "4 counters equal"),
    "what was heard must be counted, whatever was not": (
        BEFORE, {**AFTER, "generation_tokens": 529.0}, [*TWO, call((None, None, None), "timeout")], False, True,
        "the server counted 1 output token less than this client"),
    "a call that was never sent": (
        BEFORE, AFTER, [*TWO, call((None, None, None), "connect", sent_at=None)], True, True, "4 counters equal"),
    "a tool call that failed": (
        BEFORE, AFTER, [*TWO, call((None, None, None), "tool_transport", kind="tool_call")], True, True,
        "4 counters equal"),
    "nothing was sent and nothing counted": (BEFORE, BEFORE, [], True, True, "4 counters equal"),
    "nothing was sent and yet it counted": (
        BEFORE, AFTER, [], False, False,
        "2 requests, 150 prompt tokens, 30 output tokens and 64 cached tokens more than this client sent: "
        "somebody else uses the server"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "calls", "reconciled", "alone", "reason"), CASES.values(), ids=CASES)
def test_reconcile(
    before: Any, after: Any, calls: list[Call], reconciled: bool | None, alone: bool | None, reason: str
) -> None:
    found = reconcile(before, after, calls_of(calls))
    assert (found["reconciled"], found["alone"], found["reason"]) == (reconciled, alone, reason)


def test_both_sides_of_a_counter_stand_in_the_summary() -> None:
    found = reconcile(BEFORE, {**AFTER, "prompt_tokens": 1165.0}, calls_of([call(), call((50, None, 10))]))
    assert found["prompt_tokens"] == {"client": 150, "server": 165.0, "off_pct": 10.0}
    assert found["generation_tokens"] == {"client": 30, "server": 30.0, "off_pct": 0.0}
    assert found["prompt_tokens_cached"] == {"client": None, "server": 64.0, "off_pct": None}
    assert found["request_success"] == {"client": 2, "server": 2.0, "off_pct": 0.0}


def test_the_clients_sums_are_of_calls_that_ended_well() -> None:
    calls = [call(finish="length"), call((50, 0, 10), finish="stop"), call((7, 7, 7), "stream_cut")]
    assert (
        client_sums(calls_of(calls))
        == {
            "prompt_tokens": 150,
            "generation_tokens": 30,
            "prompt_tokens_cached": 64,
            "request_success": 2,
            "request_success_stop": 1,
            "request_success_length": 1,
            "request_success_abort": None,  # the server may have noticed that its client was gone
        }
        | TOLD
    )


def test_a_call_with_several_samples_is_so_many_of_the_servers() -> None:
    # usage tells the prompt once, and all that was written
    assert (
        client_sums(calls_of([call((100, 0, 60), samples=3, finish="stop"), call(finish="stop")]))
        == {
            "prompt_tokens": 400,
            "generation_tokens": 80,
            "prompt_tokens_cached": None,  # the second sample may have read the first one's prompt from the cache
            "request_success": 4,
            "request_success_stop": None,  # the reply tells how one of its samples ended
            "request_success_length": None,
            "request_success_abort": 0,
        }
        | TOLD
    )


ACCOUNT = {"prompt_tokens": 1000.0, "generation_tokens": 200.0, "prompt_tokens_cached": 600.0}


@pytest.mark.parametrize(
    ("after", "written", "turnover", "cached"),
    [
        (ACCOUNT | {"kv_capacity_tokens": 1200.0}, 600.0, 0.5, 150.0),
        (ACCOUNT, 600.0, None, 150.0),  # a capacity that nobody tells
        (without(ACCOUNT, "prompt_tokens_cached") | {"prefix_cache_hits": 500.0}, 700.0, None, 125.0),
        (without(ACCOUNT, "prompt_tokens_cached"), 1136.0, None, None),  # by what the calls tell: one, with 64
        (None, None, None, None),
    ],
)
def test_kv_turnover_and_the_servers_own_mean(
    after: Any, written: float | None, turnover: float | None, cached: float | None
) -> None:
    before = {"prompt_tokens": 0.0, "kv_capacity_tokens": 1200.0}
    found = cache_account(before, after, calls_of([call()]), queries=4)
    assert (found["kv_written_tokens"], found["kv_turnover"]) == (written, turnover)
    assert found["cached_tokens_per_query"] == cached


def test_no_cached_tokens_at_all_are_unknown_and_not_none() -> None:
    after = without(ACCOUNT, "prompt_tokens_cached")
    found = cache_account({}, after, calls_of([call((100, None, 20))]), queries=1)
    assert (found["kv_written_tokens"], found["cached_tokens_per_query"]) == (None, None)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ({"draft_tokens": 90.0, "accepted_draft_tokens": 60.0}, {"draft_tokens": 290.0, "accepted_draft_tokens": 110.0}, 0.25),
        ({}, {"draft_tokens": 8.0, "accepted_draft_tokens": 0.0}, 0.0),  # all guesses were wrong
        ({"draft_tokens": 90.0, "accepted_draft_tokens": 60.0}, {"draft_tokens": 90.0, "accepted_draft_tokens": 60.0}, None),
        ({}, {"draft_tokens": 8.0}, None),  # it does not tell what it accepted
        ({}, {"prompt_tokens": 8.0}, None),
        (None, {"draft_tokens": 8.0, "accepted_draft_tokens": 4.0}, None),
        ({}, None, None),
    ],
)  # fmt: skip
def test_what_share_of_guessed_tokens_was_accepted_during_the_run(
    before: dict[str, float] | None, after: dict[str, float] | None, share: float | None
) -> None:
    assert draft_acceptance(before, after) == share
