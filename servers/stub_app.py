"""The stub's HTTP side: which path answers what. Looks like vLLM 0.32 to a client; /version tells it apart.

Rules of the file:
1. aiohttp's low-level server: one dictionary of paths, no router, no middleware.
2. A handler checks the request, hands it to the engine and waits once; the driver writes the stream (stub_reply.py).
3. A client that goes away aborts its request: its KV blocks are free from the next step on.
"""

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO, cast

from aiohttp import web

from fanmark.servers.answers import Lengths, Speaker
from fanmark.servers.body_fields import ApiError, bad_value
from fanmark.servers.engine.attribution import SECONDS, Account
from fanmark.servers.engine.batch import EngineConfig, Rejected
from fanmark.servers.engine.request import Request
from fanmark.servers.faults import Doom, FaultError, FaultPlan, fault_from
from fanmark.servers.messages_api import parse_messages, refusal, whole_message
from fanmark.servers.openai_api import Ask, Limits, completion_prompts, decode_body, parse_chat, parse_completions
from fanmark.servers.openai_replies import Head, dumps, models, whole_reply
from fanmark.servers.prompts import prompt_ids
from fanmark.servers.realtime import EngineDead, RealTime
from fanmark.servers.responses_api import parse_responses, whole_response
from fanmark.servers.stub_reply import EngineGone, Reply, engine_error
from fanmark.servers.tokenizer import Tokenizer
from fanmark.servers.vllm_metrics import Engine, EngineMetrics, own_counter, own_gauge

VERSION = "fanmark-stub-0.1"
_JSON = "application/json"
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Parse = Callable[[Mapping[str, Any], Limits, Tokenizer], Ask]
# By API, what writes a whole reply.
WHOLE = {"chat": whole_reply, "completions": whole_reply, "responses": whole_response, "messages": whole_message}


@dataclass(frozen=True, slots=True)
class AppOptions:
    """What the HTTP side must know. `profile`, `caveats`: shown by /admin/config."""

    limits: Limits
    lengths: Lengths
    api_key: str | None = None
    reports_cached: bool = True
    profile: str = ""
    caveats: tuple[str, ...] = ()


