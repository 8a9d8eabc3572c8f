"""The engine model on the wall clock: one timer drives the replica and hands tokens to whoever waits for them.

Rules of the file:
1. Engine seconds = wall seconds since the start / `time_scale`. Everything is due at absolute times, so lateness never adds up.
2. One timer, no task: it comes at `Replica.next_at`, runs what is due, and is set again.
3. A timer of the event loop is true to a millisecond. What is due within half of one is handed out now, so that the error has
   no bias; lateness (never below 0) is observed once per moment at which tokens were due.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fanmark.servers.engine.events import Event, ReplicaStatistics
from fanmark.servers.engine.group import Engine
from fanmark.servers.engine.request import Request

_EARLY_S = 0.0005


class EngineDead(Exception):
    """There is no engine at the moment."""


class Sink(Protocol):
    """Who waits for the tokens of one request."""

    def take(self, event: Event) -> None: ...

    def fail(self) -> None: ...


class RealTime:
    """Drives replicas that `make` builds: the first one, and a cold one after each death.

    `on_late(seconds)` hears the wall-clock lateness of every moment at which tokens were handed out.
    """

    def __init__(
        self, make: Callable[[], Engine], *, time_scale: float = 1.0, on_late: Callable[[float], None] = lambda _: None
    ) -> None:
        self.time_scale = time_scale
        self._make, self._on_late = make, on_late
        self._replica: Engine | None = make()
        self._slowdown = 1.0
        self._buried: list[ReplicaStatistics] = []
        self._sinks: dict[str, Sink] = {}
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._origin = time.monotonic()

    def __repr__(self) -> str:
        return f"<RealTime at {self.now():.3f} s, {len(self._sinks)} requests, {self._replica!r}>"

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._sinks)

    def now(self) -> float:
        """Engine seconds since the start."""
        return (time.monotonic() - self._origin) / self.time_scale

    def statistics(self) -> list[ReplicaStatistics]:
        """Of every replica since the start, the living one last."""
        return [*self._buried, *([self._replica.statistics()] if self._replica is not None else [])]

    @property
    def alive(self) -> bool:
        return self._replica is not None

    def submit(self, requests: Sequence[tuple[Request, Sink]]) -> None:
        """Requests that arrive together. All get in, or none: raises EngineDead, Rejected or ValueError (could never be served)."""
        if self._replica is None:
            raise EngineDead
        now, done = self.now(), list[str]()
        try:
            for request, sink in requests:
                request.arrived_at = now
                self._replica.add(request, now)
                self._sinks[request.id] = sink
                done.append(request.id)
        except BaseException:
            for request_id in done:
                self.abort(request_id)
            raise
        self._set_timer()

    def abort(self, request_id: str) -> bool:
        """Nobody waits for this request any more. False if it had ended."""
        if self._sinks.pop(request_id, None) is None:
            return False
        if self._replica is not None:
            self._replica.abort(request_id, self.now())
            self._set_timer()
        return True

    def slow_down(self, factor: float) -> None:
        """Steps scheduled from now on take `factor` times as long."""
        self._slowdown = factor
        if self._replica is not None:
            self._replica.slowdown = factor

    def die(self) -> None:
        """The engine is gone, and with it every request."""
        if self._replica is None:
            return
        self._buried.append(self._replica.statistics())
        self._replica = None
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.fail()

    def revive(self) -> None:
        """A new engine, with a cold cache."""
        if self._replica is None:
            self._replica = self._make()
            self._replica.slowdown = self._slowdown

    def _set_timer(self) -> None:
        due = self._replica.next_at() if self._replica is not None else None
        if self._timer is not None:
            if due == self._timer_at:
                return
            self._timer.cancel()
            self._timer = None
        if due is not None:
            wait_s = (due - self.now()) * self.time_scale
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(wait_s, self._turn) if wait_s > _EARLY_S else loop.call_soon(self._turn)
            self._timer_at = due

    def _turn(self) -> None:
        self._timer = None
        if self._replica is None:
            return
        now, moment = self.now(), -1.0
        try:
            events = self._replica.advance(now + _EARLY_S / self.time_scale)
        except BaseException:
            self.die()  # a broken engine must not keep its clients waiting
            raise
        try:
            for event in events:
                if event.at != moment:
                    moment = event.at
                    self._on_late(max(0.0, (now - moment) * self.time_scale))
                sink = self._sinks.get(event.id)
                if sink is not None:
                    if event.finished:
                        del self._sinks[event.id]
                    sink.take(event)
        finally:  # a sink that fails must not stop the clock for the others
            self._set_timer()
