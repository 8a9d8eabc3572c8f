"""What the readers of traces have in common: lines with their place, calls, and who waited for whom where only times tell."""

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fanmark.agents.runtime import Author
from fanmark.loadgen.recording import RecordedCall, Said


@dataclass
class Trace:
    """A file, or a folder of them. `at` is the place that is read, `notes` what the user must be told, once each."""

    path: Path
    at: str = ""
    notes: dict[str, None] = field(default_factory=dict)

    def lines(self) -> Iterator[bytes]:
        """The lines that are not empty; a file *.json is one, whatever it holds. A file may be compressed (*.gz)."""
        if not self.path.is_dir():
            yield from self._lines_of(self.path)
            return
        for path in sorted(self.path.iterdir()):
            if ".json" in path.suffixes or ".jsonl" in path.suffixes:
                yield from self._lines_of(path)

    def _lines_of(self, path: Path) -> Iterator[bytes]:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                self.at = str(path)
                yield file.read()
                return
            for i, line in enumerate(file, start=1):
                if line.strip():
                    self.at = f"{path}, line {i}"
                    yield line

    def note(self, text: str) -> None:
        self.notes[text] = None


def author_of(role: str) -> Author:
    """Who says it, in our words."""
    known: dict[str, Author] = {"system": "system", "developer": "system", "assistant": "assistant", "tool": "tool"}
    return known.get(role, "user")


def made(
    number: int,
    after: Iterable[int],
    due_at: float,
    done_at: float,
    *,
    output_tokens: int | None = None,
    messages: Sequence[Said] | None = None,
    kind: Literal["call", "tool_call"] = "call",
    role: str = "agent",
    round: int = 1,
    **more: Any,
) -> RecordedCall:
    """A call or tool call of a trace. It read what its messages add up to."""
    return RecordedCall(
        query=0, arm="", call=number, after=sorted(after), kind=kind, role=role, round=round, due_at=due_at,
        sent_at=due_at, done_at=done_at, output_tokens=output_tokens,
        input_tokens=None if messages is None else sum(said.tokens for said in messages),
        messages=None if messages is None else list(messages), **more,
    )  # fmt: skip


def share_out(tokens: int, weights: Sequence[float]) -> list[int]:
    """So many tokens by weight, whole ones that add up to it; each has one at least, where there are enough."""
    total, left, found = sum(weights), tokens, []
    for i, weight in enumerate(weights):
        others = len(weights) - i - 1
        mine = round(left * weight / total) if total else left // (others + 1)
        found.append(max(min(1, left), min(mine, left - min(others, left))))
        left, total = left - found[-1], total - weight
    return found


@dataclass
class Agents:
    """Who waited for whom, where a trace tells times alone. An agent's call waits for its own last one, and for what others began and ended
    meanwhile, which that one had asked for; the first call of another agent waits for the call that had ended last."""

    ends: list[tuple[float, float, int, int]] = field(default_factory=list)  # from, to, number, agent

    def after(self, start_at: float, own: int | None) -> list[int]:
        """What a call waited for that starts now and goes on where call number `own` ended, or begins anew. Calls come in order of
        starts."""
        over = [each for each in self.ends if each[1] <= start_at]
        if own is None:
            return [max(over, key=lambda each: (each[1], each[2]))[2]] if over else []
        ended_at = next(to for _, to, number, _ in over if number == own)
        meanwhile = {agent: number for begun, _, number, agent in over if begun >= ended_at}
        return sorted({own, *meanwhile.values()})

    def made(self, start_at: float, end_at: float, number: int, agent: int) -> None:
        self.ends.append((start_at, end_at, number, agent))
