"""Calls grouped into queries: by each kind of id, by content, and as six frameworks send them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.lanes.sse import parse_body, reply_of
from fanmark.loadgen.records import shape
from fanmark.loadgen.tap.asked import asked_of
from fanmark.loadgen.tap.grouping import Grouping
from fanmark.loadgen.tap.ids import names, retries
from fanmark.loadgen.tap.record import TappedCall, numbered
from fanmark.loadgen.tap.replies import whole_reply
from fanmark.loadgen.tap.seen import Answer, Group, Seen

FRAMEWORKS = sorted((Path(__file__).parent / "data" / "frameworks").glob("*.json"))
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
APIS = {"chat/completions": "chat", "responses": "responses", "messages": "messages"}


class Traffic:
    """Calls one after another, a second each."""

    def __init__(self, idle_s: float = 10.0) -> None:
        self.grouping = Grouping(idle_s)
        self.at, self.n = 0.0, 0

    def begin(self, *messages: str | dict[str, Any], headers: dict[str, str] | None = None, **fields: Any) -> Seen:
        """A chat request; texts are the system's, the user's and the assistant's in turn."""
        roles = ("system", "user", "assistant")
        told = [
            m if isinstance(m, dict) else {"role": roles[min(i, 1 + (i - 1) % 2)], "content": m}
            for i, m in enumerate(messages)
        ]
        body = json.dumps({"messages": told, **fields}).encode()
        asked = asked_of("chat", body)
        assert asked is not None
        self.n += 1
        return self.grouping.call(self.n, self.at, headers or {}, asked, body)

    def end(self, seen: Seen, text: str = "", *asks: ToolAsk, failed: bool = False) -> Seen:
        self.at += 1.0
        self.grouping.end(seen, self.at, Answer(text, asks, failed))
        return seen

    def call(self, *messages: str | dict[str, Any], says: str = "so it is, and no other way", **more: Any) -> Seen:
        return self.end(self.begin(*messages, **more), says)

    def wait(self, seconds: float) -> None:
        self.at += seconds
        self.grouping.idle(self.at)


@pytest.mark.parametrize(
    ("headers", "body", "method"),
    [
        ({"x-fanmark-query": "q", "traceparent": TRACE}, {"user": "u"}, "header"),
        ({"baggage": "fanmark.run=r,fanmark.arm=a,fanmark.query=3;p=1", "traceparent": TRACE}, {}, "baggage"),
        ({"baggage": "a=b, session.id=s%201", "x-session-id": "t"}, {}, "baggage"),
        ({"traceparent": TRACE, "x-session-id": "s"}, {}, "traceparent"),
        ({"traceparent": "00-" + "0" * 32 + "-b7ad6b7169203331-01", "x-session-id": "s"}, {}, "session"),
        ({"langfuse-session-id": "s"}, {"metadata": {"session_id": "m"}}, "session"),
        ({}, {"metadata": {"session_id": "m"}, "user": "u"}, "metadata"),
        ({}, {"metadata": {"session": "m"}, "user": "u"}, "metadata"),
        ({}, {"litellm_session_id": "m", "prompt_cache_key": "k"}, "metadata"),
        ({}, {"prompt_cache_key": "k", "user": "u"}, "prompt_cache_key"),
        ({}, {"user": "u"}, "user"),
        ({}, {"metadata": {"user_id": "u"}}, "user"),
        ({"authorization": "Bearer s"}, {"metadata": {"session_id": 7}, "user": ""}, None),
    ],
)
def test_the_first_name_that_is_there_counts(headers: dict[str, str], body: dict[str, Any], method: str | None) -> None:
    asked = asked_of("chat", json.dumps({"messages": [], **body}).encode())
    assert asked is not None
    assert [name.method for name in names(headers, asked.ids)][:1] == ([method] if method else [])


def test_a_name_of_a_query_joins_calls_that_share_nothing_else() -> None:
    traffic = Traffic()
    first = traffic.call("s", "one question", headers={"x-fanmark-query": "q"})
    other = traffic.call("s", "one question", headers={"x-fanmark-query": "r"})
    second = traffic.call("t", "quite another one", headers={"x-fanmark-query": "q"})
    assert first.query is second.query is not other.query
    assert second.after == [first] and second.by_time


def test_two_names_of_one_query_are_known_to_be_so() -> None:
    traffic = Traffic()
    first = traffic.call("s", "one question", headers={"traceparent": TRACE})
    baggage = {"baggage": "fanmark.run=r,fanmark.arm=a,fanmark.query=3", "traceparent": TRACE}
    tool = traffic.grouping.tool_call(9, traffic.at, baggage, "look", {})
    assert tool.query is first.query


def test_a_session_in_baggage_counts_before_the_traces_of_its_requests() -> None:
    """As of a client that makes a trace for each request; a tool call that has such a trace alone belongs there too."""
    traffic = Traffic()
    traces = [TRACE.replace("0af7", f"{n:04x}") for n in (1, 2)]
    first, second = (
        traffic.call("s", f"one question, part {trace}", headers={"baggage": "session.id=s", "traceparent": trace})
        for trace in traces
    )
    tool = traffic.grouping.tool_call(9, traffic.at, {"traceparent": traces[1]}, "look", {})
    assert first.query is second.query is tool.query and first.query.attributed == "baggage"


