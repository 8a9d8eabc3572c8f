"""Spans of known queries, and of a run as a collector on loopback takes them."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import two_arms
from free_port import free_port
from test_run import BRIEF, fanmark, lines

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.otlp import Facts, Spans, check_url, headers_of, spans_of
from fanmark.loadgen.trace_headers import call_headers

FACTS = Facts("r1", "two", "1.2", {"t": "tiny"}, lambda: 1000.0, time_scale=2.0)


def told(span: dict[str, Any]) -> dict[str, Any]:
    """A span's attributes."""

    def plain(value: dict[str, Any]) -> Any:
        ((kind, inside),) = value.items()
        if kind == "arrayValue":
            return [plain(each) for each in inside["values"]]
        return int(inside) if kind == "intValue" else inside

    return {each["key"]: plain(each["value"]) for each in span["attributes"]}


def test_a_query_is_a_tree_of_spans_under_the_conventions_names() -> None:
    query = next(q for q in two_arms.queries() if q.arm == "debate" and q.query == 0)
    root, *calls = spans_of(query, FACTS)
    assert (root["name"], root["kind"], root["status"]) == ("invoke_agent debate", 1, {})
    assert (root["startTimeUnixNano"], root["endTimeUnixNano"]) == (
        "1000000000000",
        "1016000000000",
    )  # 8 s, at half the speed
    seen = told(root)
    assert seen["gen_ai.operation.name"] == "invoke_agent" and seen["gen_ai.conversation.id"] == "r1-debate-0"
    assert (seen["gen_ai.usage.input_tokens"], seen["gen_ai.usage.output_tokens"]) == (400, 83)
    assert [call["name"] for call in calls] == ["chat tiny", "chat tiny", "execute_tool now", "chat tiny"]
    assert [call["kind"] for call in calls] == [3, 3, 1, 3]
    assert {call["parentSpanId"] for call in calls} == {root["spanId"]}
    judge = told(calls[3])
    assert (judge["fanmark.role"], judge["fanmark.round"], judge["gen_ai.request.model"]) == ("judge", 2, "tiny")
    assert (judge["gen_ai.usage.input_tokens"], judge["gen_ai.usage.cache_read.input_tokens"]) == (200, 96)
    assert "gen_ai.usage.reasoning.output_tokens" not in judge  # no server told of it
    assert calls[3]["events"] == [{"name": "first_token", "timeUnixNano": "1010000000000"}]
    assert [link["spanId"] for link in calls[3]["links"]] == [
        calls[1]["spanId"],
        calls[2]["spanId"],
    ]  # what it waited for
    assert told(calls[2])["mcp.method.name"] == "tools/call" and calls[2]["events"] == []


def test_a_spans_ids_are_those_that_the_server_was_sent() -> None:
    query = next(q for q in two_arms.queries() if q.arm == "debate" and q.query == 1)
    for span, call in zip(spans_of(query, FACTS)[1:], query.calls, strict=True):
        assert call_headers("r1", call)["traceparent"] == f"00-{span['traceId']}-{span['spanId']}-01"


def test_what_failed_says_how() -> None:
    query = next(q for q in two_arms.queries() if q.outcome == "failed")
    root, good, bad = spans_of(query, FACTS)
    assert (told(root)["error.type"], root["status"]) == ("http_5xx", {"code": 2})
    assert (told(bad)["error.type"], bad["status"], bad["events"]) == ("http_5xx", {"code": 2}, [])
    assert "error.type" not in told(good) and good["status"] == {}
    call = two_arms.tool(1, 0.0, 1.0)
    call.tool_error = True
    (_, tool) = spans_of(two_arms.query("debate", 5, [call], 0.0, 1.0), FACTS)
    assert told(tool)["error.type"] == "tool_error"


@pytest.mark.parametrize(
    ("url", "posted"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://c.example/", "https://c.example/v1/traces"),
        ("https://c.example/otlp/v1/traces", "https://c.example/otlp/v1/traces"),
    ],
)
def test_a_collectors_address(url: str, posted: str) -> None:
    assert check_url(url) == posted


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://c.example", "http://"])
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(ScenarioError, match=r"must be the http\(s\) address of a collector"):
        check_url(url)


def test_headers_come_as_the_environment_has_them() -> None:
    assert headers_of("api-key=a%20b, x=1=2,") == {"api-key": "a b", "x": "1=2"}


class Collector(ThreadingHTTPServer):
    """Keeps the bodies that are posted to it, and answers with `status`."""

    def __init__(self, status: int) -> None:
        bodies: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                bodies.append((self.path, json.loads(data)))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies = bodies
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def collector(request: pytest.FixtureRequest) -> Iterator[Collector]:
    with Collector(getattr(request, "param", 200)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.real
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_collector_has_every_query_and_call_of_a_run(tmp_path: Path, collector: Collector, workers: str) -> None:
    flags = ["--queries", "3", "--concurrency", "2", "--workers", workers, "--otlp", collector.url, *BRIEF]
    done = fanmark("run", *flags, "--quiet", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert {path for path, _ in collector.bodies} == {"/v1/traces"}
    resources = [resource for _, body in collector.bodies for resource in body["resourceSpans"]]
    spans = [span for resource in resources for scope in resource["scopeSpans"] for span in scope["spans"]]
    run = json.loads((tmp_path / "run" / "summary.json").read_text())["run"]
    assert {told(each["resource"])["fanmark.run.id"] for each in resources} == {run["id"]}
    queries, calls = lines(tmp_path / "run" / "queries.jsonl"), lines(tmp_path / "run" / "calls.jsonl")
    by_name = {
        name: [s for s in spans if s["name"].startswith(name)] for name in ("invoke_agent", "chat", "execute_tool")
    }
    assert len(by_name["invoke_agent"]) == len(queries) == 9
    assert len(by_name["chat"]) == sum(call["kind"] == "call" for call in calls) == 3 * (1 + 9 + 3)
    assert len(by_name["execute_tool"]) == sum(call["kind"] == "tool_call" for call in calls) == 6
    assert len({span["spanId"] for span in spans}) == len(spans)
    assert {span["traceId"] for span in spans} == {span["traceId"] for span in by_name["invoke_agent"]}
    wrote = sum(told(span)["gen_ai.usage.output_tokens"] for span in by_name["chat"])
    assert wrote == sum(call["output_tokens"] or 0 for call in calls)


@pytest.mark.parametrize("collector", [503], indirect=True)
def test_spans_that_are_not_taken_are_told_and_fail_nothing(collector: Collector) -> None:
    spans = Spans(collector.url, FACTS)
    for query in two_arms.queries()[:4]:
        spans.put(query)
    assert spans.close() == ["--otlp: the spans of 4 queries were not taken: HTTP Error 503: Service Unavailable"]


def test_a_collector_that_is_not_there_is_told() -> None:
    spans = Spans(f"http://127.0.0.1:{free_port()}", FACTS)
    spans.put(two_arms.queries()[1])
    assert spans.close() == [
        "--otlp: the spans of 1 queries were not taken: <urlopen error [Errno 111] Connection refused>"
    ]
