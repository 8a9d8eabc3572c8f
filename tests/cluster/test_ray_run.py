"""The same scenario by workers on the nodes of a Ray cluster: the same queries, the same accounts, whatever is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from processes import children, end, gone, line_of
from ray_nodes import TWO_ARMS, VENV, Nodes, running_nodes
from stub_process import Stub, running_stub

pytestmark = pytest.mark.ray

SCENARIO = f"""{TWO_ARMS}
[load]
warmup = 2
"""
OPEN = ["--rate", "8", "--queries", "9"]
CLOSED = ["--concurrency", "4", "--queries", "80"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with running_stub() as server:
        yield server


class Running:
    """`fanmark run` under way."""

    def __init__(self, folder: Path, stub: Stub, *flags: str, more: str = "") -> None:
        self.out = folder / "run"
        (folder / "s.toml").write_text(SCENARIO + more)
        given = [
            str(folder / "s.toml"),
            "--target",
            f"{stub.url}/v1",
            "--out",
            str(self.out),
            "--json",
            "--quiet",
            *flags,
        ]
        self.process = subprocess.Popen(
            [VENV / "fanmark", "run", *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ended(self, code: int = 0) -> dict[str, Any]:
        """Its summary."""
        said, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == code, errors or said[:2000]
        assert not list(self.out.glob("worker-*"))
        found: dict[str, Any] = json.loads(said)
        return found

    def rows(self, name: str = "queries") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / f"{name}.jsonl").read_text().splitlines()]


Runs = Callable[..., Running]
Servings = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def running() -> Iterator[Runs]:
    """Starts a run, which ends with the test."""
    with ExitStack() as stack:

        def start(folder: Path, stub: Stub, *flags: str, more: str = "") -> Running:
            run = Running(folder, stub, *flags, more=more)
            stack.callback(end, run.process)
            return run

        yield start


@pytest.fixture
def serving(nodes: Nodes) -> Iterator[Servings]:
    """Serves one of our servers on the nodes, until the test ends at the latest."""
    with ExitStack() as stack:

        def start(kind: str, *flags: str) -> "subprocess.Popen[str]":
            command = [VENV / "fanmark", "serve", kind, "--ray", nodes.address, *flags]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(end, process)
            return process

        yield start


def servers_of(nodes: Nodes, module: str) -> list[int]:
    """Process ids of those of a kind on the nodes."""
    found = []
    for pid in children(nodes.process.pid):
        with suppress(OSError):
            if f"-m\0{module}\0" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def until(true: Callable[[], Any]) -> Any:
    """Waits for it; what it gave."""
    give_up_at = time.monotonic() + 60
    while not (found := true()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    return found


def busy(nodes: Nodes, run: Running) -> dict[int, Path]:
    """The two workers, once both have begun some counted queries and ended one."""

    def those() -> dict[int, Path]:
        assert run.process.poll() is None, run.process.communicate()
        found = nodes.workers()
        far = [f for f in found.values() if (f / "begun.jsonl").read_bytes().count(b'"window"') > 12]
        return found if len(far) == 2 and all((f / "queries.jsonl").read_bytes() for f in far) else {}

    found: dict[int, Path] = until(those)
    return found


def balanced(run: Running, found: dict[str, Any]) -> None:
    """Each arm's account is that of its records and of last snapshots: none twice, and none without an outcome."""
    listed = [row for row in run.rows() if not row["warmup"]]
    for name, arm in found["arms"].items():
        mine = [row for row in listed if row["arm"] == name]
        more = arm["unrecorded"] or dict.fromkeys(arm["queries"], 0)
        told = {outcome: n - more[outcome] for outcome, n in arm["queries"].items()}
        assert told["started"] == sum(told[outcome] for outcome in ("completed", "failed", "abandoned"))
        assert len({row["query"] for row in mine}) == len(mine) == told["started"]
        assert Counter(row["outcome"] for row in mine) == Counter(
            {k: n for k, n in told.items() if k != "started" and n}
        )
    subprocess.run([VENV / "fanmark", "verify", run.out], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_totals_and_offsets_are_those_of_a_local_run(nodes: Nodes, running: Runs, stub: Stub, tmp_path: Path) -> None:
    seen = []
    for name, flags in {
        "local": [],
        "one-a-node": ["--ray", nodes.address],
        "3": ["--ray", nodes.address, "--workers", "3"],
    }.items():
        (tmp_path / name).mkdir()
        run = running(tmp_path / name, stub, *OPEN, *flags)
        found = run.ended()
        workers = {"local": 1, "one-a-node": 2, "3": 3}[name]
        client = found["client"]
        assert client["workers"] == workers == len(client["by_worker"]) and client["degraded"] is False
        assert all((each["node"] is None) == (name == "local") for each in client["by_worker"].values())
        assert abs(client["clock_offset_s"]) < 0.1  # it is one machine
        assert found["validity"]["counted"] is found["validity"]["reconciled"] is True
        assert all(call["worker"] == call["query"] % workers for call in run.rows("calls") if call["query"] >= 0)
        balanced(run, found)
        listed = {(row["arm"], row["query"]): row for row in run.rows() if not row["warmup"]}
        first_at = min(row["due_at"] for row in listed.values())
        tokens = {k: [row["resources"][f"{way}_tokens"] for way in ("input", "output")] for k, row in listed.items()}
        seen.append((tokens, {key: pytest.approx(row["due_at"] - first_at, abs=1e-9) for key, row in listed.items()}))
    assert len(seen[0][0]) == 18 and seen[0] == seen[1] == seen[2]


def test_a_worker_that_is_killed_costs_what_it_had_begun(
    nodes: Nodes, running: Runs, stub: Stub, tmp_path: Path
) -> None:
    """And the other goes on."""
    run = running(tmp_path, stub, "--ray", nodes.address, *CLOSED)
    folders = busy(nodes, run)
    os.kill(next(iter(folders)), signal.SIGKILL)
    found = run.ended(code=1)
    balanced(run, found)
    client = found["client"]
    (lost,) = [name for name, each in client["by_worker"].items() if each["lost_at"] is not None]
    assert client["degraded"] is True and client["verdict"] == "client-limited"
    assert any(note.startswith(f"worker {lost} of 2 on ") and "(killed by SIGKILL)" in note for note in found["notes"])
    mine = [row for row in run.rows() if not row["warmup"]]
    assert {row["query"] for row in mine if row["query"] % 4 % 2 != int(lost)} == set(
        range(0 if lost == "1" else 1, 80, 2)
    )
    abandoned = [row for row in mine if row["outcome"] == "abandoned"]
    assert abandoned and all(row["error"] == f"worker {lost} died" for row in abandoned)
    assert found["partial"] is False and len(mine) < 160
    assert not any(folder.exists() for folder in folders.values())


def left(found: dict[str, Any]) -> list[Path]:
    """Where the journals of a run are that kept them, by worker."""
    told = {name: each["journal"].partition(":") for name, each in found["client"]["by_worker"].items()}
    assert all(node == found["client"]["by_worker"][name]["node"] for name, (node, _, _) in told.items())
    return [Path(folder) for _, _, folder in told.values()]


def test_journals_that_are_kept_stay_on_their_nodes_and_figures_follow_from_them(
    nodes: Nodes, running: Runs, stub: Stub, tmp_path: Path
) -> None:
    run = running(tmp_path, stub, "--ray", nodes.address, "--journals", "keep", *OPEN)
    found = run.ended()
    folders = left(found)
    try:
        assert len(set(folders)) == 2
        assert not (run.out / "queries.jsonl").exists() and not (run.out / "calls.jsonl").exists()
        assert found["validity"]["counted"] is found["validity"]["reconciled"] is found["validity"]["alone"] is True
        kept = [json.loads(line) for f in folders for line in (f / "queries.jsonl").read_text().splitlines()]
        for name, arm in found["arms"].items():
            mine = [row for row in kept if row["arm"] == name and not row["warmup"]]
            assert arm["queries"] == {"started": 9, "completed": 9, "failed": 0, "abandoned": 0} and len(mine) == 9
            for resource, told in arm["per_query"].items():
                values = [row["resources"].get(resource) for row in mine]
                known = None if None in values else pytest.approx((sum(values) / 9, max(values), 9))
                assert known == (None if told is None else (told["mean"], told["max"], told["n"]))
        command = [VENV / "fanmark", "verify", run.out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(folders[1]) in done.stderr
        subprocess.run([VENV / "fanmark", "report", run.out], check=True, stdout=subprocess.DEVNULL, timeout=60)
    finally:
        for folder in folders:
            shutil.rmtree(folder.parent)


def test_a_worker_whose_journal_is_kept_is_told_of_by_its_last_snapshot_when_it_is_killed(
    nodes: Nodes, running: Runs, stub: Stub, tmp_path: Path
) -> None:
    run = running(tmp_path, stub, "--ray", nodes.address, "--journals", "keep", *CLOSED)
    folders = busy(nodes, run)
    os.kill(next(iter(folders)), signal.SIGKILL)
    found = run.ended(code=1)
    assert set(left(found)) == set(folders.values())
    (told,) = run.rows("snapshots")
    whole = next(i for i in (0, 1) if i != told["worker"])
    kept = [json.loads(line) for line in (left(found)[whole] / "queries.jsonl").read_text().splitlines()]
    for name, arm in found["arms"].items():
        mine = Counter(row["outcome"] for row in kept if row["arm"] == name and not row["warmup"])
        lost = found["client"]["by_worker"][str(told["worker"])]["lost_queries"][name]
        for outcome in ("completed", "failed", "abandoned"):
            assert arm["queries"][outcome] == mine[outcome] + lost[outcome]
        assert arm["queries"]["started"] == mine.total() + lost["started"] and arm["unrecorded"] is not None
    for folder in folders.values():
        shutil.rmtree(folder.parent)


def test_an_actor_that_is_killed_takes_its_worker_along_and_the_run_stops_if_it_is_to(
    nodes: Nodes, running: Runs, stub: Stub, tmp_path: Path
) -> None:
    run = running(tmp_path, stub, "--ray", nodes.address, "--on-worker-loss", "stop", *CLOSED)
    folders = busy(nodes, run)
    pid = next(iter(folders))
    actor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(actor, signal.SIGKILL)
    found = run.ended(code=1)
    assert gone([pid]) and not any(folder.exists() for folder in folders.values())  # what it left was read and removed
    balanced(run, found)
    assert found["partial"] is True and found["ended"]["why"] == "errors" and "died" in found["ended"]["reason"]
    assert sum(each["lost_at"] is not None for each in found["client"]["by_worker"].values()) == 1
    assert all(each["lost_queries"] is None for each in found["client"]["by_worker"].values())


def test_a_head_that_is_absent_or_says_nothing_is_one_line(
    nodes: Nodes, running: Runs, stub: Stub, tmp_path: Path
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        listening = silent.getsockname()[1]
        for address, words in (
            (f"127.0.0.1:{listening}", "no head of a Ray cluster answered"),
            ("ray://x:1", "--ray auto"),
        ):
            process = running(tmp_path, stub, "--ray", address).process
            said, errors = process.communicate(timeout=60)
            assert process.returncode in (2, 3) and said == "" and words in errors.splitlines()[-1]
    process = running(tmp_path, stub, "--ray", f"127.0.0.1:{listening}").process
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and "nobody listens there" in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_fleet_of_stubs_on_the_nodes_is_one_target(
    nodes: Nodes, running: Runs, serving: Servings, tmp_path: Path
) -> None:
    """It takes three of the four processors, and leaves the fourth where a run's first worker is put."""
    server = serving("stub", "--replicas", "3", "--port", "0", "--time-scale", "0.2")
    told = json.loads(line_of(server))
    stubs = servers_of(nodes, "fanmark.servers.stub")
    assert len(set(told["replicas"])) == len(stubs) == 3
    fleet, where = Stub(told["url"], server.pid, server), ["--ray", nodes.address, "--workers", "1"]
    found = running(tmp_path, fleet, *OPEN, *where).ended()
    assert found["validity"]["counted"] is found["validity"]["reconciled"] is True
    server.terminate()
    assert server.wait(30) == 0 and gone(stubs, within_s=30)


def test_tool_servers_on_the_nodes_are_one_address(
    nodes: Nodes, stub: Stub, running: Runs, serving: Servings, tmp_path: Path
) -> None:
    server = serving("tools", "--replicas", "2", "--latency-s", "0.01")
    told = json.loads(line_of(server))
    tools = servers_of(nodes, "fanmark.servers.tools")
    assert len(set(told["replicas"])) == len(tools) == 2
    more = (
        f'[[arm]]\nname = "chain"\ntopology = "tool-chain"\ntool_calls = 3\n[[tools.server]]\nurl = "{told["url"]}"\n'
    )
    run = running(tmp_path, stub, *OPEN, "--set", "load.warmup=0", more=more)
    found = run.ended()
    assert found["validity"]["counted"] is True and found["arms"]["chain"]["errors"] == {}
    metrics = Stub(told["url"].removesuffix("/mcp"), server.pid, server).metrics()
    calls = Counter[str]()
    for name, value in metrics.items():
        if name.startswith("fanmark_tools_calls_total{"):
            calls[name.partition("replica=")[2][:3]] += int(value)
    assert set(calls) == {'"0"', '"1"'} and calls.total() == 9 * 3
    server.terminate()
    assert server.wait(30) == 0 and gone(tools, within_s=30)


def test_a_node_that_is_lost_leaves_the_counts_of_its_last_snapshot(
    nodes: Nodes, running: Runs, stub: Stub, tmp_path: Path
) -> None:
    """The last test: the cluster has one node after it."""
    run = running(tmp_path, stub, "--ray", nodes.address, *CLOSED)
    busy(nodes, run)
    nodes.lose_one()
    found = run.ended(code=1)
    balanced(run, found)
    (lost,) = [each for each in found["client"]["by_worker"].values() if each["lost_at"] is not None]
    for name, told in lost["lost_queries"].items():
        assert told["started"] == told["completed"] + told["failed"] + told["abandoned"] > 0
        arm = found["arms"][name]
        assert told.items() <= arm["unrecorded"].items()
        assert arm["queries"]["started"] == 40 + told["started"]
        assert arm["queries"]["completed"] == arm["per_query"]["calls"]["n"] + told["completed"]
        assert arm["load"]["completed_qps"] is None and arm["amplification"]["latency_s"] is None
        assert arm["amplification"]["calls"]["ratio"] == (1 if name == "single" else 3)
    assert lost["send_delay_p99_s"] is lost["journal"] is None
    assert found["client"]["degraded"] is True and found["validity"]["client_ok"] is False
