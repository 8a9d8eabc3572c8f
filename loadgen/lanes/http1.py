"""Sans-I/O framing of HTTP/1.1 for the fast lane: a request's bytes; and one response, bytes in as they came, the body's bytes out, told
where it ends.

Rules of the file (RFC 9112):
1. Interim responses (1xx) are passed over. Bytes after the end are none of this response's: `extra` says that there are some.
2. A body is chunked, of a given length, or all until the connection ends; Transfer-Encoding wins over Content-Length. Trailers are dropped.
3. What is not HTTP raises BadResponse. A connection that ends too early does so as well, from `end`.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 65_536
MAX_SIZE_LINE_BYTES = 1_024

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: [^\r\n]*)?")
_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?")

_HEAD, _SIZE_LINE, _DATA, _DATA_END, _TRAILER, _LENGTH, _TO_THE_END, _WHOLE = range(8)


class BadResponse(Exception):
    """The peer's bytes are not a response, or not a whole one."""


Address = tuple[str, int]


def request_head(method: str, url: str) -> tuple[Address, bytes]:
    """Where requests for a URL go, and the first lines of their heads. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError("the fast lane carries http://HOST only")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    lines = (f"{method} {path} HTTP/1.1", f"Host: {host}", "Accept: */*", "Accept-Encoding: identity", "")
    return (parts.hostname, parts.port or 80), "\r\n".join(lines).encode("ascii")


def request(head: bytes, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """The whole request, from its first lines. Raises ValueError."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers) or "\0" in lines:
        raise ValueError("a header with an end of line in it")
    size = b"" if body is None else b"Content-Length: %d\r\n" % len(body)
    return b"".join((head, lines.encode("latin-1"), size, b"\r\n", body or b""))


@lru_cache(4096)
def chunk_size(line: bytes) -> int:
    """Bytes of the chunk that a size line announces."""
    match = _SIZE.fullmatch(line)
    if match is None:
        raise BadResponse(f"a chunk's size is {line[:40]!r}")
    return int(match[1], 16)


class Response:
    """One response while it arrives. `status` is 0, and `headers` (names in lower case) are empty, before the head is there."""

    __slots__ = ("_left", "_rest", "_state", "extra", "headers", "keep_alive", "status", "whole")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.keep_alive = False
        self.whole = False
        self.extra = False
        self._state = _HEAD
        self._rest = b""  # of a head, a size line or a trailer that is not whole yet
        self._left = 0  # bytes of a body or a chunk that are still to come

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in `data`. Raises BadResponse."""
        state = self._state
        if state == _HEAD:
            data = self._take_head(data)
            state = self._state
        if _SIZE_LINE <= state <= _TRAILER:
            return self._chunks(data)
        if state == _LENGTH:
            body = data[: self._left]
            self._left -= len(body)
            if not self._left:
                self._end(len(data) > len(body))
            return body
        if state == _WHOLE:
            self.extra = self.extra or bool(data)
            return b""
        return data if state == _TO_THE_END else b""

    def end(self) -> None:
        """The connection ended. Raises BadResponse unless that is where the response ends."""
        self.keep_alive = False
        if self._state == _TO_THE_END:
            self._end(False)
        if self._state != _WHOLE:
            where = "before the response" if self._state == _HEAD and not self._rest else "amid the response"
            raise BadResponse(f"the connection ended {where}")

    def _end(self, extra: bool) -> None:
        self._state, self.whole, self.extra = _WHOLE, True, extra

    def _take_head(self, data: bytes) -> bytes:
        """Reads heads until one is final; gives what follows it."""
        data = self._rest + data
        while True:
            match = _HEAD_END.search(data)
            if match is None:
                if len(data) > MAX_HEAD_BYTES:
                    raise BadResponse(f"a head of more than {MAX_HEAD_BYTES} bytes")
                self._rest = data
                return b""
            lines = [line.removesuffix(b"\r") for line in data[: match.start()].split(b"\n")]
            data = data[match.end() :]
            status = _STATUS.fullmatch(lines[0])
            if status is None:
                raise BadResponse(f"no HTTP/1.1 response: {lines[0][:80]!r}")
            self.status = int(status[2])
            if self.status >= 200:
                break
            if self.status == 101:
                raise BadResponse("the server switches protocols, unasked")
        self._rest = b""
        self._headers(lines[1:], persistent=status[1] == b"1")
        return data

    def _headers(self, lines: list[bytes], *, persistent: bool) -> None:
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not name or name != name.strip():
                raise BadResponse(f"a malformed header: {line[:80]!r}")
            key, text = name.decode("latin-1").lower(), value.strip().decode("latin-1")
            if key == "content-length" and self.headers.get(key, text) != text:
                raise BadResponse("two lengths of one body")
            self.headers[key] = (
                f"{self.headers[key]}, {text}" if key in self.headers and key != "content-length" else text
            )
        options = {option.strip() for option in self.headers.get("connection", "").lower().split(",")}
        self.keep_alive = "close" not in options and (persistent or "keep-alive" in options)
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if self.status in (204, 304):
            self._end(False)
        elif coding is not None:
            if coding.lower() != "chunked":
                raise BadResponse(f"Transfer-Encoding: {coding}")
            self._state = _SIZE_LINE
        elif length is not None:
            if not re.fullmatch(r"[0-9]{1,15}", length):
                raise BadResponse(f"Content-Length: {length}")
            self._state, self._left = _LENGTH, int(length)
            if not self._left:
                self._end(False)
        else:
            self._state, self.keep_alive = _TO_THE_END, False

    def _chunks(self, data: bytes) -> bytes:
        if self._rest:
            data, self._rest = self._rest + data, b""
        found: list[bytes] = []
        place, end, state = 0, len(data), self._state
        while place < end:
            if state == _SIZE_LINE:
                line_end = data.find(b"\r\n", place)
                if line_end < 0:
                    if end - place > MAX_SIZE_LINE_BYTES:
                        raise BadResponse("a chunk without a size")
                    break
                size = chunk_size(data[place:line_end])
                place = line_end + 2
                stop = place + size
                if not size:
                    state = _TRAILER
                elif stop + 2 <= end:  # a whole chunk, as nearly all are
                    if data[stop : stop + 2] != b"\r\n":
                        raise BadResponse("a chunk longer than its size")
                    found.append(data[place:stop])
                    place = stop + 2
                else:
                    self._left, state = size, _DATA
            elif state == _DATA:
                piece = data[place : place + self._left]
                found.append(piece)
                place += len(piece)
                self._left -= len(piece)
                if not self._left:
                    state = _DATA_END
            elif state == _DATA_END:
                if end - place < 2 and data[place:] == b"\r":
                    break
                if data[place : place + 2] != b"\r\n":
                    raise BadResponse("a chunk longer than its size")
                place, state = place + 2, _SIZE_LINE
            else:
                line_end = data.find(b"\r\n", place)
                if line_end < 0:
                    if end - place > MAX_HEAD_BYTES:
                        raise BadResponse(f"a trailer of more than {MAX_HEAD_BYTES} bytes")
                    break
                last = line_end == place
                place = line_end + 2
                if last:
                    self._end(place < end)
                    return found[0] if len(found) == 1 else b"".join(found)
        self._rest, self._state = data[place:], state
        return found[0] if len(found) == 1 else b"".join(found)
