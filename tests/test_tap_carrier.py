"""What the process that passes bytes on tells of them, and what it does when nobody takes it."""

import asyncio
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.records import Journal, read_queries
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.tap.carrier import Teller
from fanmark.loadgen.tap.frames import UNTOLD, Began, Ended, Frame, More, Unpacker
from fanmark.loadgen.tap.grouping import Grouping
from fanmark.loadgen.tap.heads import RequestHead
from fanmark.loadgen.tap.recorder import Recorder
from fanmark.loadgen.tap.wire import Exchange

MOST = 1_000
SMALL = 200  # bytes of a frame without text


class Late:
    """A transport of which nothing is taken until `take`."""

    def __init__(self) -> None:
        self.held = b""
        self.most = 0
        self.taken: list[Frame] = []
        self._unpacker = Unpacker(self.taken.append)

    def write(self, data: bytes) -> None:
        self.held += data
        self.most = max(self.most, len(self.held))

    def get_write_buffer_size(self) -> int:
        return len(self.held)

    def is_closing(self) -> bool:
        return False

    def take(self) -> None:
        self._unpacker.feed(self.held)
        self.held = b""


def exchange(body: int) -> Exchange:
    made = Exchange("chat", RequestHead("POST", "/v1/chat/completions", [], 1, keep_alive=True, waits=False))
    made.body = b"a" * body
    return made


STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "read", "end", "take"]), st.integers(0, 9), st.integers(1, 600)), max_size=60
)


@given(STEPS)
def test_what_waits_is_bounded_and_what_is_not_told_is_counted(steps: list[tuple[str, int, int]]) -> None:
    """Whatever passes, in whatever order: the texts that wait never exceed the limit, a reply is told whole or called untold, and each
    request that is not known whole is counted once."""
    late, teller = Late(), Teller(MOST)
    teller.connection_made(late)
    open_, sent = list[Exchange](), dict[int, bytes]()
    ended = list[Exchange]()

    async def play() -> None:
        for step, place, size in steps:
            if step == "begin":
                open_.append(exchange(size))
                teller.began(open_[-1])
            elif step == "take":
                late.take()
            elif open_:
                each = open_[place % len(open_)]
                if step == "read":
                    each.reads.append((0.0, b"b" * size))
                    sent[id(each)] = sent.get(id(each), b"") + b"b" * size
                    teller.read(each)
                else:
                    open_.remove(each)
                    ended.append(each)
                    teller.ended(each)
            teller.flush()
        for each in open_:
            teller.ended(each)
        ended.extend(open_)
        teller.flush()

    asyncio.run(play())
    assert late.most <= MOST + SMALL * (len(steps) + len(open_))
    late.take()
    told: dict[int, bytes] = {}
    errors: dict[int, Any] = {}
    for frame in late.taken:
        if isinstance(frame, Began):
            told[frame.n] = b""
        elif isinstance(frame, More | Ended):
            told[frame.n] += b"".join(data for _, data in frame.reads)
            if isinstance(frame, Ended):
                errors[frame.n] = frame.error
    for each in ended:
        if not each.number:
            assert each.untold
        elif each.untold:
            assert errors[each.number] == UNTOLD
        else:
            assert (told[each.number], errors[each.number]) == (sent.get(id(each), b""), None)
    assert teller.untold == sum(each.untold for each in ended)


def test_recording_goes_on_once_there_is_room_again() -> None:
    late, teller = Late(), Teller(MOST)
    teller.connection_made(late)

    async def play() -> None:
        for n in range(3):
            teller.began(exchange(700))
            teller.flush()
            if n == 1:
                late.take()

    asyncio.run(play())
    late.take()
    assert [frame.n for frame in late.taken if isinstance(frame, Began)] == [1, 2] and teller.untold == 1


def test_a_call_of_which_not_all_was_told_fails_its_query(tmp_path: Path) -> None:
    grouping, clock = Grouping(1.0), RunClock(1.0)
    clock.start(0.0)
    journal = Journal(tmp_path)
    recorder = Recorder(
        grouping, Tally({"tapped": "replay", "unattributed": "replay"}, "tapped"), journal, clock, b"salt"
    )
    ok = b'{"choices":[{"message":{"content":"yes"},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":1}}'
    for n, error in ((1, UNTOLD), (2, None)):
        recorder.take(
            Began(n, "chat", {"x-fanmark-query": "one"}, b'{"messages":[{"role":"user","content":"%d"}]}' % n, n)
        )
        recorder.take(Ended(n, 200, "application/json", [] if error else [(n + 0.5, ok)], n, None, n + 0.5, error))
    grouping.close()
    recorder.write(list(grouping.closed))
    journal.flush()
    journal.close()
    (query,) = read_queries(tmp_path)
    assert (query.outcome, query.error) == ("failed", UNTOLD)
    assert [(call.error, call.output_tokens) for call in query.calls] == [(UNTOLD, None), (None, 1)]
