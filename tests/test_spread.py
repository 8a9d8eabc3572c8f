"""The spread of a simulation over seeds."""

import subprocess
import sys
from pathlib import Path

import pytest

from fanmark.loadgen.spread import lines, spread


def _summary(latency_s: float, ttft_s: float | None) -> dict[str, object]:
    per_call = {"ttft_s": None if ttft_s is None else {"mean": ttft_s}, "tpot_s": None}
    return {
        "arms": {"a": {"per_query": {"latency_s": {"mean": latency_s}, "cached_tokens": None}, "per_call": per_call}}
    }


def test_mean_extremes_and_the_farthest() -> None:
    found = spread([_summary(2.0, 0.1), _summary(4.0, None), _summary(3.0, 0.3)])["a"]
    assert found["latency, s"] == {"mean": 3.0, "low": 2.0, "high": 4.0, "off_pct": pytest.approx(100 / 3)}
    assert found["ttft, s"]["off_pct"] == pytest.approx(50.0)
    assert set(found) == {"latency, s", "ttft, s"}  # what no run knows is left out
    text = lines({"a": found}, 3)
    assert text[0] == "spread of the means over 3 seeds"
    assert text[2].split() == ["a", "latency,", "s", "3", "2", "4", "33.3", "%"]


@pytest.mark.slow
def test_seeds_that_are_shared_out_leave_the_same_bytes(tmp_path: Path) -> None:
    """By one process or by two, whichever seed ends first; a folder that holds a run is refused before anything is made."""
    made: list[dict[str, bytes]] = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        flags = ["--seeds", "2", "--queries", "2", "--workers", workers, "--out", str(out)]
        command = [sys.executable, "-m", "fanmark.loadgen.cli", "simulate", *flags]
        assert subprocess.run(command, capture_output=True).returncode == 0
        made.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert made[0] == made[1] and {name.split("/")[0] for name in made[0]} == {"seed-7", "seed-8"}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "holds another run" in again.stderr
