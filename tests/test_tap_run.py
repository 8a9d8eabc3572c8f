"""fanmark's own runs through the tap: what the tap tells of each query is what the run tells of it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from stub_process import Stub
from tapped import SALT, by_seed, through

from fanmark.agents import topologies
from fanmark.loadgen import session
from fanmark.loadgen.recording import text_id
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.trace_headers import trace_id
from fanmark.loadgen.verify import verify

pytestmark = pytest.mark.real

EQUAL = (
    *("calls", "tool_calls", "input_tokens", "cached_tokens", "fresh_tokens", "output_tokens", "reasoning_tokens"),
    *("depth", "width", "retries"),
)
ARMS = [
    {"name": "single", "topology": "single", "baseline": True},
    {"name": "debate", "topology": "debate"},
    {"name": "mcp-chain", "topology": "tool-chain", "tool_calls": 4, "tools_per_step": 2},
    {"name": "workers", "topology": "orchestrator", "workers": 2, "tool_calls": 2},
]


def scenario(url: str, mcp: str, api: str) -> Any:
    raw = {
        "name": "through",
        "target": {"url": f"{url}/v1", "api": api},
        "arm": ARMS,
        "tools": {"server": [{"url": mcp}]},
        "workload": {"answer": 20, "judge_answer": 20, "action": 14, "tool_result": 40, "plan": 20},
        "load": {"rate": 5, "queries": 2, "warmup": 1},
    }
    return check(raw, "through.toml", topologies())


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_tap_tells_of_each_query_what_the_run_tells(stub: Stub, tools_url: str, tmp_path: Path, api: str) -> None:
    options = session.Options(tmp_path / "run", 0, "r1", "test", [], None)

    async def run(url: str) -> session.Result:
        return await session.run(scenario(url, f"{url}/mcp", api), topologies(), options)

    both = through(f"{stub.url}/v1", tmp_path / "tap", run, mcp=[tools_url])
    ran, summary = asyncio.run(both)
    tapped, queries = by_seed(tmp_path / "tap"), list(list(read_queries(tmp_path / "run")))
    assert len(tapped) == len(queries) == 12
    for query in queries:
        seen = tapped[text_id(SALT, trace_id("r1", query.arm, query.query))]
        told = {name: query.resources[name] for name in EQUAL}
        assert {name: seen.resources[name] for name in EQUAL} == told, (query.arm, query.query)
        assert seen.outcome == "completed"
    assert ran.summary["validity"]["counted"] is True
    assert summary["server"]["reconciled"] is True
    assert summary["tap"]["unattributed"] == 0
    assert set(summary["tap"]["attributed"]["call"]) == {"traceparent"}
    assert verify(tmp_path / "tap", topologies()).differ == []
