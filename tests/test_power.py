"""Energy at the meter: a DCGM exporter's text, and a run that reads one; without NVML it is said what to do."""

import importlib.util
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_run import run_json

from fanmark.loadgen.cost_part import measured_joules
from fanmark.loadgen.errors import UnreachableError
from fanmark.loadgen.power import nvml, parse_dcgm
from fanmark.loadgen.samples import Sample, ServerSample, with_power

WATTS = 250.0
EXPORTED = """# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).
# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H100"} 71.5
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-b",device="nvidia1",modelName="NVIDIA H100"} 100
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-a"} 5000000
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="1",UUID="GPU-b"} 1.5e6
DCGM_FI_DEV_GPU_UTIL{gpu="0"} 99
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (EXPORTED, {"watts": 171.5, "joules": 6500.0}),
        ("DCGM_FI_DEV_POWER_USAGE 80\n", {"watts": 80.0}),
        ('DCGM_FI_DEV_POWER_USAGE{gpu="0"} NaN\nDCGM_FI_DEV_POWER_USAGE{gpu="1"} no\n', {}),
        ("node_cpu_seconds_total 5\n", {}),
        ("", {}),
    ],
)
def test_what_an_exporter_tells(text: str, told: dict[str, float]) -> None:
    assert parse_dcgm(text) == told


def test_without_nvml_it_is_said_what_to_do() -> None:
    if importlib.util.find_spec("pynvml") is not None:
        pytest.skip("nvidia-ml-py is installed")
    with pytest.raises(UnreachableError, match="nvidia-ml-py is not installed"):
        nvml()


def sample(at: float, joules: float | None) -> Sample:
    return Sample(at, {"default": None if joules is None else ServerSample(joules=joules)}, {})


def test_an_arms_energy_is_that_of_its_time_over_its_queries() -> None:
    told = [sample(at, 1000.0 + 200.0 * at) for at in range(40)]
    assert measured_joules(told, [(10.0, 20.0)], ["default"], 8) == pytest.approx(200.0 * 10 / 8)
    assert measured_joules(told, [(5.0, 10.0), (20.0, 30.0)], ["default"], 5) == pytest.approx(200.0 * 15 / 5)
    silent = [sample(at, None) for at in range(40)]
    assert measured_joules(silent, [(10.0, 20.0)], ["default"], 8) is None
    assert measured_joules(told, [(10.0, 20.0)], ["default", "other"], 8) is None
    assert measured_joules(told, [(10.0, 20.0)], ["default"], 0) is None


def test_a_sample_counts_joules_from_the_runs_start() -> None:
    told = with_power(None, {"joules": 100.0, "watts": 70.0}, {"joules": 400.0, "watts": 300.0})
    assert told == ServerSample(joules=300.0, watts=300.0)
    assert with_power(None, {}, {}) is None
    assert with_power(ServerSample(running=1.0), {}, {"watts": 5.0}) == ServerSample(running=1.0, watts=5.0)


@pytest.fixture
def exporter() -> Iterator[str]:
    """Two GPUs that draw WATTS together, all the time."""
    began = time.monotonic()

    class Exporter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            joules = WATTS * (time.monotonic() - began)
            lines = [f'DCGM_FI_DEV_POWER_USAGE{{gpu="{i}"}} {WATTS / 2}' for i in range(2)]
            lines += [f'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="{i}"}} {joules * 500}' for i in range(2)]
            body = "\n".join(lines).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Exporter) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        server.shutdown()
        thread.join()


@pytest.mark.real
def test_a_run_reads_the_meter(tmp_path: Path, stub_url: str, exporter: str) -> None:
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        f'[target]\nurl = "{stub_url}/v1"\npower_url = "{exporter}"\n'
        '[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n'
        "[load]\nrate = 4\nqueries = 12\nwarmup = 0\n[workload]\nanswer = 40\n"
    )
    found = run_json(tmp_path / "out", str(scenario))
    arm = found["arms"]["single"]
    assert found["server"]["idle_w"] == WATTS
    cost = arm["cost"]
    seconds = arm["window"]["end_at"] - arm["window"]["start_at"]
    # The stub tells joules of its own beside the meter's; the meter's stand
    assert cost["measured_joules"]["value"] == pytest.approx(WATTS * seconds / 12, rel=0.1)
