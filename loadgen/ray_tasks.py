"""Tasks (shared_out.py) on the processors of a Ray cluster. What a node that is lost was doing, Ray has done again by another.

A simulation may last as long as it likes, so no task has a limit; that the cluster answers while tasks are done has one.
"""

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from fanmark.loadgen.errors import FanmarkError, UnreachableError
from fanmark.loadgen.ray_cluster import lost, other_version, usable
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
        self._there = _on_a_processor()
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
        from ray.exceptions import RayError, RayTaskError

        try:
            return done.result()
        except RayError as e:
            if isinstance(e, RayTaskError) and isinstance(e.cause, FanmarkError):
                raise e.cause from None
            raise lost(e) from None

    def until_one_of(self, running: "Sequence[Future[Any]]") -> None:
        """See Workers. Nodes that have come are used from then on."""
        while not wait(running, _HEAR_EVERY_S, FIRST_COMPLETED).done:
            self._hear()
        self._running = {future: ref for future, ref in self._running.items() if not future.done()}

    def close(self) -> None:
        """Has what nobody needs any more end, and waits a moment for it: what is killed would leave its files on its node."""
        import ray

        def cancel() -> None:
            refs = list(self._running.values())
            for ref in refs:
                ray.cancel(ref)
            ray.wait(refs, num_returns=len(refs), timeout=_END_TIMEOUT_S)

        if self._running:
            with suppress(UnreachableError):
                _answered(cancel, 2 * _END_TIMEOUT_S)

    def _hear(self) -> None:
        nodes = _answered(usable)
        processors = sum(int(node["Resources"]["CPU"]) for node in nodes)
        if not processors:
            raise UnreachableError("no node of the Ray cluster has a CPU any more")
        self.count = min(processors, self._most or processors)


def _on_a_processor() -> Any:
    import ray

    return ray.remote(_carried_out).options(num_cpus=1)


def _answered(ask: Callable[[], T], timeout_s: float = _SILENT_TIMEOUT_S) -> T:
    """What the cluster answers. Raises UnreachableError."""
    from ray.exceptions import RayError

    answer: Future[T] = Future()

    def carry() -> None:
        try:
            answer.set_result(ask())
        except Exception as e:
            answer.set_exception(e)

    threading.Thread(target=carry, daemon=True).start()  # Ray itself would wait for ever
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        raise UnreachableError(f"the head of the Ray cluster did not answer within {timeout_s:g} s") from None
    except RayError as e:
        raise lost(e) from None


def _carried_out(task: Task, version: str) -> Any:
    """On a node: what a task gives, if it is the same program that does it."""
    from importlib.metadata import version as known

    if known("fanmark") != version:
        raise other_version(socket.gethostname(), known("fanmark"), version)
    return task.result()
