"""A call that a topology gives up is aborted at the server, whatever lane carries it, and is waste."""

import asyncio
from pathlib import Path

import pytest
from stub_process import Stub

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, session
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.user_topology import with_users

pytestmark = pytest.mark.real

RACE = """
from fanmark.agents.runtime import together

async def run(rt, p):
    prompt = [rt.system, rt.question]
    quick = rt.infer(prompt, writes=("answer", "quick"), role="quick", times=20)
    slow = [rt.infer(prompt, writes=("answer", i), role=f"slow-{i}", times=300) for i in range(p.slow)]
    await together([quick, *slow], wait_for=1)
"""


@pytest.mark.parametrize("lane", ["fast", "aiohttp", "openai"])
def test_who_is_late_is_aborted(stub: Stub, tmp_path: Path, lane: str) -> None:
    """Four queries of one call of 160 tokens, long enough for all to be at the server, and two of 2,400, for which nobody waits."""
    (tmp_path / "race.py").write_text(RACE)
    raw = {
        "target": {"url": f"{stub.url}/v1", "lane": lane},
        "arm": [{"name": "race", "topology": "race.py:run", "slow": 2, "baseline": True}],
        "workload": {"answer": 8},
        "load": {"mode": "closed", "concurrency": 2, "queries": 4, "warmup": 0},
    }
    table = with_users(raw, str(tmp_path / "race.toml"), topologies())
    scenario = scenario_check.check(raw, "race.toml", table)
    before = stub.metrics()
    options = session.Options(tmp_path / "run", 0, f"race-{lane}", "test", [], None)
    with asyncio.Runner() as runner:
        arm = runner.run(session.run(scenario, table, options)).summary["arms"]["race"]
    assert arm["queries"]["completed"] == 4 and arm["errors"] == {}
    assert (arm["waste"]["given_up"], arm["waste"]["calls"]) == (8, 8)
    running = next(name for name in before if name.startswith("vllm:num_requests_running"))
    after = stub.until(running, 0.0)
    aborted = [name for name in before if name.startswith("vllm:request_success_total") and '"abort"' in name]
    assert sum(after[name] - before[name] for name in aborted) == 8
    written = next(name for name in before if name.startswith("vllm:generation_tokens_total"))
    assert 4 * 160 <= after[written] - before[written] < 4 * (160 + 2 * 2400)  # not all that was asked for
    for query in read_queries(tmp_path / "run"):
        ends = {call.role: call.error for call in query.calls}
        assert ends == {"quick": None, "slow-0": "cancelled", "slow-1": "cancelled"}
        assert query.resources["calls"] == 1
