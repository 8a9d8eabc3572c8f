"""An MCP client's side of streamable HTTP, sans I/O: how a session opens, what a call's request says, what a reply means.

A generator yields what to POST and is sent what came back; it decides, somebody else sends.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fanmark.loadgen.lanes.mcp_model import (
    MAX_PAGES,
    RemoteTool,
    ToolProtocolError,
    ToolRefusedError,
    ToolResult,
    ToolTransportError,
)
from fanmark.servers import mcp_codec as codec
from fanmark.servers.tool_specs import QUEUED_META

CLIENT = {"name": "fanmark", "version": "0.1"}


@dataclass(frozen=True, slots=True)
class Session:
    """How requests are addressed once a session is open. `id` None: the server keeps none."""

    version: str
    id: str | None = None

    @property
    def modern(self) -> bool:
        return self.version == codec.MODERN


@dataclass(frozen=True, slots=True)
class Post:
    """One POST. `id` None: a notification, which has no reply."""

    headers: Mapping[str, str]
    body: bytes
    id: codec.Id | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `reply` None: no JSON-RPC message that answers the request; `said` is then the body's beginning."""

    status: int
    reply: codec.Result | codec.Failure | None
    session_id: str | None = None
    said: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """An open session, and what it listed."""

    session: Session
    tools: Sequence[RemoteTool]


def post(
    session: Session | None,
    id: codec.Id | None,
    method: str,
    params: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
) -> Post:
    """A request, or with `id` None a notification. `session` None: the handshake itself."""
    headers = {"Content-Type": codec.JSON_TYPE, "Accept": f"{codec.JSON_TYPE}, {codec.STREAM_TYPE}"}
    told = dict(meta or {})
    if session is not None:
        headers[codec.VERSION_HEADER] = session.version
        if session.id is not None:
            headers[codec.SESSION_HEADER] = session.id
        if session.modern:
            headers[codec.METHOD_HEADER] = method
            if "name" in params:
                headers[codec.NAME_HEADER] = codec.header_value(str(params["name"]))
            told |= {codec.VERSION_META: session.version, codec.CLIENT_META: CLIENT, codec.CAPABILITIES_META: {}}
    if told:
        params = {**params, "_meta": told}
    message = codec.Notification(method, params) if id is None else codec.Request(id, method, params)
    return Post(headers, codec.encode(message), id)


def opening(known: str | None, where: str) -> Generator[Post, Answer, Opened]:
    """Opens a session and lists the tools. `known`: the version that the server spoke before, which saves asking. Raises
    ToolTransportError, ToolProtocolError."""
    version = known or (yield from _discover())
    session = Session(version)
    if not session.modern:
        session = yield from _handshake(where)
    tools: list[RemoteTool] = []
    params: dict[str, Any] = {}
    for page in range(MAX_PAGES):
        result = checked((yield post(session, f"list-{page}", "tools/list", params)), where)
        listed = result.get("tools")
        if not isinstance(listed, list):
            raise ToolProtocolError(f"{where}: tools/list gave no list")
        tools += [_tool(each, where) for each in listed]
        cursor = result.get("nextCursor")
        if not isinstance(cursor, str):
            break
        params = {"cursor": cursor}
    return Opened(session, tools)


def _discover() -> Generator[Post, Answer, str]:
    """The era that the server speaks: only one that says so speaks the modern one."""
    answer = yield post(Session(codec.MODERN), "discover", "server/discover", {})
    if isinstance(answer.reply, codec.Result):
        supported = answer.reply.result.get("supportedVersions")
        if isinstance(supported, list) and codec.MODERN in supported:
            return codec.MODERN
    return codec.LATEST_HANDSHAKE


def _handshake(where: str) -> Generator[Post, Answer, Session]:
    params = {"protocolVersion": codec.LATEST_HANDSHAKE, "capabilities": {}, "clientInfo": CLIENT}
    answer = yield post(None, "initialize", "initialize", params)
    version = checked(answer, where).get("protocolVersion")
    if version not in codec.HANDSHAKES:
        raise ToolProtocolError(f"{where}: speaks {version!r}, which is none of {', '.join(codec.HANDSHAKES)}")
    session = Session(version, answer.session_id)
    yield post(session, None, "notifications/initialized", {})
    return session


