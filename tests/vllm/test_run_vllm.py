"""The quickstart's three arms against a real vLLM: every count as expected, every token as the server counted it."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from between import between
from test_cache_policy import COLD, OWN, fresh, run

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
