"""Runs against a real vLLM, the quickstart's three arms and other shapes: every count as expected, every token as the server counted it."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from between import between
from test_cache_policy import COLD, OWN, fresh, run

from fanmark.loadgen.records import read_queries

pytestmark = pytest.mark.vllm

ARMS = {"single": (1, 0), "debate": (9, 0), "mcp-chain": (13, 12)}
COUNTERS = ("prompt_tokens", "generation_tokens", "prompt_tokens_cached", "request_success")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_quickstart_is_exact_on_vllm(vllm_url: str, tmp_path: Path, api: str) -> None:
    command = [sys.executable, "-m", "fanmark.loadgen.cli", "run", "--target", vllm_url, "--api", api, "--json"]
    load = ["--queries", "4", "--concurrency", "2", "--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run([*command, *load], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert set(found["arms"]) == set(ARMS)
    for name, (calls, tool_calls) in ARMS.items():
        arm = found["arms"][name]
        assert arm["queries"] == {"started": 4, "completed": 4, "failed": 0, "abandoned": 0}
        assert arm["errors"] == {}
        assert arm["expected"]["mismatches"] == 0
        assert not arm["expected"]["approximate"]
        for resource in ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width"):
            assert arm["per_query"][resource]["mean"] == arm["expected"][resource], (name, resource)
        assert arm["per_query"]["calls"]["mean"] == calls
        assert arm["per_query"]["tool_calls"]["mean"] == tool_calls
        assert arm["per_query"]["cached_tokens"]["mean"] > 0
    assert found["arms"]["debate"]["amplification"]["calls"]["low"] == 9.0
    assert found["server"]["reconciled"] is True
    assert [found["server"][name]["off_pct"] for name in COUNTERS] == [0.0] * 4
    assert found["server"]["prompt_tokens"]["server"] > 100_000
    assert found["validity"]["uncontaminated"] is True


SMALL = """
[[arm]]
name = "single"
topology = "single"
baseline = true

[[arm]]
name = "orchestrator"
topology = "orchestrator"
workers = 2
tool_calls = 1

[[arm]]
name = "tree-of-thought"
topology = "tree-of-thought"
depth = 2
samples = 2
beam = 1
votes = 1

[workload]
system = 60
question = 50
instruction = 40
plan = 16
action = 12
answer = 16
judge_answer = 16
vote = 4
tool_result = 40

[tools]
latency_s = 0.01

[load]
users = 2
turns = 2
queries = 4
warmup = 0
"""
RESOURCES = ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_orchestrator_tree_of_thought_and_sessions_are_exact_on_vllm(vllm_url: str, tmp_path: Path, api: str) -> None:
    """A lead that plans and concludes, two workers of an action and an answer; twice two thoughts with a vote each. The second turn of
    each session reads the first one's question and answer wherever its own question stands."""
    (tmp_path / "small.toml").write_text(SMALL)
    command = [sys.executable, "-m", "fanmark.loadgen.cli", "run", str(tmp_path / "small.toml"), "--target", vllm_url]
    command += ["--api", api, "--json", "--quiet", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    shapes = {"single": (1, 0, 1, 1), "orchestrator": (6, 2, 4, 2), "tree-of-thought": (8, 0, 4, 2)}
    for name, shape in shapes.items():
        arm = found["arms"][name]
        assert arm["queries"] == {"started": 4, "completed": 4, "failed": 0, "abandoned": 0} and arm["errors"] == {}
        assert arm["expected"]["mismatches"] == 0 and not arm["expected"]["approximate"]
        means = [arm["per_query"][resource]["mean"] for resource in RESOURCES]
        assert means == [arm["expected"][resource] for resource in RESOURCES], name
        assert (means[0], means[1], *means[4:]) == shape
    queries = [query for query in read_queries(tmp_path / "run") if query.arm == "single"]
    read = {(query.session, query.turn): query.resources["input_tokens"] for query in queries}
    for session in (0, 1):
        assert read[session, 1] == 60 + 50
        grown = (read[session, 2] or 0) - 60 - 2 * 50  # the answer of 16 tokens, as it is read again
        assert grown == 16 if api == "completions" else 8 <= grown <= 40
    validity = found["validity"]
    assert [validity[tick] for tick in ("counted", "reconciled", "alone", "uncontaminated")] == [True] * 4, validity


def test_a_warm_server_and_other_arms_leave_fresh_tokens_as_they_are(vllm_url: str, tmp_path: Path) -> None:
    for name, arms in (("first", "apart"), ("second", "apart"), ("third", "interleaved")):
        summary, queries = run(tmp_path / name, vllm_url.removesuffix("/v1"), api="completions", arms=arms)
        assert fresh(queries) == [OWN, OWN], name
        validity = summary["validity"]
        assert [validity[tick] for tick in ("counted", "reconciled", "alone", "uncontaminated")] == [True] * 4, validity
        server = summary["server"]
        assert server["request_success_length"] == {"client": 8, "server": 8.0, "off_pct": 0.0}
        assert server["kv_written_tokens"] == 2 * sum(OWN) + 8 * 4
        assert 0 < server["kv_turnover"] < 1


def test_a_stranger_with_the_same_prompt_and_salt_is_told(vllm_url: str, tmp_path: Path) -> None:
    first = itertools.count()

    def same_prompt(body: dict[str, Any]) -> list[dict[str, Any]]:
        other = body | {"max_tokens": 3, "stream": False}
        del other["stream_options"]
        return [] if next(first) else [other]

    with between(vllm_url.removesuffix("/v1"), before=same_prompt) as url:
        validity = run(tmp_path / "run", url, api="completions")[0]["validity"]
    assert (validity["counted"], validity["alone"], validity["uncontaminated"]) == (True, False, False)
    assert validity["reasons"]["alone"].startswith(f"1 request, {COLD} prompt tokens")
