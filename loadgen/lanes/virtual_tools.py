"""The embedded tools in virtual time: the same schemas, latencies and results as their MCP server gives, without the server."""

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.mcp_model import Trip
from fanmark.loadgen.scenario import Tools
from fanmark.loadgen.toolset import ToolSet
from fanmark.servers.prompts import tools_text
from fanmark.servers.prose import Filler
from fanmark.servers.tokenizer import Tokenizer, vocabulary
from fanmark.servers.tool_specs import (
    LATENCY_META,
    RESULT_TOKENS_META,
    SEED_META,
    TOOLS,
    Latency,
    draw_latency_s,
)


@dataclass(frozen=True, slots=True)
class VirtualTool:
    """A tool as the embedded server lists it: all of them are annotated read-only."""

    name: str
    description: str
    input_schema: Mapping[str, Any]
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool said; ours make no errors."""

    text: str
    bytes: int
    is_error: bool = False
    queued_s: float | None = None


def schema_tokens() -> int:
    """Tokens of all embedded tools' schemas, as they stand in a prompt."""
    schemas = ToolSet(tools := VirtualTools(0.0, 0.0), tools.tools, Tools(), embedded=True).schemas
    return len(Tokenizer(vocabulary()).encode(tools_text(schemas)))


class Words(Protocol):
    """Makes a result's text."""

    def text(self, tokens: int, seed: str) -> str: ...


class VirtualTools:
    """Waits `latency_s`, drawn by the seed in a call's `meta`, and `round_trip_s` on top: what MCP and its client add."""

    def __init__(self, latency_s: Latency, round_trip_s: float, filler: Words | None = None) -> None:
        self.tools: Sequence[VirtualTool] = [VirtualTool(t.name, t.description, t.input_schema) for t in TOOLS]
        self._latency_s = latency_s
        self._round_trip_s = round_trip_s
        self._filler = filler or Filler()

    async def call(
        self, name: str, arguments: dict[str, Any], *, timeout_s: float, meta: Mapping[str, Any] | None, trip: Trip
    ) -> Result:
        """Raises CallError where it takes longer than `timeout_s`."""
        trip.sent_at = trip.now()
        told = meta or {}
        seed, tokens = told[SEED_META], told[RESULT_TOKENS_META]
        wait_s = draw_latency_s(told.get(LATENCY_META, self._latency_s), seed) + self._round_trip_s
        await asyncio.sleep(min(wait_s, timeout_s))
        if wait_s > timeout_s:
            raise CallError("tool_transport", f"tool {name}: no answer within {timeout_s:g} s")
        text = self._filler.text(tokens, seed)
        return Result(text, len(text))  # it is ASCII

    def end(self, query: Hashable) -> None:
        """There are no sessions to end."""
