"""The driver of a run's worker processes: starts them, lets them meet, sums up what they tell, and misses those that die.

Rules of the file:
1. Whole queries are shared out, by number: a query's calls are all one worker's.
2. A worker's journal stands in a folder of its own while it works; at the end all are joined, and the folders are gone.
3. A worker that dies is not waited for. What it had finished is kept, what it had begun is abandoned, what it had not begun is never
   started; the run goes on, and says so.
"""

import asyncio
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fanmark.loadgen.costs import resources
from fanmark.loadgen.errors import UnreachableError
from fanmark.loadgen.health import WORDS, ClientState
from fanmark.loadgen.link import Ask, Ended, Go, Link, Meeting, Ready, Refused, Say, Snapshot, Task
from fanmark.loadgen.reach import Place
from fanmark.loadgen.records import Journal, Query, read_begun, read_queries
from fanmark.loadgen.run import GRACE_S, INTERRUPTED, Ending
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.scenario import Prices, Scenario
from fanmark.loadgen.tally import Tally

_READY_TIMEOUT_S = 60.0
_START_AHEAD_S = 0.05  # a meeting's instant is so far ahead that all know of it before it comes
_END_TIMEOUT_S = 5.0
_RANK = [
    None,
    "interrupted",
    "budget",
    "threshold",
    "errors",
]  # of several workers' ends, the last of these is the run's


@dataclass
class _Worker:
    index: int
    process: asyncio.subprocess.Process
    link: Link
    errors: IO[str]
    out: Path
    said: list[list[float]] = field(default_factory=list)  # for meetings that are still to be held
    ended: Ended | None = None
    error: Exception | None = None  # it could not go on
    lost_at: float | None = None
    last_words: str = ""
    state: ClientState = field(default_factory=ClientState)

    @property
    def works(self) -> bool:
        return self.ended is None and self.lost_at is None

    def keep_last_words(self) -> None:
        """Reads what it has written to standard error, once it has ended."""
        if not self.errors.closed:
            self.errors.seek(0)
            self.last_words = " | ".join(self.errors.read().strip().splitlines()[-3:]) or _end(self.process.returncode)
            self.errors.close()


