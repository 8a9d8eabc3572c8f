"""A Run carried out in this process: with its journal flushed, its health watched, and the garbage collector kept quiet."""

import asyncio
import resource
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fanmark.loadgen.collecting import rare_collections
from fanmark.loadgen.crew import Crew, share
from fanmark.loadgen.errors import LostError, ScenarioError
from fanmark.loadgen.health import Health
from fanmark.loadgen.records import Journal
from fanmark.loadgen.run import Ending, Run, Stop
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.target import HttpEndpoint

_OPEN_LOOP_CONNECTIONS, _MOST_CONNECTIONS = 8, 16_384
_FILES, _OTHER_FILES = 65_536, 64  # the others: journals, pipes, the metrics' port


async def carry_out(
    one: Run,
    tally: Tally,
    health: Health,
    journal: Journal,
    beside: Sequence[Coroutine[Any, Any, None]] = (),
    worker: int = 0,
) -> Ending | None:
    """The whole schedule, and what goes on beside it until it ends; says what cut it short."""
    with rare_collections():
        async with going_on([_flush(journal, one.stop), health.watch(tally, worker), *beside]):
            ending = await one.execute()
    journal.flush()
    return ending


@asynccontextmanager
async def going_on(parts: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """What goes on beside a run, until it ends. A failure of one is raised at the end."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


async def _flush(journal: Journal, stop: Stop) -> None:
    """Hands the records to the system once a second, in a thread: a disk may make a writer wait. A full one ends the run at once."""
    while True:
        await asyncio.sleep(1.0)
        try:
            await asyncio.to_thread(journal.flush)
        except LostError:
            stop.at_once()
            raise


async def open_connections(scenario: Scenario, endpoints: Iterable[HttpEndpoint], crew: Crew) -> None:
    """Opens what the first calls need before the clock starts: a connection for each user of a closed loop, a few for an open one.
    Raises ScenarioError where the system does not allow so many."""
    loads = [scenario.load_of(arm) for arm in scenario.arms]
    count = sum(share(load.concurrency, crew) if load.mode == "closed" else _OPEN_LOOP_CONNECTIONS for load in loads)
    allow_connections(count)
    for endpoint in endpoints:
        await endpoint.open_ahead(min(count, _MOST_CONNECTIONS))


def allow_connections(count: int) -> None:
    """Lifts the limit on open files, of which each connection is one, as far as the system lets us. Raises ScenarioError where `count`
    connections are more than that."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (allowed, most):
        return
    if most < count + _OTHER_FILES:
        raise ScenarioError(
            f"{count:,} queries at a time need as many connections, but the system allows {most:,} open files: "
            "raise its hard limit (ulimit -Hn), lower --concurrency, or share it by --workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, min(most, _FILES)), most))
