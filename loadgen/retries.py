"""Calls that are sent again: which failures pass, and how long to wait. Pure.

A call that is sent again keeps its number, so dependencies, depth, width and the closed form speak of it once: by its last attempt. The
attempts before are records of their own (`retry_at` tells them) and are counted apart, as waste (waste.py).
"""

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Target

LONGEST_BACKOFF_S = 8.0


def wait_s(config: Target, attempt: int, error: CallError, chance: float, wall_s: float) -> float | None:
    """Wall seconds until a call is sent again after its `attempt` failed; None: it is not. The server's Retry-After is honoured as it is,
    unless it asks for longer than a call may take; without one the wait doubles from attempt to attempt, and `chance` in [0, 1) puts it
    between half and all of that."""
    refused = isinstance(error, HttpError) and error.status in (429, 503)
    if attempt > config.retries or not (refused or error.kind == "connect"):
        return None
    told_s = retry_after_s(error.headers, wall_s) if isinstance(error, HttpError) else None
    if told_s:
        return told_s if told_s <= config.call_timeout_s else None
    return float(min(config.retry_backoff_s * 2.0 ** (attempt - 1), LONGEST_BACKOFF_S) * (0.5 + 0.5 * chance))


def retry_after_s(headers: Mapping[str, str], wall_s: float) -> float | None:
    """What the server asks to wait: Retry-After-Ms, or Retry-After in seconds or as a date. A date counts from the response's own Date;
    `wall_s` stands in where there is none. None where nothing is asked, or nothing that can be read."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            return seconds
    until, now = _date(headers.get("retry-after", "")), _date(headers.get("date", ""))
    if until is None:
        return None
    return max(0.0, until.timestamp() - (wall_s if now is None else now.timestamp()))


def _date(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text)
    except ValueError:
        return None


def lost_s(retried: Iterable[Call]) -> dict[int, float]:
    """By call, the time from when its first attempt was due to when its last one was."""
    found: dict[int, float] = {}
    for call in retried:
        if call.retry_at is not None:
            found[call.call] = found.get(call.call, 0.0) + call.retry_at - call.due_at
    return found
