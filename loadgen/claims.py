"""A claim under test, beside what was measured or what the closed forms give. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fanmark.agents.presets import presets
from fanmark.loadgen.scenario import Arm


def held(arm: Arm, value: Callable[[str, str], float | None]) -> dict[str, Any] | None:
    """The claim of the arm's preset, and how each resource that it may mean stands to it: `value(unit, resource)` is the ratio to the
    baseline ("x") or the number a query ("per query"), None where it is not known. None without a claim."""
    claim = presets()[arm.preset].claim if arm.preset is not None else None
    if claim is None:
        return None
    found = {resource: value(claim.unit, resource) for resource in claim.resources}
    return {
        "text": claim.text,
        "source": claim.source,
        "unit": claim.unit,
        "low": claim.low,
        "high": claim.high,
        "measured": {name: {"value": at, "is": _where(at, claim.low, claim.high)} for name, at in found.items()},
    }


def _where(value: float | None, low: float, high: float) -> str | None:
    if value is None:
        return None
    return "below" if value < low else "above" if value > high else "within"


def rows(name: str, claim: Mapping[str, Any], shown: Callable[[float], str]) -> list[Sequence[str]]:
    """A claim as rows of a table: resource, claimed, found, how that stands to it. What is not known is left out."""
    unit = "x" if claim["unit"] == "x" else ""
    low, high = shown(claim["low"]), shown(claim["high"])
    band = f"{low}{unit}" if low == high else f"{low} to {high}{unit}"
    return [
        (f"{name} {resource.removesuffix('_s').replace('_', ' ')}", band, f"{shown(found['value'])}{unit}", found["is"])
        for resource, found in claim["measured"].items()
        if found["value"] is not None
    ]
