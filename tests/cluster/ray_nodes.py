"""A running Ray cluster of two nodes, which tests share."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from processes import children, end, gone, kill, line_of

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-ray" / "bin"
TWO_ARMS = """
name = "shared-out"
seed = 5
[[arm]]
name = "single"
topology = "single"
baseline = true
[[arm]]
name = "debate"
topology = "debate"
agents = 2
rounds = 1
[workload]
answer = {dist = "uniform", mean = 12, cv = 0.3, min = 2}
judge_answer = 6
"""


class Nodes:
    """A running cluster, whose temporary files are in a folder of their own."""

    def __init__(self, process: "subprocess.Popen[str]", address: str, files: Path) -> None:
        self.process, self.address, self.files = process, address, files

    def workers(self) -> dict[int, Path]:
        """The workers that run on its nodes, by process id, each with its journal's folder as soon as it has begun a query."""
        found = {}
        for pid in children(self.process.pid):
            try:
                if "fanmark.loadgen.worker" in Path(f"/proc/{pid}/cmdline").read_text():
                    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
                    for journal in (Path(link) for link in links if link.endswith("/begun.jsonl")):
                        found[pid] = journal.parent
            except OSError:
                continue
        return found

    def lose_one(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("lose\n")
        self.process.stdin.flush()


@contextmanager
def running_nodes() -> Iterator[Nodes]:
    """Two nodes, until the context ends."""
    if not VENV.exists():
        pytest.fail("no Ray: run `make test-ray`, which installs it")
    files = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets are in it, so that it cannot be as deep as pytest's own
    process = subprocess.Popen(
        [VENV / "python", Path(__file__).parent / "two_nodes.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": files},
    )
    started = [process.pid]
    try:
        address = line_of(process).strip()
        assert address, "the cluster did not start"
        started += children(process.pid)
        yield Nodes(process, address, Path(files))
    finally:
        started += children(process.pid)
        assert process.stdin is not None
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        ended = gone(started, within_s=30)
        kill(started)
        end(process)
        shutil.rmtree(files, ignore_errors=True)
        assert ended
