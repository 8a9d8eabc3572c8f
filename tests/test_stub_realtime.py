"""The real-time driver: an engine that outlives aborts, deaths and sinks that fail."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fanmark.servers.engine.events import Event
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.profiles.profile import load_profile
from fanmark.servers.realtime import EngineDead, RealTime
from fanmark.servers.replica_of import engine_config, replica_of

PROFILE = load_profile("qwen3-30b-a3b@h100")


def make() -> Replica:
    return replica_of(PROFILE, engine_config(PROFILE))


class Listener:
    """Keeps the events of one request."""

    def __init__(self, *, broken: bool = False) -> None:
        self.events: list[Event] = []
        self.ended = asyncio.Event()
        self.failed = False
        self._broken = broken

    def take(self, event: Event) -> None:
        self.events.append(event)
        if event.finished:
            self.ended.set()
        if self._broken:
            raise RuntimeError("a sink that fails")

    def fail(self) -> None:
        self.failed = True
        self.ended.set()


def request(name: str, tokens: int) -> Request:
    return Request(name, [1, 2, 3], list(range(tokens)))


def within(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


@pytest.mark.parametrize("cut_s", [0.010 + 0.0007 * k for k in range(20)])
def test_an_engine_goes_on_after_an_abort_at_any_moment(cut_s: float) -> None:
    replica = make()
    replica.add(request("gone", 9), 0.0)
    while (due := replica.next_at()) is not None and due < cut_s:
        replica.advance(due)
    replica.abort("gone", cut_s)
    replica.add(request("next", 9), 0.2)
    while (due := replica.next_at()) is not None:
        events = replica.advance(due)
    assert (events[-1].id, events[-1].finished) == ("next", True)


def test_tokens_arrive_when_they_are_due() -> None:
    late: list[float] = []

    async def story() -> None:
        engine, listener = RealTime(make, time_scale=0.5, on_late=late.append), Listener()
        engine.submit([(request("a", 12), listener)])
        await listener.ended.wait()
        assert [event.index for event in listener.events] == list(range(12))
        assert engine.now() >= listener.events[-1].at - 0.001
        assert len(engine) == 0

    within(story())
    assert len(late) == 12 and min(late) >= 0


def test_requests_get_in_together_or_not_at_all() -> None:
    async def story() -> None:
        config = engine_config(PROFILE, {"max_num_queued_reqs": 2})
        engine = RealTime(lambda: replica_of(PROFILE, config), time_scale=0.1)
        first, others = Listener(), [Listener(), Listener()]
        engine.submit([(request("first", 30), first)])
        with pytest.raises(Exception, match="max_num_queued_reqs"):
            engine.submit([(request(f"{i}", 3), sink) for i, sink in enumerate(others)])
        await first.ended.wait()
        assert not any(sink.events for sink in others)

    within(story())


def test_death_fails_who_waits_and_a_revived_engine_serves() -> None:
    async def story() -> None:
        engine, lost, served = RealTime(make, time_scale=0.1), Listener(), Listener()
        engine.submit([(request("lost", 5000), lost)])
        engine.die()
        assert lost.failed and not engine.alive
        with pytest.raises(EngineDead):
            engine.submit([(request("refused", 1), served)])
        engine.revive()
        engine.submit([(request("served", 5), served)])
        await served.ended.wait()
        assert len(served.events) == 5
        assert len(engine.statistics()) == 2

    within(story())


def test_a_sink_that_fails_does_not_stop_the_others() -> None:
    async def story() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        engine, broken, sound = RealTime(make, time_scale=0.1), Listener(broken=True), Listener()
        engine.submit([(request("broken", 3), broken)])
        engine.submit([(request("sound", 30), sound)])
        await sound.ended.wait()

    within(story())
