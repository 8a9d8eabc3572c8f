"""Which gives way first, the model or the tools: by hand, in virtual time, and against a tool server with two slots."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import two_arms
from mcp_peers import StartTools

from fanmark.agents import topologies
from fanmark.loadgen.records import Query
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.samples import Sample, ServerSample
from fanmark.loadgen.saturation import levels_of, line, saturation
from fanmark.loadgen.scenario import Scenario, Stage
from fanmark.loadgen.scenario_check import check
from fanmark.servers import profiles

CHAIN = {"name": "chain", "topology": "tool-chain", "tool_calls": 1, "baseline": True}
STAGES = [{"seconds": 20, "rate": 1}, {"seconds": 20, "rate": 2}, {"seconds": 20, "rate": 4}]


def by_stages(*arms: dict[str, Any], process: str = "constant") -> Scenario:
    load = {"stages": STAGES, "warmup": 0, "process": process}
    return check({"arm": [CHAIN, *arms], "load": load}, "f.toml", topologies())


def test_ramps_are_cut_into_parts() -> None:
    stages = [Stage(seconds=5, rate=1), Stage(seconds=20, rate=1, to=3), Stage(seconds=5, rate=3, to=4)]
    assert levels_of(stages) == [(0, 5, 1), (5, 15, 1.5), (15, 25, 2.5), (25, 30, 3.5)]


def chains(
    waits_s: dict[str, list[float]], *, told: bool = True, failing: float = 0.0, origin_at: float = 7.0
) -> list[Query]:
    """Queries of one call of 1 s, a tool call of 1 s and a call of 1 s, due as by the stages; each side's waits by stage come on top.
    `told`: the tools tell their queue; a share of their calls is `failing` in the last stage."""
    found: list[Query] = []
    arrivals = [(i, 20 * stage + i / rate) for stage, rate in enumerate((1, 2, 4)) for i in range(20 * rate)]
    for number, (i, at) in enumerate(arrivals):
        stage, at = int(at // 20), origin_at + at
        model_s, tools_s = waits_s["model"][stage] / 2, waits_s["tools"][stage]
        tool_at, last_at = at + 1 + model_s, at + 2 + model_s + tools_s
        fails = stage == 2 and i < failing * 80
        more: dict[str, Any] = {"error": "tool_transport"} if fails else {}
        calls = [
            two_arms.call(1, (at, at + 0.5 + model_s, tool_at), (100, 0, 10)),
            two_arms.call(
                2, (tool_at, None, last_at), (None, None, None), after=[1], kind="tool_call", tool="look", target=None,
                gaps={}, queued_s=tools_s if told and not fails else None, **more,
            ),
        ]  # fmt: skip
        if not fails:
            calls.append(two_arms.call(3, (last_at, last_at + 0.5 + model_s, last_at + 1 + model_s), (100, 0, 10)))
        done_at = last_at if fails else last_at + 1 + model_s
        found.append(two_arms.query("chain", number, calls, at, done_at, outcome="failed" if fails else "completed"))
    return found


def gauges(waiting: list[float], origin_at: float = 7.0) -> list[Sample]:
    """A sample a second of so many requests that wait, by stage."""
    return [
        Sample(origin_at + second + 0.5, {"t": ServerSample(waiting=waiting[second // 20], kv_use=0.25)}, {})
        for second in range(60)
    ]


def found(queries: list[Query], samples: list[Sample]) -> dict[str, Any]:
    scenario = by_stages()
    part = saturation(scenario, scenario.arms[0], reduced(queries), [], 7 / 3, samples)
    assert part is not None
    return part


NONE = [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("waits_s", "waiting", "told", "first", "qps"),
    [
        # of 3 s of calls a query and 0.3 s of waiting 9.1 % is waiting, of 0.4 s 11.8 %
        ({"tools": [0.0, 0.3, 0.4], "model": NONE}, NONE, True, "tools", 4),
        ({"tools": [0.0, 0.4, 3.0], "model": NONE}, NONE, True, "tools", 2),
        ({"tools": [0.0, 0.3, 0.3], "model": NONE}, NONE, True, "neither", 4),
        # 1.6 requests wait over 20 s in which 80 calls begin: 0.4 s each, 0.8 s a query
        ({"tools": NONE, "model": [0.0, 0.8, 0.8]}, [0.0, 1.6, 3.2], True, "model", 2),
        ({"tools": [0.0, 0.0, 0.4], "model": NONE}, [0.0, 1.6, 1.6], True, "model", 2),
        ({"tools": [0.0, 0.6, 3.0], "model": [0.0, 0.8, 0.8]}, [0.0, 1.6, 3.2], True, "model", 2),
        ({"tools": [0.0, 0.9, 3.0], "model": [0.0, 0.8, 0.8]}, [0.0, 1.6, 3.2], True, "tools", 2),
        # tools that tell no queue are known by growth
        ({"tools": [0.0, 0.3, 0.4], "model": NONE}, NONE, False, "tools", 4),
        ({"tools": NONE, "model": NONE}, NONE, False, "neither", 4),
    ],
)
def test_what_gives_way_by_hand(
    waits_s: dict[str, list[float]], waiting: list[float], told: bool, first: str, qps: float
) -> None:
    part = found(chains(waits_s, told=told), gauges(waiting))
    assert (part["first"], part["qps"]) == (first, qps)
    assert [level["qps"] for level in part["levels"]] == [1, 2, 4]
    assert [level["times"] for level in part["levels"]] == [[[7, 27]], [[27, 47]], [[47, 67]]]
    assert [level["tools"]["by"] for level in part["levels"]] == ["queue" if told else "growth"] * 3


def test_the_figures_of_a_level() -> None:
    """Times are round: only the last calls of a stage begin in the next one."""
    part = found(chains({"tools": [0.0, 0.0, 1.0], "model": NONE}), gauges([0.0, 0.0, 2.0]))
    tools, model = part["levels"][2]["tools"], part["levels"][2]["model"]
    assert tools["queued_s"] == pytest.approx(1.0, rel=0.05)
    assert tools["latency_s"] == pytest.approx(2.0, rel=0.05)
    assert tools["in_service"] == pytest.approx(tools["calls"] / 20)
    assert tools["wait_share"] == pytest.approx(0.25, rel=0.1)
    assert (model["waiting_share"], model["kv_use_max"], model["ttft_s"]) == (1.0, 0.25, pytest.approx(0.5))
    assert model["wait_share"] == pytest.approx(40 / (4 * 80), rel=0.1)
    assert line(part) == (
        "the tools give way first, at 4 queries/s: of the calls' time is waiting "
        f"at the tools {tools['wait_share']:.0%}, at the model {model['wait_share']:.0%}"
    )


def test_a_tool_server_that_turns_calls_away_gives_way() -> None:
    part = found(chains({"tools": NONE, "model": NONE}, failing=0.2), gauges(NONE))
    assert (part["first"], part["qps"]) == ("tools", 4)
    assert part["levels"][2]["tools"]["failed_share"] == 16 / 78  # the last two begin after the stage
    assert line(part).endswith("at the tools 0% and 21% failed, at the model 0%")
    assert found(chains({"tools": NONE, "model": NONE}, failing=0.05), gauges(NONE))["first"] == "neither"


def test_what_nobody_tells_is_not_known() -> None:
    """Without gauges the model is known by its first tokens, against the first level; where there is one level only, not at all."""
    waits: dict[str, list[float]] = {"tools": NONE, "model": [0.0, 0.0, 2.0]}
    part = found(chains(waits), [])
    assert (part["first"], part["qps"], part["levels"][0]["model"]["wait_share"]) == ("model", 4, None)
    assert part["levels"][2]["model"]["by"] == "growth"
    even = check({"arm": [CHAIN], "load": {"rate": 2}}, "f.toml", topologies())
    one = saturation(even, even.arms[0], reduced(chains(waits)), [], 2.5, [])
    assert one is not None
    assert (one["first"], one["qps"], len(one["levels"])) == (None, 2.5, 1)
    assert line(one).startswith("which gives way first, tools or model, is not known up to 2.5 queries/s")
    assert saturation(even, even.arms[0], reduced([two_arms.single(0, 0.0, 0.0, 0.5, 2.0, 0, 16)]), [], 2.5, []) is None


def test_growth_that_may_be_chance_is_none() -> None:
    """Ten runs of equal stages whose tools take random times: none gives way."""
    for seed in range(10):
        rng, queries = random.Random(seed), chains({"tools": NONE, "model": NONE}, told=False)
        for query in queries:
            tool, last = query.calls[1], query.calls[2]
            tool.done_at = (tool.sent_at or 0.0) + rng.expovariate(1.0)
            last.sent_at, last.first_at, last.done_at = tool.done_at, tool.done_at + 0.5, tool.done_at + 1
        assert found(queries, gauges(NONE))["first"] == "neither"


RISING = """
[[arm]]
name = "chain"
topology = "tool-chain"
baseline = true
tool_calls = 2
[tools]
latency_s = 0.1
[workload]
system = 50
question = 50
action = {action}
answer = {action}
tool_result = 50
[load]
warmup = 0
process = "{process}"
{stages}
"""


def stages(seconds: float, *rates: float) -> str:
    return "".join(f"[[load.stages]]\nseconds = {seconds}\nrate = {rate}\n" for rate in rates)


def command(folder: Path, word: str, text: str, *flags: str) -> dict[str, Any]:
    (folder / "f.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "fanmark.loadgen.cli", word, str(folder / "f.toml"), "--json", "--out",
         str(folder / "run"), *flags],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    part: dict[str, Any] = json.loads(done.stdout)["arms"]["chain"]["saturation"]
    return part


@pytest.mark.parametrize(("slots", "first", "qps"), [(2, "model", 2.0), (1024, "neither", 2.0)])
def test_in_virtual_time(tmp_path: Path, slots: int, first: str, qps: float) -> None:
    """A query's calls take about 2 s of a slot: two slots serve one query a second. The tools have no queue."""
    profile = Path(profiles.__file__).parent / "fitted" / "qwen3-30b-a3b@h100.toml"
    (tmp_path / "p.toml").write_text(profile.read_text().replace("max_num_seqs = 1024", f"max_num_seqs = {slots}"))
    text = RISING.format(action=100, process="constant", stages=stages(60, 0.2, 0.4, 2.0))
    part = command(tmp_path, "simulate", text, "--profile", str(tmp_path / "p.toml"))
    assert (part["first"], part["qps"]) == (first, qps), line(part)
    assert part["levels"][2]["model"]["by"] == "queue"
    assert (part["levels"][2]["model"]["waiting_share"] > 0.9) == (slots == 2)


@pytest.mark.real
@pytest.mark.quiet
@pytest.mark.parametrize(("latency_s", "first"), [(0.1, "tools"), (0.001, "neither")])
def test_a_tool_server_of_one_slot(tmp_path: Path, start_tools: StartTools, latency_s: float, first: str) -> None:
    """At 0.1 s a call it serves ten calls a second, which are five queries; queries come at even steps."""
    server = start_tools("--concurrency", "1", "--latency-s", str(latency_s), "--tools", "search")
    text = RISING.format(action=2, process="constant", stages=stages(4, 1.0, 2.0, 9.0))
    part = command(tmp_path, "run", text, "--set", f'tools.server=[{{url="{server.url}"}}]')
    assert (part["first"], part["qps"]) == (first, 9.0), line(part)
