"""Whole queries shared out over worker processes: the same queries, the same accounts, whatever happens to a worker."""

import asyncio
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from stub_process import Stub, running_stub
from two_arms import queries

from fanmark.agents import topologies
from fanmark.loadgen import compare, scenario_check, session
from fanmark.loadgen.arrivals import open_loop
from fanmark.loadgen.crew import Alone, share
from fanmark.loadgen.errors import FanmarkError, ScenarioError
from fanmark.loadgen.health import bucket_quantile
from fanmark.loadgen.records import read_queries, read_windows
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.report.write import render
from fanmark.loadgen.samples import read_samples
from fanmark.loadgen.summary import summarise_arms
from fanmark.loadgen.sums import Packer, Sums
from fanmark.loadgen.tally import Histogram, Tally
from fanmark.loadgen.unrecorded import read_snapshots
from fanmark.loadgen.verify import verify

SCENARIO: dict[str, Any] = {
    "name": "shared-out",
    "seed": 5,
    "arm": [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", "agents": 2, "rounds": 1},
    ],
    "workload": {"answer": {"dist": "uniform", "mean": 12, "cv": 0.3, "min": 2}, "judge_answer": 6},
    "load": {"rate": 8, "process": "poisson", "queries": 7, "warmup": 2},
}


class Seat(Alone):
    """A place in a crew of any size."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__(lambda: 0.0)
        self.index, self.count = index, count  # type: ignore[misc]  # one process has only the one seat


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_shares_differ_by_one_at_most_and_add_up(total: int, count: int) -> None:
    shares = [share(total, Seat(index, count)) for index in range(count)]
    assert sum(shares) == total and max(shares) - min(shares) <= 1


def test_the_sum_of_the_workers_tallies_is_one_tally_of_all() -> None:
    arms = {"single": "single", "debate": "debate"}
    whole, parts = Tally(arms, "single"), [Tally(arms, "single") for _ in range(3)]
    for query in queries():
        for tally in (whole, parts[query.query % 3]):
            tally.query_started(query.arm)
            for call in query.calls:
                tally.call_started(call)
                tally.call_finished(call)
            tally.query_finished(query)
    summed, sums, packers = Tally(arms, "single"), Sums(), [Packer(part) for part in parts]
    for _ in range(
        2
    ):  # snapshots are cumulative: each takes the last one's place, and one that comes twice changes nothing
        for worker, packer in enumerate(packers):
            packed = pickle.loads(pickle.dumps(packer.pack()))
            sums.take(worker, packed)
            sums.take(worker, packed)
        sums.into(summed)
    for name, arm in whole.arms.items():
        for key, value in vars(arm).items():
            mine = getattr(summed.arms[name], key)
            if isinstance(value, Histogram):
                mine, value = {"": mine}, {"": value}
            if isinstance(value, dict) and not isinstance(value, Counter):
                assert {k: histogram.counts for k, histogram in mine.items()} == {k: h.counts for k, h in value.items()}
                assert {k: h.sum for k, h in mine.items()} == pytest.approx({k: h.sum for k, h in value.items()})
            else:
                assert mine == pytest.approx(value) if isinstance(value, Counter) else mine == value, key
    assert (summed.send_delay, summed.ttft, summed.chunks) == (whole.send_delay, whole.ttft, whole.chunks)
    assert summed.amplification("debate", "calls") == whole.amplification("debate", "calls")


def test_many_buckets_are_told_within_two_per_cent_and_none_is_lost() -> None:
    tally, summed, sums = Tally({"a": "single"}, "a"), Tally({"a": "single"}, "a"), Sums()
    tally.send_delay.update(dict.fromkeys(range(-5_000, -2_000), 3))
    for worker in range(2):
        sums.take(worker, Packer(tally).pack())
    sums.into(summed)
    assert sum(summed.send_delay.values()) == 2 * 3 * 3_000 and len(summed.send_delay) == 300
    for q in (0.01, 0.5, 0.99):
        assert bucket_quantile(summed.send_delay, q) == pytest.approx(bucket_quantile(tally.send_delay, q), rel=0.02)


Between = Callable[[Path], Any]


def run(
    stub: Stub, out: Path, workers: int, between: Between | None = None, *, keep: bool = False, **load: Any
) -> dict[str, Any]:
    """The summary of a run against the stub; `between` is awaited while it goes on."""
    raw = SCENARIO | {"load": SCENARIO["load"] | load, "target": {"url": f"{stub.url}/v1"}}
    scenario = scenario_check.check(raw, "shared-out.toml", topologies())
    options = session.Options(out, 0, out.name, "test", [], None, workers, keep_journals=keep)

    async def both() -> session.Result:
        running = asyncio.ensure_future(session.run(scenario, topologies(), options))
        if between is not None:
            await between(out)
        return await running

    with asyncio.Runner() as runner:
        found = runner.run(both()).summary
        assert asyncio.all_tasks(runner.get_loop()) == set()
    assert workers_of(os.getpid()) == []
    if not keep:
        assert not list(out.glob("worker-*"))
        assert verify(out, topologies()).differ == []
    return found


def rows(out: Path, name: str = "queries") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def workers_of(parent: int) -> list[int]:
    """Process ids of the workers that a process has started and that live still."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == parent and "fanmark.loadgen.worker" in command:
                found.append(int(entry.name))
    return sorted(found)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110  # a file and a process tell nobody
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def stub() -> Any:
    with running_stub() as process:
        yield process


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_run_that_cannot_begin_leaves_its_folder_free(stub: Stub, tmp_path: Path, workers: str) -> None:
    """Each of its processes may open fewer connections than it needs."""
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(SCENARIO))
    flags = [file, "--target", f"{stub.url}/v1", "--concurrency", "5000", "--workers", workers, "--out", out]
    command = ["bash", "-c", 'ulimit -n 512; exec "$@"', "-", sys.executable, "-m", "fanmark.loadgen.cli", "run"]
    for _ in range(2):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "the system allows 512 open files" in done.stderr.splitlines()[-1]
        assert [path.name for path in out.iterdir()] == ["scenario.toml"]


