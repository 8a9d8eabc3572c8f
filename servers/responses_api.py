"""OpenAI's Responses API as vLLM 0.32 answers it: a request becomes the chat request that it stands for, its answer output items.

Rules of the file:
1. Pure. Nothing is stored: `store` is ignored, and a `previous_response_id` is unknown, as on vLLM by default.
2. `usage` stands in the last event of a stream, whatever was asked; there is no [DONE].
3. An answer that was cut ends with `response.completed` too: its status is "incomplete".
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fanmark.servers.answers import Answer
from fanmark.servers.blocks import Block, Blocks, Step
from fanmark.servers.body_fields import ApiError, Fields, bad_value
from fanmark.servers.openai_api import Ask, Limits, parse_chat
from fanmark.servers.openai_replies import Count, Head, dumps
from fanmark.servers.tokenizer import Tokenizer

# What a chat request calls by the same name.
_SAME = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
_EXTRA = (
    "include_stop_str_in_output",
    "priority",
    "cache_salt",
    "structured_outputs",
    "vllm_xargs",
    "chat_template_kwargs",
)
# A tool in the reply has these keys.
_TOOL = (
    "name",
    "parameters",
    "strict",
    "type",
    "allowed_callers",
    "async",
    "defer_loading",
    "description",
    "output_schema",
)
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")


def parse_responses(body: Mapping[str, Any], limits: Limits, tokenizer: Tokenizer) -> Ask:
    """Check a body of /v1/responses. Raises ApiError as vLLM would."""
    fields = Fields(body)
    fields.present("input")
    fields.integer("max_output_tokens")
    fields.text("instructions")
    fields.text("previous_response_id")
    tools = fields.objects("tools")
    fields.settle()
    earlier = body.get("previous_response_id")
    if earlier is not None:
        raise ApiError(404, f"Response with id '{earlier}' not found.", "invalid_request_error", "response_id")
    chat = {name: body[name] for name in (*_SAME, *_EXTRA) if name in body}
    chat["messages"] = _messages(body.get("instructions"), body["input"])
    chat["max_completion_tokens"] = body.get("max_output_tokens")
    chat["tools"] = [_chat_tool(tool) for tool in tools if tool.get("type") == "function"]
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    chat["tool_choice"] = choice if tools or choice != "auto" else None
    reasoning, text = body.get("reasoning"), body.get("text")
    if isinstance(reasoning, dict):
        chat["reasoning_effort"] = reasoning.get("effort")
    if isinstance(text, dict) and isinstance(text.get("format"), dict):
        chat["response_format"] = {**text["format"], "json_schema": text["format"]}
    ask = parse_chat(chat, limits, tokenizer)
    room = limits.max_model_len - ask.prompt_tokens
    return replace(ask, api="responses", body={**body, "max_output_tokens": min(ask.max_tokens or room, room)})


def _messages(instructions: str | None, given: Any) -> list[dict[str, Any]]:
    """The chat messages that instructions and input items stand for; a call joins the assistant's message before it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise bad_value("input must be a text or a list of items. (parameter=input)", "input")
    for item in given:
        kind = item.get("type", "message")
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if kind == "message":
            message = {"role": item.get("role", "user"), "content": _texts(item.get("content"))}
            if last is not None and message["role"] == "assistant" and last["content"] is None:
                last["content"] = message["content"]
            else:
                messages.append(message)
        elif kind == "function_call":
            if last is None:
                last = {"role": "assistant", "content": None}
                messages.append(last)
            function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
            last.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": _texts(item.get("output"))}
            )
        elif kind != "reasoning":  # what was thought is not read again
            raise bad_value(f"input items of type {kind!r} are not supported. (parameter=input)", "input")
    return messages


def _texts(content: Any) -> Any:
    """Content, or a tool's output, as chat has it: the parts' texts; what is not text is left for chat to refuse."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text", part.get("refusal", ""))}
        if isinstance(part, dict) and part.get("type") in _TEXT_PARTS
        else part
        for part in content
    ]


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: part for name, part in tool.items() if name != "type"}}


def whole_response(ask: Ask, head: Head, answers: Sequence[Answer], count: Count) -> dict[str, Any]:
    """The body of a reply that is not streamed."""
    answer = answers[0]
    number = head.id.removeprefix("resp_")
    blocks = [
        *([Block(0, "reasoning", text=answer.reasoning)] if answer.reasoning else ()),
        *([Block(0, "content", text=answer.content)] if answer.content else ()),
        *(Block(0, "call", call.id, call.name, call.arguments) for call in answer.calls),
    ]
    for index, block in enumerate(blocks):
        block.index = index
    output = [_item(number, block, "completed") for block in blocks]
    if answer.reasoning:
        output[0]["status"] = None
    return _response(ask, head, output, _status(answer), _usage(count))


def _status(answer: Answer) -> str:
    return "incomplete" if answer.finish == "length" else "completed"


def _usage(count: Count) -> dict[str, Any]:
    return {
        "input_tokens": count.prompt,
        "input_tokens_details": {
            "cached_tokens": count.cached or 0,
            "cache_write_tokens": count.created,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": count.completion,
        "output_tokens_details": {
            "reasoning_tokens": count.reasoning or 0,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": count.prompt + count.completion,
        **({} if count.work is None else {"fanmark": count.work}),
    }


def _response(
    ask: Ask, head: Head, output: Sequence[Mapping[str, Any]], status: str, usage: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The response object: the request's settings with their defaults, and what has come of it."""
    asked = ask.body
    tools = [{name: tool.get(name) for name in _TOOL} for tool in asked.get("tools") or ()]
    choice = asked.get("tool_choice", "auto") if tools else "none"
    if isinstance(choice, dict):
        choice = {"name": choice.get("name"), "type": choice.get("type")}
    reasoning = asked.get("reasoning")
    if isinstance(reasoning, dict):
        reasoning = {name: reasoning.get(name) for name in ("context", "effort", "generate_summary", "mode", "summary")}
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        "id": head.id,
        "created_at": head.created,
        "incomplete_details": reason,
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata"),
        "model": head.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "temperature": _or_one(asked.get("temperature")),
        "tool_choice": choice,
        "tools": tools,
        "top_p": _or_one(asked.get("top_p")),
        "background": False,
        "max_output_tokens": asked["max_output_tokens"],
        "max_tool_calls": asked.get("max_tool_calls"),
        "previous_response_id": None,
        "prompt": None,
        "reasoning": reasoning,
        "service_tier": asked.get("service_tier") or "auto",
        "status": status,
        "text": asked.get("text"),
        "top_logprobs": None,
        "truncation": asked.get("truncation") or "disabled",
        "usage": usage,
        "user": asked.get("user"),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _or_one(given: Any) -> float:
    return 1.0 if given is None else float(given)


