"""What all queries of a run share, and what they are handed of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fanmark.loadgen.contamination import Explained
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.gate import Gate
from fanmark.loadgen.questions import Question
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Arm
from fanmark.loadgen.tool_calls import ToolUse


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
    questions: Sequence[Question] = ()
    record: bool = False
