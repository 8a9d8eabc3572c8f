"""What a call says of itself in its headers, so that servers, routers and traces can group what belongs together. Pure."""

import hashlib
from urllib.parse import quote

from fanmark.loadgen.records import Call


def call_headers(run_id: str, call: Call) -> dict[str, str]:
    """X-Request-Id and X-Session-Id for servers and routers, traceparent for traces: the trace is the query."""
    query = f"{run_id}-{call.arm}-{call.query}"
    trace_id = hashlib.blake2b(query.encode(), digest_size=16).hexdigest()
    name = f"{query}-{call.call}" if call.attempt == 1 else f"{query}-{call.call}-{call.attempt}"
    span_id = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    return {"X-Request-Id": name, "X-Session-Id": query, "traceparent": f"00-{trace_id}-{span_id}-01"}


def tool_headers(run_id: str, call: Call) -> dict[str, str]:
    """The same for a tool call, and in the baggage who makes it."""
    told = {"run": run_id, "arm": call.arm, "query": str(call.query), "role": call.role}
    baggage = ",".join(f"fanmark.{name}={quote(value, safe='')}" for name, value in told.items())
    return {**call_headers(run_id, call), "baggage": baggage}
