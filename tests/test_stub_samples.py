"""The stub's replies against those recorded from a real vLLM: status, headers, keys in order, types, constants; errors word for word."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stub_process import HttpReply, Stub, running_stub

SAMPLES = Path(__file__).parent / "data" / "vllm_samples"
pytestmark = pytest.mark.real

# What the recorded model did by itself, the stub is asked for.
ASK: dict[str, dict[str, Any]] = {
    "chat_eos_finish_stop": {"vllm_xargs": {"answer_tokens": 1}},
    "stream_finish_stop": {"vllm_xargs": {"answer_tokens": 1}},
    "chat_stop_string": {"stop": ["never said"]},
    "tools_auto": {"vllm_xargs": {"tool_calls": 0}},
    "tools_history": {"vllm_xargs": {"tool_calls": 0}},
    "messages_tool_history": {"vllm_xargs": {"tool_calls": 0}},
    "responses_tool_history": {"vllm_xargs": {"tool_calls": 0}},
    "responses_eos": {"vllm_xargs": {"answer_tokens": 1}},
    "responses_eos_stream": {"vllm_xargs": {"answer_tokens": 1}},
    "responses_reasoning": {"chat_template_kwargs": {"enable_thinking": True}},
    "responses_reasoning_stream": {"chat_template_kwargs": {"enable_thinking": True}},
    "reasoning_server/reasoning_then_content": {"thinking_token_budget": 5},
    "reasoning_server/reasoning_then_content_stream": {"thinking_token_budget": 5},
    **{
        f"reasoning_server/{name}": {"thinking_token_budget": 6}
        for name in (
            "force_include_usage_stream",
            "reasoning_nonstream_no_end",
            "reasoning_stream_no_end",
            "request_id_without_flag",
            "priority_without_priority_policy",
        )
    },
}
FREE = {"id", "created", "content", "reasoning", "text", "arguments", "name", "prompt", "system_fingerprint", "version"}
FREE |= {"call_id", "city", "delta", "item_id", "partial_json"}  # of the APIs of responses and messages


@dataclass(frozen=True)
class Sample:
    """One exchange as recorded."""

    method: str
    path: str
    headers: Mapping[str, str]
    request: bytes | None
    reply: HttpReply


def read(name: str) -> Sample:
    asked, _, answered = (SAMPLES / f"{name}.txt").read_text().partition("\n< HTTP ")
    lines = [line[2:] for line in asked.splitlines() if line.startswith("> ")]
    method, path = lines[0].split()
    headers = dict(line.split(": ", 1) for line in lines[1:] if re.match(r"[A-Za-z-]+: ", line))
    body = next((line for line in lines[1:] if line.startswith("{")), None)
    if body is not None and "[66" in body:  # the recorder shortened the long prompt
        long = json.dumps("import asyncio, json\n" * 1400)
        body = re.sub(r'"content": ".*"}\]', lambda _: f'"content": {long}}}]', body)
    head, _, data = answered.partition("\n\n")
    got = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    return Sample(
        method, path, headers, body.encode() if body else None, HttpReply(int(head.split()[0]), got, data.encode())
    )


NAMES = sorted(str(file.relative_to(SAMPLES))[:-4] for file in SAMPLES.rglob("*.txt") if file.stem != "metrics")


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Stub]]:
    """Two stubs set up as the two recorded servers were."""
    flags = ("--model", "tiny", "--max-model-len", "4096", "--num-blocks", "4096", "--block-size", "128")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FANMARK_TEST_KEY", "sk-test")
        with running_stub(*flags) as plain, running_stub(*flags, "--api-key-env", "FANMARK_TEST_KEY") as guarded:
            yield {"plain": plain, "guarded": guarded}


def shape(value: Any, key: str = "") -> Any:
    """A JSON value with what may differ replaced by its type; keys keep their order. What the stub adds under "fanmark" is left out."""
    if isinstance(value, dict):
        return [(name, shape(part, name)) for name, part in value.items() if name != "fanmark"]
    if isinstance(value, list):
        return [type(value[0]).__name__] if value and type(value[0]) in (int, str) else [shape(part) for part in value]
    if key in FREE or (isinstance(value, (int, float)) and not isinstance(value, bool) and key != "code"):
        return type(value).__name__
    return value


def stream_shape(reply: HttpReply) -> list[Any]:
    """Shapes of a stream's chunks in order, with their events' names, equal neighbours once."""
    shapes = [json.dumps(shape(event)) for event in reply.events()]
    names = [line for line in reply.body.decode().split("\n") if line.startswith("event: ")]
    shapes = [name + each for name, each in zip(names, shapes, strict=True)] if names else shapes
    return [each for place, each in enumerate(shapes) if place == 0 or shapes[place - 1] != each]


@pytest.mark.parametrize("name", NAMES)
def test_reply_is_as_recorded(servers: dict[str, Stub], name: str) -> None:
    sample, guarded = read(name), name.startswith("reasoning_server/")
    body = sample.request
    if name in ASK and body is not None:
        body = json.dumps({**json.loads(body), **ASK[name]}).encode()
    if guarded and body is not None and b'"stream": true' in body:
        body = json.dumps(
            {**json.loads(body), "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        ).encode()
    got = servers["guarded" if guarded else "plain"].send(sample.method, sample.path, body, sample.headers)
    want = sample.reply
    assert got.status == want.status, got.body
    for header in ("Content-Type", "Allow"):
        assert got.headers.get(header) == want.headers.get(header)
    if "X-Request-Id" in sample.headers:
        assert got.headers["X-Request-ID"] == sample.headers["X-Request-Id"]
        assert sample.headers["X-Request-Id"] in got.body.decode()
    if "event-stream" in want.headers.get("Content-Type", ""):
        if name == "chat_n2_stream":  # choices take turns as chance has it
            assert set(stream_shape(got)) == set(stream_shape(want))
        else:
            assert stream_shape(got) == stream_shape(want)
        assert got.body.endswith(b"data: [DONE]\n\n") == (b"data: [DONE]" in want.body)
    elif not want.body.strip():
        assert got.body == b""
    elif want.status >= 400:
        assert got.body.decode() == re.sub(r"\[[0-9:]{8}\] <path>:\d+: ", "", want.body.decode().strip())
    else:
        assert shape(got.json()) == shape(want.json())
