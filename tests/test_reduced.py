"""Records in columns: what goes in comes out, and how little of them is held."""

import tracemalloc
from pathlib import Path

import pytest
import two_arms
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.records import Gaps, Journal, read_queries
from fanmark.loadgen.reduced import Column, reduced

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
