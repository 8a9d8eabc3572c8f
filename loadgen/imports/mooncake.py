"""Mooncake: requests with their arrival, lengths and the hashes of their prompt's blocks, a JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}

`timestamp` is in ms; each hash is a block of 512 tokens, the last one what is left: equal ones are equal text
(github.com/kvcache-ai/Mooncake, "Open Source Trace"). A request is a query of one call, and a message a block. Rows with one
`session_id`, as AIPerf and Dynamo have them, are the turns of one query: each waits for the one before and its `delay` (ms), and takes
`timestamp` for its start if it has no delay. Such rows are held until the file's end; others are not. The trace does not tell how long a
request took.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from fanmark.loadgen.imports.trace import Trace, made
from fanmark.loadgen.recording import RecordedCall, Said

BLOCK_TOKENS = 512


class Row(msgspec.Struct):
    """A line; other names as Dynamo reads them."""

    timestamp: float | None = None
    created_time: float | None = None
    input_length: int | None = None
    input_tokens: int | None = None
    output_length: int | None = None
    output_tokens: int | None = None
    hash_ids: list[int] = []
    session_id: str | None = None
    delay: float | None = None

    @property
    def at(self) -> float | None:
        """Its arrival in seconds."""
        at = self.timestamp if self.timestamp is not None else self.created_time
        return None if at is None else at / 1000

    @property
    def reads(self) -> int:
        return self.input_length or self.input_tokens or 0

    @property
    def writes(self) -> int:
        return self.output_length or self.output_tokens or 0


def read(trace: Trace) -> Iterator[tuple[float, list[RecordedCall]]]:
    """Query after query; the turns of sessions last."""
    decoder, sessions = msgspec.json.Decoder(Row), dict[str, list[Row]]()
    for line in trace.lines():
        row = decoder.decode(line)
        if row.reads < 1:
            raise ValueError(f"input_length = {row.reads}: a request reads something")
        if row.writes < 1:
            trace.note("requests without output: they write 1 token here")
        if row.session_id is not None:
            sessions.setdefault(row.session_id, []).append(row)
            continue
        at = row.at or 0.0
        yield at, [made(1, [], at, at, output_tokens=max(1, row.writes), messages=blocks(row, trace.at))]
    for name, rows in sessions.items():
        yield _session(name, rows)


def _session(name: str, rows: Sequence[Row]) -> tuple[float, list[RecordedCall]]:
    start_at = at = rows[0].at or 0.0
    calls = []
    for i, row in enumerate(rows):
        if i:
            at = at + row.delay / 1000 if row.delay is not None else max(at, row.at or at)
        calls.append(
            made(i + 1, [i] if i else [], at, at, output_tokens=max(1, row.writes), messages=blocks(row, f"{name}/{i}"))
        )
    return start_at, calls


def blocks(row: Row, unique: str) -> list[Said]:
    """The prompt, block by block; what no hash tells of is a text of its own."""
    ends = [min(row.reads, BLOCK_TOKENS * i) for i in range(len(row.hash_ids) + 1)]
    found = [
        Said(f"{hashed}" if b - a == BLOCK_TOKENS else f"{hashed}/{b - a}", b - a)  # what is not full is another text
        for hashed, (a, b) in zip(row.hash_ids, pairwise(ends), strict=True)
        if b > a
    ]
    return found + ([Said(unique, row.reads - ends[-1])] if ends[-1] < row.reads else [])
