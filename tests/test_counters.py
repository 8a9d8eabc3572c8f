"""What servers say of themselves: their own names for it, sums over engines and replicas, and where it is asked for."""

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from stub_process import running_stub

from fanmark.loadgen.counters import COUNTERS, GAUGES, MetricsOf, Reading, merge, parse
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.target import connect
from fanmark.servers.vllm_metrics import Engine, EngineMetrics, Lived, cache_info

VLLM = """\
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="a b {c}"} 7451.0
vllm:prompt_tokens_total{engine="1",model_name="a b {c}"} 49.0
vllm:prompt_tokens_created{engine="0",model_name="a b {c}"} 1.79e+09
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 1.0
vllm:generation_tokens_total{engine="0"} 1e3
vllm:prompt_tokens_cached_total{engine="0"} 3456.0
vllm:request_success_total{engine="0",finished_reason="stop"} 2.0
vllm:request_success_total{engine="1",finished_reason="stop"} 1.0
vllm:request_success_total{engine="0",finished_reason="length"} 6.0
vllm:request_success_total{engine="0",finished_reason="abort"} 0.0
vllm:num_preemptions_total{engine="0"} 4.0
vllm:prefix_cache_queries_total{engine="0"} 7451.0
vllm:prefix_cache_hits_total{engine="0"} 3456.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 90.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 60.0
vllm:num_requests_running{engine="0"} 5.0
vllm:num_requests_running{engine="1"} 3.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
vllm:request_prompt_tokens_bucket{engine="0",le="1.0"} 0.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1001"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1001"} 1.0
"""
SGLANG = """\
sglang:prompt_tokens_total{model_name="m"} 8.0
sglang:generation_tokens_total{model_name="m"} 7.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 3.0
sglang:cached_tokens_total{cache_source="host",model_name="m"} 2.0
sglang:num_requests_total{model_name="m"} 4.0
sglang:num_aborted_requests_total{model_name="m"} 1.0
sglang:num_retracted_requests_total{model_name="m"} 6.0
sglang:num_running_reqs{model_name="m"} 2.0
sglang:num_queue_reqs{model_name="m"} 9.0
sglang:token_usage{model_name="m"} 0.28
sglang:max_total_num_tokens{model_name="m"} 471258.0
"""
TRTLLM = """\
trtllm_prompt_tokens_total{engine_type="trtllm",model_name="m"} 8.0
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 7.0
trtllm_request_success_total{engine_type="trtllm",finished_reason="length",model_name="m"} 5.0
trtllm_request_success_total{engine_type="trtllm",finished_reason="stop",model_name="m"} 150.0
trtllm_num_requests_running{model_name="m"} 2.0
trtllm_num_requests_waiting{model_name="m"} 9.0
trtllm_kv_cache_utilization{model_name="m"} 0.28
trtllm_kv_cache_max_blocks{model_name="m"} 6239.0
trtllm_kv_cache_tokens_per_block{model_name="m"} 64.0
"""
TRITON = """\
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 9
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.28
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
"""
SAID = {"running": 2.0, "waiting": 9.0, "kv_use": 0.28}
BLOCKS = {"kv_blocks": 6239.0, "kv_block_tokens": 64.0, "kv_capacity_tokens": 6239.0 * 64}


def values(text: str) -> tuple[str, Mapping[str, float]]:
    found = parse(text)
    assert found is not None
    return found.server, found.values


def test_vllms_names_are_summed_over_labels_and_engines() -> None:
    assert values(VLLM) == (
        "vllm",
        {
            "prompt_tokens": 7500.0,
            "generation_tokens": 1000.0,
            "prompt_tokens_cached": 3456.0,
            "request_success": 9.0,
            "request_success_stop": 3.0,
            "request_success_length": 6.0,
            "request_success_abort": 0.0,
            "preemptions": 4.0,
            "prefix_cache_queries": 7451.0,
            "prefix_cache_hits": 3456.0,
            "draft_tokens": 90.0,
            "accepted_draft_tokens": 60.0,
            "running": 8.0,
            "waiting": 2.0,
            "kv_use": 0.375,  # a mean
            "kv_capacity_tokens": 2 * 16_000.0,  # one block of each engine is never used
        },
    )


