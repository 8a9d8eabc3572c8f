"""The virtual clock: time jumps, order holds, waiting for nothing is an error, and nothing comes in from outside."""

import asyncio
import itertools
import subprocess
import threading
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.clock import Deadlock, VirtualLoop, run_virtually


def now() -> float:
    return asyncio.get_running_loop().time()


@given(st.lists(st.floats(0, 1e6), max_size=30))
def test_timers_fire_at_their_times_in_their_order(delays: list[float]) -> None:
    async def sleeper(delay_s: float, fired: list[tuple[float, float]]) -> None:
        await asyncio.sleep(delay_s)
        fired.append((delay_s, now()))

    async def main() -> list[tuple[float, float]]:
        fired: list[tuple[float, float]] = []
        await asyncio.gather(*(sleeper(delay_s, fired) for delay_s in delays))
        return fired

    fired = run_virtually(main())
    assert sorted(delay_s for delay_s, _ in fired) == sorted(delays)
    # asyncio takes timers within a nanosecond of each other as one moment
    assert all(abs(at - delay_s) <= 1.1e-9 for delay_s, at in fired)
    assert all(a[1] <= b[1] and a[0] <= b[0] + 1e-9 for a, b in itertools.pairwise(fired))


def test_a_month_of_waiting_one_second_at_a_time_moves_time_only_when_nothing_is_ready() -> None:
    async def main() -> tuple[float, float]:
        for _ in range(1000):
            await asyncio.sleep(0)  # ready at once: no time passes
        before = now()
        for _ in range(30):
            await asyncio.sleep(86_400)
        return before, now()

    assert run_virtually(main()) == (0.0, 30 * 86_400)


def test_who_watches_time_is_told_of_each_move_and_keeps_no_loop_alive() -> None:
    moves: list[tuple[float, float]] = []

    async def main(*, stuck: bool) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.watch_time(lambda since, until: moves.append((since, until)))
        await asyncio.sleep(0.5)
        await asyncio.sleep(0)
        await asyncio.sleep(2.0)
        if stuck:
            await loop.create_future()
        loop.watch_time(None)
        await asyncio.sleep(1.0)

    run_virtually(main(stuck=False))
    assert moves == [(0.0, 0.5), (0.5, 2.5)]
    with pytest.raises(Deadlock):
        run_virtually(main(stuck=True))


def test_callbacks_of_one_moment_run_in_the_order_in_which_they_were_asked_for() -> None:
    async def main() -> list[int]:
        loop, seen = asyncio.get_running_loop(), list[int]()
        for i in range(5):
            loop.call_soon(seen.append, i)
        await asyncio.sleep(0)
        return seen

    assert run_virtually(main()) == [0, 1, 2, 3, 4]


def test_cancelled_timers_do_not_hold_time_up() -> None:
    async def main() -> float:
        sleeper = asyncio.ensure_future(asyncio.sleep(1000))
        asyncio.get_running_loop().call_later(500, print, "never").cancel()
        await asyncio.sleep(1)
        sleeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeper
        await asyncio.sleep(1)
        return now()

    assert run_virtually(main()) == 2.0


def test_timeouts_and_events_work_in_virtual_time() -> None:
    async def main() -> tuple[float, float]:
        event = asyncio.Event()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7.5):
                await event.wait()
        timed_out_at = now()
        asyncio.get_running_loop().call_later(2.5, event.set)
        async with asyncio.timeout(100):
            await event.wait()
        return timed_out_at, now()

    assert run_virtually(main()) == (7.5, 10.0)


async def _wait_for_nothing() -> None:
    await asyncio.Event().wait()


async def _two_that_wait_for_each_other() -> None:
    first, second = asyncio.Event(), asyncio.Event()

    async def wait_then_set(wait: asyncio.Event, then: asyncio.Event) -> None:
        await wait.wait()
        then.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(wait_then_set(first, second))
        group.create_task(wait_then_set(second, first))


@pytest.mark.parametrize("stuck", [_wait_for_nothing, _two_that_wait_for_each_other])
def test_what_can_never_end_is_an_error_and_not_a_hang(stuck: Callable[[], Awaitable[None]]) -> None:
    ended: list[str] = []

    async def main() -> None:
        try:
            await stuck()
        finally:
            ended.append("cleaned up")

    with pytest.raises(Deadlock, match="virtual time stands still"):
        run_virtually(main())
    assert ended == ["cleaned up"]


def test_time_beyond_the_clock_s_resolution_is_refused() -> None:
    with pytest.raises(Deadlock, match="longer than 1e\\+07 s"):
        run_virtually(asyncio.sleep(2e7))


@pytest.mark.parametrize(
    ("outside", "said"),
    [
        (lambda: asyncio.to_thread(print), "wait for a thread"),
        (lambda: asyncio.open_connection("127.0.0.1", 9), "wait for a socket"),
        (lambda: asyncio.create_subprocess_exec("true"), "wait for a process"),
        (lambda: asyncio.create_subprocess_shell("true", stdout=subprocess.PIPE), "wait for a process"),
    ],
)
def test_nothing_from_outside_comes_in(outside: Callable[[], Awaitable[None]], said: str) -> None:
    async def main() -> None:
        await outside()

    threads = threading.active_count()
    with pytest.raises(RuntimeError, match=said):
        run_virtually(main())
    assert threading.active_count() == threads


def test_signals_are_refused_rather_than_lost() -> None:
    loop = VirtualLoop()
    with pytest.raises(RuntimeError, match=r"use signal\.signal"):
        loop.add_signal_handler(15, print)
    loop.close()
