"""An agent that exists already, as a topology: its own code, with a client of the `openai` SDK whose calls are recorded to its query.

Rules of the file:
1. Requests go as the agent makes them, but for their model, which is the target's, and their headers: key, ids and trace are ours.
2. What a call read is found by content: a request depends on the calls whose replies stand in its messages. What an agent rewrites is not
   found.
3. A chunk's instant is when the SDK takes it. A request that the SDK sends again is the same call's next attempt.
4. What the agent does not await when it returns is given up.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from typing import Any

import httpx2
import msgspec
import openai

from fanmark.agents.runtime import Message, Runtime
from fanmark.loadgen.call_record import take
from fanmark.loadgen.errors import CallError, Stopped
from fanmark.loadgen.gate import Ticket
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.openai_sdk import CHAT, COMPLETIONS, not_carried, watched
from fanmark.loadgen.lanes.sse import Reply, parse_body, parse_stream
from fanmark.loadgen.quoting import Said, depends_on, said_in, texts_read
from fanmark.loadgen.records import Call
from fanmark.loadgen.runtime import QueryRuntime
from fanmark.loadgen.target import HttpEndpoint
from fanmark.loadgen.trace_headers import call_headers

ROLE_HEADER = "x-fanmark-role"  # who makes a call; not sent on
_OURS = frozenset(
    ("host", "content-length", "authorization", "accept-encoding", ROLE_HEADER)
)  # so that bodies come as they are

GIVEN = (
    "history",
    "cache_salt",
)  # parameters that an agent may have, which no scenario gives: see docs/own-topology.md

Agent = Callable[..., Coroutine[Any, Any, Any]]


async def answer(function: Agent, wants: Collection[str], rt: Runtime, params: Mapping[str, Any]) -> None:
    """One query, answered by `function(client, question, **params)`, which gets what it `wants` of GIVEN as well."""
    if not isinstance(rt, QueryRuntime):
        return  # a walk, in which nothing is sent
    carrier = Carrier(rt)
    endpoint = carrier.endpoint("")
    *history, question = await rt.asked(endpoint)
    ours = {"history": history, "cache_salt": rt.world.salts(rt.world.run_id, rt.demand.arm, rt.demand.query, 0)}
    client = openai.AsyncOpenAI(
        api_key="none",
        base_url=endpoint.urls[0],
        http_client=httpx2.AsyncClient(transport=carrier, timeout=endpoint.config.call_timeout_s),
    )
    try:
        await function(client, question["content"], **params, **{name: ours[name] for name in wants})
    except openai.OpenAIError as e:
        raise carrier.error or CallError("bad_reply", f"{type(e).__name__}: {e}") from None
    except (asyncio.CancelledError, Stopped):
        if carrier.stopped is None:
            raise
        carrier.task.uncancel()
    finally:
        await carrier.finish()
        await client.close()
    if carrier.stopped is not None:
        raise carrier.stopped


def warm() -> None:
    """Imports what the SDK puts off until a client's first call, which that would take for its own time."""
    client = openai.AsyncOpenAI(api_key="none", http_client=httpx2.AsyncClient(transport=httpx2.AsyncBaseTransport()))
    assert client.chat.completions and client.completions


