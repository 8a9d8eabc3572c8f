"""What a run's driver and its workers say to each other, over a pair of pipes: a length, then a pickle, of one of the messages below.

Both ends are this program, started by the driver for one run; nothing else ever writes into these pipes. Where a worker is on another
machine, the pickles are passed on between its pipes and the driver as they are.
"""

import asyncio
import os
import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fanmark.loadgen.health import ClientState
from fanmark.loadgen.reach import Place
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import Reduced
from fanmark.loadgen.run import Ending
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.sums import Packed, Packer, joined

_HEAD_BYTES = 4


@dataclass(frozen=True)
class Task:
    """To a worker, first of all: what to run, which share of it, and the folder that its journal goes to. `keep`: the journal stays there,
    and the worker tells what follows from it."""

    scenario: Scenario
    place: Place
    index: int
    count: int
    run_id: str
    out: Path
    keep: bool = False


@dataclass(frozen=True)
class Ready:
    """From a worker: targets and tools are reached, connections open."""


@dataclass(frozen=True)
class Go:
    """To the workers: the run's start, on the monotonic clock that the processes of the worker's machine share."""

    origin_s: float


@dataclass(frozen=True)
class Say:
    """From a worker that has come to a meeting."""

    values: list[float]


@dataclass(frozen=True)
class Meeting:
    """To the workers, when all have come: an instant, and what all said."""

    at: float
    said: list[float]


@dataclass(frozen=True)
class Ask:
    """To the workers: end; the second time, at once."""


@dataclass(frozen=True)
class Snapshot:
    """From a worker, each second: all its sums so far."""

    sums: Packed
    state: ClientState


@dataclass
class Ended:
    """How a run, or a worker's part of one, ended. `ending` None: with its schedule. `states` are by worker. `found` is what follows from
    the workers' records, where those stay with them."""

    ending: Ending | None
    states: dict[int, ClientState]
    notes: list[str] = field(default_factory=list)
    found: Reduced | None = None


@dataclass(frozen=True)
class Tell:
    """To a worker that has ended, once all have: reduce your journal."""


@dataclass(frozen=True)
class Piece:
    """From it: some more of its queries."""

    found: Reduced


@dataclass(frozen=True)
class Told:
    """From it, when that was all."""

    windows: list[Window]


@dataclass(frozen=True)
class Refused:
    """From a worker that could not start: the error that the driver raises in its place."""

    error: Exception


def snapshot(packer: Packer, state: ClientState) -> Snapshot:
    """As it is sent: no larger however long the run is."""
    lag = Counter(joined(state.loop_lag))
    return Snapshot(packer.pack(), msgspec.structs.replace(state, loop_lag=lag))


def pickled(message: Any) -> bytes:
    """A message as it travels."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


class Link:
    """One end of the pair of pipes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.WriteTransport) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: Any) -> None:
        """Sends without waiting; to a peer that is gone, nothing."""
        self.put(pickled(message))

    def put(self, data: bytes) -> None:
        """Sends a message that is pickled already."""
        if not self._writer.is_closing():
            self._writer.write(len(data).to_bytes(_HEAD_BYTES, "big") + data)

    async def receive(self) -> Any:
        """The next message; None when the peer is gone."""
        data = await self.take()
        return None if data is None else pickle.loads(data)

    async def take(self) -> bytes | None:
        """The next message as a pickle."""
        try:
            size = int.from_bytes(await self._reader.readexactly(_HEAD_BYTES), "big")
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def sent(self) -> bool:
        """Waits until all that was sent has been taken, or nobody is there to take it; whether somebody is."""
        while self._writer.get_write_buffer_size() and not self._writer.is_closing():  # noqa: ASYNC110  # a transport tells nobody
            await asyncio.sleep(0.005)
        return not self._writer.is_closing()

    async def close(self) -> None:
        """When all that was sent has been taken."""
        await self.sent()
        self._writer.close()


async def link_to_driver(read_fd: int, write_fd: int) -> Link:
    """The worker's end, over these file descriptors."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", 0))
    writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(write_fd, "wb", 0))
    return Link(reader, writer)
