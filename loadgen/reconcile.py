"""The server's own counters set against the client's sums. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fanmark.loadgen.records import Call

# counter of vLLM -> the client's sum that must equal it
_PAIRS = {
    "prompt_tokens": "input_tokens",
    "generation_tokens": "output_tokens",
    "prompt_tokens_cached": "cached_tokens",
    "request_success": None,
}

LATENESS = "fanmark_stub_step_lateness_seconds"  # of our stub: how late its steps' results went out, a histogram
_LATE_SHARE = 0.03
# how a call ends that the server may have worked on; one that it refused (4xx, 429) or never got is in nobody's sums
_UNHEARD = ("timeout", "http_5xx", "stream_cut", "bad_reply", "cancelled")


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


def client_sums(calls: Sequence[Call]) -> dict[str, int | None]:
    """What the calls say of each counter; None where a call that reached the server did not say."""
    ended = [call for call in calls if call.kind == "call" and call.error is None]
    sums: dict[str, int | None] = {}
    for counter, field in _PAIRS.items():
        values = [getattr(call, field) for call in ended] if field else [call.samples for call in ended]
        if counter == "prompt_tokens":  # the server reads the prompt once for each sample, usage tells it once
            values = [v if v is None else v * call.samples for v, call in zip(values, ended, strict=True)]
        unheard = None in values or (counter == "prompt_tokens_cached" and any(call.samples > 1 for call in ended))
        sums[counter] = None if unheard else sum(values)
    return sums


def reconcile(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, calls: Sequence[Call]
) -> dict[str, Any]:
    """`server` of summary.json for one target. `reconciled` is None where the server exposes no counters or a call ended unheard;
    `alone` is False when the server did more than this client asked for."""
    if before is None or after is None:
        return {"reconciled": None, "alone": None, "reason": "the target exposes no counters"}
    sums = client_sums(calls)
    found: dict[str, Any] = {}
    for counter, mine in sums.items():
        if counter not in after:
            continue
        theirs = after[counter] - before.get(counter, 0.0)
        off = None if mine is None else 0.0 if theirs == mine else 100.0 * (theirs - mine) / max(mine, 1)
        found[counter] = {"client": mine, "server": theirs, "off_pct": off}
    unheard = sum(call.error in _UNHEARD for call in calls if call.kind == "call" and call.sent_at is not None)
    offs = [pair["off_pct"] for pair in found.values() if pair["off_pct"] is not None]
    if not offs:
        return {"reconciled": None, "alone": None, "reason": "no counter to compare", **found}
    more = any(off > 0 for off in offs)
    if unheard:
        reason = f"{unheard} calls ended without the server's count"
        return {"reconciled": None, "alone": None if more else True, "reason": reason, **found}
    if sums["prompt_tokens"] is None or sums["generation_tokens"] is None:
        reason = "calls came back without usage"
        return {"reconciled": None, "alone": None if more else True, "reason": reason, **found}
    wrong = [name for name, pair in found.items() if pair["off_pct"]]
    reason = f"{', '.join(wrong)} differ" if wrong else f"{len(offs)} counters equal"
    return {"reconciled": not wrong, "alone": not more, "reason": reason, **found}
