"""Arms x schedule -> records: the only place where scenario, topologies, targets and tools meet."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

from fanmark.agents.replay import Enacted
from fanmark.agents.runtime import Topology
from fanmark.loadgen.block import together
from fanmark.loadgen.contamination import Explained
from fanmark.loadgen.costs import mismatches, resources_of
from fanmark.loadgen.counters import unfinished
from fanmark.loadgen.crew import Alone, Crew, share
from fanmark.loadgen.demand import Demand, draw_demand, expected_tokens
from fanmark.loadgen.endpoint import Endpoint, role_key
from fanmark.loadgen.errors import CallError, Stopped
from fanmark.loadgen.fidelity import fidelity
from fanmark.loadgen.gate import Gate
from fanmark.loadgen.quality import final_replies, is_right
from fanmark.loadgen.records import Begun, Outcome, Phase, Query, Window
from fanmark.loadgen.runtime import QueryRuntime
from fanmark.loadgen.scenario import Arm, Scenario
from fanmark.loadgen.schedule import Schedule, Start
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.thresholds import broken
from fanmark.loadgen.tool_calls import ToolUse
from fanmark.loadgen.users import Session, expected_with, place_of
from fanmark.loadgen.walk import walk
from fanmark.loadgen.world import World

GRACE_S = 5.0  # what running queries get after the first interrupt
LINE_PROMPTS = 5_000  # of a file's line, so many are remembered from query to query
DRAIN_S = 30.0  # how long arms that run apart wait for the server to be empty
DRAIN_LOOK_S = 0.25


class Writer(Protocol):
    """Takes each query as it begins and as it closes, and each window as it is known."""

    def begin(self, query: Begun) -> None: ...

    def write(self, query: Query) -> None: ...

    def window(self, window: Window) -> None: ...


@dataclass(frozen=True)
class Ending:
    """Why a run ended before its schedule did; `reason` is for the user, in a line."""

    why: Literal["interrupted", "budget", "errors", "threshold"]
    reason: str


INTERRUPTED = Ending("interrupted", "this is what was measured until then")


@dataclass
class Stop:
    """How a run is asked to end: no new queries, then (after a grace, or at the second asking) no running ones either. At a budget's cap
    running queries have all the time they need: what is left of the budget is theirs."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)
    ending: Ending | None = None

    def ask(self) -> None:
        """First call: no new queries. Second: end at once."""
        if self.asked.is_set():
            self.ending = INTERRUPTED
            self.forced.set()
        self.end(INTERRUPTED)

    def end(self, ending: Ending) -> None:
        """No new queries, for this reason, if no other was first."""
        self.ending = self.ending or ending
        self.asked.set()

    def at_once(self) -> None:
        """Ends the run now, without a grace."""
        self.asked.set()
        self.forced.set()


