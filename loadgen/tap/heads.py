"""Sans-I/O reading and rewriting of HTTP/1.1 heads for the pass-through: what of a head is of one hop alone stays behind, all else goes on
as it was written (RFC 9110, 7.6.1)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lanes.http1 import MAX_HEAD_BYTES, BadResponse, Response

HEAD_END = re.compile(rb"\r?\n\r?\n")
_REQUEST = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[^ \x00-\x1f\x7f]*|\*) HTTP/1\.([01])")
_ONE_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"upgrade",
    )
)

Header = tuple[bytes, bytes]  # name as written, and value


class BadRequest(Exception):
    """The client's bytes are no request that can be passed on."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where requests go on to. `path` is what stands in place of the tap's own `at` ("/v1", or an MCP server's path); `root` before all
    other paths of a target, None where it takes no others."""

    name: str
    tls: bool
    host: str
    port: int
    at: str
    path: str
    root: str | None

    @property
    def authority(self) -> bytes:
        """The Host header."""
        usual = self.port == (443 if self.tls else 80)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (host if usual else f"{host}:{self.port}").encode("ascii")

    def goes_to(self, path: str) -> str | None:
        """The path there of a path here; None where it is not this one's."""
        bare = path.partition("?")[0]
        if bare == self.at or bare.startswith(f"{self.at}/"):
            return self.path + path[len(self.at) :] or "/"
        return None if self.root is None else self.root + path


def upstream(name: str, url: str, at: str, *, target: bool, flag: str) -> Upstream:
    """From a URL as the user gave it. Raises ScenarioError."""
    try:
        parts = urlsplit(url.rstrip("/"))
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ScenarioError(
            f"{flag} {url}: must be http://HOST:PORT/PATH or https://..., without a query or a password"
        )
    tls = parts.scheme == "https"
    root = parts.path.removesuffix("/v1") if target else None
    return Upstream(name, tls, parts.hostname, port or (443 if tls else 80), at, parts.path, root)


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The head of a request. `keep_alive`: whether the client's connection goes on after it; `waits`: whether the client sends no body
    before it is told to."""

    method: str
    path: str
    headers: list[Header]
    version: int
    keep_alive: bool
    waits: bool

    def values(self) -> dict[str, str]:
        """The headers by name in lower case, those of one name joined."""
        found: dict[str, str] = {}
        for name, value in self.headers:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            found[key] = f"{found[key]}, {text}" if key in found else text
        return found


def _headers(lines: Iterable[bytes]) -> list[Header]:
    found = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            raise BadRequest(f"a malformed header: {line[:40]!r}")
        found.append((name, value.strip()))
    return found


def request_head(raw: bytes) -> RequestHead:
    """Raises BadRequest."""
    first, *lines = (line.removesuffix(b"\r") for line in raw.split(b"\n"))
    match = _REQUEST.fullmatch(first)
    if match is None:
        raise BadRequest("no HTTP/1.1 request")
    headers = _headers(lines)
    told = {option for name, value in headers if name.lower() == b"connection" for option in _options(value)}
    version = int(match[3])
    waits = any(name.lower() == b"expect" and value.lower() == b"100-continue" for name, value in headers)
    keep_alive = b"close" not in told and (version == 1 or b"keep-alive" in told)
    return RequestHead(match[1].decode(), match[2].decode(), headers, version, keep_alive, waits)


def _options(value: bytes) -> list[bytes]:
    return [option.strip().lower() for option in value.split(b",")]


def body_of(head: RequestHead) -> Response:
    """What reads the request's body: it is framed as a response's is, so a head of ours with the same framing goes ahead. Raises
    BadRequest."""
    framing = [
        name.lower() + b": " + value
        for name, value in head.headers
        if name.lower() in (b"content-length", b"transfer-encoding")
    ]
    reader = Response()
    try:
        reader.feed(b"\r\n".join([b"HTTP/1.1 200 OK", *(framing or [b"content-length: 0"]), b"", b""]))
    except BadResponse as e:
        raise BadRequest(str(e)) from None
    return reader


def passed_on(head: RequestHead, path: str, host: bytes, length: int | None, *, plain_reply: bool) -> bytes:
    """The head as it goes upstream. `length`: of a body that is sent whole; None: the body goes on as it is framed. `plain_reply`: no reply
    is to be compressed, for it is read on its way."""
    skipped = _ONE_HOP | {o for name, value in head.headers if name.lower() == b"connection" for o in _options(value)}
    skipped |= {b"host", b"expect"} | ({b"accept-encoding"} if plain_reply else set())
    names = {name.lower() for name, _ in head.headers}
    if length is not None:
        skipped |= {b"content-length", b"transfer-encoding"}
    elif b"transfer-encoding" in names:
        skipped |= {b"content-length"}
    lines = [f"{head.method} {path} HTTP/1.1".encode("latin-1"), b"Host: " + host]
    lines += [name + b": " + value for name, value in head.headers if name.lower() not in skipped]
    lines += [b"Accept-Encoding: identity"] if plain_reply else []
    lines += [b"Content-Length: %d" % length] if length is not None else []
    return b"\r\n".join([*lines, b"", b""])


def returned(raw: bytes, *, close: bool, reframed: bool | None) -> bytes:
    """The head of a reply as it goes to the client. `close`: its connection ends after it. `reframed`: the body is framed anew, in chunks
    or (False) by the connection's end; None: it goes on as it is framed. Raises BadRequest."""
    first, *lines = (line.removesuffix(b"\r") for line in raw.split(b"\n"))
    headers = _headers(lines)
    skipped = _ONE_HOP | {
        option for name, value in headers if name.lower() == b"connection" for option in _options(value)
    }
    if reframed is not None:
        skipped |= {b"content-length", b"transfer-encoding"}
    kept = [name + b": " + value for name, value in headers if name.lower() not in skipped]
    kept += [b"Transfer-Encoding: chunked"] if reframed else []
    kept += [b"Connection: close"] if close else []
    return b"\r\n".join([first, *kept, b"", b""])


def split_head(data: bytes) -> tuple[bytes, bytes] | None:
    """A head and what follows it; None before it is whole. Raises BadRequest where it is too long."""
    match = HEAD_END.search(data)
    if match is None:
        if len(data) > MAX_HEAD_BYTES:
            raise BadRequest(f"a head of more than {MAX_HEAD_BYTES} bytes")
        return None
    return data[: match.start()], data[match.end() :]
