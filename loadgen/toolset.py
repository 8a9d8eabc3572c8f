"""The tools of a run: which stand in the prompts, which the script may call, and the calls themselves."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.runtime import ToolOutcome
from fanmark.loadgen.scenario import Tools


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


class Servers(Protocol):
    """Connected tool servers (lanes.mcp.ToolServers, or the virtual ones)."""

    async def call(
        self, name: str, arguments: dict[str, Any], *, timeout_s: float, meta: Mapping[str, Any] | None = None
    ) -> ResultLike: ...


class ToolSet:
    """Script mode: tool call n of a query goes to the callable tools in turn, with arguments made from the tool's schema."""

    def __init__(self, servers: Servers, listed: Sequence[ToolLike], config: Tools, *, embedded: bool) -> None:
        self._servers = servers
        self._config = config
        self._embedded = embedded
        exposed = listed if config.expose is None else listed[: config.expose]
        self.schemas = [_openai_form(tool) for tool in exposed]
        self._callable = _callable(listed, config.call)

    async def call(self, seed: str, n: int, result_tokens: int) -> ToolOutcome:
        """Tool call number `n` of the query with this seed. Raises CallError for transport and protocol errors."""
        from fanmark.loadgen.lanes.arguments import arguments_for

        first = random.Random(f"{seed}/tool").randrange(len(self._callable))
        tool = self._callable[(first + n) % len(self._callable)]
        arguments = arguments_for(tool.input_schema, random.Random(f"{seed}/tool/{n}"))
        # our own tools draw their latency from the query's seed, so that a query meets the same tools in every arm
        meta = {"fanmark/seed": f"{seed}/tool/{n}", "fanmark/result_tokens": result_tokens} if self._embedded else None
        result = await self._servers.call(tool.name, arguments, timeout_s=self._config.call_timeout_s, meta=meta)
        return ToolOutcome(tool.name, result.text, result.is_error)


def _openai_form(tool: ToolLike) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.input_schema)},
    }


def _callable(listed: Sequence[ToolLike], named: Sequence[str]) -> list[ToolLike]:
    by_name = {tool.name: tool for tool in listed}
    unknown = [name for name in named if name not in by_name]
    if unknown:
        raise ScenarioError(f"[tools] call = {unknown[0]!r}: there is no such tool, but {', '.join(by_name)}")
    chosen = [by_name[name] for name in named] or [tool for tool in listed if tool.read_only]
    if not chosen:
        raise ScenarioError(
            f"no tool is annotated read-only: name those that may be called by [tools] call = [...] ({', '.join(by_name)})"
        )
    return chosen
