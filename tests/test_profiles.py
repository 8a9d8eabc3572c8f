"""Profiles: the bundled parts hold together, files are refused in one line, and weak figures can be asked for."""

from dataclasses import replace
from pathlib import Path

import pytest

from fanmark.servers.profiles import (
    ProfileError,
    chip_ids,
    fitted_names,
    kv_blocks,
    load_chip,
    load_model,
    load_profile,
    model_ids,
)
from fanmark.servers.profiles.parts import unfilled
from fanmark.servers.profiles.priors import prior_law

TEMPLATES = ("gpt-5.4", "grok-4.20")


@pytest.mark.parametrize(
    ("model", "total", "active", "kv_kib"),
    [
        ("qwen3-235b-a22b", 235.09, 21.6, 188),
        ("qwen3-30b-a3b", 30.53, 3.04, 96),
        ("qwen3-32b", 32.76, 31.98, 256),
        ("qwen3.5-397b-a17b", 396.35, 16.3, 30),
        ("qwen3.5-122b-a10b", 122.1, 9.0, 24),
        ("qwen3.5-35b-a3b", 34.66, 2.95, 20),
        ("qwen3.5-27b", 26.9, 25.6, 64),
        ("qwen3.5-9b", 8.95, 7.94, 32),
        ("glm-4.5-air", 106.85, 12.8, 184),
        ("glm-4.5v", 106.85, 12.8, 184),
        ("mistral-small-4", 118.97, 6.10, 22.5),
        ("gpt-oss-120b", 116.83, 5.13, 36),
        ("gpt-oss-20b", 20.91, 3.61, 24),
        ("llama-3.3-70b", 70.55, 69.5, 320),
        ("llama-3.1-8b", 8.03, 7.50, 128),
    ],
)
def test_parameters_and_cache_recomputed_from_dimensions(
    model: str, total: float, active: float, kv_kib: float
) -> None:
    loaded = load_model(model)
    assert loaded.counted_params / 1e9 == pytest.approx(total, rel=1e-3)
    assert loaded.active_params / 1e9 == pytest.approx(active, rel=5e-3)
    assert loaded.kv_bytes_per_token == kv_kib * 1024


def test_state_of_linear_attention_is_charged_per_sequence() -> None:
    assert load_model("qwen3.5-397b-a17b").state_bytes_per_seq == 64 * 128 * 128 * 45 * 4
    assert load_profile("qwen3.5-397b-a17b@h200").settings.max_num_seqs < 1024


@pytest.mark.parametrize("chip", chip_ids())
def test_every_chip_and_model_resolves_or_says_why_not(chip: str) -> None:
    for model in model_ids():
        if model in TEMPLATES:
            with pytest.raises(ProfileError, match="fill in total_params"):
                load_profile(f"{model}@{chip}")
            continue
        profile = load_profile(f"{model}@{chip}")
        assert profile.settings.num_blocks > 1 and profile.law.token_s > 0
        assert profile.origin == "fitted" or "by priors, never fitted" in profile.caveats()[0]


def test_templates_lack_their_sizes() -> None:
    assert [m for m in model_ids() if unfilled(load_model(m))] == list(TEMPLATES)


@pytest.mark.parametrize("name", fitted_names())
def test_fitted_profiles_are_named_after_their_parts_and_have_no_caveats(name: str) -> None:
    profile = load_profile(name)
    assert (profile.name, f"{profile.model.id}@{profile.chip.id}") == (name, name)
    assert profile.origin == "fitted" and profile.caveats() == [] and profile.energy_known


def test_the_press_name_is_an_alias_with_a_warning() -> None:
    profile = load_profile("qwen3.5-235b-a22b@h100")
    assert profile.model.id == "qwen3-235b-a22b"
    assert "the model that exists is Qwen3-235B-A22B" in profile.caveats()[0]


def test_chips_can_be_counted_in_the_name() -> None:
    assert load_profile("qwen3-32b@rtx-pro-6000x2").settings.tensor_parallel == 2
    with pytest.raises(ProfileError, match=r"does not fit 2 x rtx-4090.*use 8 chips"):
        load_profile("llama-3.3-70b@rtx-4090x2")


