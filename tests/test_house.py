"""The rules of the house: who may import whom, and how large a thing may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("agents", "servers", "loadgen")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
COMMAND_LINE = {path.name for path in FILES if path.name.startswith("cli")}


def imports(path: Path) -> set[str]:
    """All modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("fanmark.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_to_its_room_and_size(path: Path) -> None:
    room, names = path.relative_to(ROOT).parts[0], imports(path)
    tops = {name.split(".")[0] for name in names}
    assert not tops & set(ROOMS), "rooms are imported as fanmark.<room>"
    if room == "agents":
        assert rooms(path) <= {"agents"}
        assert tops <= set(sys.stdlib_module_names) | {"fanmark"}
    if room == "servers":
        assert rooms(path) <= {"servers"}
    if "engine" in path.parts:
        assert tops <= (set(sys.stdlib_module_names) - {"asyncio", "time", "os", "pathlib", "socket"}) | {"fanmark"}
    if path.name not in COMMAND_LINE:
        assert not any(name.startswith(("fanmark.loadgen.cli", "typer")) for name in names)
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_importing_does_nothing_heavy() -> None:
    """Help needs neither numpy nor an HTTP client nor an SDK."""
    code = (
        "import sys; from fanmark.loadgen import cli; from fanmark.agents import topologies; topologies()\n"
        "print(sorted({'numpy', 'scipy', 'aiohttp', 'mcp', 'openai', 'prometheus_client', 'ray', 'uvloop'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_ray_is_imported_in_one_file_and_in_no_modules_head() -> None:
    """So only where a cluster is asked for."""
    assert [path.name for path in FILES if "ray" in {name.split(".")[0] for name in imports(path)}] == [
        "ray_cluster.py"
    ]
    tree = ast.parse((ROOT / "loadgen" / "ray_cluster.py").read_text())
    heads = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("ray" in ast.unparse(node).split() for node in heads)


def test_what_decides_a_figure_is_read_in_an_hour() -> None:
    """The files of docs/reading.md are there, and those of its table have as many lines as one reads in that time."""
    text = (ROOT / "docs" / "reading.md").read_text()
    named = re.findall(r"\w+(?:/\w+)+\.py", text)
    assert [name for name in named if not (ROOT / name).is_file()] == []
    table = {
        name for line in text.splitlines() if line.startswith("|") for name in re.findall(r"\w+(?:/\w+)+\.py", line)
    }
    assert sum(len((ROOT / name).read_text().splitlines()) for name in table) <= 3_400


def test_the_project_speaks_of_itself_alone() -> None:
    """No machine's path and no registry's host in a file that is kept."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert len(listed) > 50
    words = ["/wo" + "rk/", "py" + "pi.org", "npmjs" + ".org", "../sha" + "red"]
    for name in listed:
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            text = path.read_text(errors="replace")
            assert not [word for word in words if word in text], name
