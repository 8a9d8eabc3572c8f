"""Sans-I/O parsing of a streamed reply: bytes with their arrival times in, one Reply out. Shared by all lanes.

Rules of the file:
1. Events end with an empty line; lines end with LF, CRLF or CR; comment lines and unknown fields are skipped.
2. Nothing is parsed chunk by chunk: a lane collects (instant, bytes) and hands over many at a time, at the latest at the end. Each byte is
   read once, and what is kept between batches is one event at most, of MAX_EVENT_BYTES. A stream in which a CR turns up is read by the
   general rules from there on; a CR at the end of a batch waits for the next, which tells whether it is a line's end or half of one.
3. Token counts come from `usage` alone. Chunks are counted only for gaps between them.
4. An event's instant is that of the read in which its last byte came. Several events in one read are `coalesced`: the gap before them is
   split evenly over them, so that none is counted as 0.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.records import Gaps

Chunks = Sequence[tuple[float, bytes]]

MAX_EVENT_BYTES = 16_000_000
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")  # an end of line of any kind, and an empty line


class Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class Work(msgspec.Struct, gc=False):
    """What a call took of the replica: told by our own servers alone. Seconds and joules by attribution, waste included."""

    gpu_s: float
    gpu_waste_s: float = 0.0
    joules: float | None = None


class Usage(msgspec.Struct, gc=False):
    """The server's own counts."""

    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Details | None = None
    fanmark: Work | None = None


class Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class ToolDelta(msgspec.Struct, gc=False):
    index: int = 0
    id: str | None = None
    function: Function | None = None


class Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolDelta] | None = None


class Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class Chunk(msgspec.Struct, gc=False):
    """One event of a stream, or a whole reply that is not streamed: what of it is read."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    object: str | None = None
    message: str | None = None


class Reply(msgspec.Struct):
    """What came back. `first_at` is the first token, `answer_at` the first that is not reasoning; `gaps` counts the gaps between
    chunks with content by log bucket (records.gap_bucket). `asks` are the tool calls of the first choice."""

    text: str
    token_ids: list[int] | None
    first_at: float
    answer_at: float | None
    done_at: float
    usage: Usage | None
    finish: str | None
    gaps: dict[int, int]
    coalesced: int
    asks: tuple[ToolAsk, ...] = ()


_decoder = msgspec.json.Decoder(Chunk)


def events(chunks: Chunks) -> list[tuple[float, bytes]]:
    """The data of every event that is whole, with the instant of the read that completed it. What follows the last end is dropped."""
    return _events(chunks, b"".join([data for _, data in chunks]), True)[0]


def _events(chunks: Chunks, body: bytes, last: bool) -> tuple[list[tuple[float, bytes]], int]:
    """The events in `body`, which is all of `chunks`, and where the last of them ends. Unless it is the `last` of the stream, a CR that
    ends it is no end of line yet."""
    found, start, i, read_end = [], 0, -1, 0
    for match in _EVENT_END.finditer(body, 0, len(body) - (not last and body.endswith(b"\r"))):
        end = match.end()
        while read_end < end:
            i += 1
            read_end += len(chunks[i][1])
        if (told := _data(body[start : match.start()])) is not None:
            found.append((chunks[i][0], told))
        start = end
    return found, start


def _data(event: bytes) -> bytes | None:
    """The data of one event, its lines joined; None where it has none."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


