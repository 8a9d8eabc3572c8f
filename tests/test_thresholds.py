"""`[[threshold]]`: judged on the summary at the end, and with `abort` on what the tally holds while the run goes on."""

import asyncio
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check, session
from fanmark.loadgen.cli import app, exit_code
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import Query, read_queries
from fanmark.loadgen.scenario import Threshold
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.thresholds import broken, judged, place_of, reader
from fanmark.loadgen.verify import verify

SCENARIO: dict[str, Any] = {
    "name": "limited",
    "seed": 3,
    "arm": [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "de.bate", "topology": "debate", "agents": 2, "rounds": 1},
    ],
    "workload": {"answer": {"dist": "lognormal", "mean": 30, "cv": 0.4, "min": 5, "max": 90}, "judge_answer": 9},
    "load": {"mode": "closed", "concurrency": 2, "queries": 30, "warmup": 1},
}


def simulated(out: Path, *thresholds: dict[str, Any], **more: Any) -> dict[str, Any]:
    raw = SCENARIO | {"threshold": list(thresholds)} | more
    scenario = scenario_check.check(raw, "limited.toml", topologies())
    return simulate(scenario, topologies(), Options(out, "0", [])).summary


Limit = st.none() | st.floats(-9, 9)


@given(Limit, Limit, st.none() | st.floats(-9, 9))
def test_a_threshold_is_met_where_the_figure_is_known_and_within(
    below: float | None, above: float | None, value: float | None
) -> None:
    summary = {"arms": {"a": {"per_query": {"calls": None if value is None else {"mean": value}}}}}
    (found,) = judged([Threshold(metric="a.per_query.calls.mean", below=below, above=above)], summary)
    inside = value is not None and (below is None or value < below) and (above is None or value > above)
    assert found["met"] == (inside or (below is None and above is None)) and found["value"] == value


def test_what_is_judged_stands_in_the_summary_the_table_and_the_exit(tmp_path: Path) -> None:
    met = {"metric": "de.bate.per_query.calls.mean", "above": 2.5, "below": 3.5}
    whole = simulated(tmp_path / "met", met, {"metric": "arms.de.bate.queries.failed", "below": 1})
    assert [each["met"] for each in whole["thresholds"]] == [True, True]
    assert [each["value"] for each in whole["thresholds"]] == [3, 0] and exit_code(whole, False) == 0
    missed = simulated(tmp_path / "missed", met, {"metric": "single.per_query.dollars.mean", "below": 9e9})
    assert missed["thresholds"][1] == {
        "metric": "single.per_query.dollars.mean", "value": None, "below": 9e9, "above": None, "met": False
    }  # fmt: skip
    assert exit_code(missed, False) == 5
    assert exit_code(missed | {"validity": missed["validity"] | {"counted": False}}, False) == 1
    assert verify(tmp_path / "missed", topologies()).differ == []


def test_the_command_says_so_and_writes_junit(tmp_path: Path) -> None:
    scenario = tmp_path / "limited.toml"
    scenario.write_text(
        '[[arm]]\nname = "a"\ntopology = "single"\nbaseline = true\n[load]\nqueries = 2\nrate = 5\n'
        '[[threshold]]\nmetric = "a.per_query.latency_s.mean"\nbelow = 0.01\n[objective]\nquery_seconds = 9\n'
    )
    flags = ["simulate", str(scenario), "--out", str(tmp_path / "run"), "--junit", str(tmp_path / "found.xml")]
    done = CliRunner().invoke(app, flags, standalone_mode=False)
    assert done.return_value == 5
    assert "MISSED   a.per_query.latency_s.mean is " in done.output and ", must be below 0.01" in done.output
    cases = {case.get("name"): case for case in ElementTree.parse(tmp_path / "found.xml").iter("testcase")}
    assert cases["threshold a.per_query.latency_s.mean"].find("failure") is not None
    assert cases["validity.steady"].find("skipped") is not None
    assert len(cases["validity.counted"].findall("failure")) == len(cases["a.objective"].findall("failure")) == 0


def test_an_abort_ends_the_run_once_there_is_enough_to_judge(tmp_path: Path) -> None:
    limit = {"metric": "de.bate.per_query.latency_s.mean", "below": 0.001, "abort": True}
    found = simulated(tmp_path / "run", limit)
    assert found["ended"]["why"] == "threshold" and found["partial"] is True and exit_code(found, False) == 5
    assert found["ended"]["reason"].endswith(" so far, must be below 0.001")
    assert 10 <= found["arms"]["de.bate"]["queries"]["completed"] < 14  # two of an arm are under way at a time
    assert verify(tmp_path / "run", topologies()).differ == []
    loose = simulated(tmp_path / "loose", limit | {"below": 1e6})
    assert loose["ended"] is None and exit_code(loose, False) == 0


