"""When every query of a run starts: repeats, blocks of arms that run at once, and in each lead-in, window and lead-out.

Rules of the file:
1. The arms of a block share the server. Interleaved there is one block with all arms, apart there is one for each, in shuffled order.
2. With a duration a block is counted by a window (window.py), one for all its arms. Otherwise all queries count but the warm-up.
3. What all workers must do alike is decided after a meeting, from what all said there; so all meet equally often.
4. Counted queries have numbers from 0 on, the same in every arm and none twice in a run; uncounted ones have negative numbers.
5. With users (users.py) a query's place in the order of all sessions, the same in every arm, is its number if it counts, else the place
   counted down from -1. A session goes on from one phase into the next; warm-up queries are no session's.
"""

import asyncio
import math
import random
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Protocol

from fanmark.loadgen.arrivals import of_arm, of_repeat
from fanmark.loadgen.block import Block, answered, ended, together
from fanmark.loadgen.crew import Crew, Met
from fanmark.loadgen.pilot import pilot
from fanmark.loadgen.records import Phase, Query, Window
from fanmark.loadgen.scenario import Arm, Load, Scenario
from fanmark.loadgen.users import Session, own_sessions, think_s
from fanmark.loadgen.window import Seen, grace_s, lead_in

TICK_S = 0.25  # between two looks at where a lead-in or a lead-out stands
AHEAD_S = 0.1  # from the decision that a window begins to its start: its first queries are made ready

Start = Callable[[float], "asyncio.Task[Query]"]  # starts a query that is ready, given its due time


class Ready(Protocol):
    """Makes a query ready."""

    def __call__(
        self, arm: Arm, number: int, phase: Phase, repeat: int, session: Session | None = None
    ) -> Awaitable[Start]: ...


class _Stopped(Exception):
    """The run was asked to end: no new queries."""


