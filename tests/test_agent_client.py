"""An agent that makes its own calls by the SDK: what is recorded of them, and what is found out about who waited for whom."""

import asyncio
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from echo_server import Echo, echoing
from hypothesis import given
from hypothesis import strategies as st
from stub_process import Stub, running_stub
from test_user_topology import PAGE, SINGLE

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, session, simulate
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.quoting import Said, depends_on, said_in, texts_read
from fanmark.loadgen.records import Query, read_queries
from fanmark.loadgen.user_topology import with_users

LONG = "a reply of many characters"


@pytest.mark.parametrize(
    ("reply", "read", "found"),
    [
        (LONG, LONG, True),
        (LONG, f"They said: {LONG}. Now you.", True),
        (LONG, LONG[:-1], False),
        ("yes", "yes", True),
        ("yes", "votes:\n yes \nno", True),  # a line of its own
        ("yes", "yesterday", False),
        ("yes", "say yes or no", False),
    ],
)
def test_a_reply_is_found_where_it_is_read(reply: str, read: str, found: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": read}]
    for content in (read, [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": read}]):
        messages[0]["content"] = content
        assert (
            depends_on([Said(7, ["other words altogether", reply], [])], texts_read({"messages": messages}))
            == [7] * found
        )
    assert depends_on([Said(7, [reply], [])], texts_read({"prompt": read})) == [7] * found


def test_a_tool_call_is_found_by_its_id() -> None:
    asked = {"id": "call_8", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    body = json.dumps({"choices": [{"index": 0, "message": {"content": None, "tool_calls": [asked]}}]}).encode()
    said = said_in(3, [(0.0, body)], stream=False)
    assert said == Said(3, [], ["call_8"])
    messages = [{"role": "assistant", "content": None, "tool_calls": [asked]}, {"role": "tool", "content": "12:00"}]
    assert depends_on([said], texts_read({"messages": messages})) == [3]
    assert depends_on([said], texts_read({"messages": messages[1:]})) == []


def test_a_reply_of_another_form_is_quoted_by_nobody() -> None:
    body = json.dumps({"choices": [{"message": {"content": "words enough", "tool_calls": [{"id": 7}]}}]}).encode()
    assert said_in(1, [(0.0, body)], stream=False) == Said(1, [], [])


@given(st.lists(st.text(alphabet="ab \n", min_size=1, max_size=8), min_size=1, max_size=3), st.data())
def test_choices_of_a_stream_are_told_apart_however_it_is_mixed(texts: list[str], data: st.DataObject) -> None:
    left = {i: list(text) for i, text in enumerate(texts)}
    events = [b"data: [DONE]\n\n"]
    chunks = []
    while any(left.values()):
        i = data.draw(st.sampled_from([i for i, rest in left.items() if rest]))
        chunks.append({"choices": [{"index": i, "delta": {"content": left[i].pop(0)}}]})
    events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks] + events
    said = said_in(1, [(0.0, event) for event in events], stream=True)
    assert sorted(said.texts) == sorted(text.strip() for text in texts if text.strip())


def scenario(
    folder: Path, code: str, arm: str, rest: str = "", load: str = "[load]\nqueries = 2\nrate = 50\nwarmup = 0\n"
) -> Any:
    """The checked scenario and its topologies: the baseline, and the agent."""
    (folder / "agent.py").write_text(code)
    single = "" if "baseline" in arm else SINGLE
    (folder / "agent.toml").write_text(f"{single}{arm}\n{load}{rest}[workload]\nanswer = 8\n")
    raw, source = scenario_check.read(str(folder / "agent.toml"))
    table = with_users(raw, source, topologies())
    return scenario_check.check(raw, source, table), table


ARM = '[[arm]]\nname = "mine"\ntopology = "agent.py:answer"\n'


def ran(folder: Path, url: str, code: str, arm: str = ARM, **more: str) -> tuple[dict[str, Any], list[Query]]:
    """The arm's summary, and its queries in order."""
    found, table = scenario(folder, code, arm, f'[target]\nurl = "{url}/v1"\n' + more.pop("target", ""), **more)
    options = session.Options(folder / "run", 0, folder.name, "test", [], None)
    with asyncio.Runner() as runner:
        summary = runner.run(session.run(found, table, options)).summary
        assert asyncio.all_tasks(runner.get_loop()) == set()
    queries = [query for query in read_queries(folder / "run") if query.arm == "mine"]
    return summary, sorted(queries, key=lambda query: query.query)


@pytest.mark.real
def test_the_example_of_the_page(stub: Stub, tmp_path: Path) -> None:
    *_, toml, code = re.findall(r"```(?:toml|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    toml = toml.partition("[load]")[0]
    assert len(code.strip().splitlines()) <= 25
    summary, queries = ran(tmp_path, stub.url, code, toml)
    assert summary["validity"]["reconciled"] is True
    assert summary["arms"]["mine"]["by_role"].keys() == {"agent", "planner", *(f"voter-{i}" for i in range(1, 5))}
    assert [query.outcome for query in queries] == ["completed"] * 2
    for query in queries:
        # question 200; 10 words ask for a plan; 40 of it and of each vote are read again
        told = [(c.after, c.round, c.input_tokens, c.output_tokens, c.finish) for c in query.calls]
        assert told == [
            ([], 1, 210, 40, "length"),
            *[([1], 2, 240, 40, "length")] * 4,
            ([2, 3, 4, 5], 3, 360, 60, "length"),
        ]
        assert {
            name: query.resources[name] for name in ("calls", "depth", "width", "input_tokens", "output_tokens")
        } == {
            "calls": 6,
            "depth": 3,
            "width": 4,
            "input_tokens": 210 + 4 * 240 + 360,
            "output_tokens": 5 * 40 + 60,
        }
        assert query.expected == {} and query.mismatches == []
        for call in query.calls:
            assert call.sent_at is not None and call.done_at is not None
            assert call.due_at <= call.sent_at < call.done_at and (call.first_at is None) == (call.round < 3)
            assert call.first_at is None or call.sent_at < call.first_at < call.done_at
        assert sum(query.calls[-1].gaps.values()) == 59 and query.calls[0].gaps == {}
        assert (query.resources["critical_path_s"] or 0) > 0.5 * (query.resources["latency_s"] or 0)


CALL = """await client.chat.completions.create(model="x", messages=[{"role": "user", "content": question}], max_tokens=4%s)"""


@pytest.mark.real
def test_what_the_sdk_sends_again_is_an_attempt(tmp_path: Path) -> None:
    code = f"async def answer(client, question):\n    for _ in range(6):\n        {CALL % ''}\n"
    with running_stub("--fault", "429:rate=0.35,retry_after_s=0.01", "--time-scale", "0.2") as stub:
        summary, queries = ran(tmp_path, stub.url, code, load="[load]\nqueries = 6\nwarmup = 0\nmode = 'closed'\n")
    again = [call for query in queries for call in query.retried]
    assert again and summary["arms"]["mine"]["waste"]["retried"] == {"http_429": len(again)}
    assert summary["server"]["request_success"]["off_pct"] == 0.0
    for query in queries:
        for call in query.calls:
            before = [failed for failed in query.retried if failed.call == call.call]
            assert [failed.attempt for failed in before] == list(range(1, len(before) + 1))
            assert call.attempt == len(before) + 1 <= 3
            for first, second in pairwise([*before, call]):
                assert first.error == "http_429" and first.done_at is not None
                assert first.retry_at == second.due_at > first.done_at
        last = query.calls[-1]
        assert (query.outcome == "completed") == (last.error is None) == (len(query.calls) == 6)
        if query.outcome == "failed":
            assert query.error is not None and query.error.startswith("http_429: HTTP 429")


def test_our_headers_go_out_and_the_rest_is_as_the_agent_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = 'stream=True, seed=effort, extra_body={"cache_salt": cache_salt}, extra_headers=headers'
    code = f"""async def answer(client, question, history, cache_salt, effort=2):
    headers = {{"X-Fanmark-Role": "judge", "X-Mine": "1"}}
    async for chunk in {CALL % f", {more}"}:
        pass
"""
    monkeypatch.setenv("KEY_OF_MINE", "sk-0123456789")
    with echoing(Echo()) as echo:
        target = 'api_key_env = "KEY_OF_MINE"\n[target.roles.judge]\nmodel = "lora"\n'
        load = "[load]\nqueries = 4\nusers = 1\nturns = 2\nwarmup = 0\n"
        _, queries = ran(tmp_path, echo.url.removesuffix("/v1"), code, f"{ARM}effort = 5\n", target=target, load=load)
    assert [query.outcome for query in queries] == ["completed"] * 4
    calls = [asked for asked in echo.calls if asked.headers.get("X-Mine") == "1" or asked.headers.get("x-mine") == "1"]
    assert len(calls) == 4
    for i, asked in enumerate(calls):
        headers = {name.lower(): value for name, value in asked.headers.items()}
        assert headers["authorization"] == "Bearer sk-0123456789" and "x-fanmark-role" not in headers
        assert headers["x-request-id"] == f"{tmp_path.name}-mine-{i}-1"
        assert headers["x-session-id"] == f"{tmp_path.name}-mine-{i // 2}"
        assert headers["traceparent"].startswith("00-") and headers["content-type"] == "application/json"
        body = {name: value for name, value in asked.body.items() if name != "messages"}
        assert body == {
            "model": "lora",
            "max_tokens": 4,
            "stream": True,
            "seed": 5,
            "cache_salt": f"{tmp_path.name}-mine",
        }
    roles = {call.role for query in queries for call in query.calls}
    assert roles == {"judge"} and "sk-0123456789" not in (tmp_path / "run" / "calls.jsonl").read_text()


@pytest.mark.real
def test_an_agent_is_told_the_turns_before(stub: Stub, tmp_path: Path) -> None:
    code = """async def answer(client, question, history):
    asked = [*history, {"role": "user", "content": question}]
    await client.chat.completions.create(model="x", messages=asked, max_tokens=10, extra_body={"ignore_eos": True})
"""
    _, queries = ran(tmp_path, stub.url, code, load="[load]\nqueries = 3\nusers = 1\nturns = 3\nwarmup = 0\n")
    assert [query.resources["input_tokens"] for query in queries] == [200, 410, 620]


@pytest.mark.real
def test_what_an_agent_does_not_await_is_given_up(stub: Stub, tmp_path: Path) -> None:
    """A task that outlives it, and a stream that it closes early: both are aborted at the server."""
    code = f"""import asyncio

async def answer(client, question):
    late = asyncio.create_task({(CALL % ', extra_body={"ignore_eos": True}')[6:].replace("max_tokens=4", "max_tokens=900")})
    stream = {(CALL % ", stream=True").replace("max_tokens=4", "max_tokens=900")}
    async for chunk in stream:
        break
    await stream.close()
    {CALL % ""}
    answer.late = late
"""
    aborted = "vllm:request_success_total"
    before = {name: value for name, value in stub.metrics().items() if aborted in name and "abort" in name}
    summary, queries = ran(tmp_path, stub.url, code)
    assert [query.outcome for query in queries] == ["completed"] * 2
    for query in queries:
        assert sorted(call.error or "" for call in query.calls) == ["", "cancelled", "cancelled"]
        assert (query.resources["calls"], query.resources["output_tokens"]) == (1, 4)
    after = {name: value for name, value in stub.metrics().items() if aborted in name and "abort" in name}
    assert sum(after.values()) - sum(before.values()) == 4
    assert summary["arms"]["mine"]["waste"]["given_up"] == 4


@pytest.mark.real
def test_a_limit_of_the_arm_ends_an_agent_with_what_it_has(stub: Stub, tmp_path: Path) -> None:
    code = f"""import asyncio

async def answer(client, question):
    async def one():
        return {CALL % ""}
    await one()
    while True:
        await asyncio.gather(one(), one())
"""
    summary, queries = ran(tmp_path, stub.url, code, f"{ARM}max_calls = 4\n")
    assert [(query.outcome, query.stopped) for query in queries] == [("completed", "max_calls")] * 2
    assert summary["arms"]["mine"]["stopped"] == {"max_calls": 2}


@pytest.mark.real
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "async def answer(client, question):\n    await client.models.list()\n",
            "bad_reply: an agent's client makes chat completions only",
        ),
        ("async def answer(client, question):\n    raise KeyError('mine')\n", "KeyError: 'mine'"),
        (f"async def answer(client, question):\n    {CALL % ', n=-1'}\n", "http_4xx: HTTP 400"),
    ],
)
def test_what_goes_wrong_in_an_agent_fails_its_query(stub: Stub, tmp_path: Path, code: str, said: str) -> None:
    _, queries = ran(tmp_path, stub.url, code)
    assert all(query.outcome == "failed" and (query.error or "").startswith(said) for query in queries)


@pytest.mark.parametrize(
    ("code", "arm", "rest", "said"),
    [
        ("async def answer(client): ...", "", "", "an agent is called with (client, question, NAME=VALUE, ...)"),
        ("async def answer(client, question, *rest): ...", "", "", "an agent is called with (client, question"),
        ("async def answer(client, question, n): ...", "", "", "n"),
        ("async def answer(client, question): ...", "voters = 3", "", "unknown key 'voters'"),
        ("async def answer(client, question, history): ...", "history = 3", "", "unknown key 'history'"),
    ],
)
def test_an_agent_that_cannot_be_called_is_refused(tmp_path: Path, code: str, arm: str, rest: str, said: str) -> None:
    with pytest.raises(ScenarioError, match=re.escape(said)) as error:
        scenario(tmp_path, code, f"{ARM}{arm}\n", rest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rest", "load", "said"),
    [
        (
            '[stub]\napi = "completions"\n',
            "[load]\nqueries = 1\n",
            'an agent\'s own client needs a target with api = "chat"',
        ),
        ("", "[load]\nusers = 2\nturns = 3\n", "needs a parameter `history` to be told the turns before"),
    ],
)
def test_where_an_agent_cannot_run_nothing_is_started(tmp_path: Path, rest: str, load: str, said: str) -> None:
    found, table = scenario(tmp_path, "async def answer(client, question): ...", ARM, rest, load)
    options = session.Options(tmp_path / "run", 0, "id", "test", [], None)
    with pytest.raises(ScenarioError, match=re.escape(said)):
        asyncio.run(session.run(found, table, options))
    with pytest.raises(ScenarioError, match="an agent's own client needs a server and real time: fanmark run"):
        simulate.simulate(found, table, simulate.Options(tmp_path / "run", "test", []))
    assert not (tmp_path / "run").exists()
