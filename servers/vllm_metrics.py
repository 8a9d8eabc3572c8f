"""The `vllm:` metrics of vLLM 0.32: its names, labels and buckets, filled from what the engine model does.

Rules of the file:
1. Pure: times come in as seconds of the server's clock. Nothing is registered anywhere; `render` makes the text of one scrape.
2. What a stub has none of (transfers, multimodal input, sleep) is exposed as zero, as a server that does not use it does.
3. Intervals as vLLM defines them: queue = scheduled - queued, prefill = first - scheduled, decode = last - first,
   inference = last - scheduled, time per output token = decode / (tokens - 1); after a preemption the first scheduling stands.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_ITERATION = (1, *(2**power for power in range(3, 15)))
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_CHOICES = (1, 2, 5, 10, 20)
_LATENESS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECT_REASONS = ("max_num_queued_reqs", "max_num_queued_tokens")
_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
_CACHED_SOURCES = ("device", "host", "p2p", "disk", "external_unspecified")


def one_two_five(largest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, ... up to the longest context: the buckets of token counts."""
    bounds: list[int] = []
    unit = 1
    while True:
        for step in (1, 2, 5):
            if step * unit > largest:
                return tuple(bounds) or (1,)
            bounds.append(step * unit)
        unit *= 10


class Histogram:
    """Counts of values by upper bound (a value equal to a bound falls below it)."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self.counts)} values, sum {self.sum:g}>"

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass(slots=True)
class Lived:
    """What is measured of one engine request: instants in seconds, counts in tokens. `queued_at`: when the engine took it."""

    arrived_at: float
    prompt: int
    max_tokens: int | None
    queued_at: float | None = None
    scheduled_at: float | None = None
    first_at: float | None = None
    last_at: float = 0.0
    cached: int = 0
    output: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class Engine:
    """What the engine itself knows at the moment of a scrape."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class _Totals:
    prompt: int = 0
    cached: int = 0
    generation: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECT_REASONS, 0))
    parser: dict[tuple[str, str], int] = field(default_factory=dict)


