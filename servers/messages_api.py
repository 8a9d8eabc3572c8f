"""Anthropic's Messages API as vLLM 0.32 answers it: a request becomes the chat request that it stands for, its answer content blocks.

Rules of the file:
1. Pure. Usage splits the prompt: `input_tokens` are those that were neither read from the cache nor written to it. Of a stream, the
   first event has the whole prompt, as nothing is known of the cache yet; the last one counts.
2. A wrong type is refused in OpenAI's form, as the framework's validation does it there; all else in Anthropic's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fanmark.servers.answers import Answer
from fanmark.servers.blocks import Block, Blocks, Step
from fanmark.servers.body_fields import ApiError, Fields, bad_value
from fanmark.servers.openai_api import Ask, Limits, parse_chat
from fanmark.servers.openai_replies import Count, Head, dumps
from fanmark.servers.tokenizer import Tokenizer

_SAME = ("model", "temperature", "top_p", "stream", "cache_salt", "vllm_xargs", "chat_template_kwargs")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_KINDS = {"reasoning": "thinking", "content": "text", "call": "tool_use"}


def parse_messages(body: Mapping[str, Any], limits: Limits, tokenizer: Tokenizer) -> Ask:
    """Check a body of /v1/messages. Raises ApiError as vLLM would."""
    fields = Fields(body)
    fields.present("max_tokens")
    max_tokens = fields.integer("max_tokens")
    messages = fields.objects("messages", required=True)
    tools = fields.objects("tools")
    stops = fields.texts("stop_sequences")
    choice, thinking = fields.mapping("tool_choice"), fields.mapping("thinking")
    fields.settle()
    chat = {name: body[name] for name in _SAME if name in body}
    system = _text(body.get("system"))
    chat["messages"] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        chat["messages"] += _chat_messages(message)
    chat |= {"max_tokens": max_tokens, "stop": stops}
    chat["tools"] = [
        {"type": "function", "function": {**_without(tool, "input_schema"), "parameters": tool.get("input_schema")}}
        for tool in tools
    ]
    if choice is not None:
        kind = choice.get("type")
        named = {"type": "function", "function": {"name": choice.get("name")}}
        chat["tool_choice"] = named if kind == "tool" else _CHOICES.get(str(kind), kind)
        chat["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use")
    if thinking is not None and thinking.get("type") == "enabled":
        chat["thinking_token_budget"] = thinking.get("budget_tokens")
    return replace(parse_chat(chat, limits, tokenizer), api="messages")


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _text(content: Any) -> str:
    """A system text, or a tool's result: a text or text blocks."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise bad_value("content must be a text or a list of blocks.", "messages")
    return "\n".join(str(block.get("text", "")) for block in content if block.get("type") == "text")


def _chat_messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chat messages that one message stands for: a tool's results come before what the user says beside them."""
    content = message.get("content")
    if not isinstance(content, list):
        return [{"role": message.get("role"), "content": content}]
    results: list[dict[str, Any]] = []
    parts: list[Any] = []
    calls: list[dict[str, Any]] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            results.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _text(block.get("content"))}
            )
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):  # what was thought is not read again
            parts.append(block)
    said: dict[str, Any] = {"role": message.get("role"), "content": parts or None}
    if calls:
        said["tool_calls"] = calls
    return [*results, said] if parts or calls else results


def refusal(error: ApiError) -> Mapping[str, Any]:
    """The body that says why a request was refused."""
    if error.kind == "Bad Request":
        return error.body()
    return {"type": "error", "error": {"type": error.kind, "message": error.message}}


def whole_message(ask: Ask, head: Head, answers: Sequence[Answer], count: Count) -> dict[str, Any]:
    """The body of a reply that is not streamed."""
    answer = answers[0]
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": head.id[-16:]})
    if answer.content or not (answer.reasoning or answer.calls):
        content.append({"type": "text", "text": answer.content or ""})
    for call in answer.calls:
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": head.model,
        **{name: said for name, said in _stop(answer).items() if said is not None},
        "usage": _usage(count),
    }


def _stop(answer: Answer) -> dict[str, Any]:
    """Why the answer ended. A forced call reads "stop" in chat, and is a tool's use here."""
    if answer.finish == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if answer.calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(answer.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(count: Count) -> dict[str, Any]:
    work = {} if count.work is None else {"fanmark": count.work}
    if count.cached is None:
        return {"input_tokens": count.prompt, "output_tokens": count.completion, **work}
    return {
        "input_tokens": count.prompt - count.cached - count.created,
        "output_tokens": count.completion,
        "cache_creation_input_tokens": count.created,
        "cache_read_input_tokens": count.cached,
        **work,
    }


class MessagesStream:
    """A streamed reply as events, see `openai_replies.Stream`."""

    def __init__(self, ask: Ask, head: Head) -> None:
        self._head = head
        self._blocks = Blocks()

    def around(self, index: int) -> None:
        """No chunk is plain: each names its block."""

    def opening(self, index: int, count: Count) -> bytes:
        """The empty message, with the prompt's length."""
        head = {"id": self._head.id, "type": "message", "role": "assistant", "content": [], "model": self._head.model}
        usage = {"input_tokens": count.prompt, "output_tokens": 0}
        return _event("message_start", message={**head, "stop_reason": None, "stop_sequence": None, "usage": usage})

    def chunk(self, index: int, answer: Answer, token: int, count: Count) -> bytes:
        """The events of one token (its number in the answer)."""
        return b"".join(self._told(*step) for step in self._blocks.take(answer.deltas[token]))

    def closing(self, answers: Sequence[Answer], count: Count, *, with_usage: bool, with_done: bool) -> bytes:
        """The end of what is open, why it ended and what was used, and the end mark."""
        ended = b"".join(self._told(*step) for step in self._blocks.end())
        usage = {"usage": _usage(count)} if with_usage else {}
        said = ended + _event("message_delta", delta=_stop(answers[0]), **usage)
        return said + (_event("message_stop") if with_done else b"")

    def failure(self, error: Mapping[str, Any]) -> bytes:
        """The end of a stream whose engine died."""
        return _event("error", error={"type": "internal_error", "message": error["error"]["message"]})

    def _told(self, step: Step, block: Block, text: str) -> bytes:
        at, kind = block.index, _KINDS[block.kind]
        if step == "begun":
            empty = {"id": block.id, "name": block.name, "input": {}} if block.kind == "call" else {kind: ""}
            return _event("content_block_start", content_block={"type": kind, **empty}, index=at)
        if step == "more":
            name, part = ("input_json_delta", "partial_json") if block.kind == "call" else (f"{kind}_delta", kind)
            return _event("content_block_delta", delta={"type": name, part: text}, index=at)
        signature = {"type": "signature_delta", "signature": self._head.id[-16:]}
        signed = _event("content_block_delta", delta=signature, index=at) if block.kind == "reasoning" else b""
        return signed + _event("content_block_stop", index=at)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), dumps({"type": kind, **fields}))
