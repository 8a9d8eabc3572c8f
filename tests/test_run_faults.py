"""The fault matrix: whatever goes wrong, a run ends by itself and in bounded time, each call has an outcome and a class, the records on
disk add up to the summary, and no task, socket, thread or process is left."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from processes import children
from stub_process import Stub, running_stub

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, session
from fanmark.loadgen.errors import FanmarkError, LostError
from fanmark.loadgen.records import Call, lines_of, read_queries
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.run import Run
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.summary import summarise_arms
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.target import connect
from fanmark.loadgen.verify import verify

pytestmark = pytest.mark.real

BOUND_S = 30.0
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
abort_on_errors = false
mode = "closed"
concurrency = 4
queries = 8
warmup = 0
[workload]
answer = 12
judge_answer = 12
"""
CLASSES = {"connect", "timeout", "http_429", "http_4xx", "http_5xx", "stream_cut", "bad_reply", "cancelled"}
SUCCEEDED = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'
ABORTED = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"}'
RUNNING = 'vllm:num_requests_running{engine="0",model_name="tiny"}'


@dataclass(frozen=True)
class Case:
    """A line of the matrix. `faults` of the stub; `kinds`: how calls may end, and at least one does (empty: none fails); `counted`: whether
    the server's counters may be met (None: not knowable, where calls ended without its count); `retried`: how attempts ended that were
    sent again; `target` and `load`: more keys of the scenario."""

    faults: tuple[str, ...]
    kinds: frozenset[str] = frozenset()
    counted: tuple[bool | None, ...] = (True, None)
    retried: frozenset[str] = frozenset()
    target: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)


def fails(*faults: str, by: str, **more: Any) -> Case:
    return Case(faults, frozenset(by.split()), **more)


def passes(*faults: str, counted: bool | None = True, **more: Any) -> Case:
    return Case(faults, counted=(counted,), **more)


def again(*faults: str, by: str, **target: Any) -> Case:
    """All queries complete, since calls are sent again."""
    return passes(*faults, retried=frozenset(by.split()), target={"retries": 20, "retry_backoff_s": 0.02, **target})


CASES = {
    "429": fails("429:rate=0.2", by="http_429"),
    "429, again": again("429:rate=0.4,retry_after_s=0.05", by="http_429"),
    "429 without Retry-After": fails("429-bare:rate=0.2", by="http_429"),
    "429 without Retry-After, again": again("429-bare:rate=0.4", by="http_429"),
    "503": fails("503:rate=0.2", by="http_5xx"),
    "503, again": again("503:rate=0.3", by="http_5xx"),
    "500": fails("500:rate=0.2", by="http_5xx"),
    "500 is not sent again": fails("500:rate=0.2", by="http_5xx", target={"retries": 20}),
    "slow admission": passes("slow-admission:rate=0.3,seconds=0.2"),
    "slow admission beyond the call's time": fails(
        "slow-admission:rate=0.2,seconds=30", by="timeout", load={"concurrency": 8}
    ),
    "stall": fails("stall:rate=0.2,seconds=30", by="timeout", load={"concurrency": 8}),
    "stall beyond the query's time": fails("stall:rate=0.2,seconds=30", by="cancelled", load={"query_timeout_s": 0.7}),
    "slow engine beyond the call's time": fails("slow-down:factor=300", by="timeout", load={"concurrency": 8}),
    "reset": fails("reset:rate=0.2", by="stream_cut"),
    "reset, aiohttp lane": fails("reset:rate=0.2", by="stream_cut", target={"lane": "aiohttp"}),
    "429, again, aiohttp lane": again("429:rate=0.3,retry_after_s=0.05", by="http_429", lane="aiohttp"),
    "truncated": fails("truncated:rate=0.2", by="stream_cut"),
    "malformed": fails("malformed:rate=0.2", by="bad_reply"),
    "no [DONE]": passes("no-done:rate=0.3"),
    "no usage": passes("no-usage:rate=0.3", counted=None),
    "error in a 200": fails("error-body:rate=0.2", by="bad_reply"),
    "error event": fails("error-event:rate=0.2", by="bad_reply"),
    "everything": fails(
        *("429:rate=0.1", "503:rate=0.1", "reset:rate=0.1", "malformed:rate=0.1", "stall:rate=0.1,seconds=30"),
        by="http_429 http_5xx stream_cut bad_reply timeout",
    ),
    "engine death and return": fails(
        "engine-death:after_s=0.2,until_s=0.4", by="http_5xx bad_reply", load={"queries": 60}
    ),
}


