"""The bundled scenario `probe`: what is fitted to it gives the law back that answered it, whatever the run's folder keeps to itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from fanmark.agents import topologies
from fanmark.loadgen.calibrate import calibrate, decode_gap_s, lone_ttft_s, write_profile
from fanmark.loadgen.run_trace import load_run
from fanmark.loadgen.scenario_check import check, read
from fanmark.loadgen.simulate import Options, simulate, with_profile
from fanmark.loadgen.traces import replay
from fanmark.servers.profiles import Profile, load_profile

pytestmark = pytest.mark.slow


def simulated(scenario: str, profile: str, out: Path) -> Path:
    """The folder of a bundled scenario against this profile in virtual time."""
    table = topologies()
    raw, source = read(scenario)
    result = simulate(with_profile(check(raw, source, table), profile), table, Options(out, "test", []))
    assert result.summary["partial"] is False
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(profile: str) -> Path:
        if profile not in made:
            made[profile] = simulated("probe", profile, tmp_path_factory.mktemp("probe") / "run")
        return made[profile]

    return of


def forget_server(folder: Path, copy: Path) -> Path:
    """The same folder as of a server that is not ours."""
    copy.mkdir()
    (copy / "calls.jsonl").write_bytes((folder / "calls.jsonl").read_bytes())
    scenario = {"load": {"mode": "closed"}, "targets": {"default": {"url": "http://127.0.0.1:8000/v1"}}}
    (copy / "scenario.toml").write_text(tomli_w.dumps(scenario))
    return copy


def worst_pct(fitted: Profile, true: Profile) -> tuple[float, float]:
    """Decode steps at 45 batches and contexts that fit the cache, and first tokens of 14 lone prompts."""
    room = true.settings.num_blocks * true.settings.block_size
    decode = [
        decode_gap_s(fitted.law, b, context, 64) / decode_gap_s(true.law, b, context, 64) - 1.0
        for b in (1, 2, 4, 8, 16, 32, 64, 96, 128)
        for context in (128, 512, 1024, 2048, 4096, 8192)
        if b * (context + 64) < room
    ]
    first = [
        lone_ttft_s(fitted.law, fitted.settings, n) / lone_ttft_s(true.law, true.settings, n) - 1.0
        for n in (64, 128, 256, 400, 512, 600, 1024, 1500, 2048, 3000, 4096, 8192, 12000, 16000)
    ]
    return 100.0 * max(map(abs, decode)), 100.0 * max(map(abs, first))


@pytest.mark.parametrize("name", ["qwen3-30b-a3b@h100", "qwen3-32b@h100"])
def test_a_probe_gives_the_law_back(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    true = load_profile(name)
    model, chip = name.split("@")
    profile = calibrate(folder(name), model, chip)
    assert profile.settings == true.settings, "the embedded stub's are known"
    decode, first = worst_pct(profile, true)
    assert decode < 1.0 and first < 0.5, (decode, first)
    assert profile.fit["gap_error_pct"] < 1.0 and profile.fit["ttft_error_pct"] < 0.5
    write_profile(profile, tmp_path / "p.toml")
    again = load_profile(tmp_path / "p.toml")
    unmeasured = f"profile {again.name}: joules by the chip's rated watts and priors, never measured"
    assert again.caveats() == [unmeasured] and again.source == "fitted on run"
    assert worst_pct(again, true)[0] == pytest.approx(decode, abs=0.01)


def test_budget_and_blocks_of_a_foreign_server_come_out_of_the_calls(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    bundled = load_profile("qwen3-30b-a3b@h100")
    true = replace(bundled, settings=replace(bundled.settings, max_num_batched_tokens=2048, num_blocks=6000))
    write_profile(true, tmp_path / "true.toml")
    foreign = forget_server(simulated("probe", str(tmp_path / "true.toml"), tmp_path / "made"), tmp_path / "run")
    profile = calibrate(foreign, "qwen3-30b-a3b", "h100")
    assert profile.settings.max_num_batched_tokens == 2048
    assert profile.settings.num_blocks == pytest.approx(6000, rel=0.05)
    decode, first = worst_pct(profile, true)
    assert decode < 1.0 and first < 1.0, (decode, first)
    for said in ("max_num_seqs 1024, max_num_batched_tokens 8192 and 1 chips are defaults", "a budget of 2048"):
        assert said in profile.source
    assert "by calls that waited for them" in profile.source


def test_blocks_that_are_given_stand(folder: Callable[[str], Path], tmp_path: Path) -> None:
    foreign = forget_server(folder("qwen3-32b@h100"), tmp_path / "run")
    profile = calibrate(foreign, "qwen3-32b", "h100", 3450)
    assert (profile.settings.num_blocks, profile.settings.max_num_batched_tokens) == (3450, 8192)
    assert "num_blocks" not in profile.source


@pytest.mark.parametrize("scenario", ["probe", "quickstart"])
def test_a_run_read_back_and_served_by_its_own_law_has_its_own_times(
    scenario: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    true = load_profile("qwen3-30b-a3b@h100")
    run = folder(true.name) if scenario == "probe" else simulated("quickstart", true.name, tmp_path / "run")
    trace = load_run(run, true.model, true.chip)
    assert len(trace.requests) == {"probe": 686, "quickstart": 483}[scenario]
    assert trace.shared_tokens == 0 and any(trace.cached), "every cached prefix is an earlier call's"
    for mine, theirs in zip(replay(true, true.law, trace), trace.served, strict=True):
        assert tuple(mine) == pytest.approx(tuple(theirs), abs=1e-9)
