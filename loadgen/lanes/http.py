"""The aiohttp lane: one request to a target, one Reply back, with stamps. For https://, proxies, redirects and compressed replies, and
wherever the fast lane cannot be had.

Rules of the file:
1. No task is woken by chunk: bodies are taken as they arrive (aiohttp_body.py), and a call's task wakes once, at the end.
2. A request's instant is when its first bytes go to the socket, after connecting and after aiohttp's own preparations.
3. Connections are reused and never queued for. A call that fails, runs out of time or is cancelled closes its own.
"""

import asyncio
import io
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.sse import Reply, StreamParser, parse_body

LARGE_BYTES = 1_000_000  # from here on aiohttp wants a file, which it sends piece by piece
BATCH_READS = 8  # a stream's reads are parsed so many at a time, which bounds what each holds in memory


class HttpError(CallError):
    """A status of 400 or more, with the body and the headers (names in lower case) that came with it."""

    def __init__(self, status: int, body: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        kind = "http_429" if status == 429 else f"http_{status // 100}xx"
        super().__init__(kind, f"HTTP {status}: {body[:300]}")
        self.status = status
        self.body = body
        self.headers = headers


@dataclass(slots=True)
class Sent:
    """When the request went to the socket, and how long opening a connection for it took before that (None: it took one that was open);
    filled while it is under way, so that it stands even if the call fails."""

    at: float | None = None
    connect_s: float | None = None


class Body:
    """A response's body while it arrives, as reads of one instant each. Those of a stream are parsed in batches."""

    __slots__ = ("_parser", "_reads", "at")

    def __init__(self, is_stream: bool) -> None:
        self.at = 0.0  # when the latest read came
        self._reads: list[tuple[float, bytes]] = []
        self._parser = StreamParser() if is_stream else None

    def take(self, at: float, data: bytes) -> None:
        self.at = at
        self._reads.append((at, data))
        if self._parser is not None and len(self._reads) >= BATCH_READS:
            self._parser.feed(self._reads)
            self._reads.clear()

    def whole(self) -> bytes:
        """All of a body that is no stream."""
        return b"".join([data for _, data in self._reads])

    def reply(self) -> Reply:
        """What a body that is whole says. Raises CallError."""
        if self._parser is None:
            return parse_body(self.whole(), self.at)
        self._parser.feed(self._reads)
        self._reads.clear()
        return self._parser.reply()


class HttpLane:
    """Opens one session for all targets. `now` is the run's clock."""

    name = "aiohttp"

    def __init__(
        self, now: Callable[[], float], *, tls: ssl.SSLContext | bool = True, proxy: str | None = None
    ) -> None:
        import aiohttp

        from fanmark.loadgen.lanes.aiohttp_body import BodyConnector

        self._now = now
        self._proxy = proxy
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(self._connecting)
        trace.on_connection_create_end.append(self._connected)
        trace.on_request_chunk_sent.append(self._to_socket)
        trace.on_request_redirect.append(self._sent_on)
        self._session = aiohttp.ClientSession(
            connector=BodyConnector(now, limit=0, keepalive_timeout=60, ssl=tls),
            timeout=aiohttp.ClientTimeout(total=None),
            trace_configs=[trace],
            auto_decompress=True,
        )

    async def _connecting(self, session: Any, context: SimpleNamespace, params: Any) -> None:
        context.asked_at = self._now()

    async def _connected(self, session: Any, context: SimpleNamespace, params: Any) -> None:
        sent: Sent = context.trace_request_ctx
        if sent.at is None:  # else it is a redirect's
            sent.connect_s = self._now() - context.asked_at

    async def _to_socket(self, session: Any, context: SimpleNamespace, params: Any) -> None:
        """Called right before each piece of a request's body is written; the first takes the head with it."""
        sent: Sent = context.trace_request_ctx
        if sent.at is None:
            sent.at = self._now()

    async def _sent_on(self, session: Any, context: SimpleNamespace, params: Any) -> None:
        """Refuses a redirect to another host: that is another server, and what the headers hold is not for it."""
        place = params.url.join(type(params.url)(params.response.headers.get("Location", "")))
        if place.host != params.url.host:
            params.response.close()
            raise CallError(
                "bad_reply", f"HTTP {params.response.status}: sent on to {place.host}: give that as the target"
            )

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], *, stream: bool, timeout_s: float, sent: Sent
    ) -> Reply:
        """Posts `body` and reads the whole reply. Raises CallError, HttpError for a status of 400 or more."""
        import aiohttp

        try:
            async with asyncio.timeout(timeout_s):
                status, told, reply = await self._exchange("POST", url, body, headers, sent)
        except TimeoutError:
            raise CallError("timeout", f"no whole reply within {timeout_s:g} s") from None
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.InvalidURL) as e:
            raise CallError("connect", str(e)) from None
        except (aiohttp.ClientError, ConnectionError) as e:
            raise CallError("stream_cut", f"{type(e).__name__}: {e}") from None
        if status >= 400:
            raise HttpError(status, reply.whole().decode(errors="replace"), told)
        return reply.reply()

    async def get(self, url: str, headers: Mapping[str, str], *, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Status and body of a GET. Raises CallError where there is no reply."""
        return await self._ask("GET", url, None, headers, timeout_s)

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 30.0
    ) -> tuple[int, bytes]:
        """Status and body of a POST that is not a call (/tokenize). Raises CallError where there is no reply."""
        return await self._ask("POST", url, body, headers, timeout_s)

    async def _ask(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[int, bytes]:
        import aiohttp

        try:
            async with asyncio.timeout(timeout_s):
                status, _, reply = await self._exchange(method, url, body, headers, Sent())
        except TimeoutError:
            raise CallError("timeout", f"no reply within {timeout_s:g} s") from None
        except (aiohttp.ClientError, ConnectionError) as e:
            raise CallError("connect", str(e) or type(e).__name__) from None
        return status, reply.whole()

    async def _exchange(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], sent: Sent
    ) -> tuple[int, Mapping[str, str], Body]:
        """Status, headers and body of one response, redirects followed."""
        from fanmark.loadgen.lanes.aiohttp_body import whole_body

        data = io.BytesIO(body) if body is not None and len(body) > LARGE_BYTES else body
        async with self._session.request(
            method, url, data=data, headers=headers, proxy=self._proxy, trace_request_ctx=sent
        ) as response:
            told = {name.lower(): value for name, value in response.headers.items()} if response.status >= 400 else {}
            return response.status, told, await whole_body(response.content)

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()
