"""Sans-I/O parsing of a streamed reply: bytes with their arrival times in, one Reply out. Shared by all lanes.

Rules of the file:
1. Events end with an empty line; lines end with LF, CRLF or CR; comment lines and unknown fields are skipped.
2. Nothing is parsed while the stream runs: a lane appends (instant, bytes) and this reads them once, at the end.
3. Token counts come from `usage` alone. Chunks are counted only for gaps between them.
4. An event's instant is that of the read in which its last byte came. Several events in one read are `coalesced`: the gap before them is
   split evenly over them, so that none is counted as 0.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.records import gap_bucket

Chunks = Sequence[tuple[float, bytes]]

_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")  # an end of line of any kind, and an empty line


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """The server's own counts."""

    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct):
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None
    object: str | None = None
    message: str | None = None


class Reply(msgspec.Struct):
    """What came back. `first_at` is the first token, `answer_at` the first that is not reasoning; `gaps` counts the gaps between
    chunks with content by log bucket (records.gap_bucket)."""

    text: str
    token_ids: list[int] | None
    first_at: float
    answer_at: float | None
    done_at: float
    usage: Usage | None
    finish: str | None
    gaps: dict[int, int]
    coalesced: int


_decoder = msgspec.json.Decoder(_Chunk)


def events(chunks: Chunks) -> list[tuple[float, bytes]]:
    """The data of every event that is whole, with the instant of the read that completed it. What follows the last end is dropped."""
    body = b"".join(data for _, data in chunks)
    ends, total = [], 0
    for at, data in chunks:
        total += len(data)
        ends.append((total, at))
    found, start, i = [], 0, 0
    for match in _EVENT_END.finditer(body):
        while ends[i][0] < match.end():
            i += 1
        data_lines = [
            line[5:].removeprefix(b" ")
            for line in body[start : match.start()].splitlines()
            if line.startswith(b"data:")
        ]
        if data_lines:
            found.append((ends[i][1], b"\n".join(data_lines)))
        start = match.end()
    return found


def parse_stream(chunks: Chunks) -> Reply:
    """The reply of a whole stream. Raises CallError: "stream_cut" where neither [DONE] nor, after a finish, the closing usage is there,
    "bad_reply" for what cannot be read."""
    text: list[str] = []
    ids: list[int] | None = None
    stamps: list[float] = []
    answer_at = usage = finish = None
    done = closed = False
    for at, data in events(chunks):
        if data.strip() == b"[DONE]":
            done = True
            break
        chunk = _decode(data)
        usage = chunk.usage or usage
        closed = chunk.usage is not None and not chunk.choices  # usage beside a choice may still lack its details
        for choice in chunk.choices:
            delta = choice.delta or _Message()
            said = choice.text if choice.text is not None else delta.content
            if said or delta.reasoning or delta.reasoning_content or delta.tool_calls or choice.token_ids:
                stamps.append(at)
                if answer_at is None and not (delta.reasoning or delta.reasoning_content):
                    answer_at = at
            if said:
                text.append(said)
            if choice.token_ids:
                ids = ids or []
                ids.extend(choice.token_ids)
            finish = choice.finish_reason or finish
    if not done and (finish is None or not closed):
        raise CallError("stream_cut", f"the stream ended after {len(stamps)} chunks without [DONE]")
    if not stamps:
        raise CallError("bad_reply", "the stream holds no token")
    gaps, coalesced = _gaps(stamps)
    return Reply("".join(text), ids, stamps[0], answer_at, stamps[-1], usage, finish, gaps, coalesced)


def parse_body(body: bytes, done_at: float) -> Reply:
    """The reply of a request that was not streamed: all its tokens came at once."""
    chunk = _decode(body)
    if not chunk.choices:
        raise CallError("bad_reply", f"a reply without choices: {body[:200]!r}")
    choice = chunk.choices[0]
    said = choice.text if choice.text is not None else (choice.message or _Message()).content
    return Reply(said or "", choice.token_ids, done_at, done_at, done_at, chunk.usage, choice.finish_reason, {}, 0)


def _decode(data: bytes) -> _Chunk:
    try:
        chunk = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise CallError("bad_reply", f"a malformed event: {e}: {data[:200]!r}") from None
    if chunk.error is not None or chunk.object == "error":
        raise CallError("bad_reply", f"an error in place of a reply: {data[:300].decode(errors='replace')}")
    return chunk


def _gaps(stamps: Sequence[float]) -> tuple[dict[int, int], int]:
    """Gaps between chunks; those of one read share the gap before the read evenly."""
    gaps: Counter[int] = Counter()
    coalesced, i, before = 0, 1, stamps[0]
    while i < len(stamps) and stamps[i] == before:  # came together with the first: there is no gap to share
        i, coalesced = i + 1, coalesced + 1
    while i < len(stamps):
        at, n = stamps[i], 1
        while i + n < len(stamps) and stamps[i + n] == at:
            n += 1
        gaps[gap_bucket((at - before) / n)] += n
        coalesced += n - 1
        before, i = at, i + n
    return dict(gaps), coalesced
