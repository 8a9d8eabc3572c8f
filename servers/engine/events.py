"""What a replica tells: tokens that came out, steps that ran, and where it stands."""

from dataclasses import dataclass, field
from typing import NamedTuple

from fanmark.servers.engine.attribution import Account, Share
from fanmark.servers.engine.batch import Statistics
from fanmark.servers.engine.step_time import BatchShape
from fanmark.servers.engine.timeline import Gaps


@dataclass(slots=True)
class Event:
    """Tokens of one request that came out `at`. Streamed: one per request and step. Else: one per request, when it ends.

    `index` is the place in the output of the first of `tokens`. `queued_at` to `scheduled_at` is vLLM's queue interval (the first
    scheduling counts, also after a preemption). `gaps`, when not streamed: times between its tokens as (seconds, count).
    `share`: what it took of the replica, when it ends and where that is accounted for.
    """

    id: str
    at: float
    tokens: int
    index: int
    first: bool
    finished: bool
    cached_tokens: int
    queued_at: float
    scheduled_at: float
    first_at: float
    preemptions: int
    gaps: Gaps = field(default_factory=list)
    share: Share | None = None


class Step(NamedTuple):
    """`steps` steps that followed each other from `start_at` to `end_at`; `shape` is the first one's, summed over engines."""

    start_at: float
    end_at: float
    shape: BatchShape
    steps: int


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """One moment of a replica: its engines' statistics, and integrals since the start; `account`: whose `busy_s` was, if that is kept."""

    engines: tuple[Statistics, ...]
    steps: int
    busy_s: float
    joules: float
    account: Account | None = None
