"""Rules of docs/method.md on what stands beside a figure, held against any run and against runs that would break them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import two_arms
from hypothesis import given, settings
from hypothesis import strategies as st
from test_summary import CLIENT, SERVER, runs
from test_window import run

from fanmark.agents import topologies
from fanmark.loadgen.amplification import TIMES
from fanmark.loadgen.arrivals import of_arm
from fanmark.loadgen.records import Query
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.summary import summarise_arms, validity
from fanmark.loadgen.table import ROWS, lines

TITLES = {title: key for key, title in ROWS}


def cells(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell.strip()]


@settings(max_examples=60)
@given(runs())
def test_no_ratio_of_times_is_printed_without_the_load_of_both_arms(queries: list[Query]) -> None:
    found = summarise_arms(two_arms.scenario(), reduced(queries))
    printed = [cells(line) for line in lines(two_arms.whole(found, validity(found, SERVER, CLIENT, None)))]
    ratios = [row for row in printed if row and TITLES.get(row[0].strip()) in TIMES and "x" in row[-1]]
    if ratios:
        for title in ("queries/s", "calls in flight"):
            (row,) = (row for row in printed if row and row[0] == title)
            assert len(row) == 3 and "-" not in row[1:]


@pytest.mark.parametrize(("failed", "of", "flagged"), [(0, 1, False), (1, 100, False), (2, 199, True), (1, 99, True)])
def test_latencies_are_censored_where_more_than_one_in_a_hundred_failed(failed: int, of: int, flagged: bool) -> None:
    queries = [
        two_arms.query(
            "single", i, [two_arms.call(1, (0.0, 0.5, 1.0), (100, 0, 10))], 0.0, 1.0,
            outcome="failed" if i < failed else "completed",
        )
        for i in range(of)
    ]  # fmt: skip
    assert summarise_arms(two_arms.scenario(), reduced(queries))["single"]["censored"] is flagged


CONSTANT = "equal queries run in phase, latencies hold for this pattern only"


@pytest.mark.parametrize("answer", [20, {"dist": "lognormal", "mean": 20, "cv": 0.4, "min": 1}])
def test_constant_lengths_are_told(tmp_path: Path, answer: int | dict[str, Any]) -> None:
    workload = {"system": 20, "question": 40, "answer": answer, "judge_answer": 20}
    scenario = two_arms.scenario(load={"queries": 2, "rate": 4.0}, workload=workload)
    found = simulate(scenario, topologies(), Options(tmp_path / "run", "test", [])).summary
    assert any(CONSTANT in note for note in found["notes"]) is isinstance(answer, int)


def test_arms_apart_come_in_an_order_that_changes_from_repeat_to_repeat(tmp_path: Path) -> None:
    load = "queries = 1\nmode = 'closed'\nwarmup = 0\narms = 'apart'\nrepeats = 8"
    _, queries, _ = run(tmp_path, load)
    firsts = [next(q.arm for q in queries if q.repeat == repeat) for repeat in range(1, 9)]
    assert 0 < firsts.count("single") < 8
    assert all(before.done_at <= after.due_at for before, after in pairwise(queries))  # one query at a time
    (tmp_path / "again").mkdir()
    assert [q.arm for q in run(tmp_path / "again", load)[1]] == [q.arm for q in queries]


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_interleaved_arms_draw_arrivals_of_their_own(seed: int) -> None:
    scenario = two_arms.scenario(load={"duration": 200.0, "rate": 2.0}, seed=seed)
    single, debate = (list(of_arm(scenario, arm, 1)) for arm in scenario.arms)
    assert single and debate and not set(single) & set(debate)
    near = sum(any(abs(a - b) < 0.01 for b in debate) for a in single) / len(single)
    assert near < 0.15  # by chance 1 - exp(-0.04), of 400
