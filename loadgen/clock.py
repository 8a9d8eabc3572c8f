"""Virtual time: an asyncio event loop whose clock jumps to the next timer as soon as nothing else is left to do.

Rules of the file:
1. Time stands still while code runs, and moves in one place only: where an ordinary loop would sleep in `select`. There the clock is
   moved on by just as long as the loop would have slept. So timers fire in the order of their times, callbacks in the order in which
   they were asked for, and no run depends on how fast the machine is.
2. Nothing from outside may come in: no sockets, no pipes, no threads, no processes. Each is refused with an error, for what waits for the
   outside has no place in virtual time. A signal handler may call `call_soon_threadsafe`.
3. If nothing is ready and no timer is set, what is awaited can never come: that is a Deadlock, said at once, where an ordinary loop hangs.
4. Who watches time is told of each move before it is made, and cannot hold it up: a watcher keeps no loop alive.
5. It is built from public parts alone: asyncio.SelectorEventLoop on a selector of our own, with a `time` of our own.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn, TypeVar

from fanmark.loadgen.errors import FanmarkError

T = TypeVar("T")

_LONGEST_S = (
    1e7  # beyond, a nanosecond, asyncio's resolution of timers, is less than the spacing of floating-point numbers
)


class Deadlock(FanmarkError):
    """Everything waits, and nothing can ever wake it."""


class _Clock(selectors.BaseSelector):
    """What the loop sleeps in. It holds the time, and no file but the loop's own wake-up socket, which is never looked at."""

    def __init__(self) -> None:
        self.now = 0.0
        self.passing: Callable[[float, float], None] | None = None
        self._files: dict[Any, selectors.SelectorKey] = {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("virtual time stands still: everything waits for something that nothing will ever set off")
        then = self.now + max(timeout, 0.0)
        if self.passing is not None and then > self.now:
            self.passing(self.now, min(then, _LONGEST_S))
        self.now = then
        if self.now > _LONGEST_S:
            raise Deadlock(f"virtual time is over: no run may be longer than {_LONGEST_S:g} s")
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self._files:
            raise _refused("wait for a socket, a pipe or a file")
        self._files[fileobj] = selectors.SelectorKey(fileobj, fileobj, events, data)
        return self._files[fileobj]

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._files.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._files


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, which starts at 0."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now

    def watch_time(self, passing: Callable[[float, float], None] | None) -> None:
        """Has `passing(since, until)` called whenever time moves; None ends that."""
        self._clock.passing = passing

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> NoReturn:  # type: ignore[override]
        raise _refused("wait for a thread")

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused("wait for a process")

    subprocess_shell = subprocess_exec

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> NoReturn:  # type: ignore[override]
        raise _refused("watch for signals (use signal.signal)")


def _refused(what: str) -> RuntimeError:
    return RuntimeError(f"virtual time cannot {what}: it would have to wait for the real world")


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end in virtual time. Raises Deadlock where it can never end."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
