"""Queries, calls and tool calls as OpenTelemetry spans, made of the records when a query has ended, and sent as OTLP/HTTP in JSON.

Names are those of the GenAI semantic conventions (open-telemetry/semantic-conventions-genai v0.1.0, in development): a query is
`invoke_agent`, with the arm as the agent; a call is `chat`; a tool call `execute_tool`. Trace and span ids are those of the `traceparent`
that was sent, so that a server's own spans hang below the call. Nothing here is on the path of a call, and nothing here fails a run.
"""

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import Call, Query
from fanmark.loadgen.trace_headers import query_span_id, span_id, trace_id

INTERNAL, CLIENT = 1, 3
_MOST_WAITING = 10_000  # queries
_AT_ONCE = 100
_EVERY_S = 1.0
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Facts:
    """What the spans of a run have in common. `models` are by target; `began_at` is the run's start as Unix time."""

    run_id: str
    scenario: str
    version: str
    models: Mapping[str, str]
    began_at: Callable[[], float | None]
    time_scale: float


def spans_of(query: Query, facts: Facts) -> list[dict[str, Any]]:
    """A query's span, and below it those of its calls and tool calls, also of attempts that were sent again."""
    began_at = facts.began_at() or 0.0

    def nanos(at: float) -> str:
        return str(round((began_at + at * facts.time_scale) * 1e9))

    trace = trace_id(facts.run_id, query.arm, query.query)
    root = query_span_id(facts.run_id, query.arm, query.query)
    group = f"{facts.run_id}-{query.arm}-{query.query if query.session is None else query.session}"
    ids = {call.call: span_id(facts.run_id, call) for call in query.calls}
    resources = {
        name: query.resources.get(name) for name in ("input_tokens", "output_tokens", "cached_tokens", "calls")
    }
    own = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": query.arm,
        "gen_ai.conversation.id": group,
        **_usage(resources["input_tokens"], resources["output_tokens"], resources["cached_tokens"], None),
        "error.type": None if query.outcome == "completed" else (query.error or query.outcome).partition(":")[0],
        "fanmark.query": query.query,
        "fanmark.outcome": query.outcome,
        "fanmark.phase": query.phase,
        "fanmark.calls": resources["calls"],
        "fanmark.expected.calls": query.expected.get("calls"),
    }
    found = [
        {
            "traceId": trace, "spanId": root, "name": f"invoke_agent {query.arm}", "kind": INTERNAL,
            "startTimeUnixNano": nanos(query.due_at), "endTimeUnixNano": nanos(query.done_at),
            "attributes": _attributes(own), "status": _status(query.outcome != "completed"),
        }
    ]  # fmt: skip
    for call in [*query.retried, *query.calls]:
        sent_at, failed = (
            call.due_at if call.sent_at is None else call.sent_at,
            call.error is not None or call.tool_error,
        )
        name, kind, told = _tool(call) if call.kind == "tool_call" else _chat(call, facts)
        found.append({
            "traceId": trace, "spanId": span_id(facts.run_id, call), "parentSpanId": root, "name": name, "kind": kind,
            "startTimeUnixNano": nanos(sent_at), "endTimeUnixNano": nanos(sent_at if call.done_at is None else call.done_at),
            "attributes": _attributes({**told, "gen_ai.conversation.id": group, "fanmark.call": call.call,
                                       "fanmark.role": call.role, "fanmark.round": call.round, "fanmark.attempt": call.attempt}),
            "events": [] if call.first_at is None else [{"name": "first_token", "timeUnixNano": nanos(call.first_at)}],
            "links": [{"traceId": trace, "spanId": ids[n]} for n in call.after if n in ids],
            "status": _status(failed),
        })  # fmt: skip
    return found


def _chat(call: Call, facts: Facts) -> tuple[str, int, dict[str, Any]]:
    model = facts.models.get(call.target or "", "")
    return f"chat {model}".strip(), CLIENT, {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",  # whose API is spoken
        "gen_ai.request.model": model,
        "gen_ai.response.finish_reasons": None if call.finish is None else [call.finish],
        **_usage(call.input_tokens, call.output_tokens, call.cached_tokens, call.reasoning_tokens),
        "error.type": call.error,
        "fanmark.target": call.target,
    }  # fmt: skip


