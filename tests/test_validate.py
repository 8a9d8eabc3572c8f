"""Validation: real traces are read with their settings, and what is fitted on the first half holds on the second."""

import json
from pathlib import Path
from typing import Any

import pytest

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.traces import Served, load_trace
from fanmark.loadgen.validate import compare, trace_table, validate_trace
from fanmark.servers.profiles import load_profile

TRACES = Path(__file__).parent / "data" / "vllm_traces"


@pytest.mark.parametrize(
    ("folder", "model", "chip", "tensor_parallel", "seqs", "blocks"),
    [
        ("RTX4090_Llama-3.1-8B", "llama-3.1-8b", "rtx-4090", 1, 256, 2588),
        ("RTXPRO6000_Llama-3.1-8B", "llama-3.1-8b", "rtx-pro-6000", 1, 128, None),
        ("RTXPRO6000_Qwen3-32B", "qwen3-32b", "rtx-pro-6000", 2, 128, None),
    ],
)
def test_settings_come_from_the_trace(
    folder: str, model: str, chip: str, tensor_parallel: int, seqs: int, blocks: int | None
) -> None:
    trace = load_trace(TRACES / folder)
    assert (trace.model.id, trace.chip.id, len(trace.requests)) == (model, chip, 300)
    assert (trace.settings.tensor_parallel, trace.settings.max_num_seqs) == (tensor_parallel, seqs)
    assert trace.settings.max_num_batched_tokens == 2048
    assert trace.settings.num_blocks == blocks if blocks else trace.settings.num_blocks > 20_000
    assert all(s.ttft_s > 0 and s.e2e_s > s.ttft_s for s in trace.served)
    assert trace.caveats == []


def worst(result: dict[str, Any], statistic: str) -> float:
    return max(abs(float(result[metric]["off_pct"][statistic])) for metric in Served._fields)


@pytest.mark.slow
def test_a_law_fitted_on_the_first_half_predicts_the_second() -> None:
    result = validate_trace(TRACES / "RTXPRO6000_Qwen3-32B", fit_on_half=True, iterations=3)
    assert (result["requests"], result["fitted_on"]) == (150, 150)
    assert worst(result, "mean") < 3.0, trace_table(result)
    assert worst(result, "p50") < 5.0, trace_table(result)
    assert worst(result, "p99") < 15.0, trace_table(result)


def test_priors_alone_are_within_a_factor_of_two_and_say_that_they_are_priors() -> None:
    result = validate_trace(TRACES / "RTXPRO6000_Llama-3.1-8B", load_profile("llama-3.1-8b@rtx-pro-6000"))
    assert (result["requests"], result["fitted_on"]) == (300, 0)
    assert abs(result["e2e_s"]["off_pct"]["mean"]) < 50.0
    assert any("by priors, never fitted" in line for line in result["caveats"])
    assert "mean" in trace_table(result)
    json.dumps(result, allow_nan=False)


def test_hand_calculation_of_the_comparison() -> None:
    real = [Served(1.0, 0.1, 2.0), Served(3.0, None, 4.0)]
    predicted = [Served(1.1, 0.2, 2.0), Served(2.7, None, 4.0)]
    result = compare(real, predicted)
    assert result["ttft_s"]["real"]["mean"] == 2.0 and result["ttft_s"]["predicted"]["mean"] == pytest.approx(1.9)
    assert result["ttft_s"]["off_pct"]["mean"] == pytest.approx(-5.0) and result["ttft_s"]["mape_pct"] == pytest.approx(
        10.0
    )
    assert result["tpot_s"]["real"]["n"] == 1 and result["tpot_s"]["off_pct"]["p99"] == pytest.approx(100.0)
    assert result["e2e_s"]["off_pct"] == {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}


def test_an_unknown_chip_and_model_are_fitted_from_a_template_and_said(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"model": "acme/Brain-9000", "engine_kwargs": {"max_num_seqs": 8}}))
    line = {"input_toks": 100, "output_toks": 10, "queued_ts": 5.0, "first_token_ts": 6.0, "last_token_ts": 7.0}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line | {"arrival_time": 1.0}))
    trace = load_trace(tmp_path)
    assert trace.settings.max_num_seqs == 8
    assert [("model acme/Brain-9000" in c, "chip of" in c) for c in trace.caveats] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("meta", "requests", "message"),
    [
        ("{", "", "it must be JSON with engine_kwargs"),
        ('{"model": "x"}', "", "it must be JSON with engine_kwargs"),
        ('{"engine_kwargs": {}}', "", "is empty: a trace needs at least one request"),
        ('{"engine_kwargs": {}}', '{"input_toks": "many"}\n', r"requests.jsonl, line 1: Expected `int`"),
    ],
)
def test_broken_traces_are_refused_in_one_line(tmp_path: Path, meta: str, requests: str, message: str) -> None:
    (tmp_path / "meta.json").write_text(meta)
    (tmp_path / "requests.jsonl").write_text(requests)
    with pytest.raises(ScenarioError, match=message) as caught:
        validate_trace(tmp_path, fit_on_half=True)
    assert "\n" not in str(caught.value)


def test_a_profile_and_a_fit_exclude_each_other() -> None:
    for profile, fit in ((None, False), (load_profile("qwen3-32b@h100"), True)):
        with pytest.raises(ScenarioError, match="either a profile or --fit-on-half"):
            validate_trace(TRACES / "RTXPRO6000_Qwen3-32B", profile, fit_on_half=fit)
