"""Processes as /proc shows them, for tests: who started whom, and whether they are gone; and what was started, ended in any case."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes started by `pid`, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            own, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += [own, *children(own)]
    return found


def gone(pids: list[int], within_s: float = 10) -> bool:
    """Whether all processes end in time."""
    give_up_at = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() and " Z " not in _stat(pid) for pid in pids):
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.05)
    return True


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "


def line_of(process: "subprocess.Popen[str]", within_s: float = 60) -> str:
    """The first line that it prints, or "" where it ends without one."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], within_s)[0], f"no line within {within_s:g} s"
    return process.stdout.readline()


def kill(pids: Iterable[int]) -> None:
    """Those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end(process: "subprocess.Popen[str]") -> None:
    """Ends it and all that it started, whatever state it is in, and closes its pipes."""
    if process.poll() is None:
        kill([process.pid, *children(process.pid)])
    process.wait(30)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
