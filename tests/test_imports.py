"""Traces in their documented forms, each a sample made by hand: what is read of them, and what is refused."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_replay import random_query
from typer.testing import CliRunner

from fanmark.agents.steps import Step
from fanmark.loadgen.cli import app
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.export_dag import export
from fanmark.loadgen.imports import formats, import_trace
from fanmark.loadgen.imports.trace import share_out
from fanmark.loadgen.recording import RecordedCall, Recorder, Recording, Said


def imported(name: str, folder: Path, *rows: Any, file: str = "trace.jsonl") -> Recording:
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_trace(name, folder / file, folder / "recording")
    return Recording(folder / "recording")


def told(step: Step) -> tuple[Any, ...]:
    """The number, what it waited for, its pause, and what it read: other steps' numbers, or lengths of texts of its own."""
    reads = [read.key[1] if read.key[0] != "recorded" else f"{read.tokens} tokens" for read in step.reads]
    return step.writes[1], [key[1] for key in step.after], round(step.pause_s, 6), reads


def test_mooncake(tmp_path: Path) -> None:
    recording = imported(
        "mooncake", tmp_path,
        {"timestamp": 274, "input_length": 1300, "output_length": 52, "hash_ids": [0, 4, 6]},
        {"timestamp": 0, "input_length": 1200, "output_length": 26, "hash_ids": [0, 1, 2]},
        {"timestamp": 1000, "input_length": 700, "output_length": 0},
    )  # fmt: skip
    assert list(recording.starts_s()) == [0.0, 0.274, 1.0]
    first, second, third = (recording.steps(i)[0] for i in range(3))
    assert [(read.key, read.tokens) for read in first.reads] == [
        (("recorded", "0"), 512), (("recorded", "1"), 512), (("recorded", "2/176"), 176)
    ]  # fmt: skip
    assert second.reads[0] == first.reads[0] and second.reads[2].tokens == 1300 - 1024
    assert (first.tokens, second.tokens, third.tokens) == (26, 52, 1)
    assert [read.tokens for read in third.reads] == [700]


TRACES = Path(__file__).parent / "data" / "traces"


def test_rows_that_mooncake_published(tmp_path: Path) -> None:
    """Each reads as long as it says; two of one template share its whole blocks, and the same again is the same."""
    rows = [json.loads(line) for line in (TRACES / "mooncake.jsonl").read_text().splitlines()]
    assert import_trace("mooncake", TRACES / "mooncake.jsonl", tmp_path).calls == 12
    recording = Recording(tmp_path)
    assert list(recording.starts_s()) == pytest.approx([(row["timestamp"] - 2469) / 1000 for row in rows])
    calls = [recording.steps(i)[0] for i in range(12)]
    assert [sum(read.tokens for read in call.reads) for call in calls] == [row["input_length"] for row in rows]
    template, other, again = calls[2], calls[9], calls[11]
    assert (
        again.reads == template.reads and other.reads[:5] == template.reads[:5] and other.reads[5] != template.reads[5]
    )
    assert [read.tokens for read in other.reads] == [512] * 5 + [2754 - 5 * 512]


def test_requests_that_weka_published(tmp_path: Path) -> None:
    """A streamed request and a plain one with the same prompt, then a turn that reads the reply of the latter, and so on."""
    rows = json.loads((TRACES / "weka.json").read_text())["requests"]
    found = import_trace("weka", TRACES / "weka.json", tmp_path)
    assert "without api_time" in found.notes[0]
    steps = Recording(tmp_path).steps(0)
    assert [sum(read.tokens for read in step.reads) for step in steps] == [row["in"] for row in rows]
    assert [step.tokens for step in steps] == [row["out"] for row in rows]
    assert [told(step)[1:] for step in steps] == [
        ([], 0.0, ["15713 tokens", "4351 tokens"]),
        ([1], 0.0, ["15713 tokens", "4351 tokens"]),
        ([2], 0.0, ["15713 tokens", "4351 tokens", 2, "8537 tokens"]),
        ([2, 3], 0.0, ["15713 tokens", "4351 tokens", 2, "8537 tokens"]),
        ([2, 4], 0.0, ["15713 tokens", "4351 tokens", 2, "8537 tokens", 4, "3961 tokens"]),
    ]


