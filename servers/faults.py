"""Faults of the stub: what goes wrong, how often and when. Seeded: the n-th request of a server meets the same faults each time.

Rules of the file:
1. Pure: `FaultPlan` decides, the server acts. Times are wall seconds since the plan was set.
2. A fault of a request applies with probability `rate`, between `after_s` and `until_s`.
3. A fault of the engine (engine-death, slow-down) applies to all that runs in its window; it takes no rate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

REQUEST_KINDS = {
    "429": "refused with HTTP 429 and Retry-After: retry_after_s",
    "429-bare": "refused with HTTP 429, without a word on when to come again",
    "503": "refused with HTTP 503, as by a full queue",
    "500": "refused with HTTP 500",
    "error-body": "refused with an error as the body of an HTTP 200",
    "slow-admission": "reaches the engine `seconds` late",
    "stall": "after `tokens` tokens nothing is sent for `seconds`",
    "reset": "the connection is reset after `tokens` tokens",
    "error-event": "the stream ends with an error event after `tokens` tokens",
    "truncated": "the body ends in the middle of the chunk after `tokens` tokens, as if it were whole",
    "no-done": "the stream ends without [DONE]",
    "malformed": "the chunk after `tokens` tokens is broken JSON",
    "no-usage": "usage is missing",
}
ENGINE_KINDS = {
    "engine-death": "the engine is dead from after_s to until_s, then back with a cold cache",
    "slow-down": "steps take `factor` times as long",
}
KINDS = {**REQUEST_KINDS, **ENGINE_KINDS}


class FaultError(ValueError):
    """A fault that cannot be: one line that says what was given and what is allowed."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; which of the last five fields count depends on the kind (see KINDS)."""

    kind: str
    rate: float = 1.0
    after_s: float = 0.0
    until_s: float = math.inf
    seconds: float = 1.0
    tokens: int = 1
    factor: float = 2.0
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FaultError(f"unknown fault {self.kind!r}; there is: {', '.join(KINDS)}")
        if not 0 <= self.rate <= 1:
            raise FaultError(f"fault {self.kind}: rate = {self.rate:g} must lie between 0 and 1")
        if not 0 <= self.after_s < self.until_s:
            raise FaultError(
                f"fault {self.kind}: 0 <= after_s < until_s must hold, got {self.after_s:g} and {self.until_s:g}"
            )
        if self.kind in ENGINE_KINDS and self.rate != 1:
            raise FaultError(f"fault {self.kind} takes no rate: it goes by its window, after_s and until_s")
        if min(self.seconds, self.tokens, self.retry_after_s) < 0 or self.factor <= 0:
            raise FaultError(f"fault {self.kind}: seconds, tokens and retry_after_s must be >= 0, factor > 0")

    def describe(self) -> dict[str, Any]:
        """The fault as JSON; an endless window has until_s null."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**shown, "until_s": None if math.isinf(self.until_s) else self.until_s}


def parse_fault(text: str) -> Fault:
    """`KIND` or `KIND:key=value,key=value`. Raises FaultError."""
    return fault_from(split_fault(text))


def split_fault(text: str) -> dict[str, str]:
    """The same as names and texts. Raises FaultError."""
    kind, _, rest = text.partition(":")
    given = {"kind": kind.strip()}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise FaultError(f"fault {text!r}: {part!r} is not key=value")
        given[key.strip()] = value.strip()
    return given


def fault_from(given: Mapping[str, Any]) -> Fault:
    """A fault from JSON or text values. Raises FaultError."""
    known = {f.name: f for f in fields(Fault)}
    wrong = sorted(set(given) - set(known))
    if wrong or not isinstance(given.get("kind"), str):
        raise FaultError(f"a fault has a kind and {', '.join(list(known)[1:])}; got {', '.join(wrong) or 'no kind'}")
    values: dict[str, Any] = {"kind": given["kind"]}
    for name in given:
        if name != "kind" and given[name] is not None:
            try:
                values[name] = int(given[name]) if name == "tokens" else float(given[name])
            except (TypeError, ValueError):
                raise FaultError(f"fault {given['kind']}: {name} = {given[name]!r} is not a number") from None
    return Fault(**values)


@dataclass(frozen=True, slots=True)
class Doom:
    """What one request meets. `status` 0: it is let in. Token counts: after so many tokens of the first choice; None: never.
    `retry_after_s` None: not told."""

    status: int = 0
    retry_after_s: float | None = None
    admission_s: float = 0.0
    stall_after: int | None = None
    stall_s: float = 0.0
    reset_after: int | None = None
    malformed_after: int | None = None
    error_after: int | None = None
    truncated_after: int | None = None
    no_done: bool = False
    no_usage: bool = False


SPARED = Doom()


class FaultPlan:
    """The faults in force, and how often each has struck."""

    def __init__(self, faults: Sequence[Fault] = (), seed: int = 0) -> None:
        self.faults, self.seed = tuple(faults), seed
        self.struck = [0] * len(self.faults)

    def __repr__(self) -> str:
        return f"<FaultPlan {[fault.kind for fault in self.faults]} struck {self.struck}>"

    def doom(self, request: int, at_s: float) -> Doom:
        """What the request with this number meets, at this time."""
        if not self.faults:
            return SPARED
        doom = SPARED
        for place, fault in enumerate(self.faults):
            if fault.kind in ENGINE_KINDS or not fault.after_s <= at_s < fault.until_s:
                continue
            if fault.rate < 1 and Random(f"{self.seed}/{place}/{request}").random() >= fault.rate:
                continue
            if doom.status:
                break
            self.struck[place] += 1
            doom = _worse(doom, fault)
        return doom

    def engine_dead(self, at_s: float) -> bool:
        return any(f.kind == "engine-death" and f.after_s <= at_s < f.until_s for f in self.faults)

    def slow_down(self, at_s: float) -> float:
        """How many times as long a step takes."""
        return math.prod(f.factor for f in self.faults if f.kind == "slow-down" and f.after_s <= at_s < f.until_s)

    def next_turn(self, at_s: float) -> float | None:
        """The next time after `at_s` at which a fault of the engine begins or ends; None: never."""
        turns = [t for f in self.faults if f.kind in ENGINE_KINDS for t in (f.after_s, f.until_s)]
        return min((t for t in turns if at_s < t < math.inf), default=None)


def _worse(doom: Doom, fault: Fault) -> Doom:
    match fault.kind:
        case "429":
            return replace(doom, status=429, retry_after_s=fault.retry_after_s)
        case "429-bare" | "503" | "500":
            return replace(doom, status=int(fault.kind[:3]))
        case "error-body":
            return replace(doom, status=200)
        case "slow-admission":
            return replace(doom, admission_s=doom.admission_s + fault.seconds)
        case "stall":
            return replace(doom, stall_after=fault.tokens, stall_s=fault.seconds)
        case "reset":
            return replace(doom, reset_after=fault.tokens)
        case "malformed":
            return replace(doom, malformed_after=fault.tokens)
        case "error-event":
            return replace(doom, error_after=fault.tokens)
        case "truncated":
            return replace(doom, truncated_after=fault.tokens)
        case "no-done":
            return replace(doom, no_done=True)
        case _:
            return replace(doom, no_usage=True)