def checked(answer: Answer, where: str) -> Mapping[str, Any]:
    """The result that came back. A refusal by status alone is the transport's, an error that answers the request the protocol's."""
    reply = answer.reply
    if answer.status in (401, 403):
        said = reply.message if isinstance(reply, codec.Failure) else answer.said
        raise ToolRefusedError(f"{where}: HTTP {answer.status}{': ' if said else ''}{said}")
    if isinstance(reply, codec.Result):
        if reply.result.get("resultType", "complete") != "complete":
            raise ToolProtocolError(f"{where}: asks for input ({reply.result['resultType']}), which nobody can give")
        return reply.result
    if isinstance(reply, codec.Failure):
        text = f"{where}: {reply.message} ({reply.code})"
        if reply.id is None and answer.status >= 400:  # turned away before the request was read
            raise ToolTransportError(f"{where}: HTTP {answer.status}: {reply.message}")
        raise ToolProtocolError(text)
    if answer.status >= 300:
        raise ToolTransportError(f"{where}: HTTP {answer.status}{': ' if answer.said else ''}{answer.said}")
    raise ToolProtocolError(f"{where}: HTTP {answer.status} without a reply: {answer.said or 'an empty body'}")


def session_refused(session: Session, answer: Answer) -> bool:
    """Whether the server does not know this session, so that it has not run the request: 404 as the protocol wants, or 400."""
    unread = answer.reply is None or answer.reply.id is None
    return session.id is not None and answer.status in (400, 404) and unread


def call_post(
    session: Session,
    id: codec.Id,
    tool: RemoteTool,
    arguments: Mapping[str, Any],
    meta: Mapping[str, Any],
    trace: Mapping[str, str],
) -> Post:
    """`tools/call`, with the trace in headers and in `_meta`, where the protocol has it."""
    told = {**meta, **trace_meta(trace), "progressToken": id}
    made = post(session, id, "tools/call", {"name": tool.name, "arguments": arguments}, told)
    more = codec.param_headers(tool.input_schema, arguments) if session.modern else {}
    return Post({**made.headers, **trace, **more}, made.body, id)


def trace_meta(trace: Mapping[str, str]) -> dict[str, str]:
    """What of a trace's headers the protocol has in `_meta`."""
    return {name: value for name, value in trace.items() if name in ("traceparent", "tracestate", "baggage")}


def result_of(result: Mapping[str, Any], where: str) -> ToolResult:
    """A tool's result. Raises ToolProtocolError for what is none."""
    content, structured, meta = result.get("content", []), result.get("structuredContent"), result.get("_meta")
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ToolProtocolError(f"{where}: a result whose content is no list of blocks")
    text = text_of(content, structured)
    queued_s = meta.get(QUEUED_META) if isinstance(meta, dict) else None
    known = isinstance(queued_s, int | float) and queued_s >= 0
    return ToolResult(text, result.get("isError") is True, len(text.encode()), queued_s if known else None)


def text_of(content: Sequence[Mapping[str, Any]], structured: Any) -> str:
    """The text of a result's content blocks; a result of structured content alone is its JSON."""
    if not content and structured is not None:
        return msgspec.json.encode(structured).decode()
    return "\n".join(
        str(block["text"]) if block.get("type") == "text" and "text" in block else msgspec.json.encode(block).decode()
        for block in content
    )


def _tool(listed: Any, where: str) -> RemoteTool:
    if not isinstance(listed, dict) or not isinstance(listed.get("name"), str):
        raise ToolProtocolError(f"{where}: tools/list gave a tool without a name")
    schema, annotations = listed.get("inputSchema"), listed.get("annotations")
    read_only = isinstance(annotations, dict) and annotations.get("readOnlyHint") is True
    description = listed.get("description")
    return RemoteTool(
        listed["name"],
        description if isinstance(description, str) else "",
        schema if isinstance(schema, dict) else {},
        read_only,
    )
