"""An arm's table -> a checked Arm. Every mistake is one ScenarioError."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fanmark.agents.presets import presets
from fanmark.agents.runtime import Topology
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.mistakes import convert, nearest, show
from fanmark.loadgen.scenario import ARM_KEYS, PART_KEYS, Arm, Target, Workload


def arm_of(raw: dict[str, Any], i: int, source: str, topologies: Mapping[str, Topology]) -> Arm:
    """The arm that stands in place `i`. Raises ScenarioError."""
    where = f"{source}: arm {raw.get('name', i + 1)!r}"
    if "mix" in raw:
        return _mixed(raw, where, topologies)
    return _plain(raw, where, topologies, ARM_KEYS - {"weight"})


def _mixed(raw: dict[str, Any], where: str, topologies: Mapping[str, Topology]) -> Arm:
    """An arm of several topologies: each query is one of its parts."""
    for key in raw:
        if key not in ARM_KEYS or key in PART_KEYS - {"name", "workload"}:
            raise ScenarioError(f"{where}: {key} = {show(raw[key])} beside mix: give it to the parts, [[arm.mix]]")
    if not isinstance(raw["mix"], list) or len(raw["mix"]) < 2:
        raise ScenarioError(
            f"{where}: mix: give two or more [[arm.mix]], each with a weight and a topology or a preset"
        )
    parts: list[Arm] = []
    for i, given in enumerate(raw["mix"]):
        there = f"{where}: mix number {i + 1}"
        if not isinstance(given, dict):
            raise ScenarioError(f"{there}: must be a table")
        named = {"name": str(given.get("preset", given.get("topology", i + 1)))} | given
        part = _plain(named, there, topologies, PART_KEYS)
        if any(part.name == other.name for other in parts):
            raise ScenarioError(f"{there}: name = {part.name!r} is given twice: parts need different names")
        parts.append(part)
    if not any(part.weight for part in parts):
        raise ScenarioError(f"{where}: mix: all weights are 0: give one above")
    own = convert({k: v for k, v in raw.items() if k != "mix"} | {"topology": "mix"}, Arm, where)
    convert(own.workload, Workload, where, ("workload",))
    workloads = [own.workload | part.workload for part in parts]
    parts = [msgspec.structs.replace(part, workload=w) for part, w in zip(parts, workloads, strict=True)]
    return msgspec.structs.replace(own, mix=parts)


def _plain(raw: dict[str, Any], where: str, topologies: Mapping[str, Topology], keys: frozenset[str]) -> Arm:
    known = ", ".join(topologies)
    if "preset" in raw:
        raw = _preset(raw, where)
    if "topology" not in raw:
        raise ScenarioError(f"{where}: topology is missing: it must be one of {known}")
    topology = topologies.get(str(raw["topology"]))
    if topology is None:
        raise ScenarioError(f"{where}: topology = {show(raw['topology'])}: must be one of {known}")
    own = {f.name for f in dataclasses.fields(topology.params)}
    for key in raw:
        if key not in own | keys:
            raise ScenarioError(f"{where}: unknown key {key!r}{nearest(key, [*own, *keys])}")
    given = {k: v for k, v in raw.items() if k in own}
    arm = convert({k: v for k, v in raw.items() if k in keys} | {"params": given}, Arm, where)
    convert(arm.workload, Workload, where, ("workload",))
    resolve_params(topology, given, where, lambda _, dist: round(max(dist.mean, dist.min)))
    try:  # no query may draw what the topology refuses
        resolve_params(topology, given, where, lambda _, dist: round(dist.min))
    except ScenarioError as e:
        raise ScenarioError(f"{e}: give the distribution a larger min") from None
    return arm


def _preset(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arm with what its preset gives; its own keys and lengths override."""
    preset = presets().get(str(raw["preset"]))
    if preset is None:
        raise ScenarioError(f"{where}: preset = {show(raw['preset'])}: must be one of {', '.join(presets())}")
    if raw.get("topology", preset.topology) != preset.topology:
        raise ScenarioError(
            f"{where}: topology = {show(raw['topology'])} with preset = {show(preset.name)}: that is a {preset.topology}: "
            "leave one of the two out"
        )
    own = raw.get("workload", {})
    lengths = (
        dict(preset.workload) | own if isinstance(own, dict) else own
    )  # what is no table is for `convert` to refuse
    return {"topology": preset.topology, **preset.params, **raw, **({"workload": lengths} if lengths else {})}


def resolve_params(topology: Topology, given: Mapping[str, Any], where: str, drawn: Callable[[str, Dist], int]) -> Any:
    """The topology's params; a distribution goes through `drawn(key, dist)`. Raises ScenarioError."""
    values = {
        key: drawn(key, convert(value, Dist, where, (key,))) if isinstance(value, dict) else value
        for key, value in given.items()
    }
    return convert(values, topology.params, where, shown=given)


def check_arms(arms: Sequence[Arm], targets: Mapping[str, Target], source: str) -> None:
    """Refuses arms that do not go together, or with the targets. Raises ScenarioError."""
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ScenarioError(f"{source}: [[arm]] name = {name!r} is given twice: arms need different names")
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ScenarioError(f"{source}: [[arm]] name = {name!r}: use letters, digits and . _ + - only")
    marked = [arm.name for arm in arms if arm.baseline]
    if len(marked) != 1:
        given = "no arm has" if not marked else f"{', '.join(marked)} all have"
        raise ScenarioError(
            f"{source}: [[arm]] baseline: {given} baseline = true: exactly one arm must, usually a single pass"
        )
    for arm in arms:
        for wanted in [arm.target, *arm.targets.values()]:
            if wanted is not None and wanted not in targets:
                known = ", ".join(targets) or "none: the stub stands in"
                raise ScenarioError(f"{source}: arm {arm.name!r} names the target {wanted!r}: there is {known}")
        if len(targets) > 1 and arm.target is None and "default" not in {*targets, *arm.targets}:
            raise ScenarioError(
                f"{source}: arm {arm.name!r}: say which target it uses: target = one of {', '.join(targets)}, or a "
                "default in its targets"
            )