@pytest.fixture(scope="module")
def faulty() -> Iterator[Stub]:
    with running_stub("--model", "tiny", "--time-scale", "0.2") as server:
        yield server


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No thread, socket, file or process more than before."""

    def held() -> tuple[int, int, list[int]]:
        return threading.active_count(), len(os.listdir("/proc/self/fd")), children(os.getpid())

    before = held()
    yield
    assert held() == before


def scenario(folder: Path, target: dict[str, Any], load: dict[str, Any] | None = None) -> Scenario:
    (folder / "faults.toml").write_text(SCENARIO)
    raw, source = scenario_check.read(str(folder / "faults.toml"))
    raw["target"] = target
    raw["load"] |= load or {}
    return scenario_check.check(raw, source, topologies())


def run(one: Scenario, out: Path, beside: Callable[[], None] | None = None, port: int = 0) -> dict[str, Any]:
    """The summary of a run in this process, with `beside` in a thread next to it."""

    async def main() -> dict[str, Any]:
        async with asyncio.timeout(BOUND_S):
            running = session.run(one, topologies(), session.Options(out, port, "faults", "test", [], None))
            if beside is None:
                found = (await running).summary
            else:
                result, _ = await asyncio.gather(running, asyncio.to_thread(beside))
                found = result.summary
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return found

    with asyncio.Runner() as runner:
        return runner.run(main())


def check_accounts(found: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """What holds of every run; gives the lines of calls.jsonl."""
    rows, calls = (
        [json.loads(line) for line in (out / n).read_text().splitlines()] for n in ("queries.jsonl", "calls.jsonl")
    )
    for name, arm in found["arms"].items():
        mine = [row for row in rows if row["arm"] == name and not row["warmup"]]
        outcomes = Counter(row["outcome"] for row in mine)
        assert arm["queries"] == {"started": len(mine)} | {o: outcomes[o] for o in ("completed", "failed", "abandoned")}
        ends = Counter(call["error"] for call in calls if call["arm"] == name and call["retry_at"] is None)
        assert arm["errors"] == {kind: n for kind, n in ends.items() if kind not in (None, "cancelled")}
        for row in mine:
            own = [c for c in calls if (c["arm"], c["query"], c["retry_at"]) == (name, row["query"], None)]
            assert sorted(c["call"] for c in own) == list(range(1, len(own) + 1))
            if row["outcome"] != "abandoned":  # which may come between two calls
                assert (row["outcome"] == "completed") == (row["error"] is None and not any(c["error"] for c in own)), (
                    row
                )
    for call in calls:
        assert call["error"] in CLASSES if call["error"] else call["finish"] == "length", call
        assert call["due_at"] <= call["done_at"] and (call["sent_at"] or 0.0) <= call["done_at"] <= BOUND_S
    return calls


@pytest.mark.parametrize("name", CASES)
def test_a_fault_costs_its_calls_and_nothing_else(name: str, faulty: Stub, tmp_path: Path, nothing_left: None) -> None:
    case = CASES[name]
    limit_s = 1.0 if "timeout" in case.kinds else BOUND_S
    one = scenario(tmp_path, {"url": f"{faulty.url}/v1", "call_timeout_s": limit_s} | case.target, case.load)
    given = [
        dict(kind=kind, **dict(p.split("=") for p in rest.split(",") if p))
        for kind, _, rest in (f.partition(":") for f in case.faults)
    ]
    assert faulty.send("POST", "/admin/faults", {"faults": given, "seed": 3}).status == 200
    before = faulty.metrics()
    try:
        found = run(one, tmp_path / "run")
    finally:
        struck = sum(fault["struck"] for fault in faulty.send("GET", "/admin/faults").json()["faults"])
        faulty.send("DELETE", "/admin/faults")
    calls = check_accounts(found, tmp_path / "run")
    assert verify(tmp_path / "run", topologies()).differ == []
    if struck and case.kinds != {"cancelled"}:  # a call that was struck ended so, or was given up with its query before
        assert sum(call["error"] not in (None, "cancelled") for call in calls) <= struck
    arms = found["arms"].values()
    assert sum(arm["queries"]["started"] for arm in arms) == 2 * case.load.get("queries", 8)
    ended = {call["error"] for call in calls if call["retry_at"] is None}
    assert (ended & case.kinds or not case.kinds) and ended <= case.kinds | {
        None,
        *(["cancelled"] if case.kinds else []),
    }
    assert {call["error"] for call in calls if call["retry_at"] is not None} == case.retried
    assert sum(arm["waste"]["retries"] for arm in arms) == sum(call["retry_at"] is not None for call in calls)
    assert found["server"]["reconciled"] in case.counted
    assert sum(arm["expected"]["mismatches"] for arm in arms) == 0
    if not case.kinds:
        assert found["validity"]["counted"] is True
    after = faulty.until(RUNNING, 0)  # what was given up was aborted there, too
    if name == "slow engine beyond the call's time":  # 12 tokens take 4 s, so none could end
        given_up = sum(call["error"] is not None and call["sent_at"] is not None for call in calls)
        assert after[ABORTED] - before[ABORTED] == given_up == len(calls) > 0


def refusing_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_disk_that_is_full_ends_the_run_with_one_line(faulty: Stub, tmp_path: Path, nothing_left: None) -> None:
    one = scenario(tmp_path, {"url": f"{faulty.url}/v1"}, {"queries": 100_000})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "calls.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        LostError, match=r"run: cannot be written any more \(No space left on device\): .* single completed"
    ):
        run(one, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    faulty.until(RUNNING, 0)


def test_a_disk_that_fills_up_leaves_whole_records(faulty: Stub, tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text(SCENARIO)
    out, url = tmp_path / "run", f"{faulty.url}/v1"
    load = f"--queries 100000 --concurrency 8 --quiet --target {url}"
    run = f"ulimit -f 32; exec {sys.executable} -m fanmark.loadgen.cli run {tmp_path}/faults.toml --out {out} {load}"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=BOUND_S)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
    assert done.stderr.startswith(
        f"fanmark: {out}: cannot be written any more (File too large): the run ended with it; "
    )
    assert (out / "calls.jsonl").stat().st_size == 32 * 1024
    assert len(list(lines_of(out / "calls.jsonl", Call))) > 10


SILENT = {
    "nobody listens": ("http://127.0.0.1:{free}/v1", 0, "does not answer within 0.3 s"),
    "no such name": ("http://nobody.invalid:{free}/v1", 0, "nobody.invalid:.*: is the server up"),
    "port of the metrics taken": ("{stub}/v1", 1, "--metrics-port .*: Address already in use"),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_wrong_from_the_start_sends_nothing(
    name: str, faulty: Stub, tmp_path: Path, nothing_left: None
) -> None:
    url, metrics, said = SILENT[name]
    one = scenario(tmp_path, {"url": url.format(free=refusing_port(), stub=faulty.url), "ready_timeout_s": 0.3})
    taken = int(urlsplit(faulty.url).port or 0)
    before = faulty.metrics()
    with pytest.raises(FanmarkError, match=said):
        run(one, tmp_path / "run", port=taken if metrics else 0)
    assert not (tmp_path / "run").exists()
    assert {k: v for k, v in faulty.metrics().items() if "request" in k} == {
        k: v for k, v in before.items() if "request" in k
    }


@pytest.mark.parametrize("retries", [0, 30])
def test_a_server_that_dies_and_returns_costs_what_was_sent_to_it(
    retries: int, tmp_path: Path, nothing_left: None
) -> None:
    """Killed amid the run, and started again on its port. Without retries a call in between fails; with them it waits."""
    with ExitStack() as stack:
        stub = stack.enter_context(running_stub("--model", "tiny"))
        port = str(urlsplit(stub.url).port)
        load = {"queries": 40}
        one = scenario(tmp_path, {"url": f"{stub.url}/v1", "retries": retries, "retry_backoff_s": 0.05}, load)

        def kill_and_restart() -> None:
            while stub.metrics()[SUCCEEDED] < 10:
                time.sleep(0.01)
            stub.process.kill()
            stub.process.wait()
            stack.enter_context(running_stub("--model", "tiny", "--time-scale", "0.2", "--port", port))

        found = run(one, tmp_path / "run", kill_and_restart)
    calls = check_accounts(found, tmp_path / "run")
    assert verify(tmp_path / "run", topologies()).differ == []
    assert {call["error"] for call in calls if call["retry_at"] is None} <= {None, "stream_cut", "cancelled"} | (
        {"connect"} if retries == 0 else set()
    )
    assert {call["error"] for call in calls if call["retry_at"] is not None} <= {"connect"}
    arms = found["arms"].values()
    assert sum(arm["queries"]["started"] for arm in arms) == 80
    assert sum(arm["queries"]["abandoned"] for arm in arms) == 0
    assert found["server"]["reconciled"] is not True
    if retries:  # whoever was due after the kill was answered
        assert sum(arm["waste"]["retries"] for arm in arms) > 0
        last_cut = max((call["due_at"] for call in calls if call["error"] == "stream_cut"), default=0.0)
        late = [q for q in read_queries(tmp_path / "run") if q.due_at > last_cut]
        assert late and all(q.outcome == "completed" for q in late)


@pytest.mark.parametrize(
    ("signals", "stalls"),
    [
        ((signal.SIGINT,), True),
        ((signal.SIGINT, signal.SIGINT), True),
        ((signal.SIGTERM,), False),
    ],
)
def test_an_interrupt_ends_a_run_with_what_was_measured(
    signals: tuple[signal.Signals, ...], stalls: bool, faulty: Stub, tmp_path: Path
) -> None:
    """Once: no new queries, and a grace for those that run. Twice: at once."""
    (tmp_path / "faults.toml").write_text(SCENARIO)
    faults = [{"kind": "stall", "seconds": 60, "rate": 0.2}] if stalls else []
    faulty.send("POST", "/admin/faults", {"faults": faults, "seed": 3})
    load = ["--rate", "30", "--queries", "3000", "--target", f"{faulty.url}/v1"]
    command = [sys.executable, "-m", "fanmark.loadgen.cli", "run", "--out", str(tmp_path / "run"), *load]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, str(tmp_path / "faults.toml")], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            journal = tmp_path / "run" / "queries.jsonl"
            while not (journal.exists() and journal.stat().st_size):
                assert process.poll() is None
                time.sleep(0.02)
            for number in signals:
                process.send_signal(number)
                time.sleep(0.1)
            out, err = process.communicate(timeout=BOUND_S)
        finally:
            process.kill()
            faulty.send("DELETE", "/admin/faults")
    assert (process.returncode, "Traceback" in err, "INTERRUPTED" in out) == (130, False, True), err
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    calls = check_accounts(found, tmp_path / "run")
    assert verify(tmp_path / "run", topologies()).differ == []
    assert found["partial"] is True
    assert err.count("interrupted: no new queries; those that run have 5 s, and end at once when asked again") == 1
    arms = found["arms"].values()
    assert 0 < sum(arm["queries"]["completed"] for arm in arms) < 6000
    assert (sum(arm["queries"]["abandoned"] for arm in arms) > 0) is stalls
    assert {call["error"] for call in calls} == ({None, "cancelled"} if stalls else {None})
    longest = max(call["done_at"] for call in calls) - max(q.due_at for q in read_queries(tmp_path / "run"))
    assert (longest > 4.0) is (stalls and len(signals) == 1)  # the grace, or none
    faulty.until(RUNNING, 0)


def test_a_wall_clock_that_is_set_does_not_show(faulty: Stub, tmp_path: Path, nothing_left: None) -> None:
    """An hour forward amid the run, then back again: no instant is outside the run, and none before its cause."""
    one = scenario(tmp_path, {"url": f"{faulty.url}/v1"}, {"queries": 24})
    began = time.monotonic()

    def now() -> float:
        return time.monotonic() - began

    def wall() -> float:
        return time.time() + (3600.0 if 0.1 < now() < 0.2 else 0.0)

    async def main() -> dict[str, Any]:
        endpoint = await connect("default", one.targets["default"], now, wall=wall)
        journal = session.open_folder(tmp_path / "run", one)
        tally = Tally({arm.name: arm.topology for arm in one.arms}, "single")
        try:
            await Run(one, topologies(), {"default": endpoint}, None, tally, journal, "r", now).execute()
        finally:
            journal.close()
            await endpoint.lane.close()
        return summarise_arms(one, reduced(read_queries(tmp_path / "run")))

    with asyncio.Runner() as runner:
        arms = runner.run(main())
    ended = now()
    assert ended > 0.2
    calls = check_accounts({"arms": arms}, tmp_path / "run")
    assert all(arm["queries"]["completed"] == 24 for arm in arms.values())
    for call in calls:
        stamps = [call[name] for name in ("sent_at", "first_at", "answer_at", "done_at")]
        assert stamps == sorted(stamps) and stamps[-1] <= ended
