"""A run that needs no more than plain http:// brings in none of the heavy packages: what is not imported costs no start and no memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIO = """name = "light"
[workload]
question = 9
system = 0
answer = 4
[[arm]]
name = "single"
topology = "single"
baseline = true
"""


@pytest.mark.real
def test_a_run_of_one_arm_over_plain_http_imports_nothing_heavy(tmp_path: Path) -> None:
    server_file, scenario = Path(__file__).with_name("plain_server.py"), tmp_path / "light.toml"
    scenario.write_text(SCENARIO)
    with subprocess.Popen([sys.executable, str(server_file), "k3y"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            flags = ["--target", server.stdout.readline().strip(), "--queries", "3", "--concurrency", "3"]
            command = [sys.executable, "-X", "importtime", "-m", "fanmark.loadgen.cli", "run", str(scenario), *flags]
            done = subprocess.run(
                [*command, "--out", str(tmp_path / "run")],
                env=os.environ | {"OPENAI_API_KEY": "k3y"},
                capture_output=True,
                text=True,
            )
        finally:
            server.kill()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "fanmark.loadgen.lanes.fast" in imported
    assert not imported & {"aiohttp", "numpy", "scipy", "prometheus_client", "mcp", "openai", "rich", "pandas"}
