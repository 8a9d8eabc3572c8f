"""Records: depth, width and critical path against brute force; the journal comes back as it was written."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.records import (
    Call,
    Gaps,
    Journal,
    Query,
    bucket_gap_s,
    critical_path,
    gap_bucket,
    in_order,
    read_queries,
    shape,
)


def call(number: int, after: list[int], seconds: float, kind: Any = "call", **more: Any) -> Call:
    at = float(number)
    return Call(
        query=0, arm="a", call=number, after=after, kind=kind, role="agent", round=1, due_at=at, sent_at=at,
        done_at=at + seconds, **more,
    )  # fmt: skip


def query(number: int, calls: list[Call], arm: str = "a", **more: Any) -> Query:
    return Query(
        query=number, arm=arm, warmup=number < 0, due_at=0.5, started_at=0.75, done_at=9.5, outcome="completed",
        resources={"calls": 2, "cached_tokens": None, "dollars": 1.5e-6}, expected={"calls": 2, "input_tokens": None},
        mismatches=["calls"], seed=f"7/{number}", calls=calls, **more,
    )  # fmt: skip


@st.composite
def dags(draw: st.DrawFn) -> list[Call]:
    """Up to nine calls and tool calls, each after any of the earlier ones, in any order."""
    calls = []
    for n in range(1, draw(st.integers(0, 9)) + 1):
        after = draw(st.lists(st.integers(1, n - 1), unique=True, max_size=3)) if n > 1 else []
        kind = draw(st.sampled_from(["call", "call", "tool_call"]))
        calls.append(call(n, after, draw(st.integers(0, 64)) / 4, kind))
    return draw(st.permutations(calls))


def chains(calls: list[Call]) -> list[list[Call]]:
    """Every chain of dependencies, the empty one too."""
    by_number = {c.call: c for c in calls}

    def ending(c: Call) -> list[list[Call]]:
        return [[c]] + [[*chain, c] for n in c.after for chain in ending(by_number[n])]

    return [[]] + [chain for c in calls for chain in ending(c)]


@settings(max_examples=60)
@given(dags())
def test_shape_and_critical_path_are_those_of_all_chains(calls: list[Call]) -> None:
    every = chains(calls)
    depth_of = {
        c.call: max(sum(d.kind == "call" for d in chain) for chain in every if chain and chain[-1] is c)
        for c in calls
        if c.kind == "call"
    }
    at_depth = [sum(d == k for d in depth_of.values()) for k in set(depth_of.values())]
    seconds = [c.seconds for c in calls]
    assert shape(calls) == {
        "depth": max(depth_of.values(), default=0),
        "width": max(at_depth, default=0),
        "work_s": sum(seconds),  # quarters add up exactly
        "critical_path_s": max(sum(c.seconds for c in chain) for chain in every),
        "tool_s": sum(c.seconds for c in calls if c.kind == "tool_call"),
    }
    path = critical_path(calls)
    assert sum(c.seconds for c in path) == max(sum(c.seconds for c in chain) for chain in every)
    assert all(before.call in c.after for before, c in pairwise(path))


def test_the_shape_of_a_debate_with_tools() -> None:
    calls = [
        call(1, [], 2.0),
        call(2, [], 3.0),
        call(3, [2], 0.5, "tool_call"),
        call(4, [1, 3], 1.0),
        call(5, [1, 3], 4.0),
        call(6, [4, 5], 1.5),
    ]
    found = {"depth": 3, "width": 2, "work_s": 12.0, "critical_path_s": 9.0, "tool_s": 0.5}
    assert shape(calls) == found
    assert [c.call for c in critical_path(calls)] == [2, 3, 5, 6]
    assert shape([]) == {"depth": 0, "width": 0, "work_s": 0, "critical_path_s": 0, "tool_s": 0}


def test_a_call_that_was_never_sent_took_no_time() -> None:
    unsent = call(1, [], 3.0)
    unsent.sent_at = None
    assert unsent.seconds == 0.0
    running = call(1, [], 3.0)
    running.done_at = None
    assert running.seconds == 0.0
    at_zero = call(1, [], 3.0)
    at_zero.sent_at, at_zero.done_at = 0.0, 2.0
    assert at_zero.seconds == 2.0


def test_a_dependency_that_was_not_recorded_counts_for_nothing() -> None:
    assert shape([call(4, [2], 1.0)])["depth"] == 1
    assert [c.call for c in critical_path([call(4, [2], 1.0)])] == [4]


@given(st.floats(1e-6, 1e4))
def test_a_gap_is_known_to_a_tenth_of_a_percent(gap_s: float) -> None:
    assert bucket_gap_s(gap_bucket(gap_s)) == pytest.approx(gap_s, rel=0.00101)


@given(st.lists(st.tuples(st.floats(1e-5, 10), st.integers(1, 9)), max_size=400))
def test_gaps_of_many_kinds_are_few_and_known_to_two_percent(given: list[tuple[float, int]]) -> None:
    gaps = Gaps()
    for gap_s, times in given:
        gaps.add(gap_s, times)
    exact = sorted(gap_s for gap_s, times in given for _ in range(times))
    found = sorted(bucket_gap_s(bucket) for bucket, times in gaps.counts().items() for _ in range(times))
    assert found == pytest.approx(exact, rel=0.0202)


@given(st.lists(st.floats(0.02, 0.03), max_size=2000))
def test_gaps_of_one_size_take_few_buckets(given: list[float]) -> None:
    gaps = Gaps()
    for gap_s in given:
        gaps.add(gap_s)
    assert (
        sum(gaps.counts().values()) == len(given)
        and len(gaps.counts()) <= math.ceil(math.log(1.5) / math.log(1.02)) + 2
    )


def test_the_smallest_gaps_share_a_bucket() -> None:
    assert gap_bucket(0.0) == gap_bucket(1e-9) == gap_bucket(1e-6) == math.floor(math.log(1e-6) / math.log(1.002))


def journal(folder: Path, queries: list[Query]) -> None:
    written = Journal(folder)
    for one in queries:
        written.write(one)
    written.close()


counts = st.none() | st.integers(0, 2**53)
instants = st.none() | st.floats(0, 1e6)
calls_of_any_kind = st.builds(
    Call,
    query=st.just(3), arm=st.just("a"), call=st.integers(1, 99), after=st.lists(st.integers(1, 99), max_size=3),
    kind=st.sampled_from(["call", "tool_call"]), role=st.text(max_size=9), round=st.integers(1, 9),
    target=st.none() | st.text(max_size=9), tool=st.none() | st.text(max_size=9), due_at=st.floats(0, 1e6),
    sent_at=instants, first_at=instants, answer_at=instants, done_at=instants, input_tokens=counts,
    cached_tokens=counts, output_tokens=counts, reasoning_tokens=counts, finish=st.none() | st.just("length"),
    attempt=st.integers(1, 3), retry_at=st.none(), error=st.none() | st.just("http_5xx"), message=st.none() | st.text(max_size=9),
    tool_error=st.booleans(), lane=st.none() | st.just("aiohttp"), worker=st.integers(0, 3),
    gaps=st.dictionaries(st.integers(-700, 500), st.integers(1, 99), max_size=4), coalesced=st.integers(0, 9),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(calls_of_any_kind, max_size=3))
def test_what_was_written_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, calls: list[Call]) -> None:
    folder = tmp_path_factory.mktemp("run")
    written = [query(3, calls, error="http_5xx: no\nmore"), query(4, [])]
    journal(folder, written)
    assert list(read_queries(folder)) == written
    again = tmp_path_factory.mktemp("again")
    journal(again, list(read_queries(folder)))  # as of a worker that died
    assert list(read_queries(again)) == written
    assert (again / "calls.jsonl").read_bytes() == (folder / "calls.jsonl").read_bytes()


def test_calls_without_a_query_are_passed_over_and_queries_without_calls_are_not(tmp_path: Path) -> None:
    def own(number: int, calls: int) -> Query:
        mine = [call(n, [], 1.0) for n in range(1, calls + 1)]
        for each in mine:
            each.query = number
        found = query(number, mine)
        found.resources["calls"] = calls
        return found

    written = [own(number, calls) for number, calls in enumerate([2, 0, 3, 1, 0, 0, 2])]
    journal(tmp_path, written)
    lines = (tmp_path / "queries.jsonl").read_bytes().splitlines(True)
    (tmp_path / "queries.jsonl").write_bytes(b"".join(lines[:2] + lines[3:]))
    assert list(read_queries(tmp_path)) == written[:2] + written[3:]


def test_calls_find_their_query_by_arm_and_number(tmp_path: Path) -> None:
    def own(number: int, arm: str) -> Query:
        mine = call(1, [], 1.0)
        mine.query, mine.arm = number, arm
        return query(number, [mine], arm)

    written = [own(n, arm) for n in (-1, 0, 1) for arm in ("a", "b")]
    journal(tmp_path, written)
    assert list(read_queries(tmp_path)) == written
    assert [q.warmup for q in read_queries(tmp_path)] == [True, True, False, False, False, False]


def test_the_lines_hold_what_others_script_against(tmp_path: Path) -> None:
    journal(tmp_path, [query(3, [call(1, [], 1.0), call(2, [1], 1.0, "tool_call", tool="now", gaps={-3: 2})])])
    first, second = map(msgspec.json.decode, (tmp_path / "calls.jsonl").read_bytes().splitlines())
    assert set(first) >= {
        "query", "arm", "call", "after", "kind", "role", "round", "target", "tool", "due_at", "sent_at", "first_at",
        "answer_at", "done_at", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "finish",
        "attempt", "retry_at", "error", "message", "tool_error", "lane", "worker", "gaps", "coalesced",
    }  # fmt: skip
    assert (first["query"], first["input_tokens"], second["tool"], second["gaps"]) == (0, None, "now", {"-3": 2})
    (row,) = map(msgspec.json.decode, (tmp_path / "queries.jsonl").read_bytes().splitlines())
    assert set(row) >= {
        "query", "arm", "warmup", "due_at", "started_at", "done_at", "outcome", "resources", "expected", "mismatches",
        "seed", "error",
    }  # fmt: skip


@given(st.lists(st.floats(0, 100), max_size=20))
def test_of_a_chain_all_work_is_on_the_critical_path_to_the_last_digit(seconds: list[float]) -> None:
    found = shape([call(n, [n - 1] * (n > 1), s) for n, s in enumerate(seconds, start=1)])
    assert found["critical_path_s"] == found["work_s"]


def test_a_killed_runs_last_lines_are_left_out(tmp_path: Path) -> None:
    written = [query(n, [call(1, [], 1.0), call(2, [1], 2.0)]) for n in range(3)]
    for one in written:
        for each in one.calls:
            each.query = one.query
    journal(tmp_path, written)
    for name in ("queries.jsonl", "calls.jsonl"):
        whole = (tmp_path / name).read_bytes()
        last = whole.rstrip(b"\n").rindex(b"\n") + 1
        for end in (last + 1, (last + len(whole)) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:end])
            found = list(read_queries(tmp_path))
            if name == "queries.jsonl":
                assert found == written[:2]  # and the third one's calls have no query
            else:
                assert found == [*written[:2], query(2, written[2].calls[:1])]
        (tmp_path / name).write_bytes(whole)
    assert list(read_queries(tmp_path)) == written


def test_a_journal_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    growing = Journal(tmp_path)
    growing.write(query(0, [call(1, [], 1.0)]))
    growing.flush()
    assert [q.query for q in read_queries(tmp_path)] == [0]
    growing.write(query(1, []))
    growing.close()
    assert [q.query for q in read_queries(tmp_path)] == [0, 1]


def test_calls_are_put_in_the_order_of_their_numbers() -> None:
    assert [c.call for c in in_order([call(3, [], 1.0), call(1, [], 1.0), call(2, [], 1.0)])] == [1, 2, 3]
