"""The virtual lane: the stub's engine, prompts and answers in process, without HTTP, on a loop whose clock jumps (clock.py).

Rules of the file:
1. A request is read, checked and answered by the code that the stub uses, so both clocks see the same tokens, limits and refusals.
2. What a request says apart from its texts is read once and remembered: a run's calls differ in little else.
3. One timer: the loop wakes at the engine's next event, not at every step or token. A call is one future.
4. No two calls arrive at the same moment: a client writes them, and a server reads them, one after another. It matters: an engine at rest
   starts on the first of a fan-out at once, and the others wait for its step to end.
5. Stamps are the engine's own. What else a network and a client add in real time is not there.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import msgspec

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.counters import Reading
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.sse import Reply, Usage
from fanmark.loadgen.prompts import ChatPrompts, Template, TokenPrompts
from fanmark.loadgen.records import Gaps
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.tokenizers import LocalTokenizer
from fanmark.servers.answers import Answer, Lengths, Speaker, prompt_data
from fanmark.servers.body_fields import ApiError
from fanmark.servers.engine.attribution import Accounting, work_of
from fanmark.servers.engine.batch import Rejected
from fanmark.servers.engine.events import Event
from fanmark.servers.engine.group import Engine
from fanmark.servers.engine.prompt import Prompt
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.routing import Policy
from fanmark.servers.openai_api import Ask, Limits, check_context, parse_chat, parse_completions
from fanmark.servers.profiles import Profile
from fanmark.servers.prompts import message_texts, tools_text
from fanmark.servers.prose import Prose
from fanmark.servers.replica_of import service_of, serving_config
from fanmark.servers.tokenizer import Tokenizer, vocabulary

APART_S = 0.0002  # between two calls that are made at once; the aiohttp lane and the stub together need about as much
_REMEMBERED_TEXTS = 20_000
_TEXTS_OF_A_CALL = frozenset(("messages", "prompt", "tools", "cache_salt"))


class VirtualLane:
    """A replica on the running loop's clock."""

    name = "virtual"

    def __init__(self, replica: Engine) -> None:
        self.replica = replica
        self.finished = self.cached_tokens = (
            0  # requests that ended by themselves; tokens of their prompts that were cached
        )
        self._waiting: dict[str, asyncio.Future[Event]] = {}
        self._timer: asyncio.Handle | None = None
        self._turning = False  # the timer is set for this very moment
        self._free_at = 0.0  # when the next call can arrive

    def __repr__(self) -> str:
        return f"<VirtualLane {len(self._waiting)} requests, {self.replica!r}>"

    async def arrive(self) -> None:
        """Waits for a moment of one's own."""
        now = asyncio.get_running_loop().time()
        arrives_at = max(now, self._free_at)
        self._free_at = arrives_at + APART_S
        if arrives_at > now:
            await asyncio.sleep(arrives_at - now)

    async def generate(self, requests: Sequence[Request]) -> list[Event]:
        """The last event of each request, when all have ended. Raises Rejected, or ValueError for what could never be served; then, and
        when it is cancelled, none of them stays in the engine."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        try:
            for request in requests:
                request.arrived_at = now
                self.replica.add(request, now)
                self._waiting[request.id] = loop.create_future()
            self._turn_now()
            return [await future for future in [self._waiting[request.id] for request in requests]]
        finally:
            for request in requests:
                if self._waiting.pop(request.id, None) is not None:
                    self.replica.abort(request.id, loop.time())
                    self._turn_now()

    def _turn_now(self) -> None:
        """Once everything that comes at this moment has come."""
        if not self._turning:
            if self._timer is not None:
                self._timer.cancel()
            self._turning, self._timer = True, asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Hands out what is done, and sleeps until the engine's next event."""
        loop = asyncio.get_running_loop()
        self._turning, self._timer = False, None
        for event in self.replica.advance(loop.time()):
            self.finished += 1
            self.cached_tokens += event.cached_tokens
            future = self._waiting.pop(event.id)
            if not future.done():
                future.set_result(event)
        due_at = self.replica.next_at()
        if due_at is not None:
            self._timer = loop.call_at(due_at, self._turn)


@dataclass(frozen=True)
class Service:
    """What stands at a target: replicas of a profile behind a router, with settings of the engine that are not the profile's. `accounting`
    None: whose the replicas' time is, is not followed."""

    profile: Profile
    replicas: int = 1
    router: Policy = "round_robin"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    accounting: Accounting | None = field(default_factory=Accounting)


