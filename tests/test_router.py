"""A router in front of real stubs: what a client sees is what a replica said."""

import http.client
import json
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from processes import children, gone
from stub_process import Stub, running_stub

from fanmark.servers.replicas import joined
from fanmark.servers.router import leading_pieces

pytestmark = pytest.mark.real

SUCCESS = 'vllm:request_success_total{{replica="{}",engine="0",finished_reason="length",model_name="qwen3-30b-a3b"}}'
RUNNING = 'vllm:num_requests_running{{replica="{}",engine="0",model_name="qwen3-30b-a3b"}}'


def served(stub: Stub) -> list[float]:
    metrics = stub.metrics()
    return [metrics.get(SUCCESS.format(i), 0.0) for i in range(2)]


@pytest.fixture(scope="module")
def routed() -> Iterator[Stub]:
    with running_stub("--replicas", "2", "--router", "session_affinity", "--time-scale", "0.1") as stub:
        yield stub


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, "ignore_eos": True}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 2, "ignore_eos": True}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2, "ignore_eos": True}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 2, "ignore_eos": True}),
    ],
)
def test_sessions_stay_on_their_replica(routed: Stub, path: str, body: dict[str, object]) -> None:
    before = served(routed)
    for session in ("a", "a", "a", "d", "d"):
        reply = routed.send("POST", path, body, {"X-Session-Id": session, "X-Request-Id": f"mine-{session}"})
        assert reply.status == 200 and reply.headers["X-Request-ID"] == f"mine-{session}"
    told = [after - first for after, first in zip(served(routed), before, strict=True)]
    assert sorted(told) == [2.0, 3.0]


def test_a_stream_passes_byte_for_byte_and_refusals_too(routed: Stub) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "ignore_eos": True, "stream": True}
    reply = routed.send("POST", "/v1/chat/completions", body)
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    assert reply.body.endswith(b"data: [DONE]\n\n") and len(reply.events()) >= 20
    assert routed.send("POST", "/v1/chat/completions", b"{").status == 400
    assert routed.send("GET", "/nowhere").status == 404
    assert routed.send("GET", "/v1/models").json()["data"][0]["id"] == "qwen3-30b-a3b"
    long = routed.chat("word " * 400_000, max_tokens=1)
    assert long.status == 400 and "context" in long.body.decode()


def test_a_client_that_leaves_is_gone_at_the_replica(routed: Stub) -> None:
    parts = urlsplit(routed.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 100_000,
        "ignore_eos": True,
        "stream": True,
    }
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json", "X-Session-Id": "d"}
    )
    reply = connection.getresponse()
    assert reply.read(10)
    busy = next(i for i in range(2) if routed.metrics()[RUNNING.format(i)] == 1.0)
    reply.close()
    connection.close()
    routed.until(RUNNING.format(busy), 0.0)


def test_a_fault_goes_to_all_and_a_cut_stream_is_cut(routed: Stub) -> None:
    assert routed.send("POST", "/admin/faults", {"faults": [{"kind": "reset"}]}).status == 200
    try:
        for _ in range(2):
            with pytest.raises((ConnectionError, http.client.IncompleteRead)):
                routed.chat("hello", max_tokens=40, ignore_eos=True, stream=True)
    finally:
        routed.send("DELETE", "/admin/faults")
    assert routed.chat("hello", max_tokens=2).status == 200


def test_replicas_end_with_their_router() -> None:
    with running_stub("--replicas", "3") as stub:
        pids = children(stub.pid)
        assert len(pids) == 3 and stub.send("GET", "/health").status == 200
        os.kill(stub.pid, 9)
        assert gone(pids)


def test_wrong_options_are_one_line() -> None:
    with pytest.raises(AssertionError, match=r"replicas = 0: give at least 1"), running_stub("--replicas", "0"):
        pass
    with pytest.raises(AssertionError, match="did not start"), running_stub("--replicas", "2", "--num-blocks", "1"):
        pass


def test_leading_pieces_are_those_of_the_prompt() -> None:
    def pieces(text: str, **more: object) -> list[int]:
        body = {"messages": [{"role": "user", "content": text}], **more}
        return leading_pieces(json.dumps(body).encode())

    a, b = pieces("x" * 600), pieces("x" * 512 + "y" * 300)
    assert (len(a), len(b)) == (2, 3) and a == b[:2]
    assert pieces("x" * 600, cache_salt="s") != a and pieces("x" * 255) == []
    ids = leading_pieces(json.dumps({"prompt": list(range(200))}).encode())
    assert len(ids) == 3 and leading_pieces(json.dumps({"prompt": list(range(128))}).encode()) == ids[:2]
    turns = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y" * 300}]
    first, both = (leading_pieces(json.dumps({"input": turns[:n], "instructions": "i"}).encode()) for n in (1, 2))
    assert (len(first), len(both)) == (2, 3) and first == both[:2]
    assert leading_pieces(json.dumps({"input": turns, "instructions": "j"}).encode())[0] != first[0]
    assert leading_pieces(b"{") == leading_pieces(b"[]") == []


def test_metrics_are_joined_by_family() -> None:
    text = '# HELP a A.\n# TYPE a counter\na{x="1"} 2\n# HELP b B.\n# TYPE b gauge\nb 1\n'
    assert joined([text, text]) == (
        '# HELP a A.\n# TYPE a counter\na{replica="0",x="1"} 2\na{replica="1",x="1"} 2\n'
        '# HELP b B.\n# TYPE b gauge\nb{replica="0"} 1\nb{replica="1"} 1\n'
    )
