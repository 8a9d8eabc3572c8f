"""decide = "model": a model asks for tools, rightly and wrongly; what the agent loop makes of it, in virtual time and on the stub."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept
from test_run import fanmark

from fanmark.agents import topologies
from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import Sent
from fanmark.loadgen.lanes.mcp_model import Trip
from fanmark.loadgen.lanes.sse import Reply, parse_body, parse_stream
from fanmark.loadgen.lanes.virtual import Service, VirtualEndpoint
from fanmark.loadgen.lanes.virtual_tools import Result, VirtualTool
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.run import Run
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.summary import summarise_arms
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.toolset import ToolSet
from fanmark.servers.profiles import load_profile

PROFILE = load_profile("qwen3-30b-a3b@h100")
SCENARIO = {
    "arm": [{"name": "chain", "topology": "tool-chain", "baseline": True}],
    "load": {"mode": "closed", "queries": 1, "warmup": 0},
    "workload": {"lengths": "natural"},
    "tools": {"decide": "model", "max_tool_calls": 5},
}


class Shelf:
    """Tools that repeat their arguments: `look` reads, `write` may change something, `sour` is refused by its server, `sick` fails."""

    tools = [VirtualTool(name, "", {"type": "object"}, name != "write") for name in ("look", "write", "sour", "sick")]

    def __init__(self) -> None:
        self.trips: list[Trip] = []

    async def call(
        self, name: str, arguments: dict[str, Any], *, timeout_s: float, meta: Mapping[str, Any] | None, trip: Trip
    ) -> Result:
        trip.sent_at = trip.now()
        self.trips.append(trip)
        await asyncio.sleep(1.0)
        if name == "sour":
            raise CallError("tool_protocol", "bad parameters (-32602)")
        text = json.dumps(arguments)
        return Result(text, len(text), is_error=name == "sick")

    def end(self, query: Hashable) -> None:
        """There are no sessions."""


class Scripted(VirtualEndpoint):
    """Says what the script has, a turn at a time; keeps what it was asked."""

    def __init__(self, turns: Sequence[Sequence[ToolAsk]]) -> None:
        super().__init__("default", Target(url=""), Service(PROFILE))
        self.turns = list(turns)
        self.bodies: list[dict[str, Any]] = []
        self.traces: list[str] = []

    async def send(self, body: Mapping[str, Any], headers: Mapping[str, str], sent: Sent) -> Reply:
        self.bodies.append(dict(body))
        self.traces.append(headers["traceparent"])
        sent.at = now = asyncio.get_running_loop().time()
        may_call = body["tool_choice"] == "auto"
        asks = tuple(self.turns.pop(0)) if self.turns and may_call else ()
        return Reply(
            "" if asks else "so be it", None, now, now, now, None, "tool_calls" if asks else "stop", {}, 0, asks
        )


def carried_out(endpoint: Scripted, shelf: Shelf | None = None, **tools: Any) -> tuple[Any, dict[str, Any]]:
    """The query and its arm's summary."""
    shelf = shelf or Shelf()
    scenario = check(SCENARIO | {"tools": {**SCENARIO["tools"], **tools}}, "f.toml", topologies())  # type: ignore[dict-item]

    async def main() -> tuple[Any, dict[str, Any]]:
        kept, tally = Kept(), Tally({"chain": "tool-chain"}, "chain")
        toolset = ToolSet(shelf, shelf.tools, scenario.tools, embedded=False)
        await endpoint.expose(toolset.schemas, system=True)
        now = asyncio.get_running_loop().time
        await Run(scenario, topologies(), {"default": endpoint}, toolset, tally, kept, "r", now).execute()
        (query,) = kept
        return query, summarise_arms(scenario, reduced(kept))["chain"]

    return run_virtually(main())


def ask(number: int, name: str = "look", arguments: str = '{"n": 1}') -> ToolAsk:
    return ToolAsk(f"c{number}", name, arguments)