def _item(number: str, block: Block, status: str) -> dict[str, Any]:
    """An output item. Its id is made of the reply's and its place."""
    done = status == "completed"
    if block.kind == "reasoning":
        shown = [{"text": block.text, "type": "reasoning_text"}] if done else None
        item = {"id": f"rs_{number}{block.index}", "summary": [], "type": "reasoning", "content": shown}
        return {**item, "encrypted_content": None, "status": status}
    if block.kind == "content":
        content = [_text_part(block.text, None)] if done else []
        item = {"id": f"msg_{number}{block.index}", "content": content, "role": "assistant", "status": status}
        return {**item, "type": "message", "phase": None}
    item = {"arguments": block.text if done else "", "call_id": block.id, "name": block.name, "type": "function_call"}
    item |= {"id": f"fc_{number}{block.index}", "async": None, "caller": None, "namespace": None}
    return {**item, "status": status}


def _text_part(text: str, logprobs: list[Any] | None) -> dict[str, Any]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


class ResponsesStream:
    """A streamed reply as events, see `openai_replies.Stream`; they are numbered through."""

    def __init__(self, ask: Ask, head: Head) -> None:
        self._ask, self._head = ask, head
        self._blocks = Blocks()
        self._done: list[Mapping[str, Any]] = []
        self._sent = 0

    def around(self, index: int) -> None:
        """No chunk is plain: each has a number of its own."""

    def opening(self, index: int, count: Count) -> bytes:
        """That the response exists, and that it is under way."""
        response = _response(self._ask, self._head, [], "in_progress", None)
        return b"".join(self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress"))

    def chunk(self, index: int, answer: Answer, token: int, count: Count) -> bytes:
        """The events of one token (its number in the answer)."""
        return b"".join(self._told(*step) for step in self._blocks.take(answer.deltas[token]))

    def closing(self, answers: Sequence[Answer], count: Count, *, with_usage: bool, with_done: bool) -> bytes:
        """The end of what is open, and the whole response with its usage, which are the end mark here."""
        ended = b"".join(self._told(*step) for step in self._blocks.end())
        if not with_done:
            return ended
        usage = _usage(count) if with_usage else None
        response = _response(self._ask, self._head, self._done, _status(answers[0]), usage)
        return ended + self._event("response.completed", response=response)

    def failure(self, error: Mapping[str, Any]) -> bytes:
        """The end of a stream whose engine died."""
        said = error["error"]
        return self._event("error", code=str(said["code"]), message=said["message"], param=said["param"])

    def _told(self, step: Step, block: Block, text: str) -> bytes:
        number = self._head.id.removeprefix("resp_")
        item = _item(number, block, "completed" if step == "ended" else "in_progress")
        if step == "ended":
            self._done.append(item)
        at = {"item_id": item["id"], "output_index": block.index}
        shown = {"item": item, "output_index": block.index}
        if block.kind == "call":
            name = "response.function_call_arguments"
            if step == "begun":
                return self._event("response.output_item.added", **shown)
            if step == "more":
                return self._event(f"{name}.delta", delta=text, **at)
            done = self._event(f"{name}.done", arguments=block.text, name=block.name, **at)
            return done + self._event("response.output_item.done", **shown)
        at["content_index"] = 0
        plain = block.kind == "content"
        name = "response.output_text" if plain else "response.reasoning_text"
        logprobs: dict[str, Any] = {"logprobs": []} if plain else {}
        if step == "more":
            return self._event(f"{name}.delta", delta=text, **at, **logprobs)
        if step == "begun":
            part = _text_part("", []) if plain else {"text": "", "type": "reasoning_text"}
            added = self._event("response.output_item.added", **shown)
            return added + self._event("response.content_part.added", part=part, **at)
        events = [
            self._event(f"{name}.done", text=block.text, **at, **logprobs),
            self._event("response.content_part.done", part=item["content"][0], **at),
            self._event("response.output_item.done", **shown),
        ]
        return b"".join(events)

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One event; its keys in the order of the alphabet, a name last."""
        body = {**fields, "sequence_number": self._sent, "type": kind}
        self._sent += 1
        ordered = {key: body[key] for key in sorted(body, key=lambda key: (key == "name", key))}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), dumps(ordered))
