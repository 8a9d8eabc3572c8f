"""Mutated and re-split responses for the parsers of the lanes: whatever a server sends ends as a reply or as one of the known errors, and
how the network cuts it never changes which. Everything is drawn from a seed and a number, so that any finding can be had again.
"""

import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http1 import MAX_HEAD_BYTES, BadResponse, Response
from fanmark.loadgen.lanes.sse import StreamParser, parse_body

SAMPLES = Path(__file__).parent / "data" / "vllm_samples"
OPENAI_LIKE = [
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1764000000,"model":"gpt","service_tier":"default","choices":[{"index":0,'
    b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x"}\n\n'
    b'data: {"id":"c1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"Z\xc3\xbcrich \xf0\x9f\x98\x80"}}]}\n\n'
    b'data: {"id":"c1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}\n\n'
    b'data: {"id":"c1","object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11,'
    b'"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}}\n\ndata: [DONE]\n\n',
    b': OPENROUTER PROCESSING\r\n\r\ndata: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\r\n\r\nevent: message\r\nid: 7\r\n'
    b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}]},"finish_reason":"tool_calls"}]}\r\n\r\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\r\n\r\ndata: [DONE]\r\n\r\n',
    b'data: {"choices":[{"text":"a","token_ids":[1]}]}\n\ndata: {"error":{"message":"out of memory","code":500}}\n\ndata: [DONE]\n\n',
]
STATUSES = (b"200 OK",) * 20 + (b"429 Too Many Requests", b"500 Oops", b"204 No Content", b"302 Found", b"200")
HEADS = (b"",) * 10 + (b"Connection: close\r\n", b"X-A: b\r\n" * 20, b"Server: uvicorn\nVary: Origin\r\n")
TOKENS = (
    *(
        b"\n",
        b"\r",
        b"\n\n",
        b"\r\n",
        b"data:",
        b"data: [DONE]\n\n",
        b": alive\n\n",
        b'"',
        b"{",
        b"}",
        b"null",
        b"\xff",
        b"\\ud800",
    ),
    *(
        b"-1",
        b"1e999",
        b"9" * 30,
        b"\x00",
        b"0\r\n\r\n",
        b"ffffffffff\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"Content-Length: 5\r\n",
    ),
    b'data: {"error":' + b"[" * 3000 + b"\n\n",
)


def recorded() -> list[bytes]:
    """The bodies of the streams that were recorded from vLLM, and streams as other servers send them."""
    found = []
    for path in sorted(SAMPLES.rglob("*stream*.txt")):
        answered = path.read_bytes().partition(b"\n< HTTP ")[2]
        found.append(answered.partition(b"\n\n")[2].rstrip() + b"\n\n")
    return found + OPENAI_LIKE


def mutated(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """`data` with some bytes flipped, cut out, put in or doubled, or joined with another stream."""
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        a = rng.randrange(len(data) + 1)
        b = min(len(data), a + rng.choice((1, 1, 2, 8, 100)))
        kind = rng.randrange(6)
        if kind == 0 and a < len(data):
            data = data[:a] + bytes([data[a] ^ 1 << rng.randrange(8)]) + data[a + 1 :]
        elif kind == 1:
            data = data[:a] + data[b:]
        elif kind == 2:
            if rng.random() < 0.5:
                a = data.find(b"\n\n", a) + 2  # between two events
            data = data[:a] + rng.choice(TOKENS) + data[a:]
        elif kind == 3:
            data = data[:b] + data[a:b] * rng.choice((1, 1, 5)) + data[b:]
        elif kind == 4:
            other = rng.choice(others)
            data = data[:a] + other[rng.randrange(len(other)) :]
        else:
            data = data.replace(b"\n", rng.choice((b"\r\n", b"\r")), rng.choice((1, 3, -1)))
    return data


def response(streams: Sequence[bytes], rng: random.Random) -> bytes:
    """A response with one of the streams for a body, framed in some way, mutated before and perhaps after it was framed."""
    body = mutated(rng.choice(streams), streams, rng)
    fields = b"Content-Type: text/event-stream\r\n" if rng.random() < 0.9 else b"Content-Type: application/json\r\n"
    framing = rng.random()
    if framing < 0.7:
        size = rng.choice((1, 7, 60, 300, 5000)) if framing < 0.3 else 300
        parts = [body[i : i + size] for i in range(0, len(body), size)]
        body = b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts]) + b"0\r\n\r\n"
        fields += b"Transfer-Encoding: chunked\r\n"
    elif framing < 0.9:
        fields += b"Content-Length: %d\r\n" % len(body)
    whole = b"HTTP/1.1 " + rng.choice(STATUSES) + b"\r\n" + fields + rng.choice(HEADS) + b"\r\n" + body
    if rng.random() < 0.1:
        whole = b"HTTP/1.1 100 Continue\r\n\r\n" + whole
    return mutated(whole, streams, rng) if rng.random() < 0.3 else whole