class StreamParser:
    """One streamed reply, read in batches. A lane feeds it in order and asks for the reply once, when the body is whole. `decode` makes a
    chunk of an event of another API."""

    __slots__ = (
        "_answer_at",
        "_asks",
        "_at",
        "_before_at",
        "_chunks",
        "_closed",
        "_coalesced",
        "_decode",
        "_done",
        "_error",
        "_finish",
        "_finish_at",
        "_first_at",
        "_gaps",
        "_has_cr",
        "_ids",
        "_rest",
        "_rest_at",
        "_text",
        "_together",
        "_usage",
    )

    def __init__(self, decode: Callable[[bytes], Chunk] | None = None) -> None:
        self._decode = decode or _decode
        self._rest = bytearray()  # of an event that is not whole yet
        self._rest_at = 0.0  # the instant of its last byte
        self._has_cr = False
        self._error: CallError | None = None
        self._done = self._closed = False
        self._text: list[str] = []
        self._asks: dict[int, list[str]] = {}  # by index: id, name and pieces of the arguments
        self._ids: list[int] | None = None
        self._usage: Usage | None = None
        self._finish: str | None = None
        self._finish_at = 0.0
        self._first_at: float | None = None
        self._answer_at: float | None = None
        self._before_at: float | None = None  # the instant of the chunks before the latest ones
        self._at = 0.0  # that of the latest ones, and how many they are
        self._together = 0
        self._chunks = self._coalesced = 0
        self._gaps = Gaps()

    def feed(self, reads: Chunks) -> None:
        """More of the body, in reads of one instant each. What is wrong with it is told by `reply`."""
        if self._done or self._error is not None or not reads:
            return
        body = reads[0][1] if len(reads) == 1 else b"".join([data for _, data in reads])
        self._has_cr = self._has_cr or b"\r" in body
        if self._rest:
            ahead = bytes(self._rest[-3:])
            if not (_EVENT_END.search(ahead + body) if self._has_cr else b"\n\n" in ahead + body):
                self._keep(body, reads[-1][0])
                return
            ahead = bytes(self._rest)
            reads, body = [(self._rest_at, ahead), *reads], ahead + body  # no event ends in it but at its very end
            self._rest.clear()
        if self._has_cr:
            found, start = _events(reads, body, False)
            self._keep(body[start:], reads[-1][0])
            self.take(found)
        else:
            self._lines(reads, body)

    def _keep(self, rest: bytes, at: float) -> None:
        self._rest += rest
        self._rest_at = at
        if len(self._rest) > MAX_EVENT_BYTES:
            self._error = CallError("bad_reply", f"an event of more than {MAX_EVENT_BYTES:,} bytes")
            self._rest.clear()

    def _lines(self, reads: Chunks, body: bytes) -> None:
        """All events in a body without any CR, as nearly all are."""
        whole = body.split(b"\n\n")
        found, i, end, read_end = [], -1, 0, 0
        self._keep(whole.pop(), reads[-1][0])
        for event in whole:
            end += len(event) + 2
            while read_end < end:
                i += 1
                read_end += len(reads[i][1])
            if event.startswith(b"data: {") and b"\n" not in event:
                found.append((reads[i][0], event[6:]))
            elif (data := _data(event)) is not None:
                found.append((reads[i][0], data))
        self.take(found)

    @property
    def is_whole(self) -> bool:
        """Whether the stream's end has been read."""
        return self._done or (self._finish is not None and self._closed)

    def reply(self, empty_at: float | None = None) -> Reply:
        """The whole reply. Raises CallError: "stream_cut" where neither [DONE] nor, after a finish, the closing usage is there,
        "bad_reply" for what cannot be read, or holds no token; with `empty_at` such a one is a reply too, of that instant."""
        if self._has_cr:  # one that ends the stream ends a line
            self.take(events([(self._rest_at, bytes(self._rest))]))
        if self._error is not None:
            raise self._error
        if not self.is_whole:
            raise CallError(
                "stream_cut", f"the stream ended after {self._chunks + self._together} chunks without [DONE]"
            )
        if self._first_at is None:
            if empty_at is None:
                raise CallError("bad_reply", "the stream holds no token")
            self._next_group(empty_at)
        assert self._first_at is not None
        self._close_group()
        return Reply(
            text="".join(self._text),
            token_ids=self._ids,
            first_at=self._first_at,
            answer_at=self._answer_at,
            done_at=max(self._at, self._finish_at) if self._asks else self._at,  # the end of a tool call has no text
            usage=self._usage,
            finish=self._finish,
            gaps=self._gaps.counts(),
            coalesced=self._coalesced,
            asks=tuple(ToolAsk(id, name, "".join(rest)) for _, (id, name, *rest) in sorted(self._asks.items())),
        )

    def _ask(self, deltas: Sequence[ToolDelta]) -> None:
        """More of the tool calls: a call's id and name come once, its arguments in pieces."""
        for delta in deltas:
            parts = self._asks.setdefault(delta.index, ["", ""])
            parts[0] = delta.id or parts[0]
            if delta.function is not None:
                parts[1] = delta.function.name or parts[1]
                parts.append(delta.function.arguments or "")

    def take(self, found: Sequence[tuple[float, bytes | Chunk]]) -> None:
        """More of the stream, in events: their data, or what an SDK made of them."""
        if self._done or self._error is not None:
            return
        text: list[str] = []
        try:
            for at, data in found:
                if isinstance(data, bytes) and (data == b"[DONE]" or (data[:1] != b"{" and data.strip() == b"[DONE]")):
                    self._done = True
                    break
                chunk = self._decode(data) if isinstance(data, bytes) else _checked(data)
                if chunk.usage is not None:
                    self._usage = chunk.usage
                self._closed = (
                    chunk.usage is not None and not chunk.choices
                )  # beside a choice, it may still lack its details
                for choice in chunk.choices:
                    delta, said = choice.delta, choice.text
                    thought = acted = False
                    if delta is not None:
                        if said is None:
                            said = delta.content
                        thought = bool(delta.reasoning or delta.reasoning_content)
                        acted = bool(delta.tool_calls)
                        if delta.tool_calls and choice.index == 0:
                            self._ask(delta.tool_calls)
                    if said:
                        text.append(said)
                    if choice.token_ids:
                        acted = True
                        self._ids = [] if self._ids is None else self._ids
                        self._ids.extend(choice.token_ids)
                    if choice.finish_reason:
                        self._finish, self._finish_at = choice.finish_reason, at
                    if said or thought or acted:
                        if self._answer_at is None and not thought:
                            self._answer_at = at
                        if at == self._at and self._together:
                            self._together += 1
                        else:
                            self._next_group(at)
        except CallError as e:
            self._error = e
        self._text.append("".join(text))

    def _next_group(self, at: float) -> None:
        """A chunk that came later than those before it."""
        if self._together:
            self._close_group()
            self._before_at = self._at
        else:
            self._first_at = at
        self._at, self._together = at, 1

    def _close_group(self) -> None:
        """Chunks of one instant share the gap before them evenly; those that came with the first have none to share."""
        self._chunks += self._together
        self._coalesced += self._together - 1
        if self._before_at is not None:
            self._gaps.add((self._at - self._before_at) / self._together, self._together)


