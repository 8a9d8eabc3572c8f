"""Laws that hold after every step of any workload, and the equality of what is fast with what is plain."""

from collections import Counter, deque
from itertools import pairwise
from typing import Any

import pytest
from engine_laws import LAUNCH_BOUND, ROUGH, WINDOWED, configs, workloads
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.servers.engine.batch import Batch, EngineConfig, Sequence
from fanmark.servers.engine.events import Event, Step
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.scheduler import Scheduler
from fanmark.servers.engine.step_time import StepLaw

Workload = list[tuple[float, Request, float | None]]


class OneByOne(Scheduler):
    """Follows vLLM's rules request by request, in every step."""

    def _schedule_together(self, batch: Batch) -> int | None:
        return None

    def runway(self) -> int:
        return 0


def check_blocks(scheduler: Scheduler) -> None:
    """Free and held blocks are all there are, and every block knows its holders."""
    kv, size = scheduler.kv, scheduler.config.block_size
    held, own = set(), 0
    for sequence in [*scheduler.running, *scheduler.waiting]:
        table = sequence.table
        blocks = table.blocks
        if sequence.lazy:
            blocks = -(-(sequence.offset + min(scheduler._number, sequence.last + 1)) // size)
        assert table.cached == sum(len(run.hashes) for run in table.runs) <= blocks
        assert all(table in run.holders for run in table.runs)
        held.update(table.runs)
        own += blocks - table.cached
        assert sequence.is_running or blocks == 0
    free, run = [], kv._queue.after
    while run is not kv._queue:
        assert not run.holders and run.hashes
        free.append(run)
        run = run.after
    assert not held.intersection(free)
    for run in held:
        assert {table for table in run.holders} == {
            sequence.table for sequence in scheduler.running if run in sequence.table.runs
        }
    in_free = sum(len(run.hashes) for run in free)
    assert kv.free == kv._blank + in_free
    assert kv.free + own + sum(len(run.hashes) for run in held) == kv.total
    check_index(scheduler, [*held, *free])


def check_index(scheduler: Scheduler, runs: list[Any]) -> None:
    """Each hash leads to the runs that have it, the first of them found by a lookup."""
    kv = scheduler.kv
    places = Counter(block_hash for run in runs for block_hash in run.hashes)
    assert places == Counter(kv._first.keys()) + Counter({key: len(later) for key, later in kv._later.items()})
    for run in runs:
        assert run.shadowed == sum(kv._first[block_hash] is not run for block_hash in run.hashes)
        assert all(run is kv._first[key] or run in kv._later[key] for key in run.hashes)


def check_step(scheduler: Scheduler, batch: Batch | None) -> None:
    config = scheduler.config
    assert sorted(map(id, scheduler._sequences.values())) == sorted(map(id, [*scheduler.running, *scheduler.waiting]))
    assert len(scheduler.running) <= config.max_num_seqs
    check_blocks(scheduler)
    if batch is None or not len(batch):
        return
    tokens = batch.scheduled
    assert 0 < sum(tokens.values()) <= config.max_num_batched_tokens
    shape = batch.shape
    assert shape.prefill_tokens + shape.decode_seqs == sum(tokens.values())
    assert shape.seqs == len(tokens)


def drive(scheduler: Scheduler, workload: Workload, depth: int) -> list[Any]:
    """A step is 10 ms; the log of all that was decided and came out."""
    log: list[Any] = []
    flights: deque[Batch] = deque()
    todo, step = deque(workload), 0
    aborts = sorted((abort, request.id) for _, request, abort in workload if abort is not None)
    ended: Counter[str] = Counter()
    given: dict[str, list[int]] = {}
    while todo or len(scheduler) or flights:
        now = step * 0.01
        step += 1
        while aborts and aborts[0][0] <= now:
            ended[aborts[0][1]] += scheduler.abort(aborts.pop(0)[1])
        while todo and todo[0][0] <= now:
            request = todo.popleft()[1]
            try:
                scheduler.add(request)
            except ValueError:
                ended[request.id] += 1
        idle_before = not flights
        batch = scheduler.schedule()
        check_step(scheduler, batch)
        if batch is not None:
            log.append((batch.scheduled, sorted(batch.preempted), batch.cached, scheduler.statistics()))
            log.append(tuple(batch.shape))
            if len(batch):
                flights.append(batch)
            else:
                assert batch.preempted
        elif idle_before:
            assert not len(scheduler), "work-conserving"
        if flights and (len(flights) == depth or batch is None or not len(batch)):
            for output in scheduler.update(flights.popleft()):
                log.append((output.id, output.index, output.first, output.finished, output.cached_tokens))
                given.setdefault(output.id, []).append(output.index)
                ended[output.id] += output.finished
            check_blocks(scheduler)
        assert step < 5000
    assert set(ended.values()) <= {1} and set(ended) == {request.id for _, request, _ in workload}
    assert all(indices == list(range(len(indices))) for indices in given.values())
    assert scheduler.kv.free == scheduler.kv.total
    log.append(scheduler.statistics())
    return log


@settings(deadline=None, max_examples=150)
@given(configs(), workloads(), st.sampled_from([1, 2]))
def test_invariants_hold_after_every_step_and_deciding_together_equals_deciding_one_by_one(
    config: EngineConfig, workload: Workload, depth: int
) -> None:
    assert drive(Scheduler(config), workload, depth) == drive(OneByOne(config), workload, depth)


def timed(replica: Replica, workload: Workload, wakes: list[float]) -> list[Event]:
    """All events of a workload; `wakes`: moments at which the replica is woken for nothing."""
    inputs: list[tuple[float, int, Any]] = [(at, 1, request) for at, request, _ in workload]
    inputs += [(abort, 2, request.id) for _, request, abort in workload if abort is not None]
    inputs += [(at, 0, None) for at in wakes]
    inputs.sort(key=lambda entry: entry[:2])
    events: list[Event] = []
    for at, kind, what in inputs:
        while (due := replica.next_at()) is not None and due <= at:
            events += replica.advance(due)
        if kind == 0:
            events += replica.advance(at)
        elif kind == 1:
            try:
                replica.add(what, at)
            except ValueError:
                continue
        else:
            replica.abort(what, at)
    turns = 0
    while (due := replica.next_at()) is not None:
        events += replica.advance(due)
        turns += 1
        assert turns < 5000
    return events


def plain(config: EngineConfig, law: StepLaw, **options: Any) -> Replica:
    replica = Replica(config, law, **options)
    replica.schedulers = [OneByOne(config) for _ in replica.schedulers]
    return replica


@settings(deadline=None, max_examples=150)
@given(
    configs(),
    workloads(),
    st.sampled_from([ROUGH, WINDOWED, LAUNCH_BOUND]),
    st.booleans(),
    st.lists(st.floats(0.0001, 0.7), max_size=3),
    st.sampled_from([(0.0, 0.0, 0.0), (0.00613, 0.0000471, 0.00083)]),
)
def test_jumping_over_decode_runs_equals_stepping_one_by_one(
    config: EngineConfig,
    workload: Workload,
    law: StepLaw,
    asynchronous: bool,
    wakes: list[float],
    costs: tuple[float, float, float],
) -> None:
    options: dict[str, Any] = dict(zip(("ingress_s", "token_s", "completion_s"), costs, strict=True))
    options["asynchronous"] = asynchronous
    jumped: list[Event] = []
    steps: list[Step] = []
    stepped = plain(config, law, **options)
    jumping = Replica(config, law, stream=False, on_step=steps.append, **options)
    for event in timed(jumping, workload, wakes):
        assert event.finished
        jumped.append(event)
    tokens: dict[str, list[Event]] = {}
    for event in timed(stepped, workload, []):
        tokens.setdefault(event.id, []).append(event)
    ended = {name: events for name, events in tokens.items() if events[-1].finished}
    assert sorted(ended) == sorted(event.id for event in jumped)
    for event in jumped:
        check_same(event, ended[event.id], costs)
    check_same_totals(jumping, stepped, steps)


def check_same(event: Event, events: list[Event], costs: tuple[float, float, float]) -> None:
    """One event of a whole request against the events of its tokens."""
    last = events[-1]
    assert (event.tokens, event.cached_tokens, event.preemptions) == (len(events), last.cached_tokens, last.preemptions)
    assert event.at == pytest.approx(last.at, abs=1e-9)
    assert event.first_at == pytest.approx(events[0].first_at, abs=1e-9)
    assert event.scheduled_at == pytest.approx(last.scheduled_at, abs=1e-9)
    assert event.queued_at <= event.scheduled_at < event.first_at <= event.at
    assert sum(count for _, count in event.gaps) == event.tokens - 1
    at, place = 0.0, 0
    for gap, count in event.gaps:
        at, place = at + gap * count, place + count
        token = events[place]
        assert event.first_at + at == pytest.approx(token.at - costs[2] * token.finished, abs=1e-9)


def check_same_totals(jumping: Replica, stepped: Replica, steps: list[Step]) -> None:
    a, b = jumping.statistics(), stepped.statistics()
    assert (a.engines, a.steps) == (b.engines, b.steps)
    assert a.busy_s == pytest.approx(b.busy_s, abs=1e-9)
    assert a.joules == pytest.approx(b.joules, rel=1e-9)
    assert sum(step.steps for step in steps) == a.steps
    assert all(one.end_at <= other.start_at + 1e-12 for one, other in pairwise(steps)), "clock monotone"


@settings(deadline=None, max_examples=30)
@given(configs(), workloads())
def test_the_same_workload_gives_the_same_events(config: EngineConfig, workload: Workload) -> None:
    once, again = (timed(Replica(config, ROUGH), workload, []) for _ in range(2))
    assert repr(once) == repr(again)


def test_a_sequence_is_settled_to_what_stepping_would_have_made_of_it() -> None:
    sequence = Sequence(Request("a", [1] * 10, [2] * 9), [], 100, 1)
    sequence.lazy, sequence.base, sequence.since, sequence.last, sequence.offset = True, 10, 4, 12, 5
    sequence.settle(8, 7, 4)
    assert (sequence.tokens, sequence.computed, sequence.placeholders, sequence.table.blocks) == (13, 13, 1, 4)
    assert sequence.spans == [(4, 6)]
