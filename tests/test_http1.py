"""The framing of one HTTP response: any split of it gives the same body, and noise raises one kind of error."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_server import CHUNKED, SSE, chunked, head, in_parts
from test_sse import BREADTH

from fanmark.loadgen.lanes.http1 import BadResponse, Response

EVENTS = [event + b"\n\n" for event in BREADTH.split(b"\n\n")[:-1]]
LENGTH = b"Content-Length: %d\r\n" % len(BREADTH)
WHOLE = {  # a response, and whether its connection serves the next one
    "a chunk an event": (head(SSE, CHUNKED) + chunked(EVENTS), True),
    "a chunk an event and a half": (head(SSE, CHUNKED) + chunked(in_parts(BREADTH, 137)), True),
    "chunks of 7 bytes, amid characters": (head(SSE, CHUNKED) + chunked(in_parts(BREADTH, 7)), True),
    "one chunk": (head(SSE, CHUNKED) + chunked([BREADTH]), True),
    "chunk extensions": (head(SSE, CHUNKED) + chunked(EVENTS, b";name=value"), True),
    "trailers": (head(SSE, CHUNKED) + chunked(EVENTS, trailer=b"Server-Timing: x\r\nB: c\r\n"), True),
    "sizes in capitals": (
        head(SSE, CHUNKED) + chunked([BREADTH]).replace(b"%x" % len(BREADTH), b"%X" % len(BREADTH)),
        True,
    ),
    "a given length": (head(SSE, LENGTH) + BREADTH, True),
    "header names in any case": (
        head(SSE.replace(b"Content-T", b"cONTENT-t"), CHUNKED.upper().replace(b"CHUNKED", b"Chunked"))
        + chunked(EVENTS),
        True,
    ),
    "until the end of the connection": (head(SSE) + BREADTH, False),
    "HTTP/1.0": (head(SSE, version=b"1.0") + BREADTH, False),
    "HTTP/1.0 that is kept": (head(SSE, LENGTH, b"Connection: keep-alive\r\n", version=b"1.0") + BREADTH, True),
    "Connection: close": (head(SSE, CHUNKED, b"Connection: close\r\n") + chunked(EVENTS), False),
    "100 Continue before it": (head(status=b"100 Continue") + head(SSE, CHUNKED) + chunked(EVENTS), True),
    "two interim responses": (
        head(status=b"102 Processing")
        + head(b"Link: </x>\r\n", status=b"103 Early Hints")
        + head(SSE, LENGTH)
        + BREADTH,
        True,
    ),
    "no reason phrase": (head(SSE, CHUNKED, status=b"200 ") + chunked(EVENTS), True),
}


def read(parts: Iterable[bytes]) -> tuple[bytes, int, bool, bool]:
    response = Response()
    body = b"".join([response.feed(part) for part in parts])
    return body, response.status, response.whole, response.extra


@settings(max_examples=100)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_any_split_of_a_response_gives_the_same_body(name: str, data: st.DataObject) -> None:
    response, kept = WHOLE[name]
    places = sorted(data.draw(st.lists(st.integers(1, len(response) - 1), max_size=40)))
    body, status, whole, extra = read(response[a:b] for a, b in pairwise([0, *places, len(response)]))
    assert (body, status, extra) == (BREADTH, 200, False)
    assert whole is (kept or b"chunked" in response)


@settings(max_examples=200)
@given(st.sampled_from(sorted(WHOLE)), st.binary(max_size=12), st.data())
def test_noise_in_a_response_raises_one_kind_of_error_and_any_split_of_it_gives_the_same(
    name: str, noise: bytes, data: st.DataObject
) -> None:
    response, _ = WHOLE[name]
    place = data.draw(st.integers(0, len(response)))
    response = response[:place] + noise + response[place:]
    cut = data.draw(st.integers(0, len(response)))
    outcomes: list[object] = []
    for parts in ([response], [response[:cut], response[cut:]], in_parts(response, 1)):
        try:
            outcomes.append(read(parts))
        except BadResponse:
            outcomes.append("bad")
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize(
    "response",
    [
        head(b"Content-Length: 1\r\nContent-Length: 2\r\n"),
        head(b"Transfer-Encoding: gzip, chunked\r\n"),
        head(b" folded\r\n"),
        head(status=b"101 Switching Protocols"),
        head(status=b"20 OK"),
        b"HTTP/2 200\r\n\r\n",
        b"x" * 70_000,
        head(CHUNKED) + b"1" * 2_000,
        head(CHUNKED) + b"0\r\n" + b"t" * 70_000,
        head(CHUNKED) + b"-3\r\nabc",
        head(CHUNKED) + b"0x3\r\nabc",
        head(CHUNKED) + b"1_0\r\nabc",
    ],
)
def test_what_the_framing_refuses(response: bytes) -> None:
    with pytest.raises(BadResponse):
        read([response])
