"""Tasks (shared_out.py) on the processors of a Ray cluster. What a node that is lost was doing, Ray has done again by another.

A simulation may last as long as it likes, so no task has a limit; that the cluster answers while tasks are done has one.
"""

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from fanmark.loadgen.errors import FanmarkError, UnreachableError
from fanmark.loadgen.ray_cluster import lost, other_version, usable
from fanmark.loadgen.shared_out import Task

_SILENT_TIMEOUT_S = 20.0
_HEAR_EVERY_S = 2.0


class Processors:
    """See Workers. Those of all nodes that live, or so many of them."""

    def __init__(self, most: int | None, version: str) -> None:
        self._most = most
        self._version = version
        self._there = _on_a_processor()
        self.count = 0
        self._hear()

    def begin(self, task: Task) -> "Future[Any]":
        """See Workers. The first has Ray ask the head, too."""
        future: Future[Any] = _answered(lambda: self._there.remote(task, self._version).future())
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

    def _hear(self) -> None:
        nodes = _answered(usable)
        processors = sum(int(node["Resources"]["CPU"]) for node in nodes)
        if not processors:
            raise UnreachableError("no node of the Ray cluster has a CPU any more")
        self.count = min(processors, self._most or processors)


def _on_a_processor() -> Any:
    import ray

    return ray.remote(_carried_out).options(num_cpus=1)


def _answered(ask: Callable[[], Any]) -> Any:
    """What the cluster answers. Raises UnreachableError."""
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(ask()), daemon=True)  # Ray itself would wait for ever
    asking.start()
    asking.join(_SILENT_TIMEOUT_S)
    if not found:
        raise UnreachableError(f"the head of the Ray cluster did not answer within {_SILENT_TIMEOUT_S:g} s")
    return found[0]


def _carried_out(task: Task, version: str) -> Any:
    """On a node: what a task gives, if it is the same program that does it."""
    from importlib.metadata import version as known

    if known("fanmark") != version:
        raise other_version(socket.gethostname(), known("fanmark"), version)
    return task.result()