class Carrier(httpx2.AsyncBaseTransport):
    """Carries one query's requests to its targets, and records them."""

    def __init__(self, rt: QueryRuntime) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.stopped: Stopped | None = None  # a limit of the arm
        self.error: CallError | None = None  # of the call that failed last
        self._rt = rt
        self._said: list[Said] = []
        self._failed: dict[bytes, list[Call]] = {}  # by what was sent: the SDK may send it again
        self._under_way: dict[int, asyncio.Task[Any]] = {}
        self._over = False

    def now(self) -> float:
        """The run's clock."""
        return self._rt.world.now()

    def endpoint(self, role: str) -> HttpEndpoint:
        """The target of a role's calls."""
        found = self._rt.world.endpoint(self._rt.demand.arm, role)
        assert isinstance(found, HttpEndpoint)  # in virtual time there is no such arm
        return found

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One attempt of a call, as the SDK makes it."""
        path = next((path for path in (CHAT, COMPLETIONS) if request.url.path.endswith(path)), None)
        if request.method != "POST" or path is None:
            raise CallError(
                "bad_reply", f"an agent's client makes chat completions only, no {request.method} {request.url.path}"
            )
        if self._over:
            raise CallError("bad_reply", "the query is over: what an agent starts it must await")
        asked = await request.aread()
        role = request.headers.get(ROLE_HEADER, "agent")
        endpoint = self.endpoint(role)
        fields: dict[str, Any] = msgspec.json.decode(asked)
        fields["model"] = endpoint.model_of(role)
        call = await self._call(
            asked, fields, role, endpoint, request.headers.get("x-stainless-retry-count", "0") != "0"
        )
        sent = Sent()
        attempt = _Attempt(self, call, asked, endpoint, sent, bool(fields.get("stream")))
        try:
            attempt.ticket = await self._admitted(endpoint, call, fields, asked, sent)
            headers = httpx2.Headers({name: value for name, value in request.headers.items() if name not in _OURS})
            headers.update({**endpoint.headers, **call_headers(self._rt.world.run_id, call, self._rt.session)})
            onward = httpx2.Request(
                "POST",
                endpoint.at(path, headers["X-Session-Id"]),
                headers=headers,
                content=msgspec.json.encode(fields),
                extensions={**request.extensions, "trace": watched(sent, self._rt.world.now)},
            )
            response = await endpoint.sdk_pool().handle_async_request(onward)
        except BaseException as e:
            attempt.end(e)
            raise
        attempt.status, attempt.headers = response.status_code, response.headers
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=_Recorded(response.stream, attempt),
            extensions=response.extensions,
        )

    async def _call(
        self, asked: bytes, fields: Mapping[str, Any], role: str, endpoint: HttpEndpoint, again: bool
    ) -> Call:
        """The record of a call that begins, or of one that is sent again."""
        rt = self._rt
        if again and self._failed.get(asked):
            call = self._failed[asked].pop()
            self._send_again(call)
        else:
            await rt.stagger()
            try:
                rt.check_limits()
            except Stopped as e:
                self.stopped = e
                if asyncio.current_task() is not self.task:  # else this ends it
                    self.task.cancel()
                raise
            read = depends_on(self._said, texts_read(fields))
            round = 1 + max((rt.calls[n - 1].round for n in read), default=0)
            sources = [Message((), "assistant", "", 0, n) for n in read]
            call = rt.start("call", role, round, sources, target=endpoint.name, lane="openai")
            call.samples = int(fields.get("n") or 1)
        task = asyncio.current_task()
        assert task is not None
        self._under_way[call.call] = task
        return call

    def _send_again(self, call: Call) -> None:
        """Its record so far is that of an attempt that failed, as whose next it goes on."""
        now = self._rt.world.now()
        failed = msgspec.structs.replace(call, retry_at=now)
        self._rt.retried.append(failed)
        self._rt.world.tally.call_retried(failed)
        call.attempt, call.due_at, call.sent_at, call.connect_s = call.attempt + 1, now, None, None
        call.limited_s, call.done_at, call.error, call.message = 0.0, None, None, None

    async def _admitted(
        self, endpoint: HttpEndpoint, call: Call, fields: Mapping[str, Any], asked: bytes, sent: Sent
    ) -> Ticket | None:
        """A place within budget and limits. Without max_tokens a call may write as much as its context holds."""
        gate = self._rt.world.gate
        if not gate.guards(endpoint):
            return None
        if not fields.get("max_tokens") and not fields.get("max_completion_tokens"):
            if endpoint.max_model_len is None:
                raise CallError(
                    "budget", "a call without max_tokens cannot be held within a budget: have the agent set it"
                )
            fields = {**fields, "max_tokens": endpoint.max_model_len}

        async def at_most() -> int:
            return len(asked)  # a token is at least a byte

        return await gate.admit(endpoint, call, fields, at_most, sent, self._rt.promise)

    def ended(self, call: Call, endpoint: HttpEndpoint, reply: Reply, said: Said, *, streamed: bool) -> None:
        """A call has its reply."""
        self._under_way.pop(call.call, None)
        take(call, reply)
        if not streamed:
            call.first_at = None  # its first token came some time before its last
        self._rt.end(call)
        self._rt.keep(("agent", call.call), call, endpoint, reply)
        self._said.append(said)

    def failed(self, call: Call, asked: bytes, error: CallError) -> None:
        """An attempt has failed: the SDK may send it again."""
        self._under_way.pop(call.call, None)
        call.done_at, call.error, call.message = self._rt.world.now(), error.kind, str(error)[:500] or None
        self.error = error
        self._failed.setdefault(asked, []).append(call)

    def given_up(self, call: Call) -> None:
        """The agent wants no reply any more."""
        self._under_way.pop(call.call, None)
        self._rt.end(call, asyncio.CancelledError())

    async def finish(self) -> None:
        """The agent has returned: what it left under way is given up."""
        self._over = True
        left = [task for task in self._under_way.values() if task is not self.task]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        for calls in self._failed.values():
            for call in calls:
                self._rt.end(call)


class _Attempt:
    """One attempt of a call while its reply arrives."""

    def __init__(
        self, carrier: Carrier, call: Call, asked: bytes, endpoint: HttpEndpoint, sent: Sent, stream: bool
    ) -> None:
        self.ticket: Ticket | None = None
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._carrier, self._call, self._asked = carrier, call, asked
        self._endpoint, self._sent, self._stream = endpoint, sent, stream
        self._reads: list[tuple[float, bytes]] = []
        self._over = False

    def take(self, data: bytes) -> None:
        """More of the reply."""
        self._reads.append((self._carrier.now(), data))

    def end(self, failure: BaseException | None = None) -> None:
        """The reply is whole, or this came in its place; the agent may also have had enough."""
        if self._over:
            return
        self._over = True
        self._call.sent_at, self._call.connect_s = self._sent.at, self._sent.connect_s
        with contextlib.suppress(CallError, asyncio.CancelledError), self.ticket or contextlib.nullcontext():
            try:
                if failure is not None:
                    raise failure
                reply = self._reply()
            except asyncio.CancelledError:
                self._carrier.given_up(self._call)
                raise
            except CallError as e:
                raise self._failed(e) from None
            except Exception as e:  # of httpx2, or of what it stands on
                timed_out = isinstance(e, httpx2.TimeoutException)
                raise self._failed(CallError("timeout", type(e).__name__) if timed_out else not_carried(e)) from None
            if self.ticket is not None:
                self.ticket.usage = reply.usage
            said = said_in(self._call.call, self._reads, stream=self._stream)
            self._carrier.ended(self._call, self._endpoint, reply, said, streamed=self._stream)

    def closed(self) -> None:
        """The agent reads no further: what came may be all of it."""
        if self._over:
            return
        try:
            self._reply()
        except CallError:
            self.end(asyncio.CancelledError())
        else:
            self.end()

    def _reply(self) -> Reply:
        if self.status >= 400:
            raise HttpError(self.status, self._whole().decode(errors="replace"), dict(self.headers))
        return parse_stream(self._reads) if self._stream else parse_body(self._whole(), self._carrier.now())

    def _whole(self) -> bytes:
        return b"".join([data for _, data in self._reads])

    def _failed(self, error: CallError) -> CallError:
        error.args = (self._endpoint.shape.secrets.redact(str(error)),)
        self._carrier.failed(self._call, self._asked, error)
        return error


class _Recorded(httpx2.AsyncByteStream):
    """A reply's body, seen on its way to the SDK."""

    def __init__(self, stream: httpx2.AsyncByteStream, attempt: _Attempt) -> None:
        self._stream = stream
        self._attempt = attempt

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for data in self._stream:
                self._attempt.take(data)
                yield data
        except GeneratorExit:
            raise
        except BaseException as e:
            self._attempt.end(e)
            raise
        self._attempt.end()

    async def aclose(self) -> None:
        self._attempt.closed()
        await self._stream.aclose()
