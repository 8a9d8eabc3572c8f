"""`fanmark simulate`: the same counts as a run, the same bytes for the same seed, and the same times as real time."""

import asyncio
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fanmark.agents import topologies
from fanmark.agents.runtime import Runtime, Topology
from fanmark.agents.single import Params
from fanmark.loadgen import scenario_check
from fanmark.loadgen.cli import app
from fanmark.loadgen.clock import Deadlock
from fanmark.loadgen.results import print_result
from fanmark.loadgen.session import Result
from fanmark.loadgen.simulate import Options, ignored, repeatable, simulate, with_profile

FILES = ("calls.jsonl", "queries.jsonl", "report.html", "samples.jsonl", "scenario.toml", "summary.json")


def simulated(
    out: Path, *settings: str, table: dict[str, Topology] | None = None, profile: str | None = None
) -> Result:
    raw, source = scenario_check.read("quickstart")
    scenario_check.override(raw, settings)
    known = {**topologies(), **(table or {})}
    scenario = scenario_check.check(raw, source, known)
    if profile is not None:
        scenario = with_profile(scenario, profile)
    return simulate(scenario, known, Options(out, "0", []))


def fanmark(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fanmark.loadgen.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_quickstart_counts_exactly(tmp_path: Path, api: str) -> None:
    found = simulated(tmp_path / "run", f"stub.api={api}").summary
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(FILES)
    validity = found["validity"]
    ticks = ("counted", "reconciled", "alone", "uncontaminated", "client_ok")
    assert [validity[tick] for tick in ticks] == [True] * 5, validity
    assert validity["reasons"]["client_ok"] == "virtual time has no client"
    for name, calls, tool_calls, depth, width in (
        ("single", 1, 0, 1, 1),
        ("debate", 9, 0, 3, 4),
        ("mcp-chain", 13, 12, 13, 1),
    ):
        arm = found["arms"][name]
        assert arm["queries"] == {"started": 20, "completed": 20, "failed": 0, "abandoned": 0}
        assert [arm["per_query"][r]["mean"] for r in ("calls", "tool_calls", "depth", "width")] == [
            calls,
            tool_calls,
            depth,
            width,
        ]
        for resource in ("input_tokens", "output_tokens"):
            assert arm["per_query"][resource]["mean"] == arm["expected"][resource]
        assert arm["expected"]["mismatches"] == 0
        gpu_s, joules = (arm["per_query"][name]["mean"] for name in ("gpu_s", "joules"))
        assert joules > 100 * gpu_s > 0  # by attribution, though the arms share the engine
        assert {call["lane"] for call in rows(tmp_path / "run" / "calls.jsonl") if call["kind"] == "call"} == {
            "virtual"
        }
    run, server = found["run"], found["server"]
    assert (run["clock"], run["started"], run["id"]) == ("virtual", None, "virtual-7")
    assert server["request_success"] == {"client": 483, "server": 483, "off_pct": 0.0}
    assert 0.0 < server["engine_busy_s"] < run["seconds"]
    assert server["engine_joules"] > server["engine_busy_s"] * 100  # no H100 at work takes less than 100 W


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    flags = ["simulate", "--queries", "3", "--rate", "1"]
    for out, more in (("a", []), ("b", ["--json"]), ("c", ["--seed", "8"])):
        done = fanmark(*flags, *more, "--out", str(tmp_path / out), PYTHONHASHSEED=str(ord(out)))
        assert (done.returncode, done.stderr) == (0, "")
        if "--json" in more:
            assert json.loads(done.stdout) == json.loads((tmp_path / out / "summary.json").read_text())
    contents = {out: [(tmp_path / out / name).read_bytes() for name in FILES] for out in "abc"}
    assert contents["a"] == contents["b"]
    assert all(a != c for a, c in zip(contents["a"], contents["c"], strict=True))


def test_what_is_let_go_at_the_end_is_in_the_order_in_which_it_began(tmp_path: Path) -> None:
    """An arm far beyond its capacity, which a window leaves with queries that wait; in no order of addresses."""
    load = ["--rate", "3", "--duration", "20", "--max-in-flight", "1"]
    only = ["--set", 'arm=[{name="single", topology="single", baseline=true}]']
    app(["simulate", *load, *only, "--json", "--out", str(tmp_path / "run")], standalone_mode=False)
    left = [row for row in rows(tmp_path / "run" / "queries.jsonl") if row["outcome"] == "abandoned"]
    due_at = [row["due_at"] for row in left]
    assert len(due_at) == 70 and due_at == sorted(due_at) and {row["phase"] for row in left} == {"lead-out"}


@pytest.mark.slow
def test_the_resolved_scenario_repeats_it(tmp_path: Path) -> None:
    first = fanmark("simulate", "--queries", "2", "--profile", "qwen3-32b@h100", "--out", str(tmp_path / "a"))
    again = fanmark("simulate", str(tmp_path / "a" / "scenario.toml"), "--out", str(tmp_path / "b"))
    assert (first.returncode, again.returncode) == (0, 0)
    for name in ("calls.jsonl", "queries.jsonl", "scenario.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_a_profile_rests_on_is_noted_and_printed(tmp_path: Path) -> None:
    found = simulated(tmp_path / "run", "load.queries=1", profile="gpt-oss-120b@b200")
    assert any("never fitted: expect +-50 %" in note for note in found.summary["notes"])
    to = io.StringIO()
    print_result(found.summary, tmp_path / "run", to)
    printed = to.getvalue()
    assert "never fitted: expect +-50 %" in printed
    assert "engine busy" in printed
    assert "client   ok: virtual time has no client" in printed


def test_named_targets_have_engines_of_their_own(tmp_path: Path) -> None:
    result = simulated(
        tmp_path / "run",
        'targets={small={url="http://127.0.0.1:9", prices={input=1.0, output=2.0}}, big={url="http://127.0.0.1:9"}}',
        "arm.single.target=small",
        'arm.debate.targets={judge="small", default="big"}',
        "arm.mcp-chain.target=big",
        "load.queries=2",
    )
    found = result.summary
    calls = {name: part["request_success"]["server"] for name, part in found["server"].items()}
    assert calls == {"small": 3 * (1 + 1), "big": 3 * (8 + 13)}
    assert found["validity"]["reconciled"] is True
    single = found["arms"]["single"]["per_query"]
    assert single["dollars"]["mean"] == pytest.approx((500 * 1.0 + single["output_tokens"]["mean"] * 2.0) / 1e6)


def test_it_says_what_it_ignores() -> None:
    raw, source = scenario_check.read("quickstart")
    settings = [
        'target.url="http://127.0.0.1:9/v1"',
        'tools.server=[{url="http://127.0.0.1:9/mcp"}]',
        'tools.call=["fly"]',
    ]
    scenario_check.override(raw, settings)
    lines = ignored(scenario_check.check(raw, source, topologies()))
    assert [line.split(":")[0] for line in lines] == ["ignored"] * 3
    assert all(
        part in " ".join(lines) for part in ("[target] url = 'http://127.0.0.1:9/v1'", "[[tools.server]]", "['fly']")
    )


def test_a_slower_tool_takes_longer_by_as_much(tmp_path: Path) -> None:
    lone = [
        "arm.single.queries=1",
        "arm.debate.queries=1",
        "arm.mcp-chain.queries=2",
        "load.arms=apart",
        "load.mode=closed",
    ]
    seconds = []
    for round_trip_s in (0.0, 0.1):
        found = simulated(tmp_path / str(round_trip_s), *lone, f"tools.round_trip_s={round_trip_s}").summary
        seconds.append(found["arms"]["mcp-chain"]["per_query"]["tool_s"]["mean"])
    assert seconds[1] - seconds[0] == pytest.approx(12 * 0.1)


async def _stuck(rt: Runtime, p: Params) -> None:
    await asyncio.Event().wait()


def test_a_topology_that_waits_for_nothing_is_an_error(tmp_path: Path) -> None:
    stuck = Topology("stuck", "waits for nothing", Params, _stuck, None)
    with pytest.raises(Deadlock, match="virtual time stands still"):
        simulated(tmp_path / "run", "arm.single.topology=stuck", "load.queries=1", table={"stuck": stuck})


MISTAKES = [
    (["--profile", "gpt-9@abacus"], "profile 'gpt-9@abacus': unknown model 'gpt-9'; there is: "),
    (["--set", "tools.latency_s={dist='uniform', mean=1.0}"], "[tools] latency_s: a uniform distribution needs"),
    (["--set", "tools.round_trip_s=-1"], "round_trip_s"),
    (["--queries", "3", "--duration", "5"], "give one of the two"),
    (["--target", "http://127.0.0.1:9/v1"], "No such option: --target"),
]


@pytest.mark.parametrize(("flags", "said"), MISTAKES)
@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path: Path, flags: list[str], said: str) -> None:
    done = fanmark("simulate", *flags, "--out", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_command_is_kept_without_where_and_how_it_prints() -> None:
    command = ["simulate", "x.toml", "--out", "here", "--json", "--seed", "3", "--out=there"]
    assert repeatable(command) == ["simulate", "x.toml", "--seed", "3"]


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    run = f"ulimit -f 8; exec {sys.executable} -m fanmark.loadgen.cli simulate --queries 9 --out {tmp_path}/run"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fanmark: {tmp_path}/run: cannot be written any more (File too large)\n"


@pytest.mark.slow
def test_interrupt_writes_what_was_simulated(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fanmark.loadgen.cli",
        "simulate",
        "--queries",
        "100000",
        "--out",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        give_up_at = time.monotonic() + 60
        path = tmp_path / "run" / "queries.jsonl"
        counted = '"arm":"single","warmup":false'
        while not (path.exists() and counted in path.read_text()) and time.monotonic() < give_up_at:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "INTERRUPTED" in out
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["partial"] is True
    assert found["arms"]["single"]["queries"]["completed"] > 0


@pytest.mark.real
@pytest.mark.quiet
def test_real_time_and_virtual_time_agree(tmp_path: Path) -> None:
    """At rest, where a millisecond more or less moves no request into another batch; benchmarks/two_clocks.py does it under load."""
    time_scale = 5.0
    flags = ["quickstart", "--queries", "2", "--set", "load.mode=closed", "--set", "load.arms=apart"]
    lengths = {"answer": 20, "judge_answer": 20, "action": 6, "tool_result": 60}
    flags += [word for kind, tokens in lengths.items() for word in ("--set", f"workload.{kind}={tokens}")]
    flags += ["--set", "tools.latency_s=0.03", "--set", "arm.mcp-chain.tool_calls=3"]
    real = fanmark(
        "run", *flags, "--set", f"stub.time_scale={time_scale}", "--quiet", "--json", "--out", str(tmp_path / "real")
    )
    round_trip = f"tools.round_trip_s={0.002 / time_scale}"
    virtual = fanmark("simulate", *flags, "--set", round_trip, "--json", "--out", str(tmp_path / "virtual"))
    a, b = json.loads(real.stdout), json.loads(virtual.stdout)
    assert (a["run"]["clock"], b["run"]["clock"]) == ("real", "virtual")
    for name, arm in a["arms"].items():
        other = b["arms"][name]
        for resource in ("calls", "tool_calls", "input_tokens", "cached_tokens", "output_tokens", "depth", "width"):
            assert arm["per_query"][resource] == other["per_query"][resource], (name, resource)
        for part, key in (
            ("per_query", "latency_s"),
            ("per_call", "latency_s"),
            ("per_call", "ttft_s"),
            ("per_call", "tpot_s"),
        ):
            means = [found[part][key]["mean"] for found in (arm, other)]
            assert math.isclose(*means, rel_tol=0.03), (name, key, means)
