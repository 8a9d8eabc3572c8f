"""One `fanmark tap` from start to end: target looked at, port open, traffic passed and recorded, results written."""

import asyncio
import os
import secrets
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
from fanmark.loadgen.errors import CallError, ScenarioError, UnreachableError
from fanmark.loadgen.execute import allow_connections, going_on
from fanmark.loadgen.health import Health, client_part
from fanmark.loadgen.lanes import fast
from fanmark.loadgen.lanes.http import HttpLane
from fanmark.loadgen.live import tell
from fanmark.loadgen.metrics import Metrics, Told
from fanmark.loadgen.metrics_server import Page, Scrapes, hold, serve
from fanmark.loadgen.records import digests, read_queries
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
from fanmark.loadgen.tap.grouping import Grouping
from fanmark.loadgen.tap.heads import Upstream, upstream
from fanmark.loadgen.tap.recorder import LANE, TAPPED, TARGET, UNATTRIBUTED, Recorder
from fanmark.loadgen.tap.wire import Client, Wire
from fanmark.loadgen.target import HttpEndpoint

CONNECTIONS = 4_096
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
    enough: asyncio.Event

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
    shape: dict[str, Any] = {"topology": "replay", "path": "."} if "replay" in known else {"topology": "single"}
    raw = {
        "name": options.name,
        "tapped": True,
        "target": {"url": options.target.rstrip("/")} | ({"model": model} if model else {}),
        "workload": {"lengths": "natural", "cache": "warm"},
        "load": {"mode": "closed"},
        "arm": [{"name": name, "baseline": name == TAPPED, **shape} for name in arms],
    }
    return scenario_check.check(raw, str(options.out / "scenario.toml"), known)


async def tap(options: Options, opened: Callable[[Tap], None] = lambda _: None) -> Result:
    """Stands before the target until it is asked to end, and leaves a folder as of a run. Raises FanmarkError before it is open."""
    routes = upstreams(options)
    clock = RunClock(1.0)
    async with AsyncExitStack() as stack:
        endpoint = await _look_at(options, clock.now)
        stack.push_async_callback(endpoint.close)
        endpoints = {TARGET: endpoint}
        scenario = scenario_of(options, endpoint.model or None, [TAPPED, UNATTRIBUTED])
        tally = Tally(
            {TAPPED: scenario.arms[0].topology, UNATTRIBUTED: scenario.arms[0].topology}, TAPPED, compared=False
        )
        course = Course(tally, options.queries, clock.now)
        run_id = secrets.token_hex(4)
        info = {"scenario": options.name, "version": options.version, "seed": "", "baseline": TAPPED}
        watched = Told(run_id, info, began_at=lambda: clock.began_at)
        scrapes = Scrapes(Metrics(tally, watched).scrape)
        pages: dict[str, Page] = {"/metrics": scrapes, **LivePage(course, options.name).pages()}
        metrics_port, stop_metrics = serve(pages, options.metrics_port, options.metrics_host)
        stack.callback(stop_metrics)
        before = await server_side.read_all(endpoints)
        server_side.name_servers(endpoints, before)
        journal = open_folder(options.out, scenario)
        stack.callback(journal.close)
        recorder = Recorder(
            Grouping(options.idle_s), tally, journal, clock.now, options.salt, keep_text=options.keep_text
        )
        wire = Wire(routes, recorder, clock.now)
        url = await _listen(wire, options, stack)
        surroundings = environment({}, client_host(), endpoints, before, {TARGET: await on_this_host(endpoint.urls)})
        enough = asyncio.Event()
        open_tap = Tap(url, recorder, enough)
        for line in _where(options, url, routes, endpoint.server, metrics_port):
            tell(line, options.progress)
        clock.start(time.monotonic())
        started = datetime.now(UTC)
        health = Health(clock.now)
        sampler = Sampler(options.out, clock.now, endpoints, before, tally)
        beside = [
            health.watch(tally), sampler.watch(lambda: {0: health.look()}, course.add), _look(recorder, options, enough),
            _lines(recorder, course, options),
        ]  # fmt: skip
        async with signals(enough.set), going_on([*beside, _flush(journal, enough)]):
            opened(open_tap)
            try:
                async with asyncio.timeout(options.duration_s):
                    await enough.wait()
            except TimeoutError:
                pass
        wire.close()
        await asyncio.sleep(0)
        seconds = clock.now()
        recorder.grouping.close()
        recorder.write_closed()
        journal.flush()
        run_part = {
            "name": options.name, "id": run_id, "started": started.isoformat(timespec="seconds"), "seconds": seconds, "seed": scenario.seed,
            "version": options.version, "command": list(options.command), "clock": "real", "time_scale": 1.0,
        }  # fmt: skip
        found = await _leave(options, recorder, wire, endpoint, before, run_part, health, sampler)
        found["environment"] = surroundings
        found["files"] = digests(options.out)
        write_summary(options.out, found)
        course.report = write_report(options.out)
        watched.ended_at = time.time()
        await hold(scrapes.hold_s if options.metrics_hold_s is None else options.metrics_hold_s, asyncio.Event())
        return Result(found)