class EngineMetrics:
    """Counters and histograms of one engine. `info` are the labels of `cache_config_info`; `started_at` is Unix time."""

    def __init__(self, model: str, max_model_len: int, info: Mapping[str, str], started_at: float) -> None:
        self.totals = _Totals()
        self._model, self._info, self._started_at = model, dict(info), started_at
        tokens = one_two_five(max_model_len)
        self.histograms = {
            "vllm:request_prompt_tokens": Histogram(tokens),
            "vllm:request_generation_tokens": Histogram(tokens),
            "vllm:iteration_tokens_total": Histogram(_ITERATION),
            "vllm:request_max_num_generation_tokens": Histogram(tokens),
            "vllm:request_params_n": Histogram(_CHOICES),
            "vllm:request_params_max_tokens": Histogram(tokens),
            "vllm:time_to_first_token_seconds": Histogram(_FIRST),
            "vllm:inter_token_latency_seconds": Histogram(_GAP),
            "vllm:request_time_per_output_token_seconds": Histogram(_GAP),
            "vllm:e2e_request_latency_seconds": Histogram(_LATENCY),
            "vllm:request_queue_time_seconds": Histogram(_LATENCY),
            "vllm:request_inference_time_seconds": Histogram(_LATENCY),
            "vllm:request_prefill_time_seconds": Histogram(_LATENCY),
            "vllm:request_decode_time_seconds": Histogram(_LATENCY),
            "vllm:request_num_preemptions": Histogram(_PREEMPTIONS),
            "vllm:request_prefill_kv_computed_tokens": Histogram(tokens),
        }
        self.lateness = Histogram(_LATENESS)
        self._gaps = self.histograms["vllm:inter_token_latency_seconds"]
        self._firsts = self.histograms["vllm:time_to_first_token_seconds"]

    def __repr__(self) -> str:
        return f"<EngineMetrics {self.totals}>"

    def tokens(self, lived: Lived, at: float, count: int) -> int:
        """Tokens that came out at the end of a step; returns what they add to the step's iteration tokens."""
        added = count
        if lived.first_at is None:
            lived.first_at = at
            self._firsts.observe(at - lived.arrived_at)
            self.totals.prompt += lived.prompt
            self.totals.cached += lived.cached
            added += lived.prompt
        else:
            self._gaps.observe((at - lived.last_at) / count, count)
        lived.last_at = at
        lived.output += count
        self.totals.generation += count
        return added

    def step(self, tokens: int) -> None:
        """One step that put out something: the prompt tokens it finished and the tokens it made."""
        self.histograms["vllm:iteration_tokens_total"].observe(tokens)

    def finished(self, lived: Lived, at: float, reason: str) -> None:
        """A request left the engine, also by an abort."""
        self.totals.finished[reason] += 1
        seen = self.histograms
        seen["vllm:e2e_request_latency_seconds"].observe(at - lived.arrived_at)
        seen["vllm:request_prompt_tokens"].observe(lived.prompt)
        seen["vllm:request_generation_tokens"].observe(lived.output)
        seen["vllm:request_num_preemptions"].observe(lived.preemptions)
        if lived.max_tokens is not None:
            seen["vllm:request_params_max_tokens"].observe(lived.max_tokens)
        if lived.scheduled_at is not None and lived.queued_at is not None:
            first = at if lived.first_at is None else lived.first_at
            last = first if lived.first_at is None else lived.last_at
            seen["vllm:request_queue_time_seconds"].observe(lived.scheduled_at - lived.queued_at)
            seen["vllm:request_prefill_time_seconds"].observe(first - lived.scheduled_at)
            seen["vllm:request_decode_time_seconds"].observe(last - first)
            seen["vllm:request_inference_time_seconds"].observe(last - lived.scheduled_at)
            if lived.output > 1:
                seen["vllm:request_time_per_output_token_seconds"].observe((last - first) / (lived.output - 1))
        seen["vllm:request_prefill_kv_computed_tokens"].observe(max(lived.prompt - lived.cached, 0))

    def replied(self, choices: int, longest: int) -> None:
        """All choices of one request ended; `longest` is the output tokens of the longest."""
        self.histograms["vllm:request_params_n"].observe(choices)
        self.histograms["vllm:request_max_num_generation_tokens"].observe(longest)

    def parsed_tools(self, mode: str, found: bool, times: int = 1) -> None:
        """The tool parser looked at output: "streaming" once a delta, "non_streaming" once a choice."""
        key = (mode, "tool_call" if found else "no_tool_call")
        self.totals.parser[key] = self.totals.parser.get(key, 0) + times

    def render(self, engine: Engine, extra: Sequence[str] = ()) -> str:
        """The text of a scrape; `extra` are lines of other families, as they are."""
        lines: list[str] = []
        for family in self._families(engine):
            lines += family
        lines += self._own()
        return "\n".join([*lines, *extra, ""])

    def _families(self, engine: Engine) -> Iterator[list[str]]:
        both = {"engine": "0", "model_name": self._model}
        count = self._counter
        totals = self.totals
        for what in ("flops", "read_bytes", "write_bytes"):
            name = f"vllm:estimated_{what}_per_gpu"
            yield count(name, f"Estimated {what} per GPU; 0: not estimated.", [(both, 0)])
        yield _gauge("vllm:num_requests_running", "Requests in the batch.", [(both, engine.running)])
        yield _gauge("vllm:num_requests_waiting", "Requests in the queue.", [(both, engine.waiting)])
        reasons = [({**both, "reason": "capacity"}, engine.waiting), ({**both, "reason": "deferred"}, 0)]
        yield _gauge("vllm:num_requests_waiting_by_reason", "Requests in the queue, by reason.", reasons)
        states = [
            ({**both, "sleep_state": state}, state == "awake")
            for state in ("awake", "weights_offloaded", "discard_all")
        ]
        yield _gauge("vllm:engine_sleep_state", "Whether the engine sleeps.", states)
        yield _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", [(both, engine.kv_usage)])
        yield count(
            "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", [(both, engine.prefix_queries)]
        )
        yield count("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", [(both, engine.prefix_hits)])
        for kind in ("external_prefix_cache", "mm_cache"):
            yield count(f"vllm:{kind}_queries", f"Look-ups in the {kind}.", [(both, 0)])
            yield count(f"vllm:{kind}_hits", f"Hits in the {kind}.", [(both, 0)])
        yield count(
            "vllm:num_preemptions", "Requests that lost their KV blocks and begin again.", [(both, engine.preemptions)]
        )
        yield count("vllm:prompt_tokens", "Prompt tokens of requests with a first token.", [(both, totals.prompt)])
        sources = dict(zip(_SOURCES, (totals.prompt - totals.cached, totals.cached, 0), strict=True))
        by_source = [({**both, "source": source}, tokens) for source, tokens in sources.items()]
        yield count("vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from.", by_source)
        yield count("vllm:prompt_tokens_cached", "Prompt tokens that were cached.", [(both, totals.cached)])
        cached = [({**both, "source": source}, totals.cached * (source == "device")) for source in _CACHED_SOURCES]
        yield count("vllm:prompt_tokens_cached_by_source", "Cached prompt tokens by the cache's place.", cached)
        yield count("vllm:generation_tokens", "Output tokens.", [(both, totals.generation)])
        ends = [
            ({"engine": "0", "finished_reason": why, "model_name": self._model}, n)
            for why, n in totals.finished.items()
        ]
        yield count("vllm:request_success", "Requests that ended, by how.", ends)
        turned_away = [({"model_name": self._model, "reason": why}, n) for why, n in totals.rejected.items()]
        yield count("vllm:admission_rejections", "Requests turned away with a 503.", turned_away)
        for name, histogram in self.histograms.items():
            yield self._histogram(name, name.removeprefix("vllm:").replace("_", " ") + ".", histogram, both)
        info = {**self._info, "engine": "0"}
        yield _gauge("vllm:cache_config_info", "Settings of the KV cache, as labels.", [(info, 1)])
        parsers = [
            (
                {"mode": mode, "model_name": self._model, "outcome": outcome, "request_type": kind},
                totals.parser.get((mode, outcome), 0) if kind == "chat_completions" else 0,
            )
            for mode in ("streaming", "non_streaming")
            for outcome in ("tool_call", "no_tool_call")
            for kind in ("chat_completions", "responses", "other")
        ]
        yield count("vllm:tool_call_parser_invocations", "Looks of the tool parser at output.", parsers)

    def _own(self) -> list[str]:
        text = "How long after its due time a step's tokens were sent, in wall seconds."
        return self._histogram("fanmark_stub_step_lateness_seconds", text, self.lateness, {})

    def _counter(self, name: str, text: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> list[str]:
        lines = [f"# HELP {name}_total {text}", f"# TYPE {name}_total counter"]
        lines += [_sample(f"{name}_total", labels, value) for labels, value in samples]
        return lines + self._created(name, text, [labels for labels, _ in samples])

    def _created(self, name: str, text: str, labels: Sequence[Mapping[str, str]]) -> list[str]:
        lines = [f"# HELP {name}_created {text}", f"# TYPE {name}_created gauge"]
        return lines + [_sample(f"{name}_created", each, self._started_at) for each in labels]

    def _histogram(self, name: str, text: str, histogram: Histogram, labels: Mapping[str, str]) -> list[str]:
        lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        running = 0
        for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
            running += count
            shown = "+Inf" if bound is None else repr(float(bound))
            lines.append(_sample(f"{name}_bucket", {**labels, "le": shown}, running))
        lines += [_sample(f"{name}_count", labels, running), _sample(f"{name}_sum", labels, histogram.sum)]
        return lines + self._created(name, text, [labels])


def _gauge(name: str, text: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> list[str]:
    return [
        f"# HELP {name} {text}",
        f"# TYPE {name} gauge",
        *(_sample(name, labels, value) for labels, value in samples),
    ]


def own_gauge(name: str, text: str, value: float) -> list[str]:
    """A gauge of the stub's own, without labels."""
    return _gauge(name, text, [({}, value)])


def own_counter(name: str, text: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> list[str]:
    """A counter of the stub's own; its name ends in `_total`."""
    return [
        f"# HELP {name} {text}",
        f"# TYPE {name} counter",
        *(_sample(name, labels, value) for labels, value in samples),
    ]


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(labels[key])}"' for key in sorted(labels))
    return f"{name}{{{inside}}} {float(value)!r}" if inside else f"{name} {float(value)!r}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def cache_info(block_size: int, num_blocks: int, *, memory_bytes: int, max_model_len: int) -> dict[str, str]:
    """The labels of `cache_config_info`: the stub's own figures, and vLLM's defaults for what it has none of."""
    tokens = block_size * (num_blocks - 1)
    own = {
        "_block_size_resolved": "True",
        "block_size": str(block_size),
        "effective_attention_block_size": str(block_size),
        "enable_prefix_caching": "True",
        "gpu_memory_utilization": "0.92",
        "kv_cache_max_concurrency": f"{tokens / max_model_len:.4g}",
        "kv_cache_memory_bytes": str(memory_bytes),
        "kv_cache_size_tokens": str(tokens),
        "num_gpu_blocks": str(num_blocks),
        "prefix_caching_hash_algo": "sha256",
    }
    return {**_CACHE_DEFAULTS, **own}


_CACHE_DEFAULTS = {
    **dict.fromkeys(
        [
            "cache_hit_alignment_tokens",
            "hash_block_size",
            "kv_cache_layout",
            "kv_offloading_size",
            "mamba_block_size",
            "mamba_page_size_padded",
            "mamba_ssm_cache_dtype",
            "num_cpu_blocks",
            "num_gpu_blocks_override",
            "prefix_match_unit",
            "skip_page_size_padded",
            "sliding_window",
        ],
        "None",
    ),
    **dict.fromkeys(
        [
            "enable_mamba_shared_prefix_checkpoint",
            "is_attention_free",
            "kv_sharing_fast_prefill",
            "use_kda_recoverssm",
            "use_replayssm",
            "user_specified_block_size",
        ],
        "False",
    ),
    "cache_dtype": "auto",
    "kv_cache_dtype_skip_layers": "[]",
    "kv_offloading_backend": "native",
    "mamba_cache_dtype": "auto",
    "mamba_cache_mode": "none",
    "mamba_ssm_cache_dtype": "auto",
    "prefix_cache_retention_interval": "0",
    "replayssm_buffer_len": "16",
    "swa_bounded_replay": "True",
}