class VirtualEndpoint(Endpoint):
    """A target that is engines of its own, by a profile. Takes api, params, prices and call_timeout_s from `config`."""

    def __init__(self, name: str, config: Target, service: Service, tool_calls: int = 1) -> None:
        profile = service.profile
        roles = {role: msgspec.structs.replace(shape, model=None) for role, shape in config.roles.items()}
        config = msgspec.structs.replace(config, url=f"virtual:{profile.name}", urls=[], roles=roles)
        super().__init__(name, config, profile.model.id, "engine model")
        engine = serving_config(profile, service.overrides)
        words = vocabulary()
        self.notes += profile.caveats()
        self._lane = VirtualLane(
            service_of(profile, engine, service.replicas, service.router, stream=False, accounting=service.accounting)
        )
        self._energy_known = profile.energy_known
        together = profile.settings.data_parallel if profile.settings.expert_parallel else 1  # they step together
        self._engines = service.replicas * profile.settings.data_parallel // together
        self.max_model_len = engine.max_model_len
        engines = profile.settings.data_parallel * service.replicas
        self._kv_capacity_tokens = (engine.num_blocks - 1) * engine.block_size * engines
        self._limits = Limits(self.model, engine.max_model_len, auto_tool_calls=tool_calls)
        self._tokenizer = Tokenizer(words)
        self._speaker = Speaker(self._tokenizer, Lengths(), engine.max_model_len)
        local, sample = LocalTokenizer(self._tokenizer), Prose().sample
        chars = len(sample) / len(self._tokenizer.encode(sample))
        self.prompts = (
            TokenPrompts(range(len(words)), local, chars)
            if config.api == "completions"
            else ChatPrompts(words, local, Template(0, 0, 0, 0, 0), chars, self._tokenizer.count)
        )
        self._encoded: dict[str, tuple[list[int], bytes]] = {}  # a text's ids, and the same as crc32 takes them
        self._asks: dict[bytes, Ask] = {}  # requests as read, by all that is not text
        self._schemas_text: str | None = None
        self._sent = 0

    @property
    def lane(self) -> VirtualLane:
        return self._lane

    async def schema_tokens(self, system: bool) -> int:
        return len(self._schemas()[0])

    async def reading(self, timeout_s: float = 10.0) -> Reading:
        return self.told()

    def told(self) -> Reading:
        """What the stub would tell, as of the engine's last event."""
        engines = self._lane.replica.statistics().engines
        return Reading(
            self.server,
            {
                "prompt_tokens": sum(engine.prompt_tokens for engine in engines),
                "generation_tokens": sum(engine.generation_tokens for engine in engines),
                "prompt_tokens_cached": self._lane.cached_tokens,
                "request_success": self._lane.finished,
                "preemptions": sum(engine.num_preemptions for engine in engines),
                "prefix_cache_queries": sum(engine.prefix_cache_queries for engine in engines),
                "prefix_cache_hits": sum(engine.prefix_cache_hits for engine in engines),
                "running": sum(engine.running for engine in engines),
                "waiting": sum(engine.waiting for engine in engines),
                "kv_use": sum(engine.kv_cache_usage for engine in engines) / len(engines),
                "kv_capacity_tokens": self._kv_capacity_tokens,
            },
        )

    def work(self) -> dict[str, float | None]:
        """Steps of the engine, seconds in which one ran or none, what of them is nobody's or was wasted, and joules; None where the
        profile does not know the chip's power."""
        found = self._lane.replica.statistics()
        joules = found.joules if self._energy_known else None
        told: dict[str, float | None] = {
            "engine_steps": found.steps,
            "engine_busy_s": found.busy_s,
            "engine_joules": joules,
        }
        engines = self._engines * asyncio.get_running_loop().time()
        told["engine_idle_s"] = max(0.0, engines - found.busy_s)
        if found.account is not None:
            told |= {"engine_slack_s": found.account.slack_s, "engine_waste_s": found.account.waste_s}
        return told

    async def send(self, body: Mapping[str, Any], headers: Mapping[str, str], sent: Sent) -> Reply:
        sent.at = asyncio.get_running_loop().time()
        try:
            ask = self._ask(body)
            parts = self._parts(body)
            prompt = Prompt([ids for ids, _ in parts])
            check_context(len(prompt), len(prompt), ask.max_tokens, self._limits.max_model_len)
            answers = self._answers(ask, prompt, parts)
        except ApiError as e:
            raise HttpError(e.status, msgspec.json.encode(e.body()).decode()) from None
        self._sent += 1
        salt = str(body.get("cache_salt", ""))
        requests = [
            Request(
                f"{self._sent}-{i}", prompt, answer.ids, salt, ask.priority, session=headers.get("X-Session-Id", "")
            )
            for i, answer in enumerate(answers)
        ]
        try:
            async with asyncio.timeout(self.config.call_timeout_s):
                await self._lane.arrive()
                events = await self._lane.generate(requests)
        except TimeoutError:
            raise CallError("timeout", f"no whole reply within {self.config.call_timeout_s:g} s") from None
        except Rejected as e:
            raise HttpError(503, f"The server is at its limit {e}: try again later.") from None
        except ValueError as e:
            raise HttpError(400, str(e)) from None
        return self._reply(ask, len(prompt), answers, events)

    def _answers(self, ask: Ask, prompt: Prompt, parts: Sequence[tuple[list[int], bytes]]) -> list[Answer]:
        """What the stub would answer. Raises ApiError."""
        crc = 0
        for _, data in parts:
            crc = crc32(data, crc)
        return [self._speaker.answer_to(ask, len(prompt), crc, i) for i in range(ask.n)]

    def _reply(self, ask: Ask, prompt_tokens: int, answers: Sequence[Answer], events: Sequence[Event]) -> Reply:
        return _reply(ask, prompt_tokens, answers, events)

    def _ask(self, body: Mapping[str, Any]) -> Ask:
        """The request but for its texts, as the stub reads it. Raises ApiError."""
        rest = {name: value for name, value in body.items() if name not in _TEXTS_OF_A_CALL}
        answered = sum(message["role"] == "tool" for message in body.get("messages", ()))
        key = msgspec.json.encode((rest, "tools" in body, answered))
        ask = self._asks.get(key)
        if ask is None:
            if "prompt" in body:
                ask = parse_completions({**rest, "prompt": [0]}, self._limits, self._tokenizer)
            else:
                roles = ["user", *["tool"] * answered]  # how many results there are decides what is asked for next
                short: dict[str, Any] = {"messages": [{"role": role, "content": "word"} for role in roles]}
                short |= {"tools": body["tools"]} if "tools" in body else {}
                ask = parse_chat({**rest, **short}, self._limits, self._tokenizer)
            self._asks[key] = ask
        return ask

    def prompt_of(self, parts: Sequence[list[int]]) -> Any:
        """See Endpoint. Message by message: the engine knows those again that it has had."""
        return parts

    def _parts(self, body: Mapping[str, Any]) -> list[tuple[list[int], bytes]]:
        """The prompt's texts, in the order of servers.prompts.prompt_ids."""
        if "prompt" in body:
            return [(ids, prompt_data(ids)) for ids in body["prompt"]]
        parts = [self._schemas()] if "tools" in body else []
        return parts + [self._encode(text) for message in body["messages"] for text in message_texts(message)]

    def _schemas(self) -> tuple[list[int], bytes]:
        if self._schemas_text is None:
            self._schemas_text = tools_text(self.tools)
        return self._encode(self._schemas_text)

    def _encode(self, text: str) -> tuple[list[int], bytes]:
        found = self._encoded.get(text)
        if found is None:
            if len(self._encoded) >= _REMEMBERED_TEXTS:
                self._encoded.clear()
            ids = self._tokenizer.encode(text)
            found = self._encoded[text] = ids, prompt_data(ids)
        return found


