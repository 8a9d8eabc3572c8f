"""A profile: one model on one chip, the engine's settings and its step law; bundled, built from parts by priors, or a user's file."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from fanmark.servers.engine.step_time import StepLaw
from fanmark.servers.profiles.parts import Chip, Confidence, Model, ProfileError, grade_of, unfilled
from fanmark.servers.profiles.priors import Efficiencies, Settings, arithmetic_field, prior_law, prior_settings

SCHEMA = "fanmark.profile/1"
Part = TypeVar("Part", Model, Chip)


@dataclass(frozen=True, slots=True)
class Profile:
    """What the engine needs to stand for a model on a chip. `intervals`: 95 % intervals of fitted coefficients of the law."""

    name: str
    model: Model
    chip: Chip
    settings: Settings
    law: StepLaw
    origin: Literal["fitted", "priors"]
    source: str = ""
    as_of: str = ""
    confidence: Confidence = "C"
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    fit: dict[str, float] = field(default_factory=dict)

    def caveats(self) -> list[str]:
        """One line for each reason not to trust a result that rests on this profile; empty for a fitted one of known parts."""
        lines = []
        if self.model.warning:
            lines.append(f"model {self.model.id}: {self.model.warning}")
        if self.origin == "priors":
            lines.append(f"profile {self.name}: step times by priors, never fitted: expect +-50 %")
            lines += _weak_figures(self.model, self.chip, self.settings)
        elif self.confidence in ("C", "U"):
            lines.append(f"profile {self.name}: grade {self.confidence} ({self.source}, {self.as_of})")
        if self.origin == "fitted" and self.energy_known and not self._energy_measured():
            lines.append(f"profile {self.name}: joules by the chip's rated watts and priors, never measured")
        return lines

    def _energy_measured(self) -> bool:
        prior, law = prior_law(self.model, self.chip, self.settings), self.law
        return (law.idle_w, law.memory_w, law.compute_w) != (prior.idle_w, prior.memory_w, prior.compute_w)

    def efficiencies(self) -> dict[str, float]:
        """What the data sheet's rates would need over what the law takes; a sound law has all of them in (0, 1]."""
        ideal, law = prior_law(self.model, self.chip, self.settings, Efficiencies(1.0, 1.0, 1.0, 1.0)), self.law
        pairs = {
            "weights": (
                ideal.dense_s + ideal.expert_s * law.experts,
                law.dense_s + law.expert_s * law.experts + law.fixed_s,
            ),
            "experts": (ideal.expert_s, law.expert_s),
            "compute": (ideal.token_s, law.token_s),
            "kv": (ideal.context_s, law.context_s),
            "attention": (ideal.attention_s, law.attention_s),
        }
        return {name: best / real for name, (best, real) in pairs.items() if real > 0.0}

    @property
    def energy_known(self) -> bool:
        """Whether joules can be told: measured, or the chip's power is known."""
        return self.law.idle_w + self.law.memory_w + self.law.compute_w > 0.0


def _weak_figures(model: Model, chip: Chip, settings: Settings) -> list[str]:
    """Figures that priors rest on and that are estimates (C) or unknown (U), a line for those that share grade and source."""
    fields_of: list[tuple[Model | Chip, list[str]]] = [
        (model, ["layers", "hidden", "attention", "ffn"]),
        (chip, ["memory_bytes", "bandwidth_bytes_per_s", arithmetic_field(model, chip), "watts"]),
    ]
    if settings.tensor_parallel > 1:
        fields_of[1][1].append("link_bytes_per_s")
    lines = []
    for part, names in fields_of:
        groups: dict[tuple[str, str], list[str]] = {}
        for name in names:
            grade = grade_of(part, name)
            if getattr(part, name) is None and not (name in ("attention", "ffn") and model.parametric is not None):
                groups.setdefault(("U", "not published"), []).append(name)
            elif grade.confidence in ("C", "U"):
                groups.setdefault((grade.confidence, f"{grade.source}, {grade.as_of}"), []).append(name)
        kind = "model" if isinstance(part, Model) else "chip"
        lines += [f"{kind} {part.id}: grade {g} ({why}): {', '.join(names)}" for (g, why), names in groups.items()]
    if chip.kind == "lpu":
        lines.append(f"chip {chip.id}: a preset of the shape of latency only")
    if model.state_bytes_per_seq:
        lines.append(f"model {model.id}: grade C (32 bits assumed): state of linear attention")
    return lines


