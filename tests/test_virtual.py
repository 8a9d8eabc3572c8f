"""The virtual lane and tools: the stub's prompts, answers, limits and refusals, without HTTP, at the engine's own times."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.mcp_model import Trip
from fanmark.loadgen.lanes.sse import Reply
from fanmark.loadgen.lanes.virtual import APART_S, Service, VirtualEndpoint, VirtualLane
from fanmark.loadgen.lanes.virtual_tools import VirtualTools
from fanmark.loadgen.prompts import Part
from fanmark.loadgen.scenario import Target, Tools
from fanmark.loadgen.toolset import ToolSet
from fanmark.servers.answers import Lengths, Speaker
from fanmark.servers.engine.batch import EngineConfig, Rejected
from fanmark.servers.engine.events import Event
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.openai_api import Limits, parse_chat, parse_completions
from fanmark.servers.profiles import load_profile
from fanmark.servers.prompts import prompt_ids
from fanmark.servers.replica_of import engine_config, replica_of, serving_config
from fanmark.servers.tokenizer import Tokenizer, vocabulary
from fanmark.servers.tool_specs import TOOLS, draw_latency_s

T = TypeVar("T")

PROFILE = load_profile("qwen3-30b-a3b@h100")
SCHEMAS = [{"type": "function", "function": {"name": t.name, "parameters": dict(t.input_schema)}} for t in TOOLS]
MESSAGES = [
    {"role": "system", "content": "You are an assistant."},
    {"role": "user", "content": "Is it wise for a small country to build a power station?"},
]


def endpoint(**config: Any) -> VirtualEndpoint:
    return VirtualEndpoint("default", Target(url="", **config), Service(PROFILE))


def body(messages: list[dict[str, str]] = MESSAGES, max_tokens: int = 40, **more: Any) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": True, **more}


async def call(at: VirtualEndpoint, sent: Sent | None = None, **fields: Any) -> Reply:
    return await at.send(body(**fields), {}, sent or Sent())


def usage(reply: Reply) -> tuple[int, int, int | None]:
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    return (
        reply.usage.prompt_tokens,
        reply.usage.completion_tokens,
        reply.usage.prompt_tokens_details.cached_tokens,
    )


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return run_virtually(main())


def test_a_call_has_the_engine_s_stamps_and_exact_counts() -> None:
    async def main() -> tuple[Reply, Sent, float]:
        sent = Sent()
        await asyncio.sleep(100)
        reply = await call(endpoint(), sent)
        return reply, sent, asyncio.get_running_loop().time()

    reply, sent, ended_at = in_virtual_time(main)
    tokenizer = Tokenizer(vocabulary())
    assert sent.at == 100.0
    assert reply.answer_at == reply.first_at > 100.0
    assert reply.first_at < reply.done_at <= ended_at
    assert ended_at - reply.done_at < 1e-8
    assert usage(reply) == (len(prompt_ids(tokenizer, MESSAGES)), 40, 0)
    assert len(tokenizer.encode(reply.text)) == 40
    assert (reply.finish, reply.coalesced, sum(reply.gaps.values())) == ("length", 0, 39)


@pytest.mark.parametrize("tools", [False, True])
def test_prompts_and_answers_are_those_of_the_stub(tools: bool) -> None:
    fields = body(cache_salt="s") | ({"tools": SCHEMAS, "tool_choice": "none"} if tools else {})
    tokenizer = Tokenizer(vocabulary())
    limits = Limits(PROFILE.model.id, 131_072)
    ask = parse_chat(fields, limits, tokenizer)
    said = Speaker(tokenizer, Lengths(), limits.max_model_len).answer(ask, ask.prompts[0], 0)

    async def main() -> Reply:
        at = endpoint()
        await at.expose(SCHEMAS, system=True)
        return await at.send(fields, {}, Sent())

    reply = in_virtual_time(main)
    assert usage(reply)[0] == len(ask.prompts[0])
    assert reply.text == said.content

    ids: dict[str, Any] = {
        "prompt": list(ask.prompts[0]),
        "max_tokens": 9,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    ask = parse_completions(ids, limits, tokenizer)
    said = Speaker(tokenizer, Lengths(), limits.max_model_len).answer(ask, ask.prompts[0], 0)

    async def by_message() -> Reply:
        at = endpoint(api="completions")
        whole = ids["prompt"]
        return await at.send(ids | {"prompt": at.prompt_of([whole[:5], whole[5:]])}, {}, Sent())

    assert in_virtual_time(by_message).token_ids == said.ids


def test_the_engine_is_configured_as_the_stub_s() -> None:
    config = serving_config(PROFILE)
    assert config.max_model_len == min(131_072, (config.num_blocks - 1) * config.block_size)
    assert serving_config(PROFILE, {"max_model_len": 4096, "max_num_seqs": 7}) == engine_config(
        PROFILE, {"max_model_len": 4096, "max_num_seqs": 7}
    )


def test_schemas_count_as_much_as_they_add_to_a_prompt() -> None:
    async def main() -> tuple[int | None, int]:
        at = endpoint()
        await at.expose(SCHEMAS, system=True)
        bare = await call(at)
        full = await call(at, tools=at.tools, tool_choice="none")
        assert at.tool_part is not None
        return at.tool_part.size, usage(full)[0] - usage(bare)[0]

    size, added = in_virtual_time(main)
    assert size == added > 500


def test_a_prefix_is_cached_under_its_salt_only() -> None:
    long = [{"role": "user", "content": " ".join(vocabulary()[:320])}]

    async def main() -> list[int | None]:
        at = endpoint()
        return [usage(await call(at, messages=long, cache_salt=salt))[2] for salt in ("a", "a", "b")]

    assert in_virtual_time(main) == [0, 304, 0]


def test_samples_are_requests_of_their_own() -> None:
    async def main() -> tuple[Reply, Mapping[str, float]]:
        at = endpoint()
        return await call(at, n=3), (await at.reading()).values

    reply, counters = in_virtual_time(main)
    prompt = usage(reply)[0]
    assert usage(reply) == (prompt, 120, 0)
    assert sum(reply.gaps.values()) == 3 * 39
    assert counters["request_success"] == 3
    assert (counters["prompt_tokens"], counters["generation_tokens"]) == (3 * prompt, 120)


def test_the_answer_starts_when_the_reasoning_ends() -> None:
    async def main() -> Reply:
        return await call(endpoint(), thinking_token_budget=30)

    reply = in_virtual_time(main)
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 30
    assert reply.answer_at is not None
    # alone on the engine, decode steps are all but equal: token 31 comes 30 of the 39 gaps after the first
    share = (reply.answer_at - reply.first_at) / (reply.done_at - reply.first_at)
    assert share == pytest.approx(30 / 39, rel=0.01)
    assert len(Tokenizer(vocabulary()).encode(reply.text)) == 10


def test_calls_made_at_once_arrive_one_after_another() -> None:
    async def main() -> tuple[list[float], list[Reply]]:
        at = endpoint()
        arrivals: list[float] = []

        async def arrive() -> None:
            await at.lane.arrive()
            arrivals.append(asyncio.get_running_loop().time())

        await asyncio.gather(*(arrive() for _ in range(3)))
        await asyncio.sleep(1)
        return arrivals, list(await asyncio.gather(*(call(at) for _ in range(3))))

    arrivals, replies = in_virtual_time(main)
    assert arrivals == pytest.approx([0.0, APART_S, 2 * APART_S])
    first, *others = [reply.first_at for reply in replies]
    assert all(at > first for at in others)  # the engine was at rest: it started on the first at once


class Counting(Replica):
    """A replica that counts how often it is asked to go on."""

    turns = 0

    def advance(self, until: float) -> list[Event]:
        self.turns += 1
        return super().advance(until)


def test_the_loop_wakes_at_events_and_not_at_steps() -> None:
    replica = Counting(engine_config(PROFILE), PROFILE.law, stream=False)
    lane = VirtualLane(replica)

    async def main() -> None:
        await lane.generate([Request("one", list(range(100)), list(range(4000)))])

    in_virtual_time(main)
    assert replica.statistics().steps >= 4000
    assert replica.turns < 20


CALLS = st.tuples(st.floats(0, 3), st.integers(1, 600), st.integers(1, 200), st.sampled_from([None, 0.01, 0.4]))


@example([(2.421875, 1, 33, None), (2.234375, 3, 73, 0.4)])  # given up while its last token is on its way to the client
@given(st.lists(CALLS, min_size=1, max_size=12))
def test_every_event_is_handed_out_at_its_time(calls: list[tuple[float, int, int, float | None]]) -> None:
    lane = VirtualLane(replica_of(PROFILE, engine_config(PROFILE, {"num_blocks": 90, "max_num_seqs": 4}), stream=False))

    async def one(i: int, at: float, prompt: int, output: int, give_up_s: float | None) -> float:
        await asyncio.sleep(at)
        try:
            async with asyncio.timeout(give_up_s):
                [event] = await lane.generate([Request(str(i), list(range(prompt)), list(range(output)))])
        except TimeoutError:
            return 0.0
        return asyncio.get_running_loop().time() - event.at

    async def main() -> list[float]:
        return await asyncio.gather(*(one(i, *fields) for i, fields in enumerate(calls)))

    assert all(0.0 <= late_s < 1e-8 for late_s in in_virtual_time(main))


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.5])
def test_a_cancelled_call_leaves_the_engine(after_s: float) -> None:
    async def main() -> tuple[int, float, Reply]:
        at = endpoint()
        task = asyncio.ensure_future(call(at, max_tokens=4000))
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        reply = await call(at, max_tokens=2)
        engine = at.lane.replica.statistics().engines[0]
        return engine.running + engine.waiting, engine.kv_cache_usage, reply

    unfinished, kv_usage, reply = in_virtual_time(main)
    assert (unfinished, kv_usage) == (0, 0.0)
    assert usage(reply)[1] == 2


def test_a_call_that_takes_too_long_fails_as_it_would_over_http() -> None:
    async def main() -> tuple[str, float, int]:
        at = endpoint(call_timeout_s=2.0)
        with pytest.raises(CallError) as caught:
            await call(at, max_tokens=4000)
        ended_at = asyncio.get_running_loop().time()
        await call(at, max_tokens=1)
        return caught.value.kind, ended_at, at.lane.replica.statistics().engines[0].running

    assert in_virtual_time(main) == ("timeout", 2.0, 0)


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
    ({"max_tokens": 131_072}, 400, "maximum context length"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "cannot be empty"),
    ({"temperature": -1}, 400, "temperature must be non-negative"),
    ({"model": "another"}, 404, "does not exist"),
]


@pytest.mark.parametrize(("fields", "status", "said"), REFUSED)
def test_refusals_are_the_stub_s(fields: dict[str, Any], status: int, said: str) -> None:
    with pytest.raises(HttpError, match=said) as caught:
        in_virtual_time(lambda: call(endpoint(), **fields))
    assert caught.value.status == status


def test_a_refused_parameter_is_dropped_and_said_once() -> None:
    at = endpoint(params={"logprobs": True})
    part = Part("word", 1)
    fields = at.body([("user", part)], max_tokens=4, forced=True, salt=None, tools=False, samples=1, reasoning_tokens=0)
    with pytest.raises(HttpError) as caught:
        in_virtual_time(lambda: at.send(fields, {}, Sent()))
    assert at.drop_refused(caught.value, fields)
    assert at.notes == ["default: refuses 'logprobs': it is left out"]


def test_when_one_of_several_does_not_fit_the_queue_none_stays() -> None:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=512, num_blocks=100, max_num_queued_reqs=2)
    lane = VirtualLane(replica_of(PROFILE, config, stream=False))

    async def main() -> None:
        with pytest.raises(Rejected, match="max_num_queued_reqs"):
            await lane.generate([Request(str(i), [1, 2, 3], [4, 5]) for i in range(3)])
        await lane.generate([Request("later", [1, 2, 3], [4, 5])])

    in_virtual_time(main)
    assert lane.finished == 1


LATENCIES = [0.25, {"dist": "lognormal", "mean": 0.3, "cv": 0.5}, {"dist": "uniform", "min": 0.1, "max": 0.2}]


@pytest.mark.parametrize("latency_s", LATENCIES)
def test_tools_take_the_embedded_server_s_latency_and_the_round_trip(latency_s: Any) -> None:
    async def main() -> list[tuple[str | None, float, int]]:
        servers = VirtualTools(latency_s, round_trip_s=0.01)
        tools, tokenizer = ToolSet(servers, servers.tools, Tools(), embedded=True), Tokenizer(vocabulary())
        seen, loop = [], asyncio.get_running_loop()
        for n in range(9):
            before = loop.time()
            trip = Trip()
            outcome = await tools.call("7/3", n, 50 + n, trip)
            assert (outcome.bytes, trip.sent_at) == (len(outcome.text.encode()), before)
            seen.append((trip.tool, loop.time() - before, len(tokenizer.encode(outcome.text))))
        return seen

    seen = in_virtual_time(main)
    assert len({tool for tool, _, _ in seen}) == len(TOOLS)
    wanted = [draw_latency_s(latency_s, f"7/3/tool/{n}") + 0.01 for n in range(9)]
    assert [took_s for _, took_s, _ in seen] == pytest.approx(wanted, abs=1e-8)
    assert [tokens for _, _, tokens in seen] == [50 + n for n in range(9)]


def test_a_tool_that_takes_too_long_fails() -> None:
    servers = VirtualTools(5.0, 0.0)
    tools = ToolSet(servers, servers.tools, Tools(call_timeout_s=2.0), embedded=True)
    with pytest.raises(CallError, match="no answer within 2 s") as caught:
        in_virtual_time(lambda: tools.call("1/1", 0, 10, Trip()))
    assert caught.value.kind == "tool_transport"
