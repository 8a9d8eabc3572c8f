"""Replays: whatever was recorded is made again, call for call and token for token, and finds in the cache what the recorded one did."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_process import running_stub

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, session
from fanmark.loadgen.arrivals import of_arm
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.recording import RecordedCall, Recorder, Said
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.user_topology import with_users
from fanmark.loadgen.verify import verify

RECORDED = {
    "record": True,
    "seed": 3,
    "arm": [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", "agents": 3},
        {"name": "chain", "topology": "tool-chain", "tool_calls": 4, "tools_per_step": 2},
    ],
    "workload": {"answer": {"dist": "uniform", "mean": 30, "cv": 0.4, "min": 1}, "question": 40},
    "tools": {"latency_s": {"dist": "exponential", "mean": 0.1}},
    "load": {"queries": 4, "rate": 2, "warmup": 0, "arms": "apart"},
}
AS_RECORDED = {"structure": 1.0, "calls": 1.0, "input_tokens": 1.0, "output_tokens": 1.0}


def load(raw: dict[str, Any], source: str = "f.toml") -> tuple[Scenario, Any]:
    table = with_users(raw, source, topologies())
    return scenario_check.check(raw, source, table), table


def simulated(raw: dict[str, Any], out: Path) -> dict[str, Any]:
    return simulate(*load(raw), Options(out, "0", [])).summary


def replay(path: Path, *arms: str, **load: Any) -> dict[str, Any]:
    """A scenario of one arm for each of a recording's arms."""
    named = [{"name": arm or "all", "topology": "replay", "path": str(path), "arm": arm} for arm in arms or ("",)]
    return {
        "seed": 5,
        "arm": [{**arm, "baseline": i == 0} for i, arm in enumerate(named)],
        "load": {"queries": 4, "rate": 2, "warmup": 0} | load,
    }