class _Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[engine] of a profile file; what is left out takes vLLM's default or the memory formula."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    tensor_parallel: int | None = None
    data_parallel: int | None = None
    expert_parallel: bool | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    asynchronous: bool | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A profile file. `model` and `chip` are ids of bundled parts or tables of their own; `weight_bytes` and `kv_bytes` (bytes a
    parameter, bytes a cached number) override the model's."""

    schema: Literal["fanmark.profile/1"]
    name: str
    model: str | Model
    chip: str | Chip
    source: str = ""
    as_of: str = ""
    confidence: Confidence = "C"
    origin: Literal["fitted", "priors"] | None = None
    weight_bytes: float | None = None
    kv_bytes: float | None = None
    engine: _Engine = _Engine()
    law: dict[str, float | int] | None = None
    intervals: dict[str, tuple[float, float]] = {}
    fit: dict[str, float] = {}


def _entries(folder: str) -> Iterator[str]:
    for entry in files("fanmark.servers.profiles").joinpath(folder).iterdir():
        if entry.name.endswith(".toml"):
            yield entry.name.removesuffix(".toml")


def model_ids() -> list[str]:
    """Ids of the bundled models."""
    return sorted(_entries("models"))


def chip_ids() -> list[str]:
    """Ids of the bundled chips."""
    return sorted(_entries("chips"))


def fitted_names() -> list[str]:
    """Names of the bundled profiles that were fitted on measurements."""
    return sorted(_entries("fitted"))


def _decode(text: str, kind: Any, where: str) -> Any:
    import tomllib

    try:
        return msgspec.convert(tomllib.loads(text), kind, strict=False)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{where}: not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise ProfileError(f"{where}: {error}") from None


def _bundled(folder: str, name: str, kind: type[Part], known: list[str]) -> Part:
    if name not in known:
        raise ProfileError(f"unknown {folder[:-1]} {name!r}; there is: {', '.join(known)}")
    text = files("fanmark.servers.profiles").joinpath(folder, f"{name}.toml").read_text()
    part: Part = _decode(text, kind, f"{folder}/{name}.toml")
    return part


ALIASES = {
    "qwen3.5-235b-a22b": (
        "qwen3-235b-a22b",
        "the press writes Qwen 3.5 235B/22B, the model that exists is Qwen3-235B-A22B",
    ),
}


def load_model(name: str) -> Model:
    """A bundled model by id. Raises ProfileError."""
    target, warning = ALIASES.get(name, (name, ""))
    model = _bundled("models", target, Model, model_ids())
    return msgspec.structs.replace(model, warning=warning) if warning else model


def load_chip(name: str) -> Chip:
    """A bundled chip by id. Raises ProfileError."""
    return _bundled("chips", name, Chip, chip_ids())


def load_profile(name: str | Path) -> Profile:
    """A profile by bundled name, by parts (`MODEL@CHIP`, `MODEL@CHIPxN` for N chips) or by file. Raises ProfileError."""
    text = str(name)
    if text in fitted_names():
        return _from_text(files("fanmark.servers.profiles").joinpath("fitted", f"{text}.toml").read_text(), text)
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        try:
            return _from_text(path.read_text(), text)
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"profile {text}: cannot be read: {error}; give a bundled name or a TOML file") from None
    model, at, chip = text.partition("@")
    if not at:
        raise ProfileError(
            f"unknown profile {text!r}; give MODEL@CHIP, a TOML file, or one of: {', '.join(fitted_names())}"
        )
    chips = None
    if chip not in chip_ids() and "x" in chip and chip.rpartition("x")[2].isdigit():
        chip, _, count = chip.rpartition("x")
        chips = max(1, int(count))
    return prior_profile(text, load_model(model), load_chip(chip), chips)


def prior_profile(name: str, model: Model, chip: Chip, chips: int | None = None) -> Profile:
    """A profile of parts that nobody measured together."""
    _check_filled(model)
    settings = prior_settings(model, chip, chips)
    return Profile(name, model, chip, settings, prior_law(model, chip, settings), "priors", "priors", chip.as_of, "C")


