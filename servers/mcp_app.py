"""An MCP server over streamable HTTP, both eras of the protocol, on aiohttp's low-level server: which request asks for what, and how the
answer goes back. What the tools do is the business of `Tools`.

Rules of the file:
1. The handshake era has sessions, at most `max_sessions`, those that are idle make room; one that was ended or never opened is 404.
2. An answer is one JSON body; it becomes a stream of events when a tool tells of its progress and the client asked for that.
3. A client that gives a call up ends it: in the handshake era by notifications/cancelled, in the modern one by going away.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from fanmark.servers import mcp_codec as codec

INFO = {"name": "fanmark-tools", "version": "0.1"}
_CAPABILITIES: Mapping[str, Any] = {"tools": {"listChanged": False}}
_STATUS = dict.fromkeys(
    (
        codec.PARSE_ERROR,
        codec.INVALID_REQUEST,
        codec.INVALID_PARAMS,
        codec.HEADER_MISMATCH,
        codec.UNSUPPORTED_VERSION,
    ),
    400,
) | {codec.METHOD_NOT_FOUND: 404}

_OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
IDLE_S = 1_800.0  # a session that is not used for so long makes room for a new one

Progress = Callable[[float, float | None, str], Awaitable[None]]


class Refused(Exception):
    """A call that is turned away by an HTTP status: the server is busy, or a fault strikes."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class Dropped(Exception):
    """A call whose connection is to be reset."""


class Broken(Exception):
    """A call whose answer is to be no JSON."""


class Tools(Protocol):
    """What the server offers."""

    @property
    def listing(self) -> Sequence[Mapping[str, Any]]:
        """The tools, as `tools/list` shows them."""

    async def call(
        self, name: str, arguments: Mapping[str, Any], meta: Mapping[str, Any], progress: Progress
    ) -> Mapping[str, Any]:
        """A tool's result. Raises ProtocolError for a JSON-RPC error, Refused, Dropped, Broken."""

    def metrics(self, sessions: int) -> str:
        """All that is counted, as Prometheus reads it."""


@dataclass(eq=False, slots=True)
class _Session:
    """One client's session, with what it has in flight."""

    version: str
    used_at: float
    calls: dict[codec.Id, asyncio.Task[Any]] = field(default_factory=dict)


