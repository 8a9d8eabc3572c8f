"""Sessions: a user's queries in a row, each reading the turns before it. Counted by lists of messages that know no sessions."""

import asyncio
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from message_lists import Lists, count
from stub_process import Stub
from test_topologies import PARAMS
from test_topologies_virtual import OTHERS, RESOURCES
from test_workers import run as run_on
from two_arms import queries as some_queries

from fanmark.agents import topologies
from fanmark.loadgen import dry_run, session, table
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import Query, read_queries, read_windows
from fanmark.loadgen.scenario import ANSWER_KINDS, KINDS, Load, Scenario, resolved
from fanmark.loadgen.scenario_check import check, override, override_load
from fanmark.loadgen.session import _without_none
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.trace_headers import call_headers
from fanmark.loadgen.users import Session, sessions, think_s

TABLE = topologies()
SINGLE: dict[str, Any] = {"name": "single", "topology": "single", "baseline": True}
CHAIN: dict[str, Any] = {"name": "chain", "topology": "tool-chain", "tool_calls": 2}
TURNS = {"dist": "uniform", "mean": 3, "min": 1, "max": 5}
THINKING = {"dist": "exponential", "mean": 2.0}


def scenario(load: dict[str, Any], *arms: dict[str, Any], **more: Any) -> Scenario:
    return check({"load": load, "arm": list(arms) or [SINGLE, CHAIN], "seed": 5, **more}, "f.toml", TABLE)


def ran(found: Scenario, out: Path) -> tuple[dict[str, Any], list[Query]]:
    summary = simulate(found, TABLE, Options(out, "0", [])).summary
    return summary, sorted(read_queries(out), key=lambda query: (query.arm, query.due_at))


def conversations(queries: Iterable[Query]) -> dict[tuple[str, int], list[Query]]:
    """The queries of each session, by arm and session, in the order of their turns."""
    found: dict[tuple[str, int], list[Query]] = defaultdict(list)
    for query in queries:
        if query.session is not None:
            found[query.arm, query.session].append(query)
    for asked in found.values():
        assert [query.turn for query in asked] == list(range(1, len(asked) + 1))
    return found


def by_lists(found: Scenario, asked: list[Query]) -> list[tuple[int, ...]]:
    """What a session's queries cost, as if the turns before it were a part of each one's question, which is as long as all of them."""
    arm = next(arm for arm in found.arms if arm.name == asked[0].arm)
    counts, before = [], 0
    for query in asked:
        demand = draw_demand(found, arm, TABLE, query.query)
        w = {**demand.lengths, "tools": dry_run._schema_tokens(found, found.stub.api)}
        w["question"] += before
        params = demand.params
        if arm.topology == "coding-agent":  # which compacts by what it has added itself
            params = replace(params, context_limit=params.context_limit + before)
        lists = Lists(w, partial(demand.chance, "stop"))
        counts.append(count(arm.topology, params, lists))
        if lists.calls:
            answer = w["answer"] if arm.topology == "reasoning" else lists.calls[-1][1]
            before = w["question"] + answer
    return counts


ONE_EACH = st.fixed_dictionaries({name: st.fixed_dictionaries(OTHERS.get(name, PARAMS[name])) for name in PARAMS})
LENGTHS = st.fixed_dictionaries(
    {kind: st.integers(1 if kind in (*ANSWER_KINDS, "system") else 0, 40) for kind in KINDS}
)


