"""Calibration: a known law is found again, the H100 grids meet their bars, the bundled profiles are what the fitter writes."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import pytest

from fanmark.loadgen.calibrate import (
    Grid,
    GridRow,
    calibrate,
    decode_gap_s,
    fit_grid,
    load_grid,
    lone_ttft_s,
    write_profile,
)
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.fit_trace import fit_trace
from fanmark.loadgen.traces import Trace, replay, unique_request
from fanmark.loadgen.validate import grid_table, validate_grid
from fanmark.servers.profiles import Profile, ProfileError, load_chip, load_model, load_profile, prior_profile

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"
GRIDS = {"qwen3-30b-a3b@h100": ("moe30b", 10_800), "qwen3-32b@h100": ("dense32b", 3_450)}


def fitted(name: str) -> Profile:
    grid, blocks = GRIDS[name]
    model, _, chip = name.partition("@")
    return calibrate(DATA / "h100" / f"{grid}.calib.json", model, chip, blocks, as_of="2026-11")


@pytest.mark.parametrize("name", GRIDS)
def test_bundled_profiles_are_what_the_fitter_writes_and_meet_the_bars(name: str, tmp_path: Path) -> None:
    profile = fitted(name)
    write_profile(profile, tmp_path / "p.toml")
    again, bundled = load_profile(tmp_path / "p.toml"), load_profile(name)
    assert again.settings == bundled.settings
    for key in ("token_s", "context_s", "expert_s", "attention_s", "eager_launch_s", "idle_w"):
        assert getattr(again.law, key) == pytest.approx(getattr(bundled.law, key), rel=1e-3), key
    assert all(0.0 < eta <= 1.0 + 1e-6 for eta in profile.efficiencies().values())
    assert all(low <= high for low, high in profile.intervals.values())
    result = validate_grid(DATA / "h100" / f"{GRIDS[name][0]}.calib.json", bundled)
    decode = [abs(row["p50"]["off_pct"]) for row in result["decode"]]
    prefill = [abs(row["ttft_s"]["off_pct"]) for row in result["prefill"] if row["tokens"] > 512]
    assert len(decode) == 16 and max(decode) < 5.0, grid_table(result)
    assert len(prefill) == 5 and max(prefill) < 10.0, grid_table(result)


def test_a_grid_with_starved_rows_tells_its_kv_blocks() -> None:
    profile = calibrate(DATA / "h100" / "dense32b.calib.json", "qwen3-32b", "h100")
    assert 3430 <= profile.settings.num_blocks <= 3690


def test_a_grid_made_by_a_known_law_gives_the_law_back() -> None:
    base = prior_profile("x", load_model("qwen3-30b-a3b"), load_chip("h100"))
    true = replace(
        base.law, token_s=base.law.token_s * 1.3, context_s=base.law.context_s * 0.8, fixed_s=3e-3, eager_launch_s=0.08
    )
    decode = [
        GridRow(ctx=ctx, b=b, p50=decode_gap_s(true, b, ctx, 48 if b > 64 else 64))
        for ctx in (128, 2048)
        for b in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    prefill = [(t, lone_ttft_s(true, base.settings, t)) for t in (64, 256, 512, 1024, 2048, 4096, 8192, 16000)]
    law = fit_grid(Grid(prefill=prefill, decode=decode), base.model, base.chip, base.settings.num_blocks * 100).law
    for key in ("token_s", "context_s", "expert_s", "eager_launch_s", "attention_s"):
        assert getattr(law, key) == pytest.approx(getattr(true, key), rel=0.1), key
    for row in decode:
        assert decode_gap_s(law, row.b, row.ctx, 64) == pytest.approx(row.p50, rel=0.02)


def made_trace(base: Profile, count: int = 40) -> Trace:
    """Requests of random lengths, served by the engine model itself."""
    rng = Random(3)
    requests = [unique_request(str(i), rng.randint(50, 3000), rng.randint(20, 200), 0.15 * i) for i in range(count)]
    trace = Trace("made", base.model, base.chip, base.settings, requests, [], client_side=False)
    return replace(trace, served=replay(base, base.law, trace))


def test_a_trace_made_by_a_known_law_is_served_alike_by_the_fitted_one() -> None:
    prior = prior_profile("x", load_model("llama-3.1-8b"), load_chip("h100"))
    law = replace(
        prior.law, dense_s=prior.law.dense_s * 1.2, token_s=prior.law.token_s * 1.5, context_s=prior.law.context_s * 1.3
    )
    trace = made_trace(replace(prior, law=law))
    profile = fit_trace(trace, requests=20)
    again = replay(profile, profile.law, trace)[20:]
    real = trace.served[20:]
    assert sum(s.e2e_s for s in again) == pytest.approx(sum(s.e2e_s for s in real), rel=0.02)
    assert sum(s.ttft_s for s in again) == pytest.approx(sum(s.ttft_s for s in real), rel=0.05)


def test_a_run_of_the_tool_itself_can_be_fitted(tmp_path: Path) -> None:
    base = prior_profile("x", load_model("llama-3.1-8b"), load_chip("h100"))
    trace = replace(made_trace(base, 24), client_side=True)
    lines = []
    for request, served in zip(trace.requests, replay(base, base.law, trace), strict=True):
        at = request.arrived_at
        stamps = {"sent_at": at, "first_at": at + served.ttft_s, "done_at": at + served.e2e_s}
        sizes = {"input_tokens": len(request.prompt), "cached_tokens": 0, "output_tokens": len(request.output)}
        lines.append(json.dumps({"kind": "call", "error": None, "query": 0} | stamps | sizes))
    lines.append(json.dumps({"kind": "tool_call", "sent_at": 0.0, "done_at": 1.0}))
    lines.append(json.dumps({"kind": "call", "error": "http_503", "sent_at": 0.0}))
    (tmp_path / "calls.jsonl").write_text("\n".join(lines))
    profile = calibrate(tmp_path, "llama-3.1-8b", "h100")
    again, real = replay(profile, profile.law, trace), replay(base, base.law, trace)
    assert profile.origin == "fitted"
    assert sum(s.ttft_s for s in again) == pytest.approx(sum(s.ttft_s for s in real), rel=0.02)
    assert sum(s.e2e_s for s in again) == pytest.approx(sum(s.e2e_s for s in real), rel=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a calibration grid: Object missing required field `prefill`"),
        ('{"prefill": [], "decode": []}', "0 prefill and 0 decode rows: give 2 and 3 at least"),
        ("{", "not a calibration grid"),
    ],
)
def test_wrong_grids_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.calib.json"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=message):
        calibrate(path, "qwen3-32b", "h100")


def test_figures_that_no_chip_can_reach_are_not_fitted(tmp_path: Path) -> None:
    grid = load_grid(DATA / "h100" / "dense32b.calib.json")
    fast = msgspec.structs.replace(
        grid,
        prefill=[(tokens, seconds / 20) for tokens, seconds in grid.prefill],
        decode=[msgspec.structs.replace(row, p50=row.p50 / 20) for row in grid.decode],
    )
    path = tmp_path / "fast.calib.json"
    path.write_bytes(msgspec.json.encode(fast))
    profile = calibrate(path, "qwen3-32b", "h100", 3450)
    assert max(profile.efficiencies().values()) <= 1.0 + 1e-6
    assert decode_gap_s(profile.law, 1, 128, 64) > 10 * fast.decode[0].p50
    with pytest.raises(ProfileError, match="unknown chip"):
        calibrate(path, "qwen3-32b", "h101")


def test_a_folder_that_is_neither_trace_nor_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no trace: give a folder with"):
        calibrate(tmp_path, "qwen3-32b", "h100")
    (tmp_path / "calls.jsonl").write_text('{"kind": "tool_call"}\n')
    with pytest.raises(ScenarioError, match="0 calls with stamps and token counts: a fit needs 10 at least"):
        calibrate(tmp_path, "qwen3-32b", "h100")
