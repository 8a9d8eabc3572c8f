"""One `fanmark tap` from start to end: target looked at, port open, traffic passed and recorded, results written."""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import msgspec

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, server_side
from fanmark.loadgen.course import Course
from fanmark.loadgen.environment import client_host, environment, on_this_host
from fanmark.loadgen.errors import CallError, LostError, ScenarioError, UnreachableError
from fanmark.loadgen.execute import going_on
from fanmark.loadgen.health import client_part
from fanmark.loadgen.lanes import fast
from fanmark.loadgen.lanes.http import HttpLane
from fanmark.loadgen.live import tell
from fanmark.loadgen.metrics import Metrics, Told
from fanmark.loadgen.metrics_server import Page, Scrapes, hold, serve
from fanmark.loadgen.records import Journal, digests, read_queries
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.report.live_page import LivePage
from fanmark.loadgen.report.write import write_report
from fanmark.loadgen.results import assemble, write_summary
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.samples import Sampler, read_samples
from fanmark.loadgen.scenario import Scenario, Target
from fanmark.loadgen.session import Result, open_folder, signals, write_scenario
from fanmark.loadgen.shaping import shaped
from fanmark.loadgen.table import number
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.tap.carried import start
from fanmark.loadgen.tap.grouping import Grouping
from fanmark.loadgen.tap.heads import Upstream, upstream
from fanmark.loadgen.tap.lengths import Lengths
from fanmark.loadgen.tap.recorder import LANE, TAPPED, TARGET, UNATTRIBUTED, Recorder
from fanmark.loadgen.tap.words import remarks
from fanmark.loadgen.target import HttpEndpoint

_LOOK_S = 0.25
_LINE_S = 5.0
_READY_S = 5.0


@dataclass(frozen=True)
class Options:
    """What the command line says. `salt` keeps the hashes of this recording apart from all others'."""

    target: str
    out: Path
    version: str
    command: Sequence[str]
    progress: TextIO | None
    mcp: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 0
    idle_s: float = 10.0
    duration_s: float | None = None
    queries: int | None = None
    api_key_env: str | None = None
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    metrics_hold_s: float | None = 0.0
    keep_text: bool = False
    name: str = "tap"
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)


@dataclass
class Tap:
    """A tap that is open. `url` is where it is, `ask` ends it."""

    url: str
    recorder: Recorder
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self) -> None:
        """Ends the tap: calls in flight are cut."""
        self.enough.set()


def upstreams(options: Options) -> list[Upstream]:
    """Where requests go, tool servers first, for the target takes all paths. Raises ScenarioError."""
    found: list[Upstream] = []
    for given in options.mcp:
        at, sign, url = given.partition("=") if given.startswith("/") else ("/mcp", "=", given)
        at = at.rstrip("/")
        if not sign or not url or not at or at in [each.at for each in found] or at == "/v1":
            raise ScenarioError(f"--mcp {given}: must be URL (for /mcp), or /PATH=URL with a path that no other has")
        found.append(upstream(at, url, at, target=False, flag="--mcp"))
    return [*found, upstream(TARGET, options.target, "/v1", target=True, flag="--target")]


def scenario_of(options: Options, model: str | None, arms: Sequence[str]) -> Scenario:
    """The tapped run as a scenario: an arm that re-enacts what was recorded in the folder."""
    known = topologies()
    raw = {
        "name": options.name,
        "tapped": True,
        "target": {"url": options.target.rstrip("/")} | ({"model": model} if model else {}),
        "load": {"process": "replay"},
        "arm": [
            {"name": name, "baseline": name == TAPPED, "topology": "replay", "path": ".", "arm": name} for name in arms
        ],
    }
    return scenario_check.check(raw, str(options.out / "scenario.toml"), known)


@dataclass
class _Standing:
    """What a tap stands on, once its target has been looked at."""

    options: Options
    clock: RunClock
    endpoint: HttpEndpoint
    before: server_side.Readings
    tally: Tally
    recorder: Recorder
    journal: Journal
    run_id: str
    lengths: Lengths

    @property
    def endpoints(self) -> dict[str, HttpEndpoint]:
        return {TARGET: self.endpoint}


