"""What a call of one of our tools does: it waits its latency and gives a text of a known length. Both are drawn by seed."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fanmark.servers import mcp_codec as codec
from fanmark.servers.mcp_app import Progress
from fanmark.servers.tokenizer import vocabulary
from fanmark.servers.tool_arguments import mistake_in
from fanmark.servers.tool_specs import (
    MAX_RESULT_TOKENS,
    RESULT_TOKENS_META,
    SEED_META,
    TOOLS,
    Behaviour,
    draw_latency_s,
    result_text,
)


class ToolCalls:
    """The tools of a server."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.listing: Sequence[Mapping[str, Any]] = [spec.listed() for spec in TOOLS]
        self._behaviour = behaviour
        self._specs = {spec.name: spec for spec in TOOLS}
        self._words = vocabulary()
        self._calls = 0

    async def call(
        self, name: str, arguments: Mapping[str, Any], meta: Mapping[str, Any], progress: Progress
    ) -> Mapping[str, Any]:
        """See mcp_app.Tools."""
        self._calls += 1
        spec = self._specs.get(name)
        if spec is None:
            known = ", ".join(self._specs)
            raise codec.ProtocolError(codec.INVALID_PARAMS, f"unknown tool {name!r}: there are {known}")
        if mistake := mistake_in(spec.input_schema, arguments):
            return text_result(f"bad arguments: {mistake}", is_error=True)
        seed = _meta_value(meta, SEED_META)
        if seed is None:
            seed = f"{self._behaviour.seed} {self._calls}"
        tokens = _meta_value(meta, RESULT_TOKENS_META)
        await asyncio.sleep(draw_latency_s(self._behaviour.latency_s, seed))
        return text_result(result_text(self._words, self._behaviour.result_tokens if tokens is None else tokens, seed))

    def metrics(self, sessions: int) -> str:
        """See mcp_app.Tools."""
        return ""


def text_result(text: str, *, is_error: bool = False) -> dict[str, Any]:
    """A tool's result of one text."""
    return {"content": [{"type": "text", "text": text}], "isError": is_error}


def _meta_value(meta: Mapping[str, Any], key: str) -> Any:
    """The value of one of our keys; ProtocolError where it has the wrong type."""
    value = meta.get(key)
    if value is None:
        return None
    if key == SEED_META:
        valid, allowed = isinstance(value, int | str), "a number or a string"
    else:
        valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_RESULT_TOKENS
        allowed = f"a whole number from 0 to {MAX_RESULT_TOKENS}"
    if not valid:
        raise codec.ProtocolError(codec.INVALID_PARAMS, f"_meta {key} = {value!r}: it must be {allowed}")
    return value
