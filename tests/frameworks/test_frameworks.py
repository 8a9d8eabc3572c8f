"""Agent frameworks as their users have them, through the tap, against the stub (`make test-frameworks`): the tap tells what the stub saw,
and each question is a query of its own, with its depth, though no framework says what belongs together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, Case, ask
from stub_process import Stub, running_stub
from tapped import through

from fanmark.loadgen.records import read_queries

pytestmark = pytest.mark.frameworks
QUESTIONS = 3
STUB = ("--time-scale", "0.2", "--scripted-tools", "--answer-tokens", "30", "--answer-cv", "0.3")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stub") / "log.jsonl"


@pytest.fixture(scope="module")
def scripted(log: Path) -> Iterator[Stub]:
    with running_stub(*STUB, "--log", str(log)) as server:
        yield server


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def size(call: dict[str, Any]) -> tuple[int, ...]:
    return call["input_tokens"], call["cached_tokens"], call["output_tokens"]


def tapped(scripted: Stub, log: Path, out: Path, case: Case, how: str, when: str) -> dict[str, Any]:
    """The summary of what a script sent through the tap, whose calls are those that the stub saw."""
    if not case.python.exists():
        pytest.fail("the framework is not installed: make test-frameworks")
    before = len(lines(log))

    async def use(url: str) -> None:
        await asyncio.to_thread(ask, case, f"{url}/v1", how, when)

    _, summary = asyncio.run(through(f"{scripted.url}/v1", out, use))
    saw, told = lines(log)[before:], [line for line in lines(out / "calls.jsonl") if line["kind"] == "call"]
    assert sorted(map(size, told)) == sorted(map(size, saw))
    assert len(saw) == QUESTIONS * case.calls
    assert summary["server"]["reconciled"] is True
    tap, depths = summary["tap"], sorted({query.resources["depth"] for query in read_queries(out)})
    print(
        f"\n{case.name}, {case.pinned()}, {how}, {when}: queries {tap['queries']}, calls {len(told)}, depth {depths}, "
        f"attributed {tap['attributed']['call']}, unattributed {tap['unattributed']}"
    )
    return summary


@pytest.mark.parametrize("when", ["apart", "together"])
@pytest.mark.parametrize("how", ["whole", "stream"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_question_is_a_query(scripted: Stub, log: Path, tmp_path: Path, case: Case, how: str, when: str) -> None:
    summary = tapped(scripted, log, tmp_path / "tap", case, how, when)
    shape = [(query.resources["calls"], query.resources["depth"]) for query in read_queries(tmp_path / "tap")]
    assert shape == QUESTIONS * [(case.calls, case.depth)]
    assert summary["tap"]["unattributed"] == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_cannot_be_told_apart_is_not_guessed(scripted: Stub, log: Path, tmp_path: Path, case: Case) -> None:
    """The same question three times at once, and the stub says the same to each: no two of them become one query."""
    tapped(scripted, log, tmp_path / "tap", case, "whole", "alike")
    assert all(query.resources["calls"] <= case.calls for query in read_queries(tmp_path / "tap"))
