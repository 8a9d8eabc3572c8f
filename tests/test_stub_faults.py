"""Faults of the stub over HTTP, set at start and through /admin/faults."""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from stub_process import HttpReply, Stub, running_stub

pytestmark = pytest.mark.real
ASKED: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def faulty() -> Iterator[Stub]:
    with running_stub("--model", "tiny", "--fault", "no-done", "--time-scale", "0.5") as server:
        yield server


def under(stub: Stub, *faults: dict[str, Any], seed: int = 0) -> None:
    """From now on these faults."""
    reply = stub.send("POST", "/admin/faults", {"faults": list(faults), "seed": seed})
    assert reply.status == 200, reply.body


def streamed(stub: Stub, **more: Any) -> HttpReply:
    return stub.chat("hello", stream=True, stream_options={"include_usage": True}, **ASKED, **more)


def test_faults_can_be_set_at_start_listed_and_cleared(faulty: Stub) -> None:
    assert not streamed(faulty).body.endswith(b"[DONE]\n\n")
    listed = faulty.send("GET", "/admin/faults").json()
    assert [(fault["kind"], fault["struck"]) for fault in listed["faults"]] == [("no-done", 1)]
    assert faulty.send("DELETE", "/admin/faults").json()["faults"] == []
    assert streamed(faulty).body.endswith(b"[DONE]\n\n")
    wrong = faulty.send("POST", "/admin/faults", {"faults": [{"kind": "flood"}]})
    assert (wrong.status, wrong.json()["error"]["param"]) == (400, "faults")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_refusals_have_vllms_error_shape(faulty: Stub, status: int) -> None:
    under(faulty, {"kind": str(status), "retry_after_s": 2})
    reply = faulty.chat("hello", **ASKED)
    assert reply.status == reply.json()["error"]["code"] == status
    assert list(reply.json()["error"]) == ["message", "type", "param", "code"]
    assert (reply.headers.get("Retry-After"), reply.headers.get("Retry-After-Ms")) == (
        ("2", "2000") if status == 429 else (None, None)
    )


def test_a_rate_strikes_the_same_requests_for_the_same_seed(faulty: Stub) -> None:
    def statuses(seed: int) -> list[int]:
        under(faulty, {"kind": "503", "rate": 0.5}, seed=seed)
        return [faulty.chat("hello", max_tokens=1).status for _ in range(12)]

    assert statuses(1) == statuses(1)
    assert {200, 503} == set(statuses(1))


def test_a_broken_chunk_and_a_missing_usage(faulty: Stub) -> None:
    under(faulty, {"kind": "malformed", "tokens": 2}, {"kind": "no-usage"})
    lines = [line for line in streamed(faulty).body.decode().split("\n\n") if line]
    broken = []
    for place, line in enumerate(lines[:-1]):
        try:
            json.loads(line.removeprefix("data: "))
        except ValueError:
            broken.append(place)
    assert broken == [3]  # the role, two tokens, then the third
    assert lines[-1] == "data: [DONE]"
    assert '"usage"' not in "".join(lines)


def test_a_refusal_without_advice_and_an_error_that_calls_itself_ok(faulty: Stub) -> None:
    under(faulty, {"kind": "429-bare"})
    reply = faulty.chat("hello", **ASKED)
    assert (reply.status, reply.json()["error"]["code"]) == (429, 429)
    assert not {"Retry-After", "Retry-After-Ms"} & set(reply.headers)
    under(faulty, {"kind": "error-body"})
    for reply in (faulty.chat("hello", **ASKED), streamed(faulty)):
        assert (reply.status, reply.json()["error"]["type"]) == (200, "InternalServerError")
        assert reply.headers["Content-Type"].startswith("application/json")


def test_a_stream_that_ends_with_an_error_or_amid_a_chunk(faulty: Stub) -> None:
    under(faulty, {"kind": "error-event", "tokens": 2})
    events = streamed(faulty).events()
    assert ["error" in event for event in events] == [False] * 3 + [True]  # the role and two tokens, then
    assert faulty.chat("hello", **ASKED).status == 500
    under(faulty, {"kind": "truncated", "tokens": 2})
    pieces = streamed(faulty).body.split(b"\n\n")
    assert len(pieces) == 4 and b"[DONE]" not in pieces[-1]  # the role, two tokens, and half of the third
    with pytest.raises(ValueError, match=r"Unterminated|delimiter|Expecting"):
        json.loads(pieces[-1].removeprefix(b"data: "))
    with pytest.raises(ValueError, match=r"Unterminated|delimiter|Expecting"):
        faulty.chat("hello", **ASKED).json()
    under(faulty)
    faulty.until('vllm:num_requests_running{engine="0",model_name="tiny"}', 0)


def test_a_reset_cuts_the_stream(faulty: Stub) -> None:
    under(faulty, {"kind": "reset", "tokens": 3})
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        streamed(faulty)
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        faulty.chat("hello", **ASKED)
    under(faulty)
    faulty.until('vllm:num_requests_running{engine="0",model_name="tiny"}', 0)


@pytest.mark.parametrize("fault", [{"kind": "stall", "tokens": 2}, {"kind": "slow-admission"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stall_and_a_slow_admission_cost_their_seconds(faulty: Stub, fault: dict[str, Any], stream: bool) -> None:
    under(faulty, fault | {"seconds": 0.4})
    began = time.monotonic()
    reply = faulty.chat("hello", stream=stream, **ASKED)
    assert time.monotonic() - began >= 0.4
    assert reply.status == 200
    if stream:
        assert len(reply.events()) == 7


def test_a_slow_engine_takes_its_factor(faulty: Stub) -> None:
    def mean_gap() -> float:
        name = 'vllm:inter_token_latency_seconds_{}{{engine="0",model_name="tiny"}}'
        before = faulty.metrics()
        faulty.chat("hello", max_tokens=30, ignore_eos=True)
        after = faulty.metrics()
        total, count = (after[name.format(part)] - before[name.format(part)] for part in ("sum", "count"))
        return total / count

    under(faulty)
    usual = mean_gap()
    under(faulty, {"kind": "slow-down", "factor": 4})
    assert mean_gap() == pytest.approx(4 * usual, rel=0.05)


def test_an_engine_dies_and_comes_back_cold(faulty: Stub) -> None:
    under(faulty)
    prompt: dict[str, Any] = {"prompt": list(range(64)), "max_tokens": 1, "cache_salt": "death"}

    def cached() -> int:
        body = faulty.send("POST", "/v1/completions", prompt).json()
        return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(), cached()] == [0, 48]
    under(faulty, {"kind": "engine-death", "after_s": 0.3, "until_s": 0.8})
    stream = faulty.send(
        "POST", "/v1/completions", {"prompt": [1], "max_tokens": 5000, "ignore_eos": True, "stream": True}
    )
    assert stream.events()[-1]["error"]["type"] == "InternalServerError"
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert faulty.send("GET", "/health").status == 503
    assert faulty.chat("hello", **ASKED).status == 500
    deadline = time.monotonic() + 10
    while faulty.send("GET", "/health").status == 503 and time.monotonic() < deadline:
        pass
    assert [cached(), cached()] == [0, 48]
    lost = 'vllm:request_success_total{engine="0",finished_reason="error",model_name="tiny"}'
    assert faulty.metrics()[lost] == 1
