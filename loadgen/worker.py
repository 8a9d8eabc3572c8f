"""One of a run's worker processes: `python -m fanmark.loadgen.worker`, told by its driver over a pipe what to do.

It ends when it is done, when it is asked to, or when the driver is gone.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack

from fanmark.agents import topologies
from fanmark.loadgen.crew import Met
from fanmark.loadgen.errors import FanmarkError
from fanmark.loadgen.execute import carry_out, open_connections
from fanmark.loadgen.health import Health
from fanmark.loadgen.link import (
    Ask,
    Ended,
    Go,
    Link,
    Meeting,
    Piece,
    Ready,
    Refused,
    Say,
    Task,
    Tell,
    Told,
    link_to_driver,
    snapshot,
)
from fanmark.loadgen.reach import reach
from fanmark.loadgen.records import Journal, read_queries, read_windows
from fanmark.loadgen.reduced import pieces
from fanmark.loadgen.run import Run, Stop
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.sums import Packer
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.user_topology import table_of

_PIECE_ROWS = 50_000  # a second of reading, and some megabytes


class Member:
    """The crew of a run as this worker sees it: meetings go by way of the driver."""

    def __init__(self, link: Link, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self._link = link
        self._met: asyncio.Queue[Met] = asyncio.Queue()

    async def meet(self, say: Sequence[float] = ()) -> Met:
        """See Crew."""
        self._link.send(Say(list(say)))
        return await self._met.get()

    async def listen(self, stop: Stop) -> None:
        """Takes the driver's messages until cancelled."""
        while True:
            message = await self._link.receive()
            if isinstance(message, Meeting):
                self._met.put_nowait(Met(message.at, message.said))
            elif isinstance(message, Ask):
                stop.ask()
            elif message is None:  # nobody is left to report to
                stop.at_once()
                return


async def work(task: Task, link: Link) -> Ended:
    """This worker's share of the run, from connecting to its end. Raises FanmarkError before anything is sent."""
    clock = RunClock(task.place.time_scale)
    scenario = task.scenario
    table = table_of(scenario, topologies())
    member = Member(link, task.index, task.count)
    async with AsyncExitStack() as stack:
        reached = await reach(scenario, table, task.place, clock.now, stack)
        journal = Journal(task.out, starts=True)
        stack.callback(journal.close)
        tally = Tally({arm.name: arm.topology for arm in scenario.arms}, scenario.baseline.name)
        one = Run(
            scenario, table, reached.endpoints, reached.tools, tally, journal, task.run_id, clock.now,
            task.place.time_scale, member,
        )  # fmt: skip
        await open_connections(scenario, reached.endpoints.values(), member)
        link.send(Ready())
        go = await link.receive()
        if not isinstance(go, Go):
            return Ended(None, {})
        clock.start(go.origin_s)
        health, packer = Health(clock.now), Packer(tally)
        ending = await carry_out(
            one, tally, health, journal, [_report(link, packer, health), member.listen(one.stop)], task.index
        )
    link.send(snapshot(packer, health.look()))
    notes = [note for endpoint in reached.endpoints.values() for note in endpoint.notes]
    return Ended(ending, {task.index: health.look()}, notes)


async def _report(link: Link, packer: Packer, health: Health) -> None:
    while True:
        await asyncio.sleep(1.0)
        link.send(snapshot(packer, health.look()))


async def tell(task: Task, link: Link) -> None:
    """What follows from this worker's journal, when the driver wants it: until then others may still be measuring."""
    while not isinstance(message := await link.receive(), Tell):
        if message is None:
            return
    for piece in pieces(read_queries(task.out), task.scenario.objective, _PIECE_ROWS):
        link.send(Piece(piece))
        if not await link.sent():
            return
    link.send(Told(read_windows(task.out)))


async def _main(read_fd: int, write_fd: int) -> None:
    link = await link_to_driver(read_fd, write_fd)
    task = await link.receive()
    if isinstance(task, Task):
        try:
            link.send(await work(task, link))
            if task.keep:
                await tell(task, link)
        except FanmarkError as e:
            link.send(Refused(e))
    await link.close()


def main() -> None:
    """Standard input and output are the driver's pipes; what a user's topology prints goes to standard error."""
    import uvloop

    read_fd, write_fd = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(read_fd, write_fd))


if __name__ == "__main__":
    main()
