"""The spread of a simulation over seeds."""

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
