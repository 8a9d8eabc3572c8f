"""Faults of the tool server: what goes wrong with a call, how often and when. Seeded: the n-th call always meets the same. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from fanmark.servers.faults import FaultError, split_fault

KINDS = {
    "error": "the tool's own error",
    "rpc-error": "a JSON-RPC error",
    "429": "refused with HTTP 429 and Retry-After",
    "500": "refused with HTTP 500",
    "503": "refused with HTTP 503, as by a full queue",
    "stall": "answered `seconds` late",
    "reset": "the connection is reset in place of the answer",
    "malformed": "the answer is broken JSON",
    "oversized": "a result of `bytes` more",
}


@dataclass(frozen=True, slots=True)
class ToolFault:
    """One fault: with probability `rate`, from `after_s` to `until_s`, of calls of `tool` (empty: of all)."""

    kind: str
    rate: float = 1.0
    after_s: float = 0.0
    until_s: float = math.inf
    tool: str = ""
    seconds: float = 30.0
    bytes: int = 2_000_000

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FaultError(f"unknown fault {self.kind!r}; there is: {', '.join(KINDS)}")
        if not 0 <= self.rate <= 1:
            raise FaultError(f"fault {self.kind}: rate = {self.rate:g} must lie between 0 and 1")
        if not 0 <= self.after_s < self.until_s:
            raise FaultError(f"fault {self.kind}: 0 <= after_s < until_s must hold")
        if not 0 <= self.seconds < math.inf or not 0 <= self.bytes <= 100_000_000:
            raise FaultError(f"fault {self.kind}: seconds must be >= 0, bytes from 0 to 100000000")


def parse_tool_fault(text: str) -> ToolFault:
    """`KIND` or `KIND:key=value,key=value`. Raises FaultError."""
    given: dict[str, Any] = dict(split_fault(text))
    known = {field.name: field.type for field in fields(ToolFault)}
    for name, value in given.items():
        if name not in known:
            raise FaultError(f"fault {text!r}: {name} is none of {', '.join(known)}")
        try:
            given[name] = known[name](value) if known[name] in (int, float) else value  # type: ignore[operator]
        except ValueError:
            raise FaultError(f"fault {text!r}: {name} = {value!r} is not a number") from None
    return ToolFault(**given)


class ToolFaultPlan:
    """The faults in force, and how often each has struck."""

    def __init__(self, faults: Sequence[ToolFault], seed: int) -> None:
        self.faults, self.seed = tuple(faults), seed
        self.struck = [0] * len(self.faults)

    def __repr__(self) -> str:
        return f"<ToolFaultPlan {[fault.kind for fault in self.faults]} struck {self.struck}>"

    def strikes(self, call: int, tool: str, at_s: float) -> list[ToolFault]:
        """What the call with this number meets, at this time since the server's start."""
        found = []
        for place, fault in enumerate(self.faults):
            if not fault.after_s <= at_s < fault.until_s or fault.tool not in ("", tool):
                continue
            if fault.rate < 1 and Random(f"{self.seed}/{place}/{call}").random() >= fault.rate:
                continue
            self.struck[place] += 1
            found.append(fault)
        return found
