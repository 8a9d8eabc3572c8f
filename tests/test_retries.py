"""Calls that are sent again: when, after how long, and that the closed form still holds; what was wasted is counted apart."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import two_arms
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept

from fanmark.agents import topologies
from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.costs import resources
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.sse import Reply
from fanmark.loadgen.lanes.virtual import Service, VirtualEndpoint
from fanmark.loadgen.records import Call
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.retries import retry_after_s, wait_s
from fanmark.loadgen.run import Run
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.summary import summarise_arms
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.waste import waste
from fanmark.servers.profiles import load_profile

PROFILE = load_profile("qwen3-30b-a3b@h100")
NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
LATER = format_datetime(NOW + timedelta(seconds=90), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "asked_s"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "0", "retry-after-ms": "50"}, 0.05),
        ({"retry-after": LATER}, 60.0),  # by the wall clock that is handed in
        ({"retry-after": LATER, "date": format_datetime(NOW, usegmt=True)}, 90.0),  # by the server's own
        ({"retry-after": "Mon, 23 Nov 2020 12:00:00 GMT"}, 0.0),  # long past
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_to_wait(headers: dict[str, str], asked_s: float | None) -> None:
    assert retry_after_s(headers, (NOW + timedelta(seconds=30)).timestamp()) == asked_s


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (HttpError(429, ""), True),
        (HttpError(503, ""), True),
        (CallError("connect", ""), True),
        (HttpError(500, ""), False),
        (HttpError(400, ""), False),
        (CallError("timeout", ""), False),
        (CallError("stream_cut", ""), False),
        (CallError("bad_reply", ""), False),
    ],
)
def test_only_what_cost_the_server_nothing_is_sent_again(error: CallError, again: bool) -> None:
    config = Target(url="", retries=2, retry_backoff_s=0.5)
    waits = [wait_s(config, attempt, error, 0.0, 0.0) for attempt in (1, 2, 3)]
    assert waits == ([0.25, 0.5, None] if again else [None] * 3)
    assert wait_s(Target(url=""), 1, error, 0.0, 0.0) is None


@given(st.integers(1, 100), st.floats(0, 1, exclude_max=True))
def test_a_wait_without_advice_doubles_and_chance_takes_at_most_half_of_it(attempt: int, chance: float) -> None:
    config = Target(url="", retries=100, retry_backoff_s=0.1)
    found = wait_s(config, attempt, HttpError(503, ""), chance, 0.0)
    whole_s = min(0.1 * 2.0 ** (attempt - 1), 8.0)
    assert found is not None and whole_s / 2 <= found <= whole_s


def test_a_wait_that_is_asked_for_is_kept_but_not_beyond_what_a_call_may_take() -> None:
    config = Target(url="", retries=1, call_timeout_s=5.0)
    waits = [wait_s(config, 1, HttpError(429, "", {"retry-after": t}), 0.5, 0.0) for t in ("1.5", "5", "6", "0")]
    assert waits == [1.5, 5.0, None, 0.375]


class Refusing(VirtualEndpoint):
    """A virtual target whose n-th request fails by `script[n]`, unless that is None."""

    def __init__(self, script: list[CallError | None], **config: Any) -> None:
        super().__init__("default", Target(url="", **config), Service(PROFILE))
        self.script = script
        self.ids: list[str] = []

    async def send(self, body: Mapping[str, Any], headers: Mapping[str, str], sent: Sent) -> Reply:
        self.ids.append(headers["X-Request-Id"])
        error = self.script.pop(0) if self.script else None
        if error is None:
            return await super().send(body, headers, sent)
        if isinstance(error, HttpError):
            sent.at = asyncio.get_running_loop().time()
            await asyncio.sleep(0.01)  # the refusal's way
        raise error


def carried_out(endpoint: Refusing, **load: Any) -> tuple[Kept, dict[str, Any], Tally]:
    scenario = two_arms.scenario(
        load={"mode": "closed", "queries": 2, "warmup": 0, **load}, workload={"answer": 20, "judge_answer": 20}
    )

    async def main() -> tuple[Kept, dict[str, Any], Tally]:
        kept, tally = Kept(), Tally({"single": "single", "debate": "debate"}, "single")
        now = asyncio.get_running_loop().time
        await Run(scenario, topologies(), {"default": endpoint}, None, tally, kept, "r", now).execute()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return kept, summarise_arms(scenario, reduced(kept)), tally

    return run_virtually(main())


def test_an_answer_that_refuses_a_parameter_is_not_the_clients_delay() -> None:
    """The first call of each of two arms hears of it, and is sent again without it; no attempt is a retry."""
    told = '{"error": {"message": "Unrecognized request argument supplied: cache_salt", "param": "cache_salt"}}'
    endpoint = Refusing([HttpError(400, told)] * 2)
    kept, _, _ = carried_out(endpoint, concurrency=1)
    assert [query.outcome for query in kept] == ["completed"] * 4
    assert not any(query.retried for query in kept)
    calls = [call for query in kept for call in query.calls]
    assert sorted(call.limited_s for call in calls)[-3:] == pytest.approx([0.0, 0.01, 0.01])
    assert max(call.send_delay_s or 0.0 for call in calls) == pytest.approx(0.0, abs=1e-9)
    assert max(query.resources["client_s"] or 0.0 for query in kept) == pytest.approx(0.0, abs=1e-9)


passing = st.sampled_from([HttpError(429, ""), HttpError(503, ""), CallError("connect", ""), None])


@settings(max_examples=20)
@given(st.lists(passing, max_size=30))
def test_the_closed_form_holds_whatever_was_sent_again(script: list[CallError | None]) -> None:
    struck = [error.kind for error in script if error is not None]
    endpoint = Refusing(list(script), retries=30, retry_backoff_s=0.1)
    kept, arms, tally = carried_out(endpoint)
    used = len(struck) if not endpoint.script else len(struck) - sum(e is not None for e in endpoint.script)
    assert [query.outcome for query in kept] == ["completed"] * 4
    assert not any(query.mismatches for query in kept)
    assert sum(arm["waste"]["retries"] for arm in arms.values()) == used
    assert sum(tally.arms[name].retries for name in arms) == used
    assert sum(arm["per_query"]["retries"]["mean"] * 2 for arm in arms.values()) == used
    assert len(endpoint.ids) == len(set(endpoint.ids)) == sum(len(q.calls) + len(q.retried) for q in kept)
    for arm in arms.values():
        assert arm["errors"] == {}
        assert arm["waste"]["calls"] == arm["waste"]["retries"] == sum(arm["waste"]["retried"].values())
        assert (arm["waste"]["input_tokens"], arm["waste"]["output_tokens"]) == (0, 0)
    for query in kept:
        assert query.resources["client_s"] == pytest.approx(0, abs=1e-3)  # waiting for the server is not the client's
        for call in query.calls:
            before = [c for c in query.retried if c.call == call.call]
            assert [c.attempt for c in before] == list(range(1, call.attempt))
            assert all(c.error is not None and c.done_at is not None and c.after == call.after for c in before)
            assert [c.retry_at for c in before] == [c.due_at for c in [*before, call][1:]]  # each waited for its turn
            assert call.sent_at == call.due_at


def test_amplification_counts_the_attempts_that_came_to_nothing() -> None:
    refused = HttpError(429, "", {"retry-after": "1"})
    _, arms, tally = carried_out(Refusing([refused, refused, refused], retries=3, retry_backoff_s=0.1), concurrency=1)
    assert [arms[name]["waste"]["retries"] for name in arms] == [1, 2]  # both arms' first calls leave together
    assert arms["debate"]["per_query"]["calls"]["mean"] == 3
    assert arms["debate"]["amplification"]["calls"]["ratio"] == pytest.approx(((6 + 2) / 2) / ((2 + 1) / 2))
    assert arms["debate"]["waste"]["seconds"] == pytest.approx(2 * (1 + 0.01))
    assert tally.arms["debate"].calls_in_flight == 0
    assert {name: arm.retries for name, arm in tally.arms.items()} == {"single": 1, "debate": 2}


def test_what_never_passes_fails_with_its_last_attempt() -> None:
    kept, arms, tally = carried_out(Refusing([HttpError(429, "")] * 99, retries=2, retry_backoff_s=0.1))
    assert [query.outcome for query in kept] == ["failed"] * 4
    singles = [query for query in kept if query.arm == "single"]
    for query in singles:
        (last,) = query.calls
        assert (last.attempt, last.error, last.retry_at) == (3, "http_429", None)
        assert [c.attempt for c in query.retried] == [1, 2]
    assert arms["single"]["errors"] == {"http_429": 2}
    assert arms["single"]["waste"] | {"seconds": 0} == {
        "retries": 4, "retried": {"http_429": 4}, "given_up": 0, "calls": 6, "input_tokens": 0, "output_tokens": 0, "seconds": 0,
    }  # fmt: skip
    assert tally.arms["single"].calls["agent", "default", "http_429"] == 2


def test_a_query_that_is_given_up_while_it_waits_leaves_an_attempt_that_was_never_sent() -> None:
    refused = HttpError(503, "", {"retry-after": "100"})
    kept, arms, tally = carried_out(Refusing([refused] * 99, retries=9), query_timeout_s=2.0)
    for query in kept:
        assert query.outcome == "failed" and query.done_at - query.started_at == pytest.approx(2.0)
        for call in query.calls:
            assert (call.attempt, call.error, call.sent_at) == (2, "cancelled", None)
            assert call.done_at is not None and call.due_at <= call.done_at == query.done_at
        assert [c.retry_at for c in query.retried] == [pytest.approx(100 + c.done_at) for c in query.retried]  # type: ignore[operator]
    assert all(arm.calls_in_flight == 0 for arm in tally.arms.values())
    assert arms["single"]["waste"]["calls"] == 4


def test_waste_is_what_queries_cost_that_did_not_complete() -> None:
    """Tokens of a server that worked and did not say are unknown, those of one that refused are none."""

    def ended(error: str | None, tokens: tuple[int | None, int | None], sent_at: float | None = 1.0) -> Call:
        return two_arms.call(1, (sent_at, None, 3.0), (tokens[0], None, tokens[1]), error=error)

    def wasted(*calls: Call) -> tuple[Any, Any, Any]:
        found = waste(reduced([two_arms.query("single", 0, list(calls), 0.0, 3.0, outcome="failed")]), 0.0)
        return found["calls"], found["input_tokens"], found["output_tokens"]

    assert wasted(ended(None, (10, 5)), ended("http_429", (None, None))) == (2, 10, 5)
    assert wasted(ended(None, (10, 5)), ended("stream_cut", (None, None))) == (2, None, None)
    assert wasted(ended(None, (10, 5)), ended("cancelled", (None, None), None)) == (2, 10, 5)
    assert waste(reduced([two_arms.query("single", 0, [ended(None, (10, 5))], 0.0, 3.0)]), 0.0)["calls"] == 0


def test_the_client_is_not_charged_for_waits_off_the_critical_path() -> None:
    def call(number: int, sent_at: float, done_at: float, **more: Any) -> Call:
        return two_arms.call(number, (sent_at, None, done_at), (1, 0, 1), **more)

    tried = call(1, 0.0, 1.0, error="http_429", retry_at=3.0)
    again = call(1, 3.0, 4.0, attempt=2)
    beside, judge = call(2, 0.0, 3.5), call(3, 4.0, 5.0, after=[1, 2])
    found = resources([again, beside, judge], 0.0, 5.0, {}, [tried])
    assert (found["latency_s"], found["client_s"], found["retries"]) == (5.0, 0.0, 1)
    assert found["critical_path_s"] == 3.5 + 1.0  # of the calls as they counted
