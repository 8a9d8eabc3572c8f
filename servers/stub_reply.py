"""One HTTP reply on its way: the engine's tokens come in, server-sent events go out, or a whole body is ready at the end.

Rules of the file:
1. No task and no timer per chunk: the driver calls `take`, which writes the ready bytes straight to the connection.
2. All that one step brings for one choice is one HTTP chunk and one write.
3. Faults of a stream (stall, reset, malformed, ...) are made here, where the bytes are.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence

from fanmark.servers.answers import Answer
from fanmark.servers.engine.attribution import Share, work_of
from fanmark.servers.engine.events import Event
from fanmark.servers.faults import Doom
from fanmark.servers.messages_api import MessagesStream
from fanmark.servers.openai_api import Ask
from fanmark.servers.openai_replies import Count, Head, Stream
from fanmark.servers.responses_api import ResponsesStream
from fanmark.servers.vllm_metrics import EngineMetrics, Lived

# By API, what writes a streamed reply.
STREAMS: Mapping[str, type[Stream | ResponsesStream | MessagesStream]] = {
    "chat": Stream,
    "completions": Stream,
    "responses": ResponsesStream,
    "messages": MessagesStream,
}


class EngineGone(Exception):
    """The engine died under a request."""


class Choice:
    """One choice of a reply, which is one request of the engine."""

    __slots__ = ("after", "answer", "before", "ended", "index", "lived", "plain", "reply", "sent")

    def __init__(self, reply: "Reply", index: int, answer: Answer, lived: Lived) -> None:
        self.reply, self.index, self.answer, self.lived = reply, index, answer, lived
        around = reply.stream.around(index) if reply.ask.stream else None
        self.plain = around is not None
        self.before, self.after = around or (b"", b"")
        self.sent = 0
        self.ended = False

    def take(self, event: Event) -> None:
        lived = self.lived
        if lived.first_at is None:
            lived.queued_at, lived.scheduled_at, lived.cached = event.queued_at, event.scheduled_at, event.cached_tokens
        lived.preemptions = event.preemptions
        added = self.reply.metrics.tokens(lived, event.at, event.tokens)
        self.reply.on_tokens(event.at, added)
        first, self.sent = self.sent, self.sent + event.tokens
        self.ended = event.finished
        if event.finished:
            if event.share is not None:
                self.reply.shares.append(event.share)
            reason = "length" if self.answer.finish == "length" else "stop"
            self.reply.metrics.finished(lived, event.at, reason)
        self.reply.emit(self, first)

    def fail(self) -> None:
        self.ended = True
        self.reply.metrics.finished(self.lived, self.lived.last_at or self.lived.arrived_at, "error")
        self.reply.fail()


class Reply:
    """All choices of one request. `done` is set when the last has ended; it raises EngineGone if the engine died."""

    def __init__(
        self,
        ask: Ask,
        head: Head,
        answers: Sequence[Answer],
        doom: Doom,
        metrics: EngineMetrics,
        on_tokens: Callable[[float, int], None],
        *,
        arrived_at: float,
        block_size: int,
        reports_cached: bool,
    ) -> None:
        self.ask, self.head, self.answers, self.doom = ask, head, answers, doom
        self.metrics, self.on_tokens = metrics, on_tokens
        self.stream = STREAMS[ask.api](ask, head)
        self.count = Count(ask.prompt_tokens, cached=0 if reports_cached else None)
        if ask.reports_reasoning:
            self.count.reasoning = 0
        self._block_size = block_size
        self.choices = [
            Choice(self, i, answer, Lived(arrived_at, len(ask.prompts[i // ask.n]), ask.max_tokens))
            for i, answer in enumerate(answers)
        ]
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.WriteTransport | None = None
        self.shares: list[Share] = []
        self._unsent: list[bytes] = []
        self._opened = self._stalled = self._broken = False
        self._stall: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Reply {self.head.id} {[choice.sent for choice in self.choices]} tokens>"

    def attach(self, transport: asyncio.WriteTransport) -> None:
        """The headers are out: from now on write to this connection."""
        self.transport = transport
        self._flush()

    def emit(self, choice: Choice, first: int) -> None:
        """The choice's tokens from `first` on are out."""
        count = self.count
        if choice.sent == len(choice.answer.ids) or first == 0:
            self._count_cached(choice, first)
        reasoning = choice.answer.reasoning_tokens
        out: list[bytes] = []
        if not self._opened:
            self._opened = True
            out += [self.stream.opening(other.index, count) for other in self.choices] if self.ask.stream else []
        deltas, last = choice.answer.deltas, len(choice.answer.ids) - 1
        for token in range(first, choice.sent):
            count.completion += 1
            if count.reasoning is not None and token < reasoning:
                count.reasoning += 1
            if self.ask.stream and deltas[token]:
                if choice.plain and token != last:
                    out.append(b"%b%b%b" % (choice.before, deltas[token], choice.after))
                else:
                    out.append(self.stream.chunk(choice.index, choice.answer, token, count))
        ended = choice.ended and all(other.ended for other in self.choices)
        if ended and self.shares:
            count.work = work_of(self.shares)
        if ended and self.ask.stream:
            with_usage, with_done = not self.doom.no_usage, not self.doom.no_done
            out.append(self.stream.closing(self.answers, count, with_usage=with_usage, with_done=with_done))
        if out and not self.done.done():
            self._write(self._spoiled(choice, first, out))
        self._strike(choice)
        if ended:
            self.metrics.replied(len(self.choices), max(len(answer.ids) for answer in self.answers))
            self._count_parsing()
            if not self.done.done():
                self.done.set_result(None)

    def _count_cached(self, choice: Choice, first: int) -> None:
        """Usage speaks of the first choice of each prompt: its hits, and the whole blocks that it added."""
        if first == 0 and choice.index % self.ask.n == 0 and self.count.cached is not None:
            cached, size = choice.lived.cached, self._block_size
            self.count.cached += cached
            self.count.created += max(0, choice.lived.prompt // size * size - cached)

    def _count_parsing(self) -> None:
        if self.ask.has_tools:
            mode = "streaming" if self.ask.stream else "non_streaming"
            for answer in self.answers:
                times = len(answer.ids) if self.ask.stream else 1
                self.metrics.parsed_tools(mode, bool(answer.calls), times)

    # What goes out

    def _write(self, data: bytes) -> None:
        if data:
            self._unsent.append(b"%x\r\n%b\r\n" % (len(data), data))
            self._flush()

    def _flush(self) -> None:
        if self.transport is not None and self._unsent and not self._stalled:
            if not self.transport.is_closing():
                self.transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def fail(self) -> None:
        """The engine died under this reply."""
        if not self.done.done():
            self.done.set_exception(EngineGone())

    def tell_death(self) -> None:
        """End a stream whose headers are out with an error event."""
        self._write(self.stream.failure(engine_error()))

    # Faults

    def _spoiled(self, choice: Choice, first: int, out: list[bytes]) -> bytes:
        after = self.doom.malformed_after
        if after is not None and choice.index == 0 and not self._broken and choice.sent > after >= first:
            self._broken = True
            out[-1] = out[-1][: len(out[-1]) // 2] + b"\n\n"
        after = self.doom.truncated_after
        if after is not None and choice.index == 0 and choice.sent > after >= first:
            out[-1] = out[-1][: len(out[-1]) // 2]
            self.done.set_result(None)
        return b"".join(out)

    def _strike(self, choice: Choice) -> None:
        doom = self.doom
        if choice.index:
            return
        if doom.stall_after is not None and choice.sent >= doom.stall_after and self._stall is None:
            loop = asyncio.get_running_loop()
            self._stalled, self._stall = True, loop.create_future()
            loop.call_later(doom.stall_s, self._resume, self._stall)
        if doom.reset_after is not None and choice.sent >= doom.reset_after and not self.done.done():
            self.done.set_exception(ConnectionResetError())
        if doom.error_after is not None and choice.sent >= doom.error_after:
            self.fail()

    def _resume(self, stall: asyncio.Future[None]) -> None:
        self._stalled = False
        self._flush()
        if not stall.done():
            stall.set_result(None)

    def line(self, path: str, request_id: str | None) -> str:
        """What the log says of the request."""
        count = self.count
        said = {
            "path": path,
            "id": self.head.id,
            "request_id": request_id,
            "stream": self.ask.stream,
            "ended": all(choice.ended for choice in self.choices),
            "input_tokens": count.prompt,
            "cached_tokens": count.cached,
            "output_tokens": count.completion,
            "reasoning_tokens": count.reasoning,
        }
        return json.dumps(said) + "\n"

    async def finished(self) -> None:
        """Until all is out, a stall included. Raises EngineGone, or ConnectionResetError where a fault asks for a reset."""
        await self.done
        if self._stall is not None:
            await self._stall


def engine_error() -> dict[str, object]:
    """The body that tells of a dead engine."""
    text = "The engine is dead: the request was lost with it. The server is starting a new one."
    return {"error": {"message": text, "type": "InternalServerError", "param": None, "code": 500}}
