"""What implements the topologies' Runtime: carries every call and tool call of one query and records it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import msgspec

from fanmark.agents.runtime import Author, Key, Message, ToolAsk, ToolLike
from fanmark.loadgen import retries
from fanmark.loadgen.budget import Cost, Promise
from fanmark.loadgen.call_record import take
from fanmark.loadgen.contamination import ANYONE, Prompt, listed
from fanmark.loadgen.demand import Demand, unquoted, word_for_word
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import CallError, Stopped
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.mcp_model import Trip
from fanmark.loadgen.lanes.sse import Reply
from fanmark.loadgen.prompts import Part, Text, tool_fields
from fanmark.loadgen.recording import RecordedCall, said_of
from fanmark.loadgen.records import Call
from fanmark.loadgen.tool_calls import carried_out
from fanmark.loadgen.trace_headers import call_headers, tool_headers
from fanmark.loadgen.users import Session, Turn, key_seed, text_seed, turn_of, with_told, written_last
from fanmark.loadgen.world import World


@dataclass
class QueryRuntime:
    """One query under way. `calls` fills as its calls start, `retried` with their attempts that were not the last; `sizes` and `replies`
    tell how long its messages really were. The query is the turn that its `session` is at."""

    world: World
    demand: Demand
    session: Session | None = None
    calls: list[Call] = field(default_factory=list)
    retried: list[Call] = field(default_factory=list)
    sizes: dict[Key, int | None] = field(default_factory=dict)
    replies: dict[Key, tuple[Endpoint, Author, str]] = field(default_factory=dict)
    numbers: dict[Key, int] = field(default_factory=dict)
    written: dict[Key, int] = field(default_factory=dict)
    promise: Promise = field(default_factory=lambda: Promise(None, Cost()))
    unexplained_tokens: int = 0
    _ids: dict[Key, list[int] | None] = field(default_factory=dict)
    _free_at: float = 0.0  # when the next call may leave

    def __post_init__(self) -> None:
        for turn in self.told:
            if turn.answered_by is not None:
                self.replies[turn.answer.key] = (turn.answered_by, "assistant", turn.answer.text)
            self._ids[turn.answer.key] = turn.ids

    @property
    def told(self) -> Sequence[Turn]:
        """The session's turns before this query."""
        return self.session.told if self.session is not None else ()

    @property
    def owner(self) -> Hashable:
        """Whose the query's traffic is: its own, its session's, that of all who ask a file's line, who may be told the same, or, as
        recorded queries may share anything, anyone's."""
        if self.demand.topology.of_query is not None:
            return ANYONE
        number = self.demand.query if self.session is None else self.session.first
        return ("line", number % len(self.world.questions)) if self.world.questions else number

    def as_turn(self) -> Turn | None:
        """The query as the session's later turns tell it: with the reply that was there last; None where there is none."""
        last = written_last(self.calls, self.numbers)
        if last is None:
            return None
        endpoint, author, text = self.replies[last]
        answer = Message(last, author, text, self.written[last])
        return turn_of(self.demand.query, self.question, answer, endpoint, self._ids[last])

    @cached_property
    def system(self) -> Message:
        return self.message(("system",), self.demand.system, "system")

    @cached_property
    def question(self) -> Message:
        return self.message(("question",), self.demand.question, per_query=True)

    def tokens(self, key: Key) -> int:
        if key == ("tools",):
            return self.sizes.get(key) or 0
        return self.written.get(unquoted(key), self.demand.tokens(key))

    def chance(self, *name: str | int) -> float:
        return self.demand.chance(*name)

    def message(self, key: Key, text: str, author: Author = "user", *, per_query: bool = False) -> Message:
        return self.demand.message(key, text, author, per_query=per_query)

    def quote(self, reply: Message) -> Message:
        return Message(("quoted", *reply.key), "user", reply.text, reply.tokens, reply.source)

    async def prepare(self, endpoints: Iterable[Endpoint], prompt: Sequence[Message]) -> None:
        """Makes a prompt's own texts ahead; replies have none."""
        for endpoint in endpoints:
            await self._parts(endpoint, with_told((m for m in prompt if m.source is None), self.told), False, "")

    async def infer(
        self,
        prompt: Iterable[Message],
        *,
        writes: Key,
        role: str,
        round: int = 1,
        tools: bool = False,
        times: int = 1,
        samples: int = 1,
        reasoning: bool = False,
        may_call: bool = False,
        after: Iterable[Message] = (),
    ) -> Message:
        await self.stagger()
        self.check_limits()
        messages = with_told(prompt, self.told)
        endpoint = self.world.endpoint(self.demand.arm, role)
        call = self.start("call", role, round, [*messages, *after], target=endpoint.name, lane=endpoint.lane.name)
        try:
            length = self.demand.lengths[str(writes[0])] * times
            thought = length - self.demand.lengths[str(writes[0])] if reasoning else 0
            call.samples = samples
            choice = ("auto" if may_call else "none") if tools else None
            reply = await self._infer(endpoint, call, messages, length, choice, thought)
        except BaseException as e:
            self.end(call, e)
            raise
        self.end(call)
        self.keep(writes, call, endpoint, reply)
        return Message(writes, "assistant", reply.text, self.written[writes], call.call, asks=reply.asks)

    async def stagger(self) -> None:
        """Waits until the query's call before has a lead, where the arm wants one: so siblings find what the first of them computed."""
        arm = self.world.arms.get(self.demand.arm)
        if arm is None or arm.stagger_s == 0:
            return
        now = self.world.now()
        leaves_at = max(now, self._free_at)
        self._free_at = leaves_at + arm.stagger_s
        if leaves_at > now:
            await asyncio.sleep((leaves_at - now) * self.world.time_scale)

    async def call_tool(
        self,
        *,
        writes: Key,
        request: Message,
        role: str,
        round: int = 1,
        ask: ToolAsk | None = None,
        after: Iterable[Message] = (),
        like: ToolLike | None = None,
    ) -> Message:
        if self.world.tools is None:
            raise CallError("tool_protocol", "this arm has no tools")
        call = self.start("tool_call", role, round, [request, *after])
        n = sum(1 for earlier in self.calls if earlier.kind == "tool_call") - 1
        trip = Trip(
            (self.demand.arm, self.demand.query),
            role,
            tool_headers(self.world.run_id, call, self.session),
            self.world.now,
        )
        try:
            text = await carried_out(self.world.tools, call, self.demand, n, ask, trip, self.world.time_scale, like)
        except BaseException as e:
            self.end(call, e)
            raise
        self.end(call)
        self._ids[writes] = None
        author: Author = "user" if ask is None else "tool"
        self.replies[writes] = (self.world.endpoint(self.demand.arm, role), author, text)
        answers = None if ask is None else ask.id
        tokens = self.demand.lengths["tool_result"] if like is None else like.tokens
        return Message(writes, author, text, tokens, call.call, answers=answers)

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self.world.time_scale)

    def check_limits(self) -> None:
        """Raises Stopped where the arm's limits allow no further call. Tokens of calls under way are not known yet."""
        arm = self.world.arms.get(self.demand.arm)
        if arm is None:
            return
        calls = [call for call in self.calls if call.kind == "call"]
        if arm.max_calls is not None and len(calls) >= arm.max_calls:
            raise Stopped("max_calls")
        if arm.max_tokens is not None:
            tokens = sum((call.input_tokens or 0) + (call.output_tokens or 0) for call in calls)
            if tokens >= arm.max_tokens:
                raise Stopped("max_tokens")

    async def asked(self, endpoint: Endpoint) -> list[dict[str, Any]]:
        """The session's turns before and the question, as messages of the chat."""
        prompt = await self._parts(endpoint, with_told([self.system, self.question], self.told), False, "")
        return [{"role": author, "content": part.content} for key, author, part in prompt if key != ("system",)]

    def keep(self, writes: Key, call: Call, endpoint: Endpoint, reply: Reply) -> None:
        """A reply as it may be read again."""
        self._ids[writes] = reply.token_ids
        self.replies[writes] = (endpoint, "assistant", reply.text)
        self.numbers[writes] = call.call
        self.written[writes] = call.output_tokens or 0

    def start(self, kind: Any, role: str, round: int, read: Iterable[Message], **where: Any) -> Call:
        """A call or tool call that begins, and reads these messages."""
        after = sorted({m.source for m in read if m.source is not None})
        call = (RecordedCall if self.world.record else Call)(
            query=self.demand.query,
            arm=self.demand.arm,
            call=len(self.calls) + 1,
            after=after,
            kind=kind,
            role=role,
            round=round,
            due_at=self.world.now(),
            worker=self.world.worker,
            **where,
        )
        self.calls.append(call)
        self.world.tally.call_started(call)
        return call

    def end(self, call: Call, error: BaseException | None = None) -> None:
        """It has ended for good."""
        if error is not None:
            call.done_at = self.world.now()
            call.error = error.kind if isinstance(error, CallError) else "cancelled"
            call.message = str(error)[:500] or None
        self.world.tally.call_finished(call)
        self.world.gate.ended(call)

    async def _infer(
        self,
        endpoint: Endpoint,
        call: Call,
        messages: Sequence[Message],
        max_tokens: int,
        choice: str | None,
        thought: int,
    ) -> Reply:
        """Makes the prompt and sends it; once more without each parameter that the target refuses. `choice` None: without tools."""
        tools = choice is not None
        while True:
            salt = self.world.salts(self.world.run_id, self.demand.arm, self.demand.query, call.call)
            opening = f"[{salt}]" if salt is not None and endpoint.salts_text else ""
            prompt = await self._parts(endpoint, messages, tools, opening)
            if not prompt:
                raise CallError("bad_reply", "a prompt without any message: give system or question a length")
            body = endpoint.body(
                [(author, part) for _, author, part in prompt],
                max_tokens=max_tokens,
                forced=self.world.forced,
                salt=salt,
                tools=tools,
                may_call=choice == "auto",
                samples=call.samples,
                reasoning_tokens=thought,
                role=call.role,
            )
            traffic = self._traffic(salt, prompt, messages, endpoint.tool_part if tools else None)
            came_at, limited_s = self.world.now(), call.limited_s
            try:
                reply = await self._send(endpoint, call, body, partial(endpoint.prompt_tokens, prompt, body))
            except HttpError as e:
                if endpoint.drop_refused(e, body):
                    call.limited_s = limited_s + self.world.now() - max(came_at, call.due_at)
                    continue
                raise
            take(call, reply, endpoint.weights)
            if isinstance(call, RecordedCall):
                schemas = endpoint.tool_part if tools else None
                call.messages = said_of(prompt, messages, schemas, self.written, self.world.run_id)
            if traffic is not None:
                limit = self.world.explained.limit(traffic)
                self.unexplained_tokens += max(0, (call.cached_tokens or 0) - limit)
                again = await endpoint.prompts.reply_part("assistant", reply.text, reply.token_ids)
                if reply.asks:
                    said = Message(("said",), "assistant", reply.text, 0, asks=reply.asks)
                    again = again._replace(fields=tool_fields(said))
                self.world.explained.replied(traffic, again.seen, again.content)
            return reply

    async def _send(
        self, endpoint: Endpoint, call: Call, body: Mapping[str, Any], prompt_tokens: Callable[[], Awaitable[int]]
    ) -> Reply:
        """Sends a call when budget and limits let it through, and sends it again as the target's retries allow."""
        gate = self.world.gate
        while True:
            sent, headers = Sent(), call_headers(self.world.run_id, call, self.session)
            guarded = gate.guards(endpoint)
            ticket = await gate.admit(endpoint, call, body, prompt_tokens, sent, self.promise) if guarded else None
            try:
                if ticket is None:
                    return await endpoint.send(body, headers, sent)
                with ticket:
                    reply = await endpoint.send(body, headers, sent)
                    ticket.usage = reply.usage
                    return reply
            except CallError as e:
                error = e
            finally:
                call.sent_at, call.connect_s = sent.at, sent.connect_s
            chance = self.demand.chance("retry", call.arm, call.call, call.attempt)
            wait_s = retries.wait_s(endpoint.config, call.attempt, error, chance, time.time())
            if wait_s is None:
                raise error
            await self._put_off(call, error, wait_s)

    async def _put_off(self, call: Call, error: CallError, wait_s: float) -> None:
        """Closes the record of an attempt that failed, and waits until the next one is due, as which `call` goes on."""
        done_at = self.world.now()
        retry_at = done_at + wait_s / self.world.time_scale
        failed = msgspec.structs.replace(
            call, done_at=done_at, error=error.kind, message=str(error)[:500] or None, retry_at=retry_at
        )
        self.retried.append(failed)
        self.world.tally.call_retried(failed)
        call.attempt, call.due_at, call.sent_at, call.connect_s = call.attempt + 1, done_at, None, None
        call.limited_s = 0.0
        await asyncio.sleep(wait_s)
        call.due_at = min(retry_at, self.world.now())  # a timer may be early by less than a millisecond

    async def _parts(
        self, endpoint: Endpoint, messages: Sequence[Message], tools: bool, opening: str
    ) -> list[tuple[Key, Author, Part]]:
        """The prompt's messages as they go over the wire; those of length 0 do not exist."""
        prompt: list[tuple[Key, Author, Part]] = []
        for message in messages:
            if message.source is not None or message.key in self.replies:
                part = await endpoint.prompts.reply_part(
                    message.author, message.text, self._ids.get(unquoted(message.key))
                )
                if message.asks or message.answers is not None:
                    part = part._replace(fields=tool_fields(message))
                if part.size is not None:
                    self.sizes[message.key] = part.size
            elif message.tokens > 0:
                parts: list[tuple[Key, Author, Part]] = []
                for text in self._texts(message):
                    first = not prompt and not parts
                    made = text._replace(first=first, opening=opening if first else "")
                    parts.append((message.key, text.author, await endpoint.prompts.part(made)))
                sizes = [part.size for _, _, part in parts]
                self.sizes[message.key] = sum(size or 0 for size in sizes) if None not in sizes else None
                prompt += parts
                continue
            else:
                continue
            prompt.append((message.key, message.author, part))
        if tools and endpoint.tool_part is not None:
            self.sizes["tools",] = endpoint.tool_part.size
            if endpoint.config.api == "completions":
                place = 1 if prompt and prompt[0][0] == ("system",) else 0
                prompt.insert(place, (("tools",), "system", endpoint.tool_part))
        return prompt

    def _texts(self, message: Message) -> list[Text]:
        """A message's texts, which are several only where a file says so."""
        seed = text_seed(message, self.world.seed, self.demand.seed)
        given = word_for_word(message, self.demand.query, self.world.questions)
        if given is None:
            begins = tuple((key_seed(self.world.seed, key), tokens) for key, tokens in message.begins)
            return [Text(message.author, message.text, message.tokens, seed, begins=begins)]
        return [Text(author, text, 0, seed, whole=True) for author, text in given]

    def _traffic(
        self,
        salt: str | None,
        prompt: Sequence[tuple[Key, Author, Part]],
        messages: Sequence[Message],
        tools: Part | None,
    ) -> Prompt | None:
        """The prompt as the cache sees it; None where there is no salt. Arms with one salt also share what belongs to a query."""
        if salt is None:
            return None
        questions, arm = self.world.questions, self.demand.arm
        asking = messages if questions else ()
        given = {m.key for m in asking if word_for_word(m, self.demand.query, questions) is not None}
        if self.owner == ANYONE:  # who ask the same are answered alike
            given = {m.key for m in messages if m.source is not None}
        found, first_own = listed(prompt, messages, tools, given)
        if salt not in (self.world.run_id, f"{self.world.run_id}-{arm}"):
            first_own = 0  # a salt of this query, or of this call
        query = self.owner if salt == self.world.run_id or self.owner == ANYONE else (arm, self.owner)
        return self.world.explained.sent(salt, query, found, first_own)
