"""The tools of a run: which stand in the prompts, which the script may call, and the calls themselves."""

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import CallError, ScenarioError
from fanmark.loadgen.lanes.mcp_model import Trip
from fanmark.loadgen.scenario import Tools
from fanmark.loadgen.tool_calls import ToolOutcome
from fanmark.loadgen.tool_report import Listing
from fanmark.servers.tool_specs import LATENCY_META, RESULT_TOKENS_META, SEED_META


class ToolLike(Protocol):
    """A tool as its server lists it."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def input_schema(self) -> Mapping[str, Any]: ...
    @property
    def read_only(self) -> bool: ...


class ResultLike(Protocol):
    """What a tool said."""

    @property
    def text(self) -> str: ...
    @property
    def is_error(self) -> bool: ...
    @property
    def bytes(self) -> int: ...
    @property
    def queued_s(self) -> float | None: ...


class Servers(Protocol):
    """Connected tool servers (lanes.mcp.ToolServers, or the virtual ones)."""

    async def call(
        self, name: str, arguments: dict[str, Any], *, timeout_s: float, meta: Mapping[str, Any] | None, trip: Trip
    ) -> ResultLike: ...

    def end(self, query: Hashable) -> None: ...


class ToolSet:
    """By the script, tool call n of a query goes to the callable tools in turn, with arguments made from the tool's schema. By the model,
    it goes where the model wants, if that is a callable tool that it was shown."""

    def __init__(self, servers: Servers, listed: Sequence[ToolLike], config: Tools, *, embedded: bool) -> None:
        self._servers = servers
        self.config = config
        self._embedded = embedded
        self.schemas = [_openai_form(tool) for tool in _exposed(listed, config.expose)]
        self._shown = {tool.name for tool in _exposed(listed, config.expose)}
        self.listed = [_openai_form(tool) for tool in listed]
        self._callable = _callable(listed, config.call)

    @property
    def names(self) -> list[str]:
        """The tools that the script may call."""
        return [tool.name for tool in self._callable]

    async def call(
        self, seed: str, n: int, result_tokens: int, trip: Trip, latency_s: float | None = None
    ) -> ToolOutcome:
        """Tool call number `n` of the query with this seed. Raises CallError for transport and protocol errors."""
        from fanmark.loadgen.lanes.arguments import arguments_for

        first = random.Random(f"{seed}/tool").randrange(len(self._callable))
        tool = self._callable[(first + n) % len(self._callable)]
        trip.tool, trip.reconnect_s = tool.name, self.config.reconnect_s
        arguments = arguments_for(tool.input_schema, random.Random(f"{seed}/tool/{n}"))
        return await self._made(tool.name, arguments, f"{seed}/tool/{n}", result_tokens, trip, latency_s)

    async def asked(self, ask: ToolAsk, seed: str, n: int, result_tokens: int, trip: Trip) -> ToolOutcome:
        """Tool call number `n` of the query, as the model wants it. What cannot be done, and what the server refuses, is told to the model,
        as agents do; only where there is no answer CallError is raised."""
        names = {tool.name for tool in self._callable}
        trip.tool, trip.reconnect_s = ask.name if ask.name in self._shown else "?", self.config.reconnect_s
        if n >= self.config.max_tool_calls:
            return _refused("limit", f"not run: there may be {self.config.max_tool_calls} tool calls")
        if ask.name not in self._shown:
            return _refused("unknown", f"there is no tool {ask.name!r}, but {', '.join(sorted(self._shown))}")
        if ask.name not in names:
            return _refused("not_allowed", f"not run: {ask.name} may change something, and nobody allowed it")
        try:
            arguments = msgspec.json.decode(ask.arguments or "{}", type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
            return _refused("malformed", f"not run: the arguments are no JSON object: {e}")
        try:
            return await self._made(ask.name, arguments, f"{seed}/tool/{n}", result_tokens, trip)
        except CallError as e:
            if e.kind != "tool_protocol":
                raise
            return ToolOutcome(f"error: {e}", False, error=e.kind)

    async def _made(
        self,
        name: str,
        arguments: dict[str, Any],
        seed: str,
        tokens: int,
        trip: Trip,
        latency_s: float | None = None,
    ) -> ToolOutcome:
        # our own tools draw their latency from the query's seed, so that a query meets the same tools in every arm
        own = {LATENCY_META: max(0.0, latency_s - self.config.round_trip_s)} if latency_s is not None else {}
        meta = {SEED_META: seed, RESULT_TOKENS_META: tokens, **own} if self._embedded else None
        timeout_s = self.config.call_timeout_s
        result = await self._servers.call(name, arguments, timeout_s=timeout_s, meta=meta, trip=trip)
        return ToolOutcome(result.text, result.is_error, result.bytes, result.queued_s)

    def end(self, query: Hashable) -> None:
        """A query is over: its own sessions end."""
        self._servers.end(query)


def _openai_form(tool: ToolLike) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.input_schema)},
    }


def _refused(why: Literal["malformed", "unknown", "not_allowed", "limit"], text: str) -> ToolOutcome:
    return ToolOutcome(f"error: {text}", False, refused=why)


def _exposed(listed: Sequence[ToolLike], expose: int | list[str] | None) -> Sequence[ToolLike]:
    if isinstance(expose, list):
        return _named(listed, expose, "expose")
    return listed[:expose]


def _named(listed: Sequence[ToolLike], names: Sequence[str], key: str) -> list[ToolLike]:
    by_name = {tool.name: tool for tool in listed}
    for name in names:
        if name not in by_name:
            raise ScenarioError(f"[tools] {key} = {name!r}: there is no such tool, but {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _callable(listed: Sequence[ToolLike], named: Sequence[str]) -> list[ToolLike]:
    chosen = _named(listed, named, "call") or [tool for tool in listed if tool.read_only]
    if not chosen:
        names = ", ".join(tool.name for tool in listed)
        raise ScenarioError(
            f"no tool is annotated read-only: name those that may be called by [tools] call = [...] ({names})"
        )
    return chosen


def listing(tools: ToolSet, endpoints: Mapping[str, Endpoint]) -> Listing:
    """What the run's tools are, for its summary."""
    config = tools.config
    sizes = {name: endpoint.tool_part for name, endpoint in endpoints.items()}
    tokens = {name: part.size if part is not None else 0 for name, part in sizes.items()}
    return Listing(len(config.server) or 1, config.transport, config.session, tools.listed, tools.schemas, tokens)
