"""Numbers of /metrics after known requests, and vLLM's names, labels and buckets as recorded."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_process import Stub, running_stub

from fanmark.servers.vllm_metrics import Engine, EngineMetrics, Histogram, Lived, cache_info, one_two_five

RECORDED = Path(__file__).parent / "data" / "vllm_samples" / "metrics.txt"


@pytest.fixture(scope="module")
def lone() -> Iterator[Stub]:
    """A stub that only this file talks to: totals can be told."""
    with running_stub("--model", "tiny", "--block-size", "16", "--max-num-queued-reqs", "3") as server:
        yield server


def families() -> dict[str, tuple[str, dict[str, set[str]], list[str]]]:
    """Recorded families: name -> (kind, label -> values, buckets)."""
    found: dict[str, tuple[str, dict[str, set[str]], list[str]]] = {}
    name = ""
    for line in RECORDED.read_text().splitlines():
        if line.startswith("vllm:"):
            name, kind, labels = (part.strip() for part in line.split("|"))
            values = {key: set(inside.split(",")) for key, inside in re.findall(r"(\w+)=\{([^}]*)\}", labels)}
            found[name] = (kind, values, [])
        elif line.startswith("    buckets:") and found[name][0] == "histogram" and not found[name][2]:
            found[name][2].extend(line.split()[1:])
    return found


def rendered() -> str:
    info = cache_info(128, 4096, memory_bytes=1 << 30, max_model_len=4096)
    return EngineMetrics("tiny", 4096, info, 1.0).render(Engine())


FREE_LABELS = {"kv_cache_max_concurrency", "kv_cache_size_tokens"}


@pytest.mark.parametrize(("name", "family"), families().items())
def test_a_family_has_vllms_kind_labels_and_buckets(
    name: str, family: tuple[str, dict[str, set[str]], list[str]]
) -> None:
    kind, labels, buckets = family
    exposed = {"counter": f"{name}_total", "gauge": name, "histogram": f"{name}_bucket"}[kind]
    text = rendered()
    assert f"# TYPE {name}{'_total' if kind == 'counter' else ''} {kind}" in text
    lines = re.findall(rf"^{re.escape(exposed)}\{{(.*)\}} ", text, re.M)
    seen: dict[str, set[str]] = {}
    for line in lines:
        for key, value in re.findall(r'(\w+)="([^"]*)"', line):
            seen.setdefault(key, set()).add(value)
    bounds = seen.pop("le", set())
    assert set(seen) == set(labels)
    assert {key: seen[key] for key in seen if key not in FREE_LABELS} == {
        key: labels[key] for key in labels if key not in FREE_LABELS
    }
    assert bounds == set(buckets)
    if kind != "gauge":
        assert f"\n{name}_created{{" in text


def test_a_value_on_a_bound_falls_below_it() -> None:
    histogram = Histogram((1, 2))
    for value in (1, 1.5, 2, 3):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([1, 2, 1], 7.5)


@pytest.mark.parametrize(("largest", "bounds"), [(4096, (1, 2000)), (5000, (1, 5000)), (1, (1, 1))])
def test_token_buckets_go_up_to_the_context(largest: int, bounds: tuple[int, int]) -> None:
    assert (one_two_five(largest)[0], one_two_five(largest)[-1]) == bounds


def test_intervals_of_one_request() -> None:
    metrics = EngineMetrics("tiny", 4096, {}, 1.0)
    lived = Lived(10.0, prompt=100, max_tokens=3, queued_at=10.5, scheduled_at=11.0, cached=64)
    assert metrics.tokens(lived, 12.0, 1) == 101
    assert metrics.tokens(lived, 12.25, 1) == 1
    metrics.tokens(lived, 13.0, 1)
    metrics.finished(lived, 13.0, "length")
    sums = {
        name.removeprefix("vllm:"): histogram.sum
        for name, histogram in metrics.histograms.items()
        if any(histogram.counts)
    }
    assert sums == {
        "request_prompt_tokens": 100,
        "request_generation_tokens": 3,
        "request_params_max_tokens": 3,
        "time_to_first_token_seconds": 2.0,
        "inter_token_latency_seconds": 1.0,
        "request_time_per_output_token_seconds": 0.5,
        "e2e_request_latency_seconds": 3.0,
        "request_queue_time_seconds": 0.5,
        "request_inference_time_seconds": 2.0,
        "request_prefill_time_seconds": 1.0,
        "request_decode_time_seconds": 1.0,
        "request_num_preemptions": 0,
        "request_prefill_kv_computed_tokens": 36,
    }


@pytest.mark.real
def test_counters_after_known_requests(lone: Stub) -> None:
    prompt = list(range(100))
    body = {"prompt": prompt, "max_tokens": 7, "ignore_eos": True}
    for more in ({}, {}, {"cache_salt": "other"}, {"n": 2, "cache_salt": "third", "stream": True}):
        assert lone.send("POST", "/v1/completions", body | more).status == 200
    seen = lone.metrics()

    def total(name: str, labels: str = "") -> float:
        return seen[f'vllm:{name}{{engine="0",{labels}model_name="tiny"}}']

    hits = total("prefix_cache_hits_total")
    assert total("prompt_tokens_total") == 500
    assert total("generation_tokens_total") == 35
    assert total("prefix_cache_queries_total") == 500
    assert hits in (96, 192)  # of the two choices, the second may share what the first computes
    assert total("prompt_tokens_cached_total") == hits
    assert total("request_success_total", 'finished_reason="length",') == 5
    assert total("request_success_total", 'finished_reason="abort",') == 0
    assert total("request_params_n_count") == 4
    assert total("request_params_n_sum") == 5
    assert total("request_max_num_generation_tokens_sum") == 28
    assert total("inter_token_latency_seconds_count") == 30
    assert total("iteration_tokens_total_sum") == 535
    assert total("kv_cache_usage_perc") == 0
    assert total("num_requests_running") == 0


@pytest.mark.real
def test_a_full_queue_is_a_503_and_counted(lone: Stub) -> None:
    refused = lone.chat("hello there", n=4, max_tokens=1)
    assert refused.status == 503
    assert refused.json()["error"]["code"] == 503
    seen = lone.metrics()
    assert seen['vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}'] == 1
    assert seen['vllm:num_requests_running{engine="0",model_name="tiny"}'] == 0
