"""A user's own topology: the page's example runs as it is printed, and mistakes in the file are one line."""

import re
from pathlib import Path

import pytest

from fanmark.agents import topologies
from fanmark.agents.runtime import Topology
from fanmark.loadgen import scenario_check
from fanmark.loadgen.dry_run import plan
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.user_topology import with_users

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-topology.md"
SINGLE = '[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n'
LOAD = "[load]\nqueries = 2\n[workload]\nsystem = 30\nquestion = 20\nanswer = 10\ninstruction = 15\n"


def checked(folder: Path, arm: str) -> tuple[Scenario, dict[str, Topology]]:
    (folder / "own.toml").write_text(f"{SINGLE}{arm}\n{LOAD}")
    raw, source = scenario_check.read(str(folder / "own.toml"))
    table = with_users(raw, source, topologies())
    return scenario_check.check(raw, source, table), table


def planned(folder: Path, arm: str) -> dict[str, int]:
    found: dict[str, int] = plan(*checked(folder, arm))["vote"]
    return found


def test_the_example_of_the_page(tmp_path: Path) -> None:
    toml, code, *_ = re.findall(r"```(?:toml|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "vote.py").write_text(code)
    assert len(code.strip().splitlines()) <= 25
    arm = planned(tmp_path, toml)
    # 4 calls a query: 4 x (30 + 20) + 3 x 10 + 15 read, 4 x 10 written
    assert (arm["calls"], arm["input_tokens"], arm["output_tokens"]) == (8, 2 * 245, 2 * 40)
    assert arm["longest_context_tokens"] == 30 + 20 + 3 * 10 + 15 + 10
    run = simulate(*checked(tmp_path, toml), Options(tmp_path / "run", "test", [])).summary["arms"]["vote"]
    assert run["expected"]["mismatches"] == 0 and run["queries"]["completed"] == 2 and run["params"] == {"voters": 3}
    assert [run["per_query"][name]["mean"] for name in ("calls", "input_tokens", "depth", "width")] == [4, 245, 2, 3]


def test_without_params_and_closed_form(tmp_path: Path) -> None:
    code = "async def run(rt, p):\n    await rt.infer([rt.question] * p.times, writes=('answer',), role='a')\n"
    (tmp_path / "own.py").write_text(code)
    arm = planned(tmp_path, '[[arm]]\nname = "vote"\ntopology = "own.py:run"\ntimes = 2\n')
    assert arm["calls"] is None
    own = '[[arm]]\nname = "vote"\ntopology = "own.py:run"\ntimes = 3\n'
    summary = simulate(*checked(tmp_path, own), Options(tmp_path / "run", "test", [])).summary
    assert summary["arms"]["vote"]["per_query"]["input_tokens"]["mean"] == 3 * 20
    assert summary["validity"]["reasons"]["counted"] == "2 queries equal their closed form; vote has no closed form"


def test_what_a_topology_raises_is_its_queries_outcome(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("async def run(rt, p):\n    raise ValueError('no such\\nthing')\n")
    own = '[[arm]]\nname = "vote"\ntopology = "own.py:run"\n'
    arms = simulate(*checked(tmp_path, own), Options(tmp_path / "run", "test", [])).summary["arms"]
    assert (arms["vote"]["queries"]["failed"], arms["single"]["queries"]["completed"]) == (2, 2)


@pytest.mark.parametrize(
    ("code", "named", "said"),
    [
        (None, "own.py:run", "there is no file"),
        ("import no_such_module_at_all", "own.py:run", "fails to import: ModuleNotFoundError: No module named"),
        ("def run(rt, p): ...", "own.py:run", "has no async function 'run', but none"),
        ("async def go(rt, p): ...", "own.py:run", "has no async function 'run', but go"),
    ],
)
def test_mistakes(tmp_path: Path, code: str | None, named: str, said: str) -> None:
    if code is not None:
        (tmp_path / "own.py").write_text(code)
    with pytest.raises(ScenarioError, match=re.escape(said)) as error:
        planned(tmp_path, f'[[arm]]\nname = "vote"\ntopology = "{named}"\n')
    assert "\n" not in str(error.value)
    assert "own.toml: topology = 'own.py:run'" in str(error.value)