def conversation(body: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(role, ids asked for or answered, content) of each message."""
    return [
        (m["role"], [c["id"] for c in m["tool_calls"]] if "tool_calls" in m else m.get("tool_call_id"), m["content"])
        for m in body["messages"]
    ]


def test_tool_calls_run_at_once_and_their_results_go_back_by_id() -> None:
    endpoint = Scripted([[ask(1), ask(2, arguments='{"n": 2}')], [ask(3, arguments="")]])
    query, arm = carried_out(endpoint)
    assert query.outcome == "completed"
    assert query.mismatches == []
    assert {key: query.resources[key] for key in ("calls", "tool_calls", "depth", "width", "latency_s")} == {
        "calls": 3, "tool_calls": 3, "depth": 3, "width": 1, "latency_s": pytest.approx(2.0, abs=0.01),
    }  # fmt: skip
    assert [call.after for call in query.calls] == [[], [1], [1], [1, 2, 3], [4], [1, 2, 3, 4, 5]]
    first, second, last = map(conversation, endpoint.bodies)
    assert [role for role, _, _ in first] == ["system", "user"]
    assert second[2:] == [
        ("assistant", ["c1", "c2"], None), ("tool", "c1", '{"n": 1}'), ("tool", "c2", '{"n": 2}'),
    ]  # fmt: skip
    assert last[5:] == [("assistant", ["c3"], None), ("tool", "c3", "{}")]
    assert {body["tool_choice"] for body in endpoint.bodies} == {"auto"}
    assert [tool["function"]["name"] for tool in endpoint.bodies[0]["tools"]] == ["look", "write", "sour", "sick"]
    assert (arm["expected"]["calls"], arm["expected"]["tool_calls"], arm["expected"]["at_most"]) == (6, 5, True)


@pytest.mark.parametrize(
    ("asked", "tool", "refused", "error", "said"),
    [
        (ask(1, arguments="{"), "look", "malformed", None, "no JSON object"),
        (ask(1, arguments="[1]"), "look", "malformed", None, "no JSON object"),
        (ask(1, arguments="\ud800"), "look", "malformed", None, "no JSON object"),
        (ask(1, name="fly"), "?", "unknown", None, "there is no tool 'fly', but look, sick, sour, write"),
        (ask(1, name="write"), "write", "not_allowed", None, "nobody allowed it"),
        (ask(1, name="sour"), "sour", None, "tool_protocol", "bad parameters"),
        (ask(1, name="sick"), "sick", None, None, '{"n": 1}'),
    ],
)
def test_what_goes_wrong_is_told_to_the_model_and_counted(
    asked: ToolAsk, tool: str, refused: str | None, error: str | None, said: str
) -> None:
    """The query goes on: the model may try again."""
    endpoint = Scripted([[asked], [ask(2)]])
    query, arm = carried_out(endpoint)
    assert query.outcome == "completed"
    call = query.calls[1]
    assert (call.tool, call.refused, call.error, call.tool_error) == (tool, refused, error, tool == "sick")
    role, id, content = conversation(endpoint.bodies[1])[-1]
    assert (role, id) == ("tool", "c1")
    assert said in content
    assert query.resources["tool_calls"] == (1 if refused else 2)
    part = arm["by_tool"][tool]
    assert part["refused"] == ({refused: 1} if refused else {})
    assert part["errors"] == ({error: 1} if error else {"tool_error": 1} if tool == "sick" else {})


def test_calls_and_tool_calls_of_a_query_are_one_trace() -> None:
    """The trace is the query; each call is a span of its own, and the baggage says who makes it."""
    endpoint, shelf = Scripted([[ask(1), ask(2)]]), Shelf()
    carried_out(endpoint, shelf)
    traces = [*endpoint.traces, *(trip.trace["traceparent"] for trip in shelf.trips)]
    parts = [trace.split("-") for trace in traces]
    assert len({trace_id for _, trace_id, _, _ in parts}) == 1
    assert len({span_id for _, _, span_id, _ in parts}) == len(parts) == 4
    assert {trip.trace["baggage"] for trip in shelf.trips} == {
        "fanmark.run=r,fanmark.arm=chain,fanmark.query=0,fanmark.role=agent"
    }


def test_a_tool_that_was_not_shown_is_not_there() -> None:
    query, arm = carried_out(Scripted([[ask(1, name="sick")]]), expose=["look"])
    assert query.calls[1].refused == "unknown"
    assert arm["by_tool"]["?"]["refused"] == {"unknown": 1}


def test_a_named_tool_may_be_called_though_it_may_change_something() -> None:
    query, _ = carried_out(Scripted([[ask(1, name="write")]]), call=["write", "look"])
    assert (query.calls[1].refused, query.calls[1].error) == (None, None)


asks = st.builds(
    ToolAsk,
    st.text("abc", min_size=1, max_size=3),
    st.sampled_from(["look", "look", "write", "sour", "sick", "fly", ""]),
    st.sampled_from(['{"a": 1}', "{", "null", "{}"]),
)


@settings(max_examples=40)
@given(st.lists(st.lists(asks, min_size=1, max_size=4), max_size=8), st.integers(1, 6))
def test_whatever_a_model_asks_the_loop_is_bounded_and_each_call_is_answered(
    turns: list[list[ToolAsk]], limit: int
) -> None:
    endpoint = Scripted(turns)
    query, arm = carried_out(endpoint, max_tool_calls=limit)
    assert query.outcome == "completed"
    assert query.mismatches == []
    made = [call for call in query.calls if call.kind == "tool_call"]
    assert len([call for call in made if call.refused is None]) <= limit
    assert query.resources["calls"] <= limit + 1
    assert sum(call.refused == "limit" for call in made) == max(0, len(made) - limit)
    asked = [id for _, ids, _ in conversation(endpoint.bodies[-1]) if isinstance(ids, list) for id in ids]
    answered = [id for role, id, _ in conversation(endpoint.bodies[-1]) if role == "tool"]
    assert asked == answered
    assert len(made) == len(answered)
    assert endpoint.bodies[-1]["tool_choice"] == ("none" if len(made) >= limit else "auto")
    refused = Counter(call.refused for call in made if call.refused)
    told = Counter[str]()
    for part in arm["by_tool"].values():
        told.update(part["refused"])
    assert told == refused


def chunk(calls: list[dict[str, Any]] | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"tool_calls": calls} if calls else {}, **more}
    return b"data: " + msgspec.json.encode({"choices": [choice]}) + b"\n\n"


@given(
    st.lists(st.integers(0, 5_000), max_size=20),
    st.lists(st.lists(st.text(max_size=5), max_size=4), min_size=1, max_size=3),
)
def test_tool_calls_are_put_together_from_a_stream_cut_anywhere(places: list[int], pieces: list[list[str]]) -> None:
    events = [chunk([{"index": i, "id": f"c{i}", "function": {"name": "look"}}]) for i in range(len(pieces))]
    events += [
        chunk([{"index": i, "function": {"arguments": part}}]) for i, parts in enumerate(pieces) for part in parts
    ]
    body = b"".join([*events, chunk(finish_reason="tool_calls"), b"data: [DONE]\n\n"])
    ends = sorted({place % (len(body) + 1) for place in places})
    cuts = [body[a:b] for a, b in zip([0, *ends], [*ends, len(body)], strict=True)]
    reply = parse_stream([(float(i), piece) for i, piece in enumerate(cuts)])
    assert reply.asks == tuple(ToolAsk(f"c{i}", "look", "".join(parts)) for i, parts in enumerate(pieces))
    assert reply.finish == "tool_calls"
    whole = [
        {"id": a.id, "type": "function", "function": {"name": a.name, "arguments": a.arguments}} for a in reply.asks
    ]
    told = {"choices": [{"index": 0, "message": {"content": None, "tool_calls": whole}, "finish_reason": "tool_calls"}]}
    assert parse_body(msgspec.json.encode(told), 1.0).asks == reply.asks


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"workload": {}}, 'lengths = "natural"'),
        ({"stub": {"api": "completions"}}, 'decide = "model" with api = "completions"'),
        ({"target": {"url": "http://x/v1", "api": "completions"}}, 'decide = "model" with api = "completions"'),
    ],
)
def test_where_a_model_cannot_decide_the_scenario_is_refused(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        check(SCENARIO | raw, "f.toml", topologies())


FILE = """
[workload]
lengths = "natural"
answer = 120
[stub]
tool_calls = 3
[tools]
decide = "model"
latency_s = 0.02
[load]
mode = "closed"
queries = 2
warmup = 0
[[arm]]
name = "single"
topology = "single"
baseline = true
[[arm]]
name = "chain"
topology = "tool-chain"
"""


@pytest.mark.real
def test_the_stubs_model_decides_alike_in_both_clocks(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(FILE)
    found = {}
    for command in ("run", "simulate"):
        done = fanmark(command, str(path), "--json", "--out", str(tmp_path / command))
        assert done.returncode == 0, done.stderr
        found[command] = json.loads(done.stdout)
        assert found[command]["validity"]["counted"] is True
        assert found[command]["validity"]["reconciled"] is True
        assert found[command]["validity"]["uncontaminated"] is True
    for resource in ("calls", "tool_calls", "input_tokens", "cached_tokens", "output_tokens"):
        assert (
            found["run"]["arms"]["chain"]["per_query"][resource]
            == found["simulate"]["arms"]["chain"]["per_query"][resource]
        )
    assert found["run"]["arms"]["chain"]["per_query"]["tool_calls"]["mean"] == 3


@pytest.mark.real
def test_an_arm_whose_topology_decides_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(FILE.replace("tool-chain", "orchestrator"))
    done = fanmark("simulate", str(path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "arm 'chain': orchestrator decides itself: use tool-chain" in done.stderr
