"""One `fanmark run` from start to end: servers up, target measured, schedule run, results written, servers down."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen import server_side
from fanmark.loadgen.course import Course
from fanmark.loadgen.crew import Alone
from fanmark.loadgen.environment import client_host, environment, on_this_host
from fanmark.loadgen.errors import LostError, ScenarioError
from fanmark.loadgen.execute import carry_out, going_on, open_connections
from fanmark.loadgen.health import Health, client_part
from fanmark.loadgen.link import Ended
from fanmark.loadgen.live import Progress, tell
from fanmark.loadgen.metrics import Metrics
from fanmark.loadgen.metrics_server import Page, Scrapes, hold, serve, texts_of
from fanmark.loadgen.otlp import Facts, Spans, check_url
from fanmark.loadgen.question_file import write_questions
from fanmark.loadgen.reach import Reached, reach, settle, uses_tools
from fanmark.loadgen.records import Journal, digests, read_queries, read_windows
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.report.live_page import LivePage
from fanmark.loadgen.report.write import write_report
from fanmark.loadgen.results import assemble, so_far, write_summary
from fanmark.loadgen.run import GRACE_S, Run
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.samples import Sampler, read_samples
from fanmark.loadgen.scenario import QUESTIONS, Scenario, resolved
from fanmark.loadgen.shaping import target_key
from fanmark.loadgen.stations import Opening, open_local
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.target import HttpEndpoint
from fanmark.loadgen.toolset import listing
from fanmark.loadgen.unrecorded import read_snapshots
from fanmark.loadgen.watched import own_metrics, told_of
from fanmark.loadgen.workers import Workers


@dataclass(frozen=True)
class Options:
    """What the command line adds to the scenario. `run_id` is unique to the run: it salts the prefix cache. `metrics_hold_s` None: for as
    long as a scraper needs to see the run's end, where there is one."""

    out: Path
    metrics_port: int
    run_id: str
    version: str
    command: Sequence[str]
    progress: TextIO | None
    workers: int = 1  # on a cluster 0: one a node
    ray: str | None = None
    stop_on_loss: bool = False
    keep_journals: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    metrics_host: str = "127.0.0.1"
    metrics_hold_s: float | None = 0.0
    otlp: str | None = None


@dataclass(frozen=True)
class Result:
    """summary.json."""

    summary: dict[str, Any]


async def run(scenario: Scenario, topologies: Mapping[str, Topology], options: Options) -> Result:
    """Runs the scenario and leaves its folder. Raises FanmarkError before anything is sent where something is wrong."""
    if options.otlp is not None:
        check_url(options.otlp)
    async with AsyncExitStack() as last, AsyncExitStack() as stack:
        opening, options = await _opening(scenario, topologies, options, stack)
        place = await settle(scenario, topologies, stack)
        clock = RunClock(place.time_scale)
        reached = await reach(scenario, topologies, place, clock.now, stack)
        endpoints = reached.endpoints
        tally = Tally({arm.name: arm.topology for arm in scenario.arms}, scenario.baseline.name)
        watched = await told_of(scenario, topologies, reached, options.run_id, options.version, clock)
        scrapes = Scrapes(Metrics(tally, watched, texts_of(own_metrics(scenario, place))).scrape)
        course = _course(scenario, tally, clock)
        pages: dict[str, Page] = {"/metrics": scrapes, **LivePage(course, scenario.name).pages()}
        port, stop_metrics = serve(pages, options.metrics_port, options.metrics_host)
        stack.callback(stop_metrics)
        before = await server_side.read_all(endpoints)
        server_side.name_servers(endpoints, before)
        surroundings = await _surroundings(scenario, options, endpoints, before)
        journal = open_folder(options.out, scenario)
        stack.callback(_close, journal, options.out, clock)
        spans = _spans(scenario, options, endpoints, clock, journal)
        where = next(iter(place.targets.values())).replicas[0]
        tell(f"target   {where} ({next(iter(endpoints.values())).server})", options.progress)
        tell(f"metrics  http://{options.metrics_host}:{port}/metrics", options.progress)
        tell(f"live     http://{options.metrics_host}:{port}/", options.progress)
        started = datetime.now(UTC)
        sampler = Sampler(options.out, clock.now, endpoints, before, tally)
        try:
            if opening is None:
                ended = await _alone(scenario, topologies, reached, course, journal, options, clock, sampler, last)
            else:
                crew = Workers(scenario, place, options.run_id, clock, tally, opening, keep=options.keep_journals)
                ended = await _crew(crew, course, journal, options, sampler, stack, last)
            seconds = clock.now()
            journal.flush()
        except LostError as e:
            raise LostError(f"{e}: the run ended with it; until then {so_far(tally)}") from None
        records = ended.found or reduced(read_queries(options.out), scenario.objective, read_snapshots(options.out))
        server = await server_side.reconciled(endpoints, before, records)
        sampler.tell_idle(server)
        if any(state.lost_at is not None for state in ended.states.values()):
            _not_reconcilable(server)
        stub = await server_side.stub_on_time(endpoints, before, records, place.time_scale)
        run_part = _run_part(scenario, options, started, seconds, place.time_scale)
        client = partial(client_part, ended.states, host_busy_seconds=sampler.host_busy_seconds)
        found = assemble(
            scenario, records, endpoints, server, client, run_part, stub,
            ending=ended.ending, windows=read_windows(options.out), samples=read_samples(options.out),
            tools=listing(reached.tools, endpoints) if reached.tools is not None else None,
        )  # fmt: skip
        notes = [*ended.notes, *found["notes"], *_sent(spans, options.out if opening is not None else None)]
        found["notes"] = list(dict.fromkeys(notes))  # what is lost first; all workers notice the same
        found, course.report = _leave(options.out, found | {"environment": surroundings}, endpoints)
        tally.validity = {tick: ok for tick, ok in found["validity"].items() if isinstance(ok, bool)}
        watched.ended_at = time.time()
        await _hold(scrapes.hold_s if options.metrics_hold_s is None else options.metrics_hold_s, options.progress)
        return Result(found)