def queries_of(folder: Path, arm: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    return sorted((line for line in lines if line["arm"] == arm), key=lambda line: line["query"])


COUNTS = ("calls", "tool_calls", "input_tokens", "cached_tokens", "output_tokens", "depth", "width")


def test_a_debate_and_a_chain_are_made_again(tmp_path: Path) -> None:
    """At the recorded times on the same engine: the very same counts, cached tokens too, and latencies but for the network."""
    simulated(RECORDED, tmp_path / "recorded")
    raw = replay(tmp_path / "recorded", "debate", "chain", process="replay", arms="apart")
    found = simulated(raw, tmp_path / "replayed")
    assert found["validity"]["counted"] is found["validity"]["uncontaminated"] is True
    assert not any("constant" in note for note in found["notes"])  # lengths are the recording's
    for arm in ("debate", "chain"):
        assert found["arms"][arm]["fidelity"] == AS_RECORDED | {"overlap": 1.0, "gaps": 1.0}
        before, after = (queries_of(tmp_path / folder, arm) for folder in ("recorded", "replayed"))
        assert [[q["resources"][c] for c in COUNTS] for q in before] == [
            [q["resources"][c] for c in COUNTS] for q in after
        ]
        assert [q["resources"]["latency_s"] for q in after] == pytest.approx(
            [q["resources"]["latency_s"] for q in before], rel=0.02
        )
    assert verify(tmp_path / "replayed", topologies()).differ == []


def test_each_lap_has_texts_of_its_own(tmp_path: Path) -> None:
    """Four queries twelve times over find no more in the cache than in the first lap."""
    simulated(RECORDED, tmp_path / "recorded")
    simulated(replay(tmp_path / "recorded", "chain", queries=12), tmp_path / "replayed")
    cached = [q["resources"]["cached_tokens"] for q in queries_of(tmp_path / "replayed", "chain")]
    assert cached[:4] == cached[4:8] == cached[8:]


def test_a_recording_of_a_replay_is_the_recording(tmp_path: Path) -> None:
    simulated(RECORDED, tmp_path / "1")
    raw = replay(tmp_path / "1", "debate", process="replay") | {"record": True}
    simulated(raw, tmp_path / "2")
    again = simulated(replay(tmp_path / "2", "debate", process="replay"), tmp_path / "3")
    assert again["arms"]["debate"]["fidelity"] == AS_RECORDED | {"overlap": 1.0, "gaps": 1.0}


def test_samples_of_one_prompt_are_made_side_by_side_again(tmp_path: Path) -> None:
    """Not one after another, as a single reply of their total length would be."""
    votes = {"name": "votes", "topology": "self-consistency", "samples": 4, "one_request": True, "baseline": True}
    recorded = simulated(RECORDED | {"arm": [votes]}, tmp_path / "recorded")["arms"]["votes"]
    again = simulated(replay(tmp_path / "recorded", "votes", process="replay"), tmp_path / "replayed")["arms"]["votes"]
    assert again["fidelity"] == AS_RECORDED | {"overlap": 1.0, "gaps": 1.0} and again["expected"]["mismatches"] == 0
    times = [arm["per_query"]["latency_s"]["mean"] for arm in (again, recorded)]
    assert times[0] == pytest.approx(times[1], rel=0.01)


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.real
def test_the_same_on_the_stub(api: str, tmp_path: Path) -> None:
    """Recorded there and replayed there, in a closed loop: as recorded, to the token. Of one, so that the query which finds the cache cold
    is the one that did: of two that begin at the same moment, either may be first."""
    simulated(RECORDED, tmp_path / "recorded")
    raw = replay(tmp_path / "recorded", "debate", "chain", mode="closed", concurrency=1)
    with running_stub("--time-scale", "0.1") as stub, asyncio.Runner() as runner:
        scenario = load(raw | {"target": {"url": f"{stub.url}/v1", "api": api}})
        found = runner.run(session.run(*scenario, session.Options(tmp_path / "run", 0, api, "test", [], None))).summary
    for name in ("counted", "reconciled", "alone", "uncontaminated"):
        assert found["validity"][name] is True, name
    for arm in ("debate", "chain"):
        told = found["arms"][arm]["fidelity"]
        assert {name: told[name] for name in AS_RECORDED} == AS_RECORDED
        assert told["overlap"] > 0.95


def random_query(rng: random.Random, ids: int) -> list[RecordedCall]:
    """Calls and tool calls that wait for any earlier ones, and read any of what those said among texts that others read too."""
    calls: list[RecordedCall] = []
    said: dict[int, int] = {}
    for n in range(1, rng.randint(1, 8) + 1):
        after = rng.sample(range(1, n), rng.randint(0, min(2, n - 1)))
        free_at = max((calls[m - 1].done_at or 0.0 for m in after), default=0.0)
        due_at = free_at + rng.choice((0.0, 0.0, rng.uniform(0.01, 2)))
        done_at = due_at + rng.uniform(0.05, 1)
        is_call = rng.random() < 0.7
        texts = {rng.randint(1, ids) for _ in range(rng.randint(1, 4))}
        read = [Said(f"t{i}", 7 * i, rng.choice(("user", "system", "assistant"))) for i in texts]
        read += [
            Said("", said[m], "assistant" if calls[m - 1].kind == "call" else "user", m)
            for m in after
            if rng.random() < 0.7
        ]
        rng.shuffle(read)
        said[n] = rng.randint(1, 50)
        calls.append(
            RecordedCall(
                query=0, arm="", call=n, after=sorted(after), kind="call" if is_call else "tool_call", role="agent",
                round=1, due_at=due_at, sent_at=due_at, done_at=done_at,
                input_tokens=sum(one.tokens for one in read) if is_call else None,
                output_tokens=said[n] if is_call else None, messages=read if is_call else None,
            )
        )  # fmt: skip
    return calls


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whatever_was_recorded_is_made_again(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("any")
    recorder = Recorder(folder / "recorded", "any")
    recorded = [random_query(rng, 6) for _ in range(8)]
    for i, calls in enumerate(recorded):
        recorder.add(calls, float(i))
    recorder.close()
    found = simulated(replay(folder / "recorded", queries=8, rate=1), folder / "replayed")
    assert found["validity"]["counted"] is found["validity"]["uncontaminated"] is True
    told = found["arms"]["all"]["fidelity"]
    assert told == AS_RECORDED | {"overlap": None, "gaps": pytest.approx(1.0, abs=0.02)}
    for query, calls in zip(queries_of(folder / "replayed", "all"), recorded, strict=True):
        inferred = [call for call in calls if call.kind == "call"]
        assert query["resources"]["input_tokens"] == sum(call.input_tokens or 0 for call in inferred)
        assert query["resources"]["output_tokens"] == sum(call.output_tokens or 0 for call in inferred)
        assert query["resources"]["tool_calls"] == len(calls) - len(inferred)


def test_queries_start_as_recorded_or_so_many_times_as_fast(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", "tap")
    rng = random.Random(1)
    for at in (10.0, 12.0, 16.0):
        recorder.add(random_query(rng, 3), at)
    recorder.close()
    at_all = {"queries": None, "duration": None, "rate": 1.0}
    raw = replay(tmp_path / "r", process="replay", speed=2)
    raw["load"] = {k: v for k, v in raw["load"].items() if k not in at_all}
    scenario, _ = load(raw)
    assert list(of_arm(scenario, scenario.arms[0], 1)) == [0.0, 1.0, 3.0]
    scenario, _ = load(replay(tmp_path / "r", process="replay", queries=5))
    assert list(of_arm(scenario, scenario.arms[0], 1)) == [0.0, 2.0, 6.0, 9.0, 11.0], "a lap takes 9 s"


MISTAKES = [
    ({}, r"arm 'r': path = None: give the folder of a recording"),
    ({"path": "nowhere"}, r"path = 'nowhere': .*/nowhere: holds no recording \(No such file or directory\)"),
    ({"path": 3}, r"path = 3: give the folder"),
]


@pytest.mark.parametrize(("keys", "said"), MISTAKES)
def test_mistakes_are_told(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        load({"arm": [{"name": "r", "topology": "replay", "baseline": True, **keys}]})


def test_speed_is_of_a_replay() -> None:
    with pytest.raises(ScenarioError, match=r"\[load\] speed = 2: it is of a replay"):
        load({"arm": [{"name": "s", "topology": "single", "baseline": True}], "load": {"speed": 2}})
