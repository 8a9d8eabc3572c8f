"""How near a replayed query came to the recorded one: shares from 0 to 1, which is as recorded. Pure.

Each replayed call and tool call is set against a recorded one of the same place: same kind and role, and what it waited for has the same
places. One that has no counterpart is set against nothing. Over all pairs

    structure      pairs with a counterpart / the larger number of calls and tool calls
    calls          the smaller number of calls and tool calls / the larger
    input_tokens   sum of the smaller count of each pair / sum of the larger; likewise output_tokens
    overlap        1 - sum of |cached - recorded cached| / sum of the larger input: the share of the input for which the cache did as it did
    gaps           1 - sum of |d - recorded d| / sum of the larger d, where d is what a call waited for its agent (since what it waited for
                   had ended), and what a tool call took on top; differences of up to 5 ms are the client's, and count as none

What is not known of a call on either side (cached tokens, mostly) makes that share null.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from fanmark.agents.steps import Step
from fanmark.loadgen.records import Call, in_order

MEASURES = ("structure", "calls", "input_tokens", "output_tokens", "overlap", "gaps")
CLIENT_S = 0.005


@dataclass(frozen=True, slots=True)
class Made:
    """A call or tool call, recorded or replayed: its place, and what is compared of it."""

    place: Hashable
    is_call: bool
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    waits_s: tuple[float, ...]


def fidelity(steps: Sequence[Step], calls: Iterable[Call], started_at: float) -> dict[str, float | None]:
    """The measures of one query that replayed `steps` by `calls`."""
    recorded, replayed = _recorded(steps), _replayed(calls, started_at)
    pairs = _paired(recorded, replayed)
    most, least = max(len(recorded), len(replayed)), min(len(recorded), len(replayed))
    inferred = [(a, b) for a, b in pairs if (a or b).is_call]  # type: ignore[union-attr]  # one of the two is there
    return {
        "structure": sum(a is not None and b is not None for a, b in pairs) / most if most else 1.0,
        "calls": least / most if most else 1.0,
        "input_tokens": _equal_share(inferred, lambda made: made.input_tokens),
        "output_tokens": _equal_share(inferred, lambda made: made.output_tokens),
        "overlap": _overlap(inferred),
        "gaps": _gaps(pairs),
    }


def _recorded(steps: Sequence[Step]) -> list[Made]:
    places: dict[Hashable, Hashable] = {}
    found = []
    for step in steps:
        places[step.writes] = _place(step.is_call, step.role, [places[key] for key in step.after])
        tokens = step.tokens if step.is_call else None
        waits_s = (step.pause_s,) if step.is_call else (step.pause_s, step.seconds)
        found.append(Made(places[step.writes], step.is_call, step.input_tokens, tokens, step.cached_tokens, waits_s))
    return found


def _replayed(calls: Iterable[Call], started_at: float) -> list[Made]:
    places: dict[int, Hashable] = {}
    ended: dict[int, float] = {}
    found = []
    for call in in_order(calls):
        is_call = call.kind == "call"
        places[call.call] = _place(is_call, call.role, [places[n] for n in call.after])
        pause_s = max(0.0, call.due_at - max((ended[n] for n in call.after), default=started_at))
        ended[call.call] = call.due_at if call.done_at is None else call.done_at
        waits_s = (pause_s,) if is_call else (pause_s, call.seconds)
        found.append(
            Made(places[call.call], is_call, call.input_tokens, call.output_tokens, call.cached_tokens, waits_s)
        )
    return found


def _place(is_call: bool, role: str, after: Iterable[Hashable]) -> Hashable:
    """Equal for calls that stand alike in their queries; a hash, for a chain's last would hold all before it."""
    return hash((is_call, role, tuple(sorted(after))))  # type: ignore[type-var]  # hashes are numbers


def _paired(recorded: Sequence[Made], replayed: Sequence[Made]) -> list[tuple[Made | None, Made | None]]:
    """Those of one place against each other, the shortest with the shortest."""
    groups: dict[Hashable, tuple[list[Made], list[Made]]] = defaultdict(lambda: ([], []))
    for side, made in enumerate((recorded, replayed)):
        for each in made:
            groups[each.place][side].append(each)
    return [pair for a, b in groups.values() for pair in zip_longest(sorted(a, key=_size), sorted(b, key=_size))]


def _size(made: Made) -> tuple[float, ...]:
    return (made.output_tokens or 0, made.input_tokens or 0, *made.waits_s)


def _equal_share(pairs: Sequence[tuple[Made | None, Made | None]], count: Callable[[Made], int | None]) -> float | None:
    least = most = 0
    for pair in pairs:
        counts = [0 if made is None else count(made) for made in pair]
        if None in counts:
            return None
        least, most = least + min(counts), most + max(counts)  # type: ignore[type-var,operator]  # none of them is None
    return least / most if most else 1.0


def _overlap(pairs: Sequence[tuple[Made | None, Made | None]]) -> float | None:
    off = most = 0
    for pair in pairs:
        cached = [0 if made is None else made.cached_tokens for made in pair]
        if cached[0] is None or cached[1] is None:
            return None
        off += abs(cached[0] - cached[1])
        most += max((made.input_tokens or 0) for made in pair if made is not None)
    return max(0.0, 1.0 - off / most) if most else 1.0


def _gaps(pairs: Sequence[tuple[Made | None, Made | None]]) -> float:
    off_s, most_s = [], []
    for pair in pairs:
        recorded, replayed = (() if made is None else made.waits_s for made in pair)
        for a, b in zip_longest(recorded, replayed, fillvalue=0.0):
            off_s.append(max(0.0, abs(a - b) - CLIENT_S))
            most_s.append(max(a, b))
    most = math.fsum(most_s)
    return max(0.0, 1.0 - math.fsum(off_s) / most) if most else 1.0
