"""A connection is a file: many streams need a limit that allows them."""

import subprocess
import sys

import pytest


def with_limits(soft: int, hard: int, count: int) -> str:
    """What becomes of the limits, in a process of its own."""
    code = (
        "import resource, sys\n"
        "from fanmark.loadgen.errors import ScenarioError\n"
        "from fanmark.loadgen.execute import allow_connections\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "try:\n"
        f"    allow_connections({count})\n"
        "    print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "except ScenarioError as e:\n"
        "    print(e)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("count", "found"), [(100, "(512, 512)"), (448, "(512, 512)")])
def test_the_limit_is_lifted_as_far_as_it_goes(count: int, found: str) -> None:
    assert with_limits(128, 512, count) == found


def test_more_connections_than_the_system_allows_are_refused() -> None:
    said = with_limits(128, 512, 5000)
    assert said.startswith(
        "5,000 queries at a time need as many connections, but the system allows 512 open files: raise"
    )
