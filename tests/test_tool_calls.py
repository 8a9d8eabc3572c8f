"""What our tool server does with a call: the tools' work, slots and queue in virtual time, faults, and what it counts."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.lanes.arguments import arguments_for
from fanmark.loadgen.lanes.mcp import ToolProtocolError, ToolServers, ToolServerSpec, ToolTransportError
from fanmark.servers.faults import FaultError
from fanmark.servers.mcp_app import Refused
from fanmark.servers.tokenizer import Tokenizer, vocabulary
from fanmark.servers.tool_calls import ToolCalls
from fanmark.servers.tool_faults import KINDS, ToolFault, ToolFaultPlan, parse_tool_fault
from fanmark.servers.tool_specs import ALL_TOOLS, TOOLS, Behaviour, ToolSpec
from fanmark.servers.tool_work import WorkError, Workshop
from fanmark.servers.tools import listen, serving

SHOP = Workshop(vocabulary())


@given(st.sampled_from(TOOLS), st.integers())
def test_every_tool_does_its_work_for_arguments_made_from_its_schema(spec: ToolSpec, seed: int) -> None:
    """As a scripted run calls it: a result of its own, the same each time."""
    arguments = arguments_for(spec.input_schema, random.Random(seed))
    text = SHOP.do(spec.name, arguments)
    assert text
    assert text == SHOP.do(spec.name, arguments)


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        ("calculator", {"expression": "2 * (3 + 4) ** 2 - -1"}, r"99"),
        ("calculator", {"expression": "1 / 8", "precision": 2}, r"0\.12"),
        ("sql_query", {"database": "sales", "statement": "SELECT count(*) AS n FROM orders"}, r"n\n500"),
        ("sql_query", {"database": "support", "statement": "SELECT id FROM tickets", "row_limit": 3}, r"id\n1\n2\n3"),
        ("code_search", {"pattern": "^class Workshop", "path": "tool_work.py", "context_lines": 0}, r"tool_work.py:\d+\nclass Workshop:"),
        ("code_search", {"pattern": "class Workshop", "language": "go"}, "no match"),
        ("read_file", {"path": "tool_work.py", "line_count": 1}, r'    1 """What the tools.*'),
        ("list_directory", {"path": "."}, r"(?s).*tool_work\.py \d+.*"),
        ("get_weather", {"city": "Bern", "days": 2}, r"Bern\nday 1: -?\d+ C, rain \d+ %\nday 2: .*"),
        ("fetch", {"url": "https://example.com/page/7", "max_length": 100}, r"(?s)[A-Z].{99}"),
    ],
)  # fmt: skip
def test_work_by_example(tool: str, arguments: Mapping[str, Any], expected: str) -> None:
    assert re.fullmatch(expected, SHOP.do(tool, arguments))


