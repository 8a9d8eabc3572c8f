"""Fits a step law, and what settings it tells, to a run's folder: calls with the stamps that their client gave them.

Rules of the file:
1. Lone calls, and calls that decoded while no other's prompt was read, tell a step's time by themselves. Where there are enough of
   them (the scenario `probe` sees to it), the law is fitted to them alone: no queue, and so no chance, is in them.
2. Elsewhere they are where the fit starts, and the engine model serves all calls in virtual time, each as long after what it waited
   for as it was, until times match.
3. The token budget is the default unless another one explains the lone calls far better; the KV blocks are the memory formula's
   unless calls together wanted more than most of them, and another number explains their times far better.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from fanmark.loadgen.fitting import HOST, Bounds, Fitted, bounds_of, coefficient, etas, ideal_law, least_squares_fit
from fanmark.loadgen.pure_calls import Decode, alone, lone_ttft_s, pure_decodes, spans_of
from fanmark.loadgen.traces import Served, Trace, replay
from fanmark.servers.engine.step_time import StepLaw
from fanmark.servers.profiles import Profile

# How well a client knows a time: a share of it, its clock and the network, and what each call sent just before adds (one processor
# sends them all, and takes in their tokens).
_SHARE = 0.02
_CLOCK_S = 2e-3
_CROWD_S = 5e-4
_CROWD_WINDOW_S = 0.1

_ENOUGH_BATCHES, _ENOUGH_PROMPTS = 4, 4  # different ones, for rule 1
_FAR_BETTER = 0.7  # of the cost
_BUDGETS = (2048, 4096, 8192, 16384)

_Residuals = Callable[[StepLaw], list[float]]


def fit_run(trace: Trace, iterations: int = 8) -> Profile:
    """The law that makes the engine model serve a run's calls as their client saw them; settings where the run does not tell them.

    `fit` holds the mean absolute error of what was fitted to, by call: gaps between tokens and times to the first, in percent.
    """
    tolerances = _tolerances(trace)
    pure, lone = pure_decodes(trace), alone(trace)
    prompts = {len(trace.requests[p].prompt) for p in lone}
    profile = trace.prior()
    fitted, trace = _by_steps(trace, pure, lone, tolerances)
    budget = trace.settings.max_num_batched_tokens
    if len({max(d.batches)[1].seqs for d in pure}) >= _ENOUGH_BATCHES and len(prompts) >= _ENOUGH_PROMPTS:
        law = fitted.law
        gaps = [(d.gap_s, d.predicted_s(law)) for d in pure]
        firsts = [(trace.served[p].ttft_s, lone_ttft_s(law, trace, p, budget)) for p in lone]
    else:
        by_steps = _steps_residuals(trace, pure, lone, tolerances, budget)
        fitted = _by_replay(replace(profile, law=fitted.law), trace, tolerances, by_steps, iterations)
        both = list(zip(trace.served, replay(profile, fitted.law, trace), strict=True))
        gaps = [(r.tpot_s, p.tpot_s) for r, p in both if r.tpot_s and p.tpot_s]
        firsts = [(r.ttft_s, p.ttft_s) for r, p in both if r.ttft_s]
    profile = replace(profile, settings=trace.settings, law=fitted.law, intervals=fitted.intervals)
    if not trace.blocks_known:
        trace = _with_blocks(profile, trace, tolerances)
    profile = replace(
        profile, settings=trace.settings, origin="fitted", confidence="B", source="; ".join(trace.caveats)
    )
    errors = {"gap_error_pct": _error_pct(gaps), "ttft_error_pct": _error_pct(firsts)}
    return replace(profile, fit=etas(profile) | errors)


def _bounds(trace: Trace) -> Bounds:
    law = trace.prior().law
    bounds = bounds_of(law, ideal_law(trace.model, trace.chip, trace.settings))
    bounds["fixed_s"] = (1e-5, law.fixed_s, 0.05)
    bounds["eager_launch_s"] = (1e-3, max(2e-3, law.eager_launch_s), 0.5)
    bounds[HOST] = (5e-4, 8e-3, 0.2)
    return bounds


# By steps


def _by_steps(
    trace: Trace,
    pure: Sequence[Decode],
    lone: Sequence[int],
    tolerances: Sequence[tuple[float, float]],
) -> tuple[Fitted, Trace]:
    """Rule 1: the law, and the trace with the token budget that goes with it."""

    def fit(budget: int) -> tuple[Fitted, float]:
        residuals = _steps_residuals(trace, pure, lone, tolerances, budget)
        fitted = least_squares_fit(trace.prior().law, _bounds(trace), residuals, iterations=400, step=1e-4, pull=0.05)
        return fitted, _cost(residuals(fitted.law))

    default = trace.settings.max_num_batched_tokens
    fitted, cost = fit(default)
    if trace.budget_known:
        return fitted, trace
    longest = max((len(trace.requests[p].prompt) for p in lone), default=0)
    for budget in _BUDGETS:
        if budget == default or min(budget, default) >= longest:
            continue
        other, other_cost = fit(budget)
        if other_cost < _FAR_BETTER * cost:
            fitted, cost = other, other_cost
            settings = replace(trace.settings, max_num_batched_tokens=budget)
            trace = replace(
                trace, settings=settings, caveats=[*trace.caveats, f"lone prompts tell a budget of {budget}"]
            )
    return fitted, trace


def _steps_residuals(
    trace: Trace,
    pure: Sequence[Decode],
    lone: Sequence[int],
    tolerances: Sequence[tuple[float, float]],
    budget: int,
) -> _Residuals:
    def residuals(law: StepLaw) -> list[float]:
        found = [(d.predicted_s(law) - d.gap_s) / tolerances[d.place][1] for d in pure]
        return found + [(lone_ttft_s(law, trace, p, budget) - trace.served[p].ttft_s) / tolerances[p][0] for p in lone]

    return residuals


def _cost(residuals: Sequence[float]) -> float:
    """Robust: a residual counts by its size, above 1 no longer by its square."""
    return math.fsum(2.0 * (math.sqrt(1.0 + r * r) - 1.0) for r in residuals)


# By replay


def _by_replay(
    start: Profile, trace: Trace, tolerances: Sequence[tuple[float, float]], by_steps: _Residuals, iterations: int
) -> Fitted:
    """Rule 2: from the law of `start` on, with what steps there are."""

    def residuals(law: StepLaw) -> list[float]:
        return by_steps(law) + _residuals(trace, replay(start, law, trace), tolerances)

    law = start.law
    bounds = {name: (low, coefficient(law, name), high) for name, (low, _, high) in _bounds(trace).items()}
    bounds["mixed_s"] = (1e-5, 1e-4, 0.1)
    for step in (
        0.06,
        0.02,
    ):  # wide differences first: where a queue builds up, times jump with the least change of the law
        fitted = least_squares_fit(law, bounds, residuals, iterations=iterations, step=step, pull=0.3)
        law = fitted.law
        bounds = {name: (low, coefficient(law, name), high) for name, (low, _, high) in bounds.items()}
    return fitted


def _residuals(trace: Trace, predicted: Sequence[Served], tolerances: Sequence[tuple[float, float]]) -> list[float]:
    found = []
    for real, model, (ttft, tpot) in zip(trace.served, predicted, tolerances, strict=True):
        if ttft > 0.0:
            found.append((model.ttft_s - real.ttft_s) / ttft)
            if real.tpot_s and model.tpot_s:
                found.append((model.tpot_s - real.tpot_s) / tpot)
    return found


def _tolerances(trace: Trace) -> list[tuple[float, float]]:
    """Seconds by which each request's TTFT and TPOT may be off, divided by its weight; 0: do not look."""
    at = [request.arrived_at for request in trace.requests]
    found = []
    for place, (request, served, weight) in enumerate(zip(trace.requests, trace.served, trace.weights, strict=True)):
        if not weight:
            found.append((0.0, 0.0))
            continue
        blur_s = _CLOCK_S + _CROWD_S * (place - bisect_left(at, at[place] - _CROWD_WINDOW_S))
        ttft, tpot = _SHARE * served.ttft_s + blur_s, 1.0
        if served.tpot_s is not None:
            tpot = _SHARE * served.tpot_s + blur_s / (len(request.output) - 1)
        found.append((ttft / weight, tpot / weight))
    return found


