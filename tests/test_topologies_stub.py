"""Every topology through the stub in real time: the counts of the closed form, to the token, by the client and by the server."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from stub_process import running_stub

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, session

pytestmark = pytest.mark.real

SMALL: dict[str, dict[str, Any]] = {  # keys that keep the largest ones short
    "tree-of-thought": {"depth": 2, "samples": 3, "beam": 2, "votes": 2},
    "coding-agent": {"tool_calls": 9, "context_limit": 1500},
    "map-reduce": {"chunks": 5, "fan_in": 2},
    "orchestrator": {"workers": 2, "waves": 2, "tool_calls": 2},
    "tool-chain": {"tool_calls": 5, "tools_per_step": 2},
}


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_all_are_counted_exactly(api: str, tmp_path: Path) -> None:
    table = {name: topology for name, topology in topologies().items() if name != "replay"}
    assert set(SMALL) <= set(table)
    raw = {
        "arm": [
            {"name": name, "topology": name, "baseline": name == "single", **SMALL.get(name, {})} for name in table
        ],
        "workload": {kind: 8 for kind in ("answer", "judge_answer", "action", "critique", "plan", "vote", "turn")}
        | {"compaction": 40, "chunk": 120, "question": {"dist": "uniform", "mean": 60, "cv": 0.4, "min": 20}},
        "tools": {"latency_s": 0.005},
        "load": {"mode": "closed", "concurrency": 2, "queries": 2, "warmup": 0},
    }
    with running_stub("--time-scale", "0.1") as stub:
        scenario = scenario_check.check(raw | {"target": {"url": f"{stub.url}/v1", "api": api}}, "all.toml", table)
        options = session.Options(tmp_path / "run", 0, api, "test", [], None)
        with asyncio.Runner() as runner:
            found = runner.run(session.run(scenario, table, options)).summary
    for name, arm in found["arms"].items():
        assert arm["queries"] == {"started": 2, "completed": 2, "failed": 0, "abandoned": 0}, name
        assert arm["expected"]["mismatches"] == 0 and not arm["expected"]["at_most"], name
        for count in ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width"):
            assert arm["per_query"][count]["mean"] == arm["expected"][count], (name, count)
    assert found["validity"]["counted"] is found["validity"]["reconciled"] is found["validity"]["alone"] is True
    assert found["validity"]["uncontaminated"] is True
