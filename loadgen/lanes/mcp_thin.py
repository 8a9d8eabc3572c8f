"""A thin MCP client of one streamable HTTP server, over aiohttp: what a call costs is one POST and a parse.

Rules of the file:
1. Each request is a POST of its own: what breaks costs that call. A session that the server does not know any more is replaced, and the
   call, which was not run, is sent once more in the new one. Nothing else is ever sent twice.
2. Where nobody listens, nothing was sent: calls wait and share the next attempts, after a back-off each, as long as their trips allow.
3. A call that is given up tells the server: by closing the stream, in the handshake era by notifications/cancelled.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.mcp_model import (
    FIRST_BACKOFF_S,
    KEEP_ALIVE_S,
    LAST_BACKOFF_S,
    NotConnectedError,
    RemoteTool,
    ToolProtocolError,
    ToolResult,
    ToolServerSpec,
    ToolTransportError,
    Trip,
)
from fanmark.loadgen.lanes.mcp_session import (
    Answer,
    Opened,
    Post,
    Session,
    call_post,
    checked,
    opening,
    post,
    result_of,
    session_refused,
)
from fanmark.servers import mcp_codec as codec

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

CLOSE_S, LINGER_S = 2.0, 1.0
RESUMES, RESUME_MS = 2, 1_000
_SAID, _READ_BYTES = 300, 10_000  # of a reply that is none: characters that are told, and what is looked at


class ThinConnection:
    """A client of the server at a URL. `version`: the protocol that it is known to speak; None: asked for."""

    def __init__(self, spec: ToolServerSpec, version: str | None = None) -> None:
        import aiohttp
        from yarl import URL

        self.tools: Sequence[RemoteTool] = ()
        self.version = version
        self._where, self._secrets = f"tool server {spec.name}", spec.secrets
        self._url = URL(spec.url or "")
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=spec.tls),
            headers=spec.headers,
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._session: Session | None = None
        self._starting: asyncio.Task[Session] | None = None
        self._retry_at, self._backoff_s = 0.0, FIRST_BACKOFF_S
        self._ids = 0
        self._aside: set[asyncio.Task[Any]] = set()  # what goes on after a call has its outcome

    def last_lines(self) -> str:
        """A server that is reached by URL has no lines to show."""
        return ""

    async def start(self, timeout_s: float) -> None:
        """See Connection."""
        async with asyncio.timeout(max(timeout_s, 0.0)):
            await self._ready(Trip())

    async def call(
        self, tool: RemoteTool, arguments: Mapping[str, Any], timeout_s: float, meta: Mapping[str, Any], trip: Trip
    ) -> ToolResult:
        """See Connection."""
        where = f"tool {tool.name} of {self._where.removeprefix('tool server ')}"
        sent: tuple[Session, codec.Id] | None = None
        try:
            give_up_at, renewed = asyncio.get_running_loop().time() + trip.reconnect_s, False
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        session = await self._ready(trip)
                        self._ids += 1
                        asked = call_post(session, self._ids, tool, arguments, meta, trip.trace)
                        sent, trip.sent_at = (session, self._ids), trip.now()
                        answer = await self._exchange(asked, session)
                    except NotConnectedError:
                        sent = trip.sent_at = None
                        if asyncio.get_running_loop().time() >= give_up_at:
                            raise
                        continue
                    if renewed or not session_refused(session, answer):
                        return result_of(checked(answer, where), where)
                    self._lose(session)
                    renewed = True
        except (TimeoutError, asyncio.CancelledError) as e:
            if sent is not None and not sent[0].modern and not self._http.closed:
                told = {"requestId": sent[1], "reason": "given up"}
                self._go_on(self._quietly(post(sent[0], None, "notifications/cancelled", told)))
            if isinstance(e, TimeoutError):
                raise ToolTransportError(f"{where}: no answer within {timeout_s:g} s") from None
            raise
        except codec.ProtocolError as e:
            raise ToolProtocolError(f"{where}: {e}") from None

    async def _ready(self, trip: Trip) -> Session:
        """The open session; opens one where there is none, after the back-off."""
        if self._session is not None:
            return self._session
        if self._starting is None:
            self._starting, trip.opened_session = asyncio.ensure_future(self._start()), True
        began_at = trip.now()
        try:
            return await asyncio.shield(self._starting)
        finally:
            trip.session_s = (trip.session_s or 0.0) + trip.now() - began_at

    async def _start(self) -> Session:
        try:
            await asyncio.sleep(max(0.0, self._retry_at - asyncio.get_running_loop().time()))
            opened = await self._open()
            self.tools = self.tools or opened.tools
            self._session, self.version, self._backoff_s = opened.session, opened.session.version, FIRST_BACKOFF_S
            return opened.session
        except CallError:
            self._put_off()
            self._backoff_s = min(2 * self._backoff_s, LAST_BACKOFF_S)
            raise
        finally:
            self._starting = None

    def _put_off(self) -> None:
        self._retry_at = asyncio.get_running_loop().time() + self._backoff_s

    def _lose(self, session: Session) -> None:
        """Ends a session, if it is still the one in use; calls from now on wait for the next."""
        if self._session is session:
            self._session = None

    async def _open(self) -> Opened:
        steps = opening(self.version, self._where)
        asked = next(steps)
        while True:
            try:
                asked = steps.send(await self._exchange(asked, None))
            except StopIteration as done:
                opened: Opened = done.value
                return opened
            except codec.ProtocolError as e:
                raise ToolProtocolError(f"{self._where}: {e}") from None

    async def _exchange(self, asked: Post, session: Session | None) -> Answer:
        """One POST and what came back. Raises ToolTransportError, ProtocolError."""
        import aiohttp

        try:
            response = await self._http.post(self._url, data=asked.body, headers=asked.headers, allow_redirects=False)
            if (moved := self._moved(response)) is not None:
                response.release()
                self._url = moved
                response = await self._http.post(moved, data=asked.body, headers=asked.headers, allow_redirects=False)
            try:
                answer = await self._answer(response, asked.id)
            except BaseException:
                response.close()
                raise
            self._let_go(response)
            return answer
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as e:
            if session is not None:
                self._lose(session)
                self._put_off()
            raise NotConnectedError(f"{self._where}: {type(e).__name__}: {e}") from None
        except (aiohttp.ClientError, OSError) as e:
            reason = f"{type(e).__name__}: {e}".rstrip(": ")
            raise ToolTransportError(f"{self._where}: connection lost: {reason}") from None

    def _moved(self, response: "aiohttp.ClientResponse") -> "URL | None":
        """Where a server sends a POST on to, if that is its own: many have their endpoint at a path with a slash behind it."""
        from yarl import URL

        location = response.headers.get("Location")
        if response.status not in (307, 308) or location is None:
            return None
        moved = self._url.join(URL(location))
        return moved if moved.origin() == self._url.origin() else None

    async def _answer(self, response: "aiohttp.ClientResponse", id: codec.Id | None) -> Answer:
        status, session_id = response.status, response.headers.get(codec.SESSION_HEADER)
        kind = response.headers.get("Content-Type", "")
        if id is None or status == 202:
            return Answer(status, None, session_id)
        is_stream = kind.lower().startswith(codec.STREAM_TYPE)
        if status >= 400 and not is_stream:  # most of these are no JSON-RPC, JSON or not
            with suppress(codec.ProtocolError):
                message = codec.decode(await response.read())
                if isinstance(message, codec.Result | codec.Failure) and message.id in (id, None):
                    return Answer(status, message, session_id)
        if status >= 400 or not (is_stream or kind.lower().startswith(codec.JSON_TYPE)):
            said = self._secrets.redact((await response.read())[:_READ_BYTES].decode(errors="replace"))
            return Answer(status, None, session_id, " ".join(said[:_SAID].split()))
        reader = codec.ReplyReader(kind)
        reply = await self._read(response, reader, id)
        for _ in range(RESUMES):
            if reply is None and reader.last_event is not None:
                await asyncio.sleep((RESUME_MS if reader.retry_ms is None else reader.retry_ms) / 1e3)
                async with await self._resumed(reader.last_event) as rest:
                    reply = await self._read(rest, reader, id)
        if reply is None:
            raise ToolTransportError(f"{self._where}: the stream ended without a reply")
        return Answer(status, reply, session_id)

    async def _read(
        self, response: "aiohttp.ClientResponse", reader: codec.ReplyReader, id: codec.Id
    ) -> codec.Result | codec.Failure | None:
        """The reply, once it is there; None where the body ends without one."""
        async for data in response.content.iter_any():
            for message in reader.feed(data):
                if isinstance(message, codec.Request):
                    self._go_on(self._refuse(message))
                elif isinstance(message, codec.Result | codec.Failure) and message.id in (id, None):
                    return message
        for message in reader.end():
            if isinstance(message, codec.Result | codec.Failure) and message.id in (id, None):
                return message
        return None

    async def _resumed(self, last_event: str) -> "aiohttp.ClientResponse":
        """The rest of a stream that broke, or that the server let go of."""
        headers = {"Accept": codec.STREAM_TYPE, "Last-Event-ID": last_event}
        if self._session is not None and self._session.id is not None:
            headers |= {codec.SESSION_HEADER: self._session.id, codec.VERSION_HEADER: self._session.version}
        response = await self._http.get(self._url, headers=headers, allow_redirects=False)
        if response.status != 200:
            response.close()
            raise ToolTransportError(f"{self._where}: HTTP {response.status} to a stream that should go on")
        return response

    async def _refuse(self, request: codec.Request) -> None:
        """A server's own request: it lives, and has nobody to ask."""
        reply: codec.Message = codec.Failure(request.id, codec.METHOD_NOT_FOUND, f"no {request.method} here")
        if request.method == "ping":
            reply = codec.Result(request.id, {})
        if self._session is not None:
            headers = post(self._session, None, request.method, {}).headers
            await self._quietly(Post(headers, codec.encode(reply), None))

    async def _quietly(self, asked: Post) -> None:
        """A POST whose fate is nobody's business."""
        with suppress(CallError, codec.ProtocolError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._exchange(asked, None)

    def _let_go(self, response: "aiohttp.ClientResponse") -> None:
        """Gives the connection back where the body is whole. The end of a stream comes a moment after its reply."""
        if response.content.is_eof() or response.status >= 300:
            response.release()
        else:
            # closes it where the body is not whole even then; told here, as a task that is ended before it begins cannot
            self._go_on(self._linger(response)).add_done_callback(lambda _: response.release())

    async def _linger(self, response: "aiohttp.ClientResponse") -> None:
        import aiohttp

        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await response.read()

    def _go_on(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)
        return task

    async def close(self) -> None:
        """See Connection."""
        session, self._session = self._session, None
        waiting = [task for task in (self._starting, *self._aside) if task is not None]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if session is not None and session.id is not None:
            import aiohttp

            headers = {codec.SESSION_HEADER: session.id, codec.VERSION_HEADER: session.version}
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_S), self._http.delete(self._url, headers=headers):
                    pass
        await self._http.close()
