"""Tasks (shared_out.py) on the processors of a Ray cluster. What a node that is lost was doing, Ray has done again by another.

A simulation may last as long as it likes, so no task has a limit; that the cluster answers while tasks are done has one.
"""

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from fanmark.loadgen.errors import UnreachableError
from fanmark.loadgen.ray_cluster import give_up, heard, on_a_processor, other_version, usable
from fanmark.loadgen.shared_out import Task

T = TypeVar("T")

_SILENT_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 2.0
_HEAR_EVERY_S = 2.0


class Processors:
    """See Workers. Those of all nodes that live, or so many of them."""

    def __init__(self, most: int | None, version: str) -> None:
        self._most = most
        self._version = version
        self._there = on_a_processor(_carried_out)
        self._running: dict[Future[Any], Any] = {}
        self.count = 0
        self._hear()

    def begin(self, task: Task) -> "Future[Any]":
        """See Workers. The first has Ray ask the head, too."""

        def ask() -> "tuple[Future[Any], Any]":
            ref = self._there.remote(task, self._version)
            return ref.future(), ref

        future, self._running[future] = _answered(ask)
        return future

    def result(self, done: "Future[Any]") -> Any:
        """See Workers."""
        return heard(done.result)

    def until_one_of(self, running: "Sequence[Future[Any]]") -> None:
        """See Workers. Nodes that have come are used from then on."""
        while not wait(running, _HEAR_EVERY_S, FIRST_COMPLETED).done:
            self._hear()
        self._running = {future: ref for future, ref in self._running.items() if not future.done()}

    def close(self) -> None:
        """Has what nobody needs any more end, and waits a moment for it: what is killed would leave its files on its node."""
        if self._running:
            with suppress(UnreachableError):
                _answered(lambda: give_up(list(self._running.values()), _END_TIMEOUT_S), 2 * _END_TIMEOUT_S)

    def _hear(self) -> None:
        nodes = _answered(usable)
        processors = sum(int(node["Resources"]["CPU"]) for node in nodes)
        if not processors:
            raise UnreachableError("no node of the Ray cluster has a CPU any more")
        self.count = min(processors, self._most or processors)


def _answered(ask: Callable[[], T], timeout_s: float = _SILENT_TIMEOUT_S) -> T:
    """What the cluster answers. Raises UnreachableError."""
    answer: Future[T] = Future()

    def carry() -> None:
        try:
            answer.set_result(ask())
        except Exception as e:
            answer.set_exception(e)

    threading.Thread(target=carry, daemon=True).start()  # Ray itself would wait for ever
    try:
        return heard(lambda: answer.result(timeout_s))
    except TimeoutError:
        raise UnreachableError(f"the head of the Ray cluster did not answer within {timeout_s:g} s") from None


def _carried_out(task: Task, version: str) -> Any:
    """On a node: what a task gives, if it is the same program that does it."""
    from importlib.metadata import version as known

    if known("fanmark") != version:
        raise other_version(socket.gethostname(), known("fanmark"), version)
    return task.result()