@pytest.mark.real
def test_the_same_queries_start_at_the_same_offsets_whatever_the_number_of_workers(stub: Stub, tmp_path: Path) -> None:
    seen = []
    for workers in (1, 3):
        out = tmp_path / f"by-{workers}"
        found = run(stub, out, workers)
        assert found["client"]["workers"] == workers == len(found["client"]["by_worker"])
        assert found["validity"]["counted"] is found["validity"]["reconciled"] is found["validity"]["alone"] is True
        assert found["validity"]["uncontaminated"] is True  # what other workers sent explains what is cached
        for call in rows(out, "calls"):
            assert call["worker"] == (call["query"] if call["query"] >= 0 else -1 - call["query"]) % workers
        listed = {(row["arm"], row["query"]): row for row in rows(out)}
        first_at = min(row["due_at"] for row in listed.values() if not row["warmup"])
        offsets_s = {key: row["due_at"] - first_at for key, row in listed.items() if not row["warmup"]}
        tokens = {
            key: [row["resources"][f"{way}_tokens"] for way in ("input", "output")] for key, row in listed.items()
        }
        seen.append((tokens, offsets_s))
    (tokens, offsets_s), (tokens_by_3, offsets_by_3_s) = seen
    assert tokens == tokens_by_3 and len(tokens) == 18  # 7 queries and 2 of warm-up, by 2 arms
    assert offsets_by_3_s == pytest.approx(offsets_s, abs=1e-9)


@pytest.mark.real
def test_a_closed_loops_users_and_their_queries_are_shared_out(stub: Stub, tmp_path: Path) -> None:
    found = run(stub, tmp_path / "run", 2, mode="closed", concurrency=3, queries=10)
    calls = rows(tmp_path / "run", "calls")
    assert {c["query"] for c in calls if c["arm"] == "single" and c["query"] >= 0} == set(range(10))
    assert all(c["worker"] == c["query"] % 3 % 2 for c in calls if c["query"] >= 0)
    for arm in found["arms"].values():
        assert arm["queries"] == {"started": 10, "completed": 10, "failed": 0, "abandoned": 0}
        assert 1 < arm["load"]["queries_in_flight"]["max"] <= 3


