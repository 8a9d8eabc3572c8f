"""Break-even: net demand against known capacity seconds, where it crosses 1, and the command on a model set against itself."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fanmark.loadgen.break_even import break_even, demand, lines
from fanmark.loadgen.cli import app
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.ranges import axis_of
from fanmark.loadgen.report.break_even_page import page

Seconds = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(Seconds, Seconds, Seconds), min_size=1, max_size=6))
def test_net_demand_is_the_multiplier_over_the_efficiency(told: list[tuple[float, float, float]]) -> None:
    arm, base, old = zip(*told, strict=True)
    found = demand(3.0, arm, base, old)
    assert found.demand == pytest.approx(found.multiplier / found.efficiency, rel=1e-9)
    if len(told) > 1:
        assert found.low is not None and found.high is not None
        assert found.low <= found.demand * (1 + 1e-9) and found.high >= found.demand * (1 - 1e-9)


def test_five_times_as_efficient_and_as_many_sub_queries_cross_at_five() -> None:
    """Each sub-query costs what a single pass does, with 1 % of noise over seeds; the new model takes a fifth of the old one's time."""

    def seconds(x: float, profile: str, arm: str, seed: int) -> float:
        noise = 1 + 0.01 * (seed - 1)
        return (5.0 if profile == "old" else 1.0) * (x * noise if arm == "chain" else 1.0)

    axis = axis_of("arm.chain.tool_calls", "1:50", "--over")
    assert axis is not None
    found = break_even(axis, "chain", "single", ("old", "new"), 3, seconds)
    (crossing,) = found["crossings"]
    assert crossing["x"] == pytest.approx(5.0, rel=0.01) and crossing["rising"]
    assert crossing["between"][0] <= 5 <= crossing["between"][1]
    assert [each["efficiency"] for each in found["points"]] == pytest.approx([5.0] * len(found["points"]))
    by_x = {each["x"]: each["demand"] for each in found["points"]}
    assert by_x[1] == pytest.approx(0.2, rel=1e-3) and by_x[50] == pytest.approx(10.0, rel=1e-3)
    said = lines(found)
    assert said[0].startswith("new in place of old stops paying at arm.chain.tool_calls = 5")
    shown = page(found)
    assert "D = 1 at 5" in shown and "<script" not in shown
    ends = crossing["interval"]
    assert ends[0] < 5 < ends[1] and shown.count('class="band c0"') == 1
    style = shown[shown.index("<style>") : shown.index("</style>")]
    drawn = {
        word
        for each in re.findall(r'<(?:line|rect|polyline|text)[^>]* class="([^"]+)"', shown)
        for word in each.split()
    }
    assert [word for word in drawn if not re.search(rf"\.{word}\b", style)] == ["d0"]  # the first curve has no dashes


@pytest.mark.slow
def test_a_model_against_itself_is_as_efficient_and_twice_the_answer_costs_more(tmp_path: Path) -> None:
    scenario = tmp_path / "small.toml"
    scenario.write_text(
        '[workload]\nsystem = 0\nquestion = 2000\nanswer = 100\n[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n'
        '[[arm]]\nname = "many"\ntopology = "self-consistency"\n[objective]\nquery_seconds = 6\n'
    )
    flags = ["break-even", str(scenario), "--old", "qwen3-32b@h100", "--new", "qwen3-32b@h100", "--seeds", "2"]
    flags += ["--over", "arm.many.samples=1,4", "--json", "--out", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, flags, standalone_mode=False)
    assert done.exception is None
    found = json.loads(done.stdout)
    one, four = found["points"]
    assert one["efficiency"] == four["efficiency"] == 1.0
    assert one["demand"] == pytest.approx(1.0, rel=0.05)  # one sample is a single pass
    assert 1.5 < four["demand"] < 4  # the prompt is read once, and decoding four at once is not four times the work
    assert math.isclose(four["demand"], four["multiplier"], rel_tol=1e-9)
    assert "Net demand D" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--over", "arm.chain.tool_calls=5"], "one value makes no fan-out"),
        (["--over", "arm.chain.tool_calls=1:5", "--arm", "single"], "--arm single: must be one of chain"),
        (["--over", "arm.chain.toolcalls=1:5"], "unknown key 'toolcalls'"),
    ],
)
def test_mistakes_are_told_in_one_line(flags: list[str], said: str) -> None:
    given = ["break-even", "--old", "qwen3-32b@h100", "--new", "qwen3-32b@h100", *flags]
    with pytest.raises(ScenarioError, match=said):
        CliRunner().invoke(app, given, standalone_mode=False, catch_exceptions=False)