@pytest.mark.parametrize(
    ("model", "chip", "utilization", "measured"),
    [
        ("llama-3.1-8b", "rtx-4090", 0.9, 2588),
        ("qwen3-30b-a3b", "h100", 0.92, 10800),
        ("qwen3-32b", "h100", 0.93, 3450),
    ],
)
def test_memory_formula_against_block_counts_of_real_servers(
    model: str, chip: str, utilization: float, measured: int
) -> None:
    assert kv_blocks(load_model(model), load_chip(chip), 1, utilization) == pytest.approx(measured, rel=0.15)


def test_unknown_power_means_unknown_energy() -> None:
    profile = load_profile("qwen3-32b@trainium2")
    assert not profile.energy_known
    assert any("watts" in line and "grade U" in line for line in profile.caveats())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-32b@h1000", "unknown chip 'h1000'; there is: b200"),
        ("qwen9@h100", "unknown model 'qwen9'; there is: glm-4.5-air"),
        ("qwen3-32b", "give MODEL@CHIP, a TOML file"),
        ("no/such.toml", "cannot be read"),
    ],
)
def test_wrong_names_say_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(name)
    assert "\n" not in str(caught.value)


HEAD = 'schema = "fanmark.profile/1"\nname = "mine"\nmodel = "qwen3-32b"\nchip = "h200"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "not valid TOML"),
        ('schema = "fanmark.profile/1"\nname = "mine"\nmodel = "qwen3-32b"\n', "missing required field `chip`"),
        (HEAD + "colour = 1\n", "unknown field `colour`"),
        (HEAD + "[engine]\nnum_blocks = 'many'\n", "Expected `int"),
        (HEAD + "[law]\nspeed = 1\n", "has no speed; it has dense_s"),
        (HEAD + "[law]\ndense_s = -1\ntoken_s=1\ncontext_s=1\nattention_s=1\n", "dense_s must be >= 0"),
        (HEAD + "[law]\ndense_s = 1\n", "missing required field `token_s`"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_a_file_may_override_settings_and_width_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(HEAD.replace("\nmodel", "\nweight_bytes = 1\nmodel") + "[engine]\nmax_num_seqs = 64\n")
    profile, plain = load_profile(path), load_profile("qwen3-32b@h200")
    assert profile.settings.max_num_seqs == 64 and profile.origin == "priors"
    assert profile.law.dense_s == pytest.approx(plain.law.dense_s / 2)
    assert profile.settings.num_blocks > plain.settings.num_blocks


def test_a_file_may_contain_its_model_and_the_sizes_of_a_closed_one(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        'schema = "fanmark.profile/1"\nname = "guess"\nchip = "b200"\n[model]\nid = "grok"\nname = "Grok"\nsource = "me"\n'
        'as_of = "2026-11"\nconfidence = "U"\nweight_bytes = 1\n[model.parametric]\ntotal_params = 1e12\nactive_params = 1e11\n'
        "layers = 100\nhidden = 8192\nexperts = 64\ntop_k = 4\nkv_bytes_per_token = 200_000\n"
    )
    profile = load_profile(path)
    assert profile.model.active_params == pytest.approx(1e11)
    assert profile.settings.tensor_parallel == 8
    assert any("grade U" in line for line in profile.caveats())


def test_dimensions_that_do_not_give_the_declared_count_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        'schema = "fanmark.profile/1"\nname = "bad"\nchip = "b200"\n[model]\nid = "m"\nname = "M"\nsource = "me"\nas_of = "2026"\n'
        'confidence = "A"\ntotal_params = 9e9\nlayers = 32\nhidden = 4096\nvocab = 128256\n[model.attention]\nfull_layers = 32\n'
        "q_heads = 32\nkv_heads = 8\nhead_dim = 128\n[model.ffn]\ndense_layers = 32\ndense_width = 14336\n"
    )
    with pytest.raises(ProfileError, match=r"its dimensions give 8\.03e9 parameters, total_params says 9\.00e9"):
        load_profile(path)


def test_joules_that_nobody_measured_are_said_to_be_so() -> None:
    """The bundled grids measured joules; the same law with the powers of its priors did not."""
    fitted = load_profile("qwen3-30b-a3b@h100")
    assert fitted.caveats() == []
    prior = prior_law(fitted.model, fitted.chip, fitted.settings)
    law = replace(fitted.law, idle_w=prior.idle_w, memory_w=prior.memory_w, compute_w=prior.compute_w)
    said = "profile qwen3-30b-a3b@h100: joules by the chip's rated watts and priors, never measured"
    assert replace(fitted, law=law).caveats() == [said]