@pytest.mark.real
def test_a_worker_that_is_killed_costs_what_it_had_begun(stub: Stub, tmp_path: Path) -> None:
    async def kill_one(out: Path) -> None:
        begun = out / "worker-1" / "begun.jsonl"
        await until(lambda: begun.exists() and begun.read_bytes().count(b'"debate","window"') >= 2)
        os.kill(workers_of(os.getpid())[1], signal.SIGKILL)

    found = run(stub, tmp_path / "run", 2, kill_one, mode="closed", concurrency=4, queries=60)
    listed = [row for row in rows(tmp_path / "run") if not row["warmup"]]
    for name, arm in found["arms"].items():
        mine = [row for row in listed if row["arm"] == name]
        assert len({row["query"] for row in mine}) == len(mine) == arm["queries"]["started"]
        assert Counter(row["outcome"] for row in mine) == Counter(
            {k: v for k, v in arm["queries"].items() if k != "started" and v}
        )
        assert {row["query"] for row in mine if row["query"] % 4 % 2 == 0} == set(range(0, 60, 2))  # the other's share
        assert arm["queries"]["started"] < 60
        assert all(row["error"] == "worker 1 died" for row in mine if row["outcome"] == "abandoned")
    assert 1 <= sum(arm["queries"]["abandoned"] for arm in found["arms"].values()) <= 4  # its users' queries under way
    client = found["client"]
    assert client["verdict"] == "client-limited"
    assert any(reason.startswith("worker 1: died at ") for reason in client["reasons"])
    assert client["by_worker"]["1"]["lost_at"] > 0 and client["by_worker"]["0"]["lost_at"] is None
    assert found["server"]["reconciled"] is None and found["validity"]["client_ok"] is False
    assert found["notes"][0].startswith("worker 1 of 2 died at ") and "(killed by SIGKILL)" in found["notes"][0]
    assert found["partial"] is False


@pytest.mark.real
def test_a_run_whose_workers_all_died_ends_with_that(stub: Stub, tmp_path: Path) -> None:
    async def kill_all(out: Path) -> None:
        files = [out / f"worker-{i}" / "begun.jsonl" for i in range(2)]
        await until(lambda: all(file.exists() and b'"window"' in file.read_bytes() for file in files))
        for pid in workers_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)

    found = run(stub, tmp_path / "run", 2, kill_all, mode="closed", concurrency=4, queries=60)
    assert found["partial"] is True and found["ended"] == {"why": "errors", "reason": "all workers died"}


@pytest.mark.real
def test_an_interrupt_reaches_all_workers(stub: Stub, tmp_path: Path) -> None:
    async def interrupt(out: Path) -> None:
        files = [out / f"worker-{i}" / "begun.jsonl" for i in range(2)]
        await until(lambda: all(file.exists() and b'"window"' in file.read_bytes() for file in files))
        os.kill(os.getpid(), signal.SIGINT)

    found = run(stub, tmp_path / "run", 2, interrupt, mode="closed", concurrency=2, queries=100_000)
    assert found["partial"] is True
    for arm in found["arms"].values():
        counts = arm["queries"]
        assert 0 < counts["started"] == counts["completed"] + counts["failed"] + counts["abandoned"] < 100_000


def test_a_guard_that_leaves_a_worker_nothing_is_refused(tmp_path: Path) -> None:
    raw = SCENARIO | {"load": SCENARIO["load"] | {"max_in_flight": 2}}
    scenario = scenario_check.check(raw, "shared-out.toml", topologies())
    options = session.Options(tmp_path / "run", 0, "x", "test", [], None, 3)
    with pytest.raises(FanmarkError, match=r"--workers 3 with \[load\] max_in_flight = 2: each worker needs"):
        asyncio.run(session.run(scenario, topologies(), options))


def put_together(out: Path, *workers: int) -> Path:
    """The folder of a run whose journals were kept, as it would be with those of these workers in it."""
    whole = out.with_name("whole")
    shutil.copytree(out, whole)
    for name in ("queries.jsonl", "calls.jsonl"):
        (whole / name).write_bytes(b"".join((out / f"worker-{i}" / name).read_bytes() for i in workers))
    return whole


