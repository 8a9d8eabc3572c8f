"""Fits the step-time law of a profile to measurements: a calibration grid, a request trace, or a run's folder.

A grid's rows are steps, so the law is fitted to them directly, here. A trace's requests are served by the engine model in virtual time,
again and again, until their times match: fit_trace.py.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.fit_run import fit_run
from fanmark.loadgen.fit_trace import fit_trace
from fanmark.loadgen.fitting import HOST, bounds_of, etas, ideal_law, least_squares_fit, set_coefficients
from fanmark.loadgen.run_trace import load_run
from fanmark.loadgen.traces import load_trace
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import BatchShape, StepLaw
from fanmark.servers.profiles import (
    Chip,
    Model,
    Profile,
    ProfileError,
    Settings,
    load_chip,
    load_model,
    prior_law,
    prior_settings,
    profile_toml,
)
from fanmark.servers.replica_of import engine_config, replica_of


def calibrate(source: Path, model: str, chip: str, kv_blocks: int | None = None, *, as_of: str = "") -> Profile:
    """Fit a profile of `model` on `chip` (ids of bundled parts) to `source`.

    `source`: a grid (`*.calib.json`), a trace folder (requests.jsonl, meta.json) or a run's folder (calls.jsonl). `kv_blocks`:
    vLLM's num_gpu_blocks; left out, the trace's own, what a grid's starved rows say, or the memory formula's. `as_of`: month of
    the measurement, default this one. Raises ScenarioError and ProfileError, each in one line.
    """
    model_, chip_ = load_model(model), load_chip(chip)
    if source.is_file():
        profile = fit_grid(load_grid(source), model_, chip_, kv_blocks)
    elif (source / "calls.jsonl").is_file():
        profile = fit_run(load_run(source, model_, chip_, kv_blocks))
    else:
        trace = load_trace(source, model_, chip_)
        profile = fit_trace(replace(trace, settings=_with_blocks(trace.settings, kv_blocks)))
        profile = replace(profile, source="; ".join(trace.caveats))
    name = f"{model_.id}@{chip_.id}"
    month = as_of or datetime.date.today().strftime("%Y-%m")
    said = "; ".join(filter(None, [f"fitted on {source.resolve().name}", profile.source]))
    profile = replace(profile, name=name, source=said, as_of=month, confidence="B", origin="fitted")
    over = {n: v for n, v in profile.efficiencies().items() if not 0.0 < v <= 1.0 + 1e-6}
    if over:
        shown = ", ".join(f"{n} {v:.2f}" for n, v in over.items())
        raise ProfileError(f"{source}: efficiencies beyond (0, 1]: {shown}: check the model, the chip and --kv-blocks")
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile file. Raises ScenarioError if it cannot be written."""
    try:
        path.write_text(profile_toml(profile))
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be written: {error.strerror}; give --out another place") from None


def _with_blocks(settings: Settings, kv_blocks: int | None) -> Settings:
    return settings if kv_blocks is None else replace(settings, num_blocks=kv_blocks)


# A calibration grid


class GridRow(msgspec.Struct, frozen=True):
    """`b` requests of `ctx` prompt tokens started together: quantiles of the gaps between tokens, wall time (s), energy of it (J)."""

    ctx: int
    b: int
    p50: float
    p90: float = 0.0
    wall: float = 0.0
    joules: float = 0.0


class Grid(msgspec.Struct, frozen=True):
    """A calibration grid: `prefill` holds (prompt tokens, seconds to first token) of lone requests."""

    prefill: list[tuple[int, float]]
    decode: list[GridRow]
    name: str = ""
    args: list[str] = []

    def output_tokens(self, row: GridRow) -> int:
        """Tokens that each request of a decode row wrote."""
        return 48 if row.b > 64 else 64

    def prefill_means(self) -> dict[int, float]:
        """Mean seconds to first token by prompt length: steps that the processor launches vary, and their mean counts."""
        seen: dict[int, list[float]] = {}
        for tokens, seconds in self.prefill:
            seen.setdefault(tokens, []).append(seconds)
        return {tokens: math.fsum(v) / len(v) for tokens, v in sorted(seen.items())}


def load_grid(path: Path) -> Grid:
    """A `*.calib.json` file. Raises ScenarioError."""
    try:
        grid = msgspec.json.decode(path.read_bytes(), type=Grid)
    except (OSError, msgspec.MsgspecError) as error:
        raise ScenarioError(f"{path}: not a calibration grid: {error}; it needs `prefill` and `decode`") from None
    if len(grid.prefill) < 2 or len(grid.decode) < 3:
        raise ScenarioError(
            f"{path}: {len(grid.prefill)} prefill and {len(grid.decode)} decode rows: give 2 and 3 at least"
        )
    return grid


def _grid_settings(grid: Grid, model: Model, chip: Chip, kv_blocks: int | None) -> Settings:
    flags = dict(zip(grid.args, grid.args[1:], strict=False))
    chips = int(flags.get("--tensor-parallel-size", 1))
    settings = prior_settings(model, chip, chips, float(flags.get("--gpu-memory-utilization", 0.92)))
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
    given: dict[str, Any] = {n: int(flags[flag]) for n in names if (flag := "--" + n.replace("_", "-")) in flags}
    return _with_blocks(replace(settings, **given), kv_blocks)