def pieces(data: bytes, rng: random.Random) -> list[bytes]:
    """`data` cut at random places, now and then at every one."""
    if rng.random() < 0.02:
        return [data[i : i + 1] for i in range(len(data))]
    places = sorted(rng.randrange(1, max(2, len(data))) for _ in range(rng.choice((1, 2, 5, 20))))
    return [data[a:b] for a, b in pairwise([0, *places, len(data)]) if a < b]


def outcome(parts: Sequence[bytes], batch: int) -> tuple[list[float], tuple[object, ...]]:
    """What a lane makes of a response that comes in these parts, read by read and parsed `batch` reads at a time: the instants of a
    reply, where the instant of a part is the number of bytes up to its end, and all else, which must not depend on the parts."""
    read, parser, reads = Response(), StreamParser(), list[tuple[float, bytes]]()
    is_stream, place = False, 0
    try:
        for part in parts:
            place += len(part)
            if data := read.feed(part):
                is_stream = read.status < 300 and "event-stream" in read.headers.get("content-type", "")
                reads.append((float(place), data))
            assert len(read._rest) <= MAX_HEAD_BYTES + len(part)
            if is_stream and len(reads) >= batch:
                parser.feed(reads)
                reads.clear()
        read.end()
    except BadResponse:
        return [], ("bad response",)
    state = (read.status, read.whole, read.extra, read.keep_alive)
    if read.status >= 400:
        return [], ("http", state, b"".join([data for _, data in reads]))
    try:
        if is_stream:
            parser.feed(reads)
            reply = parser.reply()
        else:
            reply = parse_body(b"".join([data for _, data in reads]), 0.0)
    except CallError as e:
        assert e.kind in ("bad_reply", "stream_cut"), e.kind
        return [], (e.kind, state, str(e))
    instants = [at for at in (reply.first_at, reply.answer_at, reply.done_at) if at is not None] if is_stream else []
    return instants, ("reply", state, reply.text, reply.token_ids, reply.usage, reply.finish)


def check(number: int, seed: int, streams: Sequence[bytes]) -> str:
    """Stream `number` of this seed, whole and in parts. The class of its outcome; AssertionError, or whatever a parser let through, is a
    finding."""
    rng = random.Random(f"{seed}/{number}")
    data = response(streams, rng)
    parts = pieces(data, rng)
    _, whole = outcome([data], 1)
    instants, split = outcome(parts, rng.choice((1, 2, 8)))
    assert whole == split, f"stream {number} of seed {seed}: whole {whole}, in parts {split}"
    if instants and rng.random() < 0.1:
        exact, by_byte = outcome([data[i : i + 1] for i in range(len(data))], 8)
        ends = list(accumulate(map(len, parts)))
        found = [float(ends[bisect_left(ends, at)]) for at in exact]
        assert (by_byte, found) == (whole, instants), f"stream {number} of seed {seed}: {exact} at {instants} in {ends}"
    return str(whole[0])