def _tool(call: Call) -> tuple[str, int, dict[str, Any]]:
    return f"execute_tool {call.tool}", INTERNAL, {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": call.tool,
        "mcp.method.name": "tools/call",
        "error.type": call.error or ("tool_error" if call.tool_error else None),
    }  # fmt: skip


def _usage(read: float | None, wrote: float | None, cached: float | None, reasoned: float | None) -> dict[str, Any]:
    names = ("input_tokens", "output_tokens", "cache_read.input_tokens", "reasoning.output_tokens")
    return {f"gen_ai.usage.{name}": value for name, value in zip(names, (read, wrote, cached, reasoned), strict=True)}


def _status(failed: bool) -> dict[str, int]:
    return {"code": 2} if failed else {}


def _attributes(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As OTLP writes them; what is not known is left out."""
    return [{"key": key, "value": _value(value)} for key, value in given.items() if value is not None]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(each) for each in value]}}
    if isinstance(value, float) and not value.is_integer():
        return {"doubleValue": value}
    return {"stringValue": value} if isinstance(value, str) else {"intValue": str(int(value))}


def body_of(spans: list[dict[str, Any]], facts: Facts) -> bytes:
    """An ExportTraceServiceRequest."""
    resource = {"service.name": "fanmark", "service.version": facts.version}
    resource |= {"fanmark.run.id": facts.run_id, "fanmark.scenario": facts.scenario}
    scope = {"name": "fanmark", "version": facts.version}
    told = {"resource": {"attributes": _attributes(resource)}, "scopeSpans": [{"scope": scope, "spans": spans}]}
    return json.dumps({"resourceSpans": [told]}).encode()


def check_url(url: str) -> str:
    """Where spans are posted: the collector's address with the path of traces, where it has none. Raises ScenarioError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ScenarioError(f"--otlp {url}: must be the http(s) address of a collector, such as http://127.0.0.1:4318")
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/traces"


def headers_of(given: str) -> dict[str, str]:
    """OTEL_EXPORTER_OTLP_HEADERS: key=value, ..., percent-encoded."""
    pairs = (pair.partition("=") for pair in given.split(",") if "=" in pair)
    return {key.strip(): unquote(value.strip()) for key, _, value in pairs}


class Spans:
    """Takes queries that have ended and sends their spans from a thread of its own, a batch each second."""

    def __init__(self, url: str, facts: Facts) -> None:
        self._url, self._facts = check_url(url), facts
        self._headers = {
            "Content-Type": "application/json",
            **headers_of(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")),
        }
        self._waiting: queue.Queue[Query] = queue.Queue(_MOST_WAITING)
        self._ending = threading.Event()
        self._lost, self._why = 0, ""
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        self._thread.start()

    def put(self, query: Query, *, waits: bool = False) -> None:
        """A query that has ended. Where the collector is too slow it is lost, and that is told; with `waits` only where it takes none at
        all for a while."""
        try:
            self._waiting.put(query, waits and not self._lost, _TIMEOUT_S)
        except queue.Full:
            self._lost, self._why = self._lost + 1, self._why or "the collector is too slow"

    def close(self) -> list[str]:
        """Sends what is left; gives a line where something was not taken."""
        self._ending.set()
        self._thread.join(2 * _TIMEOUT_S)
        if self._thread.is_alive():
            self._lost, self._why = self._lost + self._waiting.qsize(), "the collector does not answer"
        return [f"--otlp: the spans of {self._lost} queries were not taken: {self._why}"] if self._lost else []

    def _send_all(self) -> None:
        from http.client import HTTPException

        while not (self._ending.wait(_EVERY_S) and self._waiting.empty()):
            for batch in self._batches():
                try:
                    self._post(body_of([span for query in batch for span in spans_of(query, self._facts)], self._facts))
                except (OSError, HTTPException) as e:
                    self._lost, self._why = self._lost + len(batch), str(e) or type(e).__name__

    def _batches(self) -> Iterator[list[Query]]:
        while not self._waiting.empty():
            batch: list[Query] = []
            with suppress(queue.Empty):
                while len(batch) < _AT_ONCE:
                    batch.append(self._waiting.get_nowait())
            yield batch

    def _post(self, body: bytes) -> None:
        from urllib.request import Request, urlopen

        with urlopen(Request(self._url, body, self._headers), timeout=_TIMEOUT_S) as reply:
            reply.read()