def _reply(ask: Ask, prompt_tokens: int, answers: Sequence[Answer], events: Sequence[Event]) -> Reply:
    """What a client makes of the answers' streams."""
    gaps = Gaps()
    for event in events:
        for gap_s, times in event.gaps:
            gaps.add(gap_s, times)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sum(len(answer.ids) for answer in answers),
        "prompt_tokens_details": {"cached_tokens": events[0].cached_tokens},
    }
    if ask.reports_reasoning:
        reasoning_tokens = sum(answer.reasoning_tokens for answer in answers)
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    shares = [event.share for event in events if event.share is not None]
    if shares:
        usage["fanmark"] = work_of(shares)
    last = max(range(len(events)), key=lambda i: events[i].at)
    spoken = [_answer_at(answer, event) for answer, event in zip(answers, events, strict=True)]
    return Reply(
        text=" ".join(answer.content for answer in answers if answer.content),
        token_ids=[i for answer in answers for i in answer.ids] if ask.return_token_ids else None,
        first_at=min(event.first_at for event in events),
        answer_at=min((at for at in spoken if at is not None), default=None),
        done_at=events[last].at,
        usage=msgspec.convert(usage, Usage),
        finish=answers[last].finish,
        gaps=gaps.counts(),
        coalesced=0,
        asks=tuple(ToolAsk(call.id, call.name, call.arguments) for call in answers[0].calls),
    )


def _answer_at(answer: Answer, event: Event) -> float | None:
    """When the first token came that is not reasoning; None if there is none."""
    left, at = answer.reasoning_tokens, event.first_at
    if left >= len(answer.ids):
        return None
    for gap_s, times in event.gaps:
        if left <= 0:
            break
        at += gap_s * min(times, left)
        left -= times
    return at