class McpApp:
    """Answers requests to /mcp and /metrics."""

    def __init__(self, tools: Tools, max_sessions: int) -> None:
        self._tools = tools
        self._max_sessions = max_sessions
        self._sessions: dict[str, _Session] = {}

    def __repr__(self) -> str:
        return f"<McpApp {len(self._sessions)} sessions>"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one entrance."""
        if request.path == "/metrics" and request.method == "GET":
            return web.Response(text=self._tools.metrics(len(self._sessions)))
        if urlsplit(request.headers.get("Origin", "http://localhost")).hostname not in _OWN_HOSTS:
            return web.Response(status=403, text="a page of another origin may not call tools")
        if request.path != "/mcp":
            return web.Response(status=404, text="there is /mcp and /metrics")
        if request.method == "POST":
            return await self._post(request)
        if request.method == "DELETE":
            session = self._sessions.pop(request.headers.get(codec.SESSION_HEADER, ""), None)
            for call in session.calls.values() if session is not None else ():
                call.cancel()
            return web.Response(status=404 if session is None else 200)
        return web.Response(status=405, headers={"Allow": "POST, DELETE"})

    async def _post(self, request: web.BaseRequest) -> web.StreamResponse:
        version = request.headers.get(codec.VERSION_HEADER)
        modern = version is not None and version not in codec.HANDSHAKES
        id: codec.Id | None = None
        try:
            message = codec.decode(await request.read())
            id = message.id if isinstance(message, codec.Request) else None
            if modern:
                return await self._modern(request, message, version or "")
            return await self._handshake(request, message)
        except codec.ProtocolError as e:
            data = {"supported": [codec.MODERN], "requested": version} if e.code == codec.UNSUPPORTED_VERSION else None
            status = _STATUS.get(e.code, 200) if modern or id is None else 200
            return _json(codec.Failure(id, e.code, str(e), data), status)
        except Refused as e:
            more = {} if e.retry_after_s is None else {"Retry-After": f"{e.retry_after_s:g}"}
            return web.Response(status=e.status, text=str(e), headers=more)
        except Broken:
            return web.Response(body=b'{"jsonrpc": "2.0", "result": {', content_type=codec.JSON_TYPE)
        except Dropped:
            if request.transport is not None:
                request.transport.abort()
            raise asyncio.CancelledError from None

    async def _modern(self, request: web.BaseRequest, message: codec.Message, version: str) -> web.StreamResponse:
        if isinstance(message, codec.Notification):
            return web.Response(status=202)
        if not isinstance(message, codec.Request):
            raise codec.ProtocolError(codec.INVALID_REQUEST, "a reply, where a request is wanted")
        _check_envelope(request.headers, message, version)
        if message.method == "server/discover":
            found: Mapping[str, Any] = {"supportedVersions": [codec.MODERN], "capabilities": _CAPABILITIES}
            return _json(codec.Result(message.id, _complete(found, cached=True)))
        if message.method == "tools/list":
            return _json(codec.Result(message.id, _complete({"tools": self._tools.listing}, cached=True)))
        return await self._call(request, message, lambda result: _complete(result), {})

    async def _handshake(self, request: web.BaseRequest, message: codec.Message) -> web.StreamResponse:
        if isinstance(message, codec.Request) and message.method == "initialize":
            return self._initialize(message)
        name = request.headers.get(codec.SESSION_HEADER)
        session = self._sessions.get(name or "")
        if session is None and name is None:
            return _json(codec.Failure(None, codec.INVALID_REQUEST, "Bad Request: Missing session ID"), 400)
        if session is None:
            return unknown_session()
        if not isinstance(message, codec.Request):
            if isinstance(message, codec.Notification) and message.method == "notifications/cancelled":
                call = session.calls.get(message.params.get("requestId", ""))
                if call is not None:
                    call.cancel()
            return web.Response(status=202)
        session.used_at = asyncio.get_running_loop().time()
        headers = {codec.SESSION_HEADER: name or ""}
        if message.method == "ping":
            return _json(codec.Result(message.id, {}), headers=headers)
        if message.method == "tools/list":
            return _json(codec.Result(message.id, {"tools": self._tools.listing}), headers=headers)
        call = asyncio.ensure_future(self._call(request, message, lambda result: result, headers))
        session.calls[message.id] = call
        call.add_done_callback(lambda _: session.calls.pop(message.id, None))
        return await asyncio.shield(call)  # a client that goes away has not given the call up

    def _initialize(self, message: codec.Request) -> web.StreamResponse:
        now = asyncio.get_running_loop().time()
        if len(self._sessions) >= self._max_sessions:
            for idle in [n for n, s in self._sessions.items() if not s.calls and now - s.used_at >= IDLE_S]:
                del self._sessions[idle]
        if len(self._sessions) >= self._max_sessions:
            return _json(codec.Failure(None, codec.INTERNAL_ERROR, "Too many open sessions"), 503)
        asked = message.params.get("protocolVersion")
        version = asked if asked in codec.HANDSHAKES else codec.LATEST_HANDSHAKE
        name = secrets.token_hex(16)
        self._sessions[name] = _Session(version, now)
        result = {"protocolVersion": version, "capabilities": _CAPABILITIES, "serverInfo": INFO}
        return _json(codec.Result(message.id, result), headers={codec.SESSION_HEADER: name})

    async def _call(
        self,
        request: web.BaseRequest,
        message: codec.Request,
        finish: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        headers: Mapping[str, str],
    ) -> web.StreamResponse:
        """`tools/call`; any other method is not known."""
        if message.method != "tools/call":
            raise codec.ProtocolError(codec.METHOD_NOT_FOUND, f"Method not found: {message.method}")
        name, arguments, meta = (message.params.get(key) for key in ("name", "arguments", "_meta"))
        arguments, meta = arguments if arguments is not None else {}, meta if meta is not None else {}
        if not isinstance(name, str) or not isinstance(arguments, dict) or not isinstance(meta, dict):
            raise codec.ProtocolError(codec.INVALID_PARAMS, "tools/call wants a name and arguments")
        stream: web.StreamResponse | None = None
        token = meta.get("progressToken")

        async def progress(done: float, total: float | None, text: str) -> None:
            nonlocal stream
            if token is None:
                return
            if stream is None:
                stream = web.StreamResponse(headers={**headers, "Content-Type": codec.STREAM_TYPE})
                await stream.prepare(request)
            told = {"progressToken": token, "progress": done, "message": text}
            told |= {} if total is None else {"total": total}
            await stream.write(codec.event_bytes(codec.Notification("notifications/progress", told)))

        reply: codec.Message
        try:
            reply = codec.Result(message.id, finish(await self._tools.call(name, arguments, meta, progress)))
        except codec.ProtocolError as e:
            if stream is None:
                raise
            reply = codec.Failure(message.id, e.code, str(e))
        if stream is None:
            return _json(reply, headers=headers)
        await stream.write(codec.event_bytes(reply))
        await stream.write_eof()
        return stream


def _json(message: codec.Message, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=codec.encode(message), status=status, content_type=codec.JSON_TYPE, headers=headers)


def unknown_session() -> web.Response:
    """The reply that makes a client open a new session."""
    return _json(codec.Failure(None, codec.INVALID_REQUEST, "Session not found"), 404)


def _complete(result: Mapping[str, Any], *, cached: bool = False) -> dict[str, Any]:
    """A result as the modern era has it."""
    more = {"ttlMs": 0, "cacheScope": "private"} if cached else {}
    return {**result, **more, "resultType": "complete", "_meta": {**result.get("_meta", {}), codec.SERVER_META: INFO}}


def _check_envelope(headers: Mapping[str, str], message: codec.Request, version: str) -> None:
    """What every request of the modern era must say, and say alike in headers and body. Raises ProtocolError."""
    meta = message.params.get("_meta")
    missing = [
        key for key in (codec.VERSION_META, codec.CAPABILITIES_META) if not isinstance(meta, dict) or key not in meta
    ]
    if missing or not isinstance(meta, dict):
        raise codec.ProtocolError(codec.INVALID_PARAMS, f"params._meta lacks {', '.join(missing)}")
    if meta[codec.VERSION_META] != version:
        raise codec.ProtocolError(codec.HEADER_MISMATCH, f"{codec.VERSION_HEADER} differs from params._meta")
    if headers.get(codec.METHOD_HEADER) != message.method:
        raise codec.ProtocolError(codec.HEADER_MISMATCH, f"{codec.METHOD_HEADER} differs from the method")
    name = message.params.get("name")
    if message.method == "tools/call" and codec.header_text(headers.get(codec.NAME_HEADER, "")) != name:
        raise codec.ProtocolError(codec.HEADER_MISMATCH, f"{codec.NAME_HEADER} differs from params.name")
    if version != codec.MODERN:
        raise codec.ProtocolError(codec.UNSUPPORTED_VERSION, "Unsupported protocol version")
