"""The real vLLM behaves as the rest of the tests rely on: template, exact lengths, prefix cache, counters."""

from __future__ import annotations

import json
import re
import urllib.request
import uuid
from typing import Any, cast

import pytest
from openai import OpenAI
from openai.types import CompletionUsage

pytestmark = pytest.mark.vllm

BLOCK_TOKENS = 32
COUNTERS = ("prompt_tokens", "prompt_tokens_cached", "generation_tokens", "prefix_cache_hits")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:
        text: str = reply.read().decode()
        return text


def tokens(vllm_url: str, **body: Any) -> int:
    """The server's own count for a prompt or for messages."""
    request = urllib.request.Request(
        vllm_url.removesuffix("/v1") + "/tokenize",
        json.dumps({"model": "tiny", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        count: int = json.load(reply)["count"]
        return count


def counters(vllm_url: str) -> dict[str, float]:
    """The server's token counters, and requests by the reason for which they finished."""
    text = get(vllm_url.removesuffix("/v1") + "/metrics")
    values = {}
    for name in COUNTERS:
        values[name] = sum(float(v) for v in re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", text, re.M))
    for reason, value in re.findall(r'^vllm:request_success_total\{.*finished_reason="(\w+)".*\} (\S+)$', text, re.M):
        values[reason] = values.get(reason, 0.0) + float(value)
    return values


def streamed_chat(vllm_url: str, messages: list[dict[str, str]], max_tokens: int, salt: str) -> CompletionUsage:
    """One streamed chat of exactly `max_tokens` tokens, by the openai SDK; the usage that came last."""
    with OpenAI(base_url=vllm_url, api_key="none") as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=cast(Any, messages),
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "cache_salt": salt},
        )
        chunks = list(stream)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    usage: CompletionUsage | None = chunks[-1].usage
    assert usage is not None
    return usage


def cached(usage: CompletionUsage) -> int | None:
    details = usage.prompt_tokens_details
    assert details is not None
    return details.cached_tokens


def test_model_and_context(vllm_url: str) -> None:
    (model,) = json.loads(get(vllm_url + "/models"))["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 16_384)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param({"role": "user", "content": "What is the answer to it all?"}, id="plain text"),
        pytest.param(
            {"role": "assistant", "content": " starts with a space, ends with one "}, id="spaces at both ends"
        ),
        pytest.param({"role": "user", "content": ""}, id="no text at all"),
        pytest.param({"role": "user", "content": "Grüße, 世界! 🙂 ½"}, id="bytes outside ASCII"),
    ],
)
def test_messages_add_up(vllm_url: str, second: dict[str, str]) -> None:
    """The template is additive: a conversation has the tokens of its messages, and a fixed opening of the reply."""
    first = {"role": "system", "content": "You are a careful assistant."}
    one, two, both = (
        tokens(vllm_url, messages=m, add_generation_prompt=False) for m in ([first], [second], [first, second])
    )
    assert both == one + two
    openings = {
        tokens(vllm_url, messages=m) - tokens(vllm_url, messages=m, add_generation_prompt=False)
        for m in ([first], [second], [first, second])
    }
    assert len(openings) == 1


def test_words_of_one_token_make_exact_lengths(vllm_url: str) -> None:
    """A message grows by one token for each word that is one token with the space before it."""
    candidates = ("return", "the", "self", "value", "name", "type", "error", "is", "not", "list")
    words = [word for word in candidates if tokens(vllm_url, prompt=" " + word) == 1]
    assert len(words) >= 5
    share = tokens(vllm_url, messages=[{"role": "user", "content": ""}])
    for count in (1, 10, 200):
        text = "".join(" " + words[i % len(words)] for i in range(count))
        assert tokens(vllm_url, messages=[{"role": "user", "content": text}]) == share + count


def test_streamed_chat_has_the_length_asked_for_and_salts_keep_caches_apart(vllm_url: str) -> None:
    """Same prompt: nothing cached at first, whole blocks the second time, nothing under another salt; counters agree."""
    messages = [{"role": "user", "content": "the answer is " * 100}]
    prompt_tokens = tokens(vllm_url, messages=messages)
    whole_blocks = (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    salt, other = uuid.uuid4().hex, uuid.uuid4().hex
    before = counters(vllm_url)
    usages = [streamed_chat(vllm_url, messages, 24, s) for s in (salt, salt, other)]
    after = counters(vllm_url)
    assert [u.prompt_tokens for u in usages] == [prompt_tokens] * 3
    assert [u.completion_tokens for u in usages] == [24] * 3
    assert [cached(u) for u in usages] == [0, whole_blocks, 0]
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["prompt_tokens"] == 3 * prompt_tokens
    assert grown["prompt_tokens_cached"] == grown["prefix_cache_hits"] == whole_blocks
    assert grown["generation_tokens"] == 72
    assert grown["length"] == 3


def test_completion_from_token_ids_counts_them_exactly(vllm_url: str) -> None:
    """`/v1/completions` takes token ids as they are: no template, nothing added."""
    with OpenAI(base_url=vllm_url, api_key="none") as client:
        reply = client.completions.create(
            model="tiny",
            prompt=[300 + i for i in range(500)],
            max_tokens=7,
            extra_body={"ignore_eos": True, "cache_salt": uuid.uuid4().hex},
        )
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (500, 7)


def test_what_the_context_cannot_hold_is_cut_without_an_error(vllm_url: str) -> None:
    """16,382 tokens of prompt leave room for 2 of the 3 asked for: vLLM answers 200 with 2, so a run must check."""
    with OpenAI(base_url=vllm_url, api_key="none", max_retries=0) as client:
        ids = [300 + i % 3_000 for i in range(16_382)]
        reply = client.completions.create(model="tiny", prompt=ids, max_tokens=3, extra_body={"ignore_eos": True})
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (16_382, 2)
    assert reply.choices[0].finish_reason == "length"
