"""The stub's /v1/responses and /v1/messages: the same prompts and answers as chat's, whole and in pieces, and real SDKs that read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stub_process import Stub, running_stub

from fanmark.servers.answers import Lengths, Speaker
from fanmark.servers.body_fields import ApiError
from fanmark.servers.messages_api import MessagesStream, parse_messages, refusal, whole_message
from fanmark.servers.openai_api import Ask, Limits, parse_chat
from fanmark.servers.openai_replies import Count, Head
from fanmark.servers.responses_api import ResponsesStream, parse_responses, whole_response
from fanmark.servers.stub import main
from fanmark.servers.tokenizer import Tokenizer, vocabulary

TOKENIZER = Tokenizer(vocabulary())
LIMITS = Limits("tiny", 4000)
SPEAKER = Speaker(TOKENIZER, Lengths(), 4000)
HEAD = Head("resp_0123456789abcdef", 1, "tiny", "print")
SCHEMA = {"type": "object", "properties": {"task": {"type": "string"}}, "required": ["task"]}
CHAT_TOOL = {"type": "function", "function": {"name": "hand_over", "description": "d", "parameters": SCHEMA}}
ITEM_TOOL = {"type": "function", "name": "hand_over", "description": "d", "parameters": SCHEMA}
BLOCK_TOOL = {"name": "hand_over", "description": "d", "input_schema": SCHEMA}

# A turn: what the user says; the assistant's text, the arguments of its calls, and their results.
TEXTS = st.text("ab c", min_size=1, max_size=8)
TURNS = st.lists(st.tuples(TEXTS, TEXTS | st.none(), st.lists(st.tuples(TEXTS, TEXTS), max_size=2)), max_size=3)


def as_chat(system: str, turns: Sequence[Any], last: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for said, text, calls in turns:
        messages.append({"role": "user", "content": said})
        asked = [
            {"id": f"c{i}", "function": {"name": "hand_over", "arguments": json.dumps({"task": task})}}
            for i, (task, _) in enumerate(calls)
        ]
        messages.append({"role": "assistant", "content": text, "tool_calls": asked})
        messages += [{"role": "tool", "tool_call_id": f"c{i}", "content": got} for i, (_, got) in enumerate(calls)]
    return {"messages": [*messages, {"role": "user", "content": last}], "tools": [CHAT_TOOL]}


def as_items(system: str, turns: Sequence[Any], last: str) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for said, text, calls in turns:
        items.append({"role": "user", "content": [{"type": "input_text", "text": said}]})
        if text is not None:
            items.append({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]})
        for i, (task, _) in enumerate(calls):
            arguments = json.dumps({"task": task})
            items.append({"type": "function_call", "call_id": f"c{i}", "name": "hand_over", "arguments": arguments})
        items += [
            {"type": "function_call_output", "call_id": f"c{i}", "output": got} for i, (_, got) in enumerate(calls)
        ]
    items.append({"role": "user", "content": last})
    return {"instructions": system, "input": items, "tools": [ITEM_TOOL]}


def as_blocks(system: str, turns: Sequence[Any], last: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for said, text, calls in turns:
        messages.append({"role": "user", "content": [*results, {"type": "text", "text": said}]})
        blocks: list[dict[str, Any]] = [] if text is None else [{"type": "text", "text": text}]
        for i, (task, _) in enumerate(calls):
            blocks.append({"type": "tool_use", "id": f"c{i}", "name": "hand_over", "input": {"task": task}})
        messages.append({"role": "assistant", "content": blocks})
        results = [{"type": "tool_result", "tool_use_id": f"c{i}", "content": got} for i, (_, got) in enumerate(calls)]
    messages.append({"role": "user", "content": [*results, {"type": "text", "text": last}]})
    return {"system": [{"type": "text", "text": system}], "messages": messages, "tools": [BLOCK_TOOL], "max_tokens": 9}


@given(TEXTS, TURNS, TEXTS)
def test_a_conversation_is_the_same_prompt_in_all_three_forms(system: str, turns: Sequence[Any], last: str) -> None:
    texts = parse_chat(as_chat(system, turns, last), Limits("tiny", 4000, auto_tool_calls=0), TOKENIZER)
    if not texts.prompts[0]:
        return
    tools = len(TOKENIZER.encode(json.dumps([CHAT_TOOL])))
    for parse, body in ((parse_responses, as_items), (parse_messages, as_blocks)):
        ask = parse(body(system, turns, last), LIMITS, TOKENIZER)
        assert list(ask.prompts[0])[tools:] == list(texts.prompts[0])[tools:], parse.__name__
        assert len(ask.prompts[0]) == len(texts.prompts[0])


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each name stands before its own data."""
    found = []
    for chunk in data.decode().split("\n\n")[:-1]:
        name, said = chunk.split("\n")
        event = json.loads(said.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def streamed(stream: ResponsesStream | MessagesStream, ask: Ask) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """The events of an answer's stream, and its whole form by the same counts."""
    answer = SPEAKER.answer(ask, ask.prompts[0], 0)
    count = Count(ask.prompt_tokens, cached=16, created=32)
    data = stream.opening(0, count)
    for token in range(len(answer.ids)):
        count.completion += 1
        if answer.deltas[token]:
            data += stream.chunk(0, answer, token, count)
    count.reasoning = answer.reasoning_tokens
    data += stream.closing([answer], count, with_usage=True, with_done=True)
    whole = whole_response if ask.api == "responses" else whole_message
    return events(data), whole(ask, HEAD, [answer], count)


# A limit, which choice of tools, a seed. A call that is cut reads as text in a whole reply, as on vLLM, so none is cut here.
WISHES = st.tuples(st.integers(1, 90), st.just("none"), st.integers(0, 5)) | st.tuples(
    st.just(900), st.just("required"), st.integers(0, 5)
)


@given(WISHES, st.booleans(), st.none() | st.integers(1, 80))
def test_items_of_a_stream_make_the_whole_response(wish: tuple[int, str, int], thinks: bool, ends: int | None) -> None:
    limit, choice, seed = wish
    extra = {} if ends is None else {"vllm_xargs": {"answer_tokens": ends}}
    kwargs = {"chat_template_kwargs": {"enable_thinking": thinks}}
    body = {"input": "the ocean", "max_output_tokens": limit, "tools": [ITEM_TOOL], "stream": True, **kwargs}
    ask = parse_responses({**body, "tool_choice": choice, "seed": seed, **extra}, LIMITS, TOKENIZER)
    said, whole = streamed(ResponsesStream(ask, HEAD), ask)
    assert [event["sequence_number"] for event in said] == list(range(len(said)))
    assert [event["type"] for event in said[:2]] == ["response.created", "response.in_progress"]
    done = [event["item"] for event in said if event["type"] == "response.output_item.done"]
    assert said[-1]["type"] == "response.completed" and said[-1]["response"] == {**whole, "output": done}
    assert done == [{**item, "status": "completed"} for item in whole["output"]]
    pieces: dict[str, str] = {}
    for event in said:
        if event["type"].endswith(".delta"):
            pieces[event["item_id"]] = pieces.get(event["item_id"], "") + event["delta"]
    for item in done:
        assert pieces[item["id"]] == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    assert whole["usage"]["output_tokens"] == len(SPEAKER.answer(ask, ask.prompts[0], 0).ids)
    assert whole["status"] == ("incomplete" if whole["incomplete_details"] else "completed")


@given(WISHES, st.none() | st.integers(1, 40), st.sampled_from([[], ["e"], ["zzz"]]))
def test_blocks_of_a_stream_make_the_whole_message(
    wish: tuple[int, str, int], budget: int | None, stops: list[str]
) -> None:
    limit, chosen, _ = wish
    body = {"messages": [{"role": "user", "content": "the ocean"}], "max_tokens": limit, "stream": True}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": budget}} if budget else {}
    choice = {"type": "any" if chosen == "required" else "none"}
    body |= {"tools": [BLOCK_TOOL], "tool_choice": choice, "stop_sequences": stops, **thinking}
    ask = parse_messages(body, LIMITS, TOKENIZER)
    said, whole = streamed(MessagesStream(ask, HEAD), ask)
    blocks: dict[int, dict[str, Any]] = {}
    for event in said:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = event["content_block"]
        elif event["type"] == "content_block_delta":
            block, (name, piece) = blocks[event["index"]], list(event["delta"].items())[1]
            block[name] = block.get(name, "") + piece
    for block in blocks.values():
        if "partial_json" in block:
            block["input"] = json.loads(block.pop("partial_json"))
    shown = [block for _, block in sorted(blocks.items())]
    assert shown == [block for block in whole["content"] if block.get("text") != ""]
    assert said[-1] == {"type": "message_stop"}
    stop = {name: said[-2]["delta"][name] for name in ("stop_reason", "stop_sequence")}
    assert stop == {name: whole.get(name) for name in stop}
    assert said[-2]["usage"] == whole["usage"]
    usage, start = whole["usage"], said[0]["message"]["usage"]
    parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert sum(usage[name] for name in parts) == ask.prompt_tokens == start["input_tokens"]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    # a body of /v1/responses, status, part of the message
    ({}, 400, "Field required"),
    ({"input": 7}, 400, "input must be a text or a list of items"),
    ({"input": ["hello"]}, 400, "input must be a text or a list of items"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "'item_reference' are not supported"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "not a multimodal model"),
    ({"input": "hello", "previous_response_id": "resp_9"}, 404, "Response with id 'resp_9' not found."),
    ({"input": "hello", "tools": "x"}, 400, "Input should be a valid list"),
    ({"input": "hello", "tool_choice": "required"}, 400, "`tools` must be set"),
]