def test_mooncake_sessions_are_queries_of_several_calls(tmp_path: Path) -> None:
    recording = imported(
        "mooncake", tmp_path,
        {"session_id": "a", "timestamp": 500, "input_length": 10, "output_length": 5},
        {"timestamp": 100, "input_length": 10, "output_length": 5},
        {"session_id": "a", "delay": 2000, "input_length": 30, "output_length": 5},
    )  # fmt: skip
    assert list(recording.starts_s()) == [0.0, 0.4]
    assert [told(step) for step in recording.steps(1)] == [(1, [], 0.0, ["10 tokens"]), (2, [1], 2.0, ["30 tokens"])]


SUBAGENT = {
    "t": 10.0, "type": "subagent", "agent_id": "a1", "subagent_type": "Explore", "requests": [
        {"t": 0.5, "type": "s", "in": 128, "out": 10, "hash_ids": [50, 51], "api_time": 2.0},
        {"t": 3.0, "type": "s", "in": 200, "out": 10, "hash_ids": [50, 51, 52, 53], "api_time": 1.0},
    ],
}  # fmt: skip
WEKA = {
    "id": "t1", "block_size": 64, "hash_id_scope": "local", "tool_tokens": 64, "system_tokens": 36, "requests": [
        {"t": 0.0, "type": "s", "in": 260, "out": 40, "hash_ids": [1, 2, 3, 4, 5], "api_time": 9.0},
        SUBAGENT,
        {"t": 20.0, "type": "s", "in": 350, "out": 30, "hash_ids": [1, 2, 3, 4, 6, 7], "api_time": 5.0},
        {"t": 30.0, "type": "n", "in": 180, "out": 5, "hash_ids": [1, 2, 9], "api_time": 1.0},
    ],
}  # fmt: skip


def test_weka(tmp_path: Path) -> None:
    """The parent's second request reads its first reply, and waits for the sub-agent that came up meanwhile; a last one, whose context was
    cut, shares what stands before the cut: the 100 tokens of tools and system message."""
    recording = imported("weka", tmp_path, WEKA, file="trace.json")
    steps = recording.steps(0)
    assert [told(step) for step in steps] == [
        (1, [], 0.0, ["100 tokens", "160 tokens"]),
        (2, [1], 1.5, ["100 tokens", "28 tokens"]),
        (3, [2], 0.5, ["100 tokens", "28 tokens", 2, "62 tokens"]),
        (4, [1, 3], 6.0, ["100 tokens", "160 tokens", 1, "50 tokens"]),
        (5, [4], 5.0, ["100 tokens", "80 tokens"]),
    ]
    assert [step.role for step in steps] == ["agent", "Explore", "Explore", "agent", "agent"]
    assert steps[0].reads[0] == steps[4].reads[0] != steps[1].reads[0]
    assert [step.input_tokens for step in steps] == [260, 128, 200, 350, 180]


def test_weka_times_of_a_subagent_may_count_from_the_start(tmp_path: Path) -> None:
    absolute = SUBAGENT | {"requests": [r | {"t": r["t"] + 10} for r in SUBAGENT["requests"]]}  # type: ignore[operator,attr-defined,index]
    trace = WEKA | {"requests": [absolute if r is SUBAGENT else r for r in WEKA["requests"]]}  # type: ignore[attr-defined]
    (tmp_path / "relative").mkdir()
    found = imported("weka", tmp_path, trace).steps(0)
    assert found == imported("weka", tmp_path / "relative", WEKA).steps(0)


DAG = [
    {"session_id": "root", "turns": [
        {"messages": [{"role": "system", "content": "s" * 45}, {"role": "user", "content": "u" * 90}], "max_tokens": 9,
         "spawns": ["helper", {"children": ["late"], "join_at": 2}]},
        {"messages": [{"role": "user", "content": "x" * 4}], "max_tokens": 8, "delay": 1500},
        {"messages": [{"role": "user", "content": "y" * 4}], "max_tokens": 7, "forks": ["left", "right"]}]},
    {"session_id": "helper", "turns": [{"messages": [{"role": "user", "content": "h" * 22}], "max_tokens": 6}]},
    {"session_id": "late", "turns": [{"messages": [{"role": "user", "content": "l" * 27}], "max_tokens": 6}]},
    {"session_id": "left", "turns": [{"messages": [{"role": "user", "content": "z" * 13}], "max_tokens": 5}]},
    {"session_id": "right", "turns": [{"messages": [{"role": "user", "content": "z" * 13}], "max_tokens": 5}]},
]  # fmt: skip


