"""samples.jsonl: a line a second of what servers and client were doing, taken beside the run and never in its way.

Rules of the file:
1. One line a second, whatever the load. Nothing here is on the path of a call.
2. A sample never fails a run: a server that does not answer within its second is null, and so is what the system does not tell.
3. Servers are asked by GET /metrics alone, which no counter counts; one that told nothing before the run is not asked again.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from fanmark.loadgen.counters import Reading
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.records import bucket_gap_s, lines_of
from fanmark.loadgen.server_side import Readings, read_all
from fanmark.loadgen.tally import Tally

_EVERY_S = 1.0
_HOST_BUSY_SHARE = 0.8
_SINCE_START = (
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
    "preemptions",
    "joules",
)


class ServerSample(msgspec.Struct, frozen=True, kw_only=True):
    """A target's servers at one moment, summed (`kv_use` is their mean, 0 to 1). Counts are since the run's start, and
    joules; `watts` are what the GPUs draw at the moment."""

    running: float | None = None
    waiting: float | None = None
    kv_use: float | None = None
    prompt_tokens: float | None = None
    prompt_tokens_cached: float | None = None
    generation_tokens: float | None = None
    request_success: float | None = None
    preemptions: float | None = None
    joules: float | None = None
    watts: float | None = None


class ArmSample(msgspec.Struct, frozen=True):
    """What is in flight of one arm, warm-up calls included."""

    queries_in_flight: int
    calls_in_flight: int


class ClientSample(msgspec.Struct, frozen=True):
    """The client's workers over the second before: the largest loop lag, CPU time by wall time (1: one core), their peak memory, and how
    busy all processors of the host were (0 to 1)."""

    loop_lag_s: float | None
    cpu_share: float | None
    rss_mb: float | None
    host_cpu_share: float | None


class Sample(msgspec.Struct, frozen=True):
    """A line of samples.jsonl. `at` is the run's time; a target is None where its servers did not tell; in virtual time there is no
    client."""

    at: float
    targets: dict[str, ServerSample | None]
    arms: dict[str, ArmSample]
    client: ClientSample | None = None


def read_samples(folder: Path) -> list[Sample]:
    """All samples of a run's folder, in order; none where it has no samples.jsonl."""
    path = folder / "samples.jsonl"
    return list(lines_of(path, Sample)) if path.exists() else []


def kv_use(samples: Sequence[Sample]) -> list[tuple[float, float]] | None:
    """KV use at instants, the mean over the targets that tell it; None where none does."""
    found = []
    for sample in samples:
        told = [server.kv_use for server in sample.targets.values() if server is not None and server.kv_use is not None]
        if told:
            found.append((sample.at, math.fsum(told) / len(told)))
    return found or None


def with_power(
    sample: ServerSample | None, before: Mapping[str, float], now: Mapping[str, float]
) -> ServerSample | None:
    """The sample with what is told of the GPUs' power."""
    if not now:
        return sample
    joules = now["joules"] - before["joules"] if "joules" in now and "joules" in before else None
    return msgspec.structs.replace(sample or ServerSample(), joules=joules, watts=now.get("watts"))


def server_sample(before: Reading, now: Reading) -> ServerSample:
    """What a reading tells, counters since the run's start."""
    gauges = {name: float(now.values[name]) for name in ("running", "waiting", "kv_use") if name in now.values}
    counts = {name: now.values[name] - before.values.get(name, 0.0) for name in _SINCE_START if name in now.values}
    return ServerSample(**gauges, **counts)


def arm_samples(tally: Tally) -> dict[str, ArmSample]:
    """What is in flight of each arm."""
    return {name: ArmSample(max(arm.in_flight, 0), max(arm.calls_in_flight, 0)) for name, arm in tally.arms.items()}