def test_failures_abort_at_their_number(tmp_path: Path) -> None:
    load = SCENARIO["load"] | {"query_timeout_s": 0.01, "abort_on_errors": False}
    limit = {"metric": "single.queries.failed", "below": 3, "abort": True}
    found = simulated(tmp_path / "run", limit, load=load)
    assert found["ended"] == {"why": "threshold", "reason": "single.queries.failed is 3 so far, must be below 3"}
    assert 3 <= found["arms"]["single"]["queries"]["failed"] <= 6


def tallied(queries: list[Query]) -> Tally:
    tally = Tally({"single": "single", "de.bate": "debate"}, "single")
    for query in queries:
        if not query.warmup:
            tally.query_started(query.arm)
            for call in query.calls:
                tally.call_started(call)
                tally.call_finished(call)
            tally.query_finished(query)
    return tally


def test_what_is_known_so_far_is_at_the_end_what_the_summary_says(tmp_path: Path) -> None:
    summary = simulated(tmp_path / "run")
    queries = list(read_queries(tmp_path / "run"))
    tally, few = tallied(queries), tallied(queries[:9])
    metrics = [
        *(f"{arm}.per_query.{name}.mean" for arm in tally.arms for name in ("calls", "fresh_tokens", "latency_s")),
        *(f"de.bate.amplification.{name}.ratio" for name in ("calls", "output_tokens", "latency_s")),
        *(f"{arm}.{part}.p50" for arm in tally.arms for part in ("per_query.latency_s", "per_call.ttft_s")),
        "single.per_query.latency_s.p90",
        "single.queries.failed",
    ]
    for metric in metrics:
        place = place_of(metric, tally.arms)
        read = reader(place, "single")
        assert read is not None
        (found,) = judged([Threshold(metric=metric)], summary)
        assert read(tally) == pytest.approx(found["value"], rel=0.15 if ".p" in metric.replace(".per", "") else 1e-9)
        if "queries" not in metric:
            assert read(few) is None  # too few to judge
            limit = Threshold(metric=metric, above=1e9, abort=True)
            assert broken([limit], few) is None and metric in (broken([limit], tally) or "")


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        ({"metric": "de.bate.per_query.latency_s.p90"}, "give below = N, above = N, or both"),
        ({"metric": "x.per_query.latency_s.p90", "below": 1}, "no such figure"),
        ({"metric": "single", "below": 1}, "no such figure"),
        ({"metric": "single.per_quer.latency_s.p90", "below": 1}, "did you mean 'per_query'"),
        ({"metric": "single.per_query.latency_s", "below": 1}, "must end in a figure, such as per_query.calls.mean"),
        ({"metric": "single.per_query.latency.p90", "below": 1}, "did you mean 'latency_s'"),
        ({"metric": "single.per_query.latency_s.p95", "below": 1}, "there is no 'p95' in per_query"),
        ({"metric": "client.loop_lag_s.p99", "below": 1, "abort": True}, "abort can be given with ARM.per_query"),
        ({"metric": "single.amplification.calls.ratio", "below": 1, "abort": True}, "is known at the end only"),
        ({"metric": "single.per_call.itl_s.p99", "below": 1, "abort": True}, "is known at the end only"),
        ({"metric": "single.queries.failed", "above": 1, "abort": True}, "is known at the end only"),
        ({"metric": "single.queries.failed", "above": 2, "below": 1}, "nothing is between them"),
        ({"metric": "single.queries.failed", "belo": 2}, "belo"),
    ],
)
def test_a_threshold_that_cannot_be_judged_is_refused(threshold: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        scenario_check.check(SCENARIO | {"threshold": [threshold]}, "limited.toml", topologies())
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_workers_cannot_abort(tmp_path: Path) -> None:
    limit = {"metric": "single.queries.failed", "below": 3, "abort": True}
    scenario = scenario_check.check(SCENARIO | {"threshold": [limit]}, "limited.toml", topologies())
    options = session.Options(tmp_path / "run", 0, "x", "test", [], None, 2)
    with pytest.raises(ScenarioError, match="each worker sees only its own queries"):
        asyncio.run(session.run(scenario, topologies(), options))