def parse_stream(chunks: Chunks) -> Reply:
    """The reply of a whole stream. Raises CallError, see StreamParser.reply."""
    parser = StreamParser()
    parser.feed(chunks)
    return parser.reply()


def parse_body(body: bytes, done_at: float) -> Reply:
    """The reply of a request that was not streamed."""
    return reply_of(_decode(body), done_at)


def reply_of(chunk: Chunk, done_at: float) -> Reply:
    """A whole reply: all its tokens came at once."""
    if not chunk.choices:
        raise CallError("bad_reply", "a reply without choices")
    choice = chunk.choices[0]
    message = choice.message or Delta()
    said = choice.text if choice.text is not None else message.content
    functions = [(call.id or "", call.function or Function()) for call in message.tool_calls or ()]
    asks = tuple(ToolAsk(id, function.name or "", function.arguments or "") for id, function in functions)
    return Reply(
        said or "", choice.token_ids, done_at, done_at, done_at, chunk.usage, choice.finish_reason, {}, 0, asks
    )


def _decode(data: bytes) -> Chunk:
    try:
        return _checked(_decoder.decode(data), data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise CallError("bad_reply", f"a malformed event: {e}: {data[:200]!r}") from None


def _checked(chunk: Chunk, data: bytes = b"") -> Chunk:
    if chunk.error is not None or chunk.object == "error":
        told = data[:300].decode(errors="replace") or str(chunk.error or chunk.message)
        raise CallError("bad_reply", f"an error in place of a reply: {told}")
    return chunk
