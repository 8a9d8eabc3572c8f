"""Where one worker of a run works: a process of this machine, or of a cluster's node (ray_cluster.py). Its driver sees no difference."""

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from fanmark.loadgen.link import Link

END_TIMEOUT_S = 5.0


class Clocks(NamedTuple):
    """A node's clocks against the driver's: what its monotonic clock and its time of day are ahead, and by how much either may be off."""

    monotonic_ahead_s: float = 0.0
    day_ahead_s: float = 0.0
    error_s: float = 0.0


class Station(Protocol):
    """One worker's place. `node` None: this machine. `out` is the folder there that its journal goes to; what is to happen at one instant
    is told `ahead_s` before."""

    node: str | None
    clocks: Clocks
    out: Path
    ahead_s: float

    def put(self, data: bytes) -> None:
        """Sends a pickled message without waiting; to a worker that is gone, nothing."""

    async def receive(self) -> Any:
        """The worker's next message; None when it is gone."""

    async def end(self) -> str:
        """Ends the worker if it still runs; its last words."""

    async def bring(self) -> Path | None:
        """The folder with the worker's journal, on this machine; None where it is lost."""

    async def clear(self) -> None:
        """Removes the journal, there too."""


Opening = Callable[[int], Awaitable[Station]]  # of the worker with this number


class LocalStation:
    """A worker as a process of this machine. It ends when its standard input does, so it does not outlive a driver that is killed."""

    node: str | None = None
    clocks = Clocks()
    ahead_s = 0.05

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[str], out: Path) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.out = out
        self.link = Link(process.stdout, process.stdin.transport)
        self.put, self.receive = self.link.put, self.link.receive
        self._process = process
        self._errors = errors
        self._last_words = ""

    async def end(self) -> str:
        """See Station. One that does not end is killed."""
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.link.close()
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if not self._errors.closed:
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-3:]
            self._last_words = " | ".join(last) or _end(self._process.returncode)
            self._errors.close()
        return self._last_words

    async def bring(self) -> Path | None:
        """See Station."""
        return self.out

    async def clear(self) -> None:
        """See Station."""
        shutil.rmtree(self.out)


async def open_local(out: Path) -> LocalStation:
    """Starts a worker process whose journal goes to `out`, which is made."""
    out.mkdir()  # noqa: ASYNC240  # a moment, before the run
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed when the worker has ended
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fanmark.loadgen.worker",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, start_new_session=True,
    )  # fmt: skip
    return LocalStation(process, errors, out)


def _end(code: int | None) -> str:
    """How a process ended that said nothing."""
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
