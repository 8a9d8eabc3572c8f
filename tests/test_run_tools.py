"""Runs whose tool servers die, or turn agents away: no agent hangs, every call has an outcome, the accounts balance."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mcp_peers import StartTools

pytestmark = pytest.mark.real

CHAINS = """
[[arm]]
name = "chain"
topology = "tool-chain"
baseline = true
tool_calls = 3
[load]
mode = "closed"
concurrency = 200
queries = 400
warmup = 0
[workload]
system = 20
question = 20
action = 2
answer = 2
[tools]
expose = 1
call_timeout_s = 20
"""
RUN = [sys.executable, "-m", "fanmark.loadgen.cli", "run"]


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """A run of the chains, under way."""
    scenario = folder / "chains.toml"
    scenario.write_text(CHAINS)
    command = [*RUN, str(scenario), "--json", "--out", str(folder / "out"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(run: subprocess.Popen[str], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Its summary and its tool calls."""
    out, err = run.communicate(timeout=100)
    assert out, err
    calls = [json.loads(line) for line in (folder / "out" / "calls.jsonl").read_text().splitlines()]
    return json.loads(out), [call for call in calls if call["kind"] == "tool_call"]


def check_accounts(found: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    queries = found["arms"]["chain"]["queries"]
    assert queries["started"] == queries["completed"] + queries["failed"] + queries["abandoned"] == 400
    assert all(call["done_at"] is not None for call in calls)
    errors = Counter(call["error"] for call in calls if call["error"] not in (None, "cancelled"))
    assert errors == found["arms"]["chain"]["errors"]
    assert set(errors) <= {"tool_transport", "tool_protocol"}
    assert sum(part["calls"] for part in found["arms"]["chain"]["by_tool"].values()) == len(calls)


@pytest.mark.parametrize("session", ["shared", "per_agent"])
def test_a_tool_server_that_is_killed_and_comes_back(tmp_path: Path, start_tools: StartTools, session: str) -> None:
    """kill -9 amid 200 chains, back on the same port after two seconds."""
    latency = ("--latency-s", '{"dist": "uniform", "min": 0.2, "max": 0.8}')
    server = start_tools(*latency)
    flags = ("--set", f'tools.server=[{{url="{server.url}"}}]', "--set", f'tools.session="{session}"')
    run = start(tmp_path, *flags)
    with run:
        while server.connections() < 100:
            assert run.poll() is None
            time.sleep(0.05)
        server.stop()
        time.sleep(2)
        start_tools(*latency, "--port", server.port)
        found, calls = ended(run, tmp_path)
    check_accounts(found, calls)
    assert not found["partial"]
    queries, sessions = found["arms"]["chain"]["queries"], found["tools"]["sessions"]
    assert queries["completed"] >= 200  # those that came after, and those that were waiting for it
    assert queries["failed"] > 0
    assert sessions["count"] >= (queries["started"] if session == "per_agent" else 1)
    assert sessions["start_s"]["max"] > 1  # the wait for the server
