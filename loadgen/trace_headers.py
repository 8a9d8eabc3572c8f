"""What a call says of itself in its headers, so that servers, routers and traces can group what belongs together. Pure."""

import hashlib
from urllib.parse import quote

from fanmark.loadgen.records import Call
from fanmark.loadgen.users import Session


def trace_id(run_id: str, arm: str, query: int) -> str:
    """The trace of a query."""
    return hashlib.blake2b(f"{run_id}-{arm}-{query}".encode(), digest_size=16).hexdigest()


def query_span_id(run_id: str, arm: str, query: int) -> str:
    """The span of a query, above those of its calls."""
    return hashlib.blake2b(f"{run_id}-{arm}-{query}".encode(), digest_size=8).hexdigest()


def span_id(run_id: str, call: Call) -> str:
    """The span of a call or tool call, by attempt."""
    return hashlib.blake2b(_name(run_id, call).encode(), digest_size=8).hexdigest()


def _name(run_id: str, call: Call) -> str:
    name = f"{run_id}-{call.arm}-{call.query}-{call.call}"
    return name if call.attempt == 1 else f"{name}-{call.attempt}"


def call_headers(run_id: str, call: Call, session: Session | None = None) -> dict[str, str]:
    """X-Request-Id, X-Session-Id (the session, or the query that is no session's), and traceparent: the trace is the query."""
    group = f"{run_id}-{call.arm}-{call.query if session is None else session.index}"
    traceparent = f"00-{trace_id(run_id, call.arm, call.query)}-{span_id(run_id, call)}-01"
    return {"X-Request-Id": _name(run_id, call), "X-Session-Id": group, "traceparent": traceparent}


def tool_headers(run_id: str, call: Call, session: Session | None = None) -> dict[str, str]:
    """The same for a tool call, and in the baggage who makes it."""
    told = {"run": run_id, "arm": call.arm, "query": str(call.query), "role": call.role}
    baggage = ",".join(f"fanmark.{name}={quote(value, safe='')}" for name, value in told.items())
    return {**call_headers(run_id, call, session), "baggage": baggage}
