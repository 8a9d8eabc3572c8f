"""What the process that passes bytes on tells the one that records them: a length, then one of the messages below, packed.

Instants are those of the monotonic clock, which the processes of a machine share. Of a request's headers only those go along that group it:
keys stay where they pass.
"""

from collections import Counter
from collections.abc import Callable

import msgspec

from fanmark.loadgen.health import ClientState
from fanmark.loadgen.tap.ids import OWN_HEADER, RETRY_HEADER, SESSION_HEADERS

GROUPING = frozenset((OWN_HEADER, "baggage", "traceparent", RETRY_HEADER, *SESSION_HEADERS))
UNTOLD = "untold"  # the error of a request whose reply was not told of: whoever records was late
_HEAD_BYTES = 4

Reads = list[tuple[float, bytes]]


class Began(msgspec.Struct, array_like=True, tag="began"):
    """Request number `n`, whole, is on its way; `api` is what it is written in."""

    n: int
    api: str
    headers: dict[str, str]
    body: bytes
    came_at: float


class More(msgspec.Struct, array_like=True, tag="more"):
    """More of the reply to request `n`."""

    n: int
    status: int
    content_type: str
    reads: Reads


class Ended(msgspec.Struct, array_like=True, tag="ended"):
    """The rest of the reply, and how it ended. `sent_at` None: it never went on."""

    n: int
    status: int
    content_type: str
    reads: Reads
    sent_at: float | None
    connect_s: float | None
    done_at: float
    error: str | None


class Beat(msgspec.Struct, array_like=True, tag="beat"):
    """Each second: how the process fares, how many requests passed that are not measured, and of how many that are not all is told."""

    loop_lag: dict[int, int]
    busy_seconds: int
    cpu_s: float
    rss_mb: float
    verdict: str
    passed: int
    untold: int

    @property
    def state(self) -> ClientState:
        return ClientState(Counter(self.loop_lag), self.busy_seconds, self.cpu_s, self.rss_mb, verdict=self.verdict)


def beat(state: ClientState, passed: int, untold: int = 0) -> Beat:
    """The process as it is now."""
    return Beat(state.loop_lag, state.busy_seconds, state.cpu_s, state.rss_mb, state.verdict, passed, untold)


Frame = Began | More | Ended | Beat

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def packed(frame: Frame) -> bytes:
    """A message as it travels."""
    data = _encoder.encode(frame)
    return len(data).to_bytes(_HEAD_BYTES, "big") + data


class Unpacker:
    """Takes messages out of a stream of bytes."""

    def __init__(self, take: Callable[[Frame], None]) -> None:
        self._take = take
        self._rest = bytearray()

    def feed(self, data: bytes) -> None:
        """More bytes; hands over every message that is whole."""
        self._rest += data
        start, view = 0, memoryview(self._rest)
        try:
            while start + _HEAD_BYTES <= len(view):
                end = start + _HEAD_BYTES + int.from_bytes(view[start : start + _HEAD_BYTES], "big")
                if end > len(view):
                    break
                self._take(_decoder.decode(view[start + _HEAD_BYTES : end]))
                start = end
        finally:
            view.release()
        del self._rest[:start]