def _close(journal: Journal, out: Path, clock: RunClock) -> None:
    """Of a run that never began no records stay, so that its folder can be given again."""
    journal.close()
    if clock.began_at is None:
        for name in ("queries.jsonl", "calls.jsonl"):
            (out / name).unlink()


def _not_reconcilable(server: dict[str, Any]) -> None:
    reason = "a worker died with calls under way"
    for part in [server] if "reconciled" in server else list(server.values()):
        part |= {"reconciled": None, "alone": None, "reason": reason, "alone_reason": reason}


def _spans(
    scenario: Scenario, options: Options, endpoints: Mapping[str, HttpEndpoint], clock: RunClock, journal: Journal
) -> Spans | None:
    """Where spans are wanted: what sends them, told of each query as it ends."""
    if options.otlp is None:
        return None
    models = {name: endpoint.model for name, endpoint in endpoints.items()}
    facts = Facts(
        options.run_id, scenario.name, options.version, models, lambda: clock.began_at, time_scale=clock.time_scale
    )
    spans = Spans(options.otlp, facts)
    journal.told = spans.put
    return spans


def _sent(spans: Spans | None, of_workers: Path | None) -> list[str]:
    """Ends the sending of spans, those of workers' queries first, where they are in this folder; what is to be told of it."""
    if spans is None:
        return []
    for query in read_queries(of_workers) if of_workers is not None and (of_workers / "queries.jsonl").exists() else ():
        spans.put(query, waits=True)
    return spans.close()


def _leave(out: Path, found: dict[str, Any], endpoints: Mapping[str, HttpEndpoint]) -> tuple[dict[str, Any], str]:
    """Writes the summary, without a secret in it, and the report; gives both as they were written."""
    for endpoint in endpoints.values():
        found = endpoint.shape.secrets.clean(found)
    found["files"] = digests(out)
    write_summary(out, found)
    return found, write_report(out)


async def _hold(seconds: float, progress: TextIO | None) -> None:
    """Leaves the metrics up, so that the run's last state can be scraped, until a signal ends that."""
    if not seconds:
        return
    tell(f"metrics  up for {seconds:.0f} s more, so that the run's end is scraped; Ctrl-C ends that", progress)
    enough = asyncio.Event()
    async with signals(enough.set):
        await hold(seconds, enough)


async def _surroundings(
    scenario: Scenario, options: Options, endpoints: Mapping[str, HttpEndpoint], before: server_side.Readings
) -> dict[str, Any]:
    """`environment`. A target of the user's that shares its machine with the client is noted: ours does by its nature."""
    same_host = {name: await on_this_host(endpoint.urls) for name, endpoint in endpoints.items()}
    for name, endpoint in endpoints.items():
        endpoint.note_silent()
        if scenario.targets and same_host[name]:
            endpoint.notes.append(f"{name}: the target is on this host: server and client share its processors")
    return environment(options.labels, client_host(), endpoints, before, same_host)


def _run_part(
    scenario: Scenario, options: Options, started: datetime, seconds: float, time_scale: float
) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "id": options.run_id,
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "seed": scenario.seed,
        "version": options.version,
        "command": list(options.command),
        "clock": "real",
        "time_scale": time_scale,
    }


