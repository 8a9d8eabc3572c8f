"""What a query's latency was spent on: by hand, and by laws over runs."""

from pathlib import Path

import pytest
from two_arms import call, queries, query, tool

from fanmark.agents import topologies
from fanmark.loadgen.critical import PARTS, shares, spent_s
from fanmark.loadgen.records import read_queries
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import Options, simulate


def test_a_query_by_hand() -> None:
    chain = query(
        "debate", 0,
        [
            call(1, (1.5, 2.0, 4.0), (1, 0, 9), due_at=1.0),  # half a second late, half of prefill, two of decode
            call(2, (1.0, 1.5, 2.0), (1, 0, 9)),  # beside it and shorter: no part of the path
            tool(3, 4.25, 6.25),  # a quarter after its request
            call(4, (6.5, 7.5, 8.0), (1, 0, 9), after=[3], due_at=6.5),
        ],
        1.0, 8.5,
    )  # fmt: skip
    chain.calls[2].due_at = 4.25
    assert spent_s(chain) == {"waiting": 0.5, "prefill": 1.5, "decode": 2.5, "tools": 2.0, "client": 1.0}


def test_attempts_that_came_to_nothing_are_waited_for() -> None:
    failed = call(1, (1.0, None, 1.5), (None, None, None), error="http_429", retry_at=3.0)
    last = call(1, (3.0, 3.5, 5.0), (1, 0, 9), attempt=2)
    one = query("single", 0, [last], 1.0, 5.0, retried=[failed])
    assert spent_s(one) == {"waiting": 2.0, "prefill": 0.5, "decode": 1.5, "tools": 0.0, "client": 0.0}


def test_what_was_given_up_is_not_waited_for() -> None:
    one = query(
        "single",
        0,
        [call(1, (0.0, 1.0, 2.0), (1, 0, 9)), call(2, (0.0, None, 2.5), (None, None, None), error="cancelled")],
        0.0,
        3.0,
    )
    assert spent_s(one)["client"] == 1.0


def test_shares_add_up() -> None:
    found = shares(reduced(queries()).sums["debate"].spent_s)
    assert found is not None and sum(found.values()) == pytest.approx(1.0) and list(found) == list(PARTS)
    assert shares({}) is None


@pytest.mark.parametrize("topology", ["debate", "tool-chain", "orchestrator", "tree-of-thought"])
def test_in_virtual_time_nothing_is_the_clients(topology: str, tmp_path: Path) -> None:
    raw = {
        "arm": [{"name": "single", "topology": "single", "baseline": True}, {"name": "many", "topology": topology}],
        "workload": {"answer": {"dist": "lognormal", "mean": 30, "cv": 0.5, "min": 1}},
        "tools": {"latency_s": 0.5},
        "load": {"mode": "closed", "concurrency": 2, "queries": 2, "warmup": 0},
    }
    arms = simulate(check(raw, "x.toml", topologies()), topologies(), Options(tmp_path / "run", "test", [])).summary[
        "arms"
    ]
    for each in read_queries(tmp_path / "run"):
        parts = spent_s(each)
        assert sum(parts.values()) == pytest.approx(each.done_at - each.due_at)
        assert min(parts.values()) > -1e-9 and parts["client"] < 1e-6
        assert (parts["tools"] > 0) == (each.arm == "many" and topology in ("tool-chain", "orchestrator"))
    assert sum(arms["many"]["critical_path"].values()) == pytest.approx(1.0)
