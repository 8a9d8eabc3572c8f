"""Streams as vLLM sent them, cut in every way that a network can cut them; and what must never be taken for a reply."""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import stream_fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.sse import Reply, StreamParser, events, parse_body, parse_stream
from fanmark.loadgen.records import bucket_gap_s, gap_bucket

SAMPLES = Path(__file__).parent / "data" / "vllm_samples"


def body(name: str) -> bytes:
    """The recorded body of one reply."""
    answered = (SAMPLES / f"{name}.txt").read_bytes().partition(b"\n< HTTP ")[2]
    return answered.partition(b"\n\n")[2].rstrip() + b"\n\n"


def chunk(content: str | None = None, finish: str | None = None, **more: object) -> bytes:
    """An event with one choice."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"
BREADTH = chunk("Zürich") + chunk(" 漢字") + chunk(" 😀", None, token_ids=[7, 8]) + chunk("é", "length") + USAGE + DONE


@dataclass(frozen=True)
class Said:
    """What a recorded stream says: `usage` is prompt, cached, output and reasoning tokens, None where the server did not tell."""

    text: str
    chunks: int
    usage: tuple[int, int, int, int | None] | None
    finish: str


RECORDED = {
    "stream_usage": Said("UPLE" * 8, 8, (19, 0, 8, None), "length"),
    "stream_no_usage": Said("UPLE" * 3, 3, None, "length"),
    "stream_continuous_usage": Said("UPLE" * 3, 3, (19, 0, 3, None), "length"),
    "completions_stream": Said("path" * 3, 3, (3, 0, 3, None), "length"),
    "tools_named_stream": Said("", 17, (340, 256, 64, None), "stop"),
    "tools_required_stream": Said("", 12, (340, 256, 49, None), "tool_calls"),
    "reasoning_server/reasoning_then_content_stream": Said(
        "| createbla details man nargs", 11, (19, 0, 12, 5), "length"
    ),
}
STREAMS = {name: body(name) for name in RECORDED} | {"breadth": BREADTH}
ENDS = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}


def split(data: bytes, places: Sequence[int]) -> list[tuple[float, bytes]]:
    """The bytes in reads that end at `places`; read number i came at second i."""
    edges = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [(float(i), data[a:b]) for i, (a, b) in enumerate(pairwise(edges), start=1)]


def counts(reply: Reply) -> tuple[object, ...]:
    """What a reply says but for its instants."""
    chunks = sum(reply.gaps.values()) if reply.gaps else reply.coalesced
    return (reply.text, reply.token_ids, reply.usage, reply.finish, chunks)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_stream_reads_as_the_server_meant_it(name: str) -> None:
    said, stream = RECORDED[name], STREAMS[name]
    found = parse_stream([(2.5, stream)])
    usage = found.usage
    assert found.text == said.text and found.finish == said.finish
    assert (found.first_at, found.done_at, found.gaps, found.coalesced) == (2.5, 2.5, {}, said.chunks - 1)
    if usage is None:
        assert said.usage is None
        return
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
    reasoning = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else None
    assert (usage.prompt_tokens, cached, usage.completion_tokens, reasoning) == said.usage


@settings(max_examples=60)
@given(st.sampled_from(sorted(STREAMS)), st.sampled_from(sorted(ENDS)), st.data())
def test_any_split_of_a_stream_gives_the_same_reply(name: str, end: str, data: st.DataObject) -> None:
    stream = STREAMS[name].replace(b"\n", ENDS[end])
    places = data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=30))
    whole, at_once = parse_stream([(1.0, STREAMS[name])]), [(1.0, part) for _, part in split(stream, places)]
    assert parse_stream(at_once) == whole
    reads = split(stream, places)
    # an event's instant is that of the read with its last byte, so each stands where the bytes before it end
    ends = list(accumulate(len(part) for _, part in reads))
    event_ends = list(accumulate(len(event) + 2 * len(ENDS[end]) for event in stream.split(ENDS[end] * 2)))
    found = events(reads)
    assert [at for at, _ in found] == [float(bisect_left(ends, place) + 1) for place in event_ends[: len(found)]]
    assert [text for _, text in found] == [text for _, text in events([(0.0, STREAMS[name])])]
    assert counts(parse_stream(reads))[:4] == counts(whole)[:4]


@pytest.mark.parametrize("name", ["completions_stream", "breadth"])
@pytest.mark.parametrize("end", ENDS)
def test_a_byte_at_a_time(name: str, end: str) -> None:
    stream = STREAMS[name].replace(b"\n", ENDS[end])
    found = parse_stream(split(stream, range(len(stream))))
    whole = parse_stream([(1.0, STREAMS[name])])
    assert (found.text, found.token_ids, found.usage, found.finish) == counts(whole)[:4]
    assert found.coalesced == 0 and sum(found.gaps.values()) == whole.coalesced
    first_end = stream.index(ENDS[end] * 2) + 2 * len(ENDS[end])
    assert found.first_at == float(first_end)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_cut_at_any_byte_is_an_error_or_the_whole_reply(name: str) -> None:
    stream = STREAMS[name]
    whole = parse_stream([(1.0, stream)])
    outcomes = set()
    for place in range(len(stream) + 1):
        try:
            assert parse_stream([(1.0, stream[:place])]) == whole, place
            outcomes.add("whole")
        except CallError as e:
            outcomes.add(e.kind)
    assert outcomes == {"stream_cut", "whole"}


def test_comments_and_other_fields_are_passed_over() -> None:
    noisy = BREADTH.replace(b"data: ", b": alive\n\n:\n\nevent: message\nid: 3\nretry: 10\nnonsense\ndata:")
    assert parse_stream([(1.0, noisy)]) == parse_stream([(1.0, BREADTH)])


def test_an_events_data_lines_are_joined() -> None:
    broken = BREADTH.replace(b'"choices": [', b'"choices":\ndata: [')
    assert parse_stream([(1.0, broken)]) == parse_stream([(1.0, BREADTH)])


def test_ends_of_line_may_be_mixed() -> None:
    data = b"data: 1\n\r\ndata: 2\r\n\ndata: 3\r\r\ndata: 4\r\n\r\n\n\ndata: 5\r\ndata: 6\n\r"
    assert events([(0.0, data)]) == [(0.0, b"1"), (0.0, b"2"), (0.0, b"3"), (0.0, b"4"), (0.0, b"5\n6")]


def test_chunks_of_one_read_share_the_gap_before_it_and_are_counted() -> None:
    one = chunk("a")
    reads = [(1.0, one + one), (1.6, one * 3), (1.8, one), (1.8, one), (2.0, b": alive\n\n"), (2.9, one + USAGE + DONE)]
    found = parse_stream(reads)
    # gaps: none within the first read; 0.6 s over three; 0.2 s over two reads of one instant; 1.1 s
    assert found.gaps == {gap_bucket(0.2): 3, gap_bucket(0.1): 2, gap_bucket(1.1): 1}
    assert found.coalesced == 1 + 2 + 1
    assert (found.first_at, found.answer_at, found.done_at) == (1.0, 1.0, 2.9)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 4)), min_size=1, max_size=20))
def test_no_gap_is_ever_zero(steps: list[tuple[float, int]]) -> None:
    reads, at = [(0.0, chunk("a"))], 0.0
    for step, n in steps:
        at += step
        reads.append((at, chunk("a") * n))
    chunks = 1 + sum(n for _, n in steps)
    found = parse_stream([*reads, (at, USAGE + DONE)])
    of_the_first_instant = 1 + sum(n for (when, _), (_, n) in zip(reads[1:], steps, strict=True) if when == 0.0)
    assert sum(found.gaps.values()) == chunks - of_the_first_instant
    if len({when for when, data in reads if data}) == chunks:
        assert found.coalesced == 0
    spans = sum(times * bucket_gap_s(bucket) for bucket, times in found.gaps.items())
    assert spans == pytest.approx(found.done_at, rel=0.002, abs=1e-4)


def test_the_answer_starts_with_the_first_token_that_is_not_reasoning() -> None:
    def thought(key: str) -> bytes:
        return chunk().replace(b'"delta": {}', b'"delta": {"' + key.encode() + b'": "hm"}')

    reads = [(1.0, thought("reasoning")), (2.0, thought("reasoning_content")), (3.0, chunk("a")), (4.0, USAGE + DONE)]
    found = parse_stream(reads)
    assert (found.first_at, found.answer_at, found.done_at, found.text) == (1.0, 3.0, 3.0, "a")
    silent = parse_stream([(1.0, thought("reasoning")), (4.0, USAGE + DONE)])
    assert (silent.first_at, silent.answer_at, silent.text) == (1.0, None, "")


def test_a_stream_may_end_without_done_once_finish_and_usage_are_there() -> None:
    assert parse_stream([(1.0, chunk("a", "stop") + USAGE)]).usage is not None


NO_REPLY = {
    "nothing at all": (b"", "stream_cut"),
    "a finish with usage beside it, as vLLM sends on request, before the closing usage": (
        chunk("a", "stop").replace(b"}]}", b'}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'),
        "stream_cut",
    ),
    "half an event": (b'data: {"choices":', "stream_cut"),
    "a finish without usage and without [DONE]": (chunk("a", "stop"), "stream_cut"),
    "usage without a finish and without [DONE]": (chunk("a") + USAGE, "stream_cut"),
    "no token before [DONE]": (chunk("", "stop") + USAGE + DONE, "bad_reply"),
    "[DONE] alone": (DONE, "bad_reply"),
    "an event that is no JSON": (b"data: {nonsense}\n\n", "bad_reply"),
    "an event without data": (b"data:\n\n", "bad_reply"),
    "a number for an event": (b"data: 3\n\n", "bad_reply"),
    "null for a list": (b'data: {"choices":null}\n\n', "bad_reply"),
    "bytes that are no UTF-8": (b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', "bad_reply"),
    "half a surrogate": (b'data: {"choices":[{"delta":{"content":"\\ud800"}}]}\n\n', "bad_reply"),
    "an error amid the stream": (
        chunk("a") + b'data: {"error":{"message":"out of memory","type":"InternalServerError","code":500}}\n\n' + DONE,
        "bad_reply",
    ),
    "an event that nests deeper than any reply": (b'data: {"error":' + b"[" * 5_000 + b"\n\n", "bad_reply"),
    "an error in the old form": (b'data: {"object":"error","message":"no","code":400}\n\n' + DONE, "bad_reply"),
}


@pytest.mark.parametrize(("stream", "kind"), NO_REPLY.values(), ids=NO_REPLY)
def test_what_is_no_reply_is_an_error(stream: bytes, kind: str) -> None:
    with pytest.raises(CallError) as caught:
        parse_stream([(1.0, stream)])
    assert caught.value.kind == kind and "\n" not in str(caught.value)


@settings(max_examples=60)
@given(st.binary(max_size=40), st.sampled_from(sorted(STREAMS)), st.data())
def test_noise_in_a_stream_raises_call_errors_only(noise: bytes, name: str, data: st.DataObject) -> None:
    stream = STREAMS[name]
    place = data.draw(st.integers(0, len(stream)))
    for found in (noise, stream[:place] + noise + stream[place:], b"data: " + noise + b"\n\n" + DONE):
        try:
            parse_stream([(1.0, found)])
        except CallError as e:
            assert e.kind in ("stream_cut", "bad_reply")


@settings(max_examples=60)
@given(st.sampled_from(sorted(STREAMS)), st.sampled_from(sorted(ENDS)), st.data())
def test_a_stream_fed_in_batches_is_the_stream_fed_whole(name: str, end: str, data: st.DataObject) -> None:
    stream = STREAMS[name].replace(b"\n", ENDS[end])
    if data.draw(st.booleans()):  # a CR that turns up late
        stream = STREAMS[name][: len(STREAMS[name]) // 2] + STREAMS[name][len(STREAMS[name]) // 2 :].replace(
            b"\n", ENDS[end]
        )
    reads = split(stream, data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=30)))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(reads)), max_size=8))), len(reads)]
    parser = StreamParser()
    for a, b in pairwise(edges):
        parser.feed(reads[a:b])
    assert parser.reply() == parse_stream(reads)


@pytest.mark.parametrize("end", ENDS)
def test_what_a_parser_keeps_is_one_event_at_most(end: str) -> None:
    event = chunk("a").replace(b"\n", ENDS[end])
    parser = StreamParser()
    for i in range(1_000):
        parser.feed([(float(i), event[:30])])
        parser.feed([(float(i), event[30:])])
        assert len(parser._rest) <= len(event)
    parser.feed([(1e3, (chunk("", "length") + USAGE + DONE).replace(b"\n", ENDS[end]))])
    reply = parser.reply()
    assert reply.text == "a" * 1_000 and sum(reply.gaps.values()) == 999


@pytest.mark.parametrize("end", ENDS)
def test_a_long_event_is_not_read_again_for_each_of_its_reads(end: str) -> None:
    """Were it, these 100,000 reads would copy 100 GB."""
    parser = StreamParser()
    for at, data in split(chunk("x" * 2_000_000).replace(b"\n", ENDS[end]), range(0, 2_000_000, 20)):
        parser.feed([(at, data)])
    parser.feed([(1e6, (chunk("", "length") + USAGE + DONE).replace(b"\n", ENDS[end]))])
    assert len(parser.reply().text) == 2_000_000


def test_an_event_without_end_is_given_up() -> None:
    parser = StreamParser()
    for i in range(20):
        parser.feed([(float(i), b"data: " + b"x" * 1_000_000)])
    with pytest.raises(CallError, match="an event of more than 16,000,000 bytes") as caught:
        parser.reply()
    assert caught.value.kind == "bad_reply" and not parser._rest


def test_a_mutated_stream_ends_in_one_of_the_known_ways_however_it_is_cut() -> None:
    streams = stream_fuzz.recorded()
    found = Counter(stream_fuzz.check(number, 1, streams) for number in range(4_000))
    assert set(found) == {"reply", "http", "bad_reply", "stream_cut", "bad response"}
    assert min(found.values()) > 100


def test_a_reply_that_was_not_streamed() -> None:
    found = parse_body(body("chat_basic").strip(), 3.0)
    assert found.usage is not None and found.usage.completion_tokens > 0 and found.text != ""
    assert (found.first_at, found.answer_at, found.done_at, found.gaps, found.coalesced) == (3.0, 3.0, 3.0, {}, 0)
    assert parse_body(body("chat_return_token_ids").strip(), 3.0).token_ids == [3369, 3369, 3369]
    assert parse_body(body("completions_token_ids_prompt").strip(), 3.0).text == "otmon"


@pytest.mark.parametrize(
    "answer",
    [
        body("err_context_too_long").strip(),
        body("err_bad_model").strip(),
        b"",
        b"<html>502 Bad Gateway</html>",
        b'{"choices":[]}',
        b"{}",
        b'{"choices":[{"message":{"content":"\xff"}}]}',
    ],
)
def test_a_body_that_is_no_reply_is_an_error(answer: bytes) -> None:
    with pytest.raises(CallError) as caught:
        parse_body(answer, 3.0)
    assert caught.value.kind == "bad_reply" and "\n" not in str(caught.value)
