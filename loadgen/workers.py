"""The driver of a run's workers: has them started, lets them meet, sums up what they tell, and misses those that die.

Rules of the file:
1. Whole queries are shared out, by number: a query's calls are all one worker's.
2. A worker's journal stands in a folder of its own while it works; at the end all are joined, and the folders are gone. Where they are kept
   instead, nothing of them comes here: each worker reduces its own, and what follows from them is joined.
3. A worker that dies is not waited for. What it had finished is kept, what it had begun is abandoned, what it had not begun is never
   started; the run goes on or ends, as the user wants it, and says so.
4. Where a worker's station is, and by what way messages come from there, is the station's affair alone.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fanmark.loadgen.costs import resources
from fanmark.loadgen.errors import UnreachableError
from fanmark.loadgen.health import WORDS, ClientState
from fanmark.loadgen.link import (
    Ask,
    Ended,
    Go,
    Meeting,
    Piece,
    Ready,
    Refused,
    Say,
    Snapshot,
    Task,
    Tell,
    Told,
    pickled,
)
from fanmark.loadgen.reach import Place
from fanmark.loadgen.records import Call, Journal, Query, Window, lines_of, read_begun, read_queries
from fanmark.loadgen.reduced import Reduced, joined
from fanmark.loadgen.run import GRACE_S, INTERRUPTED, Ending
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.stations import END_TIMEOUT_S, Opening, Station
from fanmark.loadgen.sums import Sums
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.unrecorded import NOT_SHOWN, LastSnapshot, left_at, unrecorded, write_snapshots

_READY_TIMEOUT_S = 60.0
_TOLD_TIMEOUT_S = 60.0  # of a worker that reduces its journal, for a piece
_LOOK_S = 0.5  # so often all snapshots are summed up
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
    station: Station
    said: list[list[float]] = field(default_factory=list)  # for meetings that are still to be held
    ended: Ended | None = None
    error: Exception | None = None  # it could not go on
    lost_at: float | None = None
    last_words: str = ""
    found: Reduced = field(default_factory=Reduced)  # what it told of its journal
    told_all: Told | None = None
    state: ClientState = field(default_factory=ClientState)

    @property
    def works(self) -> bool:
        return self.ended is None and self.lost_at is None

    def told(self, state: ClientState) -> None:
        """What the worker measured of itself, and what only its driver knows."""
        self.state = state
        state.node, state.clock_offset_s = self.station.node, self.station.clocks.day_ahead_s


class Workers:
    """The workers of one run. `tally` is kept at the sum of theirs; `opening` starts one. `keep`: their journals stay where they are."""

    def __init__(
        self,
        scenario: Scenario,
        place: Place,
        run_id: str,
        clock: RunClock,
        tally: Tally,
        opening: Opening,
        *,
        keep: bool = False,
    ) -> None:
        self._scenario = scenario
        self._place = place
        self._run_id = run_id
        self._clock = clock
        self._tally = tally
        self._opening = opening
        self._keep = keep
        self._stop_on_loss = False
        self._workers: list[_Worker] = []
        self._sums = Sums()
        self._asked = 0
        self._ending: Ending | None = None  # the driver's own

    async def start(self, count: int) -> None:
        """Starts the workers and waits until all are ready. Raises FanmarkError where one cannot be; then all are gone without a trace."""
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                await self._start(count)
        except BaseException as e:  # a cancellation too
            await self.close()
            for worker in self._workers:
                await worker.station.clear()
            if isinstance(e, TimeoutError):
                raise UnreachableError(f"the workers were not ready within {_READY_TIMEOUT_S:g} s") from None
            raise

    async def _start(self, count: int) -> None:
        for index in range(count):
            station = await self._opening(index)
            self._workers.append(_Worker(index, station))
            task = Task(self._scenario, self._place, index, count, self._run_id, station.out, self._keep)
            station.put(pickled(task))
        for worker in self._workers:
            message = await worker.station.receive()
            if isinstance(message, Refused):
                raise message.error
            if not isinstance(message, Ready):
                await self.close()
                raise UnreachableError(f"worker {worker.index} did not start: {worker.last_words}")

    def states(self) -> dict[int, ClientState]:
        """The workers as they last told of themselves."""
        return {worker.index: worker.state for worker in self._workers}

    def ask(self) -> None:
        """Asks all to end: first without new queries, the second time at once."""
        self._asked += 1
        self._ending = INTERRUPTED
        self._ask_all()

    def _ask_all(self) -> None:
        for worker in self._workers:
            worker.station.put(pickled(Ask()))

    async def carry_out(self, *, stop_on_loss: bool = False) -> Ended:
        """Lets the run begin and sees it through; `stop_on_loss`: until one dies. Raises LostError where a worker's records cannot be
        written."""
        self._stop_on_loss = stop_on_loss
        self._clock.start(time.monotonic() + self._ahead_s)
        for worker in self._workers:
            worker.station.put(pickled(Go(self._clock.origin_s + worker.station.clocks.monotonic_ahead_s)))
        watching = [asyncio.ensure_future(self._watch(worker)) for worker in self._workers]
        try:
            pending: set[asyncio.Future[None]] = set(watching)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=_LOOK_S)
                self._sums.into(self._tally)
                if self._asked:
                    limit_s = (GRACE_S if self._asked == 1 else 0.0) + END_TIMEOUT_S
                    _, pending = await asyncio.wait(pending, timeout=limit_s) if pending else (set(), set())
                    break
            if self._keep:
                await asyncio.gather(*(self._hear(worker) for worker in self._workers if worker.ended is not None))
        finally:
            await self.close()
        await asyncio.gather(*watching)
        self._sums.into(self._tally)
        for worker in self._workers:
            if worker.error is not None:
                raise worker.error
        return self._sum()

    @property
    def _ahead_s(self) -> float:
        return max(worker.station.ahead_s for worker in self._workers)

    async def _watch(self, worker: _Worker) -> None:
        """Takes one worker's messages until it ends or dies."""
        while worker.works:
            message = await worker.station.receive()
            if isinstance(message, Snapshot):
                self._sums.take(worker.index, message.sums)
                worker.told(message.state)
                self._tally.clients[worker.index] = worker.state
                continue
            if isinstance(message, Say):
                worker.said.append(message.values)
            elif isinstance(message, Ended):
                worker.ended = message
                if _why(message.ending) == "errors":  # one server serves all workers
                    self._ask_all()
                worker.told(message.states.get(worker.index, worker.state))
            elif isinstance(message, Refused):
                worker.error = message.error
                self.ask()
                self.ask()
            elif message is None:
                self._miss(worker)
            self._hold_meeting()

    async def _hear(self, worker: _Worker) -> None:
        """What follows from the journal of one that has ended; one that says nothing more is lost."""
        worker.station.put(pickled(Tell()))
        try:
            while worker.told_all is None:
                async with asyncio.timeout(_TOLD_TIMEOUT_S):
                    message = await worker.station.receive()
                if isinstance(message, Piece):
                    worker.found.join(message.found)
                elif isinstance(message, Told):
                    worker.told_all = message
                elif message is None:
                    return
        except TimeoutError:
            return

    def _mark_lost(self, worker: _Worker) -> None:
        worker.told(worker.state)
        worker.lost_at = worker.state.lost_at = self._clock.now()
        worker.state.verdict = WORDS[-1]
        self._tally.clients[worker.index] = worker.state

    def _miss(self, worker: _Worker) -> None:
        """A worker has died."""
        self._mark_lost(worker)
        if self._stop_on_loss and self._ending is None:
            self._ending = Ending("errors", f"worker {worker.index} died, and the run was to stop then")
            self._ask_all()

    def _hold_meeting(self) -> None:
        """Once all who work have come: an instant for all, and what they said."""
        working = [worker for worker in self._workers if worker.works]
        if working and all(worker.said for worker in working):
            said = [value for worker in working for value in worker.said.pop(0)]
            meeting = pickled(Meeting(self._clock.now() + self._ahead_s / self._place.time_scale, said))
            for worker in working:
                worker.station.put(meeting)

    def _sum(self) -> Ended:
        """The workers' ends as one. Those that died are named; where all did, that is the run's end."""
        total = Ended(None, {})
        if all(worker.ended is None for worker in self._workers):
            total.ending = Ending("errors", "all workers died")
        for worker in self._workers:
            total.states[worker.index] = worker.state
            if worker.ended is None:
                where = f" on {worker.station.node}" if worker.station.node is not None else ""
                total.notes.append(
                    f"worker {worker.index} of {len(self._workers)}{where} died at {worker.lost_at:.1f} s ({worker.last_words}): "
                    "what it had begun is abandoned, the rest of its share was never started"
                )
                continue
            if _RANK.index(_why(worker.ended.ending)) > _RANK.index(_why(total.ending)):
                total.ending = worker.ended.ending
            total.notes += worker.ended.notes
        total.ending = self._ending or total.ending
        return total

    async def join(self, journal: Journal, out: Path, ended: Ended) -> None:
        """All workers' records into the run's journal, with an abandoned query for each that a dead worker had begun. Where records are
        lost, the worker's last snapshot goes to `out` in their place, and `ended` says so."""
        snapshots = []
        for worker in self._workers:
            folder = await worker.station.bring()
            if folder is None:
                snapshots.append(self._last(worker))
                ended.notes.append(_lost(snapshots[-1], f"lost with {worker.station.node}"))
            elif worker.lost_at is None:
                journal.take(folder)
            else:
                for query in salvaged(folder, f"worker {worker.index} died", worker.lost_at, self._scenario):
                    journal.write(query)
                    journal.flush()
            await worker.station.clear()
        write_snapshots(out, snapshots)

    def leave(self, journal: Journal, out: Path, ended: Ended) -> None:
        """All workers' records stay where they are: `ended` gets what follows from them, and says where they are. Of a worker that was
        lost the last snapshot goes to `out`."""
        snapshots, windows = [], list[Window]()
        for worker in self._workers:
            on = f"{worker.station.node}:" if worker.station.node is not None else ""
            worker.state.journal = f"{on}{worker.station.out}"
            if worker.told_all is None:
                worker.found = Reduced()
                snapshots.append(self._last(worker))
                ended.notes.append(_lost(snapshots[-1], f"left in {worker.state.journal}, as far as they go"))
            else:
                windows = max(windows, worker.told_all.windows, key=len)
        for window in windows:
            journal.window(window)
        for name in ("queries.jsonl", "calls.jsonl"):  # nothing was written into them
            (out / name).unlink()
        ended.notes.append(left_at({str(worker.index): worker.state.journal for worker in self._workers}) + NOT_SHOWN)
        write_snapshots(out, snapshots)
        ended.found = joined((worker.found for worker in self._workers), snapshots)

    def _last(self, worker: _Worker) -> LastSnapshot:
        """What a worker had told of its queries. One that had done its share, and went then, is lost too."""
        if worker.lost_at is None:
            self._mark_lost(worker)
        last = Tally({arm.name: arm.topology for arm in self._scenario.arms}, self._scenario.baseline.name)
        self._sums.into(last, [worker.index])
        arms = {name: unrecorded(arm) for name, arm in last.arms.items()}
        found = LastSnapshot(worker=worker.index, node=worker.station.node, lost_at=worker.lost_at, arms=arms)
        worker.state.lost_queries = found.queries
        return found

    async def close(self) -> None:
        """Ends what still runs."""
        words = await asyncio.gather(*(worker.station.end() for worker in self._workers))
        for worker, last in zip(self._workers, words, strict=True):
            worker.last_words = last