def _check_filled(model: Model) -> None:
    missing = unfilled(model)
    if missing:
        raise ProfileError(
            f"model {model.id}: its sizes are not published: put its file's text under [model] of a profile file and fill in "
            f"{', '.join(missing)} of [model.parametric]"
        )


def _from_text(text: str, where: str) -> Profile:
    file: _File = _decode(text, _File, where)
    model = load_model(file.model) if isinstance(file.model, str) else file.model
    chip = load_chip(file.chip) if isinstance(file.chip, str) else file.chip
    if file.weight_bytes is not None:
        model = msgspec.structs.replace(model, weight_bytes=file.weight_bytes)
    if file.kv_bytes is not None:
        model = msgspec.structs.replace(model, kv_bytes=file.kv_bytes)
    _check_filled(model)
    settings = _settings(file.engine, model, chip)
    law = prior_law(model, chip, settings) if file.law is None else _law(file.law, where)
    origin = file.origin or ("priors" if file.law is None else "fitted")
    return Profile(
        file.name,
        model,
        chip,
        settings,
        law,
        origin,
        file.source,
        file.as_of,
        file.confidence,
        file.intervals,
        file.fit,
    )


def _settings(engine: _Engine, model: Model, chip: Chip) -> Settings:
    given = {name: value for name in engine.__struct_fields__ if (value := getattr(engine, name)) is not None}
    if "num_blocks" in given and "max_num_seqs" in given and "max_num_batched_tokens" in given:
        return Settings(**{"max_model_len": model.max_model_len, **given})
    # vLLM's own count stands; only without it does the memory formula decide.
    base = prior_settings(model, chip, engine.tensor_parallel, engine.gpu_memory_utilization or 0.92)
    return replace(base, **given)


def _law(table: dict[str, float | int], where: str) -> StepLaw:
    known = [f.name for f in fields(StepLaw)]
    wrong = sorted(set(table) - set(known))
    if wrong:
        raise ProfileError(f"{where}: [law] has no {', '.join(wrong)}; it has {', '.join(known)}")
    negative = sorted(name for name, value in table.items() if value < 0)
    if negative:
        raise ProfileError(f"{where}: [law] {', '.join(negative)} must be >= 0")
    try:
        return msgspec.convert(table, StepLaw)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{where}: [law]: {error}") from None


def profile_toml(profile: Profile) -> str:
    """The profile as the text of a profile file; parts that are bundled are named, others contained."""
    bundled = profile.model.id in model_ids() and load_model(profile.model.id) == profile.model
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "name": profile.name,
        "model": profile.model.id if bundled else None,
        "chip": profile.chip.id
        if profile.chip.id in chip_ids() and load_chip(profile.chip.id) == profile.chip
        else None,
        "origin": profile.origin,
        "source": profile.source,
        "as_of": profile.as_of,
        "confidence": profile.confidence,
    }
    tables: dict[str, dict[str, Any]] = {"": head, "engine": _plain(profile.settings), "law": _plain(profile.law)}
    for name, part, given in (("model", profile.model, head["model"]), ("chip", profile.chip, head["chip"])):
        if given is None:
            tables |= _part_tables(name, part)
    tables["intervals"] = {name: list(value) for name, value in profile.intervals.items()}
    tables["fit"] = dict(profile.fit)
    lines = []
    for title, table in tables.items():
        if title and table:
            lines += ["", f"[{title}]"]
        lines += [f"{_quoted(key)} = {_toml(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


def _plain(values: Settings | StepLaw) -> dict[str, Any]:
    return {f.name: getattr(values, f.name) for f in fields(values)}


def _part_tables(name: str, part: Model | Chip) -> dict[str, dict[str, Any]]:
    """A part as TOML tables: one for itself, one for each table in it."""
    values: dict[str, Any] = msgspec.to_builtins(part)
    grades = values.pop("grades", {})
    tables = {name: {key: value for key, value in values.items() if not isinstance(value, dict)}}
    tables |= {f"{name}.{key}": value for key, value in values.items() if isinstance(value, dict)}
    return tables | {f"{name}.grades.{_quoted(key)}": value for key, value in grades.items()}


def _quoted(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else f'"{key}"'


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if value == value and abs(value) != float("inf") else "nan"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
    return str(value)
