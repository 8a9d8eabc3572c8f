"""Searches whose tasks are done by others find what they find alone, whoever does what, and when."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.errors import LostError, ScenarioError
from fanmark.loadgen.fleet_search import next_look
from fanmark.loadgen.search import Ask, Point, Search, may_follow
from fanmark.loadgen.shared_out import Search as Steps
from fanmark.loadgen.shared_out import Task, Want, carried_out, each, shared_by

SEARCH = Search(low=1.0, high=400.0, target=0.9, seeks="least", integer=True, within=0.0, looks=2, first=40)


def looked(given: tuple[int, float, int, int]) -> Point:
    """Of a fleet in which `least` carry all that comes, and fewer half of it."""
    least, x, queries, number = given
    good = queries if x >= least else queries // 2
    return Point(x, queries, good - number % 2)


def search(least: int, guess: int, asked: list[Ask]) -> Steps[list[Point]]:
    points: list[Point] = []
    while (ask := next_look(SEARCH, guess, points)) is not None:
        asked.append(ask)
        points.append((yield Want(task(least, ask, number(points, ask)), likely(least, guess, points, ask))))
    return points


def number(points: Sequence[Point], ask: Ask) -> int:
    return sum(point.x == ask.x for point in points)


def task(least: int, ask: Ask, number: int) -> Task:
    return Task(looked, (least, ask.x, ask.queries, number))


def likely(least: int, guess: int, points: Sequence[Point], ask: Ask) -> Iterator[Task]:
    for then, before in may_follow(lambda after: next_look(SEARCH, guess, after), points, ask, SEARCH.target):
        yield task(least, then, before)


class Drawn:
    """Workers of whom any may be done next. See Workers."""

    def __init__(self, count: int, draw: Any) -> None:
        self.count = count
        self.begun: list[Task] = []
        self._draw = draw
        self._running: list[tuple[Task, Future[Any]]] = []

    def begin(self, task: Task) -> "Future[Any]":
        assert task not in self.begun and len(self._running) < self.count
        self.begun.append(task)
        future: Future[Any] = Future()
        self._running.append((task, future))
        return future

    def until_one_of(self, running: "Sequence[Future[Any]]") -> None:
        assert [future for _, future in self._running] == list(running)
        task, future = self._running.pop(self._draw(st.integers(0, len(running) - 1)))
        future.set_result(task.result())

    def result(self, done: "Future[Any]") -> Any:
        return done.result()


@given(st.data(), st.integers(1, 7), st.lists(st.tuples(st.integers(1, 300), st.integers(1, 400)), max_size=4))
def test_a_search_finds_the_same_whoever_does_its_tasks(
    data: st.DataObject, count: int, wanted: list[tuple[int, int]]
) -> None:
    wanted = list({least: (least, guess) for least, guess in wanted}.values())
    alone: list[Ask] = []
    workers, asked = Drawn(count, data.draw), list[Ask]()
    expected = carried_out([search(least, guess, alone) for least, guess in wanted], None)
    assert carried_out([search(least, guess, asked) for least, guess in wanted], workers) == expected
    assert sorted(map(repr, asked)) == sorted(map(repr, alone))
    assert len(workers.begun) >= len(asked) and (count > 1 or len(workers.begun) == len(asked))


@pytest.mark.parametrize("least, guess", [(40, 30), (40, 60), (1, 5), (400, 90)])
def test_what_a_search_asks_for_next_was_thought_of(least: int, guess: int) -> None:
    """Where what was looked at passed or failed by full marks, each step was among the likely ones of the step before."""
    (points,) = carried_out([search(least, guess, [])], None)
    for i in range(len(points) - 1):
        ask = Ask(points[i].x, points[i].queries)
        assert task(least, Ask(points[i + 1].x, points[i + 1].queries), number(points[: i + 1], points[i + 1])) in list(
            likely(least, guess, points[:i], ask)
        )


def refused(given: int) -> int:
    if given == 3:
        raise ScenarioError("3: is refused")
    return given


def killed(given: int) -> None:
    os.kill(os.getpid(), 9)


def test_what_a_process_raises_or_how_it_dies_is_said() -> None:
    with shared_by(2, None, "") as workers:
        assert each(refused, [1, 2, 4], workers) == [1, 2, 4]
        with pytest.raises(ScenarioError, match="3: is refused"):
            each(refused, [1, 2, 3], workers)
        for function in (killed, refused):  # and no other is begun
            with pytest.raises(LostError, match="one of 2 processes that simulated ended by itself"):
                each(function, [1], workers)


def unending(told: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        told.write_text(folder)
        time.sleep(600)


def known(told: Path) -> str:
    while not (told.exists() and (folder := told.read_text())):
        time.sleep(0.01)
    return folder


def ahead(told: Path) -> Steps[str]:
    found: str = yield Want(Task(known, told), [Task(unending, told)])
    return found


def test_what_was_done_ahead_in_vain_leaves_no_files(tmp_path: Path) -> None:
    with shared_by(2, None, "") as workers:
        (folder,) = carried_out([ahead(tmp_path / "told")], workers)
        assert Path(folder).exists()
    assert not Path(folder).exists()
