"""Simulations on the processors of a Ray cluster: what one process makes, byte for byte, and an end whatever becomes of the cluster."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from processes import children, end
from ray_nodes import TWO_ARMS, VENV, Nodes, running_nodes

pytestmark = pytest.mark.ray

SCENARIO = f"""{TWO_ARMS}
[objective]
query_seconds = 0.5
attainment = 0.8
"""
PLAN = ["plan", "--rate", "40", "--seeds", "1", "--within", "0.5", "--burstiness", "1", "--cell", "1"]
SWEEP = ["sweep", "--virtual", "--rate", "4:400", "--within", "0.5", "--most-looks", "2"]
SEEDS = ["simulate", "--seeds", "3", "--queries", "2"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this process alone makes, and the scenario."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "s.toml").write_text(SCENARIO)
    for flags in (PLAN, SWEEP, SEEDS):
        done(started(folder / "s.toml", folder / flags[0], *flags))
    return folder


def started(scenario: Path, out: Path, command: str, *flags: str) -> "subprocess.Popen[str]":
    given = [VENV / "fanmark", command, scenario, *flags, "--out", out]
    return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """What it said on standard error."""
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == code, errors
    return errors


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of(nodes: Nodes, name: str) -> list[int]:
    """The cluster's processes whose command line has it."""
    found = []
    for pid in children(nodes.process.pid):
        with suppress(OSError):
            found += [pid] if name in Path(f"/proc/{pid}/cmdline").read_text() else []
    return found


@pytest.mark.parametrize("flags", [PLAN, SWEEP, SEEDS, [*PLAN, "--workers", "2"]], ids=lambda flags: flags[0])
def test_what_the_nodes_make_is_what_is_made_here(nodes: Nodes, here: Path, tmp_path: Path, flags: list[str]) -> None:
    done(started(here / "s.toml", tmp_path / "there", *flags, "--ray", nodes.address))
    made = files(tmp_path / "there")
    assert made == files(here / flags[0])
    assert len({Path(name).parent for name in made}) > {"plan": 0, "sweep": 8, "simulate": 2}[flags[0]]


def test_what_is_given_up_leaves_no_files_on_the_nodes(nodes: Nodes, here: Path, tmp_path: Path) -> None:
    flags = ["simulate", "--seeds", "6", "--queries", "3000", "--ray", nodes.address]
    process = started(here / "s.toml", tmp_path / "there", *flags)
    give_up_at = time.monotonic() + 60
    while not list(nodes.files.glob("tmp*/run/queries.jsonl")):
        assert time.monotonic() < give_up_at and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert done(process, code=130) == "" and not list(nodes.files.glob("tmp*"))


def test_a_head_that_says_nothing_any_more_is_one_line(nodes: Nodes, here: Path, tmp_path: Path) -> None:
    """A simulation may last as long as it likes, but not the silence of the cluster meanwhile."""
    flags = ["simulate", "--seeds", "2", "--queries", "100000", "--ray", nodes.address]
    process = started(here / "s.toml", tmp_path / "there", *flags)
    give_up_at = time.monotonic() + 60
    while not of(nodes, "ray::_carried_out"):
        assert time.monotonic() < give_up_at and process.poll() is None
        time.sleep(0.05)
    (head,) = of(nodes, "gcs_server")
    os.kill(head, signal.SIGSTOP)
    try:
        errors = done(process, code=3)
    finally:
        os.kill(head, signal.SIGCONT)
    assert errors == "fanmark: the head of the Ray cluster did not answer within 20 s\n"
    assert not (tmp_path / "there").exists()


def test_what_a_lost_node_had_is_done_again(nodes: Nodes, here: Path, tmp_path: Path) -> None:
    """The last test: the cluster has one node after it."""
    process = started(here / "s.toml", tmp_path / "there", *PLAN, "--ray", nodes.address)
    assert process.stderr is not None and process.stderr.readline().startswith("look     ")
    nodes.lose_one()
    done(process)
    assert files(tmp_path / "there") == files(here / "plan")
