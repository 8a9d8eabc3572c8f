"""The stub as clients meet it: the process, exact lengths, the prefix cache, aborts, and the `openai` SDK."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from stub_process import Stub, running_stub

from fanmark.servers.tokenizer import Tokenizer, vocabulary

pytestmark = pytest.mark.real
TOKENIZER = Tokenizer(vocabulary())
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather for a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Bern"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "fanmark.servers.stub", *flags]


# The process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_also_with_a_stream_open(number: int) -> None:
    with running_stub() as stub:
        connection = http.client.HTTPConnection(stub.url.removeprefix("http://"), timeout=20)
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 20_000, "ignore_eos": True, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().read(10)
        began = time.monotonic()
        stub.process.send_signal(number)
        assert stub.process.wait(10) == 0
        assert time.monotonic() - began < 5  # a second is promised; the machine may be busy
        connection.close()


def test_the_server_ends_with_its_parents_pipe() -> None:
    with running_stub() as stub:
        assert stub.process.stdin is not None
        stub.process.stdin.close()
        assert stub.process.wait(10) == 0


REFUSED = [
    (["--profile", "nope"], "unknown profile 'nope'"),
    (["--port", "x"], "invalid int value: 'x'"),
    (["--num-blocks", "1"], "num_blocks = 1"),
    (["--time-scale", "0"], "time_scale = 0: give a number above 0"),
    (["--fault", "flood"], "unknown fault 'flood'"),
    (["--api-key-env", "FANMARK_NOT_SET"], "FANMARK_NOT_SET is empty"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
]


@pytest.mark.parametrize(("flags", "why"), REFUSED)
def test_a_wrong_option_is_one_line_and_exit_code_2(flags: list[str], why: str) -> None:
    ended = subprocess.run(command(*flags), capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert why in ended.stderr and ended.stderr.count("\n") == 1


def test_a_taken_port_is_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(command("--port", str(port)), capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"fanmark serve stub: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_clients_know_the_stub_by_its_version(stub: Stub) -> None:
    assert stub.send("GET", "/version").json()["version"].startswith("fanmark-stub")


# Lengths, texts and the prefix cache


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [1, 2, 57])
def test_forced_lengths_are_exact_and_the_text_encodes_to_the_ids(stub: Stub, length: int, stream: bool) -> None:
    asked: dict[str, Any] = {"max_tokens": length, "ignore_eos": True, "return_token_ids": True, "stream": stream}
    reply = stub.chat(f"how far is it to the ocean {length}", **asked)
    if stream:
        events = reply.events()
        ids = [i for event in events for choice in event["choices"] for i in choice.get("token_ids") or ()]
        text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        prompt = events[0]["prompt_token_ids"]
    else:
        choice, prompt = reply.json()["choices"][0], reply.json()["prompt_token_ids"]
        ids, text = choice["token_ids"], choice["message"]["content"]
        assert reply.json()["usage"]["completion_tokens"] == length
        assert choice["finish_reason"] == "length"
    assert len(ids) == length
    assert TOKENIZER.encode(text) == ids
    assert TOKENIZER.encode(f"how far is it to the ocean {length}") == prompt


def test_equal_requests_get_equal_answers_and_other_seeds_others(stub: Stub) -> None:
    def said(**more: Any) -> list[str]:
        choices = stub.chat("say it again", max_tokens=8, **more).json()["choices"]
        return [choice["message"]["content"] for choice in choices]

    assert said() == said() == said(cache_salt="another")
    assert said(seed=1) == said(seed=1) != said(seed=2)
    assert len(set(said(n=3))) == 3


def test_an_answer_that_ends_by_itself_stops_with_an_uncounted_text(stub: Stub) -> None:
    body = stub.chat("be brief", max_tokens=50, vllm_xargs={"answer_tokens": 9}).json()
    assert body["usage"]["completion_tokens"] == 9
    assert len(TOKENIZER.encode(body["choices"][0]["message"]["content"])) == 8
    assert body["choices"][0]["finish_reason"] == "stop"


def test_natural_lengths_follow_their_distribution() -> None:
    with running_stub("--answer-tokens", "40", "--answer-cv", "0.5", "--time-scale", "0.1") as stub:
        bodies = [stub.chat(f"question {n}", max_tokens=1000).json() for n in range(30)]
        lengths = [body["usage"]["completion_tokens"] for body in bodies]
        assert 25 < sum(lengths) / 30 < 60
        assert len(set(lengths)) > 10
        assert {body["choices"][0]["finish_reason"] for body in bodies} == {"stop"}
        assert stub.chat("question 1", max_tokens=3).json()["choices"][0]["finish_reason"] == "length"


def test_a_stop_text_ends_the_answer_and_is_not_shown(stub: Stub) -> None:
    whole = stub.chat("one two three", max_tokens=30).json()["choices"][0]["message"]["content"]
    stop = whole.split()[4][:3]
    cut = whole[: whole.index(stop)]
    choice = stub.chat("one two three", max_tokens=30, stop=[stop]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", stop)
    events = stub.chat("one two three", max_tokens=30, stop=stop, stream=True).events()
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == cut


def test_a_repeated_prompt_hits_whole_blocks_and_a_salt_keeps_apart(stub: Stub) -> None:
    prompt = [7] * 50

    def cached(**more: Any) -> int:
        body = stub.send("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1, **more}).json()
        return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 48, 0]


def test_an_answer_comes_back_cached_in_the_next_prompt(stub: Stub) -> None:
    messages = [{"role": "user", "content": " ".join(["ocean"] * 40)}]
    salt = {"cache_salt": "conversation"}
    first = stub.send(
        "POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 25, "ignore_eos": True, **salt}
    )
    messages += [first.json()["choices"][0]["message"], {"role": "user", "content": "go on"}]
    usage = stub.send("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1, **salt}).json()["usage"]
    assert usage["prompt_tokens"] == 40 + 25 + 2
    assert usage["prompt_tokens_details"]["cached_tokens"] == 64


def test_tokenize_counts_as_usage_does_tools_included(stub: Stub) -> None:
    messages = [{"role": "system", "content": "you are kind."}, {"role": "user", "content": "weather in Oslo?"}]
    body = {"messages": messages, "tools": [WEATHER]}
    count = stub.send("POST", "/tokenize", body).json()["count"]
    usage = stub.send("POST", "/v1/chat/completions", {**body, "max_tokens": 1, "tool_choice": "none"}).json()["usage"]
    bare = stub.send("POST", "/tokenize", {"messages": messages}).json()["count"]
    assert usage["prompt_tokens"] == count > bare
    assert bare == len(TOKENIZER.encode("you are kind.")) + len(TOKENIZER.encode("weather in Oslo?"))


# Clients that go away


def test_replies_tell_what_they_took_of_the_engine_and_the_metrics_whose_its_time_was() -> None:
    with running_stub("--model", "tiny", "--time-scale", "0.1") as stub:
        bodies = [{"prompt": [i] * 100, "max_tokens": 5 * i, "ignore_eos": True} for i in (1, 2, 3)]
        usages = [stub.send("POST", "/v1/completions", body).json()["usage"] for body in bodies]
        streamed = {**bodies[0], "stream": True, "stream_options": {"include_usage": True}}
        usages.append(stub.send("POST", "/v1/completions", streamed).events()[-1]["usage"])
        seen = stub.metrics()
    kinds = {
        k: seen[f'fanmark_stub_attributed_seconds_total{{kind="{k}"}}']
        for k in ("prefill", "output", "context", "waste", "slack")
    }
    assert sum(kinds.values()) == pytest.approx(seen["fanmark_stub_busy_seconds_total"], rel=1e-6)
    of_replies = sum(usage["fanmark"]["gpu_s"] for usage in usages)
    assert of_replies == pytest.approx(sum(kinds.values()) - kinds["slack"], rel=1e-6)
    assert 0 < sum(usage["fanmark"]["joules"] for usage in usages) < seen["fanmark_stub_joules_total"]


def test_a_client_that_goes_away_aborts_its_request() -> None:
    with running_stub("--model", "tiny") as stub:
        connection = http.client.HTTPConnection(stub.url.removeprefix("http://"), timeout=20)
        body = json.dumps({"prompt": [1] * 100, "max_tokens": 50_000, "ignore_eos": True, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().read(10)
        assert stub.metrics()['vllm:num_requests_running{engine="0",model_name="tiny"}'] == 1
        connection.sock.close() if connection.sock else None
        connection.close()
        seen = stub.until('vllm:num_requests_running{engine="0",model_name="tiny"}', 0)
        assert seen['vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"}'] == 1
        assert seen['vllm:kv_cache_usage_perc{engine="0",model_name="tiny"}'] == 0
        assert stub.send("GET", "/load").json() == {"server_load": 0}


# Tools and reasoning


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("seed", range(3))
def test_a_tool_call_is_valid_and_comes_back_as_its_tokens(stub: Stub, choice: Any, seed: int) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "weather?"}]
    body = {"messages": messages, "tools": [WEATHER], "tool_choice": choice, "seed": seed, "max_tokens": 200}
    reply = stub.send("POST", "/v1/chat/completions", body).json()
    message = reply["choices"][0]["message"]
    jsonschema.validate(
        json.loads(message["tool_calls"][0]["function"]["arguments"]), WEATHER["function"]["parameters"]
    )
    assert reply["choices"][0]["finish_reason"] == ("stop" if isinstance(choice, dict) else "tool_calls")
    messages += [message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}]
    again = stub.send("POST", "/v1/chat/completions", {**body, "tool_choice": "auto"}).json()
    assert again["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] - 1 + 1  # end of sequence out, "sunny" in
    assert "tool_calls" not in again["choices"][0]["message"]  # by default one call a conversation


def test_tool_calls_of_a_turn_and_of_a_conversation_can_be_asked_for(stub: Stub) -> None:
    extra = {"tool_calls": 5, "tools_per_turn": 3}
    body = {"tools": [WEATHER], "max_tokens": 500, "vllm_xargs": extra}
    done = [{"role": "tool", "content": "rain"}] * 3
    asked = {"role": "user", "content": "weather?"}
    counts = []
    for before in (0, 3):
        reply = stub.send("POST", "/v1/chat/completions", {**body, "messages": [asked, *done[:before]]}).json()
        counts.append(len(reply["choices"][0]["message"]["tool_calls"]))
    assert counts == [3, 2]


def test_reasoning_comes_first_and_is_counted(stub: Stub) -> None:
    body = stub.chat("think", max_tokens=20, ignore_eos=True, thinking_token_budget=15).json()
    message = body["choices"][0]["message"]
    assert len(TOKENIZER.encode(message["reasoning"])) == 15
    assert len(TOKENIZER.encode(message["content"])) == 5
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 15}
    share = stub.chat("think", max_tokens=20, chat_template_kwargs={"enable_thinking": True}).json()
    assert share["usage"]["completion_tokens_details"] == {"reasoning_tokens": 10}


# The openai SDK


@pytest.fixture
def client(stub_url: str) -> Any:
    from openai import OpenAI

    with OpenAI(base_url=f"{stub_url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def test_sdk_chat_and_completions(client: Any, stub: Stub) -> None:
    model = client.models.list().data[0].id
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=5)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (5, "length")
    assert len(reply.choices[0].message.content.split()) == 5
    text = client.completions.create(model=model, prompt=[1, 2, 3], max_tokens=4)
    assert (text.usage.prompt_tokens, len(text.choices[0].text.split())) == (3, 4)


def test_sdk_stream_with_usage(client: Any) -> None:
    stream = client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).count(" ") == 5
    assert chunks[-1].usage.completion_tokens == 6
    text = list(client.completions.create(model="", prompt="hello", max_tokens=6, stream=True))
    assert len("".join(c.choices[0].text for c in text).split()) == 6


def test_sdk_tools_streamed(client: Any) -> None:
    with client.chat.completions.stream(
        model="x" * 0,
        messages=[{"role": "user", "content": "weather?"}],
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=200,
    ) as stream:
        final = stream.get_final_completion()
    call = final.choices[0].message.tool_calls[0]
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert (call.function.name, final.choices[0].finish_reason) == ("get_weather", "tool_calls")


def test_sdk_reasoning(client: Any) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": True}, "ignore_eos": True}
    asked = {"model": "", "messages": [{"role": "user", "content": "think"}], "max_tokens": 10, "extra_body": extra}
    reply = client.chat.completions.create(**asked)
    assert len(reply.choices[0].message.reasoning.split()) == 5
    assert reply.usage.completion_tokens_details.reasoning_tokens == 5
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [bool(getattr(delta, "reasoning", None)) for delta in deltas] == [False] + [True] * 5 + [False] * 5


def test_sdk_errors_are_the_sdks_own(client: Any) -> None:
    import openai

    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nope", messages=messages)
    with pytest.raises(openai.BadRequestError, match="logprobs are not available"):
        client.chat.completions.create(model="", messages=messages, logprobs=True)
