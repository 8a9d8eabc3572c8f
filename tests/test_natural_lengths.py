"""`lengths = "natural"`: replies end by themselves, and what was said of their length is a bound."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from stub_process import running_stub

from fanmark.agents import topologies
from fanmark.loadgen import session, table
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.reduced import Reduced
from fanmark.loadgen.results import assemble
from fanmark.loadgen.scenario_check import check

ARMS = [
    {"name": "single", "topology": "single", "baseline": True},
    {"name": "debate", "topology": "debate", "agents": 3, "rounds": 2},
    {"name": "again", "topology": "reflection", "rounds": 2},
]
WORKLOAD = {"system": 40, "question": 60, "answer": 24, "judge_answer": 24, "critique": 24, "lengths": "natural"}
CAP = 24


@pytest.mark.real
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_replies_that_end_early_are_counted_as_they_came(tmp_path: Path, api: str) -> None:
    with running_stub("--time-scale", "0.05", "--answer-tokens", "12", "--answer-cv", "0.8") as server:
        raw: dict[str, Any] = {
            "arm": ARMS,
            "workload": WORKLOAD,
            "load": {"mode": "closed", "concurrency": 2, "queries": 4, "warmup": 0},
            "target": {"url": f"{server.url}/v1", "api": api},
        }
        options = session.Options(tmp_path / "run", 0, "natural", "test", [], None)
        found = asyncio.run(session.run(check(raw, "f.toml", topologies()), topologies(), options)).summary
    validity = found["validity"]
    assert (validity["counted"], validity["reconciled"], validity["uncontaminated"]) == (True, True, True)
    queries = list(read_queries(tmp_path / "run"))
    calls = [call for query in queries for call in query.calls]
    assert {call.finish for call in calls} == {"stop", "length"}  # some end early, some at the cap
    assert all(0 < (call.output_tokens or 0) <= CAP for call in calls)
    assert all((call.output_tokens == CAP) or call.finish == "stop" for call in calls)
    for query in queries:
        assert query.resources["input_tokens"] == query.expected["input_tokens"]
        assert query.expected["output_tokens"] == CAP * len(query.calls)
    assert sum(query.resources["output_tokens"] or 0 for query in queries) < CAP * len(calls)
    for arm in found["arms"].values():
        assert (arm["expected"]["output_at_most"], arm["expected"]["at_most"]) == (True, False)
    said = table.lines(found)
    assert (
        'note     lengths = "natural": replies end by themselves, so that the expected output tokens are a bound'
        in said
    )
    assert sum(f"<= {CAP * n} / " in line for line in said for n in (1, 5, 7)) == 3


@pytest.mark.parametrize(
    ("lengths", "acceptance", "noted"),
    [
        ("forced", 0.625, True),
        ("forced", 0.0, True),  # it guesses, and wrong
        ("forced", None, False),  # it guesses nothing
        ("natural", 0.625, False),
    ],
)
def test_forced_lengths_are_called_degenerate_where_tokens_are_guessed(
    lengths: str, acceptance: float | None, noted: bool
) -> None:
    scenario = check({"arm": ARMS, "workload": WORKLOAD | {"lengths": lengths}}, "f.toml", topologies())
    server = {"reconciled": True, "alone": True, "reason": "", "alone_reason": "", "draft_acceptance": acceptance}
    server["draft_tokens"] = {"client": None, "server": 800.0, "off_pct": None}
    client = {"verdict": "ok", "reasons": [], "loop_lag_s": None, "cpu_s": None}
    found = assemble(
        scenario, Reduced(), {}, server, lambda _: client, {"seconds": 0.0, "clock": "real"}, ending=None
    )  # fmt: skip
    said = [line for line in table.lines(found) if "degenerate" in line]
    assert len(said) == noted and all(f"({acceptance:.1%} of them accepted)" in line for line in said)
    guessed = [line for line in table.lines(found) if "guessed ahead 800 tokens" in line]
    assert len(guessed) == (acceptance is not None)
