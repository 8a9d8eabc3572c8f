"""`fanmark compare`: two runs of one scenario side by side, what is refused, and what fails a gate."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.cli import app
from fanmark.loadgen.compare import Gate, RunRead, compare, gate_of, judge, lines, read, verdict
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.junit import Case, document
from fanmark.loadgen.simulate import Options, simulate, with_profile
from fanmark.loadgen.statistics import paired_ratio, resampled

SCENARIO: dict[str, Any] = {
    "name": "compared",
    "seed": 3,
    "arm": [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", "agents": 2, "rounds": 1},
    ],
    "workload": {"answer": {"dist": "lognormal", "mean": 30, "cv": 0.4, "min": 5, "max": 90}, "judge_answer": 9},
    "load": {"mode": "closed", "concurrency": 2, "queries": 4, "warmup": 0, "repeats": 5},
}
SLOW = "qwen3-32b@h100"
RUNS: dict[str, tuple[dict[str, Any], str | None]] = {
    "first": ({}, None),
    "again": ({}, None),
    "slow": ({"name": "another name"}, SLOW),
    "seed": ({"seed": 4}, None),
    "longer": ({"workload": {"answer": 60, "judge_answer": 9}}, None),
    "fewer": ({"arm": SCENARIO["arm"][:1], "load": SCENARIO["load"] | {"repeats": 1}}, None),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("compared")
    for name, (more, profile) in RUNS.items():
        scenario = scenario_check.check(SCENARIO | more, "compared.toml", topologies())
        if profile is not None:
            scenario = with_profile(scenario, profile)
        simulate(scenario, topologies(), Options(out / name, "0", []))
    return {name: str(out / name) for name in RUNS}


@pytest.fixture(scope="module")
def runs(folders: dict[str, str]) -> dict[str, RunRead]:
    return {name: read(Path(folder), topologies()) for name, folder in folders.items()}


def test_a_run_against_its_twin_shows_no_difference(runs: dict[str, RunRead]) -> None:
    found = compare(runs["first"], runs["again"], force=False)
    assert found["differ"] == {} and found["paired"] is True
    for arm in found["arms"].values():
        for part in ("per_query", "amplification"):
            for figure in arm[part].values():
                assert figure["ratio"] in (None, pytest.approx(1.0)) and figure["first"] == figure["second"]
                assert figure["verdict"] == "no difference shown" or figure["ratio"] is None


def test_a_slower_server_is_worse_in_times_alone(runs: dict[str, RunRead]) -> None:
    found = compare(runs["first"], runs["slow"], force=False)
    assert found["differ"] == {"stub.profile": ["qwen3-30b-a3b@h100", SLOW]}
    for name, arm in found["arms"].items():
        latency, calls = arm["per_query"]["latency_s"], arm["per_query"]["calls"]
        means = [runs[run].summary["arms"][name]["per_query"]["latency_s"]["mean"] for run in ("first", "slow")]
        assert latency["verdict"] == "worse" and latency["method"] == "t over 5 repeats"
        assert latency["ratio"] == pytest.approx(means[1] / means[0]) and 1 < latency["low"] < latency["ratio"]
        assert (calls["ratio"], calls["low"], calls["high"], calls["verdict"]) == (1, 1, 1, "no difference shown")
    single, debate = found["arms"]["single"], found["arms"]["debate"]
    assert single["amplification"] == {}
    amplified = debate["amplification"]["latency_s"]
    assert amplified["method"] == "t over 5 repeats" and amplified["low"] < amplified["ratio"] < amplified["high"]
    ratios = [debate["per_query"]["latency_s"]["ratio"], single["per_query"]["latency_s"]["ratio"]]
    assert amplified["ratio"] == pytest.approx(ratios[0] / ratios[1])
    said = lines(found)
    own = said[said.index("against the baseline") :]  # the debate alone has one
    cells = next(line.split() for line in own if line.startswith("latency_s"))
    was, now = (runs[run].summary["arms"]["debate"]["amplification"]["latency_s"]["ratio"] for run in ("first", "slow"))
    assert cells[1:4] == [f"{was:.2f}x", f"{now:.2f}x", f"{amplified['ratio']:.2f}x"]


def test_other_seeds_are_told_and_not_paired(runs: dict[str, RunRead]) -> None:
    found = compare(runs["first"], runs["seed"], force=False)
    assert found["differ"] == {"seed": [3, 4]} and found["paired"] is False
    tokens = found["arms"]["debate"]["per_query"]["output_tokens"]
    assert tokens["low"] < 1 < tokens["high"] and tokens["verdict"] == "no difference shown"


def test_another_scenario_is_refused_in_one_line_unless_forced(runs: dict[str, RunRead]) -> None:
    with pytest.raises(ScenarioError) as refused:
        compare(runs["first"], runs["longer"], force=False)
    assert "workload.answer = 60 ({ " in str(refused.value) and "\n" not in str(refused.value)
    found = compare(runs["first"], runs["longer"], force=True)
    assert found["arms"]["single"]["per_query"]["output_tokens"]["verdict"] == "worse"
    assert found["paired"] is False
    with pytest.raises(ScenarioError, match=r"load\.repeats = 1 \(5\), arm\.debate = not given \("):
        compare(runs["first"], runs["fewer"], force=False)
    fewer = compare(runs["first"], runs["fewer"], force=True)
    assert list(fewer["arms"]) == ["single"]
    assert fewer["arms"]["single"]["per_query"]["latency_s"]["low"] is None  # one run has one repeat
    case = judge(gate_of("debate.per_query.calls > 1%", ["single", "debate"]), fewer)
    assert (case.outcome, case.said) == ("skipped", "cannot be judged: is not known")


def test_the_command_judges_prints_and_writes(folders: dict[str, str], tmp_path: Path) -> None:
    def fanmark(*more: str) -> Any:
        return CliRunner().invoke(app, ["compare", folders["first"], *more], standalone_mode=False)

    missed = [folders["slow"], "--fail-if", "debate.per_query.latency_s > +5%"]
    gates = ["--fail-if", "debate.amplification.fresh_tokens > +5%", "--junit", str(tmp_path / "found.xml")]
    done = fanmark(*missed, *gates)
    assert done.return_value == 5
    assert "failed   " in done.output and "passed   " in done.output and "worse\n" in done.output
    suite = ElementTree.parse(tmp_path / "found.xml").getroot()[0]
    assert [suite.get(key) for key in ("tests", "failures", "skipped")] == ["2", "1", "0"]
    told = json.loads(fanmark(*missed, "--json").output)
    assert told["schema"] == "fanmark.compare/1" and told["gates"][0]["outcome"] == "failed"
    assert fanmark(folders["again"], *gates).return_value == 0
    assert "paired   no" in fanmark(folders["seed"], folders["again"]).output
    assert isinstance(fanmark().exception, ScenarioError)


@pytest.mark.parametrize(
    "text", ["debate.calls > 5%", "debate.per_query.calls > 5", "x.per_query.calls > 5%", "debate.per_query.x < 5%", ""]
)
def test_a_gate_that_cannot_be_judged_is_refused(text: str) -> None:
    with pytest.raises(ScenarioError, match="--fail-if"):
        gate_of(text, ["debate"])


Interval = st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)).map(sorted)


@given(Interval, st.floats(0.1, 3), st.booleans())
def test_a_gate_fails_only_where_the_whole_interval_is_beyond(interval: list[float], bound: float, over: bool) -> None:
    low, high = interval
    figure = {"ratio": low, "low": low, "high": high, "method": "m"}
    comparison = {"runs": [{}, {"folder": "f"}], "arms": {"a": {"per_query": {"calls": figure}}}}
    found = judge(Gate("t", "a", "per_query", "calls", over, bound), comparison)
    beyond = all(x > bound if over else x < bound for x in interval)
    assert found.outcome == ("failed" if beyond else "passed")
    said = verdict("calls", figure)
    assert (said == "worse") == (low > 1 + 1e-9) and (said == "better") == (high < 1 - 1e-9)
    assert verdict("width", figure) in ("higher", "lower", "no difference shown")


Values = st.lists(st.floats(1, 9), min_size=3, max_size=8)


@given(Values, Values)
def test_what_cancels_leaves_the_ratio(own: list[float], base: list[float]) -> None:
    """A factor that stands above and below changes nothing."""
    a, b = dict(enumerate(own)), dict(enumerate(base))
    plain, same = paired_ratio(a, b, 1), resampled([a, b], [b, b], 1)
    assert plain is not None and same is not None
    if a != b:
        assert [plain["low"], plain["high"]] == pytest.approx(list(same))


@given(st.lists(st.tuples(st.sampled_from(["passed", "failed", "skipped"]), st.text()), max_size=6))
def test_junit_is_xml_whatever_is_said(found: list[tuple[Any, str]]) -> None:
    cases = [Case(text, outcome, text) for outcome, text in found]
    root = ElementTree.fromstring(document("suite", cases))
    assert len(root[0]) == len(cases) == int(root.attrib["tests"])
    assert int(root.attrib["failures"]) == len(root.findall(".//failure"))