async def tap(options: Options, opened: Callable[[Tap], None] = lambda _: None) -> Result:
    """Stands before the target until it is asked to end, and leaves a folder as of a run. Raises FanmarkError before it is open."""
    routes = upstreams(options)
    async with AsyncExitStack() as stack:
        port = _bind(options)
        stack.callback(port.close)
        tally, clock = Tally({TAPPED: "replay", UNATTRIBUTED: "replay"}, TAPPED, compared=False), RunClock(1.0)
        run_id, course = secrets.token_hex(4), Course(tally, options.queries, clock.now)
        info = {"scenario": options.name, "version": options.version, "seed": "", "baseline": TAPPED}
        watched = Told(run_id, info, began_at=lambda: clock.began_at)
        scrapes = Scrapes(Metrics(tally, watched).scrape)
        pages: dict[str, Page] = {"/metrics": scrapes, **LivePage(course, options.name).pages()}
        metrics_port, stop_metrics = serve(pages, options.metrics_port, options.metrics_host)
        stack.callback(stop_metrics)
        on = await _stand(options, stack, clock, tally, run_id)
        on.clock.start(time.monotonic())
        carried = await start(port, routes, on.recorder.take, stack)
        url = f"http://{options.host}:{port.getsockname()[1]}"
        for line in _where(options, url, routes, on.endpoint.server, metrics_port):
            tell(line, options.progress)
        started = datetime.now(UTC)
        samples = await _pass(on, course, Tap(url, on.recorder), opened, carried.gone)
        lost: LostError | None = None
        try:
            await carried.end()
        except LostError as e:  # what was recorded until then is told
            lost = e
        run_part = {
            "name": options.name, "id": on.run_id, "started": started.isoformat(timespec="seconds"), "seconds": on.clock.now(), "seed": 1,
            "version": options.version, "command": list(options.command), "clock": "real", "time_scale": 1.0,
        }  # fmt: skip
        on.recorder.grouping.close()
        await on.lengths.count(on.recorder.grouping.closed, on.recorder.sizes)
        on.recorder.write(list(on.recorder.grouping.closed))
        on.journal.flush()
        found = await _summary(on, run_part, samples)
        if lost is not None:
            found["tap"]["partial"] = str(lost)
            found["notes"].append(f"partial: {lost}; what passed after that, and what was in flight, is missing")
        found["files"] = digests(options.out)
        write_summary(options.out, found)
        course.report = write_report(options.out)
        if lost is not None:
            raise lost
        watched.ended_at = time.time()
        enough = asyncio.Event()
        async with signals(enough.set):
            await hold(scrapes.hold_s if options.metrics_hold_s is None else options.metrics_hold_s, enough)
        return Result(found)


async def _stand(options: Options, stack: AsyncExitStack, clock: RunClock, tally: Tally, run_id: str) -> _Standing:
    endpoint = await _look_at(options, clock.now)
    stack.push_async_callback(endpoint.close)
    before = await server_side.read_all({TARGET: endpoint})
    server_side.name_servers({TARGET: endpoint}, before)
    journal = open_folder(options.out, scenario_of(options, endpoint.model or None, [TAPPED, UNATTRIBUTED]))
    stack.callback(journal.close)
    grouping = Grouping(options.idle_s)
    recorder = Recorder(grouping, tally, journal, clock, options.salt, keep_text=options.keep_text)
    return _Standing(options, clock, endpoint, before, tally, recorder, journal, run_id, Lengths(endpoint))


async def _pass(on: _Standing, course: Course, one: Tap, opened: Callable[[Tap], None], gone: asyncio.Event) -> Sampler:
    """While the tap is open. Gives what took samples."""
    sampler = Sampler(on.options.out, on.clock.now, on.endpoints, on.before, on.tally)
    beside = [
        sampler.watch(lambda: {0: on.recorder.carrier}, course.add),
        _look(on, one.enough, gone),
        _lines(on.recorder, course, on.options),
        _flush(on.journal, one.enough),
    ]
    async with signals(one.ask), going_on(beside):
        opened(one)
        try:
            async with asyncio.timeout(on.options.duration_s):
                await one.enough.wait()
        except TimeoutError:
            pass
    return sampler


async def _summary(on: _Standing, run_part: dict[str, Any], sampler: Sampler) -> dict[str, Any]:
    """summary.json, as far as files and servers tell it."""
    out, endpoint = on.options.out, on.endpoint
    arms = [TAPPED] + ([UNATTRIBUTED] if on.recorder.written[UNATTRIBUTED] else [])
    scenario = scenario_of(on.options, endpoint.model or next(iter(on.recorder.models), None), arms)
    endpoint.model = endpoint.model or ", ".join(on.recorder.models) or "no model"
    write_scenario(out, scenario)
    records = reduced(read_queries(out))
    server = await server_side.reconciled(on.endpoints, on.before, records)
    stub = await server_side.stub_on_time(on.endpoints, on.before, records, 1.0)
    report = partial(client_part, {0: on.recorder.carrier}, host_busy_seconds=sampler.host_busy_seconds)
    found = assemble(
        scenario, records, on.endpoints, server, report, run_part, stub, ending=None, samples=read_samples(out)
    )
    found["target"]["lane"] = LANE
    same_host = {TARGET: await on_this_host(endpoint.urls)}
    told = told_of(on)
    surroundings = environment({}, client_host(), on.endpoints, on.before, same_host)
    return found | {
        "notes": [*endpoint.notes, *remarks({"tap": told})], "tap": told, "environment": surroundings
    }  # fmt: skip