def test_aiperf_dag(tmp_path: Path) -> None:
    recording = imported("aiperf-dag", tmp_path, *DAG)
    steps = {step.role if step.role != "root" else int(step.writes[1]): told(step)[1:] for step in recording.steps(0)}
    assert len(recording) == 1
    before = ["10 tokens", "20 tokens", 1, "1 tokens", 4, "1 tokens"]
    assert steps == {
        1: ([], 0.0, before[:2]),
        "helper": ([1], 0.0, ["5 tokens"]),
        "late": ([1], 0.0, ["6 tokens"]),
        4: ([1, 2], 1.5, before[:4]),
        5: ([1, 3, 4], 0.0, before),
        "left": ([1, 4, 5], 0.0, [*before, 5, "3 tokens"]),
        "right": ([1, 4, 5], 0.0, [*before, 5, "3 tokens"]),
    }


def test_an_orchestrator_sends_nothing_and_its_rounds_wait(tmp_path: Path) -> None:
    turn = {"messages": [{"role": "user", "content": "u" * 40}], "max_tokens": 3}
    recording = imported(
        "aiperf-dag", tmp_path,
        {"session_id": "o", "orchestrator": True, "rounds": [
            {"spawns": ["a", "b"], "think_time_ms": 2000}, {"spawns": ["c"]}]},
        *({"session_id": name, "turns": [turn]} for name in "abc"),
    )  # fmt: skip
    assert [told(step)[1:3] for step in recording.steps(0)] == [([], 0.0), ([], 0.0), ([1, 2], 2.0)]


def spans(part: str = "tool_call_response", key: str = "response") -> list[dict[str, Any]]:
    """An agent asks for a tool, which runs for a second, and reads on; beside it a span of the whole, and a call that failed."""
    system = {"role": "system", "parts": [{"type": "text", "content": "s" * 100}]}
    question = {"role": "user", "parts": [{"type": "text", "content": "q" * 100}]}
    action = {"role": "assistant", "parts": [{"type": "tool_call", "id": "c1", "name": "look", "arguments": {}}]}
    result = {"role": "tool", "parts": [{"type": part, "id": "c1", key: "r" * 50}]}
    usage = {"gen_ai.usage.input_tokens": 60, "gen_ai.usage.output_tokens": 12}
    later = {
        "gen_ai.usage.input_tokens": 97, "gen_ai.usage.output_tokens": 20, "gen_ai.usage.cache_read.input_tokens": 64
    }  # fmt: skip
    return [
        {"what": "invoke_agent", "at": (0, 9), "attributes": {}},
        {"what": "chat", "at": (0, 2), "attributes": usage | {"gen_ai.input.messages": json.dumps([system, question])}},
        {"what": "execute_tool", "at": (3, 4), "attributes": {"gen_ai.tool.call.id": "c1", "gen_ai.tool.name": "look"}},
        {"what": "chat", "at": (4, 5), "failed": True, "attributes": usage},
        {
            "what": "chat",
            "at": (4.5, 6),
            "attributes": later | {"gen_ai.input.messages": json.dumps([system, question, action, result])},
        },
    ]


AS_SPANS = [
    (1, [], 0.0, ["30 tokens", "30 tokens"]),
    (2, [1], 1.0, []),
    (3, [1, 2], 0.5, ["30 tokens", "30 tokens", 1, 2]),
]


@pytest.mark.parametrize(("part", "key"), [("tool_call_response", "result"), ("tool_result", "content")])
def test_exgentic_rows(part: str, key: str, tmp_path: Path) -> None:
    row = [
        {
            "span_id": str(i),
            "type": {"chat": "llm_call", "execute_tool": "tool_call"}.get(span["what"], "agent"),
            "start_time": f"2026-05-18T09:27:{10 + span['at'][0]:04.1f}+00:00",
            "end_time": f"2026-05-18T09:27:{10 + span['at'][1]:04.1f}Z",
            "status": {"code": 2 if span.get("failed") else 1},
            "attributes": span["attributes"],
        }
        for i, span in enumerate(spans(part, key))
    ]
    steps = imported("otel", tmp_path, {"session_id": "x", "spans": row}).steps(0)
    assert [told(step) for step in steps] == AS_SPANS
    assert [(step.tokens, step.seconds) for step in steps] == [(12, 0.0), (25, 1.0), (20, 0.0)]
    assert [step.role for step in steps] == ["agent", "look", "agent"]
    assert [step.cached_tokens for step in steps] == [None, None, 64]


