"""The engine model against what a real engine did: request traces and calibration grids, measured beside predicted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.statistics import QUANTILES
from fanmark.loadgen.traces import Served, load_trace, replay
from fanmark.servers.profiles import Profile

STATISTICS = ("mean", "p50", "p90", "p99")


def validate_trace(
    trace_dir: Path, profile: Profile | None = None, *, fit_on_half: bool = False, iterations: int = 8
) -> dict[str, Any]:
    """Replay a trace's arrivals and lengths in virtual time and compare.

    With `profile`, all requests are compared. With `fit_on_half`, a law is fitted on the first half of the requests (all are
    replayed, as the second half loads the engine of the first) and the second half is compared. Parallelism, max_num_seqs, token
    budget and KV blocks are the trace's. Raises ScenarioError.
    """
    if (profile is None) != fit_on_half:
        raise ScenarioError(f"{trace_dir}: give either a profile or --fit-on-half")
    trace = load_trace(trace_dir)
    fitted_on = 0
    if profile is None:
        from fanmark.loadgen.fit_trace import fit_trace

        fitted_on = len(trace.requests) // 2
        profile = fit_trace(trace, requests=fitted_on, iterations=iterations)
    return {
        "requests": len(trace.requests) - fitted_on,
        "fitted_on": fitted_on,
        "profile": profile.name,
        "caveats": [*trace.caveats, *profile.caveats()],
        **compare(trace.served[fitted_on:], replay(profile, profile.law, trace)[fitted_on:]),
    }


def compare(real: Sequence[Served], predicted: Sequence[Served]) -> dict[str, Any]:
    """Distributions of both, how far the second is off in percent, and the mean absolute error a request in percent."""
    result = {}
    for at, metric in enumerate(Served._fields):
        pairs = [(r[at], p[at]) for r, p in zip(real, predicted, strict=True)]
        both = [(r, p) for r, p in pairs if r is not None and p is not None]
        ours, theirs = _distribution([p for _, p in both]), _distribution([r for r, _ in both])
        result[metric] = {
            "real": theirs,
            "predicted": ours,
            "off_pct": {s: _off_pct(ours[s], theirs[s]) for s in STATISTICS},
            "mape_pct": 100.0 * math.fsum(abs(p / r - 1.0) for r, p in both if r > 0) / max(1, len(both)),
        }
    return result


def _distribution(values: list[float]) -> dict[str, float | int | None]:
    """As in summary.json, but with every quantile: both sides have the same requests, so even a p99 of few compares."""
    if not values:
        return {**dict.fromkeys(STATISTICS), "max": None, "n": 0}
    ordered = sorted(values)
    found: dict[str, float | int | None] = {"mean": math.fsum(ordered) / len(ordered)}
    for name, q in QUANTILES.items():
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        found[name] = ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)
    return found | {"max": ordered[-1], "n": len(ordered)}


def _off_pct(predicted: float | int | None, real: float | int | None) -> float | None:
    return 100.0 * (predicted / real - 1.0) if predicted is not None and real else None


def trace_table(result: dict[str, Any]) -> str:
    """A result of `validate_trace` as text."""
    lines = [f"{result['requests']} requests compared, fitted on {result['fitted_on']} others ({result['profile']})"]
    lines += [f"caveat: {line}" for line in result["caveats"]]
    lines.append(f"{'':8}" + "".join(f"{s:>30}" for s in STATISTICS) + f"{'error a request':>18}")
    for metric in Served._fields:
        r = result[metric]
        cells = "".join(
            f"{r['real'][s]:>10.4f} {r['predicted'][s]:>10.4f} {r['off_pct'][s]:>+7.1f}%"
            if r["real"][s]
            else f"{'-':>30}"
            for s in STATISTICS
        )
        lines.append(f"{metric:8}{cells}{r['mape_pct']:>17.1f}%")
    return "\n".join(lines)


def validate_grid(grid_path: Path, profile: Profile) -> dict[str, Any]:
    """A calibration grid against the profile: each decode row is served by the engine model, all its requests at once.

    `{"decode": [{"b", "ctx", "p50": {"real", "predicted", "off_pct"}, "wall": ..., "joules": ...}], "prefill": [{"tokens",
    "ttft_s": {...}}]}`; prefill rows are means of the repeats. Raises ScenarioError.
    """
    from fanmark.loadgen.calibrate import load_grid, lone_ttft_s, run_row

    grid = load_grid(grid_path)
    decode = []
    for row in grid.decode:
        gaps, wall_s, joules = run_row(row, grid.output_tokens(row), profile)
        p50 = _distribution(gaps)["p50"] or 0.0
        cells = {"p50": (row.p50, p50), "wall": (row.wall, wall_s), "joules": (row.joules, joules)}
        decode.append({"b": row.b, "ctx": row.ctx} | {name: _cell(*pair) for name, pair in cells.items()})
    prefill = [
        {"tokens": tokens, "ttft_s": _cell(seconds, lone_ttft_s(profile.law, profile.settings, tokens))}
        for tokens, seconds in grid.prefill_means().items()
    ]
    return {"profile": profile.name, "decode": decode, "prefill": prefill}


def _cell(real: float, predicted: float) -> dict[str, float | None]:
    return {"real": real, "predicted": predicted, "off_pct": _off_pct(predicted, real)}


def grid_table(result: dict[str, Any]) -> str:
    """A result of `validate_grid` as text: measured, predicted, how far off."""
    lines = [
        f"{result['profile']}: measured and predicted",
        f"{'b':>5}{'context':>9}{'gap p50, ms':>26}{'wall, s':>26}{'joules':>26}",
    ]
    for row in result["decode"]:
        cells = _shown(row["p50"], 1e3) + _shown(row["wall"]) + _shown(row["joules"])
        lines.append(f"{row['b']:>5}{row['ctx']:>9}{cells}")
    lines.append(f"{'prompt':>14}{'first token, ms':>26}")
    lines += [f"{row['tokens']:>14}{_shown(row['ttft_s'], 1e3)}" for row in result["prefill"]]
    return "\n".join(lines)


def _shown(cell: dict[str, float | None], factor: float = 1.0) -> str:
    real, predicted, off = cell["real"], cell["predicted"], cell["off_pct"]
    if real is None or predicted is None or off is None:
        return f"{'-':>26}"
    return f"{real * factor:>9.2f} {predicted * factor:>8.2f} {off:>+6.1f}%"