@pytest.mark.parametrize(("body", "status", "why"), REFUSED)
def test_a_wrong_responses_request_is_refused_with_its_reason(body: dict[str, Any], status: int, why: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_responses(body, LIMITS, TOKENIZER)
    assert refused.value.status == status
    assert why in refused.value.message


REFUSED_MESSAGES: list[tuple[dict[str, Any], str | None, str]] = [
    # a body of /v1/messages, what the error's body says its type is, part of the message
    ({"max_tokens": 5}, None, "Field required"),
    ({"max_tokens": 5, "messages": []}, "error", "empty conversation"),
    ({"max_tokens": 0, "messages": [{"role": "user", "content": "a"}]}, "error", "max_tokens must be at least 1"),
    ({"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "error", "multimodal"),
    ({"max_tokens": 5, "messages": [{"role": "user", "content": "a"}], "system": 7}, "error", "content must be a text"),
]


@pytest.mark.parametrize(("body", "kind", "why"), REFUSED_MESSAGES)
def test_a_wrong_messages_request_is_refused_in_its_form(body: dict[str, Any], kind: str | None, why: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_messages(body, LIMITS, TOKENIZER)
    shown = refusal(refused.value)
    assert shown.get("type") == kind
    assert why in shown["error"]["message"]


@pytest.mark.real
def test_the_openai_sdk_reads_responses(stub: Stub) -> None:
    """Whole, streamed, with a tool's call and result; usage equals the server's own counters."""
    from openai import OpenAI

    before = stub.metrics()
    words = " ".join(TOKENIZER.words[k % 90] for k in range(200))
    with OpenAI(base_url=f"{stub.url}/v1", api_key="none", max_retries=0) as client:
        tool: Any = {**ITEM_TOOL, "strict": False}
        first = client.responses.create(model=MODEL, input=words, tools=[tool], max_output_tokens=200)
        (call,) = first.output
        assert call.type == "function_call" and set(json.loads(call.arguments)) == {"task"}
        items: Any = [
            {"role": "user", "content": words},
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "fine"},
        ]
        with client.responses.stream(model=MODEL, input=items, tools=[tool], max_output_tokens=20) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            last = stream.get_final_response()
    assert (last.output_text, last.status) == (text, "incomplete")
    assert last.usage is not None and first.usage is not None
    assert last.usage.input_tokens_details.cached_tokens >= 192
    after, used = stub.metrics(), (first.usage, last.usage)
    for name, total in (
        ("prompt_tokens", sum(usage.input_tokens for usage in used)),
        ("prompt_tokens_cached", sum(usage.input_tokens_details.cached_tokens for usage in used)),
        ("generation_tokens", sum(usage.output_tokens for usage in used)),
    ):
        sample = f'vllm:{name}_total{{engine="0",model_name="{MODEL}"}}'
        assert after[sample] - before[sample] == total


MODEL = "qwen3-30b-a3b"


@pytest.mark.real
def test_both_apis_are_served_with_faults_and_errors_in_their_form(stub: Stub) -> None:
    message = {"messages": [{"role": "user", "content": "the ocean"}], "max_tokens": 8, "stream": True}
    response = {"input": "the ocean", "max_output_tokens": 8, "stream": True}
    try:
        stub.send("POST", "/admin/faults", {"faults": [{"kind": "error-event", "tokens": 2}]})
        died = events(stub.send("POST", "/v1/messages", message).body)
        assert (died[-1]["type"], died[-1]["error"]["type"]) == ("error", "internal_error")
        died = events(stub.send("POST", "/v1/responses", response).body)
        assert (died[-1]["type"], died[-1]["code"]) == ("error", "500")
        stub.send("POST", "/admin/faults", {"faults": [{"kind": "no-usage"}]})
        assert events(stub.send("POST", "/v1/responses", response).body)[-1]["response"]["usage"] is None
        assert "usage" not in events(stub.send("POST", "/v1/messages", message).body)[-2]
    finally:
        stub.send("DELETE", "/admin/faults")
    wrong = stub.send("POST", "/v1/messages", {**message, "model": "nope"})
    assert (wrong.status, wrong.json()["type"]) == (404, "error")


@pytest.mark.real
def test_the_log_has_a_line_for_each_answered_request(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with running_stub("--log", str(log), "--time-scale", "0.05") as stub:
        whole = stub.chat("the ocean", max_tokens=5, ignore_eos=True).json()
        stub.send("POST", "/v1/messages", {"messages": [{"role": "user", "content": "the sea"}], "max_tokens": 7})
        assert stub.chat("", max_tokens=5).status == 400
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["path"], line["input_tokens"], line["output_tokens"], line["ended"]) for line in lines] == [
        ("/v1/chat/completions", 2, 5, True),
        ("/v1/messages", 2, 7, True),
    ]
    assert lines[0]["id"] == whole["id"]


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    assert main(["--log", str(tmp_path / "none" / "log.jsonl")]) == 2
