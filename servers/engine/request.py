"""What the engine is asked to do. The seam between the engine and its drivers (stub server, virtual lane, replay)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Request:
    """One generation. Its output is known ahead: the engine models time and memory, not language.

    `prompt` and `output` are token ids, at least one each; the request ends with the last id of `output`. `salt` keeps prefix
    caches apart. A lower `priority` is served first where the policy is "priority". `arrived_at` is in the driver's seconds. `session`
    is for a router that keeps sessions together.
    """

    id: str
    prompt: Sequence[int]
    output: Sequence[int]
    salt: str = ""
    priority: int = 0
    arrived_at: float = 0.0
    session: str = ""
