"""Processes as /proc shows them, for tests: who started whom, and whether they are gone."""

import time
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
