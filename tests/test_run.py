"""`fanmark run` as a user types it: real servers as processes, and what the files and the exit code say afterwards."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from processes import children, gone
from stub_process import running_stub

pytestmark = pytest.mark.real

# short answers, so that a query takes a second and not ten
SHORT = [
    *("--set", "workload.answer=20"),
    *("--set", "workload.judge_answer=20"),
    *("--set", "workload.action=8"),
    *("--set", "workload.tool_result=40"),
    *("--set", "tools.latency_s=0.01"),
]
# and where the chain's length does not matter
BRIEF = [*SHORT, "--set", "arm.mcp-chain.tool_calls=2", "--set", "load.warmup=0"]


def fanmark(*args: str, env: dict[str, str] | None = None, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    command = [sys.executable, "-m", "fanmark.loadgen.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **(env or {})})


@contextmanager
def started(out: Path, *args: str) -> Iterator["subprocess.Popen[str]"]:
    """The command, running; it does not outlive the block."""
    command = [sys.executable, "-m", "fanmark.loadgen.cli", "run", "--out", str(out), *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run_json(out: Path, *args: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """summary.json of a run that must succeed; --json prints it and nothing else."""
    done = fanmark("run", *args, "--json", "--out", str(out), env=env)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == json.loads((out / "summary.json").read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_quickstart_counts_exactly(tmp_path: Path, api: str) -> None:
    out = tmp_path / "run"
    found = run_json(out, "--api", api, "--queries", "4", "--rate", "4", *SHORT)

    assert found["schema"] == "fanmark.summary/1"
    assert not found["partial"]
    validity = found["validity"]
    assert [validity[tick] for tick in ("counted", "reconciled", "alone", "uncontaminated")] == [True] * 4
    assert validity["steady"] is None
    arms = found["arms"]
    for name, calls, tool_calls, output, depth, width in (
        ("single", 1, 0, 20, 1, 1),
        ("debate", 9, 0, 180, 3, 4),
        ("mcp-chain", 13, 12, 116, 13, 1),
    ):
        arm = arms[name]
        assert arm["queries"] == {"started": 4, "completed": 4, "failed": 0, "abandoned": 0}
        assert arm["errors"] == {}
        assert arm["expected"]["mismatches"] == 0
        measured = [arm["per_query"][r]["mean"] for r in ("calls", "tool_calls", "output_tokens", "depth", "width")]
        assert measured == [calls, tool_calls, output, depth, width]
        assert arm["per_query"]["input_tokens"]["mean"] == arm["expected"]["input_tokens"]
        times = {name: arm["per_query"][name]["mean"] for name in ("latency_s", "work_s", "critical_path_s", "tool_s")}
        assert 0 <= times["tool_s"] < times["critical_path_s"] <= times["work_s"]
        assert times["critical_path_s"] <= times["latency_s"]
    # 300 + 200 tokens, 9 prompts: 4 x (500 + 20), 4 x (500 + 40 + 4 x 20 + 20), 500 + 4 x 20 + 40
    assert arms["debate"]["per_query"]["input_tokens"]["mean"] == 2080 + 2560 + 620
    assert arms["debate"]["amplification"]["calls"] == {
        "ratio": 9.0,
        "low": 9.0,
        "high": 9.0,
        "method": "paired bootstrap over queries",
    }
    assert arms["mcp-chain"]["amplification"]["calls"]["ratio"] == 13.0
    assert arms["debate"]["amplification"]["latency_s"]["low"] is None
    assert arms["mcp-chain"]["amplification"]["tool_calls"] is None  # a single pass makes none

    queries, calls = lines(out / "queries.jsonl"), lines(out / "calls.jsonl")
    assert len(queries) == 3 * (4 + 1)  # one warm-up query of each arm
    assert {q["arm"] for q in queries if q["warmup"]} == {"single", "debate", "mcp-chain"}
    assert len(calls) == 5 * (1 + 9 + 25)
    new = sum(c["connect_s"] is not None for c in calls if c["query"] >= 0)
    assert found["client"]["connections"] == {"new": new, "reused": 4 * (1 + 9 + 13) - new}
    assert sum((arm["per_call"]["connect_s"] or {"n": 0})["n"] for arm in arms.values()) == new
    sums = {key: sum(c[key] or 0 for c in calls) for key in ("input_tokens", "output_tokens", "cached_tokens")}
    assert found["server"]["prompt_tokens"] == {
        "client": sums["input_tokens"],
        "server": sums["input_tokens"],
        "off_pct": 0.0,
    }
    assert found["server"]["generation_tokens"]["server"] == sums["output_tokens"]
    assert found["server"]["prompt_tokens_cached"]["server"] == sums["cached_tokens"]
    assert found["server"]["request_success"]["server"] == 5 * (1 + 9 + 13)


def test_the_resolved_scenario_repeats_the_run(tmp_path: Path) -> None:
    """What a run writes as its scenario asks for the very same queries, with every flag in it."""
    flags = ["--queries", "3", "--rate", "4", "--seed", "5", *BRIEF]
    run_json(tmp_path / "run", *flags)
    plans = [
        json.loads(fanmark("run", *again, "--dry-run", "--json").stdout)
        for again in (flags, [str(tmp_path / "run" / "scenario.toml")])
    ]
    assert plans[0] == plans[1]
    assert plans[0]["mcp-chain"]["tool_calls"] == 6


def test_a_target_with_a_key_and_arms_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", "secret-of-the-stub")
    with running_stub("--api-key-env", "STUB_KEY") as stub:
        flags = [
            "--target",
            f"{stub.url}/v1",
            "--queries",
            "2",
            "--concurrency",
            "1",
            "--set",
            "load.arms=apart",
            *BRIEF,
        ]
        refused = fanmark("run", *flags, "--out", str(tmp_path / "none"), env={"OPENAI_API_KEY": ""})
        assert refused.returncode == 2
        assert "wants an API key" in refused.stderr
        found = run_json(tmp_path / "run", *flags, env={"OPENAI_API_KEY": "secret-of-the-stub"})
    assert found["server"]["reconciled"] is True
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert "secret-of-the-stub" not in written
    assert "OPENAI_API_KEY" in (tmp_path / "run" / "scenario.toml").read_text()
    spans = {
        arm: [(q["due_at"], q["done_at"]) for q in lines(tmp_path / "run" / "queries.jsonl") if q["arm"] == arm]
        for arm in found["arms"]
    }
    ordered = sorted((min(a for a, _ in s), max(b for _, b in s)) for s in spans.values())
    assert all(before[1] <= after[0] for before, after in pairwise(ordered))


def test_a_run_against_a_server_that_did_more_is_not_alone(tmp_path: Path) -> None:
    with running_stub() as stub:
        load = ["--queries", "3", "--rate", "3", *BRIEF]
        with started(tmp_path / "run", "--target", f"{stub.url}/v1", "--strict", *load) as process:
            assert process.stderr is not None
            assert any("metrics" in line for line in process.stderr)
            give_up_at = time.monotonic() + 30
            while not (tmp_path / "run" / "queries.jsonl").exists() and time.monotonic() < give_up_at:
                time.sleep(0.02)
            time_of_other_traffic = stub.send(
                "POST",
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "ignore_eos": True},
            )
            assert time_of_other_traffic.status == 200
            out, _ = process.communicate(timeout=60)
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["validity"]["alone"] is False
    assert found["server"]["generation_tokens"]["server"] - found["server"]["generation_tokens"]["client"] == 3
    assert process.returncode == 1  # --strict
    assert out.index("FAILED") < out.index("per query")  # above the table


def test_metrics_while_it_runs(tmp_path: Path) -> None:
    """Of a run of ten queries all is there at its end, while it is held; the servers that it started tell at the same address."""
    with started(tmp_path / "run", "--queries", "10", "--concurrency", "5", "--metrics-hold", "60", *BRIEF) as process:
        assert process.stderr is not None
        url = next(m[0] for line in process.stderr if (m := re.search(r"http://\S+/metrics", line)))
        text, give_up_at = "", time.monotonic() + 60
        while 'mark="end"' not in text:
            assert process.poll() is None and time.monotonic() < give_up_at
            text = urllib.request.urlopen(url, timeout=5).read().decode()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert 'fanmark_amplification_ratio{arm="debate",topology="debate",resource="calls"} 9.0\n' in text
    assert 'fanmark_expected_calls{arm="mcp-chain",topology="tool-chain"} 3.0\n' in text
    assert 'fanmark_query_calls_bucket{arm="debate",topology="debate",le="6.0"} 0\n' in text
    assert "vllm:generation_tokens_total{" in text
    assert sum(float(n) for n in re.findall(r'fanmark_tools_calls_total\{\S*outcome="completed"\S* (\S+)', text)) == 20


@pytest.mark.parametrize("twice", [False, True])
def test_interrupt_writes_what_was_measured(tmp_path: Path, twice: bool) -> None:
    long = ["--set", "workload.judge_answer=4000", "--set", "load.warmup=0", *SHORT[:2], *SHORT[4:]]
    with started(tmp_path / "run", "--queries", "500", "--rate", "5", *long) as process:
        give_up_at = time.monotonic() + 60
        path = tmp_path / "run" / "queries.jsonl"
        while not (path.exists() and '"warmup":false' in path.read_text()) and time.monotonic() < give_up_at:
            time.sleep(0.05)
        servers = children(process.pid)
        assert len(servers) >= 2
        process.send_signal(signal.SIGINT)
        if twice:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert "INTERRUPTED" in out
        assert "Traceback" not in err
        found = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert found["partial"] is True
        for name, arm in found["arms"].items():
            counts = arm["queries"]
            assert counts["started"] == counts["completed"] + counts["failed"] + counts["abandoned"]
            rows = [q for q in lines(path) if q["arm"] == name and not q["warmup"]]
            assert len(rows) == counts["started"]
        assert found["arms"]["debate"]["queries"]["abandoned"] > 0  # 4,000 tokens take longer than the grace
        assert found["arms"]["single"]["queries"]["completed"] > 0
        assert gone(servers)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_survives_a_kill(tmp_path: Path, how: signal.Signals) -> None:
    with started(tmp_path / "run", "--quiet") as process:
        give_up_at = time.monotonic() + 60
        while not (tmp_path / "run" / "queries.jsonl").exists() and time.monotonic() < give_up_at:
            time.sleep(0.05)
        servers = children(process.pid)
        assert len(servers) >= 2
        process.send_signal(how)
        process.communicate(timeout=30)
        assert gone(servers)


MISTAKES = [
    (["--target", "http://127.0.0.1:9/v1", "--set", "target.ready_timeout_s=0.5"], 3, "does not answer within 0.5 s"),
    (["--set", "stub.profile=gpt-9@abacus"], 2, "[stub] profile = 'gpt-9@abacus': unknown model"),
    (["--set", 'tools.server=[{command=["python3", "-c", "raise SystemExit(\'no such luck\')"]}]'], 3, "no such luck"),
    (
        ["--set", 'tools.server=[{url="http://127.0.0.1:9/mcp"}]', "--set", "tools.ready_timeout_s=1"],
        3,
        "tool server http://127.0.0.1:9/mcp",
    ),
    (["--set", 'tools.call=["fly"]'], 2, "there is no such tool, but"),
    (["--api-key-env", "NO_SUCH_VARIABLE", "--target", "http://127.0.0.1:9/v1"], 2, "set the environment variable"),
    (["--queries", "3", "--duration", "5"], 2, "give one of the two"),
]


@pytest.mark.parametrize(("flags", "code", "said"), MISTAKES)
def test_a_mistake_is_one_line_and_sends_nothing(tmp_path: Path, flags: list[str], code: int, said: str) -> None:
    done = fanmark("run", *flags, "--out", str(tmp_path / "run"), env={"NO_SUCH_VARIABLE": ""})
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_that_need_a_server(stub_url: str, tmp_path: Path) -> None:
    target = ["--target", f"{stub_url}/v1"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "queries.jsonl").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, code, said in (
            (["--model", "nope"], 3, "has no model 'nope', but qwen3"),
            (["--out", str(tmp_path / "used")], 2, "holds another run"),
            (["--metrics-port", port], 2, f"--metrics-port {port}: Address already in use"),
        ):
            done = fanmark("run", *target, "--out", str(tmp_path / "none"), *flags)
            assert done.returncode == code, done.stderr
            assert said in done.stderr
            assert done.stderr.startswith("fanmark: ")
            assert len([line for line in done.stderr.splitlines() if line]) == 1
    assert (tmp_path / "used" / "queries.jsonl").read_text() == ""


def _chain(server: str) -> list[str]:
    return ["--queries", "2", "--concurrency", "2", *SHORT[:6], *BRIEF[-2:], "--set", f"tools.server=[{server}]"]


def test_a_tool_server_by_command(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "mcp-server-time"), "--local-timezone", "UTC"]
    call = ["--set", 'tools.call=["get_current_time"]']
    found = run_json(tmp_path / "run", *_chain(f"{{command={json.dumps(command)}}}"), *call)
    _check_chain(found, lines(tmp_path / "run" / "calls.jsonl"), {"get_current_time"})


def test_a_tool_server_by_url_and_by_stdio(tmp_path: Path, everything_url: str, everything_program: str) -> None:
    call = ["--set", 'tools.call=["echo", "get-sum"]']
    found = run_json(tmp_path / "http", *_chain(f'{{url="{everything_url}"}}'), *call)
    _check_chain(found, lines(tmp_path / "http" / "calls.jsonl"), {"echo", "get-sum"})
    command = json.dumps([everything_program, "stdio"])
    found = run_json(tmp_path / "stdio", *_chain(f"{{command={command}}}"), *call)
    _check_chain(found, lines(tmp_path / "stdio" / "calls.jsonl"), {"echo", "get-sum"})


def _check_chain(found: dict[str, Any], calls: list[dict[str, Any]], tools: set[str]) -> None:
    """All tool calls happened, and the expectation took the results' real size."""
    arm = found["arms"]["mcp-chain"]
    assert arm["queries"]["completed"] == 2
    assert arm["per_query"]["tool_calls"]["mean"] == 12
    assert arm["expected"]["mismatches"] == 0
    assert arm["expected"]["input_tokens"] == arm["per_query"]["input_tokens"]["mean"]
    assert found["server"]["reconciled"] is True
    assert arm["errors"] == {}
    assert {call["tool"] for call in calls if call["kind"] == "tool_call"} == tools


