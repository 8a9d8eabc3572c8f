"""How far a simulation's results lie apart over seeds: what of a difference may be chance. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fanmark.loadgen.table import columns, number

_FIGURES: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    ("latency, s", lambda arm: _mean(arm["per_query"]["latency_s"])),
    ("ttft, s", lambda arm: _mean(arm["per_call"]["ttft_s"])),
    ("tpot, s", lambda arm: _mean(arm["per_call"]["tpot_s"])),
    ("cached tokens", lambda arm: _mean(arm["per_query"]["cached_tokens"])),
)


def _mean(found: Mapping[str, Any] | None) -> float | None:
    return found["mean"] if found else None


def spread(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By arm and figure: mean, low and high of the runs' means, and off_pct, the farthest of them from the mean in %."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in summaries[0]["arms"]:
        found[name] = {}
        for title, get in _FIGURES:
            values = [value for summary in summaries if (value := get(summary["arms"][name])) is not None]
            if values:
                mean = sum(values) / len(values)
                farthest = max(abs(value - mean) for value in values)
                off_pct = 100.0 * farthest / mean if mean else 0.0
                found[name][title] = {"mean": mean, "low": min(values), "high": max(values), "off_pct": off_pct}
    return found


def lines(found: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: int) -> list[str]:
    """The spread as a table."""
    rows = [["", "", "mean", "lowest", "highest", "farthest"]]
    for name, figures in found.items():
        for title, values in figures.items():
            shown = [number(values[key]) for key in ("mean", "low", "high")]
            rows.append([name, title.rjust(14), *shown, f"{values['off_pct']:.1f} %"])
    return [f"spread of the means over {seeds} seeds", *columns(rows)]
