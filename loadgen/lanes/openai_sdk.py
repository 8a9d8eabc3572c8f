"""The openai lane: calls by the `openai` SDK, exactly as applications make them. Slow, and the yardstick for the others.

Rules of the file:
1. A chunk's instant is when the SDK hands it over, which is what an application sees: what the SDK and the loop need before that is in it.
   Chunks of one read come one after another, each with its own instant, so that none counts as coalesced.
2. A request's instant is when its bytes go to the socket, as in every lane: what the SDK does before it and connecting are not in it.
3. Nothing is retried. A call that fails, runs out of time or is cancelled closes its connection.
4. What is no call (/models, /tokenize, /metrics) goes by the aiohttp lane.
"""

import asyncio
import inspect
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import parse_qsl

import httpx2
import msgspec
import openai
from openai._streaming import ServerSentEvent, SSEDecoder

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError, HttpLane, Sent
from fanmark.loadgen.lanes.sse import Chunk, Reply, StreamParser, parse_body

CHAT, COMPLETIONS = "/chat/completions", "/completions"
NOT_REACHED = (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol)


def watched(sent: Sent, now: Callable[[], float]) -> Callable[[str, Mapping[str, Any]], Awaitable[None]]:
    """A request's `trace`: fills `sent` when its first bytes go to the socket."""
    asked_at = now()

    async def told(event: str, info: Mapping[str, Any]) -> None:
        nonlocal asked_at
        if sent.at is not None:  # a redirect's
            return
        if event.endswith("connect_tcp.started"):
            asked_at = now()
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            sent.connect_s = now() - asked_at
        elif event.endswith("send_request_headers.started") and info["request"].method != b"CONNECT":
            sent.at = now()

    return told


def not_carried(why: BaseException) -> CallError:
    """What kept a request from its reply."""
    kind = "connect" if isinstance(why, (*NOT_REACHED, httpx2.InvalidURL)) else "stream_cut"
    while not str(why) and (deeper := getattr(why, "__cause__", None) or getattr(why, "__context__", None)):
        why = deeper  # the outer ones do not say what happened
    return CallError(kind, f"{type(why).__name__}: {why}")


class _Decoder(SSEDecoder):
    """The SDK's own, which remembers that it saw [DONE]: the SDK ends a stream that was cut as it ends a whole one."""

    done = False

    def decode(self, line: str) -> ServerSentEvent | None:
        event = super().decode(line)
        if event is not None and event.data.startswith("[DONE]"):
            self.done = True
        return event


class _Client(openai.AsyncOpenAI):
    def _make_sse_decoder(self) -> _Decoder:
        return _Decoder()


def _checked(given: Any) -> Chunk:
    """A chunk of the SDK, which checks nothing itself. Raises ValueError."""
    chunk = msgspec.convert(given, Chunk, from_attributes=True)
    for choice in chunk.choices:
        said = choice.text or (choice.delta.content if choice.delta is not None else None)
        if said:
            said.encode()
    return chunk


class OpenaiLane:
    """One client of the SDK for each server. `now` is the run's clock."""

    name = "openai"

    def __init__(
        self, now: Callable[[], float], *, tls: ssl.SSLContext | bool = True, proxy: str | None = None
    ) -> None:
        self._now = now
        self._other = HttpLane(now, tls=tls, proxy=proxy)
        self.get, self.post = self._other.get, self._other.post
        self._under_way: ContextVar[Sent] = ContextVar("under_way")
        self._host: ContextVar[str] = ContextVar("host")
        self._http = openai.DefaultAsyncHttpxClient(
            verify=tls,
            proxy=proxy,
            trust_env=False,
            timeout=None,
            limits=httpx2.Limits(keepalive_expiry=60),
            event_hooks={"request": [self._watch]},
        )
        self._creates: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {}

    async def _watch(self, request: httpx2.Request) -> None:
        sent, host = self._under_way.get(), self._host.get()
        if request.url.host != host:  # another server, and what the headers hold is not for it
            raise CallError("bad_reply", f"sent on to {request.url.host}: give that as the target")
        request.extensions["trace"] = watched(sent, self._now)

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], *, stream: bool, timeout_s: float, sent: Sent
    ) -> Reply:
        """Sends `body`, the request as JSON, and reads the whole reply. Raises CallError, HttpError for a status of 400 or more."""
        try:
            async with asyncio.timeout(timeout_s):
                self._under_way.set(sent)
                self._host.set(httpx2.URL(url).host)
                reply = await self._call(url, msgspec.json.decode(body, type=dict[str, Any]), headers)
        except TimeoutError:
            raise CallError("timeout", f"no whole reply within {timeout_s:g} s") from None
        except openai.APIStatusError as e:
            if e.status_code >= 400:
                raise HttpError(e.status_code, e.response.text, dict(e.response.headers)) from None
            raise CallError("bad_reply", f"HTTP {e.status_code}: sent on to nowhere") from None
        except (openai.APIConnectionError, httpx2.RequestError, httpx2.InvalidURL, ssl.SSLError) as e:
            raise not_carried(e.__cause__ or e if isinstance(e, openai.APIConnectionError) else e) from None
        except openai.APIError as e:
            raise CallError("bad_reply", f"an error in place of a reply: {e.message}") from None
        except (ValueError, RecursionError) as e:  # JSON, UTF-8
            raise CallError("bad_reply", f"a malformed event: {e}") from None
        return reply

    async def _call(self, url: str, fields: dict[str, Any], headers: Mapping[str, str]) -> Reply:
        create, known = self._create(url)
        own = {name: value for name, value in fields.items() if name in known and name != "stream"}
        extra = {name: value for name, value in fields.items() if name not in known}
        has_key = any(name.lower() == "authorization" for name in headers)
        key = {} if has_key else {"Authorization": openai.Omit()}
        stream = await create(**own, stream=True, extra_body=extra, extra_headers={**headers, **key})
        async with stream:
            if "event-stream" not in stream.response.headers.get("content-type", "").lower():
                return parse_body(await stream.response.aread(), self._now())
            parser = StreamParser()
            async for chunk in stream:
                parser.take([(self._now(), _checked(chunk))])
            if stream._decoder.done:
                parser.take([(self._now(), b"[DONE]")])
        return parser.reply()

    def _create(self, url: str) -> tuple[Callable[..., Any], frozenset[str]]:
        """The SDK's method for this address, and the fields that it has a parameter for; the others go by extra_body. The key is in the
        calls' headers, none is taken from elsewhere."""
        if url not in self._creates:
            address, _, query = url.partition("?")
            path = CHAT if address.endswith(CHAT) else COMPLETIONS
            client = _Client(
                api_key="none",
                base_url=address.removesuffix(path),
                default_query=dict(parse_qsl(query)),
                max_retries=0,
                http_client=self._http,
            )
            create = client.chat.completions.create if path == CHAT else client.completions.create
            self._creates[url] = create, frozenset(inspect.signature(create).parameters)
        return self._creates[url]

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.aclose()
        await self._other.close()
