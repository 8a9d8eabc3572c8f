"""Replies of a real vLLM to Responses and Messages, as the tap reads them: text, tool calls and counts are those that stand in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.lanes.sse import Reply, reply_of
from fanmark.loadgen.tap.asked import asked_of
from fanmark.loadgen.tap.replies import parser_of, whole_reply

SAMPLES = Path(__file__).parent / "data" / "vllm_samples"
STREAMS = sorted([*SAMPLES.glob("responses_*stream.txt"), *SAMPLES.glob("messages_*stream.txt")])
WHOLE = [
    SAMPLES / f"{name}.txt"
    for name in ("responses_basic", "responses_tool", "messages_basic", "messages_tool", "messages_stop")
]


def parts(path: Path) -> tuple[str, bytes, bytes]:
    """The API, the request's body and the reply's."""
    lines, _, reply = path.read_bytes().partition(b"\n\n< HTTP 200")
    return path.name.partition("_")[0], lines.split(b"\n> ", 1)[1], reply.partition(b"\n\n")[2]


def events(reply: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in reply.splitlines() if line.startswith(b"data: ")]


def read(api: str, reply: bytes, size: int = 10**9) -> Reply:
    parser, reader = parser_of(api)
    for n, start in enumerate(range(0, len(reply), size)):
        parser.feed([(float(n), reply[start : start + size])])
    found = parser.reply(9.0)
    found.finish = (reader.finish if reader is not None else None) or found.finish
    return found


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_a_stream_says_what_stands_in_its_events(path: Path) -> None:
    api, _, body = parts(path)
    told = events(body)
    found = read(api, body)
    assert found.usage is not None
    if api == "responses":
        last = told[-1]["response"]
        assert found.text == "".join(e["delta"] for e in told if e["type"] == "response.output_text.delta")
        asks = [
            (i["call_id"], i["name"], json.loads(i["arguments"]))
            for i in last["output"]
            if i["type"] == "function_call"
        ]
        counts = (last["usage"]["input_tokens"], last["usage"]["output_tokens"])
        assert (found.finish == "length") == (last["status"] == "incomplete")
    else:
        usage = next(e["usage"] for e in told if e["type"] == "message_delta")
        deltas = [e["delta"] for e in told if e["type"] == "content_block_delta"]
        assert found.text == "".join(delta.get("text", "") for delta in deltas)
        uses = [e["content_block"] for e in told if e["type"] == "content_block_start" and "name" in e["content_block"]]
        given = json.loads("".join(delta.get("partial_json", "") for delta in deltas) or "null")
        asks = [(use["id"], use["name"], given) for use in uses]
        counts = (usage["input_tokens"] + usage.get("cache_read_input_tokens", 0), usage["output_tokens"])
    assert [(ask.id, ask.name, json.loads(ask.arguments)) for ask in found.asks] == asks
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == counts


@given(st.integers(1, 400))
def test_a_stream_says_the_same_however_it_is_cut(size: int) -> None:
    for path in STREAMS:
        api, _, body = parts(path)
        found, whole = read(api, body, size), read(api, body)
        assert (found.text, found.asks, found.usage, found.finish) == (
            whole.text,
            whole.asks,
            whole.usage,
            whole.finish,
        )


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_a_whole_reply_says_what_stands_in_it(path: Path) -> None:
    api, _, body = parts(path)
    told = json.loads(body)
    chunk, id = whole_reply(api, body)
    found = reply_of(chunk, 1.0)
    assert id == told["id"] and found.usage is not None
    assert found.usage.completion_tokens == told["usage"]["output_tokens"]
    said = [block for item in told.get("output", [told]) for block in item.get("content") or () if "text" in block]
    assert found.text == "".join(block["text"] for block in said)
    assert len(found.asks) == sum(
        b.get("type") in ("tool_use", "function_call") for b in told.get("output", told.get("content"))
    )


@pytest.mark.parametrize("name", ["responses_tool_history", "messages_tool_history"])
def test_a_history_of_tool_calls_is_read_message_by_message(name: str) -> None:
    api, body, _ = parts(SAMPLES / f"{name}.txt")
    asked = asked_of(api, body)
    assert asked is not None
    asks = [ask for message in asked.messages for ask in message.asks]
    results = [message for message in asked.messages if message.role == "tool"]
    assert asks and [message.answers for message in results] == [ask.id for ask in asks]
    assert all(message.text for message in results)
