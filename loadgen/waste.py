"""What came of nothing: attempts that were sent again, and calls whose answers nobody used. Pure."""

import math
from typing import Any

from fanmark.loadgen.reduced import Reduced, seconds

# how an attempt ends whose server did not say what it cost, though it may have worked on it
_UNTOLD = ("timeout", "http_5xx", "stream_cut", "bad_reply", "cancelled", "untold")


def waste(counted: Reduced, lost_s: float) -> dict[str, Any]:
    """`waste` of an arm in summary.json, from its counted queries: attempts that were sent again, calls that a query gave up since it
    needed them no more, and the calls of queries that did not complete. Tokens are None where a server may have worked on one of them and
    did not say; `seconds` is time in flight, and between attempts (`lost_s`)."""
    calls = counted.calls.where(lambda kind: kind.kind == "call" and not kind.retried)
    retried = counted.calls.where(lambda kind: kind.retried)
    given_up = calls.where(lambda kind: not kind.needed)
    lost = calls.where(lambda kind: kind.outcome != "completed" or not kind.needed)
    untold = lost.where(lambda kind: kind.sent and kind.error in _UNTOLD)
    names = ("input_tokens", "output_tokens")
    return {
        "retries": len(retried),
        "retried": dict(retried.counts(lambda kind: kind.error)),
        "given_up": len(given_up),
        "calls": len(retried) + len(lost),
        **{name: None if untold.unknown(name) else sum(lost.known(name)) for name in names},
        "seconds": lost_s + math.fsum(seconds(lost)),
    }