@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    params=ONE_EACH,
    lengths=LENGTHS,
    users=st.integers(1, 4),
    most=st.integers(2, 5),
    api=st.sampled_from(["chat", "completions"]),
    seed=st.integers(0, 99),
)
def test_every_turn_of_every_topology_costs_what_the_lists_say(
    params: Mapping[str, Any],
    lengths: dict[str, int],
    users: int,
    most: int,
    api: str,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if api == "completions":  # there all that a call writes is read again, what the lists call reasoning too
        params = {name: given for name, given in params.items() if name != "reasoning"}
    arms = [{"name": f"a-{name}", "topology": name, **given} for name, given in params.items()]
    drawn = {**lengths, "question": {"dist": "uniform", "mean": 20, "cv": 0.5, "min": 1}}
    load = {"users": users, "turns": {**TURNS, "max": most}, "think_s": THINKING, "queries": 6, "warmup": 1}
    found = scenario(load, SINGLE, *arms, workload=drawn, seed=seed, stub={"api": api})
    summary, queries = ran(found, tmp_path_factory.mktemp("users") / "run")
    assert (summary["validity"]["counted"], summary["validity"]["uncontaminated"]) == (True, True), summary["validity"]
    talks = conversations(queries)
    for asked in talks.values():
        measured = [tuple(query.resources[name] for name in RESOURCES) for query in asked]
        assert measured == by_lists(found, asked)
        assert measured == [tuple(query.expected[name] for name in RESOURCES) for query in asked]
    lengths_of = {arm: [len(asked) for (name, _), asked in sorted(talks.items()) if name == arm] for arm, _ in talks}
    assert {sum(each) for each in lengths_of.values()} == {6} and len({str(each) for each in lengths_of.values()}) == 1


def test_a_turn_finds_the_turns_before_it_in_the_cache(tmp_path: Path) -> None:
    """S 300, Q 50, A 30: turn k reads 300 + 50 k + 30 (k - 1), of which all but 50 were there, to the block and the last token."""
    lengths = {"system": 300, "question": 50, "answer": 30}
    found = scenario({"users": 1, "turns": 4, "queries": 4, "warmup": 0}, SINGLE, workload=lengths)
    for cache, cached in (("arm", [0, 368, 448, 528]), ("query", [0, 0, 0, 0])):
        other = scenario(
            {"users": 1, "turns": 4, "queries": 4, "warmup": 0}, SINGLE, workload={**lengths, "cache": cache}
        )
        summary, queries = ran(other, tmp_path / cache)
        assert [query.resources["input_tokens"] for query in queries] == [350, 430, 510, 590]
        assert [query.resources["cached_tokens"] for query in queries] == cached
        assert summary["validity"]["uncontaminated"] is True
    planned = dry_run.plan(found, TABLE)["single"]
    assert (planned["input_tokens"], planned["fresh_tokens_at_best"]) == (350 + 430 + 510 + 590, 350 + 3 * 50)
    assert planned["longest_context_tokens"] == 620


def test_a_plan_is_what_a_run_costs(tmp_path: Path) -> None:
    mix = {
        "name": "mixed",
        "mix": [{"topology": "single"}, {"topology": "debate", "agents": 2}, {"topology": "reasoning"}],
    }
    load = {"users": 3, "turns": TURNS, "queries": 11, "repeats": 2, "warmup": 1}
    found = scenario(load, SINGLE, CHAIN, mix, {"name": "few", "topology": "self-consistency", "queries": 7})
    _, queries = ran(found, tmp_path / "run")
    for name, planned in dry_run.plan(found, TABLE).items():
        mine = [query for query in queries if query.arm == name and not query.warmup]
        assert planned["queries"] == len(mine)
        for key in ("calls", "tool_calls", "input_tokens", "output_tokens"):
            assert planned[key] == sum(query.resources[key] or 0 for query in mine), (name, key)


def test_users_think_and_at_most_one_query_of_each_is_under_way(tmp_path: Path) -> None:
    found = scenario({"users": 3, "turns": TURNS, "think_s": THINKING, "queries": 40, "warmup": 0}, SINGLE)
    summary, queries = ran(found, tmp_path / "run")
    by_turn = summary["arms"]["single"]["by_turn"]
    assert sum(turn["queries"] for turn in by_turn.values()) == 40 and [*by_turn] == ["1", "2", "3", "4", "5"]
    assert [turn["input_tokens"]["mean"] for turn in by_turn.values()] == [500 + 400 * i for i in range(5)]
    said = "\n".join(table.lines(summary))
    latencies = [table.number(by_turn[turn]["latency_s"]["mean"]) for turn in "15"]
    assert f"turn 1 500 tokens in and {latencies[0]} s, turn 5 2,100 tokens in and {latencies[1]} s" in said
    pauses = []
    for asked in conversations(queries).values():
        for before, query in pairwise(asked):
            assert query.due_at - before.done_at == pytest.approx(
                think_s(found.load, found.seed, query.query), abs=1e-9
            )
            pauses.append(query.due_at - before.done_at)
    assert len(pauses) == 40 - len(conversations(queries)) and 1.0 < sum(pauses) / len(pauses) < 4.0
    for query in queries:
        assert sum(other.due_at <= query.due_at < other.done_at for other in queries) <= 3
    assert sum(query.due_at == 0.0 for query in queries) == 3


def test_the_example_of_the_page_says_what_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "sessions.md").read_text()
    toml, printed = re.findall(r"```(?:toml)?\n(.*?)```", page, re.DOTALL)
    summary, _ = ran(check(tomllib.loads(toml), "page.toml", TABLE), tmp_path / "run")
    for line in printed.strip().splitlines():
        arm, *tokens = re.findall(r"^\w+|[\d,]+(?= tokens in)", line)
        turns = list(summary["arms"][arm]["by_turn"].values())
        assert [table.number(turn["input_tokens"]["mean"]) for turn in (turns[0], turns[-1])] == tokens


