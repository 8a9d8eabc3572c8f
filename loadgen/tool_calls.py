"""A tool call of a query: what the tools made of it goes into its record, and what they said back to the agent."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fanmark.agents.runtime import ToolAsk, ToolLike
from fanmark.loadgen.demand import Demand
from fanmark.loadgen.lanes.mcp_model import Trip
from fanmark.loadgen.records import Call


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """What goes back into the prompt, and whether it is the tool's own error; its size, and how long the server let the call wait (None:
    not told). `error`: the class of a failure that the agent is told of; `refused`: why the model's call was not made."""

    text: str
    is_error: bool
    bytes: int | None = None
    queued_s: float | None = None
    error: str | None = None
    refused: Literal["malformed", "unknown", "not_allowed", "limit"] | None = None


class ToolUse(Protocol):
    """The tools that a query may call, as the composer hands them."""

    async def call(
        self, seed: str, n: int, result_tokens: int, trip: Trip, latency_s: float | None = None
    ) -> ToolOutcome:
        """Tool call number `n` of a query, by the script. An embedded tool takes `latency_s`, where it is given. Raises CallError for
        transport and protocol errors."""

    async def asked(self, ask: ToolAsk, seed: str, n: int, result_tokens: int, trip: Trip) -> ToolOutcome:
        """The same, as the model wants it. Raises CallError for transport errors."""

    def end(self, query: Hashable) -> None:
        """A query is over: its own sessions end."""


async def carried_out(
    tools: ToolUse,
    call: Call,
    demand: Demand,
    n: int,
    ask: ToolAsk | None,
    trip: Trip,
    scale: float,
    like: ToolLike | None = None,
) -> str:
    """Makes the call, fills its record, and gives the text for the agent. Raises CallError."""
    tokens: Any = demand.lengths["tool_result"] if like is None else like.tokens
    try:
        if ask is None:
            outcome = await tools.call(demand.seed, n, tokens, trip, None if like is None else like.seconds * scale)
        else:
            outcome = await tools.asked(ask, demand.seed, n, tokens, trip)
    finally:
        call.tool, call.sent_at = trip.tool, trip.sent_at
        call.session_s, call.opened_session = trip.session_s, trip.opened_session
    call.done_at = trip.now()
    call.tool_error, call.bytes, call.error, call.refused = (
        outcome.is_error,
        outcome.bytes,
        outcome.error,
        outcome.refused,
    )
    if outcome.error is not None or outcome.refused is not None:
        call.message = outcome.text[:500]
    call.queued_s = outcome.queued_s / scale if outcome.queued_s is not None else None
    return outcome.text