def test_sglangs_names() -> None:
    counts = {"prompt_tokens": 8.0, "generation_tokens": 7.0, "prompt_tokens_cached": 5.0, "request_success": 4.0}
    more = {"request_success_abort": 1.0, "preemptions": 6.0, "kv_capacity_tokens": 471_258.0}
    assert values(SGLANG) == ("sglang", counts | more | SAID)
    assert values(SGLANG.replace("sglang:", "sglang_")) == values(SGLANG)


def test_tensorrt_llms_names() -> None:
    counts = {"prompt_tokens": 8.0, "generation_tokens": 7.0, "request_success": 155.0}
    reasons = {"request_success_length": 5.0, "request_success_stop": 150.0}
    assert values(TRTLLM) == ("trtllm", counts | reasons | SAID | BLOCKS)
    assert values(TRITON) == ("triton", SAID | BLOCKS)


def test_the_stub_is_read_like_vllm() -> None:
    info = cache_info(16, 101, memory_bytes=1 << 30, max_model_len=1600)
    metrics = EngineMetrics("tiny", 1600, info, 1.0)
    metrics.tokens(lived := Lived(0.0, prompt=100, max_tokens=3, cached=64), 1.0, 3)
    metrics.finished(lived, 1.0, "length")
    found = parse(metrics.render(Engine(running=2, waiting=1, kv_usage=0.125, preemptions=4)))
    assert found is not None
    assert found.server == "vllm"
    assert found.cache["num_gpu_blocks"] == "101"
    wanted = {"prompt_tokens": 100, "prompt_tokens_cached": 64, "generation_tokens": 3, "request_success": 1}
    wanted |= {"request_success_length": 1, "preemptions": 4, "running": 2, "waiting": 1}
    assert {word: found.values[word] for word in wanted} == wanted
    assert (found.values["kv_use"], found.values["kv_capacity_tokens"]) == (0.125, 1600)


@pytest.mark.parametrize("text", ["", "[]", "# nothing", "process_cpu_seconds_total 3.0\n", '{"error": "no"} '])
def test_whoever_speaks_of_something_else_is_no_server_of_ours(text: str) -> None:
    assert parse(text) is None


def test_a_server_that_has_served_nothing_yet_is_known_by_what_it_declares() -> None:
    assert values("# HELP sglang:prompt_tokens_total Tokens.\n# TYPE sglang:prompt_tokens_total counter\n") == (
        "sglang",
        {},
    )
    assert values("# TYPE trtllm_num_requests_running gauge\n") == ("trtllm", {})


def test_what_is_no_number_is_unknown() -> None:
    assert values(
        "trtllm_kv_cache_utilization NaN\ntrtllm_num_requests_waiting{\ntrtllm_num_requests_running 1 17000\n"
    ) == (
        "trtllm",
        {"running": 1.0},
    )


def test_replicas_are_summed_and_a_silent_one_leaves_the_sum_unknown() -> None:
    one, two = Reading("vllm", {"prompt_tokens": 1.0, "running": 2.0, "kv_use": 0.5}, {"block_size": "16"}), parse(VLLM)
    both = merge([one, two])
    assert both is not None
    assert (both.values["prompt_tokens"], both.values["running"], both.values["kv_use"]) == (7501.0, 10.0, 0.4375)
    assert both.values["request_success_stop"] == 3.0  # the first has not counted any yet
    assert "waiting" not in both.values  # but a gauge that one of them lacks is not known of both
    assert merge([one, None]) is None
    assert merge([]) is None


class Servers:
    """Bodies by address; what is asked for is remembered."""

    def __init__(self, bodies: Mapping[str, str]) -> None:
        self.bodies = bodies
        self.asked: list[str] = []

    async def get(self, url: str, timeout_s: float) -> tuple[int, bytes]:
        self.asked.append(url)
        if url not in self.bodies:
            raise CallError("connect", "nobody there")
        return (200, self.bodies[url].encode()) if self.bodies[url] else (404, b"")


def read(servers: Servers, metrics: MetricsOf) -> Reading | None:
    servers.asked.clear()
    return asyncio.run(metrics.read())


