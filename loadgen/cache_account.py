"""What the servers' counters say of the prefix cache as a whole: the mean of cached tokens, and the KV turnover. Pure."""

from collections.abc import Mapping
from typing import Any

from fanmark.loadgen.reduced import CallKind, Rows


def cache_account(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, calls: Rows[CallKind], queries: int
) -> dict[str, Any]:
    """For `server` of summary.json, over all of a target's calls and queries, warm-up included.

    kv_written_tokens: tokens whose KV was computed and written since the run's start, prompts that were not cached and outputs;
    kv_turnover: that over the KV cache's capacity. Below 1 nothing of the run need have been evicted yet, so that the hit rate is an upper
    bound. cached_tokens_per_query: the server's own mean, over all arms; it says nothing of one arm unless that ran alone.
    """
    grown = {name: after[name] - before.get(name, 0.0) for name in after} if after and before is not None else {}
    cached = counted = grown.get("prompt_tokens_cached", grown.get("prefix_cache_hits"))
    prompt, output = grown.get("prompt_tokens"), grown.get("generation_tokens")
    if cached is None:  # a server that counts none, but tells it with each call
        cached = calls.where(lambda kind: kind.kind == "call" and kind.error is None).total("cached_tokens")
    capacity = (after or {}).get("kv_capacity_tokens")
    written = None if prompt is None or output is None or cached is None else prompt - cached + output
    return {
        "kv_capacity_tokens": capacity,
        "kv_written_tokens": written,
        "kv_turnover": written / capacity if written is not None and capacity else None,
        "cached_tokens_per_query": counted / queries if counted is not None and queries else None,
        "fresh_tokens_per_query": (prompt - counted) / queries if prompt and counted is not None and queries else None,
    }