def _lost(last: LastSnapshot, how: str) -> str:
    """What is to be told of records that are not here."""
    told = "; ".join(
        f"{name} {', '.join(f'{n} {word}' for word, n in each.items())}" for name, each in last.queries.items()
    )
    return (
        f"worker {last.worker}: its records are {how}: what it had told of until then ({told}) is in queries, errors, "
        "mismatches and the objective; all else of queries, roles, targets and tools is of the other workers' queries, and load, waste and "
        "ratios of times are not known"
    )


def _why(ending: Ending | None) -> str | None:
    return None if ending is None else ending.why


def salvaged(folder: Path, error: str, lost_at: float, scenario: Scenario) -> Iterator[Query]:
    """What a worker that died left: the queries that it had finished, and as abandoned those that it had only begun, with the calls that
    were on disk."""
    begun = {(each.arm, each.query): each for each in read_begun(folder)}
    for query in read_queries(folder):
        begun.pop((query.arm, query.query), None)
        yield query
    calls: dict[tuple[str, int], list[Call]] = {key: [] for key in begun}
    for call in lines_of(folder / "calls.jsonl", Call):
        if (call.arm, call.query) in calls:
            calls[call.arm, call.query].append(call)
    for key, each in begun.items():
        done_at = max(lost_at, each.started_at)
        kept, retried = (
            [call for call in calls[key] if (call.retry_at is not None) is again] for again in (False, True)
        )
        yield Query(
            query=each.query, arm=each.arm, warmup=each.phase != "window", phase=each.phase, repeat=each.repeat,
            due_at=each.due_at, started_at=each.started_at, done_at=done_at, outcome="abandoned",
            resources=resources(
                kept, each.due_at, done_at, scenario.prices, retried, scenario.tools.dollars_per_call
            ),
            expected={}, mismatches=[],
            seed=each.seed, error=error, session=each.session, turn=each.turn, calls=kept, retried=retried,
        )  # fmt: skip