def test_otlp(tmp_path: Path) -> None:
    """The same, by the exporter of a collector: a span a line, and not in order."""
    lines = []
    for span in reversed(spans()):
        attributes = {"gen_ai.operation.name": span["what"]} | span["attributes"]
        known = [
            {"key": key, "value": {"intValue": str(v)} if isinstance(v, int) else {"stringValue": v}}
            for key, v in attributes.items()
        ]
        one = {
            "traceId": "7" * 32,
            "startTimeUnixNano": str(int(span["at"][0] * 1e9)),
            "endTimeUnixNano": str(int(span["at"][1] * 1e9)),
            "attributes": known,
            "status": {"code": 2} if span.get("failed") else {},
        }
        lines.append({"resourceSpans": [{"scopeSpans": [{"spans": [one]}]}]})
    assert [told(step) for step in imported("otel", tmp_path, *lines).steps(0)] == AS_SPANS


def test_spans_without_content_are_one_text_each(tmp_path: Path) -> None:
    span = {"type": "llm_call", "start_time": "2026-05-18T09:00:00", "end_time": "2026-05-18T09:00:01"}
    counts = {"gen_ai.usage.input_tokens": 60, "gen_ai.usage.output_tokens": 12}
    (tmp_path / "t.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"session_id": "x", "spans": [{**span, "attributes": counts}] * 2}).encode())
    )
    found = import_trace("otel", tmp_path, tmp_path / "recording")
    assert (found.queries, found.calls) == (1, 2) and "what their prompts share" in found.notes[0]
    first, second = Recording(tmp_path / "recording").steps(0)
    assert first.reads[0].tokens == second.reads[0].tokens == 60 and first.reads != second.reads


WRONG = [
    ("mooncake", "{}", r"trace.jsonl, line 1: input_length = 0: a request reads something: that is not as mooncake"),
    ("mooncake", '{"input_length": "x"}', r"line 1: Expected `int \| null`, got `str` - at `\$.input_length`"),
    ("mooncake", "no json", r"line 1: JSON is malformed"),
    ("mooncake", "", r"holds no call that can be made again"),
    ("weka", '{"id": "t"}', r"line 1: Object missing required field `requests`"),
    ("aiperf-dag", '{"session_id": "r", "turns": [{"messages": []}]}', r"r: a turn has no max_tokens"),
    ("aiperf-dag", '{"session_id": "r", "orchestrator": true, "spawns": ["x"]}', r"branches into 'x', which is not"),
    (
        "aiperf-dag",
        "".join(
            json.dumps({"session_id": a, "turns": [{"messages": [], "max_tokens": 1, "forks": [b]}]}) + "\n"
            for a, b in ("ra", "ab", "ba")
        ),
        r"a branches into itself: a -> b -> a",
    ),
    (
        "aiperf-dag",
        2 * '{"session_id": "r", "turns": [{"messages": [], "max_tokens": 1}]}\n',
        r"line 2: r is there twice",
    ),
    ("otel", '{"spams": []}', r"has neither resourceSpans nor spans"),
    ("otel", '{"spans": [{"type": "llm_call"}]}', r"start_time is missing"),
    ("nothing", "{}", r"there is no such format, but mooncake, weka, aiperf-dag, otel"),
]


