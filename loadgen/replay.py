"""Replay of recorded scheduler decisions: does our scheduler decide, step for step, as the recorded one did?

A recording is one JSON object: `config`, `requests` and `steps` (tests/data/vllm_schedules/README.md has the fields). Synchronous, a
step's result is handled at its end; `asynchronous`, two steps are on their way before the first result is handled.
"""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanmark.servers.engine.batch import Batch, EngineConfig
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.scheduler import Scheduler

_SAMPLED_TOKEN = 7  # every token that a recording's sampler returned


@dataclass(frozen=True, slots=True)
class ScheduleCheck:
    """Result of one replay; `first_difference` is None when all `steps` are equal."""

    name: str
    steps: int
    first_difference: int | None = None
    differs: str = ""

    @property
    def equal(self) -> bool:
        return self.first_difference is None

    def __str__(self) -> str:
        if self.equal:
            return f"{self.name}: {self.steps} steps equal"
        return f"{self.name}: differs in step {self.first_difference} of {self.steps}: {self.differs}"


def replay_schedule(path: str | Path) -> ScheduleCheck:
    """Replay one file. OSError when it cannot be read, ValueError when it is no recording."""
    try:
        return replay_recording(json.loads(Path(path).read_text()), Path(path).name)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a recorded schedule ({error!r}): give config, requests and steps") from error


def replay_recording(recording: dict[str, Any], name: str) -> ScheduleCheck:
    """Replay a recording that is already parsed."""
    config = dict(recording["config"])
    depth = 2 if config.pop("asynchronous", False) else 1
    scheduler, flights = Scheduler(EngineConfig(**config)), deque[Batch]()
    requests, steps = recording["requests"], recording["steps"]
    todo = deque(sorted(requests, key=lambda request: request["add_at"]))
    for number, want in enumerate(steps):
        while todo and todo[0]["add_at"] <= number:
            scheduler.add(_request(todo.popleft()))
        for one in requests:
            if one["abort_at"] == number:
                scheduler.abort(one["id"])
        got = _step(scheduler, flights, depth)
        for field, value in want.items():
            if got[field] != value:
                return ScheduleCheck(name, len(steps), number, f"{field}: recorded {value}, here {got[field]}")
    if len(scheduler) or todo:
        return ScheduleCheck(
            name, len(steps), len(steps), f"recording ends, here {len(scheduler)} requests are unfinished"
        )
    return ScheduleCheck(name, len(steps))


def _request(one: dict[str, Any]) -> Request:
    output = one.get("output") or [_SAMPLED_TOKEN] * one["max_tokens"]
    return Request(one["id"], one["prompt"], output, one.get("salt", ""), one["priority"], float(one["id"]))


def _step(scheduler: Scheduler, flights: deque[Batch], depth: int) -> dict[str, Any]:
    """Schedule once and, when enough steps are on their way, handle the oldest result; in the words of a recording."""
    batch = scheduler.schedule()
    now = scheduler.statistics()
    step: dict[str, Any] = {"scheduled": {}, "preempted": [], "finished": [], "cached": {}}
    if batch is not None:
        step |= {"scheduled": batch.scheduled, "preempted": sorted(batch.preempted), "cached": batch.cached}
        if len(batch):
            flights.append(batch)
    if flights and (len(flights) == depth or not step["scheduled"]):
        step["finished"] = [output.id for output in scheduler.update(flights.popleft()) if output.finished]
    return step | {"running": now.running, "waiting": now.waiting, "usage": round(now.kv_cache_usage, 6)}