@pytest.mark.real
def test_journals_that_are_kept_stay_and_every_figure_follows_from_them(stub: Stub, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run(stub, out, 2, keep=True, duration=3, rate=6, queries=None)
    assert {path.name for path in out.glob("*.jsonl")} == {"samples.jsonl", "windows.jsonl"}
    folders = [out / f"worker-{i}" for i in range(2)]
    assert [each["journal"] for each in found["client"]["by_worker"].values()] == list(map(str, folders))
    assert found["validity"]["counted"] is found["validity"]["reconciled"] is found["validity"]["alone"] is True
    scenario = scenario_check.check(*scenario_check.read(str(out / "scenario.toml")), topologies())
    kept = [query for folder in folders for query in read_queries(folder)]
    arms = summarise_arms(scenario, reduced(kept, scenario.objective), read_windows(out), read_samples(out))
    for name, arm in json.loads(msgspec.json.encode(arms)).items():
        told = json.loads(json.dumps(found["arms"][name]))
        assert told.pop("critical_path") == pytest.approx(arm.pop("critical_path"), abs=1e-12)  # summed up in parts
        assert told == arm and arm["queries"]["completed"] > 5
        assert sum(query.arm == name and not query.warmup for query in kept) == arm["queries"]["started"]
    differ = verify(put_together(out, 0, 1), topologies()).differ
    assert len(differ) == 2 and all(line.startswith("files.") and "missing" in line for line in differ)
    words = re.escape(
        f"{out}: the records are where they were written (worker 0: {folders[0]}; worker 1: {folders[1]})"
    )
    for read in (verify, compare.read):
        with pytest.raises(ScenarioError, match=words):
            read(out, topologies())
    (note,) = [note for note in found["notes"] if str(folders[0]) in note]
    page = (out / "report.html").read_text()
    assert page.count("<p>No query is drawn") == 1 and str(folders[1]) in page
    assert page.count("query latency, s</caption>") == page.count("time to first token, s</caption>") == 1
    assert render([out], "html") == page and note in render([out], "md").replace("\\", "")


@pytest.mark.real
def test_a_worker_whose_journal_is_kept_is_told_of_by_its_last_snapshot_when_it_is_killed(
    stub: Stub, tmp_path: Path
) -> None:
    async def kill_one(out: Path) -> None:
        begun = out / "worker-1" / "queries.jsonl"
        await until(lambda: begun.exists() and begun.read_bytes().count(b'"window"') >= 4)
        os.kill(workers_of(os.getpid())[1], signal.SIGKILL)

    out = tmp_path / "run"
    found = run(stub, out, 2, kill_one, keep=True, mode="closed", concurrency=4, queries=60)
    (told,) = read_snapshots(out)
    assert told.worker == 1 and found["client"]["by_worker"]["1"]["lost_queries"] == told.queries
    mine = [query for query in read_queries(out / "worker-0") if not query.warmup]
    for name, arm in found["arms"].items():
        own = Counter(query.outcome for query in mine if query.arm == name)
        assert {query.query for query in mine if query.arm == name} == set(range(0, 60, 2))
        assert {**arm["unrecorded"], "per_query": None} == {**told.queries[name], "per_query": None}
        for outcome in ("completed", "failed", "abandoned"):
            assert arm["queries"][outcome] == own[outcome] + told.queries[name][outcome]
        assert arm["per_query"]["calls"]["n"] == own["completed"]
    assert any(f"its records are left in {out}/worker-1" in note for note in found["notes"])
    assert found["validity"]["client_ok"] is False and found["server"]["reconciled"] is None
    (out / "worker-1").rename(tmp_path / "lost")
    assert len(verify(put_together(out, 0), topologies()).differ) == 2  # `files`


@pytest.mark.real
def test_workers_share_one_window(stub: Stub, tmp_path: Path) -> None:
    """Each sees only its own queries end, and yet all begin and end the window at one instant."""
    found = run(stub, tmp_path / "run", 2, duration=3, rate=6, queries=None)
    (window,) = rows(tmp_path / "run", "windows")
    listed = rows(tmp_path / "run")
    assert len({(row["arm"], row["query"]) for row in listed}) == len(listed)
    for row in listed:
        inside = window["start_at"] <= row["due_at"] < window["end_at"]
        assert inside == (row["phase"] == "window") == (row["query"] >= 0) == (not row["warmup"])
    scenario = scenario_check.check(
        SCENARIO | {"load": {"rate": 6, "duration": 3, "warmup": 2}}, "shared-out.toml", topologies()
    )
    for i, name in enumerate(("single", "debate")):
        offsets_s = list(open_loop(scenario.load, 5, name, i / 2))
        mine = sorted((row["query"], row["due_at"] - window["start_at"]) for row in listed if row["arm"] == name)
        assert [at for n, at in mine if n >= 0] == pytest.approx(offsets_s, abs=1e-6)
        assert found["arms"][name]["window"]["end_at"] == window["end_at"]
    workers = {call["worker"] for call in rows(tmp_path / "run", "calls") if call["query"] >= 0}
    assert workers == {0, 1} and found["validity"]["reconciled"] is True
