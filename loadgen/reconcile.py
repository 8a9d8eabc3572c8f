"""The server's own counters set against the client's sums. Pure."""

import math
from collections.abc import Mapping
from typing import Any

from fanmark.loadgen.counters import LATENESS
from fanmark.loadgen.reduced import CallKind, Rows

# the server's counter (counters.py) -> the field of the calls whose sum must equal it
_PAIRS = {
    "prompt_tokens": "input_tokens",
    "generation_tokens": "output_tokens",
    "prompt_tokens_cached": "cached_tokens",
    "request_success": None,
}
_FINISHES = {
    "stop": "stop",
    "tool_calls": "stop",
    "length": "length",
}  # what a client is told -> what the engine counts
_SAID = {
    "request_success": "requests",
    "prompt_tokens": "prompt tokens",
    "generation_tokens": "output tokens",
    "prompt_tokens_cached": "cached tokens",
}
_TOLD = (  # by the server alone
    "preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "draft_tokens",
    "accepted_draft_tokens",
)
_LATE_SHARE = 0.03
# how a call ends that the server may have worked on; one that it refused (4xx, 429) or never got is in nobody's sums
_UNHEARD = ("timeout", "http_5xx", "stream_cut", "bad_reply", "cancelled", "untold")


def stub_on_time(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, mean_call_s: float, time_scale: float
) -> tuple[bool, str] | None:
    """Whether the stub kept its own schedule: p99 of its lateness at most 3 % of a call's mean duration (wall seconds both). None where
    the target is not the stub, or nothing was due."""
    bounds = sorted((float(key.split(" ")[1]), key) for key in after or () if key.startswith(f"{LATENESS} "))
    if before is None or after is None or not bounds:
        return None
    counts = [(bound, after[key] - before.get(key, 0.0)) for bound, key in bounds]
    if counts[-1][1] == 0:
        return None
    late_s = next(bound for bound, count in counts if count >= 0.99 * counts[-1][1])
    limit_s = _LATE_SHARE * mean_call_s
    said = (
        f"p99 of its lateness is at most {late_s * 1e3:g} ms, 3 % of a call's mean duration is {limit_s * 1e3:.0f} ms"
    )
    if late_s <= limit_s:
        return True, said
    wanted = min(time_scale * late_s / limit_s, 1000.0) if limit_s else 1000.0
    return False, f"{said}: the machine is too slow for it, set stub.time_scale = {math.ceil(wanted)}"


def client_sums(calls: Rows[CallKind]) -> dict[str, int | None]:
    """What the calls say of each counter; None where a call that reached the server did not say."""
    ended = calls.where(lambda kind: kind.kind == "call" and kind.error is None)
    several = len(ended.where(lambda kind: kind.samples > 1))
    sums: dict[str, int | None] = {}
    for counter, field in _PAIRS.items():
        # the server reads the prompt once for each sample, usage tells it once
        times = (lambda kind: kind.samples) if counter in ("prompt_tokens", "request_success") else (lambda kind: 1)
        totals = [(len(mine) if field is None else mine.total(field), times(kind)) for kind, mine in ended.kinds()]
        unheard = any(total is None for total, _ in totals) or (counter == "prompt_tokens_cached" and several)
        sums[counter] = None if unheard else sum(int(total or 0) * n for total, n in totals)
    told = ended.counts(lambda kind: _FINISHES.get(kind.finish or "") if kind.samples == 1 else None)
    for reason in ("stop", "length"):
        sums[f"request_success_{reason}"] = None if told[None] else told[reason]  # a reply tells one finish
    sums["request_success_abort"] = None if len(_unheard(calls)) else 0
    return sums | dict.fromkeys(_TOLD, None)


def _unheard(calls: Rows[CallKind]) -> Rows[CallKind]:
    return calls.where(lambda kind: kind.kind == "call" and kind.error in _UNHEARD and kind.sent)


