"""Launcher of a real vLLM: `vllm serve` from a given virtual environment, ready when /health answers, ended by pid.

    python -m fanmark.servers.vllm MODEL [--venv DIR] [--host H] [--port P] [--log FILE] [--parent-pipe] [vllm's flags]

When the server is up, one line of JSON is printed: {"url": "http://127.0.0.1:PORT/v1", "pid": N}. Flags that the
launcher does not know go to vLLM as they are.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

POLL_S = 0.2
STOP_S, KILL_S = 20.0, 5.0
LAST_LINES = 15


class VllmError(Exception):
    """vLLM could not be started; the message says why and ends with the last lines that it wrote."""


@dataclass(frozen=True)
class VllmServer:
    """A running server. `url` ends in /v1; `pid` is that of `vllm serve`, the leader of its own process group."""

    url: str
    pid: int
    log: Path
    ready_after_s: float

    def rss_bytes(self) -> int:
        """Resident memory of the server and the processes that it started; shared pages count in each. Linux only."""
        return _group_pages(self.pid) * os.sysconf("SC_PAGE_SIZE")


def _group_pages(group: int) -> int:
    """Resident pages of a process group; 0 when none of it lives (zombies have none), or where there is no /proc."""
    pages = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                pages += int((folder / "statm").read_text().split()[1])
        except (OSError, ValueError):  # it ended while we looked
            continue
    return pages


def free_port(host: str) -> int:
    """A TCP port that is free on `host` now."""
    with socket.socket() as s:
        s.bind((host, 0))
        port: int = s.getsockname()[1]
        return port


def environment(venv: Path, base: Mapping[str, str]) -> dict[str, str]:
    """What `vllm serve` is started with: `base`, no usage reports, and on a CPU build Intel's OpenMP loaded first."""
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **base}
    openmp = venv / "lib" / "libiomp5.so"
    if openmp.exists():
        env["LD_PRELOAD"] = ":".join(filter(None, [env.get("LD_PRELOAD"), str(openmp)]))
    return env


def _healthy(host: str, port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then, as vLLM ignores that while it starts, SIGKILL to the whole process group, workers included."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    give_up_at = time.monotonic() + KILL_S
    while _group_pages(process.pid) and time.monotonic() < give_up_at:
        time.sleep(0.01)


def _wait_ready(process: subprocess.Popen[bytes], host: str, port: int, log: Path, ready_timeout_s: float) -> float:
    started_at = time.monotonic()
    while not _healthy(host, port):
        waited_s = time.monotonic() - started_at
        if process.poll() is not None:
            raise VllmError(f"vllm ended with status {process.returncode} before it was ready\n{_tail(log)}")
        if waited_s > ready_timeout_s:
            raise VllmError(f"vllm did not answer /health within {ready_timeout_s:g} s\n{_tail(log)}")
        time.sleep(POLL_S)
    return time.monotonic() - started_at


@contextmanager
def running_vllm(
    model: str,
    *,
    venv: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    ready_timeout_s: float = 600.0,
) -> Iterator[VllmServer]:
    """Serve `model` with the vLLM of `venv` while the block runs.

    `port` 0 takes a free one. `env` is added to this process's environment. `log` gets all that vLLM writes (left out:
    a new file in the system's temporary folder). Raises VllmError where it does not come up.
    """
    program = venv / "bin" / "vllm"
    if not program.exists():
        raise VllmError(f"no vllm in {venv}: give the virtual environment that it is installed in")
    port = port or free_port(host)
    if log is None:
        log = Path(tempfile.mkstemp(prefix="fanmark-vllm-", suffix=".log")[1])
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(program), "serve", model, "--host", host, "--port", str(port), *flags],
            env=environment(venv, {**os.environ, **(env or {})}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        ready_after_s = _wait_ready(process, host, port, log, ready_timeout_s)
        yield VllmServer(url=f"http://{host}:{port}/v1", pid=process.pid, log=log, ready_after_s=ready_after_s)
    finally:
        _stop(process)


class _Stop(Exception):
    """SIGTERM, SIGINT or the parent's end."""


def _raise_stop(signum: int, frame: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # the way out takes seconds: a second signal must not interrupt it
    raise _Stop


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock, held here, would abort the interpreter on its way out
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def serve_vllm(
    model: str,
    *,
    venv: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    flags: Sequence[str] = (),
    log: Path | None = None,
    parent_pipe: bool = False,
) -> int:
    """Serve until SIGTERM, SIGINT or, with `parent_pipe`, the end of standard input. Returns an exit code (0, 2, 3)."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _raise_stop)
    if parent_pipe:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if port:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        with running_vllm(model, venv=venv, host=host, port=port, flags=flags, log=log) as server:
            print(json.dumps({"url": server.url, "pid": server.pid}), flush=True)
            os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
            print(f"vllm ended by itself\n{_tail(server.log)}", file=sys.stderr)
            return 3
    except _Stop:
        return 0
    except VllmError as error:
        print(error, file=sys.stderr)
        return 3
    except OSError as error:
        print(f"cannot listen on {host}:{port}: {error.strerror}; give another --port", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module."""
    # without a usage text, a wrong flag is answered by one line
    parser = argparse.ArgumentParser(prog="fanmark serve vllm", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--venv", type=Path, default=Path(sys.prefix), help="virtual environment that holds vllm")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--parent-pipe", action="store_true", help="end when standard input does")
    known, flags = parser.parse_known_args(argv)
    return serve_vllm(
        known.model,
        venv=known.venv,
        host=known.host,
        port=known.port,
        flags=flags,
        log=known.log,
        parent_pipe=known.parent_pipe,
    )


if __name__ == "__main__":
    sys.exit(main())
