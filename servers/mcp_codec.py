"""JSON-RPC and MCP on the wire, sans I/O, for a client and for a server: messages as bytes, replies in pieces, both eras of the protocol.

Rules of the file:
1. Handshake era (2025-11-25 and before): `initialize` opens a session, which a header names from then on. 2026-07-28: no session; every
   request says version, client and capabilities in `params._meta`, and its method and name in headers.
2. A reply is one JSON body, or a stream of events of which the last is the reply. Both may come in any pieces.
3. What is not JSON-RPC, or not MCP, raises ProtocolError. Nothing here waits, sends or knows the time.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

MODERN = "2026-07-28"
HANDSHAKES = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
LATEST_HANDSHAKE = HANDSHAKES[-1]

VERSION_META = "io.modelcontextprotocol/protocolVersion"
CLIENT_META = "io.modelcontextprotocol/clientInfo"
CAPABILITIES_META = "io.modelcontextprotocol/clientCapabilities"
SERVER_META = "io.modelcontextprotocol/serverInfo"

SESSION_HEADER, VERSION_HEADER = "Mcp-Session-Id", "Mcp-Protocol-Version"
METHOD_HEADER, NAME_HEADER, PARAM_PREFIX = "Mcp-Method", "Mcp-Name", "Mcp-Param-"
JSON_TYPE, STREAM_TYPE = "application/json", "text/event-stream"

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
HEADER_MISMATCH, UNSUPPORTED_VERSION = -32020, -32022

MAX_EVENT_BYTES = 64_000_000
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_WRAPPED = re.compile(r"=\?base64\?(.*)\?=")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PLAIN = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")

Id = int | str


class ProtocolError(Exception):
    """What came is not JSON-RPC or not MCP; `code` is JSON-RPC's for it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Request:
    """What wants an answer."""

    id: Id
    method: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Notification:
    """What wants none."""

    method: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to the request with this id."""

    id: Id
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A JSON-RPC error. `id` None: the request could not be told."""

    id: Id | None
    code: int
    message: str
    data: Any = None


Message = Request | Notification | Result | Failure


class _Error(msgspec.Struct):
    code: int
    message: str = ""
    data: Any = None


class _Wire(msgspec.Struct):
    jsonrpc: str
    id: int | str | msgspec.UnsetType | None = msgspec.UNSET
    method: str | msgspec.UnsetType = msgspec.UNSET
    params: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    result: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    error: _Error | msgspec.UnsetType = msgspec.UNSET


_decoder = msgspec.json.Decoder(_Wire)
_encode = msgspec.json.encode