def test_sessions_are_the_same_in_every_arm_and_end_with_the_queries() -> None:
    found = scenario({"users": 4, "turns": TURNS, "queries": 30})
    listed = list(sessions(found.load, found.seed, 100, 7))
    assert sum(session.turns for session in listed) == 30
    assert [session.first for session in listed] == [100 + sum(s.turns for s in listed[:i]) for i in range(len(listed))]
    assert [session.index for session in listed] == list(range(7, 7 + len(listed)))
    assert {session.turns for session in listed} >= {2, 3, 4}
    endless = sessions(Load(users=1, turns=3), 5)
    assert [next(endless).first for _ in range(4)] == [0, 3, 6, 9]


def test_a_turn_without_an_answer_is_not_told_again(tmp_path: Path) -> None:
    lengths = {"answer": {"dist": "uniform", "mean": 100, "cv": 0.5, "min": 10}}
    found = scenario(
        {"users": 2, "turns": 5, "queries": 20, "query_timeout_s": 0.8, "warmup": 0}, SINGLE, workload=lengths
    )
    summary, queries = ran(found, tmp_path / "run")
    outcomes = {query.outcome for query in queries}
    assert outcomes == {"completed", "failed"} and summary["validity"]["counted"] is True
    for asked in conversations(queries).values():
        told = 0
        for query in asked:
            lengths = dict(draw_demand(found, found.arms[0], TABLE, query.query).lengths)
            if query.outcome == "completed":
                assert query.resources["input_tokens"] == lengths["system"] + lengths["question"] + told
                told += lengths["question"] + lengths["answer"]


def test_a_session_goes_on_from_the_lead_in_into_the_window(tmp_path: Path) -> None:
    load = {"users": 2, "turns": 6, "think_s": 0.5, "duration": 20, "repeats": 2, "arms": "apart"}
    found = scenario(load, workload={"answer": 60})
    summary, queries = ran(found, tmp_path / "run")
    assert summary["validity"]["counted"] is True
    for window in read_windows(tmp_path / "run"):
        mine = [query for query in queries if query.repeat == window.repeat and query.arm in window.arms]
        for query in mine:
            inside = window.start_at <= query.due_at < window.end_at
            assert (query.phase == "window") == inside == (query.query >= 0)
    asked = conversations(queries)
    crossing = [[query.phase for query in turns] for turns in asked.values()]
    assert any("lead-in" in phases and "window" in phases for phases in crossing)
    for turns in asked.values():
        for first, query in pairwise(turns):
            assert (query.resources["input_tokens"] or 0) >= (first.resources["input_tokens"] or 0) + 200
    numbers = [(query.arm, query.query) for query in queries]
    assert len(numbers) == len(set(numbers))


