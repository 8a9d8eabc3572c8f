"""What a target's servers say of themselves at /metrics, in our words: the names of vLLM, SGLang and TensorRT-LLM stand in one table.

Rules of the file:
1. A server is known by the names that it exposes, whatever else it says of itself.
2. Counters and gauges are summed over labels, engines and replicas; `kv_use` is their mean.
3. A sum needs all its parts: where one of several addresses is silent, nothing is known.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fanmark.loadgen.errors import CallError

SERVERS = {"vllm": "vllm:", "sglang": "sglang:", "trtllm": "trtllm_", "triton": "nv_trt_llm_"}  # known by these names
LATENESS = "fanmark_stub_step_lateness_seconds"  # of our stub: how late its steps' results went out, a histogram

# our word: what the servers call it. vLLM 0.32, SGLang 0.5, trtllm-serve 1.3, Triton's TensorRT-LLM backend; who lacks it has no entry
COUNTERS: dict[str, tuple[str, ...]] = {
    "prompt_tokens": ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total", "trtllm_prompt_tokens_total"),
    "generation_tokens": (
        "vllm:generation_tokens_total",
        "sglang:generation_tokens_total",
        "trtllm_generation_tokens_total",
    ),
    "prompt_tokens_cached": ("vllm:prompt_tokens_cached_total", "sglang:cached_tokens_total"),
    "request_success": ("vllm:request_success_total", "sglang:num_requests_total", "trtllm_request_success_total"),
    "request_success_abort": ("sglang:num_aborted_requests_total",),  # the others have a label for it
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_requests_total"),
    "prefix_cache_queries": ("vllm:prefix_cache_queries_total",),
    "prefix_cache_hits": ("vllm:prefix_cache_hits_total",),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens_total", "trtllm_spec_decode_num_draft_tokens_total"),
    "accepted_draft_tokens": (
        "vllm:spec_decode_num_accepted_tokens_total",
        "trtllm_spec_decode_num_accepted_tokens_total",
    ),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "running": (
        "vllm:num_requests_running",
        "sglang:num_running_reqs",
        "trtllm_num_requests_running",
        "nv_trt_llm_request_metrics scheduled",
    ),
    "waiting": (
        "vllm:num_requests_waiting",
        "sglang:num_queue_reqs",
        "trtllm_num_requests_waiting",
        "nv_trt_llm_request_metrics waiting",
    ),
    "kv_use": (
        "vllm:kv_cache_usage_perc",
        "sglang:token_usage",
        "trtllm_kv_cache_utilization",
        "nv_trt_llm_kv_cache_block_metrics fraction",
    ),
    "joules": ("fanmark_stub_joules_total",),
    "engine_busy_s": ("fanmark_stub_busy_seconds_total",),
    "engine_slack_s": ("fanmark_stub_attributed_seconds_total slack",),
    "engine_waste_s": ("fanmark_stub_attributed_seconds_total waste",),
    "kv_capacity_tokens": ("sglang:max_total_num_tokens",),  # the others tell blocks and their size
    "kv_blocks": ("trtllm_kv_cache_max_blocks", "nv_trt_llm_kv_cache_block_metrics max"),
    "kv_block_tokens": ("trtllm_kv_cache_tokens_per_block", "nv_trt_llm_kv_cache_block_metrics tokens_per"),
}
_CACHE_INFO = (
    "vllm:cache_config_info",
    "sglang:cache_config_info",
    "trtllm_kv_cache_config_info",
)  # settings as labels
_NARROWED = {
    "fanmark_stub_attributed_seconds_total": "kind",
    "nv_trt_llm_request_metrics": "request_type",
    "nv_trt_llm_kv_cache_block_metrics": "kv_cache_block_type",
}
_WORDS = {name: word for table in (COUNTERS, GAUGES) for word, names in table.items() for name in names}
_MEANS = ("kv_use", "kv_block_tokens")
_SPELLINGS = (("sglang_", "sglang:"), ("trtllm:", "trtllm_"))  # as some versions write their prefix
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Reading:
    """One look at a target's servers: counters and gauges by our words, and the settings of the KV cache as the server tells them."""

    server: str
    values: Mapping[str, float]
    cache: Mapping[str, str] = field(default_factory=dict)


def unfinished(reading: Reading | None) -> float:
    """Requests that run or wait at the servers; 0 where they do not tell."""
    return 0.0 if reading is None else reading.values.get("running", 0.0) + reading.values.get("waiting", 0.0)


