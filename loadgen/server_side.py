"""The servers' side of a run: what they say of themselves before and after it, set against the calls."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fanmark.loadgen import reconcile
from fanmark.loadgen.cache_account import cache_account
from fanmark.loadgen.counters import Reading
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.reduced import CallKind, Reduced, seconds

_COUNTERS_SETTLE_S = 2.0

_NAMES = {"sglang": "sglang", "trtllm": "tensorrt-llm", "triton": "triton"}

Readings = Mapping[str, Reading | None]


async def read_all(endpoints: Mapping[str, Endpoint], timeout_s: float = 10.0) -> dict[str, Reading | None]:
    """What the servers of each target say now."""
    readings = await asyncio.gather(*(endpoint.reading(timeout_s) for endpoint in endpoints.values()))
    return dict(zip(endpoints, readings, strict=True))


def name_servers(endpoints: Mapping[str, Endpoint], readings: Readings) -> None:
    """Calls the servers what their metrics say that they are: a /version tells no name."""
    for name, reading in readings.items():
        if reading is not None and reading.server in _NAMES:
            number = endpoints[name].server.removeprefix("vllm ").removeprefix("unknown")
            endpoints[name].server = f"{_NAMES[reading.server]} {number}".strip()


def sharing(endpoints: Mapping[str, Endpoint]) -> dict[str, list[str]]:
    """For each target those, itself among them, whose servers tell of themselves at the same addresses: they are counted together."""
    return {
        name: [other for other in endpoints if endpoints[other].metrics_urls == endpoint.metrics_urls]
        for name, endpoint in endpoints.items()
    }


def account(names: Sequence[str], before: Reading | None, after: Reading | None, run: Reduced) -> dict[str, Any]:
    """`server` of summary.json for targets that share their servers, usually one."""
    calls = run.calls.where(lambda kind: kind.target in names)
    asked = sum(count for targets, count in run.asked.items() if targets & set(names))
    first, last = (None if reading is None else reading.values for reading in (before, after))
    found = reconcile.reconcile(first, last, calls) | cache_account(first, last, calls, asked)
    return found | {"draft_acceptance": reconcile.draft_acceptance(first, last)} | _engine(first, last)


def _engine(first: Mapping[str, float] | None, last: Mapping[str, float] | None) -> dict[str, float | None]:
    """What our stub tells of its engine: seconds in which a step ran, what of them is nobody's or was wasted, and joules."""
    names = ("engine_busy_s", "engine_slack_s", "engine_waste_s", "joules")
    if first is None or last is None or any(name not in last for name in names):
        return {}
    *seconds, joules = (last[name] - first.get(name, 0.0) for name in names)
    return {**dict(zip(names, seconds, strict=False)), "engine_joules": joules or None}


async def reconciled(endpoints: Mapping[str, Endpoint], before: Readings, run: Reduced) -> dict[str, Any]:
    """`server` of summary.json; by target where there are several. Counters get a moment to catch up with the last reply."""
    parts: dict[str, Any] = {}
    names = sharing(endpoints)
    for name, endpoint in endpoints.items():
        give_up_at = time.monotonic() + _COUNTERS_SETTLE_S
        while True:
            parts[name] = account(names[name], before[name], await endpoint.reading(), run)
            if parts[name]["reconciled"] is not False or time.monotonic() > give_up_at:
                break
            await asyncio.sleep(0.1)
    return parts[next(iter(parts))] if len(parts) == 1 else parts


async def stub_on_time(
    endpoints: Mapping[str, Endpoint], before: Readings, run: Reduced, time_scale: float
) -> tuple[bool, str] | None:
    """The worst of the stubs among the targets, None where there is none."""
    found = []
    for name, after in (await read_all(endpoints)).items():
        answered = run.calls.where(partial(_answered, target=name))
        first = before[name]
        if len(answered) and first is not None and after is not None:
            mean_s = time_scale * math.fsum(seconds(answered)) / len(answered)
            found.append(reconcile.stub_on_time(first.values, after.values, mean_s, time_scale))
    return min((each for each in found if each is not None), default=None)


def _answered(kind: CallKind, target: str) -> bool:
    return kind.target == target and kind.error is None and not kind.retried