def _is_starved(grid: Grid, row: GridRow, settings: Settings) -> bool:
    """Whether the row's requests do not fit the KV cache together: then its gaps are not those of a batch of `b`."""
    blocks = -(-(row.ctx + grid.output_tokens(row)) // settings.block_size)
    return row.b * blocks > 0.98 * settings.num_blocks or row.b > settings.max_num_seqs


def fit_grid(grid: Grid, model: Model, chip: Chip, kv_blocks: int | None = None) -> Profile:
    """The law from a grid: decode rows are steps of batch `b`, prefill rows are the steps of one request and the host's cost."""
    settings = _grid_settings(grid, model, chip, kv_blocks)
    prior = prior_law(model, chip, settings)
    bounds = bounds_of(prior, ideal_law(model, chip, settings))
    bounds["fixed_s"] = (1e-5, prior.fixed_s, 0.05)
    bounds[HOST] = (5e-4, 8e-3, 0.1)
    bounds["eager_launch_s"] = (1e-3, max(2e-3, prior.eager_launch_s), 0.5)
    decode = [(row, grid.output_tokens(row)) for row in grid.decode if not _is_starved(grid, row, settings)]
    prefill = grid.prefill_means()

    def residuals(law: StepLaw) -> list[float]:
        found = [(decode_gap_s(law, row.b, row.ctx, out) / row.p50 - 1.0) / 0.02 for row, out in decode]
        for tokens, seconds in prefill.items():
            tolerance = 0.03 if tokens <= law.graph_limit_tokens else 0.05
            found.append((lone_ttft_s(law, settings, tokens) / seconds - 1.0) / tolerance)
        return found

    fitted = least_squares_fit(prior, bounds, residuals, iterations=400, step=1e-4, pull=0.05)
    profile = Profile(f"{model.id}@{chip.id}", model, chip, settings, fitted.law, "fitted", intervals=fitted.intervals)
    starved = [row for row in grid.decode if _is_starved(grid, row, settings)]
    if kv_blocks is None and starved:
        profile = replace(profile, settings=replace(settings, num_blocks=_starved_blocks(profile, grid, starved)))
    if any(row.joules for row in grid.decode):
        profile = replace(profile, law=fit_power(profile, grid))
    return replace(profile, fit=etas(profile))


def _starved_blocks(profile: Profile, grid: Grid, rows: Sequence[GridRow]) -> int:
    """KV blocks at which the engine model serves rows that do not fit the cache with the gaps and in the time measured."""

    def off(blocks: int) -> float:
        candidate = replace(profile, settings=replace(profile.settings, num_blocks=blocks))
        total = 0.0
        for row in rows:
            gaps, wall_s, _ = run_row(row, grid.output_tokens(row), candidate)
            total += (sorted(gaps)[len(gaps) // 2] / row.p50 - 1.0) ** 2
            total += (wall_s / row.wall - 1.0) ** 2 if row.wall else 0.0
        return total

    formula = profile.settings.num_blocks
    coarse = min((formula * percent // 100 for percent in range(70, 165, 8)), key=off)
    return min((coarse * percent // 100 for percent in range(94, 108, 2)), key=off)


def decode_gap_s(law: StepLaw, seqs: int, prompt_tokens: int, output_tokens: int) -> float:
    """The gap between tokens of `seqs` equal requests in the middle of their answers."""
    context = seqs * (prompt_tokens + output_tokens // 2)
    return law.seconds(BatchShape(0, seqs, context, 0.0, seqs))


def lone_ttft_s(law: StepLaw, settings: Settings, prompt_tokens: int) -> float:
    """Seconds to the first token, at the client, of a request that has the engine to itself and nothing in the cache."""
    total, done = law.ingress_s + law.egress_s, 0
    while done < prompt_tokens:
        chunk = min(prompt_tokens - done, settings.max_num_batched_tokens)
        total += law.seconds(BatchShape(chunk, 0, 0, chunk * (done + chunk / 2), 1))
        done += chunk
    return total


def run_row(row: GridRow, output_tokens: int, profile: Profile) -> tuple[list[float], float, float]:
    """Serve a decode row by the engine model: its gaps between tokens and the wall time at the client (s), and the joules.

    The chip idles while the host works on the first and the last token.
    """
    law = profile.law
    replica = replica_of(profile, engine_config(profile))
    for i in range(row.b):
        start = (i + 1) << 24
        replica.add(Request(str(i), range(start, start + row.ctx), range(start - output_tokens, start)), 0.0)
    last: dict[str, float] = {}
    gaps, wall_s = [], 0.0
    for event in replica.advance(1e9):
        if event.id in last:
            gaps.append(event.at - last[event.id])
        last[event.id] = wall_s = event.at
    statistics = replica.statistics()
    return gaps, wall_s, statistics.joules + law.idle_w * max(0.0, wall_s - statistics.busy_s)


def fit_power(profile: Profile, grid: Grid) -> StepLaw:
    """Idle, memory and compute watts from the joules of the decode rows, by non-negative least squares on relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    units = [{"idle_w": 0.0, "memory_w": 0.0, "compute_w": 0.0} | {name: 1.0} for name in ("memory_w", "compute_w")]
    laws = [replace(profile, law=set_coefficients(profile.law, unit)) for unit in units]
    rows = []
    for row in grid.decode:
        if row.joules > 0.0 and row.wall > 0.0:
            parts = [run_row(row, grid.output_tokens(row), law)[2] for law in laws]
            rows.append([row.wall / row.joules, *(part / row.joules for part in parts)])
    watts = nnls(np.array(rows), np.ones(len(rows)))[0]
    return replace(profile.law, idle_w=float(watts[0]), memory_w=float(watts[1]), compute_w=float(watts[2]))
