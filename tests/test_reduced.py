"""Records in columns: what goes in comes out, and how little of them is held."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import two_arms
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.column import Column
from fanmark.loadgen.records import Gaps, Journal, read_queries
from fanmark.loadgen.reduced import Reduced, Rows, joined, pieces, reduced
from fanmark.loadgen.summary import summarise_arms

wholes = st.none() | st.integers(-130, 130) | st.integers(-(2**40), 2**40)
fractions = st.none() | st.integers(-130, 130).map(float) | st.floats(allow_nan=False)


@given(st.lists(wholes) | st.lists(fractions))
def test_a_column_gives_back_what_was_put_in(values: list[float | None]) -> None:
    column = Column()
    for value in values:
        column.append(value)
    assert list(map(repr, column)) == [repr(value + 0.0 if isinstance(value, float) else value) for value in values]
    assert list(column.known()) == [value for value in values if value is not None]
    assert (len(column), column.unknown) == (len(values), values.count(None))


@given(st.lists(st.one_of(wholes, fractions)), st.lists(st.one_of(wholes, fractions)))
def test_a_column_behind_another_is_one_column(values: list[float | None], more: list[float | None]) -> None:
    both, first, then = Column(), Column(), Column()
    for value in values:
        both.append(value)
        first.append(value)
    for value in more:
        both.append(value)
        then.append(value)
    first.extend(pickle.loads(pickle.dumps(then)))
    assert (list(first), len(first), first.unknown) == (list(both), len(both), both.unknown)


def held(run: Reduced) -> dict[str, Any]:
    """All that it holds, in its order."""

    def rows(found: Rows[Any]) -> Any:
        return [(kind, {name: list(column) for name, column in part.items()}) for kind, part in found._parts.items()]

    return vars(run) | {"queries": rows(run.queries), "calls": rows(run.calls), "_objective": None}


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=7, max_size=7), st.integers(1, 12))
def test_what_follows_from_parts_joined_is_what_follows_from_all(by: list[int], rows: int) -> None:
    """Whoever made which queries, and in pieces of whatever size they come."""
    scenario, every = two_arms.scenario(), two_arms.queries()
    shares = [[query for query, worker in zip(every, by, strict=True) if worker == mine] for mine in range(4)]
    in_order = [query for share in shares for query in share]
    sent = [piece for share in shares for piece in pieces(share, scenario.objective, rows)]
    assert len(sent) <= 4 + len(every)
    whole, found = reduced(in_order, scenario.objective), joined(pickle.loads(pickle.dumps(sent)))
    mine, theirs = held(found), held(whole)
    for arm, sums in mine.pop("sums").items():  # the last bits of these depend on the order of adding up
        other = vars(theirs["sums"][arm])
        assert sums.spent_s == pytest.approx(other["spent_s"], abs=1e-12) and sums.lost_s == pytest.approx(
            other["lost_s"]
        )
        assert (sums.gaps, sums.failures) == (other["gaps"], other["failures"])
    assert len(theirs.pop("sums")) == len(found.sums) and mine == theirs
    arms = [summarise_arms(scenario, each) for each in (found, whole)]
    spent = [{name: arm.pop("critical_path") for name, arm in each.items()} for each in arms]
    assert json.dumps(arms[0]) == json.dumps(arms[1])
    assert all(spent[0][name] == pytest.approx(share, abs=1e-12) for name, share in spent[1].items() if share)


def test_rows_of_some_kinds_and_their_groups() -> None:
    run = reduced(two_arms.queries())
    debate = run.where(lambda kind: kind.arm == "debate" and not kind.warmup)
    assert (len(run.queries), len(debate.queries), len(debate.calls)) == (7, 3, 10)
    outcomes = {name: sorted(mine["number"]) for name, mine in debate.queries.by(lambda kind: kind.outcome).items()}
    assert outcomes == {"completed": [0, 1], "failed": [2]}
    assert debate.calls.counts(lambda kind: kind.error) == {None: 9, "http_5xx": 1}
    assert (debate.calls.unknown("input_tokens"), debate.calls.total("input_tokens")) == (3, None)
    assert sum(debate.calls.known("input_tokens")) == 900


@pytest.mark.parametrize("per_query", [1, 9])
def test_what_is_held_of_a_call_more_is_little(per_query: int, tmp_path: Path) -> None:
    """Its share of its query included; as objects the gaps of a call alone take a kilobyte."""
    held, most = [], []
    for queries in (200 // per_query, 2_000 // per_query):
        folder = tmp_path / str(queries)
        folder.mkdir()
        journal = Journal(folder, through=True)
        for number in range(queries):
            gaps = Gaps()
            for kind in range(20):
                gaps.add(0.02 + kind * 1e-3)
            at = number * 1.1
            calls = [
                two_arms.call(n, (at + 0.1, at + 0.1 * n + 0.01, at + n), (900 + n, 64, 20), gaps=gaps.counts())
                for n in range(1, per_query + 1)
            ]
            journal.write(two_arms.query("single", number, calls, at, at + per_query))
        journal.close()
        tracemalloc.start()
        try:
            run = reduced(read_queries(folder))
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(run.calls) == queries * per_query
        held.append(now)
        most.append(peak)
    more = per_query * (2_000 // per_query - 200 // per_query)
    limit = 50 + 150 / per_query
    assert (held[1] - held[0]) / more < limit
    assert (most[1] - most[0]) / more < limit