class Host:
    """How busy the host's processors are, by /proc/stat."""

    def __init__(self, path: Path = Path("/proc/stat")) -> None:
        self._path = path
        self._last = self._read()

    def _read(self) -> tuple[int, int] | None:
        """Ticks busy and in all, since the system's start."""
        try:
            ticks = [int(n) for n in self._path.read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        return (sum(ticks) - ticks[3] - ticks[4], sum(ticks)) if len(ticks) == 8 else None

    def share(self) -> float | None:
        """Since the last look."""
        last, self._last = self._last, self._read()
        if last is None or self._last is None or self._last[1] == last[1]:
            return None
        return (self._last[0] - last[0]) / (self._last[1] - last[1])


class Sampler:
    """Takes a sample each second while a run goes on. `before` is what the servers told before it; `host_busy_seconds` is the longest
    stretch of seconds in which the host's processors were above 80 % busy."""

    def __init__(
        self, folder: Path, now: Callable[[], float], endpoints: Mapping[str, Endpoint], before: Readings, tally: Tally
    ) -> None:
        self.host_busy_seconds = 0
        self._path = folder / "samples.jsonl"
        self._now = now
        self._endpoints = endpoints
        self._before = before
        self._tally = tally
        self._in_a_row = 0
        self._lags: Counter[int] = Counter()
        self._power: dict[str, Mapping[str, float]] = {}  # before the run
        self._cpu = (0.0, 0.0)  # CPU time of all workers, and when

    async def watch(
        self, states: Callable[[], Mapping[int, ClientState]], tell: Callable[[Sample], None] = lambda _: None
    ) -> None:
        """Samples until cancelled, or until the disk takes no more. `states` are the client's workers as they are now; `tell` is handed
        each sample."""
        host = Host()
        told = {name: self._endpoints[name] for name, before in self._before.items() if before is not None}
        loop = asyncio.get_running_loop()
        due_at = loop.time()
        self._cpu = (0.0, due_at)
        self._power = await self._powers()
        try:
            with self._path.open("wb", buffering=0) as file:
                while True:
                    due_at = max(due_at + _EVERY_S, loop.time())
                    await asyncio.sleep(due_at - loop.time())
                    at, arms = max(0.0, self._now()), arm_samples(self._tally)
                    client = self._client(states(), host, loop.time())
                    readings = await read_all(told, timeout_s=_EVERY_S)
                    powers = await self._powers()
                    targets = {
                        name: with_power(self._server(name, readings.get(name)), self._power[name], powers[name])
                        for name in self._endpoints
                    }
                    sample = Sample(at, targets, arms, client)
                    tell(sample)
                    file.write(msgspec.json.encode(sample) + b"\n")
        except OSError:
            return

    def tell_idle(self, server: dict[str, Any]) -> None:
        """Adds to `server` of summary.json what the GPUs of each target drew before the run, where that is told."""
        for name, told in self._power.items():
            if "watts" in told:
                (server if "reconciled" in server else server[name])["idle_w"] = told["watts"]

    async def _powers(self) -> dict[str, Mapping[str, float]]:
        told = await asyncio.gather(*(endpoint.power(_EVERY_S) for endpoint in self._endpoints.values()))
        return dict(zip(self._endpoints, told, strict=True))

    def _server(self, name: str, reading: Reading | None) -> ServerSample | None:
        before = self._before[name]
        return None if before is None or reading is None else server_sample(before, reading)

    def _client(self, states: Mapping[int, ClientState], host: Host, now_s: float) -> ClientSample:
        lags = sum((state.loop_lag for state in states.values()), Counter[int]())
        new = [bucket for bucket, beats in lags.items() if beats > self._lags[bucket]]
        cpu = (sum(state.cpu_s for state in states.values()), now_s)
        last, self._lags, self._cpu = self._cpu, lags, cpu
        share = host.share()
        self._in_a_row = self._in_a_row + 1 if share is not None and share > _HOST_BUSY_SHARE else 0
        self.host_busy_seconds = max(self.host_busy_seconds, self._in_a_row)
        return ClientSample(
            loop_lag_s=bucket_gap_s(max(new)) if new else None,
            cpu_share=(cpu[0] - last[0]) / (cpu[1] - last[1]) if states and cpu[1] > last[1] else None,
            rss_mb=sum(state.rss_mb for state in states.values()) if states else None,
            host_cpu_share=share,
        )


class VirtualSampler:
    """Samples in virtual time, one for each whole second that passes. Nothing happens while time passes, so that each shows what was so
    until then; of an engine, at its last event. `read` are the targets' servers."""

    def __init__(self, folder: Path, read: Mapping[str, Callable[[], Reading]], tally: Tally) -> None:
        self._file = (folder / "samples.jsonl").open("wb")
        self._read = read
        self._tally = tally

    def passing(self, since: float, until: float) -> None:
        """Time goes from one instant to another."""
        seconds = range(math.floor(since) + 1, math.floor(until) + 1)
        if not seconds:
            return
        start = Reading("", {})
        targets: dict[str, ServerSample | None] = {n: server_sample(start, read()) for n, read in self._read.items()}
        arms = arm_samples(self._tally)
        with suppress(OSError):  # a full disk is the journal's to tell
            for second in seconds:
                self._file.write(msgspec.json.encode(Sample(float(second), targets, arms)) + b"\n")

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