def _with_blocks(profile: Profile, trace: Trace, tolerances: Sequence[tuple[float, float]]) -> Trace:
    """Rule 3: the trace with the KV blocks at which its calls are served as they were, if it tells them."""
    formula = trace.settings.num_blocks
    wanted = _blocks_wanted(trace)
    most = max(wanted)
    if most < 0.6 * formula:
        return replace(trace, caveats=[*trace.caveats, f"num_blocks {formula}: by memory, the run never needed them"])
    crowded = [t if w >= 0.5 * most else (0.0, 0.0) for t, w in zip(tolerances, wanted, strict=True)]

    def cost(blocks: int) -> float:
        candidate = replace(trace, settings=replace(trace.settings, num_blocks=blocks))
        return _cost(_residuals(trace, replay(profile, profile.law, candidate), crowded))

    least = max(-(-(len(r.prompt) + len(r.output)) // trace.settings.block_size) for r in trace.requests) + 1
    coarse = min({max(least, formula * percent // 100) for percent in range(36, 165, 8)}, key=cost)
    best = min({max(least, coarse * percent // 100) for percent in range(94, 108, 2)}, key=cost)
    if cost(best) >= _FAR_BETTER * cost(formula):
        said = f"num_blocks {formula}: by memory, no other number explains the run far better"
        return replace(trace, caveats=[*trace.caveats, said])
    said = f"num_blocks {best}: by calls that waited for them (by memory {formula})"
    return replace(trace, settings=replace(trace.settings, num_blocks=best), caveats=[*trace.caveats, said])


def _blocks_wanted(trace: Trace) -> list[int]:
    """By place: the most KV blocks that the calls in flight with it would have filled together, found in the cache or not."""
    stamps, changes = spans_of(trace), []
    for (sent_at, _, done_at), request in zip(stamps, trace.requests, strict=True):
        blocks = -(-(len(request.prompt) + len(request.output)) // trace.settings.block_size)
        changes += [(sent_at, 1, blocks), (done_at, 0, -blocks)]
    changes.sort()
    times, sums = [at for at, _, _ in changes], list(accumulate(blocks for _, _, blocks in changes))
    return [max(sums[bisect_left(times, sent) : bisect_right(times, done)]) for sent, _, done in stamps]


def _error_pct(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean absolute error of (measured, predicted) in percent."""
    return 100.0 * math.fsum(abs(p / r - 1.0) for r, p in pairs) / max(1, len(pairs))
