"""The aiohttp lane: one request to a target, one Reply back, with stamps. Connections are reused and never queued for."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.sse import Reply, parse_body, parse_stream

if TYPE_CHECKING:
    import aiohttp


class HttpError(CallError):
    """A status of 400 or more, with the body that came with it."""

    def __init__(self, status: int, body: str) -> None:
        kind = "http_429" if status == 429 else f"http_{status // 100}xx"
        super().__init__(kind, f"HTTP {status}: {body[:300]}")
        self.status = status
        self.body = body


@dataclass(slots=True)
class Sent:
    """When the request went to the socket; filled while it is under way, so that it stands even if the call fails."""

    at: float | None = None


class HttpLane:
    """Opens one session for all targets. `now` is the run's clock."""

    name = "aiohttp"

    def __init__(
        self, now: Callable[[], float], *, tls: ssl.SSLContext | bool = True, proxy: str | None = None
    ) -> None:
        import aiohttp

        self._now = now
        self._proxy = proxy
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(self._headers_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ssl=tls),
            timeout=aiohttp.ClientTimeout(total=None),
            trace_configs=[trace],
            auto_decompress=True,
        )

    async def _headers_sent(self, session: Any, context: SimpleNamespace, params: Any) -> None:
        sent: Sent = context.trace_request_ctx
        sent.at = self._now()

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], *, stream: bool, timeout_s: float, sent: Sent
    ) -> Reply:
        """Posts `body` and reads the whole reply. Raises CallError, HttpError for a status of 400 or more."""
        import aiohttp

        chunks: list[tuple[float, bytes]] = []
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.post(
                    url, data=body, headers=headers, trace_request_ctx=sent, proxy=self._proxy
                ) as response:
                    if response.status >= 400:
                        raise HttpError(response.status, (await response.read()).decode(errors="replace"))
                    if not stream or "event-stream" not in response.headers.get("Content-Type", ""):
                        return parse_body(await response.read(), self._now())
                    async for data in response.content.iter_any():
                        chunks.append((self._now(), data))
        except TimeoutError:
            raise CallError("timeout", f"no whole reply within {timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as e:
            raise CallError("connect", str(e)) from None
        except (aiohttp.ClientError, ConnectionError) as e:
            raise CallError("stream_cut", f"{type(e).__name__}: {e}") from None
        return parse_stream(chunks)

    async def get(self, url: str, headers: Mapping[str, str], *, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Status and body of a GET. Raises CallError where there is no reply."""
        return await self._ask(
            self._session.get(url, headers=headers, proxy=self._proxy, trace_request_ctx=Sent()), timeout_s
        )

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 30.0
    ) -> tuple[int, bytes]:
        """Status and body of a POST that is not a call (/tokenize). Raises CallError where there is no reply."""
        request = self._session.post(url, data=body, headers=headers, proxy=self._proxy, trace_request_ctx=Sent())
        return await self._ask(request, timeout_s)

    async def _ask(self, request: "aiohttp.client._RequestContextManager", timeout_s: float) -> tuple[int, bytes]:
        import aiohttp

        try:
            async with asyncio.timeout(timeout_s), request as response:
                return response.status, await response.read()
        except TimeoutError:
            raise CallError("timeout", f"no reply within {timeout_s:g} s") from None
        except (aiohttp.ClientError, ConnectionError) as e:
            raise CallError("connect", str(e) or type(e).__name__) from None

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()