def encode(message: Message) -> bytes:
    """One message as JSON."""
    match message:
        case Request(id, method, params):
            return _encode({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
        case Notification(method, params):
            return _encode({"jsonrpc": "2.0", "method": method, "params": params})
        case Result(id, result):
            return _encode({"jsonrpc": "2.0", "id": id, "result": result})
        case Failure(id, code, text, data):
            error = {"code": code, "message": text} | ({} if data is None else {"data": data})
            return _encode({"jsonrpc": "2.0", "id": id, "error": error})


def decode(data: bytes | bytearray) -> Message:
    """The one message that `data` is. Raises ProtocolError."""
    try:
        wire = _decoder.decode(data)
    except msgspec.ValidationError as e:
        raise ProtocolError(INVALID_REQUEST, f"no JSON-RPC message: {e}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProtocolError(PARSE_ERROR, f"no JSON: {e}") from None
    if wire.jsonrpc != "2.0":
        raise ProtocolError(INVALID_REQUEST, f"jsonrpc = {wire.jsonrpc!r}: it must be 2.0")
    if wire.method is not msgspec.UNSET:
        params = {} if wire.params is msgspec.UNSET or wire.params is None else wire.params
        if wire.id is msgspec.UNSET:
            return Notification(wire.method, params)
        if wire.id is None:
            raise ProtocolError(INVALID_REQUEST, "a request needs an id that is a number or a string")
        return Request(wire.id, wire.method, params)
    known = None if wire.id is msgspec.UNSET else wire.id
    if wire.error is not msgspec.UNSET:
        return Failure(known, wire.error.code, wire.error.message, wire.error.data)
    if wire.result is not msgspec.UNSET and known is not None:
        return Result(known, wire.result)
    raise ProtocolError(INVALID_REQUEST, "neither a request, nor a notification, nor a reply")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream. `id` and `retry_ms` None: it had none; `data` may be empty."""

    data: bytes
    id: str | None = None
    retry_ms: int | None = None


def event_bytes(message: Message) -> bytes:
    """One message as an event of a stream."""
    return b"event: message\ndata: " + encode(message) + b"\n\n"


class EventReader:
    """A stream of events, bytes in, whole events out. Lines end with LF, CRLF or CR; what follows the last empty line is no event."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        """The events that are whole with `data`. Raises ProtocolError for one that grows too large."""
        body, start, found = self._rest + data, 0, []
        # a CR at the end may be half of a CRLF: the next piece tells
        for match in _EVENT_END.finditer(body, max(0, len(self._rest) - 3), len(body) - body.endswith(b"\r")):
            if match.start() >= start:
                if (event := _event(body[start : match.start()])) is not None:
                    found.append(event)
                start = match.end()
        self._rest = body[start:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ProtocolError(PARSE_ERROR, f"an event of more than {MAX_EVENT_BYTES:,} bytes")
        return found


def _event(block: bytes) -> Event | None:
    """None where it holds comments only."""
    data, known, id, retry_ms = [], False, None, None
    for line in re.split(rb"\r\n|\n|\r", block.removeprefix(b"\xef\xbb\xbf")):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"id" and b"\0" not in value:
            id = value.decode(errors="replace")
        elif name == b"retry" and value.isdigit():
            retry_ms = int(value)
        known = known or name in (b"data", b"id", b"retry", b"event")
    return Event(b"\n".join(data), id, retry_ms) if known else None


class ReplyReader:
    """The body of one reply, as its content type says. Gives each message as it is whole; `last_event` is where to go on from if the
    stream breaks, `retry_ms` how long the server wants that to wait."""

    def __init__(self, content_type: str) -> None:
        kind = content_type.partition(";")[0].strip().lower()
        if kind not in (JSON_TYPE, STREAM_TYPE):
            raise ProtocolError(
                INVALID_REQUEST, f"the reply is {content_type or 'of no type'}: neither JSON nor events"
            )
        self.last_event: str | None = None
        self.retry_ms: int | None = None
        self._events = EventReader() if kind == STREAM_TYPE else None
        self._body = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are whole with `data`. Raises ProtocolError."""
        if self._events is None:
            self._body += data
            return []
        found = []
        for event in self._events.feed(data):
            self.last_event = event.id if event.id is not None else self.last_event
            self.retry_ms = event.retry_ms if event.retry_ms is not None else self.retry_ms
            if event.data:
                found.append(decode(event.data))
        return found

    def end(self) -> list[Message]:
        """The body ended: the message it was, if it was no stream. Raises ProtocolError."""
        return [decode(self._body)] if self._events is None else []


def header_value(text: str) -> str:
    """Text as a header may carry it: as it is, or in base64 with a mark around it."""
    if _PLAIN.fullmatch(text) and not _WRAPPED.fullmatch(text):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


def header_text(value: str) -> str | None:
    """What a header says; None where its mark is there and its base64 is not."""
    wrapped = _WRAPPED.fullmatch(value)
    if wrapped is None:
        return value
    try:
        return base64.b64decode(wrapped[1], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def param_headers(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """The headers in which a 2026-07-28 client repeats the arguments that a tool's schema marks by x-mcp-header."""
    found: dict[str, str] = {}
    properties = schema.get("properties")
    for name, part in properties.items() if isinstance(properties, Mapping) else ():
        value = arguments.get(name)
        if not isinstance(part, Mapping) or value is None:
            continue
        header = part.get("x-mcp-header")
        if isinstance(header, str) and _TOKEN.fullmatch(header) and isinstance(value, bool | int | str):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            found[PARAM_PREFIX + header] = header_value(text)
        elif isinstance(value, Mapping):
            found |= param_headers(part, value)
    return found
