"""Work that needs nothing but its arguments, shared out over processes, here or on a Ray cluster: simulations.

Rules of the file:
1. A search is a generator: it says what it needs, and goes on with what that gave. What a task gives does not depend on who did it, or
   when, so a search finds the same whatever the number of workers.
2. What a search may need next is done ahead, where a worker has nothing else to do. It counts only if it is needed then.
3. What a needed task raises is raised. A worker that is lost is an error; at the end nobody waits for what is no longer needed.
"""

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fanmark.loadgen.errors import LostError

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A module's own function, and what it is given. Two that are equal give the same."""

    function: Callable[[Any], Any]
    given: Any

    def result(self) -> Any:
        return self.function(self.given)


@dataclass(frozen=True)
class Want:
    """What a search needs next, and what it may need after that, the nearest first; it is asked for only where somebody has time."""

    needed: Task
    likely: Iterable[Task] = ()


Search = Generator[Want, Any, T]


class Workers(Protocol):
    """Those that do tasks elsewhere, so many at a time."""

    count: int

    def begin(self, task: Task) -> "Future[Any]": ...

    def result(self, done: "Future[Any]") -> Any:
        """What a task gave. Raises what it raised, or FanmarkError where it was lost."""

    def until_one_of(self, running: "Sequence[Future[Any]]") -> None:
        """Waits until one is done. Raises FanmarkError where nobody answers any more."""


def carried_out(searches: Sequence[Search[T]], workers: Workers | None) -> list[T]:
    """What each search returns; without workers one after another, here."""
    if workers is None:
        return [_by_itself(search) for search in searches]
    return _Shared(searches, workers).results()


def each(function: Callable[[Any], Any], given: Sequence[Any], workers: Workers | None) -> list[Any]:
    """What a module's own function makes of each, in their order."""
    return carried_out([_one(Task(function, one)) for one in given], workers)


def _one(task: Task) -> Search[Any]:
    return (yield Want(task))


def _by_itself(search: Search[T]) -> T:
    try:
        want = next(search)
        while True:
            want = search.send(want.needed.result())
    except StopIteration as e:
        found: T = e.value
        return found


class _Shared:
    """Searches that go on side by side."""

    def __init__(self, searches: Sequence[Search[Any]], workers: Workers) -> None:
        self._searches = searches
        self._workers = workers
        self._begun: list[tuple[Task, Future[Any]]] = []
        self._wants: dict[int, tuple[Task, Iterator[Task]]] = {}  # by search; in their order
        self._found: dict[int, Any] = {}

    def results(self) -> list[Any]:
        for i in range(len(self._searches)):
            self._go_on(i, None)
        while self._wants:
            if (known := self._next_known()) is not None:
                i, task, future = known
                self._begun.remove((task, future))
                self._go_on(i, self._workers.result(future))
            else:
                self._begin()
                self._workers.until_one_of(self._running())
        return [self._found[i] for i in range(len(self._searches))]

    def _next_known(self) -> "tuple[int, Task, Future[Any]] | None":
        """The first search that can go on."""
        for i, (task, _) in sorted(self._wants.items(), key=lambda item: item[0]):
            if (future := self._known(task)) is not None and future.done():
                return i, task, future
        return None

    def _go_on(self, i: int, result: Any) -> None:
        try:
            want = self._searches[i].send(result)
            self._wants[i] = want.needed, iter(want.likely)
        except StopIteration as e:
            self._wants.pop(i, None)
            self._found[i] = e.value

    def _begin(self) -> None:
        """What is needed first, whichever search needs it; then what may be."""
        wants = [self._wants[i] for i in sorted(self._wants)]
        needed = (task for task, _ in wants)
        likely = (task for _, tasks in wants for task in tasks)
        free = self._workers.count - len(self._running())
        for tasks in (needed, likely):
            while free > 0 and (task := next(tasks, None)) is not None:
                if self._known(task) is None:
                    self._begun.append((task, self._workers.begin(task)))
                    free -= 1

    def _known(self, task: Task) -> "Future[Any] | None":
        return next((future for one, future in self._begun if one == task), None)

    def _running(self) -> "list[Future[Any]]":
        return [future for _, future in self._begun if not future.done()]


@contextmanager
def shared_by(count: int | None, ray: str | None, version: str) -> Iterator[Workers]:
    """So many processes, or a cluster's processors, at most so many. Raises FanmarkError."""
    if ray is not None:
        from fanmark.loadgen.ray_cluster import connected
        from fanmark.loadgen.ray_tasks import Processors

        with asyncio.Runner() as runner:
            connection = connected(ray, version)
            runner.run(connection.__aenter__())
            try:
                with closing(Processors(count, version)) as processors:
                    yield processors
            finally:
                runner.run(connection.__aexit__(None, None, None))
    else:
        with _Processes(count or 1) as processes:
            yield processes


class _Processes:
    """Processes of this machine, started as they are needed. What is killed leaves its files behind: theirs are in one folder. See
    Workers."""

    def __init__(self, count: int) -> None:
        import multiprocessing
        import tempfile
        from concurrent.futures import ProcessPoolExecutor

        self.count = count
        self._files = tempfile.TemporaryDirectory(prefix="fanmark-")
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, spawn, _attached, (self._files.name,))

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *error: object) -> None:
        import multiprocessing

        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        self._files.cleanup()

    def begin(self, task: Task) -> "Future[Any]":
        with self._all():
            return self._pool.submit(task.result)

    def result(self, done: "Future[Any]") -> Any:
        with self._all():
            return done.result()

    def until_one_of(self, running: "Sequence[Future[Any]]") -> None:
        wait(running, return_when=FIRST_COMPLETED)  # a process that is lost ends its task

    @contextmanager
    def _all(self) -> Iterator[None]:
        """Raises LostError where one of them is gone: the others go with it."""
        from concurrent.futures.process import BrokenProcessPool

        try:
            yield
        except BrokenProcessPool:
            raise LostError(
                f"one of {self.count} processes that simulated ended by itself: is there memory for so many? --workers"
            ) from None


def _attached(files: str) -> None:
    """In a process: it leaves Ctrl-C to the one that began it, and ends with that one however it ends. Its temporary files go to that
    folder."""
    import multiprocessing
    import os
    import shutil
    import signal
    import tempfile
    import threading
    from multiprocessing.connection import wait as until

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = files
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        until([parent.sentinel])
        shutil.rmtree(files, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
