"""What a call of one of our tools goes through: a slot, its latency, the tool's work or a text of a known length, and what goes wrong.
Latency and length are drawn by seed."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fanmark.servers import mcp_codec as codec
from fanmark.servers.mcp_app import Broken, Dropped, Progress, Refused
from fanmark.servers.prose import Filler
from fanmark.servers.tokenizer import vocabulary
from fanmark.servers.tool_arguments import mistake_in
from fanmark.servers.tool_faults import ToolFault, ToolFaultPlan
from fanmark.servers.tool_metrics import ToolMetrics
from fanmark.servers.tool_specs import (
    ALL_TOOLS,
    LATENCY_META,
    MAX_MEAN_S,
    MAX_RESULT_TOKENS,
    QUEUED_META,
    RESULT_TOKENS_META,
    SEED_META,
    Behaviour,
    draw_latency_s,
)
from fanmark.servers.tool_work import WorkError, Workshop

RETRY_AFTER_S = 1.0
_OUTCOMES: Mapping[type[BaseException], str] = {
    codec.ProtocolError: "protocol_error",
    Refused: "refused",
    Dropped: "reset",
    Broken: "malformed",
    asyncio.CancelledError: "cancelled",
}


class Slots:
    """Where calls wait for one of a number of slots, first come, first served."""

    def __init__(self, concurrency: int | None, queue: int | None, metrics: ToolMetrics) -> None:
        self.limited = concurrency is not None
        self._free = asyncio.Semaphore(concurrency) if concurrency is not None else None
        self._queue, self._metrics = queue, metrics

    async def take(self) -> float:
        """Waits for a slot; gives the seconds that it took. Raises Refused where too many wait."""
        metrics, now = self._metrics, asyncio.get_running_loop().time
        came_at = now()
        if self._free is not None:
            if self._free.locked() and self._queue is not None and metrics.queued >= self._queue:
                raise Refused(503, "busy: the queue is full", RETRY_AFTER_S)
            metrics.queued += 1
            try:
                await self._free.acquire()
            finally:
                metrics.queued -= 1
        metrics.in_flight += 1
        return now() - came_at

    def give(self) -> None:
        """The slot is free again."""
        self._metrics.in_flight -= 1
        if self._free is not None:
            self._free.release()


class ToolCalls:
    """The tools of a server; see mcp_app.Tools. Made in the loop that it answers in."""

    def __init__(self, behaviour: Behaviour) -> None:
        specs = [spec for spec in ALL_TOOLS if spec.name in behaviour.tools]
        self.listing: Sequence[Mapping[str, Any]] = [spec.listed() for spec in specs]
        self._behaviour = behaviour
        self._specs = {spec.name: spec for spec in specs}
        self._filler = Filler()
        self._workshop = Workshop(vocabulary())
        self._plan = ToolFaultPlan(behaviour.faults, behaviour.seed)
        self._metrics = ToolMetrics()
        self._slots = Slots(behaviour.concurrency, behaviour.queue, self._metrics)
        self._calls = 0
        self._now = asyncio.get_running_loop().time
        self._started_at = self._now()

    def metrics(self, sessions: int) -> str:
        """See mcp_app.Tools."""
        faults = zip((fault.kind for fault in self._plan.faults), self._plan.struck, strict=True)
        return self._metrics.render(sessions, faults)

    async def call(
        self, name: str, arguments: Mapping[str, Any], meta: Mapping[str, Any], progress: Progress
    ) -> Mapping[str, Any]:
        """See mcp_app.Tools."""
        self._calls += 1
        number, came_at, queued_s, outcome, size = self._calls, self._now(), 0.0, "completed", 0
        known = name if name in self._specs else "?"
        try:
            struck = self._plan.strikes(number, name, came_at - self._started_at) if self._plan.faults else ()
            _refuse(struck)
            queued_s = await self._slots.take()
            try:
                text, is_error = await self._answer(name, arguments, meta, progress, number)
                for fault in struck:
                    text, is_error = await _spoil(fault, text, is_error)
            finally:
                self._slots.give()
            outcome, size = "tool_error" if is_error else "completed", len(text)
        except tuple(_OUTCOMES) as error:
            outcome = next(word for kind, word in _OUTCOMES.items() if isinstance(error, kind))
            raise
        finally:
            self._metrics.ended(known, outcome, self._now() - came_at, queued_s, size)
        more = {"_meta": {QUEUED_META: queued_s}} if self._slots.limited else {}
        return {"content": [{"type": "text", "text": text}], "isError": is_error, **more}

    async def _answer(
        self, name: str, arguments: Mapping[str, Any], meta: Mapping[str, Any], progress: Progress, number: int
    ) -> tuple[str, bool]:
        """The result's text, and whether it is the tool's own error."""
        spec, behaviour = self._specs.get(name), self._behaviour
        if spec is None:
            there = ", ".join(self._specs)
            raise codec.ProtocolError(codec.INVALID_PARAMS, f"unknown tool {name!r}: there are {there}")
        if mistake := mistake_in(spec.input_schema, arguments):
            return f"bad arguments: {mistake}", True
        seed = _meta_value(meta, SEED_META)
        if seed is None:
            seed = f"{behaviour.seed} {number}"
        tokens = _meta_value(meta, RESULT_TOKENS_META)
        tokens = behaviour.result_tokens if tokens is None else tokens
        latency_s = behaviour.latency_s
        if name == "synthetic":
            latency_s = arguments.get("latency_s", behaviour.synthetic_latency_s)
            latency_s = behaviour.latency_s if latency_s is None else latency_s
            tokens = arguments.get("result_tokens", tokens)
            if tokens is None:
                tokens = round(draw_latency_s(behaviour.synthetic_tokens, f"size {seed}"))
        told_s = _meta_value(meta, LATENCY_META)
        await asyncio.sleep(draw_latency_s(latency_s if told_s is None else told_s, seed))
        if tokens is not None:
            return self._filler.text(min(tokens, MAX_RESULT_TOKENS), seed), False
        if name == "slow_job":
            return await _slow_job(progress, **arguments), False
        try:
            return self._workshop.do(name, arguments), False
        except WorkError as error:
            return str(error), True


async def _slow_job(progress: Progress, seconds: float = 2, steps: int = 5) -> str:
    for step in range(1, steps + 1):
        await asyncio.sleep(seconds / steps)
        await progress(step, steps, f"step {step} of {steps}")
    return f"done after {steps} steps"


def _refuse(struck: Sequence[ToolFault]) -> None:
    """Faults that let no call in."""
    for fault in struck:
        if fault.kind in ("429", "500", "503"):
            status = int(fault.kind)
            raise Refused(status, f"fault: HTTP {status}", RETRY_AFTER_S if status != 500 else None)


async def _spoil(fault: ToolFault, text: str, is_error: bool) -> tuple[str, bool]:
    """What a fault makes of an answer."""
    match fault.kind:
        case "error":
            return "fault: the tool failed", True
        case "rpc-error":
            raise codec.ProtocolError(codec.INTERNAL_ERROR, "fault: internal error")
        case "stall":
            await asyncio.sleep(fault.seconds)
        case "reset":
            raise Dropped
        case "malformed":
            raise Broken
        case "oversized":
            return text + " x" * (fault.bytes // 2), is_error
    return text, is_error


def _meta_value(meta: Mapping[str, Any], key: str) -> Any:
    """The value of one of our keys; ProtocolError where it has the wrong type."""
    value = meta.get(key)
    if value is None:
        return None
    if key == SEED_META:
        valid, allowed = isinstance(value, int | str), "a number or a string"
    elif key == LATENCY_META:
        valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_MEAN_S
        allowed = f"seconds, from 0 to {MAX_MEAN_S:g}"
    else:
        valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_RESULT_TOKENS
        allowed = f"a whole number from 0 to {MAX_RESULT_TOKENS}"
    if not valid:
        raise codec.ProtocolError(codec.INVALID_PARAMS, f"_meta {key} = {value!r}: it must be {allowed}")
    return value