def reconcile(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, calls: Rows[CallKind]
) -> dict[str, Any]:
    """`server` of summary.json for one target. `reconciled` is None where the server exposes no counters, or where calls that ended unheard
    may explain what it counted beyond those that were heard; `alone` is False when it did more than this client can have asked for."""
    if before is None or after is None:
        return _verdict(None, None, "the target exposes no counters")
    sums = client_sums(calls)
    pairs: dict[str, Any] = {}
    for counter, mine in sums.items():
        if counter in after:
            theirs = after[counter] - before.get(counter, 0.0)
            off = None if mine is None else 0.0 if theirs == mine else 100.0 * (theirs - mine) / max(mine, 1)
            pairs[counter] = {"client": mine, "server": theirs, "off_pct": off}
    apart = {name: pair["server"] - pair["client"] for name, pair in pairs.items() if pair["off_pct"] is not None}
    if not apart:
        return _verdict(None, None, "no counter to compare") | pairs
    if any(pair["server"] < 0 for pair in pairs.values()):
        return _verdict(None, None, "the server's counters went back: it was started anew during the run") | pairs
    return _judge(apart, sums, _unheard(calls)) | pairs


def draft_acceptance(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> float | None:
    """The share of the tokens guessed ahead that were accepted; None where the server guesses none, or tells of none."""
    if before is None or after is None:
        return None
    drafted, accepted = (
        after.get(name, 0.0) - before.get(name, 0.0) for name in ("draft_tokens", "accepted_draft_tokens")
    )
    return accepted / drafted if drafted > 0 and "accepted_draft_tokens" in after else None


def _judge(apart: Mapping[str, float], sums: Mapping[str, int | None], unheard: Rows[CallKind]) -> dict[str, Any]:
    """`apart` is how much more the server counted than this client did."""
    most = sum(
        kind.samples * len(mine) for kind, mine in unheard.kinds()
    )  # so many requests may be this client's though it was told of none
    requests = apart.get("request_success")
    more = _amounts({name: n for name, n in apart.items() if n > 0})
    less = _amounts({name: -n for name, n in apart.items() if n < 0})
    strange = any(apart.get(name, 0.0) > 0 for name in ("request_success", "prompt_tokens", "generation_tokens"))
    if (requests or 0.0) > most or (strange and not len(unheard)):
        who = "somebody else uses the server" if requests != 0 else "somebody else's, or the server counts otherwise"
        bound = f", of which {most} may be calls that ended unheard" if most else ""
        reason = f"{more} more than this client sent{bound}: {who}"
        return _verdict(False, False, f"{reason}; and {less} less" if less else reason, reason)
    alone = "the server did no more than this client asked for"
    if less or (more and not strange and not len(unheard)):
        said = f"the server counted {f'{less} less' if less else f'{more} more'} than this client"
        return _verdict(False, None if strange else True, said, said if strange else alone)
    if more:
        ended = f"{len(unheard)} call{'s' * (len(unheard) > 1)}"
        return _verdict(None, None, f"the server counted {more} more: {ended} ended unheard")
    wrong = [name for name, n in apart.items() if n and name not in _SAID and not len(unheard)]
    if wrong:
        return _verdict(False, True, f"{', '.join(wrong)} differ", alone)
    if sums["prompt_tokens"] is None or sums["generation_tokens"] is None:
        return _verdict(None, True, "calls came back without usage", alone)
    return _verdict(True, True, f"{len(apart)} counters equal", alone)


def _amounts(amounts: Mapping[str, float]) -> str:
    """`3 requests, 1,200 prompt tokens and 60 output tokens`, requests first."""
    parts = [
        f"{amounts[name]:,.0f} {said.removesuffix('s' * (amounts[name] == 1))}"
        for name, said in _SAID.items()
        if name in amounts
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _verdict(reconciled: bool | None, alone: bool | None, reason: str, alone_reason: str = "") -> dict[str, Any]:
    return {"reconciled": reconciled, "alone": alone, "reason": reason, "alone_reason": alone_reason or reason}
