"""What all queries of a run share, and what they are handed of it."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fanmark.loadgen.contamination import Explained
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.gate import Gate
from fanmark.loadgen.lanes.mcp_model import Trip
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Arm


class ToolUse(Protocol):
    """The tools that a query may call, as the composer hands them."""

    async def call(self, seed: str, n: int, result_tokens: int, trip: Trip) -> "ToolOutcome":
        """Tool call number `n` of a query. Raises CallError for transport and protocol errors."""

    def end(self, query: Hashable) -> None:
        """A query is over: its own sessions end."""


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """What a tool said, and whether that was its own error; its size, and how long the server kept the call waiting (None: not told)."""

    text: str
    is_error: bool
    bytes: int
    queued_s: float | None


class Tally(Protocol):
    """Told of every call as it starts and ends; live view and metrics read it."""

    def call_started(self, call: Call) -> None: ...

    def call_finished(self, call: Call) -> None: ...

    def call_retried(self, call: Call) -> None: ...


@dataclass(frozen=True, slots=True)
class World:
    """What all queries of a run share. `salts` gives a call's cache salt from (run id, arm, query, call), None for a warm cache; `now` runs
    `time_scale` times slower than seconds."""

    run_id: str
    seed: int
    now: Callable[[], float]
    forced: bool
    salts: Callable[[str, str, int, int], str | None]
    endpoint: Callable[[str, str], Endpoint]
    tools: ToolUse | None
    explained: Explained
    tally: Tally
    gate: Gate
    time_scale: float = 1.0
    worker: int = 0
    arms: Mapping[str, Arm] = field(default_factory=dict)