class StubApp:
    """Answers requests; `engine` does the work, `metrics` counts it, `plan` says what goes wrong."""

    def __init__(
        self,
        options: AppOptions,
        config: EngineConfig,
        engine: RealTime,
        metrics: EngineMetrics,
        tokenizer: Tokenizer,
        plan: FaultPlan,
    ) -> None:
        self.options, self.config, self.engine, self.metrics = options, config, engine, metrics
        self.tokenizer, self.plan = tokenizer, plan
        self.log: TextIO | None = None
        self._random = random.Random()
        self.speaker = Speaker(tokenizer, options.lengths, options.limits.max_model_len, self._random)
        self._fingerprint = f"{VERSION}-{self._random.getrandbits(32):08x}"
        self._requests = self._under_plan = self._load = 0
        self._plan_at = time.monotonic()
        self._plan_timer: asyncio.TimerHandle | None = None
        self._step_at, self._step_tokens = -1.0, 0
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": lambda request: self._generate(request, "chatcmpl-", parse_chat)},
            "/v1/completions": {"POST": lambda request: self._generate(request, "cmpl-", parse_completions)},
            "/v1/responses": {"POST": lambda request: self._generate(request, "resp_", parse_responses)},
            "/v1/messages": {"POST": lambda request: self._generate(request, "chatcmpl-", parse_messages)},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/version": {"GET": self._version},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/load": {"GET": self._server_load},
            "/metrics": {"GET": self._metrics},
            "/admin/config": {"GET": self._config},
            "/admin/faults": {"GET": self._faults, "POST": self._set_faults, "DELETE": self._clear_faults},
        }
        self._mind_plan()

    def __repr__(self) -> str:
        return f"<StubApp {self.options.limits.model} {self._requests} requests, {self._load} under way>"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one entrance: path, method, key, and errors as bodies."""
        route = self._routes.get(request.path)
        key = self.options.api_key
        if key and request.path.startswith("/v1") and request.headers.get("Authorization") != f"Bearer {key}":
            return web.Response(body=b'{"error":"Unauthorized"}', status=401, content_type=_JSON)
        if route is None:
            return self._json(request, {"detail": "Not Found"}, 404)
        handler = route.get(request.method)
        if handler is None:
            return self._json(request, {"detail": "Method Not Allowed"}, 405, {"Allow": ", ".join(route)})
        try:
            return await handler(request)
        except ApiError as error:
            body = refusal(error) if request.path == "/v1/messages" else error.body()
            return self._json(request, body, error.status)

    def _json(
        self, request: web.BaseRequest, body: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> web.Response:
        return web.Response(
            body=dumps(body), status=status, content_type=_JSON, headers={**self._headers(request), **(headers or {})}
        )

    def _headers(self, request: web.BaseRequest) -> dict[str, str]:
        given = request.headers.get("X-Request-Id")
        return {"Server": "fanmark-stub", "X-Request-ID": given or f"{self._random.getrandbits(128):032x}"}

    async def _body(self, request: web.BaseRequest) -> dict[str, Any]:
        return decode_body(await request.content.read(), request.headers.get("Content-Type", ""))

    # Generation

    async def _generate(self, request: web.BaseRequest, prefix: str, parse: Parse) -> web.StreamResponse:
        body = await self._body(request)
        number, self._requests = self._requests, self._requests + 1
        ask = parse(body, self.options.limits, self.tokenizer)
        doom = self.plan.doom(self._under_plan, time.monotonic() - self._plan_at)
        self._under_plan += 1
        if doom.status:
            return self._refuse(request, doom)
        if doom.admission_s:
            await asyncio.sleep(doom.admission_s)
        reply = self._reply(request, ask, prefix, doom)
        names = [f"{number}-{choice.index}" for choice in reply.choices]
        requests = [
            (Request(name, ask.prompts[choice.index // ask.n], choice.answer.ids, ask.salt, ask.priority), choice)
            for name, choice in zip(names, reply.choices, strict=True)
        ]
        try:
            self.engine.submit(requests)
        except Rejected as rejected:
            self.metrics.totals.rejected[rejected.reason] += 1
            return self._full(request, rejected.reason)
        except EngineDead:
            return self._json(request, engine_error(), 500)
        except ValueError as error:
            raise bad_value(str(error)) from None
        self._load += 1
        try:
            return await (self._stream(request, reply) if ask.stream else self._whole(request, reply))
        except ConnectionResetError:
            _reset(request.transport)
            raise asyncio.CancelledError from None
        finally:
            self._load -= 1
            self._leave(reply, names)
            if self.log is not None:
                self.log.write(reply.line(request.path, request.headers.get("X-Request-Id")))

    def _reply(self, request: web.BaseRequest, ask: Ask, prefix: str, doom: Doom) -> Reply:
        named = request.headers.get("X-Request-Id") if ask.api != "responses" else None
        given = named or ask.request_id or f"{self._random.getrandbits(64):016x}"
        head = Head(f"{prefix}{given}", int(time.time()), self.options.limits.model, self._fingerprint)
        answers = [
            self.speaker.answer(ask, prompt, place * ask.n + i)
            for place, prompt in enumerate(ask.prompts)
            for i in range(ask.n)
        ]
        return Reply(
            ask,
            head,
            answers,
            doom,
            self.metrics,
            self._count_step,
            arrived_at=self.engine.now(),
            block_size=self.config.block_size,
            reports_cached=self.options.reports_cached,
        )

    async def _stream(self, request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._headers(request))
        response.content_type = "text/event-stream"
        response.charset = "utf-8"
        response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise asyncio.CancelledError
        reply.attach(cast(asyncio.WriteTransport, transport))
        try:
            await reply.finished()
        except EngineGone:
            reply.tell_death()
        await response.write_eof()
        return response

    async def _whole(self, request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
        try:
            await reply.finished()
        except EngineGone:
            return self._json(request, engine_error(), 500)
        body = WHOLE[reply.ask.api](reply.ask, reply.head, reply.answers, reply.count)
        if reply.doom.no_usage:
            del body["usage"]
        data = dumps(body)
        if reply.doom.malformed_after is not None or reply.doom.truncated_after is not None:
            data = data[: len(data) // 2]
        return web.Response(body=data, content_type=_JSON, headers=self._headers(request))

    def _leave(self, reply: Reply, names: list[str]) -> None:
        """Whatever of the request is still in the engine is aborted."""
        for name, choice in zip(names, reply.choices, strict=True):
            if self.engine.abort(name):
                self.metrics.finished(choice.lived, self.engine.now(), "abort")

    def _count_step(self, at: float, tokens: int) -> None:
        if at != self._step_at:
            if self._step_tokens:
                self.metrics.step(self._step_tokens)
            self._step_at, self._step_tokens = at, 0
        self._step_tokens += tokens

    def _refuse(self, request: web.BaseRequest, doom: Doom) -> web.Response:
        if doom.status == 503:
            return self._full(request, "max_num_queued_reqs")
        if doom.status in (200, 500):
            return self._json(request, engine_error(), doom.status)
        wait = doom.retry_after_s
        if wait is None:
            return self._json(request, ApiError(429, "Too many requests.", "TooManyRequestsError").body(), 429)
        error = ApiError(429, f"Too many requests: try again in {wait:g} s.", "TooManyRequestsError")
        headers = {"Retry-After": f"{max(0, round(wait))}", "Retry-After-Ms": f"{round(1000 * wait)}"}
        return self._json(request, error.body(), 429, headers)

    def _full(self, request: web.BaseRequest, limit: str) -> web.Response:
        error = ApiError(503, f"The server is at its limit {limit}: try again later.", "ServiceUnavailableError")
        return self._json(request, error.body(), 503)

    # Other endpoints

    async def _models(self, request: web.BaseRequest) -> web.Response:
        limits = self.options.limits
        permission = f"modelperm-{self._random.getrandbits(64):016x}"
        return self._json(request, models(limits.model, limits.max_model_len, int(time.time()), permission))

    async def _tokenize(self, request: web.BaseRequest) -> web.Response:
        body = await self._body(request)
        messages = body.get("messages")
        if isinstance(messages, list):
            tools = body.get("tools") or []
            if not all(isinstance(item, dict) for item in (*messages, *tools)):
                raise bad_value("messages and tools must be lists of objects.", "messages")
            ids = prompt_ids(self.tokenizer, messages, tools)
        elif isinstance(body.get("prompt"), str):
            ids = list(completion_prompts(body["prompt"], self.tokenizer)[0])
        else:
            raise bad_value("Give a prompt (text) or messages.", "prompt")
        texts = [self.tokenizer.decode([i]) for i in ids] if body.get("return_token_strs") else None
        shown = {
            "count": len(ids),
            "max_model_len": self.options.limits.max_model_len,
            "tokens": ids,
            "token_strs": texts,
        }
        return self._json(request, shown)

    async def _detokenize(self, request: web.BaseRequest) -> web.Response:
        ids = (await self._body(request)).get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise bad_value("tokens must be a list of token ids >= 0.", "tokens")
        return self._json(request, {"prompt": self.tokenizer.decode(ids)})

    async def _version(self, request: web.BaseRequest) -> web.Response:
        return self._json(request, {"version": VERSION})

    async def _health(self, request: web.BaseRequest) -> web.Response:
        return web.Response(status=200 if self.engine.alive else 503, headers=self._headers(request))

    async def _server_load(self, request: web.BaseRequest) -> web.Response:
        return self._json(request, {"server_load": self._load})

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        self._count_step(-1.0, 0)
        lives = self.engine.statistics()
        every = [engine for life in lives for engine in life.engines]
        now = lives[-1].engines if self.engine.alive else ()
        shown = Engine(
            running=sum(engine.running for engine in now),
            waiting=sum(engine.waiting for engine in now),
            kv_usage=sum(engine.kv_cache_usage for engine in now) / len(now) if now else 0.0,
            prefix_queries=sum(engine.prefix_cache_queries for engine in every),
            prefix_hits=sum(engine.prefix_cache_hits for engine in every),
            preemptions=sum(engine.num_preemptions for engine in every),
        )
        struck = [({"kind": f.kind}, n) for f, n in zip(self.plan.faults, self.plan.struck, strict=True)]
        joules, busy = sum(life.joules for life in lives), sum(life.busy_s for life in lives)
        steps = sum(life.steps for life in lives)
        parts = sum((life.account for life in lives if life.account is not None), Account())
        attributed = [({"kind": name.removesuffix("_s")}, getattr(parts, name)) for name in SECONDS]
        extra = [
            *own_counter("process_cpu_seconds_total", "Processor time of the server.", [({}, time.process_time())]),
            *own_gauge("fanmark_stub_time_scale", "Wall seconds to a second of the engine.", self.engine.time_scale),
            *own_counter("fanmark_stub_steps_total", "Steps of the engine.", [({}, steps)]),
            *own_counter("fanmark_stub_busy_seconds_total", "Engine seconds in which a step ran.", [({}, busy)]),
            *own_counter("fanmark_stub_attributed_seconds_total", "Busy seconds by what they went to.", attributed),
            *own_counter("fanmark_stub_joules_total", "Energy by the profile's power figures.", [({}, joules)]),
            *(own_counter("fanmark_stub_faults_total", "Requests that a fault struck.", struck) if struck else ()),
        ]
        return web.Response(
            body=self.metrics.render(shown, extra).encode(),
            headers={**self._headers(request), "Content-Type": "text/plain; version=1.0.0; charset=utf-8"},
        )

    # Administration

    async def _config(self, request: web.BaseRequest) -> web.Response:
        config = {name: getattr(self.config, name) for name in self.config.__slots__}
        shown = {"profile": self.options.profile, "caveats": self.options.caveats, "time_scale": self.engine.time_scale}
        return self._json(request, {**shown, "engine": config})

    async def _faults(self, request: web.BaseRequest) -> web.Response:
        listed = [
            {**fault.describe(), "struck": struck}
            for fault, struck in zip(self.plan.faults, self.plan.struck, strict=True)
        ]
        return self._json(request, {"seed": self.plan.seed, "faults": listed})

    async def _set_faults(self, request: web.BaseRequest) -> web.Response:
        """Body: {"faults": [{"kind": ..., ...}], "seed": 0}. Replaces what was in force; windows count from now."""
        body = await self._body(request)
        given, seed = body.get("faults"), body.get("seed", 0)
        if not isinstance(given, list) or not all(isinstance(fault, dict) for fault in given) or type(seed) is not int:
            raise bad_value('Give {"faults": [{"kind": ...}], "seed": 0}.', "faults")
        try:
            plan = FaultPlan([fault_from(fault) for fault in given], seed)
        except FaultError as error:
            raise bad_value(str(error), "faults") from None
        self._adopt(plan)
        return await self._faults(request)

    async def _clear_faults(self, request: web.BaseRequest) -> web.Response:
        self._adopt(FaultPlan())
        return await self._faults(request)

    def _adopt(self, plan: FaultPlan) -> None:
        self.plan, self._plan_at, self._under_plan = plan, time.monotonic(), 0
        self._mind_plan()

    def _mind_plan(self) -> None:
        """Bring the engine into the state that the plan asks for now, and come again at its next turn."""
        if self._plan_timer is not None:
            self._plan_timer.cancel()
            self._plan_timer = None
        at = time.monotonic() - self._plan_at
        if self.plan.engine_dead(at):
            self.engine.die()
        else:
            self.engine.revive()
        self.engine.slow_down(self.plan.slow_down(at))
        turn = self.plan.next_turn(at)
        if turn is not None:
            # A millisecond late, so that a timer that is true to one does not come too early.
            self._plan_timer = asyncio.get_running_loop().call_later(turn - at + 0.001, self._mind_plan)


def _reset(transport: asyncio.BaseTransport | None) -> None:
    """Close the connection with a TCP reset, not an orderly end."""
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    cast(asyncio.Transport, transport).abort()