def test_trtllm_serve_tells_elsewhere_and_is_asked_there_from_then_on() -> None:
    servers = Servers({"http://a/metrics": "[]", "http://a/prometheus/metrics": TRTLLM})
    metrics = MetricsOf(["http://a/metrics"], servers.get, guessed=True)
    for asked in (["http://a/metrics", "http://a/prometheus/metrics"], ["http://a/prometheus/metrics"]):
        found = read(servers, metrics)
        assert found is not None and found.server == "trtllm"
        assert servers.asked == asked


@pytest.mark.parametrize(
    ("bodies", "known"),
    [
        ({"http://a/metrics": VLLM, "http://b/metrics": SGLANG}, True),
        ({"http://a/metrics": VLLM, "http://b/metrics": ""}, False),
        ({"http://a/metrics": VLLM}, False),
        ({"http://a/metrics": VLLM, "http://b/metrics": "", "http://b/prometheus/metrics": TRTLLM}, False),
    ],
)
def test_addresses_that_were_given_are_asked_and_no_others(bodies: dict[str, str], known: bool) -> None:
    servers = Servers(bodies)
    metrics = MetricsOf(["http://a/metrics", "http://b/metrics"], servers.get, guessed=False)
    found = read(servers, metrics)
    assert (found is not None) is known
    assert metrics.silent == ([] if known else ["http://b/metrics"])
    assert servers.asked == ["http://a/metrics", "http://b/metrics"]


RECORDED = Path(__file__).parent / "data" / "vllm_samples" / "metrics.txt"


def test_vllms_names_are_those_that_a_real_one_exposed() -> None:
    families = {line.split(" |")[0] for line in RECORDED.read_text().splitlines() if line.startswith("vllm:")}
    ours = {name.removesuffix("_total") for table in (COUNTERS, GAUGES) for names in table.values() for name in names}
    ours = {name for name in ours if name.startswith("vllm:")} | {"vllm:cache_config_info"}
    assert len(ours) == 13
    assert {name for name in ours - families if "spec_decode" not in name} == set()  # it drafted nothing


def test_a_real_vllms_cache_settings_tell_its_capacity() -> None:
    line = next(line for line in RECORDED.read_text().splitlines() if line.startswith("vllm:cache_config_info"))
    labels = ",".join(f'{key}="{value}"' for key, value in re.findall(r"(\w+)=\{([^}]*)\}", line))
    found = parse(f"vllm:cache_config_info{{{labels}}} 1.0\n")
    assert found is not None
    assert found.values == {"kv_capacity_tokens": 524_288.0}
    assert (found.cache["block_size"], found.cache["enable_prefix_caching"]) == ("128", "True")


class _Elsewhere(BaseHTTPRequestHandler):
    """A server of metrics alone, which remembers the headers that it was sent."""

    seen: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.seen.append(str(self.headers))
        self.send_response(200)
        self.send_header("Content-Length", str(len(VLLM)))
        self.end_headers()
        self.wfile.write(VLLM.encode())


@pytest.mark.real
def test_the_key_goes_to_the_target_and_to_no_other_server_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k3y-of-the-stub")
    seen: list[str] = []
    handler = type("Handler", (_Elsewhere,), {"seen": seen})

    async def read(config: Target) -> tuple[Reading | None, Reading | None]:
        endpoint = await connect("t", config, time.monotonic)
        try:
            return await endpoint.reading(), parse(VLLM)
        finally:
            await endpoint.lane.close()

    with running_stub("--api-key-env", "KEY") as stub, ThreadingHTTPServer(("127.0.0.1", 0), handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, args=(0.02,), daemon=True).start()
        other = f"http://127.0.0.1:{elsewhere.server_address[1]}/metrics"
        config = Target(url=f"{stub.url}/v1", api_key_env="KEY", metrics_urls=[f"{stub.url}/metrics", other])
        both, there = asyncio.run(read(config))
        elsewhere.shutdown()
    assert both is not None and there is not None
    assert both.values["prompt_tokens"] == there.values["prompt_tokens"]  # the stub has read none yet
    assert both.values["kv_capacity_tokens"] > there.values["kv_capacity_tokens"]
    assert len(seen) == 1
    assert "k3y-of-the-stub" not in seen[0] and "Authorization" not in seen[0]