def parse(text: str) -> Reading | None:
    """One scrape; None where no server that we know speaks."""
    found: dict[str, list[float]] = {}
    cache: dict[str, str] = {}
    server = ""
    for line in text.splitlines():
        declared = line.startswith("# TYPE ")  # a server that has served nothing yet may expose no more than that
        head, brace, rest = line.removeprefix("# TYPE ").partition("{")
        labels, _, tail = rest.rpartition("}")
        name, _, plain = (head, "", tail) if brace else head.partition(" ")
        for spelt, ours in _SPELLINGS:
            name = ours + name.removeprefix(spelt) if name.startswith(spelt) else name
        server = server or next((kind for kind, prefix in SERVERS.items() if name.startswith(prefix)), "")
        if declared or name.startswith("#") or (name.endswith("_bucket") and not name.startswith(LATENESS)):
            continue
        if name in _CACHE_INFO:
            cache = dict(_LABEL.findall(labels))
            found.setdefault("kv_capacity_tokens", []).extend(_capacity(cache))
        for word in _words(name, labels):
            value = _number(plain)
            if value is not None:
                found.setdefault(word, []).append(value)
    values = {w: math.fsum(v) / (len(v) if w in _MEANS else 1) for w, v in found.items() if v}
    if "kv_blocks" in values and "kv_block_tokens" in values:
        values.setdefault("kv_capacity_tokens", values["kv_blocks"] * values["kv_block_tokens"])
    return Reading(server, values, cache) if server else None


def _number(text: str) -> float | None:
    """The value of a sample, which a time stamp may follow; None where it is no number."""
    try:
        value = float(text.split()[0])
    except (IndexError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _words(name: str, labels: str) -> Iterable[str]:
    """What a series counts towards."""
    if name == f"{LATENESS}_bucket":
        return (f"{LATENESS} {dict(_LABEL.findall(labels)).get('le', '')}",)
    narrowed = f"{name} {dict(_LABEL.findall(labels)).get(_NARROWED[name])}" if name in _NARROWED else name
    word = _WORDS.get(narrowed)
    if word is None:
        return ()
    reason = dict(_LABEL.findall(labels)).get("finished_reason") if word == "request_success" else None
    return (word,) if reason is None else (word, f"request_success_{reason}")


def _capacity(info: Mapping[str, str]) -> list[float]:
    """Tokens that the KV cache of one engine holds, by its settings; of vLLM's blocks one is never used."""
    size, pages, page = (info.get(name, "") for name in ("kv_cache_size_tokens", "num_pages", "page_size"))
    blocks, block = info.get("num_gpu_blocks", ""), info.get("block_size", "")
    if size.isdigit():
        return [float(size)]
    if blocks.isdigit() and block.isdigit():
        return [float((int(blocks) - 1) * int(block))]
    return [float(int(pages) * int(page))] if pages.isdigit() and page.isdigit() else []


def merge(readings: Sequence[Reading | None]) -> Reading | None:
    """Several servers as one."""
    known = [reading for reading in readings if reading is not None]
    if not known or len(known) < len(readings):
        return None
    values: dict[str, float] = {}
    for word in dict.fromkeys(word for reading in known for word in reading.values):
        parts = [reading.values[word] for reading in known if word in reading.values]
        if word in _MEANS:
            values[word] = math.fsum(parts) / len(parts)
        elif len(parts) == len(known) or word in COUNTERS or word.startswith(("request_success_", LATENESS)):
            values[word] = math.fsum(parts)  # a counter that has not counted yet may be missing
    return Reading(known[0].server, values, known[0].cache)


class MetricsOf:
    """Where a target's servers tell of themselves. `get` gives status and body of an address, or raises CallError. An address that was not
    given but guessed may also be at /prometheus/metrics (trtllm-serve). `silent`: those that told nothing at the last reading."""

    def __init__(
        self, urls: Sequence[str], get: Callable[[str, float], Awaitable[tuple[int, bytes]]], *, guessed: bool
    ) -> None:
        self.urls = list(urls)
        self.silent: list[str] = []
        self._get = get
        self._guessed = guessed

    async def read(self, timeout_s: float = 10.0) -> Reading | None:
        """All addresses at once; None where one of them does not tell."""
        readings = await asyncio.gather(*(self._read(i, timeout_s) for i in range(len(self.urls))))
        self.silent = [url for url, reading in zip(self.urls, readings, strict=True) if reading is None]
        if not self.silent:
            self._guessed = False
        return merge(readings)

    async def _read(self, i: int, timeout_s: float) -> Reading | None:
        found = await self._scrape(self.urls[i], timeout_s)
        if found is None and self._guessed:
            other = self.urls[i].removesuffix("/metrics") + "/prometheus/metrics"
            found = await self._scrape(other, timeout_s)
            if found is not None:
                self.urls[i] = other
        return found

    async def _scrape(self, url: str, timeout_s: float) -> Reading | None:
        try:
            status, text = await self._get(url, timeout_s)
        except CallError:
            return None
        return parse(text.decode(errors="replace")) if status == 200 else None