async def _leave(
    options: Options,
    recorder: Recorder,
    wire: Wire,
    endpoint: HttpEndpoint,
    before: server_side.Readings,
    run_part: dict[str, Any],
    health: Health,
    sampler: Sampler,
) -> dict[str, Any]:
    """summary.json, as far as files and servers tell it."""
    endpoint.model = endpoint.model or next(iter(recorder.models), "?")
    arms = [TAPPED] + ([UNATTRIBUTED] if recorder.written[UNATTRIBUTED] else [])
    scenario = scenario_of(options, endpoint.model if endpoint.model != "?" else None, arms)
    write_scenario(options.out, scenario)
    queries = read_queries(options.out)
    endpoints = {TARGET: endpoint}
    server = await server_side.reconciled(endpoints, before, queries)
    stub = await server_side.stub_on_time(endpoints, before, queries, 1.0)
    client = partial(client_part, {0: health.look()}, host_busy_seconds=sampler.host_busy_seconds)
    found = assemble(
        scenario, queries, endpoints, server, client, run_part, stub, ending=None, samples=read_samples(options.out)
    )
    found["target"]["lane"] = LANE
    found["notes"] = endpoint.notes
    found["tap"] = told(recorder, wire, options)
    return found


def told(recorder: Recorder, wire: Wire, options: Options) -> dict[str, Any]:
    """`tap` of summary.json: how calls and tool calls were attributed, and what passed without being measured."""
    return {
        "attributed": recorder.shares(),
        "queries": recorder.written[TAPPED],
        "unattributed": recorder.written[UNATTRIBUTED],
        "reopened": recorder.grouping.reopened,
        "tokens": "approximate",
        "passed": wire.passed,
        "unread": recorder.unread,
        "mcp_other": recorder.others,
        "models": dict(recorder.models),
        "idle_s": options.idle_s,
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


async def _listen(wire: Wire, options: Options, stack: AsyncExitStack) -> str:
    """Opens the port; gives its address. Raises ScenarioError."""
    allow_connections(2 * CONNECTIONS)
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(lambda: Client(wire), options.host, options.port, backlog=1024)
    except OSError as e:
        raise ScenarioError(
            f"--port {options.port}: {e.strerror}: choose another, or leave it out for a free one"
        ) from None
    stack.callback(server.close)
    return f"http://{options.host}:{server.sockets[0].getsockname()[1]}"


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


async def _look(recorder: Recorder, options: Options, enough: asyncio.Event) -> None:
    """Ends queries that have ended, until cancelled or there are enough."""
    while True:
        await asyncio.sleep(_LOOK_S)
        recorder.look()
        if options.queries is not None and recorder.written[TAPPED] >= options.queries:
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


async def _flush(journal: Any, enough: asyncio.Event) -> None:
    """Hands the records to the system once a second; a full disk ends the tap."""
    try:
        while True:
            await asyncio.sleep(1.0)
            await asyncio.to_thread(journal.flush)
    except Exception:
        enough.set()
        raise
