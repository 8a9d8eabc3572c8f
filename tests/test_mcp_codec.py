"""JSON-RPC and MCP on the wire, without a wire: laws of the codec, and how a session opens."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.lanes.mcp_model import RemoteTool, ToolProtocolError, ToolTransportError
from fanmark.loadgen.lanes.mcp_session import (
    Answer,
    Opened,
    Post,
    Session,
    call_post,
    checked,
    opening,
    result_of,
    session_refused,
)
from fanmark.servers import mcp_codec as codec

texts = st.text(st.characters(codec="utf-8"), max_size=30)
ids = st.integers(-(2**53), 2**53) | texts
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=4)
messages: st.SearchStrategy[codec.Message] = st.one_of(
    st.builds(codec.Request, ids, texts, objects),
    st.builds(codec.Notification, texts, objects),
    st.builds(codec.Result, ids, objects),
    st.builds(codec.Failure, ids | st.none(), st.integers(-40000, 0), texts, values),
)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


@given(messages)
def test_what_was_encoded_is_decoded(message: codec.Message) -> None:
    data = codec.encode(message)
    assert codec.decode(data) == message
    assert json.loads(data)["jsonrpc"] == "2.0"


@given(
    st.lists(messages, max_size=5),
    st.lists(st.integers(0, 10_000), max_size=12),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
)
def test_a_stream_cut_anywhere_gives_its_messages(
    sent: list[codec.Message], places: list[int], end: str, noisy: bool
) -> None:
    """Whatever the line ends, the pieces, and the comments and ids between."""
    body = b"".join(codec.event_bytes(message) for message in sent)
    if noisy:
        body = (
            b": hello\n\n"
            + body.replace(b"event: message\n", b"id: 7\nretry: 20\nevent: message\n")
            + b"id: 8\ndata:\n\n"
        )
    body = body.replace(b"\n", end.encode())
    reader = codec.ReplyReader("text/event-stream; charset=utf-8")
    found = [message for piece in cut(body, places) for message in reader.feed(piece)]
    found += reader.feed(b"\n") if end == "\r" else []  # a CR at the very end may be half of a CRLF
    assert found == sent
    assert reader.end() == []
    assert (reader.last_event, reader.retry_ms) == ((None, None) if not noisy else ("8", 20 if sent else None))


@given(messages, st.lists(st.integers(0, 10_000), max_size=12))
def test_a_body_cut_anywhere_is_its_message(sent: codec.Message, places: list[int]) -> None:
    reader = codec.ReplyReader("application/json")
    assert [m for piece in cut(codec.encode(sent), places) for m in reader.feed(piece)] == []
    assert reader.end() == [sent]


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        codec.decode(data)
    except codec.ProtocolError as error:
        assert error.code in (codec.PARSE_ERROR, codec.INVALID_REQUEST)


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"{", codec.PARSE_ERROR, "no JSON"),
        (b"\xff", codec.PARSE_ERROR, "no JSON"),
        (b'{"jsonrpc":"2.0","method":"a","params":{"x":' + b"[" * 100_000, codec.PARSE_ERROR, "no JSON"),
        (b"[]", codec.INVALID_REQUEST, "no JSON-RPC message"),
        (b'{"jsonrpc":"1.0","id":1,"method":"a"}', codec.INVALID_REQUEST, "must be 2.0"),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"a"}', codec.INVALID_REQUEST, "no JSON-RPC message"),
        (b'{"jsonrpc":"2.0","id":null,"method":"a"}', codec.INVALID_REQUEST, "needs an id"),
        (b'{"jsonrpc":"2.0","id":1,"method":"a","params":[1]}', codec.INVALID_REQUEST, "no JSON-RPC message"),
        (b'{"jsonrpc":"2.0","id":1}', codec.INVALID_REQUEST, "neither a request"),
        (b'{"jsonrpc":"2.0","result":{}}', codec.INVALID_REQUEST, "neither a request"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, code: int, said: str) -> None:
    with pytest.raises(codec.ProtocolError, match=said) as refused:
        codec.decode(data)
    assert refused.value.code == code


@given(texts)
def test_header_values_come_back_and_are_plain(text: str) -> None:
    value = codec.header_value(text)
    assert codec.header_text(value) == text
    assert value.isascii()
    assert value.isprintable()
    assert value == value.strip()


def test_marked_arguments_go_into_headers() -> None:
    schema = {
        "properties": {
            "region": {"type": "string", "x-mcp-header": "Region"},
            "deep": {"properties": {"on": {"type": "boolean", "x-mcp-header": "On"}}},
            "other": {"type": "string"},
            "left_out": {"type": "integer", "x-mcp-header": "Count"},
        }
    }
    found = codec.param_headers(schema, {"region": "Zürich", "deep": {"on": True}, "other": "x", "left_out": None})
    assert found == {"Mcp-Param-Region": "=?base64?WsO8cmljaA==?=", "Mcp-Param-On": "true"}


@given(objects, objects)
def test_whatever_a_server_says_is_a_result_or_a_protocol_error(result: dict[str, Any], schema: dict[str, Any]) -> None:
    codec.param_headers({"properties": schema, **schema}, result)
    for said in (
        result,
        {"content": [result], "structuredContent": schema, "_meta": schema},
        {"content": list(result)},
    ):
        try:
            found = result_of(said, "here")
            assert found.bytes == len(found.text.encode())
        except ToolProtocolError:
            pass
    for page in (result, {"tools": [result]}, {"tools": [{"name": "a", **schema}]}, {"tools": schema}):
        with suppress(ToolProtocolError):
            opened(codec.MODERN, [Answer(200, codec.Result(1, page))])


def opened(known: str | None, answers: Sequence[Answer]) -> tuple[list[Post], Opened]:
    """What is posted when these are the answers, and what opens."""
    steps, left, posts = opening(known, "here"), list(answers), list[Post]()
    try:
        posts.append(next(steps))
        while True:
            posts.append(steps.send(left.pop(0)))
    except StopIteration as done:
        assert not left
        return posts, done.value


def methods(posts: Sequence[Post]) -> list[str]:
    return [json.loads(each.body)["method"] for each in posts]


def ok(**result: Any) -> Answer:
    return Answer(200, codec.Result(1, result), "s1" if "protocolVersion" in result else None)


LISTED = ok(tools=[{"name": "a", "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": True}}])
DISCOVERED = ok(supportedVersions=["2026-07-28"])
SHAKEN = ok(protocolVersion="2025-06-18")


@pytest.mark.parametrize(
    ("known", "answers", "expected", "session"),
    [
        pytest.param(None, [DISCOVERED, LISTED], ["server/discover", "tools/list"], Session(codec.MODERN), id="modern"),
        pytest.param(codec.MODERN, [LISTED], ["tools/list"], Session(codec.MODERN), id="known to be modern"),
        pytest.param(
            None,
            [Answer(404, codec.Failure(None, -32601, "?")), SHAKEN, Answer(202, None), LISTED],
            ["server/discover", "initialize", "notifications/initialized", "tools/list"],
            Session("2025-06-18", "s1"),
            id="handshake",
        ),
        pytest.param(
            "2025-11-25",
            [SHAKEN, Answer(202, None), ok(tools=[], nextCursor="2"), LISTED],
            ["initialize", "notifications/initialized", "tools/list", "tools/list"],
            Session("2025-06-18", "s1"),
            id="known to want a handshake; two pages",
        ),
    ],
)
def test_a_session_opens(known: str | None, answers: list[Answer], expected: list[str], session: Session) -> None:
    posts, found = opened(known, answers)
    assert methods(posts) == expected
    assert found.session == session
    assert [(tool.name, tool.read_only) for tool in found.tools] == [("a", True)]
    for each in posts[1:] if known is None else posts:
        told = json.loads(each.body).get("params", {}).get("_meta", {})
        assert (codec.VERSION_META in told) == session.modern
    if not session.modern:
        assert {each.headers.get("Mcp-Session-Id") for each in posts[-2:]} == {"s1"}


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (
            Answer(503, codec.Failure(None, -32603, "Too many open sessions")),
            ToolTransportError,
            "HTTP 503: Too many open",
        ),
        (Answer(502, None, said="bad gateway"), ToolTransportError, "HTTP 502: bad gateway"),
        (Answer(200, codec.Failure(1, -32602, "no such tool")), ToolProtocolError, "no such tool (-32602)"),
        (Answer(400, codec.Failure(1, -32602, "bad params")), ToolProtocolError, "bad params (-32602)"),
        (Answer(202, None), ToolProtocolError, "HTTP 202 without a reply"),
        (ok(resultType="input_required"), ToolProtocolError, "asks for input"),
    ],
)
def test_whose_fault_a_refusal_is(answer: Answer, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as refused:
        checked(answer, "here")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("session", "answer", "refused"),
    [
        (Session("2025-11-25", "s"), Answer(404, codec.Failure(None, -32600, "Session not found")), True),
        (Session("2025-11-25", "s"), Answer(400, None, said="No valid session"), True),
        (Session("2025-11-25", "s"), Answer(400, codec.Failure(1, -32602, "bad params")), False),
        (Session("2025-11-25"), Answer(404, None), False),
        (Session(codec.MODERN), Answer(404, None), False),
    ],
)
def test_a_session_that_is_not_known_is_told_from_a_refusal(session: Session, answer: Answer, refused: bool) -> None:
    assert session_refused(session, answer) is refused


@pytest.mark.parametrize("session", [Session(codec.MODERN), Session("2025-11-25", "s")])
def test_a_call_carries_its_trace_in_headers_and_in_meta(session: Session) -> None:
    trace = {"traceparent": "00-1-2-01", "baggage": "a=b", "X-Request-Id": "r"}
    made = call_post(session, 5, RemoteTool("früh", "", {}, False), {"x": 1}, {"fanmark/seed": "s"}, trace)
    meta = json.loads(made.body)["params"]["_meta"]
    assert {name: meta[name] for name in ("traceparent", "baggage", "fanmark/seed", "progressToken")} == {
        "traceparent": "00-1-2-01", "baggage": "a=b", "fanmark/seed": "s", "progressToken": 5,
    }  # fmt: skip
    assert trace.items() <= made.headers.items()
    assert made.headers.get("Mcp-Name") == ("=?base64?ZnLDvGg=?=" if session.modern else None)
