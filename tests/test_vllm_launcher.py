"""The launcher of vLLM, with a stand-in for the `vllm` program: ready check, failures, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from fanmark.servers.vllm import VllmError, environment, running_vllm

# Answers /health with its own arguments and a variable, after it has started a child that outlives it unless killed.
STAND_IN = """#!{python}
import http.server, json, os, subprocess, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([sys.argv[1:], os.environ["VLLM_NO_USAGE_STATS"], child.pid]).encode())

    def log_message(self, *args):
        pass

child = subprocess.Popen(["sleep", "600"])
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def make_venv(folder: Path, program: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    file = folder / "bin" / "vllm"
    file.write_text(program)
    file.chmod(0o755)
    return folder


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    return make_venv(tmp_path / "venv", STAND_IN.replace("{python}", sys.executable))


def health(url: str) -> tuple[list[str], str, int]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=10) as reply:
        arguments, usage, child = json.load(reply)
        return arguments, usage, child


def is_alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_serves_while_the_block_runs_and_leaves_nothing(venv: Path, tmp_path: Path) -> None:
    with running_vllm("the/model", venv=venv, flags=["--max-num-seqs=64"], log=tmp_path / "log") as server:
        arguments, usage, child = health(server.url)
        port = server.url.removesuffix("/v1").rpartition(":")[2]
        assert arguments == ["serve", "the/model", "--host", "127.0.0.1", "--port", port, "--max-num-seqs=64"]
        assert usage == "1"
        assert is_alive(child)
        assert server.rss_bytes() > 1_000_000
    assert not is_alive(server.pid)
    assert not is_alive(child)


def test_a_program_that_ends_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    venv = make_venv(tmp_path / "venv", "#!/bin/sh\nfor i in 1 2 3; do echo line $i; done\nexit 7\n")
    message = r"^vllm ended with status 7 before it was ready\nline 1\nline 2\nline 3$"
    with pytest.raises(VllmError, match=message), running_vllm("m", venv=venv, log=tmp_path / "log"):
        pass


def test_a_program_that_never_answers_is_an_error_and_ended(tmp_path: Path) -> None:
    venv = make_venv(tmp_path / "venv", f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho starting\nexec sleep 600\n")
    message = r"^vllm did not answer /health within 0.5 s\nstarting$"
    serving = running_vllm("m", venv=venv, log=tmp_path / "log", ready_timeout_s=0.5)
    with pytest.raises(VllmError, match=message), serving:
        pass
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_venv_without_vllm_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(VllmError, match=f"^no vllm in {tmp_path}: give the virtual environment"),
        running_vllm("m", venv=tmp_path),
    ):
        pass


def test_openmp_is_loaded_first_where_the_cpu_build_brings_it(tmp_path: Path) -> None:
    assert "LD_PRELOAD" not in environment(tmp_path, {})
    (tmp_path / "lib").mkdir()
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.touch()
    assert environment(tmp_path, {})["LD_PRELOAD"] == str(openmp)
    assert environment(tmp_path, {"LD_PRELOAD": "/a.so", "X": "1"})["LD_PRELOAD"] == f"/a.so:{openmp}"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "end of standard input"])
def test_command_prints_the_url_and_ends_its_server(venv: Path, tmp_path: Path, how: signal.Signals | str) -> None:
    command = [sys.executable, "-m", "fanmark.servers.vllm", "m", "--venv", str(venv), "--log", str(tmp_path / "log")]
    with subprocess.Popen(
        [*command, "--parent-pipe", "--seed", "3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        started = json.loads(process.stdout.readline())
        arguments, _, child = health(started["url"])
        assert arguments[-2:] == ["--seed", "3"]
        if isinstance(how, signal.Signals):
            process.send_signal(how)
        else:
            process.stdin.close()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == b""
    assert not is_alive(started["pid"])
    assert not is_alive(child)


def test_command_ends_with_3_when_the_server_ends_by_itself(venv: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fanmark.servers.vllm", "m", "--venv", str(venv), "--log", str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        started = json.loads(process.stdout.readline())
        os.kill(started["pid"], signal.SIGKILL)
        assert process.wait(timeout=30) == 3
        assert process.stderr.read() == b"vllm ended by itself\n\n"


def test_port_taken_is_one_line_and_exit_2(venv: Path, tools_url: str) -> None:
    port = tools_url.removesuffix("/mcp").rpartition(":")[2]
    command = [sys.executable, "-m", "fanmark.servers.vllm", "m", "--venv", str(venv), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cannot listen on 127.0.0.1:{port}: Address already in use; give another --port\n"
