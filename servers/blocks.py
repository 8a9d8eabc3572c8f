"""A streamed answer as blocks: what /v1/responses calls output items and /v1/messages content blocks. Pure."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Step = Literal["begun", "more", "ended"]


@dataclass(slots=True)
class Block:
    """A run of deltas of one kind; `text` is what it has so far. `id` and `name` are a tool call's."""

    index: int
    kind: Literal["reasoning", "content", "call"]
    id: str = ""
    name: str = ""
    text: str = ""


class Blocks:
    """Takes chat deltas (answers.py) one by one, and says which blocks begin, grow and end."""

    def __init__(self) -> None:
        self._open: Block | None = None
        self._begun = 0

    def take(self, delta: bytes) -> Iterator[tuple[Step, Block, str]]:
        """What one delta does: the step, the block, and the text that a block grows by."""
        said = json.loads(delta)
        for call in said.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                yield from self._begin(Block(self._begun, "call", call["id"], function["name"]))
            yield from self._grow(function.get("arguments", ""))
        for kind in ("reasoning", "content"):
            text = said.get(kind)
            if text:
                if self._open is None or self._open.kind != kind:
                    yield from self._begin(Block(self._begun, kind))
                yield from self._grow(text)

    def end(self) -> Iterator[tuple[Step, Block, str]]:
        """The answer is over: the open block ends, if there is one."""
        if self._open is not None:
            yield "ended", self._open, ""
            self._open = None

    def _begin(self, block: Block) -> Iterator[tuple[Step, Block, str]]:
        yield from self.end()
        block.index, self._begun, self._open = self._begun, self._begun + 1, block
        yield "begun", block, ""

    def _grow(self, text: str) -> Iterator[tuple[Step, Block, str]]:
        if text and self._open is not None:
            self._open.text += text
            yield "more", self._open, text
