"""The JSON that vLLM 0.32 answers with: whole replies, stream chunks and usage. Key for key as recorded from a real server.

Rules of the file:
1. Pure; bytes out. A stream's chunk around a token is built once a choice (`Stream.around`), not once a token.
2. `token_ids` and `prompt_token_ids` are null unless asked for; the fingerprint stands on the last chunk of a stream.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanmark.servers.answers import Answer
from fanmark.servers.openai_api import Ask

DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    """Compact JSON, as the server writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Head:
    """What every body of one reply begins with."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclass(slots=True)
class Count:
    """Tokens of one reply so far, over all its choices. `cached` is None where the server does not report it. `work`: what it took of the
    engine, once all have ended; no server but ours tells that."""

    prompt: int
    completion: int = 0
    reasoning: int | None = None
    cached: int | None = 0
    created: int = 0
    work: dict[str, float | None] | None = None


def usage(ask: Ask, count: Count, *, final: bool) -> dict[str, Any]:
    """`usage` of a whole reply (`final`) or of a stream's last chunk; the two differ in the same small ways as vLLM's."""
    details: dict[str, Any] | None = None
    if count.cached is not None:
        details = {"cached_tokens": count.cached}
        if ask.api == "chat":
            details["created_cache_tokens"] = count.created
        elif final:
            details["created_cache_tokens"] = None
        if final:
            details["multimodal_tokens"] = None
    body: dict[str, Any] = {
        "prompt_tokens": count.prompt,
        "total_tokens": count.prompt + count.completion,
        "completion_tokens": count.completion,
        "prompt_tokens_details": details,
    }
    if details is None and not final:
        del body["prompt_tokens_details"]
    if final or count.reasoning is not None:
        body["completion_tokens_details"] = _reasoning_details(count)
    if count.work is not None:
        body["fanmark"] = count.work
    return body


def _reasoning_details(count: Count) -> dict[str, int] | None:
    return None if count.reasoning is None else {"reasoning_tokens": count.reasoning}


def whole_reply(ask: Ask, head: Head, answers: Sequence[Answer], count: Count) -> dict[str, Any]:
    """The body of a reply that is not streamed; choice i belongs to prompt i // n."""
    chat = ask.api == "chat"
    choices = []
    for index, answer in enumerate(answers):
        choice: dict[str, Any] = {"index": index}
        if chat:
            choice["message"] = _message(answer)
        else:
            choice["text"] = answer.content or ""
        choice |= {"logprobs": None, "finish_reason": answer.finish, "stop_reason": answer.stop_reason}
        choice["token_ids"] = answer.ids if ask.return_token_ids else None
        if not chat:
            prompt = ask.prompts[index // ask.n]
            choice |= {"prompt_logprobs": None, "prompt_token_ids": list(prompt) if ask.return_token_ids else None}
        choice["routed_experts"] = None
        choices.append(choice)
    body: dict[str, Any] = {
        "id": head.id,
        "object": "chat.completion" if chat else "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": head.fingerprint,
        "usage": usage(ask, count, final=True),
    }
    if chat:
        prompt_ids = list(ask.prompts[0]) if ask.return_token_ids else None
        body |= {"prompt_logprobs": None, "prompt_token_ids": prompt_ids, "prompt_text": None}
    return body | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    message |= {"refusal": None, "annotations": None, "audio": None, "function_call": None}
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    message["reasoning"] = answer.reasoning
    return message


class Stream:
    """Chunks of one streamed reply, as the bytes of server-sent events."""

    def __init__(self, ask: Ask, head: Head) -> None:
        self._ask = ask
        self._chat = ask.api == "chat"
        self._fingerprint = b',"system_fingerprint":' + dumps(head.fingerprint)
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        opened = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
        self._opened = b"data: " + dumps(opened)[:-1] + b',"choices":['
        self._key = b'"delta":' if self._chat else b'"text":'

    def opening(self, index: int, count: Count) -> bytes:
        """The first chunk of a chat choice: its role. A completion has none."""
        if not self._chat:
            return b""
        delta = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' % index
        ids = dumps(list(self._ask.prompts[0])) if self._ask.return_token_ids else b"null"
        return b'%b%b%b,"prompt_token_ids":%b,"prompt_text":null}\n\n' % (self._opened, delta, self._usage(count), ids)

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        """What stands before and after a delta in a plain chunk: not the last, and no ids and no usage asked for (None)."""
        if self._ask.return_token_ids or self._ask.continuous_usage:
            return None
        head = b'%b{"index":%d,%b' % (self._opened, index, self._key)
        return head, self._after(b"null", b"", b"null", b"null") + b"}\n\n"

    def chunk(self, index: int, answer: Answer, token: int, count: Count) -> bytes:
        """The chunk of one token (its number in the answer), with everything that it may carry."""
        ask = self._ask
        last = token == len(answer.ids) - 1
        ids = b"[%d]" % answer.ids[token] if ask.return_token_ids else b"null"
        prompt = dumps(list(ask.prompts[index // ask.n])) if ask.return_token_ids and token == 0 else b"null"
        finish = dumps(answer.finish) if last else b"null"
        stop = b',"stop_reason":' + dumps(answer.stop_reason) if last else b""
        after = self._after(finish, stop, ids, prompt) + self._usage(count)
        if last and not ask.include_usage:
            after += self._fingerprint
        return b'%b{"index":%d,%b%b%b}\n\n' % (self._opened, index, self._key, answer.deltas[token], after)

    def _after(self, finish: bytes, stop: bytes, ids: bytes, prompt: bytes) -> bytes:
        if self._chat:
            return b',"logprobs":null,"finish_reason":%b%b,"token_ids":%b}]' % (finish, stop, ids)
        stop = stop or b',"stop_reason":null'
        return b',"logprobs":null,"finish_reason":%b%b,"prompt_token_ids":%b,"token_ids":%b}]' % (
            finish,
            stop,
            prompt,
            ids,
        )

    def _usage(self, count: Count) -> bytes:
        if not self._ask.continuous_usage:
            return b""
        body = {
            "prompt_tokens": count.prompt,
            "total_tokens": count.prompt + count.completion,
            "completion_tokens": count.completion,
            "completion_tokens_details": _reasoning_details(count),
        }
        return b',"usage":' + dumps(body)

    def closing(self, answers: Sequence[Answer], count: Count, *, with_usage: bool, with_done: bool) -> bytes:
        """What follows the last choice's end: a chunk that carries the usage, if it was asked for, and the end mark."""
        done = DONE if with_done else b""
        if not (self._ask.include_usage and with_usage):
            return done
        shown = dumps(usage(self._ask, count, final=False))
        return b'%b],"usage":%b%b}\n\n%b' % (self._opened, shown, self._fingerprint, done)

    def failure(self, error: Mapping[str, Any]) -> bytes:
        """The end of a stream whose engine died."""
        return b"data: %b\n\n%b" % (dumps(error), DONE)


def models(model: str, max_model_len: int, created: int, permission_id: str) -> dict[str, Any]:
    """The body of /v1/models."""
    permission = {
        "id": permission_id,
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    card = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": model,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
    return {"object": "list", "data": [card]}
