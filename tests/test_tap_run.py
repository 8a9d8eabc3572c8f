"""fanmark's own runs through the tap: what the tap tells of each query is what the run tells of it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from free_port import free_port
from processes import children
from stub_process import Stub, running_stub
from tapped import SALT, by_seed, through
from test_replay import AS_RECORDED, replay, simulated

from fanmark.agents import topologies
from fanmark.loadgen import compare, session
from fanmark.loadgen.recording import text_id
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.trace_headers import trace_id
from fanmark.loadgen.verify import verify
from fanmark.servers.prose import Prose
from fanmark.servers.tokenizer import Tokenizer, vocabulary

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
    assert (summary["tap"]["unattributed"], summary["tap"]["lengths"]) == (0, "counted")
    assert set(summary["tap"]["attributed"]["call"]) == {"traceparent"}
    assert verify(tmp_path / "tap", topologies()).differ == []
    again = simulated(replay(tmp_path / "tap", "tapped", queries=12), tmp_path / "again")["arms"]["tapped"]
    assert {name: again["fidelity"][name] for name in AS_RECORDED} == AS_RECORDED
    assert again["fidelity"]["overlap"] > 0.75  # nobody else shares this cache: it holds a little more
    per_query = summary["arms"]["tapped"]["per_query"]["cached_tokens"]
    assert again["per_query"]["cached_tokens"]["mean"] == pytest.approx(per_query["mean"], rel=0.1)


SECRETS = {
    "authorization": "Bearer sk-very-secret-key",
    "x-session-id": "session-of-somebody",
    "x-api-key": "another-secret",
}


@contextmanager
def tapping(*flags: str) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """The command, and the address that it prints; it does not outlive the block."""
    command = [sys.executable, "-m", "fanmark.loadgen.cli", "tap", *flags]
    env = {**os.environ, "CI": "true"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            url = next(line.split()[1] for line in iter(process.stderr.readline, "") if line.startswith("tap "))
            yield process, url.removesuffix("/v1")
        finally:
            process.kill()


def chat(url: str, *texts: str, **fields: Any) -> Any:
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    reply = Stub(url, 0, None).send(  # type: ignore[arg-type]
        "POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 9, "ignore_eos": True, **fields}, SECRETS
    )
    assert reply.status == 200, reply.body
    return reply


def test_messages_that_begin_alike_are_found_in_the_cache_as_far_when_they_are_made_again(
    stub: Stub, tmp_path: Path
) -> None:
    """A long instruction in front of each question, as templates have it: the messages differ, their beginnings do not."""
    prose = Prose()

    async def use(url: str) -> None:
        for i in range(8):
            text = f"{prose.text('instruction', 6_000)} {prose.text(f'question {i}', 200 + 40 * i)}"
            await asyncio.to_thread(chat, url.removesuffix("/v1"), "You answer in a word.", text)

    _, summary = asyncio.run(through(f"{stub.url}/v1", tmp_path / "tap", use))
    cached = summary["arms"]["tapped"]["per_query"]["cached_tokens"]["mean"]
    assert cached > 1_000
    again = simulated(replay(tmp_path / "tap", "tapped", queries=8), tmp_path / "again")["arms"]["tapped"]
    assert {name: again["fidelity"][name] for name in AS_RECORDED} == AS_RECORDED
    assert again["fidelity"]["overlap"] > 0.8
    assert again["per_query"]["cached_tokens"]["mean"] == pytest.approx(cached, rel=0.1)


@pytest.mark.parametrize("keeps", [False, True])
def test_nothing_that_was_said_is_kept_unless_it_is_asked_for(stub: Stub, tmp_path: Path, keeps: bool) -> None:
    out = tmp_path / "tap"
    flags = ["--target", f"{stub.url}/v1", "--out", str(out), "--idle", "0.3"] + ["--keep-text"] * keeps
    with tapping(*flags) as (process, url):
        said = chat(url, "You are terse-and-unusual.", "Where did the albatross go?").json()["choices"][0]["message"][
            "content"
        ]
        streamed = chat(
            url, "You are terse-and-unusual.", "Where did the albatross go?", said, "And the walrus?", stream=True
        )
        assert streamed.events()[-1]["choices"]  # no usage, which nobody had asked for
        (carrier,) = [pid for pid in children(process.pid) if "carrier" in Path(f"/proc/{pid}/cmdline").read_text()]
        give_up_at = time.monotonic() + 30
        while os.sched_getscheduler(process.pid) != os.SCHED_BATCH or os.getpriority(os.PRIO_PROCESS, process.pid) <= (
            os.getpriority(os.PRIO_PROCESS, carrier)
        ):
            assert time.monotonic() < give_up_at, "what writes down does not go behind what passes the bytes on"
            time.sleep(0.02)
        assert os.sched_getscheduler(carrier) == os.SCHED_OTHER
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "session header" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tap"]["attributed"]["call"] == {"session": 2}
    assert summary["arms"]["tapped"]["per_query"]["output_tokens"]["mean"] == 9
    calls = [json.loads(line) for line in (out / "calls.jsonl").read_text().splitlines()]
    assert [sum(m["tokens"] for m in call["messages"]) for call in calls] == [call["input_tokens"] for call in calls]
    words = Tokenizer(vocabulary())
    texts = ("You are terse-and-unusual.", "Where did the albatross go?", said, "And the walrus?")
    assert [m["tokens"] for m in calls[1]["messages"]] == [words.count(text) for text in texts]
    assert summary["tap"]["lengths"] == "counted"
    whole = "".join(path.read_text() for path in out.iterdir())
    told = [word in whole for word in ("terse-and-unusual", "albatross", said)]
    assert told == [keeps] * 3
    assert not [value for value in SECRETS.values() if value.removeprefix("Bearer ") in whole + printed]


def test_what_cannot_be_attributed_has_a_bucket_of_its_own(stub: Stub, tmp_path: Path) -> None:
    async def use(url: str) -> None:
        for question in ("one thing or another", "something else entirely"):
            await asyncio.to_thread(
                Stub(url, 0, None).send,
                "POST",
                "/v1/completions",
                {"prompt": question, "max_tokens": 5},  # type: ignore[arg-type]
            )

    _, summary = asyncio.run(through(f"{stub.url}/v1", tmp_path / "tap", use))
    assert summary["tap"]["attributed"]["call"] == {"none": 2} and summary["tap"]["unattributed"] == 2
    assert summary["arms"]["unattributed"]["queries"]["completed"] == 2
    assert set(summary["arms"]["unattributed"]["amplification"].values()) == {None}
    assert verify(tmp_path / "tap", topologies()).differ == []

    async def use_named(url: str) -> None:
        await asyncio.to_thread(of_api, url, "/v1/completions", model="qwen3-30b-a3b")

    asyncio.run(through(f"{stub.url}/v1", tmp_path / "other", use_named))
    runs = [compare.read(tmp_path / name, topologies()) for name in ("tap", "other")]
    found = compare.compare(*runs, force=False)
    assert list(found["arms"]) == ["tapped"] and found["paired"] is False


def test_mistakes_are_told_in_a_line(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "queries.jsonl").touch()
    with socket.create_server(("127.0.0.1", 0)) as port:
        taken = str(port.getsockname()[1])
        target = ["--target", f"{stub.url}/v1"]
        for flags, code, word in (
            (["--target", "http://127.0.0.1:1/v1"], 3, "does not answer"),
            ([*target, "--port", taken], 2, f"--port {taken}"),
            ([*target, "--out", str(tmp_path / "taken")], 2, "another run"),
            ([*target, "--mcp", "/v1=http://127.0.0.1:9/mcp"], 2, "--mcp"),
        ):
            out = [] if "--out" in flags else ["--out", str(tmp_path / "none")]
            command = [sys.executable, "-m", "fanmark.loadgen.cli", "tap", *flags, *out]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
            assert word in done.stderr and not (tmp_path / "none").exists()


HISTORY = [{"role": "user", "content": "How far is it?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HISTORY, "max_tokens": 7, "ignore_eos": True},
    "/v1/completions": {"prompt": "How far is it?", "max_tokens": 7, "ignore_eos": True},
    "/v1/responses": {"input": HISTORY, "max_output_tokens": 7},
    "/v1/messages": {"messages": HISTORY, "max_tokens": 7},
}


def of_api(url: str, path: str, **more: Any) -> None:
    reply = Stub(url, 0, None).send("POST", path, {"model": "m", **BODIES[path], **more}, {"x-fanmark-query": "one"})  # type: ignore[arg-type]
    assert reply.status == 200, reply.body


def test_every_api_is_counted_as_the_server_counts_streamed_or_not(tmp_path: Path) -> None:
    port = free_port()

    async def use(url: str) -> dict[str, float]:
        for path in BODIES:
            for stream in (False, True):
                await asyncio.to_thread(of_api, url, path, stream=stream)
        metrics = Stub(f"http://127.0.0.1:{port}", 0, None)  # type: ignore[arg-type]
        ended = 'fanmark_query_calls_count{arm="tapped",topology="replay"}'
        return await asyncio.to_thread(metrics.until, ended, 1.0)

    with running_stub("--time-scale", "0.1", "--model", "m") as server:
        told, summary = asyncio.run(through(f"{server.url}/v1", tmp_path / "tap", use, metrics_port=port))
    calls = [json.loads(line) for line in (tmp_path / "tap" / "calls.jsonl").read_text().splitlines()]
    assert [call["api"] for call in calls] == [
        api for api in ("chat", "completions", "responses", "messages") for _ in "ab"
    ]
    assert [(c["input_tokens"], c["output_tokens"], c["error"]) for c in calls] == [(5, 7, None)] * 8
    assert all(call["gpu_s"] > 0 for call in calls)  # as the stub says, whichever API is asked
    assert summary["server"]["reconciled"] is True and summary["validity"]["alone"] is True
    labels = 'arm="tapped",topology="replay"'
    assert told[f"fanmark_query_calls_sum{{{labels}}}"] == 8
    assert told[f'fanmark_query_tokens_sum{{{labels},kind="input"}}'] == 40
    assert told[f"fanmark_query_depth_count{{{labels}}}"] == 1


def test_a_carrier_that_dies_leaves_the_summary_of_what_was_recorded(stub: Stub, tmp_path: Path) -> None:
    out = tmp_path / "tap"
    with tapping("--target", f"{stub.url}/v1", "--out", str(out), "--queries", "9") as (process, url):
        chat(url, "Be brief.", "Why?")
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        for pid in {pid for path in children for pid in path.read_text().split()}:
            if b"tap.carrier" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 1 and "carrier ended (-9)" in told
    summary = json.loads((out / "summary.json").read_text())
    assert "carrier ended (-9)" in summary["tap"]["partial"]
    assert any(note.startswith("partial: ") for note in summary["notes"])
