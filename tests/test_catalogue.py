"""`fanmark topologies`: the counts are the closed forms', the text is readable, a name that is not there is refused."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from fanmark.agents import topologies
from fanmark.agents.presets import presets
from fanmark.loadgen.catalogue import catalogue, lines, long_lines
from fanmark.loadgen.cli import app
from fanmark.loadgen.errors import ScenarioError

TABLE = topologies()
SCHEMAS = 1000


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return catalogue(TABLE, SCHEMAS)


def test_everything_is_listed(found: dict[str, Any]) -> None:
    assert list(found["topologies"]) == list(TABLE) and list(found["presets"]) == list(presets())
    for entry in found["topologies"].values():
        assert entry["summary"] and ("-->" in entry["sketch"] or "==>" in entry["sketch"])
    for name, entry in found["presets"].items():
        assert entry["source"] and entry["topology"] in TABLE
        assert (entry["claim"] is None) == (presets()[name].claim is None)
    json.dumps(found, allow_nan=False)


# calls, tool calls, input, fresh, fresh where siblings share nothing, output, depth, width
BY_HAND: dict[str, tuple[int, ...]] = {
    "single": (1, 0, 500, 500, 500, 200, 1, 1),
    "self-consistency": (5, 0, 2500, 500, 2500, 1000, 1, 5),
    # the judge finds S and Q whatever its siblings did; round 2 finds S and Q
    "debate": (9, 0, 8860, 580 + 920 + 840, 4 * 520 + 4 * 860 + 840, 1900, 3, 4),
    "tool-chain": (13, 12, 13 * 1500 + 78 * 360, 1500 + 12 * 300, 1500 + 12 * 300, 920, 13, 1),
    "moa-lite": (7, 0, 6 * 500 + 1740, 500 + 1240, 3000 + 1240, 1400, 2, 6),
    "tools-only": (0, 12, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize(("name", "counts"), BY_HAND.items())
def test_costs_by_hand(found: dict[str, Any], name: str, counts: tuple[int, ...]) -> None:
    entry = {**found["topologies"], **found["presets"]}[name]
    keys = (
        "calls",
        "tool_calls",
        "input_tokens",
        "fresh_tokens",
        "fresh_tokens_together",
        "output_tokens",
        "depth",
        "width",
    )
    assert tuple(entry["per_query"][key] for key in keys) == counts
    assert entry["amplification"] == {
        "calls": counts[0],
        "input_tokens": counts[2] / 500,
        "fresh_tokens": counts[3] / 500,
        "output_tokens": counts[5] / 200,
    }


def test_a_preset_is_set_against_a_single_pass_of_its_own_lengths(found: dict[str, Any]) -> None:
    """du-debate has no system message: 3 x Q, then 3 x (Q + O + F + 2 O), against Q."""
    entry = found["presets"]["du-debate"]
    assert entry["amplification"]["input_tokens"] == (3 * 200 + 3 * (200 + 200 + 240 + 400)) / 200


def test_what_is_drawn_is_told_as_its_mean(found: dict[str, Any]) -> None:
    entry = found["presets"]["tools-10-50"]
    assert entry["per_query"]["tool_calls"] == pytest.approx(30, abs=2)
    assert entry["per_query"]["calls"] == entry["per_query"]["tool_calls"] + 1
    measured = entry["claim"]["measured"]
    assert measured["calls"] == {"value": entry["per_query"]["calls"], "is": "within"}


def test_the_list_fits_a_terminal(found: dict[str, Any]) -> None:
    told = lines(found)
    assert max(map(len, told)) <= 80
    text = "\n".join(told)
    for name in (*TABLE, *presets()):
        assert f"\n{name}: " in text
    assert "    claim under test: a query costs 1.5 to 2.5 times a single pass, not 4 times" in told


@pytest.mark.parametrize("name", [*TABLE, *presets()])
def test_all_about_one(found: dict[str, Any], name: str) -> None:
    told = long_lines(name, TABLE, SCHEMAS)
    assert max(map(len, told)) <= 80
    text = "\n".join(told)
    entry = {**found["topologies"], **found["presets"]}[name]
    topology = TABLE[entry.get("topology", name)]
    assert (
        " ".join(told).replace("   ", " ").startswith(f"{name}: {entry['summary']} ")
        and f"    {topology.sketch}" in told
    )
    for param in found["topologies"][topology.name]["params"]:
        assert f"\n  {param} " in text
    if name in presets():
        assert "source: " in text and f"a preset of {topology.name}:" in told


def test_calls_are_told_by_depth() -> None:
    told = long_lines("debate", TABLE, SCHEMAS)
    at = told.index("depth  calls  input each  fresh  together  output each                  by")
    assert told[at + 1 : at + 4] == [
        "1          4         520    580     2,080          200  agent-1 .. agent-4",
        "2          4       1,360    920     3,440          200  agent-1 .. agent-4",
        "3          1       1,340    840       840          300               judge",
    ]


def test_the_command(found: dict[str, Any]) -> None:
    runner = CliRunner()
    one = runner.invoke(app, ["topologies", "panel", "--json"])
    assert one.exit_code == 0 and json.loads(one.stdout)["per_query"] == found["topologies"]["panel"]["per_query"]
    wrong = runner.invoke(app, ["topologies", "nothing"])
    assert isinstance(wrong.exception, ScenarioError)
    assert str(wrong.exception).startswith("there is no topology or preset 'nothing': there are single, reasoning,")
