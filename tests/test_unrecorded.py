"""What is told of queries whose records are lost with their worker: accounts in balance, sums as they were, and no more than sums say."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import two_arms
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.costs import COUNTS, TIMES
from fanmark.loadgen.errors import LostError
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.link import Ended, Piece, Ready, Snapshot, Told
from fanmark.loadgen.reach import Place
from fanmark.loadgen.records import Begun, Journal, Query, Window, read_queries, read_windows
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.report.words import answers
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.stations import Clocks
from fanmark.loadgen.summary import summarise_arms, validity
from fanmark.loadgen.sums import Packer
from fanmark.loadgen.table import lines, recorded
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.unrecorded import LastSnapshot, read_snapshots, unrecorded, write_snapshots
from fanmark.loadgen.verify import verify
from fanmark.loadgen.workers import Workers


def tally_of(scenario: Scenario, told: Sequence[Query], begun: Sequence[str] = ()) -> Tally:
    """As a worker has it that made these queries, and is at some more of these arms."""
    tally = Tally({arm.name: arm.topology for arm in scenario.arms}, scenario.baseline.name)
    for query in told:
        if query.warmup:
            continue
        tally.query_started(query.arm)
        for call in query.calls:
            tally.call_started(call)
            tally.call_finished(call)
        tally.query_finished(query)
    for arm in begun:
        tally.query_started(arm)
    return tally


def snapshot(tally: Tally) -> LastSnapshot:
    arms = {name: unrecorded(arm) for name, arm in tally.arms.items()}
    return LastSnapshot(worker=1, node="10.0.0.2", lost_at=9.0, arms=arms)


@settings(max_examples=40)
@given(st.sets(st.integers(0, 6)), st.lists(st.sampled_from(["single", "debate"]), max_size=3))
def test_accounts_are_those_of_all_queries_whichever_are_lost(lost: set[int], begun: list[str]) -> None:
    scenario, every = two_arms.scenario(), two_arms.queries()
    whole = summarise_arms(scenario, reduced(every, scenario.objective))
    told = [snapshot(tally_of(scenario, [every[n] for n in lost], begun))]
    kept = [query for n, query in enumerate(every) if n not in lost]
    found = summarise_arms(scenario, reduced(kept, scenario.objective, told))
    for name, arm in found.items():
        more, own = begun.count(name), [query for n in lost if (query := every[n]).arm == name and not query.warmup]
        expected = whole[name]["queries"]
        assert arm["queries"] == expected | {
            "started": expected["started"] + more,
            "abandoned": expected["abandoned"] + more,
        }
        assert arm["errors"] == whole[name]["errors"]
        assert arm["expected"]["mismatches"] == whole[name]["expected"]["mismatches"]
        completed = [query for query in own if query.outcome == "completed"]
        within = [query for query in completed if query.done_at - query.due_at <= 2.0 / 1.0203]
        sure = whole[name]["objective"]["good"] - len(completed) + len(within)
        assert sure <= arm["objective"]["good"] <= whole[name]["objective"]["good"]
        if not own and not more:
            assert arm["unrecorded"] is None and arm["load"] == whole[name]["load"]
            continue
        assert arm["load"]["completed_qps"] is arm["window"]["steady"] is arm["waste"]["retries"] is None
        assert recorded(arm) == expected["completed"] - len(completed)
        for resource in (*COUNTS, *TIMES):
            values = [query.resources.get(resource) for query in completed]
            mean = arm["unrecorded"]["per_query"][resource]
            known = [value for value in values if value is not None]
            if not values or len(known) < len(values):
                assert mean is None
            else:
                assert mean == {"mean": pytest.approx(sum(known) / len(known)), "n": len(known)}
        latency = arm["per_query"]["latency_s"]
        assert (latency["n"] if latency else 0) == arm["queries"]["completed"] - len(completed)
    if any(arm["unrecorded"] for arm in found.values()):
        assert found["debate"]["amplification"]["latency_s"] is None
    ticks = validity(found, {"reconciled": None, "alone": None}, two_arms.whole({}, {})["client"], None)
    shown = two_arms.whole(found, ticks)
    assert lines(shown) and "- queries/s" not in answers(shown)[0]  # whatever is not known, there is something to show


class Spot:
    """A worker's place that has said all beforehand, and is gone then."""

    node: str | None = "10.0.0.2"
    clocks, ahead_s = Clocks(), 0.0

    def __init__(self, out: Path, says: list[Any], *, left: bool) -> None:
        self.out, self._says, self._left = out, iter([Ready(), *says]), left

    def put(self, data: bytes) -> None:
        """Nobody listens."""

    async def receive(self) -> Any:
        return next(self._says, None)

    async def end(self) -> str:
        return "gone"

    async def bring(self) -> Path | None:
        return self.out if self._left else None

    async def clear(self) -> None:
        """It stays."""


def journal_of(folder: Path, told: Sequence[Query], begun: Sequence[str]) -> Path:
    folder.mkdir()
    journal = Journal(folder, starts=True)
    for n, arm in enumerate(begun):
        journal.begin(Begun(90 + n, arm, "window", 1, 1.0, 1.0, ""))
    for query in told:
        journal.write(query)
    journal.close()
    return folder


async def carried_out(scenario: Scenario, spots: Sequence[Spot], out: Path, *, keep: bool) -> Ended:
    async def opening(index: int) -> Spot:
        return spots[index]

    tally, journal = Tally({a.name: a.topology for a in scenario.arms}, scenario.baseline.name), Journal(out)
    workers = Workers(scenario, Place({}, None, [], 1.0), "r", RunClock(1.0), tally, opening, keep=keep)
    await workers.start(2)
    ended = await workers.carry_out()
    if keep:
        workers.leave(journal, out, ended)
    else:
        await workers.join(journal, out, ended)
    journal.close()
    return ended