class Schedule:
    """Starts all queries of a run, or a worker's share of them. `asked` is set when the run is to end; `drained` waits until the servers
    have nothing left; `told` is given each window."""

    def __init__(
        self,
        scenario: Scenario,
        ready: Ready,
        crew: Crew,
        now: Callable[[], float],
        asked: asyncio.Event,
        drained: Callable[[], Awaitable[None]],
        told: Callable[[Window], None],
        time_scale: float,
        begun: Callable[[float], None] = lambda at: None,
    ) -> None:
        self._begun = begun
        self._scenario = scenario
        self._ready = ready
        self._crew = crew
        self._now = now
        self._asked = asked
        self._drained = drained
        self._told = told
        self._time_scale = time_scale
        self._places = {arm.name: i for i, arm in enumerate(scenario.arms)}
        # of queries that ended since the last meeting, as Seen takes them; an array, for they may be many
        self._news = array("d")
        self._highest, self._lowest = -1, 0  # of the numbers given
        self._last_session = -1

    async def run(self) -> None:
        """All repeats. Returns when all queries have ended, or, where the run was asked to end, those that had begun."""
        if self._scenario.load.match == "calls":
            try:
                self._scenario = await pilot(self._scenario, self._trial, self._drained)
            except* _Stopped:
                pass
            if self._asked.is_set():
                return
        left = self._scenario.load.repeats * len(self._blocks(1))
        for repeat in range(1, self._scenario.load.repeats + 1):
            try:
                said = (await self._meet((self._highest, self._lowest, self._last_session))).said
            except _Stopped:
                return
            for arms in self._blocks(repeat):
                loads = [self._scenario.load_of(arm) for arm in arms]
                windowed = all(load.duration is not None and not load.stages for load in loads)
                froms = int(max(said[::3])) + 1, -int(min(said[1::3])), int(max(said[2::3])) + 1
                block = Block(arms, repeat, *froms, windowed=windowed)
                try:
                    await self._run_block(block)
                except* _Stopped:
                    pass
                await ended(block.running)
                if self._asked.is_set():
                    return
                left -= 1
                if left:
                    await self._drained()

    def _blocks(self, repeat: int) -> list[list[Arm]]:
        """The arms that run at once, block after block."""
        arms = list(self._scenario.arms)
        if self._scenario.load.arms == "interleaved":
            return [arms]
        random.Random(f"{self._scenario.seed}/order" + of_repeat(repeat)).shuffle(arms)
        return [[arm] for arm in arms]

    async def _trial(self, scenario: Scenario, arms: Sequence[Arm], step: int, least: int) -> dict[str, float]:
        """The time that a query's calls take in sum, by arm, at the rates of `scenario`."""
        said = (await self._meet((self._highest, self._lowest))).said
        block = Block(arms, 0, 0, -int(min(said[1::2])), windowed=True)  # a repeat of its own, with a cache of its own
        from_at, limit_s, seen = (await self._meet()).at, scenario.load.duration or 0.0, Seen()
        filled: dict[int, int] | None = None  # of the queries that had ended, how many were not looked at, by arm
        places = [self._places[arm.name] for arm in arms]
        async with asyncio.TaskGroup() as group:
            times = [of_arm(scenario, arm, 1, f"pilot-{step}") for arm in arms]
            flows = [
                group.create_task(self._open(block, arm, "lead-in", at, from_at))
                for arm, at in zip(arms, times, strict=True)
            ]
            while True:
                await self._until(self._now() + TICK_S)
                met = await self._meet(self._told_now())
                seen.take(met.said)
                if (
                    filled is None
                    and lead_in(seen.latencies_s, met.at - from_at, dict.fromkeys(places, 2), limit_s) != "on"
                ):
                    filled, give_up_at = {place: len(seen.calls_s[place]) for place in places}, met.at + limit_s
                if filled is not None and (
                    met.at >= give_up_at or all(len(seen.calls_s[p]) - filled[p] >= least for p in places)
                ):
                    break
            for flow in flows:
                flow.cancel()
        await ended(block.running)
        looked_at = {place: seen.calls_s[place][filled[place] :] or seen.calls_s[place] for place in places}
        return {
            arm.name: math.fsum(found) / max(len(found), 1) for arm, found in zip(arms, looked_at.values(), strict=True)
        }

    async def _run_block(self, block: Block) -> None:
        if block.windowed:
            await self._with_window(block, self._scenario.load.duration or 0.0)
            return
        await together(self._warm_up(block, arm) for arm in block.arms)
        block.start_at = (await self._meet()).at
        self._begun(block.start_at)
        await together(self._all(block, arm) for arm in block.arms)

    async def _warm_up(self, block: Block, arm: Arm) -> None:
        """Uncounted queries, all at once, before the first counted one."""
        mine = range(self._crew.index, self._scenario.load_of(arm).warmup, self._crew.count)
        starts = [await self._ready(arm, block.number("lead-in", i), "lead-in", block.repeat) for i in mine]
        await ended(
            [
                self._begin(block, arm, "lead-in", block.number("lead-in", i), start, self._now())
                for i, start in zip(mine, starts, strict=True)
            ]
        )

    async def _all(self, block: Block, arm: Arm) -> None:
        """An arm whose queries all count."""
        load = self._scenario.load_of(arm)
        if load.mode == "open":
            await self._open(block, arm, "window", of_arm(self._scenario, arm, block.repeat), block.start_at or 0.0)
            return
        await self._stopped_before(block.start_at or 0.0)
        await self._closed(block, arm, ("window",), (block.start_at or 0.0) + (load.duration or math.inf))

    async def _with_window(self, block: Block, duration_s: float) -> None:
        """Lead-in, window and lead-out."""
        lead_in_at = (await self._meet()).at
        async with asyncio.TaskGroup() as group:
            flows = [group.create_task(self._before(block, arm, lead_in_at)) for arm in block.arms]
            seen = Seen()
            start_at, given_up = await self._lead_in(block, lead_in_at, duration_s, seen)
            block.start_at, block.end_at = start_at, start_at + duration_s
            self._begun(block.start_at)
            rates = {arm.name: self._rate(arm) for arm in block.arms}
            self._told(
                Window(
                    repeat=block.repeat,
                    arms=[arm.name for arm in block.arms],
                    lead_in_at=lead_in_at,
                    start_at=block.start_at,
                    end_at=block.end_at,
                    given_up=given_up,
                    rates=rates,
                )
            )
            flows += [group.create_task(self._after(block, arm)) for arm in block.arms]
            await self._until(block.end_at)
            seen.take((await self._meet(self._told_now())).said)
            give_up_at = block.end_at + grace_s(seen.all_s())
            await self._lead_out(block, give_up_at)
            for flow in flows:
                flow.cancel()
        for task, phase in block.running.items():
            if phase == "window":
                task.cancel()
        if block.running:  # what did not count is let go, so that the server's counts and ours stay equal
            _, late = await asyncio.wait(block.running, timeout=max(0.0, give_up_at - self._now()) * self._time_scale)
            for task in [each for each in block.running if each in late]:  # a set's order is another in each process
                task.cancel()

    async def _before(self, block: Block, arm: Arm, lead_in_at: float) -> None:
        """An open loop's lead-in until the window starts; a closed loop's users, from the lead-in to the lead-out."""
        if self._scenario.load_of(arm).mode == "closed":
            await self._closed(block, arm, ("lead-in", "window", "lead-out"), math.inf)
        else:
            await self._open(block, arm, "lead-in", of_arm(self._scenario, arm, block.repeat, "lead-in"), lead_in_at)

    async def _after(self, block: Block, arm: Arm) -> None:
        """An open loop's window and lead-out."""
        if self._scenario.load_of(arm).mode == "open":
            await self._open(block, arm, "window", of_arm(self._scenario, arm, block.repeat), block.start_at or 0.0)
            await self._open(
                block, arm, "lead-out", of_arm(self._scenario, arm, block.repeat, "lead-out"), block.end_at or 0.0
            )

    async def _lead_in(self, block: Block, lead_in_at: float, duration_s: float, seen: Seen) -> tuple[float, bool]:
        """When the window starts, and whether the lead-in was given up."""
        warmup = {self._places[arm.name]: self._scenario.load_of(arm).warmup for arm in block.arms}
        while True:
            await self._until(self._now() + TICK_S)
            met = await self._meet(self._told_now())
            seen.take(met.said)
            stands = lead_in(seen.latencies_s, met.at - lead_in_at, warmup, duration_s)
            if stands != "on":
                return met.at + AHEAD_S, stands == "given up"

    async def _lead_out(self, block: Block, give_up_at: float) -> None:
        """Until no counted query of any worker is under way, or time is up."""
        while True:
            met = await self._meet((list(block.running.values()).count("window"),))
            if not sum(met.said) or met.at >= give_up_at:
                return
            await self._until(self._now() + TICK_S)

    def _rate(self, arm: Arm) -> float | None:
        load = self._scenario.load_of(arm)
        return load.rate if load.mode == "open" else None

    async def _open(self, block: Block, arm: Arm, phase: Phase, times: Iterator[float], from_at: float) -> None:
        """Starts this worker's share of an open loop's queries."""
        for i, at in enumerate(times):
            due_at = from_at + at
            if i % self._crew.count != self._crew.index:
                continue
            start = await self._ready(arm, block.number(phase, i), phase, block.repeat)
            if await self._stopped_before(due_at) or (phase == "lead-in" and block.phase(due_at) != phase):
                return
            self._begin(block, arm, phase, block.number(phase, i), start, due_at)

    async def _closed(self, block: Block, arm: Arm, phases: Sequence[Phase], end_at: float) -> None:
        """A closed loop's users, as far as they are this worker's."""
        load = self._scenario.load_of(arm)
        users = range(self._crew.index, load.concurrency, self._crew.count)
        if load.users is not None:
            mine = own_sessions(load, self._scenario.seed, block.place_from, block.session_from, self._crew)
            await together(self._converse(block, arm, mine, end_at) for _ in users)
            return
        numbers = {phase: self._own_numbers(load, end_at) for phase in phases}
        await together(self._user(block, arm, numbers) for _ in users)

    def _own_numbers(self, load: Load, end_at: float) -> Iterator[int]:
        """The queries that this worker's users share, until `end_at`: each user's turn, round after round, is one worker's."""
        for i in range(load.queries) if load.queries is not None else count():
            if self._now() >= end_at:
                return
            if i % load.concurrency % self._crew.count == self._crew.index:
                yield i

    async def _converse(self, block: Block, arm: Arm, mine: Iterator[Session], end_at: float) -> None:
        """One of the users of sessions: turn after turn and session after session, with a pause before each query but the first."""
        load, answered_at = self._scenario.load_of(arm), -math.inf
        for session in mine:
            self._last_session = max(self._last_session, session.index)
            for place in range(session.first, session.first + session.turns):
                due_at = max(self._now(), answered_at + think_s(load, self._scenario.seed, place))
                if due_at >= end_at or not await self._turn(block, arm, session, place, due_at):
                    return
                answered_at = self._now()

    async def _turn(self, block: Block, arm: Arm, session: Session, place: int, due_at: float) -> bool:
        """One query of a session, made ready while its user thinks; False where the run was asked to end before."""
        session.turn += 1
        phase: Phase | None = None
        while phase != block.phase(due_at):  # else the window began or ended meanwhile
            phase = block.phase(due_at)
            number = place if phase == "window" else -1 - place
            start = await self._ready(arm, number, phase, block.repeat, session)
            if await self._stopped_before(due_at):
                return False
            due_at = max(due_at, self._now())
        await answered(self._begin(block, arm, phase, number, start, due_at))
        return True

    async def _user(self, block: Block, arm: Arm, numbers: dict[Phase, Iterator[int]]) -> None:
        """One of a closed loop's users: the next query as soon as the last one is answered."""
        while (phase := block.phase(self._now())) in numbers and (i := next(numbers[phase], None)) is not None:
            start = await self._ready(arm, block.number(phase, i), phase, block.repeat)
            if self._asked.is_set():
                return
            if block.phase(self._now()) == phase:  # else the window began or ended while its texts were made
                await answered(self._begin(block, arm, phase, block.number(phase, i), start, self._now()))

    def _begin(
        self, block: Block, arm: Arm, phase: Phase, number: int, start: Start, due_at: float
    ) -> "asyncio.Task[Query]":
        self._highest, self._lowest = max(self._highest, number), min(self._lowest, number)
        task = start(due_at)
        block.running[task] = phase
        task.add_done_callback(partial(self._note, block, arm))
        return task

    def _note(self, block: Block, arm: Arm, task: "asyncio.Task[Query]") -> None:
        """A query that ended. Its news are of use only where a window waits for them."""
        del block.running[task]
        if block.windowed and not task.cancelled():
            query = task.result()
            calls_s = sum(call.seconds for call in query.calls if call.kind == "call")
            self._news.extend((self._places[arm.name], query.done_at - query.due_at, calls_s))

    def _told_now(self) -> list[float]:
        """The news of this worker, once."""
        told, self._news = self._news, array("d")
        return told.tolist()

    async def _meet(self, say: Sequence[float] = ()) -> Met:
        """A meeting of all workers; those of a run that was asked to end do not come."""
        meeting = asyncio.ensure_future(self._crew.meet(say))
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((meeting, asked), return_when=asyncio.FIRST_COMPLETED)
            if self._asked.is_set():
                raise _Stopped
            return meeting.result()
        finally:
            meeting.cancel()
            asked.cancel()

    async def _until(self, at: float) -> None:
        if await self._stopped_before(at):
            raise _Stopped

    async def _stopped_before(self, at: float) -> bool:
        """Sleeps until `at`; True as soon as the run is asked to end."""
        wait_s = (at - self._now()) * self._time_scale
        if wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await self._asked.wait()
            except TimeoutError:
                pass
        return self._asked.is_set()