def test_a_session_is_one_to_servers_and_routers() -> None:
    call = some_queries()[1].calls[0]
    ids = [call_headers("run", call, session)["X-Session-Id"] for session in (None, Session(7, 20, 3))]
    assert ids == ["run-single-0", "run-single-7"]
    first, *others = [call_headers("run", call, session) for session in (None, Session(7, 20, 3), Session(8, 23, 3))]
    assert all({**other, "X-Session-Id": first["X-Session-Id"]} == first for other in others)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({"turns": 3}, r"\[load\] turns = 3: sessions are of users: give users = N as well"),
        ({"mode": "closed", "concurrency": 4, "think_s": 1.5}, r"\[load\] think_s = 1.5: sessions are of users"),
        (
            {"users": 4, "mode": "open"},
            r"\[load\] users = 4: that is a closed loop: leave mode, arrivals and stages out",
        ),
        ({"users": 4, "stages": [{"seconds": 1, "rate": 1}]}, r"\[load\] users = 4: that is a closed loop"),
        (
            {"users": 4, "concurrency": 3},
            r"\[load\] users = 4 and concurrency = 3: they are the same: give users alone",
        ),
        (
            {"users": 4, "turns": {"dist": "uniform", "mean": 3}},
            r"turns = .*: a session has at least 1: give the .* min = 1",
        ),
        ({"users": 0}, "users = 0"),
        ({"users": 1, "turns": 0}, "turns = 0"),
    ],
)
def test_a_load_of_users_that_cannot_be_is_refused(load: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=f"^f.toml: .*{said}"):
        scenario(load)


def test_users_are_a_closed_loop_from_the_file_the_flags_and_the_resolved_scenario() -> None:
    found = scenario({"users": 4, "turns": TURNS, "think_s": 1.0})
    assert (found.load.mode, found.load.concurrency) == ("closed", 4)
    assert check(_without_none(resolved(found)), "again.toml", TABLE).load == found.load
    raw: dict[str, Any] = {"load": {"users": 4, "turns": 3}, "arm": [SINGLE]}
    override_load(raw, None, None, None, 9, None, None)
    assert check(raw, "f.toml", TABLE).load.users == 9
    with pytest.raises(ScenarioError, match=r"--rate 2: \[load\] users = 9 is a closed loop"):
        override_load(raw, None, None, 2.0, None, None, None)
    raw = _without_none(resolved(found))
    override(raw, ["load.users=2"])
    assert check(raw, "again.toml", TABLE).load.concurrency == 2


@pytest.mark.real
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_sessions_through_the_stub(stub: Stub, tmp_path: Path, api: str) -> None:
    load = {"users": 2, "turns": 3, "think_s": 0.05, "queries": 6}
    arms = [SINGLE, {"name": "debate", "topology": "debate", "agents": 2, "rounds": 1}, {**CHAIN, "concurrency": 1}]
    target = {"url": f"{stub.url}/v1", "api": api}
    found = scenario(load, *arms, target=target, workload={"answer": 12, "judge_answer": 9}, tools={"latency_s": 0.01})
    options = session.Options(tmp_path / "run", 0, f"users-{api}", "test", [], None)
    with asyncio.Runner() as runner:
        summary = runner.run(session.run(found, TABLE, options)).summary
    assert [summary["validity"][tick] for tick in ("counted", "reconciled", "uncontaminated")] == [True] * 3
    asked = conversations(read_queries(tmp_path / "run"))
    assert len(asked) == 6
    for (arm, _), turns in asked.items():
        assert [query.outcome for query in turns] == ["completed"] * 3
        if arm == "single":
            assert [query.resources["input_tokens"] for query in turns] == [500, 712, 924]
            assert [query.resources["cached_tokens"] for query in turns][1:] == [
                496,
                720,
            ]  # all but the last token of what was there


@pytest.mark.real
def test_a_whole_session_is_one_workers(stub: Stub, tmp_path: Path) -> None:
    load = {"users": 3, "turns": 3, "queries": 12, "mode": "closed", "warmup": 0}
    found = run_on(stub, tmp_path / "run", 2, **load)
    assert found["validity"]["counted"] is True and found["validity"]["uncontaminated"] is True
    asked = conversations(read_queries(tmp_path / "run"))
    assert len(asked) == 8
    for (_, number), turns in asked.items():
        assert {call.worker for query in turns for call in query.calls} == {number % 3 % 2}
