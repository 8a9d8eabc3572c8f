"""What the process that passes bytes on tells of them, and what it does when nobody takes it."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.records import Journal, Query, read_queries
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.tap.carrier import Teller
from fanmark.loadgen.tap.frames import UNTOLD, Began, Ended, Frame, More, Unpacker
from fanmark.loadgen.tap.grouping import Grouping
from fanmark.loadgen.tap.heads import RequestHead
from fanmark.loadgen.tap.lengths import Lengths
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


OK = b'{"choices":[{"message":{"content":"yes"},"finish_reason":"stop"}],"usage":{"prompt_tokens":60,"completion_tokens":1}}'


def recorder_in(folder: Path) -> tuple[Recorder, Journal]:
    clock, journal = RunClock(1.0), Journal(folder)
    clock.start(0.0)
    tally = Tally({"tapped": "replay", "unattributed": "replay"}, "tapped")
    return Recorder(Grouping(1.0), tally, journal, clock, b"salt"), journal


def record(recorder: Recorder, n: int, *texts: str, error: str | None = None) -> None:
    """One call of the query, told as the carrier does."""
    body = json.dumps({"messages": [{"role": "user", "content": text} for text in texts]}).encode()
    recorder.take(Began(n, "chat", {"x-fanmark-query": "one"}, body, n))
    reads = [] if error else [(n + 0.5, OK)]
    recorder.take(Ended(n, 200, "application/json", reads, n, None, n + 0.5, error))


def written(recorder: Recorder, journal: Journal, folder: Path) -> Query:
    recorder.grouping.close()
    recorder.write(list(recorder.grouping.closed))
    journal.flush()
    journal.close()
    (query,) = read_queries(folder)
    return query


def test_a_call_of_which_not_all_was_told_fails_its_query(tmp_path: Path) -> None:
    recorder, journal = recorder_in(tmp_path)
    record(recorder, 1, "one", error=UNTOLD)
    record(recorder, 2, "two")
    query = written(recorder, journal, tmp_path)
    assert (query.outcome, query.error) == ("failed", UNTOLD)
    assert [(call.error, call.output_tokens) for call in query.calls] == [(UNTOLD, None), (None, 1)]


class Counting:
    """A target that counts each text as 7 tokens, but never comes back from a slow one."""

    model, root, headers = "m", "http://none", dict[str, str]()
    asked = 0

    @property
    def lane(self) -> "Counting":
        return self

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        self.asked += 1
        if b"slow" in body:
            await asyncio.Event().wait()
        if b"cut" in body and self.asked == 2:
            raise CallError("stream_cut", "an idle connection was let go")
        if b"refused" in body:
            return 404, b"{}"
        return 200, b'{"tokens": [1, 2, 3, 4, 5, 6, 7]}'


@pytest.mark.parametrize(
    ("second", "known", "by_size"),
    [
        ("quick again", "counted", 0),
        ("cut once", "counted", 0),
        ("a slow one", "counted in part", 1),
        ("refused", "counted in part", 1),
    ],
)
def test_a_slow_tokenizer_holds_nobody_up_and_is_told_of(second: str, known: str, by_size: int, tmp_path: Path) -> None:
    recorder, journal = recorder_in(tmp_path)
    lengths = Lengths(Counting(), wait_s=1.0)  # type: ignore[arg-type]
    record(recorder, 1, "quick")
    record(recorder, 2, second)
    recorder.grouping.close()
    run_virtually(lengths.count(recorder.grouping.closed, recorder.sizes))
    assert (lengths.known, lengths.by_size) == (known, by_size)
    (group,) = recorder.grouping.closed
    near = -(-len(second) // 4)
    assert [call.record.messages[0].tokens for call in group.calls] == [7, near if by_size else 7]
    journal.close()


def test_messages_add_up_to_their_prompt_however_wrong_their_lengths_are(tmp_path: Path) -> None:
    """A message alone, and twice, in prompts that the server counts as equally long."""
    recorder, journal = recorder_in(tmp_path)
    record(recorder, 1, "alone")
    record(recorder, 2, "alone", "alone")
    written(recorder, journal, tmp_path)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [sum(message["tokens"] for message in call["messages"]) for call in calls] == [60, 60]