@pytest.mark.parametrize("ended_first", [False, True], ids=["under way", "once it has ended"])
@pytest.mark.parametrize("left", [True, False], ids=["with its journal", "without"])
def test_a_worker_that_is_lost_is_counted_the_same_with_its_journal_and_without(
    left: bool, ended_first: bool, tmp_path: Path
) -> None:
    scenario, every = two_arms.scenario(), two_arms.queries()
    begun = [] if ended_first else ["debate", "single", "debate"]
    mine, others = [q for q in every if q.query % 2], [q for q in every if not q.query % 2]
    told = Snapshot(Packer(tally_of(scenario, mine, begun)).pack(), ClientState())
    last = [Ended(None, {1: ClientState()})] if ended_first else []
    spots = [
        Spot(journal_of(tmp_path / "a", others, []), [Ended(None, {0: ClientState()})], left=True),
        Spot(journal_of(tmp_path / "b", mine, begun), [told, *last], left=left),
    ]

    (out := tmp_path / "run").mkdir()
    ended = asyncio.run(carried_out(scenario, spots, out, keep=False))
    told_of = read_snapshots(out)
    found = summarise_arms(scenario, reduced(read_queries(out), scenario.objective, told_of))
    singles, debates = begun.count("single"), begun.count("debate")
    assert found["single"]["queries"] == {"started": 3 + singles, "completed": 3, "failed": 0, "abandoned": singles}
    assert found["debate"]["queries"] == {"started": 3 + debates, "completed": 2, "failed": 1, "abandoned": debates}
    lost = {"started": 1 + debates, "completed": 1, "failed": 0, "abandoned": debates}
    assert (ended.states[1].lost_at is None) == (left and ended_first)
    if left:
        assert told_of == [] and ended.states[1].lost_queries is found["debate"]["unrecorded"] is None
    else:
        assert ended.states[1].lost_queries is not None and ended.states[1].lost_queries["debate"] == lost
        assert lost.items() <= found["debate"]["unrecorded"].items()
        assert any("records are lost with 10.0.0.2" in note for note in ended.notes)


def test_a_worker_that_goes_while_it_tells_of_its_journal_is_lost_and_nothing_of_it_counts_twice(
    tmp_path: Path,
) -> None:
    scenario, every = two_arms.scenario(), two_arms.queries()
    mine, others = [q for q in every if q.query % 2], [q for q in every if not q.query % 2]
    snapshot = Snapshot(Packer(tally_of(scenario, mine)).pack(), ClientState())
    pieces = [Piece(reduced([query], scenario.objective)) for query in others]
    window = Window(repeat=1, arms=["single", "debate"], lead_in_at=0.0, start_at=0.0, end_at=9.0)
    spots = [
        Spot(tmp_path / "a", [Ended(None, {0: ClientState()}), *pieces, Told([window])], left=False),
        Spot(tmp_path / "b", [snapshot, Ended(None, {1: ClientState()}), Piece(reduced(mine[:1]))], left=False),
    ]
    (out := tmp_path / "run").mkdir()
    ended = asyncio.run(carried_out(scenario, spots, out, keep=True))
    left = ended.found
    assert left is not None and len(left.queries) == len(others) and read_windows(out) == [window]
    found = summarise_arms(scenario, left)
    whole = summarise_arms(scenario, reduced(every, scenario.objective))
    assert {name: arm["queries"] for name, arm in found.items()} == {n: arm["queries"] for n, arm in whole.items()}
    assert found["debate"]["unrecorded"]["completed"] == 1 and [each.worker for each in read_snapshots(out)] == [1]
    assert ended.states[1].lost_at is not None and ended.states[0].lost_at is None
    assert any(f"its records are left in 10.0.0.2:{tmp_path}/b" in note for note in ended.notes)
    assert not (out / "queries.jsonl").exists()


def test_what_stands_in_for_records_is_verified(tmp_path: Path) -> None:
    """Of a run with half of its records replaced by what their worker told, the accounts are recomputed as they were."""
    raw = {
        "name": "verified",
        "arm": [
            {"name": "single", "topology": "single", "baseline": True},
            {"name": "debate", "topology": "debate", "agents": 2, "rounds": 1},
        ],
        "load": {"rate": 2.0, "queries": 12, "warmup": 1},
    }
    scenario, out = scenario_check.check(raw, "verified.toml", topologies()), tmp_path / "run"
    simulate(scenario, topologies(), Options(out, "0", []))
    every = list(read_queries(out))
    journal = Journal(out)
    for query in every:
        if query.query % 2 == 0:
            journal.write(query)
    journal.close()
    write_snapshots(out, [snapshot(tally_of(scenario, [query for query in every if query.query % 2]))])
    accounts = ("queries", "expected.mismatches", "errors", "censored", "params", "topology")
    differ = verify(out, topologies()).differ
    assert differ and not [line for line in differ for a in accounts if line.startswith(f"arms.debate.{a}")]
    assert any(line.startswith("arms.debate.unrecorded.completed: the summary says missing") for line in differ)
    (told,) = read_snapshots(out)
    told.arms["debate"].completed -= 1
    write_snapshots(out, [told])
    with pytest.raises(LostError, match="cannot be written"):
        write_snapshots(out / "absent", [told])
    assert "arms.debate.queries.completed: the summary says 12, the records 11" in verify(out, topologies()).differ
    assert json.loads((out / "summary.json").read_text())["arms"]["debate"]["unrecorded"] is None
    assert msgspec.json.decode((out / "snapshots.jsonl").read_bytes().splitlines()[0])["worker"] == 1