def told_of(on: _Standing) -> dict[str, Any]:
    """`tap` of summary.json: how calls and tool calls were attributed, and what passed without being measured."""
    recorder = on.recorder
    return {
        "attributed": recorder.shares(),
        "queries": recorder.written[TAPPED],
        "unattributed": recorder.written[UNATTRIBUTED],
        "reopened": recorder.grouping.reopened,
        "lengths": on.lengths.known,
        "by_size": on.lengths.by_size,
        "by_time": recorder.by_time,
        "passed": recorder.passed,
        "unread": recorder.unread,
        "untold": recorder.untold,
        "mcp_other": recorder.others,
        "models": dict(recorder.models),
        "idle_s": on.options.idle_s,
    }


async def _look_at(options: Options, now: Callable[[], float]) -> HttpEndpoint:
    """The target, as far as it tells of itself. Raises UnreachableError where nobody answers."""
    config = Target(url=options.target.rstrip("/"), api_key_env=options.api_key_env)
    shape = shaped(config, "--target", os.environ)
    lane = fast.FastLane(now) if config.replicas[0].startswith("http://") and fast.available() else HttpLane(now)
    endpoint = HttpEndpoint(TARGET, config, lane, shape)
    url = endpoint.urls[0]
    try:
        status, body = await endpoint.lane.get(f"{url}/models", shape.headers, timeout_s=_READY_S)
    except CallError as e:
        await endpoint.close()
        raise UnreachableError(f"--target {url}: does not answer ({e}): is the server up?") from None
    if status == 200:
        try:
            listed = [str(each["id"]) for each in msgspec.json.decode(body)["data"]]
            endpoint.model = listed[0] if len(listed) == 1 else ""
        except (msgspec.DecodeError, KeyError, TypeError):
            endpoint.model = ""
    try:
        status, body = await endpoint.lane.get(f"{endpoint.root}/version", shape.headers, timeout_s=_READY_S)
        version = str(msgspec.json.decode(body)["version"]) if status == 200 else "unknown"
    except (CallError, msgspec.DecodeError, KeyError, TypeError):
        version = "unknown"
    endpoint.server = version if version.startswith(("fanmark-stub", "unknown")) else f"vllm {version}"
    return endpoint


def _bind(options: Options) -> socket.socket:
    """The tap's port. Raises ScenarioError."""
    try:
        return socket.create_server((options.host, options.port), backlog=1024)
    except OSError as e:
        where = (
            f"--port {options.port}" if options.host == "127.0.0.1" else f"--host {options.host} --port {options.port}"
        )
        raise ScenarioError(f"{where}: {e.strerror}: choose another, or leave it out for a free one") from None


def _where(options: Options, url: str, routes: Sequence[Upstream], server: str, metrics_port: int) -> list[str]:
    """What to put into the agents' settings."""
    return [
        f"target   {options.target} ({server})",
        f"tap      {url}/v1   (OPENAI_BASE_URL; ANTHROPIC_BASE_URL={url})",
        *(
            f"mcp      {url}{each.at} for {'https' if each.tls else 'http'}://{each.host}:{each.port}{each.path}"
            for each in routes[:-1]
        ),
        f"metrics  http://{options.metrics_host}:{metrics_port}/metrics",
        f"live     http://{options.metrics_host}:{metrics_port}/",
    ]


async def _look(on: _Standing, enough: asyncio.Event, gone: asyncio.Event) -> None:
    """Writes down queries that have ended, until cancelled; ends the tap when there are enough, or nothing passes any more."""
    recorder, wanted = on.recorder, on.options.queries
    while True:
        await asyncio.sleep(_LOOK_S)
        recorder.grouping.idle(on.clock.now())
        ended = list(recorder.grouping.closed)
        await on.lengths.count(ended, recorder.sizes)
        recorder.write(ended)
        if gone.is_set() or (wanted is not None and recorder.written[TAPPED] >= wanted):
            enough.set()


async def _lines(recorder: Recorder, course: Course, options: Options) -> None:
    """A line of progress every few seconds, until cancelled."""
    while True:
        await asyncio.sleep(_LINE_S)
        arm = course.tally.arms[TAPPED]
        mean = {
            name: arm.sums[name] / arm.completed if arm.completed else None
            for name in ("calls", "tool_calls", "input_tokens")
        }
        tell(
            f"{course.now():6.1f} s  {arm.completed} queries ended, {len(recorder.grouping.open)} open, {arm.calls_in_flight} calls in "
            f"flight; a query: {number(mean['calls'])} calls, {number(mean['tool_calls'])} tool calls, {number(mean['input_tokens'])} "
            f"tokens in; {recorder.written[UNATTRIBUTED]} calls not attributed",
            options.progress,
        )


async def _flush(journal: Journal, enough: asyncio.Event) -> None:
    """Hands the records to the system once a second; a full disk ends the tap."""
    try:
        while True:
            await asyncio.sleep(1.0)
            await asyncio.to_thread(journal.flush)
    except Exception:
        enough.set()
        raise
