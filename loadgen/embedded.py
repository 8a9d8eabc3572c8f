"""Our own servers as child processes of a run: started with a ready line, ended with the run, whatever ends it."""

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence

from fanmark.loadgen.errors import UnreachableError

_READY_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 3.0


class Embedded:
    """A running server of ours at `url`. It ends when its standard input does, so it survives neither a crash nor a kill -9 of this
    process; being in a session of its own, it is not hit by the terminal's Ctrl-C."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, url: str) -> None:
        self.name = name
        self.url = url
        self._process = process

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    async def close(self) -> None:
        """Ends the process and waits for it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def start(module: str, args: Sequence[str]) -> Embedded:
    """Starts `python -m module args --parent-pipe` and waits for the JSON line with its URL. Raises UnreachableError."""
    with tempfile.TemporaryFile("w+") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *args,
            "--parent-pipe",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                line = await process.stdout.readline()
            return Embedded(module, process, str(json.loads(line)["url"]))
        except (TimeoutError, ValueError, KeyError):
            if process.returncode is None:
                process.kill()
            code = await process.wait()
            errors.seek(0)
            last = " | ".join(errors.read().strip().splitlines()[-5:]) or "no message"
            raise UnreachableError(f"{module} did not start (exit {code}): {last}") from None
        except BaseException:
            process.kill()
            await process.wait()
            raise