class Run:
    """One execution of a scenario. `endpoints` are by name; without targets in the scenario there is one, "default"."""

    def __init__(
        self,
        scenario: Scenario,
        topologies: Mapping[str, Topology],
        endpoints: Mapping[str, Endpoint],
        tools: ToolUse | None,
        tally: Tally,
        journal: Writer,
        run_id: str,
        now: Callable[[], float],
        time_scale: float = 1.0,
        crew: Crew | None = None,
    ) -> None:
        self.scenario = scenario
        self.stop = Stop()
        self._topologies = topologies
        self._endpoints = endpoints
        self._arms = {arm.name: arm for arm in scenario.arms}
        self._tally = tally
        self._journal = journal
        self._now = now
        self._time_scale = time_scale
        self._crew = crew or Alone(now)
        load = scenario.load
        guard = load.max_in_flight
        self._slots = asyncio.Semaphore(share(guard, self._crew)) if guard is not None else None
        self._query_timeout_s = load.query_timeout_s * time_scale if load.query_timeout_s is not None else None
        self._running: dict[asyncio.Task[Query], None] = {}  # in the order in which they began
        gate = Gate(
            scenario, endpoints, now, time_scale, self._crew, lambda why, line: self.stop.end(Ending(why, line))
        )
        self._explained = Explained(elsewhere=self._crew.count > 1)
        self._world = World(
            run_id=run_id,
            seed=scenario.seed,
            now=now,
            forced=scenario.workload.lengths == "forced",
            salts=self._salt,
            endpoint=self._endpoint,
            tools=tools,
            explained=self._explained,
            tally=tally,
            gate=gate,
            time_scale=time_scale,
            worker=self._crew.index,
            arms=self._arms,
            questions=scenario.questions,
            record=scenario.record,
        )

    def _salt(self, run: str, arm: str, query: int, call: int) -> str | None:
        cache = self.scenario.workload.cache
        salts = {
            "arm": f"{run}-{arm}",
            "run": run,
            "query": f"{run}-{arm}-{query}",
            "call": f"{run}-{arm}-{query}-{call}",
        }
        return salts.get(cache)

    def _endpoint(self, arm: str, role: str) -> Endpoint:
        chosen = self._arms[arm]
        by_role = chosen.targets.get(role_key(role, chosen.targets) or "default")
        return self._endpoints[by_role or chosen.target or "default"]

    async def execute(self) -> Ending | None:
        """Runs the whole schedule, and says what cut it short. Every query that was started is in the journal afterwards."""
        schedule = asyncio.ensure_future(self._schedule())
        watch = asyncio.ensure_future(self._watch(schedule))
        try:
            await schedule
        except asyncio.CancelledError:
            if not self.stop.asked.is_set():
                raise
        finally:
            watch.cancel()
            for task in self._running:
                task.cancel()
            await asyncio.gather(watch, *self._running, return_exceptions=True)
        return self.stop.ending

    async def _watch(self, schedule: asyncio.Future[None]) -> None:
        await self.stop.asked.wait()
        at_cap = self.stop.ending is not None and self.stop.ending.why == "budget"
        try:
            async with asyncio.timeout(None if at_cap else GRACE_S):
                await self.stop.forced.wait()
        except TimeoutError:
            pass
        schedule.cancel()

    async def _schedule(self) -> None:
        await together(self._make_texts(arm) for arm in self.scenario.arms)
        schedule = Schedule(
            self.scenario,
            self._ready,
            self._crew,
            self._now,
            self.stop.asked,
            self._drained,
            self._journal.window,
            self._time_scale,
            self._tally.begun.append,
        )
        await schedule.run()

    async def _drained(self) -> None:
        """Waits until no request is left at the servers, as far as they tell of it, so that the next arm finds them empty."""
        give_up_at = self._now() + DRAIN_S
        for endpoint in self._endpoints.values():
            while left := unfinished(await endpoint.reading()):
                if self._now() >= give_up_at:
                    endpoint.notes.append(
                        f"{endpoint.name}: {left:g} requests were still there {DRAIN_S:g} s after an arm's last query: somebody else's?"
                    )
                    break
                if self.stop.asked.is_set():
                    return
                await asyncio.sleep(DRAIN_LOOK_S * self._time_scale)

    async def _ready(self, arm: Arm, number: int, phase: Phase, repeat: int, session: Session | None = None) -> Start:
        """A query with its own texts made before it is due, so that its first call does not wait for them."""
        runtime = QueryRuntime(self._world_of(repeat), self._demand(arm, number), session)
        await runtime.prepare(self._endpoints_of(arm), [runtime.system, runtime.question])

        return partial(self._start, arm, runtime, phase, repeat)

    def _start(self, arm: Arm, runtime: QueryRuntime, phase: Phase, repeat: int, due_at: float) -> asyncio.Task[Query]:
        task = asyncio.ensure_future(self._query(arm, runtime, due_at, phase, repeat))
        self._running[task] = None
        task.add_done_callback(self._running.pop)
        return task

    def _world_of(self, repeat: int) -> World:
        """Each repeat is a run of its own to the servers: its salts are new, so that it starts as cold as the first."""
        return self._world if repeat == 1 else replace(self._world, run_id=f"{self._world.run_id}.{repeat}")

    def _endpoints_of(self, arm: Arm) -> set[Endpoint]:
        return {self._endpoint(arm.name, role) for role in arm.targets} or {self._endpoint(arm.name, "")}

    def _demand(self, arm: Arm, query: int) -> Demand:
        return draw_demand(self.scenario, arm, self._topologies, query)

    async def _make_texts(self, arm: Arm) -> None:
        """Makes the texts that all queries of an arm share before the first is due, so that none waits for them. A topology that raises
        fails its queries, not the run."""
        demand = self._demand(arm, 0)
        runtime = QueryRuntime(self._world, demand)
        try:
            calls = await walk(demand.topology, demand)
        except Exception:  # of a user's own: the walk's replies are empty, and it may read them
            return
        for made in calls:
            await runtime.prepare([self._endpoint(arm.name, made.role)], made.prompt)

    async def _query(self, arm: Arm, runtime: QueryRuntime, due_at: float, phase: Phase, repeat: int) -> Query:
        """One query, from its due time to its record. The only place where any exception becomes an outcome."""
        counted = phase == "window"
        outcome: Outcome = "failed"
        error: str | None = None
        stopped: str | None = None
        if counted:
            self._tally.query_started(arm.name)
        started_at = self._now()
        demand = runtime.demand
        session, turn = place_of(runtime.session)
        begun = Begun(demand.query, arm.name, phase, repeat, due_at, started_at, demand.seed, session, turn)
        self._journal.begin(begun)
        try:
            async with self._slots or nullcontext():
                endpoints = self._endpoints_of(arm)
                runtime.promise = await self._world.gate.begin(demand, runtime, endpoints, runtime.told)
                started_at = self._now()
                async with asyncio.timeout(self._query_timeout_s):
                    stopped = await self._answer(arm, runtime)
            outcome = "completed"
        except TimeoutError:
            error = f"timeout: no final answer within {self.scenario.load.query_timeout_s:g} s"
        except asyncio.CancelledError:
            outcome = "abandoned"
        except CallError as e:
            error = f"{e.kind}: {e}"
        except Exception as e:  # a topology's own defect must not end the others
            error = f"{type(e).__name__}: {e}"
        query = Query(
            query=demand.query,
            arm=arm.name,
            warmup=not counted,
            phase=phase,
            repeat=repeat,
            due_at=due_at,
            started_at=started_at,
            done_at=self._now(),
            outcome=outcome,
            resources={},
            expected={},
            mismatches=[],
            seed=demand.seed,
            error=error,
            calls=runtime.calls,
            retried=runtime.retried,
            stopped=stopped,
            part=demand.part,
            session=session,
            turn=turn,
        )
        self._world.gate.finish(runtime.promise)
        await self._account(query, runtime)
        self._forget(query, runtime)
        self._journal.write(query)
        if counted:
            self._count(query)
        return query

    def _count(self, query: Query) -> None:
        self._tally.query_finished(query)
        missed = broken(self.scenario.threshold, self._tally)
        if missed is not None:
            self.stop.end(Ending("threshold", missed))

    def _forget(self, query: Query, runtime: QueryRuntime) -> None:
        """A query is over: its tool sessions, its own texts and its traffic go, but for what later turns of its session read."""
        session, over = runtime.session, [query.query]
        if self._world.tools is not None:
            self._world.tools.end((query.arm, query.query))
        if session is not None:
            turn = runtime.as_turn() if query.outcome == "completed" else None
            if turn is not None:
                session.told.append(turn)
            if session.turn < session.turns and turn is not None:
                return
            over += [turn.query for turn in session.told] if session.turn == session.turns else []
        for endpoint in self._endpoints.values():
            for number in over:
                endpoint.prompts.forget(f"{self.scenario.seed}/{number}")
        if self.scenario.workload.cache != "run" and (session is None or session.turn == session.turns):
            self._explained.forget((query.arm, runtime.owner), keep=LINE_PROMPTS if self.scenario.questions else 0)

    async def _account(self, query: Query, runtime: QueryRuntime) -> None:
        """What the query cost, and where that differs from its closed form."""
        query.resources = resources_of(query, self.scenario)
        if query.outcome != "abandoned":
            query.expected, at_most = await self._expected(query, runtime)
            query.bound = at_most or query.stopped is not None
        query.output_bound = not self._world.forced or any("ignore_eos" in e.dropped for e in self._endpoints.values())
        if query.outcome == "completed":
            query.mismatches = mismatches(query)
            query.correct = self._correct(runtime) if query.output_bound else None
            if isinstance(runtime.demand.params, Enacted):
                query.fidelity = fidelity(runtime.demand.params.steps, query.calls, query.started_at)
        query.unexplained_tokens = runtime.unexplained_tokens

    def _correct(self, runtime: QueryRuntime) -> bool | None:
        """Whether the final answer is the known one; None where there is none, or where it is filler."""
        question = runtime.demand.asked
        replies = [runtime.replies[key] for key in final_replies(runtime.calls, runtime.numbers)]
        if question is None or question.answer is None or not replies or any(e.filler for e, _, _ in replies):
            return None
        return is_right(question.answer, [text for _, _, text in replies])

    async def _answer(self, arm: Arm, runtime: QueryRuntime) -> str | None:
        """Runs the topology; gives the arm's limit that ended it early, if one did."""
        limit_s = arm.query_seconds * self._time_scale if arm.query_seconds is not None else None
        timeout = asyncio.timeout(limit_s)
        try:
            async with timeout:
                await runtime.demand.topology.run(runtime, runtime.demand.params)
            return None
        except Stopped as e:
            limit = e.limit
        except TimeoutError:
            if not timeout.expired():
                raise
            limit = "query_seconds"
        if not any(call.kind == "call" and call.error is None for call in runtime.calls):
            raise CallError("timeout", f"{limit} was reached before any call had ended")
        return limit

    async def _expected(self, query: Query, runtime: QueryRuntime) -> tuple[dict[str, int | None], bool]:
        """The closed form with the real sizes of what could not be drawn: replies and tool results as they are read again; and whether it
        is a bound."""
        topology = runtime.demand.topology
        if topology.expected is None:
            return {}, False
        form = expected_with(topology.expected(runtime.demand.params, runtime), runtime.told)
        for key, times in form.reads.items():
            base = key[1:] if key[0] == "quoted" else key
            if times and runtime.sizes.get(key) is None and base in runtime.replies:
                endpoint, author, text = runtime.replies[base]
                try:
                    counted = await endpoint.prompts.reply_size("user" if key[0] == "quoted" else author, text)
                except CallError:
                    counted = None
                runtime.sizes[key] = counted[0] if counted else None
                written = next((c.output_tokens for c in runtime.calls if c.call == runtime.numbers.get(base)), None)
                if counted and written:
                    query.written_tokens += written
                    query.reread_tokens += counted[1]
        output, total = expected_tokens(form, runtime.demand.lengths, runtime.sizes)
        expected = {
            "calls": form.calls,
            "tool_calls": form.tool_calls,
            "input_tokens": total,
            "output_tokens": output,
            "depth": form.depth,
            "width": form.width,
        }
        return expected, form.at_most
