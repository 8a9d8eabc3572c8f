"""The engine in time: a scheduler, a step-time law, and the moments at which tokens come out.

Rules of the file:
1. Nothing here reads a clock or waits. The caller says what time it is (`now`, `until`: its own seconds, never going back), and is
   told when to come again (`next_at`). What happens is the same whether it comes at every step or once an hour. What arrives at one
   moment is scheduled together.
2. Steps run one after another on the chip. With asynchronous scheduling two are on their way: step i is scheduled when the result
   of step i-2 has been handled, that is after the launch of step i-1 and the end of step i-2. A request that arrives meanwhile
   waits for the next scheduling. With m_i the moment of scheduling and h_i that of handling a result:
       end_i = max(max(end_{i-1}, m_i) + gpu_i, m_i + launch_i)    h_i = max(end_i, m_{i+1} + launch_{i+1})    m_{i+2} = h_i
   Synchronous: m_{i+1} = h_i = end_i.
3. Tokens come out at h_i, at the end of their step. Costs outside the loop delay a request and load nothing: `ingress_s` before
   it is queued, `token_s` on each token, `completion_s` on its last.
4. Where only finished requests are asked for (`stream=False`), runs of pure-decode steps are taken at once, up to the next arrival,
   end or lack of blocks. It changes nothing but the time it takes; a run's gaps are averaged over at most 32 steps.
5. Data-parallel engines in lockstep (experts shared between them) are one replica with several schedulers: all wait for the slowest.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf, nextafter
from typing import NamedTuple

from fanmark.servers.engine.attribution import Attribution
from fanmark.servers.engine.batch import Batch, EngineConfig, Output
from fanmark.servers.engine.decode_run import DecodeRun, StepTime
from fanmark.servers.engine.events import Event, ReplicaStatistics, Step
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.scheduler import Scheduler
from fanmark.servers.engine.step_time import BatchShape
from fanmark.servers.engine.timeline import Gaps, Timeline

_GAP_STEPS = 32
_LONG_TIMELINE = 1 << 14
_IDLE = BatchShape(0, 0, 0, 0.0, 0)


class _Flight(NamedTuple):
    batches: list[tuple[int, Batch]]  # engine, what it computes
    end_at: float


@dataclass(slots=True)
class _Track:
    """What the replica remembers of a request that is not finished."""

    engine: int
    queued_at: float
    scheduled_at: float = -1.0
    first_at: float = -1.0
    first_number: int = -1  # of the batch that brought the first token


class Replica:
    """One replica: `engines` schedulers in lockstep (1: an ordinary engine) under one step-time law."""

    def __init__(
        self,
        config: EngineConfig,
        law: StepTime,
        *,
        engines: int = 1,
        asynchronous: bool = True,
        stream: bool = True,
        ingress_s: float = 0.0,
        token_s: float = 0.0,
        completion_s: float = 0.0,
        on_step: Callable[[Step], None] | None = None,
        attribution: Attribution | None = None,
    ) -> None:
        self.config = config
        self.law = law
        self.slowdown = 1.0  # factor on the time of every step scheduled from now on
        self.schedulers = [Scheduler(config, every_token=stream) for _ in range(engines)]
        self._depth = 2 if asynchronous else 1
        self._stream = stream
        self._costs = (ingress_s, token_s, completion_s)
        self.on_step = on_step
        self._attribution = attribution
        self._timelines = [Timeline() for _ in range(engines)]
        self._tracks: dict[str, _Track] = {}
        self._adds: deque[tuple[float, Request]] = deque()  # due at, in order: the ingress cost is constant
        self._aborts: deque[tuple[float, str]] = deque()
        self._flights: deque[_Flight] = deque()
        self._ahead: DecodeRun | None = None  # the run that `next_at` foresaw
        self._filling = False  # the next decision schedules another step before a result is in
        self._due_at = 0.0  # the next decision, while anything is on its way
        self._chip_free_at = 0.0
        self._now = 0.0
        self._outbox: list[tuple[float, int, Event]] = []
        self._emitted = self._steps = self._next_engine = 0
        self._busy_s = self._joules = 0.0

    def __repr__(self) -> str:
        return f"<Replica at {self._now:.3f} s, {len(self._flights)} steps on their way, {self.schedulers!r}>"

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._tracks)

    def statistics(self) -> ReplicaStatistics:
        engines = tuple(scheduler.statistics() for scheduler in self.schedulers)
        account = self._attribution.account if self._attribution is not None else None
        return ReplicaStatistics(engines, self._steps, self._busy_s, self._joules, account)

    # The caller's side

    def add(self, request: Request, now: float) -> None:
        """A request arrives. Raises Rejected (queue limit: HTTP 503) or ValueError (it could never be served, or its id is in use)."""
        self._run(nextafter(now, -inf))
        if request.id in self._tracks:
            raise ValueError(f"request id {request.id} is in use: ids are unique among unfinished requests")
        engine = self._least_loaded()
        tokens = sum(len(waiting.prompt) for _, waiting in self._adds)
        self.schedulers[engine].check(request, more_requests=len(self._adds), more_tokens=tokens)
        queued_at = now + self._costs[0]
        self._tracks[request.id] = _Track(engine, queued_at)
        self._adds.append((queued_at, request))

    def abort(self, request_id: str, now: float) -> bool:
        """The client is gone: no event follows, and the blocks are free from the next step on. False if it had ended already."""
        self._run(nextafter(now, -inf))
        withheld = any(entry[2].id == request_id for entry in self._outbox)
        if withheld:  # on its way to the client, of a request that may have ended in the engine
            self._outbox = [entry for entry in self._outbox if entry[2].id != request_id]
            heapify(self._outbox)
        if request_id not in self._tracks:
            return withheld
        for i, (_, request) in enumerate(self._adds):
            if request.id == request_id:
                del self._adds[i], self._tracks[request_id]
                return True
        self._aborts.append((now, request_id))
        return True

    def next_at(self) -> float | None:
        """When to call `advance` next, if nothing is added or aborted before; None when idle. It may turn out to bring no event."""
        due = self._decision_at()
        if due is not None and self._flights:
            due = (due if self._stream else max(due, self._no_end_before())) + self._costs[1]
        if self._outbox and (due is None or self._outbox[0][0] < due):
            return self._outbox[0][0]
        return due

    def advance(self, until: float) -> list[Event]:
        """Run all that is due at or before `until`; the events up to then, in order of time."""
        self._run(until)
        events, outbox = [], self._outbox
        while outbox and outbox[0][0] <= until:
            events.append(heappop(outbox)[2])
        return events

    # The loop

    @property
    def load(self) -> float:
        """Unfinished requests, as vLLM's balancer weighs them: those that wait for a full KV cache count up to four times."""
        return len(self._tracks) + sum(_pressure(scheduler) for scheduler in self.schedulers)

    def _least_loaded(self) -> int:
        """The engine for a new request; of equals, the next in turn."""
        count = len(self.schedulers)
        if count == 1:
            return 0
        load = [_pressure(scheduler) for scheduler in self.schedulers]
        for track in self._tracks.values():
            load[track.engine] += 1.0
        best = min(range(count), key=lambda i: (load[i], (i - self._next_engine) % count))
        self._next_engine = (best + 1) % count
        return best

    def _decision_at(self) -> float | None:
        if self._flights:
            return self._due_at
        if not self._adds and not self._aborts:
            return None
        first = min(inbox[0][0] for inbox in (self._adds, self._aborts) if inbox)
        return max(first, self._now)

    def _no_end_before(self) -> float:
        """A time before which no request ends, as far as steps are scheduled and can be foreseen."""
        for flight in self._flights:
            if any(self.schedulers[engine].ends_with(batch) for engine, batch in flight.batches):
                return flight.end_at
        end_at = self._flights[-1].end_at
        if self._stream or len(self.schedulers) > 1 or len(self._flights) < self._depth:
            return end_at
        if self._adds or self._aborts:  # what is on its way may end before those that run, or make their steps shorter
            return end_at
        run = self._foreseen()
        return end_at + run.seconds(run.steps) if run is not None else end_at

    def _foreseen(self) -> DecodeRun | None:
        """The run of pure-decode steps that comes next, if nothing arrives."""
        scheduler, ahead = self.schedulers[0], self._ahead
        steps = scheduler.runway()
        if steps < 2:
            return None
        shape = scheduler.decode_shape
        if ahead is None or (ahead.steps, ahead.slowdown, ahead.shape) != (steps, self.slowdown, shape):
            ahead = self._ahead = DecodeRun(self.law, shape, steps, self.slowdown)
        return ahead

    def _run(self, until: float) -> None:
        while True:
            at = self._decision_at()
            if at is None or at > until:
                break
            self._now = at
            self._decide(at, until)

    def _decide(self, now: float, until: float) -> None:
        """One turn of the engine's loop: take what came in, handle the oldest result if one is due, schedule one step."""
        while self._aborts and self._aborts[0][0] <= now:
            self._abort_now(self._aborts.popleft()[1])
        if self._flights and not self._filling:
            self._handle(self._flights.popleft(), now)
        while self._adds and self._adds[0][0] <= now:
            request = self._adds.popleft()[1]
            self.schedulers[self._tracks[request.id].engine].enqueue(request)
        if self._jump(now, until):
            return
        launched_at = self._schedule(now)
        if launched_at is not None and len(self._flights) < self._depth:
            self._filling, self._due_at = True, launched_at
        elif self._flights:
            self._filling = False
            self._due_at = max(self._flights[0].end_at, now if launched_at is None else launched_at)

    def _jump(self, now: float, until: float) -> bool:
        """Schedule a run of pure-decode steps, the first of them now and all before the next arrival; False if there is none."""
        flying = len(self._flights)
        if self._stream or len(self.schedulers) > 1 or flying != self._depth - 1:
            return False
        # Step 1 is scheduled now, asynchronously step 2 at start_at, and each further one at the end of one of the run
        start_at = self._flights[0].end_at if flying else now
        before = min([inbox[0][0] for inbox in (self._adds, self._aborts) if inbox], default=inf)
        span_s = (until if until < before else nextafter(before, -inf)) - start_at
        run = self._foreseen() if span_s >= 0.0 else None
        if run is None or run.launch_s > run.first_s or (flying and now + run.launch_s * self.slowdown > start_at):
            return False  # nothing to jump over, or the processor is behind the chip: step by step
        steps = flying + 1 + run.steps_in(span_s, run.steps - flying - 1)
        if steps < 2:
            return False
        self._take(run, steps, start_at)
        return True

    def _take(self, run: DecodeRun, steps: int, start_at: float) -> None:
        """Schedule `steps` steps of a run: they start at `start_at`, one after another."""
        flying, timeline = len(self._flights), self._timelines[0]
        handled = steps - 1 - flying  # of the run's own results
        if flying:
            timeline.add(1, start_at)
            self._now = start_at
        for done in range(0, handled, _GAP_STEPS):
            piece = min(_GAP_STEPS, handled - done)
            self._now = start_at + run.seconds(done + piece)
            timeline.add(piece, self._now)
        run_s = run.seconds(steps)
        first_s = run.seconds(steps - 1) if flying else run_s
        ends = (start_at + first_s, start_at + run_s) if flying else (start_at + run_s,)
        self._flights = deque(_Flight([(0, b)], at) for b, at in zip(self.schedulers[0].run(steps), ends, strict=True))
        self._filling, self._due_at, self._chip_free_at = False, ends[0], ends[-1]
        self._steps += steps
        self._busy_s += run_s
        joules = run.joules(steps, run_s)
        self._joules += joules
        if self._attribution is not None:
            last = self._flights[-1].batches[0][1].number
            self._attribution.run(last, run.shape, steps, run_s, joules, self.slowdown)
        if self.on_step is not None:
            self.on_step(Step(start_at, ends[-1], run.shape, steps))

    def _abort_now(self, request_id: str) -> None:
        track = self._tracks.pop(request_id, None)
        if track is not None:
            self.schedulers[track.engine].abort(request_id)
            if self._attribution is not None:
                self._attribution.drop(track.engine, request_id)

    def _schedule(self, now: float) -> float | None:
        """Schedule and launch one step; the moment at which the processor is free again, None if there is nothing to do."""
        batches = []
        for engine, scheduler in enumerate(self.schedulers):
            batch = self._batch(scheduler)
            if batch is not None:
                batches.append((engine, batch))
                for request_id in batch.cached:
                    track = self._tracks[request_id]
                    if track.scheduled_at < 0.0:
                        track.scheduled_at = now
        if not batches:
            return None
        law, shapes = self.law, [batch.shape for _, batch in batches]
        if len(self.schedulers) == 1:
            gpu_s = law.gpu_seconds(shapes[0])
        else:
            shapes += [_IDLE] * (len(self.schedulers) - len(shapes))
            gpu_s = law.lockstep_seconds(shapes)
        launched_at = now + max([law.launch_seconds(shape) for shape in shapes]) * self.slowdown
        start_at = max(self._chip_free_at, now)
        end_at = max(start_at + gpu_s * self.slowdown, launched_at)
        self._chip_free_at = end_at
        self._flights.append(_Flight(batches, end_at))
        self._steps += 1
        self._busy_s += end_at - start_at
        joules = sum([law.joules(shape, end_at - start_at) for shape in shapes])
        self._joules += joules
        if self._attribution is not None:
            self._attribution.step(batches, shapes, end_at - start_at, joules, self.slowdown)
        if self.on_step is not None:
            whole = BatchShape(*(sum(column) for column in zip(*shapes, strict=True)))
            self.on_step(Step(start_at, end_at, whole, 1))
        return launched_at

    def _batch(self, scheduler: Scheduler) -> Batch | None:
        """What an engine computes next; a batch that only preempts is none."""
        while True:
            batch = scheduler.schedule()
            if batch is None or len(batch):
                return batch
            if self._flights:
                return None
            # It preempted all it had: vLLM's loop comes round at once, and admits from an empty cache

    def _handle(self, flight: _Flight, now: float) -> None:
        for engine, batch in flight.batches:
            if not self._stream:
                self._timelines[engine].add(1, now)
            for output in self.schedulers[engine].update(batch):
                self._emit(output, now + self._costs[1], batch.number)

    def _emit(self, output: Output, at: float, number: int) -> None:
        track = self._tracks[output.id]
        if output.first:
            track.first_at, track.first_number = at, number
        gaps: Gaps = []
        share = None
        if output.finished:
            del self._tracks[output.id]
            if self._attribution is not None:
                share = self._attribution.end(track.engine, output.id, output.spans)
            if not self._stream:
                gaps = self._gaps(track.engine, output)
        elif not self._stream:
            return
        event = Event(
            id=output.id,
            at=at + self._costs[2] if output.finished else at,
            tokens=1 if self._stream else output.index + 1,
            index=output.index if self._stream else 0,
            first=output.first or not self._stream,
            finished=output.finished,
            cached_tokens=output.cached_tokens,
            queued_at=track.queued_at,
            scheduled_at=track.scheduled_at,
            first_at=track.first_at,
            preemptions=output.preemptions,
            gaps=gaps,
            share=share,
        )
        self._emitted += 1
        heappush(self._outbox, (event.at, self._emitted, event))

    def _gaps(self, engine: int, output: Output) -> Gaps:
        timeline = self._timelines[engine]
        gaps = timeline.gaps(output.spans)
        if len(timeline) > _LONG_TIMELINE:
            live = [t.first_number for t in self._tracks.values() if t.engine == engine and t.first_number >= 0]
            timeline.forget(min([output.spans[-1][1], *live]))
        return gaps


def _pressure(scheduler: Scheduler) -> float:
    return len(scheduler.waiting) * 6.0 * max(0.0, scheduler.kv.usage - 0.5)
