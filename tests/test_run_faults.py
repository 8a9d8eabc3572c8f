"""Runs against a stub with faults: each ends by itself, every call has an outcome and a class, and the accounts balance."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stub_process import running_stub

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, session

pytestmark = pytest.mark.real

SCENARIO = """
[[arm]]
name = "single"
topology = "single"
baseline = true
[[arm]]
name = "debate"
topology = "debate"
agents = 3
[load]
mode = "closed"
concurrency = 4
queries = 8
warmup = 0
[workload]
answer = 12
judge_answer = 12
"""

# fault of the stub: the class that calls then have in the summary (None: no call fails), and whether the server's counters are met (None:
# not knowable, as a failed call's siblings are given up on the way, or counts did not come)
FAULTS = {
    "429:rate=0.2": ("http_429", None),
    "503:rate=0.2": ("http_5xx", None),
    "500:rate=0.2": ("http_5xx", None),
    "slow-admission:rate=0.3,seconds=0.2": (None, True),
    "stall:rate=0.2,seconds=30": ("timeout", None),
    "reset:rate=0.2": ("stream_cut", None),
    "no-done:rate=0.3": (None, True),
    "malformed:rate=0.2": ("bad_reply", None),
    "no-usage:rate=0.3": (None, None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_calls_and_nothing_else(fault: str, tmp_path: Path) -> None:
    kind, reconciled = FAULTS[fault]
    (tmp_path / "faults.toml").write_text(SCENARIO)
    raw, source = scenario_check.read(str(tmp_path / "faults.toml"))
    with running_stub("--fault", fault, "--fault-seed", "3") as stub:
        raw["target"] = {"url": f"{stub.url}/v1", "call_timeout_s": 1.5}
        scenario = scenario_check.check(raw, source, topologies())
        options = session.Options(tmp_path / "run", 0, "faults", "test", [], None)
        with asyncio.Runner() as runner:
            result = runner.run(session.run(scenario, topologies(), options))
            assert asyncio.all_tasks(runner.get_loop()) == set()
    found = result.summary
    rows = [json.loads(line) for line in (tmp_path / "run" / "queries.jsonl").read_text().splitlines()]
    calls = [json.loads(line) for line in (tmp_path / "run" / "calls.jsonl").read_text().splitlines()]
    errors: Counter[str] = Counter()
    for name, arm in found["arms"].items():
        queries = arm["queries"]
        assert queries["started"] == queries["completed"] + queries["failed"] + queries["abandoned"] == 8
        assert Counter(row["outcome"] for row in rows if row["arm"] == name)["failed"] == queries["failed"]
        errors.update(arm["errors"])
    assert set(errors) == ({kind} if kind else set())
    failed = [call for call in calls if call["error"] not in (None, "cancelled")]
    assert Counter(call["error"] for call in failed) == errors
    assert all(call["done_at"] is not None for call in calls)
    for row in rows:  # a query failed if and only if one of its calls did
        mine = [call for call in failed if (call["arm"], call["query"]) == (row["arm"], row["query"])]
        assert (row["outcome"] == "failed") == bool(mine)
    assert found["server"]["reconciled"] is reconciled
    if kind is None:
        assert found["validity"]["counted"] is True


def test_a_server_that_dies_costs_what_was_sent_to_it(tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text(SCENARIO.replace("queries = 8", "queries = 40"))
    raw, source = scenario_check.read(str(tmp_path / "faults.toml"))

    async def run_and_kill(kill: Any) -> session.Result:
        options = session.Options(tmp_path / "run", 0, "faults", "test", [], None)
        running = asyncio.ensure_future(session.run(scenario, topologies(), options))
        journal = tmp_path / "run" / "queries.jsonl"
        async with asyncio.timeout(30):
            while not journal.exists() or journal.stat().st_size == 0:  # noqa: ASYNC110  # a file tells nobody
                await asyncio.sleep(0.02)
        kill()
        return await running

    with running_stub() as stub:
        raw["target"] = {"url": f"{stub.url}/v1"}
        scenario = scenario_check.check(raw, source, topologies())
        with asyncio.Runner() as runner:
            found = runner.run(run_and_kill(stub.process.kill)).summary
    for arm in found["arms"].values():
        queries = arm["queries"]
        assert queries["started"] == 40 == queries["completed"] + queries["failed"]
        assert set(arm["errors"]) <= {"connect", "stream_cut"}
    assert sum(arm["queries"]["failed"] for arm in found["arms"].values()) > 0
    assert found["server"]["reconciled"] is None