def test_a_session_goes_on_to_its_next_query_with_the_users_next_turn() -> None:
    traffic, session = Traffic(), {"x-session-id": "s"}
    first = traffic.end(traffic.begin("s", "find out", headers=session), "", ToolAsk("id-1", "look", "{}"))
    asked = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "id-1", "function": {"name": "look", "arguments": "{}"}}],
    }
    result = {"role": "tool", "tool_call_id": "id-1", "content": "nothing at all"}
    second = traffic.call("s", "find out", asked, result, headers=session, says="there is nothing to be found")
    assert second.query is first.query and second.after == [first] and second.round == 2
    history = ["s", "find out", asked, result, {"role": "assistant", "content": "there is nothing to be found"}]
    third = traffic.call(*history, {"role": "user", "content": "look again"}, headers=session)
    assert third.query is not first.query and third.round == 1
    assert (first.query.session, third.query.session, third.query.turn) == (1, 1, 2)
    assert [query.calls for query in traffic.grouping.closed] == [[first, second]]


def test_an_observation_is_no_users_turn() -> None:
    traffic = Traffic()
    first = traffic.call("s", "find out", says="I shall look it up in the book")
    history = ["s", "find out", "I shall look it up in the book", "Observation: page 7 is torn"]
    assert traffic.call(*history).query is first.query


def test_a_query_ends_when_it_is_idle_and_later_while_a_tool_is_awaited() -> None:
    traffic = Traffic()
    traffic.call("s", "a first question", says="a first answer, in full")
    waiting = traffic.end(traffic.begin("s", "a second question"), "", ToolAsk("id-2", "look", '{"at": "it"}'))
    traffic.wait(10)
    assert list(traffic.grouping.open) == [waiting.query]
    traffic.wait(80)
    assert list(traffic.grouping.open) == [waiting.query]
    traffic.wait(20)
    assert not traffic.grouping.open


def test_what_comes_after_the_end_is_a_query_of_its_own_and_counted() -> None:
    traffic = Traffic()
    first = traffic.call("s", "a question", headers={"traceparent": TRACE})
    traffic.wait(11)
    late = traffic.call("s", "a question", headers={"traceparent": TRACE})
    assert late.query is not first.query and traffic.grouping.reopened == 1


def test_a_lone_call_is_not_attributed_and_alike_ones_are_not_joined() -> None:
    traffic = Traffic()
    one, two = traffic.begin("s", "the very same question"), traffic.begin("s", "the very same question")
    for seen in (one, two):
        traffic.end(seen, "an answer to it")
    assert one.query is not two.query
    assert [seen.query.attributed for seen in (one, two)] == ["none", "none"]


def test_agents_that_were_asked_at_once_are_one_query_when_their_answers_are_read_together() -> None:
    traffic = Traffic()
    begun = [traffic.begin(f"You are agent {i}", "What is it to be?") for i in range(3)]
    answers = [f"I hold that it is to be number {i}" for i in range(3)]
    for seen, answer in zip(begun, answers, strict=True):
        traffic.end(seen, answer)
    judge = traffic.call("You judge", "They said:\n- " + "\n- ".join(answers))
    assert {seen.query for seen in begun} == {judge.query}
    assert judge.after == begun and judge.query.attributed == "content"


def test_a_tool_call_belongs_to_the_reply_that_asked_for_it_and_to_none_where_several_did() -> None:
    traffic = Traffic()
    ask = ToolAsk("id-1", "server__look", '{"at": 7}')
    first = traffic.end(traffic.begin("s", "find out"), "", ask)
    assert traffic.grouping.tool_call(5, traffic.at, {}, "look", {"at": 7}).after == [first]
    again = [
        traffic.end(traffic.begin("s", f"find out {i}"), "", ToolAsk(f"id-{i}", "look", '{"at": 8}')) for i in (2, 3)
    ]
    unclear = traffic.grouping.tool_call(9, traffic.at, {}, "look", {"at": 8})
    assert unclear.query.attributed == "none" and unclear.query not in [seen.query for seen in again]


@pytest.mark.parametrize(
    ("system", "told", "joins"),
    [("expert", "Paris", True), ("lead", "Paris", False), ("lead", "Paris, or Lyon if it rains", True)],
)
def test_who_is_told_an_open_calls_argument_is_its_child(system: str, told: str, joins: bool) -> None:
    """A short one may be what a user of the same agent asks of their own."""
    traffic = Traffic()
    lead = traffic.end(traffic.begin("lead", "where to?"), "", ToolAsk("id-1", "expert", json.dumps({"task": told})))
    assert (traffic.call(system, told).query is lead.query) == joins