@pytest.mark.parametrize("lane", ["fast", "openai"])
def test_a_hosted_endpoint_that_refuses_what_it_does_not_know(tmp_path: Path, lane: str) -> None:
    """No /tokenize, no counters, no cached tokens, 400 for vLLM's parameters: counts still hold, what is lost is said."""
    script = Path(__file__).with_name("plain_server.py")
    with subprocess.Popen([sys.executable, str(script), "k3y"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            flags = ["--target", server.stdout.readline().strip(), "--queries", "3", "--concurrency", "3", *BRIEF]
            flags += ["--set", f"target.lane={lane}"]
            found = run_json(tmp_path / "run", *flags, env={"OPENAI_API_KEY": "k3y"})
            wrong = fanmark("run", *flags, "--out", str(tmp_path / "none"), env={"OPENAI_API_KEY": "another"})
        finally:
            server.kill()
    assert (wrong.returncode, "the key in OPENAI_API_KEY is refused" in wrong.stderr) == (2, True)
    assert (found["target"]["model"], found["target"]["lane"]) == ("hosted", lane)
    assert found["server"]["reconciled"] is None
    validity = found["validity"]
    assert (validity["counted"], validity["reconciled"], validity["uncontaminated"]) == (True, None, None)
    debate = found["arms"]["debate"]
    assert debate["queries"]["completed"] == 3
    assert debate["per_query"]["calls"]["mean"] == 9
    assert debate["expected"]["approximate"] is True
    assert debate["expected"]["input_tokens"] is None
    assert debate["per_query"]["cached_tokens"] is None
    assert debate["per_query"]["output_tokens"]["max"] <= debate["expected"]["output_tokens"]  # a bound: no ignore_eos
    said = " ".join(found["notes"])
    for parameter in ("ignore_eos", "cache_salt", "max_tokens"):
        assert f"refuses '{parameter}'" in said
    assert "input lengths are approximate" in said
    assert "cached and fresh are unknown" in said