class Workers:
    """`count` workers of one run. `tally` is kept at the sum of theirs."""

    def __init__(self, scenario: Scenario, place: Place, run_id: str, out: Path, clock: RunClock, tally: Tally) -> None:
        self._scenario = scenario
        self._place = place
        self._run_id = run_id
        self._out = out
        self._clock = clock
        self._tally = tally
        self._workers: list[_Worker] = []
        self._tallies: dict[int, Tally] = {}
        self._asked = 0

    async def start(self, count: int) -> None:
        """Starts the workers and waits until all are ready. Raises FanmarkError where one cannot be."""
        for index in range(count):
            self._workers.append(await self._spawn(index, count))
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                for worker in self._workers:
                    message = await worker.link.receive()
                    if isinstance(message, Refused):
                        raise message.error
                    if not isinstance(message, Ready):
                        await self.close()
                        raise UnreachableError(f"worker {worker.index} did not start: {worker.last_words}")
        except TimeoutError:
            raise UnreachableError(f"the workers were not ready within {_READY_TIMEOUT_S:g} s") from None

    async def _spawn(self, index: int, count: int) -> _Worker:
        out = self._out / f"worker-{index}"
        out.mkdir()
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the worker
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fanmark.loadgen.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        link = Link(process.stdout, process.stdin.transport)
        link.send(Task(self._scenario, self._place, index, count, self._run_id, out))
        return _Worker(index, process, link, errors, out)

    def states(self) -> dict[int, ClientState]:
        """The workers as they last told of themselves."""
        return {worker.index: worker.state for worker in self._workers}

    def ask(self) -> None:
        """Asks all to end: first without new queries, the second time at once."""
        self._asked += 1
        self._ask_all()

    def _ask_all(self) -> None:
        for worker in self._workers:
            worker.link.send(Ask())

    async def carry_out(self) -> Ended:
        """Lets the run begin and sees it through. Raises LostError where a worker's records cannot be written."""
        self._clock.start(time.monotonic() + _START_AHEAD_S)
        for worker in self._workers:
            worker.link.send(Go(self._clock.origin_s))
        watching = [asyncio.ensure_future(self._watch(worker)) for worker in self._workers]
        try:
            pending: set[asyncio.Future[None]] = set(watching)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=1.0)
                if self._asked:
                    limit_s = (GRACE_S if self._asked == 1 else 0.0) + _END_TIMEOUT_S
                    _, pending = await asyncio.wait(pending, timeout=limit_s) if pending else (set(), set())
                    break
        finally:
            await self.close()
        await asyncio.gather(*watching)
        for worker in self._workers:
            if worker.error is not None:
                raise worker.error
        return self._sum()

    async def _watch(self, worker: _Worker) -> None:
        """Takes one worker's messages until it ends or dies."""
        while True:
            message = await worker.link.receive()
            if isinstance(message, Snapshot):
                self._tallies[worker.index] = message.tally
                worker.state = message.state
                self._tally.replace(list(self._tallies.values()))
            elif isinstance(message, Say):
                worker.said.append(message.values)
            elif isinstance(message, Ended):
                worker.ended = message
                if _why(message.ending) == "errors":  # one server serves all workers
                    self._ask_all()
                worker.state = message.states.get(worker.index, worker.state)
            elif isinstance(message, Refused):
                worker.error = message.error
                self.ask()
                self.ask()
            elif message is None and worker.ended is None:
                worker.lost_at = worker.state.lost_at = self._clock.now()
                worker.state.verdict = WORDS[-1]
                self._tally.clients[worker.index] = worker.state
            self._hold_meeting()
            if not worker.works:
                return

    def _hold_meeting(self) -> None:
        """Once all who work have come: an instant for all, and what they said."""
        working = [worker for worker in self._workers if worker.works]
        if working and all(worker.said for worker in working):
            said = [value for worker in working for value in worker.said.pop(0)]
            at = self._clock.now() + _START_AHEAD_S / self._place.time_scale
            for worker in working:
                worker.link.send(Meeting(at, said))

    def _sum(self) -> Ended:
        """The workers' ends as one. Those that died are named."""
        total = Ended(None, {})
        for worker in self._workers:
            total.states[worker.index] = worker.state
            if worker.ended is None:
                total.notes.append(
                    f"worker {worker.index} of {len(self._workers)} died at {worker.lost_at:.1f} s ({worker.last_words}): "
                    "what it had begun is abandoned, the rest of its share was never started"
                )
                continue
            if _RANK.index(_why(worker.ended.ending)) > _RANK.index(_why(total.ending)):
                total.ending = worker.ended.ending
            total.notes += worker.ended.notes
        if self._asked:
            total.ending = INTERRUPTED
        return total

    def join(self, journal: Journal) -> None:
        """All workers' records into the run's journal, with an abandoned query for each that a dead worker had begun."""
        for worker in self._workers:
            if worker.lost_at is None:
                journal.take(worker.out)
            else:
                for query in salvaged(worker.out, f"worker {worker.index} died", worker.lost_at, self._scenario.prices):
                    journal.write(query)
            shutil.rmtree(worker.out)

    async def close(self) -> None:
        """Ends what still runs. A worker whose driver is gone ends by itself; one that does not is killed."""
        for worker in self._workers:
            try:
                async with asyncio.timeout(_END_TIMEOUT_S):
                    await worker.link.close()
                    await worker.process.wait()
            except TimeoutError:
                worker.process.kill()
                await worker.process.wait()
            worker.keep_last_words()


def _end(code: int | None) -> str:
    """How a process ended that said nothing."""
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _why(ending: Ending | None) -> str | None:
    return None if ending is None else ending.why


def salvaged(folder: Path, error: str, lost_at: float, prices: Mapping[str, Prices | None]) -> list[Query]:
    """What a worker that died left: the queries that it had finished, and as abandoned those that it had only begun, with the calls that
    were on disk."""
    begun = [
        Query(
            query=each.query, arm=each.arm, warmup=each.phase != "window", phase=each.phase, repeat=each.repeat,
            due_at=each.due_at, started_at=each.started_at,
            done_at=max(lost_at, each.started_at), outcome="abandoned", resources={}, expected={}, mismatches=[],
            seed=each.seed, error=error, session=each.session, turn=each.turn,
        )
        for each in read_begun(folder)
    ]  # fmt: skip
    found = read_queries(folder, begun)
    for query in found:
        if not query.resources:
            query.resources = resources(query.calls, query.due_at, query.done_at, prices, query.retried)
    return found