async def _alone(
    scenario: Scenario,
    topologies: Mapping[str, Topology],
    reached: Reached,
    course: Course,
    journal: Journal,
    options: Options,
    clock: RunClock,
    sampler: Sampler,
    last: AsyncExitStack,
) -> Ended:
    """The whole run in this process. From its start until `last`, signals are requests to stop."""
    endpoints, tools, tally = reached.endpoints, reached.tools, course.tally
    one = Run(scenario, topologies, endpoints, tools, tally, journal, options.run_id, clock.now, clock.time_scale)
    await open_connections(scenario, endpoints.values(), Alone(clock.now))
    health = Health(clock.now)
    clock.start(time.monotonic())
    await last.enter_async_context(signals(one.stop.ask, options.progress))
    beside = [*_progress(course, options), sampler.watch(lambda: {0: health.look()}, course.add)]
    ending = await carry_out(one, tally, health, journal, beside)
    return Ended(ending, {0: health.look()})


async def _crew(
    crew: Workers,
    course: Course,
    journal: Journal,
    options: Options,
    sampler: Sampler,
    stack: AsyncExitStack,
    last: AsyncExitStack,
) -> Ended:
    """The whole run by worker processes. From its start until `last`, signals are requests to stop."""
    stack.push_async_callback(crew.close)
    await crew.start(options.workers)
    await last.enter_async_context(signals(crew.ask, options.progress))
    async with going_on([*_progress(course, options), sampler.watch(crew.states, course.add)]):
        ended = await crew.carry_out(stop_on_loss=options.stop_on_loss)
    if options.keep_journals:
        crew.leave(journal, options.out, ended)
    else:
        await crew.join(journal, options.out, ended)
    return ended


async def _opening(
    scenario: Scenario, topologies: Mapping[str, Topology], options: Options, stack: AsyncExitStack
) -> tuple[Opening | None, Options]:
    """What starts the workers, None where this process does it all; and the options with their number. Raises FanmarkError."""
    if options.ray is None:
        _check_guard(scenario, options.workers)
        local: Opening = lambda index: open_local(options.out / f"worker-{index}")  # noqa: E731
        return (local if options.workers > 1 else None), options
    from fanmark.loadgen.ray_cluster import connected

    cluster = await stack.enter_async_context(connected(options.ray, options.version))
    ours = [] if scenario.targets else ["stub: give --target"]
    if uses_tools(scenario, topologies) and not scenario.tools.server:
        ours.append("tool server: give a [[tools.server]]")
    if ours and cluster.elsewhere:
        raise ScenarioError(
            f"--ray: node {cluster.elsewhere[0]} does not reach this machine's embedded {' and '.join(ours)}"
        )
    options = replace(options, workers=options.workers or len(cluster.nodes))
    _check_guard(scenario, options.workers)
    return (lambda index: cluster.open(index, options.out / f"worker-{index}")), options


def _check_guard(scenario: Scenario, workers: int) -> None:
    aborting = [threshold.metric for threshold in scenario.threshold if threshold.abort]
    if aborting and workers > 1:
        raise ScenarioError(
            f"--workers {workers} with [[threshold]] metric = {aborting[0]!r}, abort = true: each worker sees only its own queries: "
            "leave abort out, or --workers"
        )
    guards: dict[str, int | None] = {"[load] max_in_flight": scenario.load.max_in_flight}
    for name, target in scenario.targets.items():
        if target.limits is not None:
            own = msgspec.structs.asdict(target.limits)
            guards |= {f"{target_key(name)} limits.{key}": value for key, value in own.items()}
    for key, value in guards.items():
        if value is not None and value < workers:
            raise ScenarioError(f"--workers {workers} with {key} = {value}: each worker needs a share of at least 1")


def _course(scenario: Scenario, tally: Tally, clock: RunClock) -> Course:
    total = scenario.load.repeats * sum(scenario.load_of(arm).queries or 0 for arm in scenario.arms)
    return Course(tally, total or None, clock.now)


def _progress(course: Course, options: Options) -> list[Coroutine[Any, Any, None]]:
    return [] if options.progress is None else [Progress(course, options.progress).show()]


def open_folder(out: Path, scenario: Scenario, *, through: bool = False) -> Journal:
    """The run's folder with its scenario.toml, and a journal in it. Raises ScenarioError where it holds a run or cannot be written."""
    if (out / "queries.jsonl").exists() or (out / "summary.json").exists():
        raise ScenarioError(f"--out {out}: holds another run: give a new folder, or remove it first")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_scenario(out, scenario)
        return Journal(out, through=through)
    except OSError as e:
        raise ScenarioError(f"--out {out}: cannot be written ({e.strerror}): give another folder") from None


def write_scenario(out: Path, scenario: Scenario) -> None:
    """scenario.toml, and the questions of its workload, in a folder."""
    import tomli_w

    (out / "scenario.toml").write_text(tomli_w.dumps(_without_none(resolved(scenario))))
    if scenario.questions:
        write_questions(out / QUESTIONS, scenario.questions)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


@asynccontextmanager
async def signals(ask: Callable[[], None], progress: TextIO | None = None) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    lines = iter([f"interrupted: no new queries; those that run have {GRACE_S:g} s, and end at once when asked again"])

    def asked() -> None:
        ask()
        for line in lines:
            tell(line, progress)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