def test_what_several_queries_say_alike_is_of_none_unless_all_of_it_is_read() -> None:
    """The same question twice at once: whose child it is, and whose answer a critic reads, cannot be told. A judge reads both."""
    traffic = Traffic()
    ask = '{"task": "find out how high the tower is"}'
    both = [traffic.begin("lead", "a question") for _ in range(2)]
    for i, seen in enumerate(both):
        traffic.end(seen, "", ToolAsk(f"call-of-number-{i}", "expert", ask))
    child = traffic.call("expert", "find out how high the tower is", says="324 metres, as far as anybody knows")
    assert len({child.query, *(seen.query for seen in both)}) == 3
    answers = [traffic.call("lead", f"question {i}", says="it is as high as a tower can be") for i in range(2)]
    critic = traffic.call("critic", "it is as high as a tower can be", says="no more than that")
    assert len({critic.query, *(seen.query for seen in answers)}) == 3
    judge = traffic.call("judge", "1. it is as high as a tower can be 2. it is as high as a tower can be")
    assert {seen.query for seen in answers} == {judge.query}


def test_what_an_sdk_sends_again_is_the_same_call() -> None:
    traffic = Traffic()
    failed = traffic.end(traffic.begin("s", "a question"), failed=True)
    again = traffic.call("s", "a question", headers={"x-stainless-retry-count": "1"})
    assert again.query.calls == [again] and again.failed_before == [failed] and again.attempt == 2
    assert again.after == [] and not again.by_time
    assert retries({"x-stainless-retry-count": "3"}) == 3 and retries({"x-stainless-retry-count": "-1"}) == 0


def shown(query: Group) -> dict[str, Any]:
    """Its shape, as a run's records tell it."""
    numbers = numbered(query)
    calls = [
        TappedCall(
            query=0, arm="a", call=n, after=[numbers[e] for e in seen.after], kind="call", role="r", round=1, due_at=0.0
        )
        for seen, n in numbers.items()
    ]  # fmt: skip
    return shape(calls)


def longest_pause(requests: Sequence[Mapping[str, Any]]) -> float:
    """Seconds for which nothing of a question is in flight, at most."""
    questions = [[each for each in requests if each["query"] == question] for question in range(3)]
    return max(later["sent_at"] - each["done_at"] for calls in questions for each, later in pairwise(calls))


# Also at a pace at which agents pause nine times as long as ends a query, as a tool call is open; a team's next speaker is called by none.
PACES = [(path, 0.9) for path in FRAMEWORKS] + [(path, 9.0) for path in FRAMEWORKS if "team" not in path.stem]


@pytest.mark.parametrize(("path", "pause_s"), PACES, ids=lambda each: getattr(each, "stem", str(each)))
def test_three_questions_at_once_are_told_apart_as_frameworks_send_them(path: Path, pause_s: float) -> None:
    recorded = json.loads(path.read_text())
    grouping = Grouping(1.0)
    requests = recorded["requests"]
    slow = pause_s / longest_pause(requests)
    seen: dict[int, Seen] = {}
    moments = [(slow * r["sent_at"], 1, i) for i, r in enumerate(requests)] + [
        (slow * r["done_at"], 0, i) for i, r in enumerate(requests)
    ]
    for at, begins, i in sorted(moments):
        grouping.idle(at)
        api = APIS[requests[i]["path"].removeprefix("/v1/")]
        if begins:
            body = json.dumps(requests[i]["body"]).encode()
            asked = asked_of(api, body)
            assert asked is not None
            seen[i] = grouping.call(i, at, requests[i]["headers"], asked, body)
        else:
            reply = json.dumps(requests[i]["reply"]).encode()
            chunk, id = whole_reply(api, reply) if api != "chat" else (None, None)
            told = reply_of(chunk, at) if chunk is not None else parse_body(reply, at)
            grouping.end(seen[i], at, Answer(told.text, told.asks, id=id))
    groups = {request["query"]: seen[i].query for i, request in enumerate(requests)}
    assert all(seen[i].query is groups[request["query"]] for i, request in enumerate(requests))
    assert len(set(groups.values())) == len(groups) == 3
    assert Counter(query.attributed for query in groups.values()) == {"content": 3}
    assert {len(query.calls) for query in groups.values()} == {recorded["calls"]}
    assert {shown(query)["depth"] for query in groups.values()} == {recorded["depth"]}


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 4)), max_size=30))
def test_every_call_is_in_one_query_whatever_comes(steps: list[tuple[int, bool, int]]) -> None:
    traffic, begun = Traffic(idle_s=3), list[Seen]()
    for who, by_name, words in steps:
        headers = {"x-session-id": str(who)} if by_name else {}
        begun.append(traffic.begin("s", *(f"text {n}, of a conversation" for n in range(words)), headers=headers))
        if who % 2:
            for seen in [each for each in begun if each.ended_at is None]:
                traffic.end(seen, f"text {words}, of a conversation")
        traffic.wait(who)
    traffic.grouping.close()
    queries = traffic.grouping.closed
    assert sorted(seen.n for query in queries for seen in query.calls) == [seen.n for seen in begun]
    assert all(seen.query is query for query in queries for seen in query.calls)
    assert all(earlier.n < seen.n for query in queries for seen in query.calls for earlier in seen.after)