@pytest.mark.parametrize(("name", "line", "said"), WRONG)
def test_what_is_no_trace_is_refused_and_leaves_nothing(name: str, line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(line)
    with pytest.raises(ScenarioError, match=said):
        import_trace(name, tmp_path / "trace.jsonl", tmp_path / "recording")
    assert not (tmp_path / "recording").exists() or not list((tmp_path / "recording").iterdir())


def test_the_formats_are_named() -> None:
    assert list(formats()) == ["mooncake", "weka", "aiperf-dag", "otel"] and all(formats().values())


@pytest.mark.parametrize(("tokens", "weights"), [(10, [1, 1, 1]), (3, [1, 1000, 1]), (2, [5, 5, 5]), (7, [0, 0])])
def test_shares_add_up_and_none_is_empty_where_that_can_be(tokens: int, weights: list[float]) -> None:
    shares = share_out(tokens, weights)
    assert sum(shares) == tokens and (min(shares) >= 1 or tokens < len(weights))


def chain(folder: Path) -> Recording:
    """Three turns, a tool call between the first two."""
    system, question = Said("s", 30, "system"), Said("q", 20)
    said = [Said("", 10, "assistant", 1), Said("", 40, "user", 2), Said("", 10, "assistant", 3), Said("more", 5)]
    common: dict[str, Any] = {"query": 0, "arm": "", "role": "agent", "round": 1, "output_tokens": 10}
    calls = [
        RecordedCall(
            **common, call=1, after=[], kind="call", due_at=0.0, done_at=1.0, messages=[system, question],
            input_tokens=50,
        ),
        RecordedCall(**common, call=2, after=[1], kind="tool_call", due_at=1.0, sent_at=1.0, done_at=3.0),
        RecordedCall(
            **common, call=3, after=[2], kind="call", due_at=3.5, done_at=4.0, messages=[system, question, *said[:2]],
            input_tokens=100,
        ),
        RecordedCall(
            **common, call=4, after=[3], kind="call", due_at=4.0, done_at=5.0, messages=[system, question, *said],
            input_tokens=115,
        ),
    ]  # fmt: skip
    recorder = Recorder(folder, "chain")
    recorder.add(calls, 0.0)
    recorder.close()
    return Recording(folder)


def test_a_chain_is_exported_as_a_conversation(tmp_path: Path) -> None:
    assert export(chain(tmp_path / "chain"), tmp_path / "dag.jsonl").conversations == 1
    (line,) = [json.loads(line) for line in (tmp_path / "dag.jsonl").read_text().splitlines()]
    first, second, third = line["turns"]
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert [len(second["messages"]), second["delay"], second["max_tokens"]] == [1, 2500.0, 10], (
        "2 s of a tool, 0.5 of its own"
    )
    assert third["extra"] == {"ignore_eos": True, "min_tokens": 10} and "delay" not in third
    import_trace("aiperf-dag", tmp_path / "dag.jsonl", tmp_path / "again")
    again = [told(step) for step in Recording(tmp_path / "again").steps(0)]
    assert [(after, pause_s) for _, after, pause_s, _ in again] == [([], 0.0), ([1], 2.5), ([1, 2], 0.0)]
    assert [read for *_, reads in again for read in reads if isinstance(read, int)] == [1, 1, 2]
    with pytest.raises(ScenarioError, match="cannot be written"):
        export(chain(tmp_path / "other"), tmp_path / "dag.jsonl")


def test_any_recording_comes_back_from_its_export_with_as_many_calls_and_tokens(tmp_path: Path) -> None:
    rng, recorder = random.Random(5), Recorder(tmp_path / "any", "any")
    for i in range(20):
        recorder.add(random_query(rng, 6), float(i))
    recorder.close()
    any_one = Recording(tmp_path / "any")
    export(any_one, tmp_path / "dag.jsonl")
    import_trace("aiperf-dag", tmp_path / "dag.jsonl", tmp_path / "again")
    again = Recording(tmp_path / "again")
    with_calls = [steps for i in range(len(any_one)) if (steps := [s for s in any_one.steps(i) if s.is_call])]
    assert len(again) == len(with_calls)
    for i, steps in enumerate(with_calls):
        back = again.steps(i)
        assert sorted(step.tokens for step in back) == sorted(step.tokens for step in steps)
        assert sorted(len(step.reads) for step in back) == sorted(len(step.reads) for step in steps)


def test_the_commands(tmp_path: Path) -> None:
    chain(tmp_path / "chain")
    dag, again = str(tmp_path / "dag.jsonl"), str(tmp_path / "again")
    done = CliRunner().invoke(app, ["export", "aiperf-dag", str(tmp_path / "chain"), "--out", dag])
    assert done.exit_code == 0 and "1 queries, 1 of them conversations" in done.output
    done = CliRunner().invoke(app, ["import", "aiperf-dag", dag, "--out", again])
    assert done.exit_code == 0 and "1 queries, 3 calls and tool calls" in done.output
    done = CliRunner().invoke(app, ["export", "csv", str(tmp_path / "chain"), "--out", dag])
    assert isinstance(done.exception, ScenarioError) and "no such format" in str(done.exception)