def test_a_search_finds_the_page_that_has_its_words() -> None:
    page = SHOP.fetch("https://example.com/page/33", 100_000)
    found = SHOP.search(" ".join(page.split()[5:60]), 1)
    assert "https://example.com/page/33" in found


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("calculator", {"expression": "__import__('os')"}, "not an arithmetic expression"),
        ("calculator", {"expression": "9 ** 9 ** 9"}, "too large"),
        ("calculator", {"expression": "9 ** 999 * 9 ** 999 * 9 ** 999"}, "too large"),
        ("calculator", {"expression": "1 / 0"}, "division by zero"),
        ("calculator", {"expression": "(" * 190}, "not an arithmetic expression"),
        ("calculator", {"expression": "10.0 ** 400"}, "out of range"),
        ("sql_query", {"database": "sales", "statement": "DROP TABLE orders"}, "not authorized"),
        ("sql_query", {"database": "sales", "statement": "ATTACH 'x.db' AS x"}, "not authorized"),
        ("sql_query", {"database": "sales", "statement": "SELECT 1; SELECT 2"}, "one statement"),
        ("sql_query", {"database": "sales", "statement": "SELECT count(*) FROM orders a, orders b, orders c"}, "interrupted"),
        ("sql_query", {"database": "sales", "statement": "SELECT hex(zeroblob(500000000))"}, "not authorized"),
        ("code_search", {"pattern": "(a+)+$"}, "may not repeat a group"),
        ("code_search", {"pattern": "a*a*a*a*b"}, "may not repeat"),
        ("code_search", {"pattern": "("}, "not a regular expression"),
        ("read_file", {"path": "../../etc/passwd"}, "no such file"),
        ("read_file", {"path": "a\0b"}, "no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_the_tools_own_error(tool: str, arguments: Mapping[str, Any], said: str) -> None:
    with pytest.raises(WorkError, match=said):
        SHOP.do(tool, arguments)


async def no_progress(done: float, total: float | None, text: str) -> None:
    raise AssertionError("nothing was to be told")


@given(st.integers(1, 8), st.integers(0, 30), st.none() | st.integers(0, 12))
def test_calls_wait_for_a_slot_in_order_and_beyond_the_queue_are_refused(
    slots: int, calls: int, queue: int | None
) -> None:
    """Of n calls at once with c slots, call i waits (i // c) latencies, and those beyond slots and queue are turned away at once."""

    async def main() -> list[float | None]:
        tools = ToolCalls(Behaviour(latency_s=2.0, result_tokens=1, concurrency=slots, queue=queue))

        async def call() -> float | None:
            try:
                result = await tools.call("search", {"query": "x"}, {}, no_progress)
            except Refused as refused:
                assert refused.status == 503
                return None
            waited: float = result["_meta"]["fanmark/queued_s"]
            return waited

        found = await asyncio.gather(*(call() for _ in range(calls)))
        assert asyncio.get_running_loop().time() == pytest.approx(
            2.0 * -(-len([f for f in found if f is not None]) // slots)
        )
        return found

    found = run_virtually(main())
    room = calls if queue is None else min(calls, slots + queue)
    assert found[room:] == [None] * (calls - room)
    assert found[:room] == pytest.approx([2.0 * (i // slots) for i in range(room)])


def test_a_call_that_is_given_up_frees_its_slot_or_its_place_in_the_queue() -> None:
    async def main() -> str:
        tools = ToolCalls(Behaviour(latency_s=10.0, result_tokens=1, concurrency=1, queue=1))
        running, waiting = (
            asyncio.ensure_future(tools.call("search", {"query": "x"}, {}, no_progress)) for _ in range(2)
        )
        await asyncio.sleep(1)
        for call in (waiting, running):
            call.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        await tools.call("search", {"query": "x"}, {}, no_progress)
        assert asyncio.get_running_loop().time() == pytest.approx(11.0)
        return tools.metrics(0)

    text = run_virtually(main())
    assert 'fanmark_tools_calls_total{outcome="cancelled",tool="search"} 2.0' in text
    assert "fanmark_tools_in_flight 0.0\n" in text
    assert "fanmark_tools_queued 0.0\n" in text


def test_the_synthetic_tool_follows_its_distributions_or_its_arguments() -> None:
    size = {"dist": "uniform", "min": 10, "max": 30}
    behaviour = Behaviour(
        latency_s=5.0, synthetic_latency_s={"dist": "uniform", "min": 1, "max": 3}, synthetic_tokens=size
    )

    async def main() -> list[tuple[float, int]]:
        tools, loop, tokenizer = ToolCalls(behaviour), asyncio.get_running_loop(), Tokenizer(vocabulary())
        found = []
        for number in range(400):
            before = loop.time()
            arguments = {} if number else {"latency_s": 7, "result_tokens": 2}
            result = await tools.call("synthetic", arguments, {"fanmark/seed": number}, no_progress)
            found.append((loop.time() - before, len(tokenizer.encode(result["content"][0]["text"]))))
        return found

    (first, *others) = run_virtually(main())
    assert first == (pytest.approx(7), 2)
    times, sizes = zip(*others, strict=True)
    assert (min(sizes) >= 10, max(sizes) <= 30, min(times) >= 1, max(times) <= 3.0000001) == (True,) * 4
    assert sum(times) / 399 == pytest.approx(2, rel=0.05)
    assert sum(sizes) / 399 == pytest.approx(20, rel=0.05)
    assert abs(sum((t - 2) * (n - 20) for t, n in others)) / 399 < 1  # drawn apart


def over_http(behaviour: Behaviour, use: Callable[[ToolServers, str], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        with listen("127.0.0.1", 0) as sock:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/mcp"
            async with serving(sock, behaviour):
                servers = await ToolServers.open([ToolServerSpec(url=url)])
                try:
                    return await use(servers, url)
                finally:
                    await servers.close()

    return asyncio.run(run())


async def outcomes(servers: ToolServers, calls: Sequence[str], timeout_s: float = 20) -> list[str]:
    async def one(tool: str) -> str:
        try:
            arguments = {"query": "x"} if tool == "search" else {}
            result = await servers.call(tool, arguments, timeout_s=timeout_s)
            return "tool_error" if result.is_error else "large" if result.bytes > 1_000_000 else "completed"
        except (ToolTransportError, ToolProtocolError) as error:
            return error.kind

    return await asyncio.gather(*map(one, calls))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("error", "tool_error"),
        ("rpc-error", "tool_protocol"),
        ("429", "tool_transport"),
        ("500", "tool_transport"),
        ("503", "tool_transport"),
        ("stall", "tool_transport"),
        ("reset", "tool_transport"),
        ("malformed", "tool_protocol"),
        ("oversized", "large"),
    ],
)
def test_each_fault_costs_the_calls_that_it_strikes(kind: str, expected: str) -> None:
    fault = parse_tool_fault(f"{kind}:tool=synthetic")
    behaviour = Behaviour(latency_s=0, result_tokens=3, faults=[fault])

    async def use(servers: ToolServers, url: str) -> list[str]:
        return await outcomes(servers, ["search", "synthetic"] * 5, 1.0 if kind == "stall" else 20.0)

    assert over_http(behaviour, use) == ["completed", expected] * 5
    assert set(KINDS) == {"error", "rpc-error", "429", "500", "503", "stall", "reset", "malformed", "oversized"}


def test_what_the_server_counts_is_what_its_clients_met() -> None:
    faults = [ToolFault("error", rate=0.5), ToolFault("rpc-error", rate=0.2)]
    behaviour = Behaviour(latency_s=0, result_tokens=3, concurrency=4, faults=faults)

    async def use(servers: ToolServers, url: str) -> tuple[list[str], str]:
        import aiohttp

        met = await outcomes(servers, ["search"] * 60 + ["synthetic"] * 40)
        async with aiohttp.ClientSession() as http, http.get(url.removesuffix("/mcp") + "/metrics") as response:
            return met, await response.text()

    met, text = over_http(behaviour, use)
    words = {"completed": "completed", "tool_error": "tool_error", "tool_protocol": "protocol_error"}
    counted = Counter(
        {
            (tool, outcome): int(n)
            for outcome, tool, n in re.findall(r'calls_total\{outcome="(\w+)",tool="(\w+)"\} (\d+)\.', text)
        }
    )
    told = Counter(
        (tool, words[outcome]) for tool, outcome in zip(["search"] * 60 + ["synthetic"] * 40, met, strict=True)
    )
    assert counted == told
    assert len(told) == 6
    assert "fanmark_tools_queue_seconds_count 100\n" in text
    assert 'fanmark_tools_call_duration_seconds_count{tool="search"} 60\n' in text
    assert re.search(r'fanmark_tools_faults_total\{kind="rpc-error"\} [1-9]', text)


def test_a_slow_job_tells_of_its_progress(start_tools: Any) -> None:
    """Through the SDK's client, in both eras."""
    from mcp import Client

    server = start_tools("--latency-s", "0")
    told: list[tuple[float, float | None]] = []

    async def progress(done: float, total: float | None, text: str | None) -> None:
        told.append((done, total))

    async def run(mode: str) -> str:
        async with Client(server.url, mode=mode) as client:
            result = await client.call_tool("slow_job", {"seconds": 0.05, "steps": 3}, progress_callback=progress)
            (block,) = result.content
            assert block.type == "text"
            return block.text

    for mode in ("auto", "legacy"):
        assert asyncio.run(run(mode)) == "done after 3 steps"
    assert told == [(1, 3), (2, 3), (3, 3)] * 2


@given(st.integers(0, 50), st.floats(0, 1))
def test_faults_strike_the_same_calls_each_time(seed: int, rate: float) -> None:
    plans = [ToolFaultPlan([ToolFault("error", rate=rate, until_s=10)], seed) for _ in range(2)]
    found = [[bool(plan.strikes(call, "x", at_s=1)) for call in range(40)] for plan in plans]
    assert found[0] == found[1]
    assert plans[0].struck == [sum(found[0])]
    assert not plans[0].strikes(1, "x", at_s=10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flood", "unknown fault 'flood'; there is: error, "),
        ("error:rate=2", "must lie between 0 and 1"),
        ("error:size=2", "size is none of kind, rate"),
        ("stall:seconds=x", "seconds = 'x' is not a number"),
        ("stall:seconds", "'seconds' is not key=value"),
        ("stall:after_s=5,until_s=4", "after_s < until_s"),
        ("oversized:bytes=-1", "bytes from 0"),
    ],
)
def test_a_fault_that_cannot_be_is_told(text: str, said: str) -> None:
    with pytest.raises(FaultError) as refused:
        parse_tool_fault(text)
    assert said in str(refused.value)


def test_the_listing_can_be_cut_to_names() -> None:
    async def main() -> list[str]:
        tools = ToolCalls(Behaviour(tools=("search", "synthetic")))
        return [tool["name"] for tool in tools.listing]

    assert asyncio.run(main()) == ["search", "synthetic"]
    assert [spec.name for spec in ALL_TOOLS][-2:] == ["slow_job", "synthetic"]
    assert json.dumps([spec.listed() for spec in ALL_TOOLS])
