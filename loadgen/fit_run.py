"""Fits a step law, and what settings it tells, to a run's folder: calls with the stamps that their client gave them.

Rules of the file:
1. Lone calls, and calls that decoded while no other's prompt was read, tell a step's time by themselves. Where there are enough of
   them (the scenario `probe` sees to it), the law is fitted to them alone: no queue, and so no chance, is in them.
2. Elsewhere the engine model serves all calls in virtual time, each as long after what it waited for as it was, until times match.
3. The token budget is the default unless another one explains the lone calls far better; the KV blocks are the memory formula's
   unless calls together wanted more than most of them, and another number explains their times far better.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from fanmark.loadgen.fitting import HOST, Bounds, Fitted, bounds_of, coefficient, etas, ideal_law, least_squares_fit
from fanmark.loadgen.traces import Served, Trace, replay
from fanmark.servers.engine.step_time import BatchShape, StepLaw
from fanmark.servers.profiles import Profile

# How well a client knows a time: a share of it, its clock and the network, and what each call sent just before adds (one processor
# sends them all, and takes in their tokens).
_SHARE = 0.02
_CLOCK_S = 2e-3
_CROWD_S = 5e-4
_CROWD_WINDOW_S = 0.1

_PURE_SHARE = 0.02  # of an answer's time, during which other prompts may be read
_ENOUGH_BATCHES, _ENOUGH_PROMPTS = 4, 4  # different ones, for rule 1
_FAR_BETTER = 0.7  # of the cost
_BUDGETS = (2048, 4096, 8192, 16384)

_Residuals = Callable[[StepLaw], list[float]]


def fit_run(trace: Trace, iterations: int = 8) -> Profile:
    """The law that makes the engine model serve a run's calls as their client saw them; settings where the run does not tell them.

    `fit` holds the mean absolute error of what was fitted to, by call: gaps between tokens and times to the first, in percent.
    """
    tolerances = _tolerances(trace)
    pure, lone = _pure_decodes(trace), _alone(trace)
    prompts = {len(trace.requests[p].prompt) for p in lone}
    profile = trace.prior()
    if len({shape.seqs for _, _, shape in pure}) >= _ENOUGH_BATCHES and len(prompts) >= _ENOUGH_PROMPTS:
        fitted, trace = _by_steps(trace, pure, lone, tolerances)
        law, budget = fitted.law, trace.settings.max_num_batched_tokens
        gaps = [(gap_s, law.seconds(shape)) for _, gap_s, shape in pure]
        firsts = [(trace.served[p].ttft_s, _lone_ttft_s(law, trace, p, budget)) for p in lone]
    else:
        fitted = _by_replay(profile, trace, tolerances, iterations)
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
    pure: Sequence[tuple[int, float, BatchShape]],
    lone: Sequence[int],
    tolerances: Sequence[tuple[float, float]],
) -> tuple[Fitted, Trace]:
    """Rule 1: the law, and the trace with the token budget that goes with it."""

    def fit(budget: int) -> tuple[Fitted, float]:
        def residuals(law: StepLaw) -> list[float]:
            found = [(law.seconds(shape) - gap_s) / tolerances[p][1] for p, gap_s, shape in pure]
            return found + [
                (_lone_ttft_s(law, trace, p, budget) - trace.served[p].ttft_s) / tolerances[p][0] for p in lone
            ]

        fitted = least_squares_fit(trace.prior().law, _bounds(trace), residuals, iterations=400, step=1e-4, pull=0.05)
        return fitted, _cost(residuals(fitted.law))

    default = trace.settings.max_num_batched_tokens
    fitted, cost = fit(default)
    if trace.budget_known:
        return fitted, trace
    longest = max(len(trace.requests[p].prompt) for p in lone)
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


def _cost(residuals: Sequence[float]) -> float:
    """Robust: a residual counts by its size, above 1 no longer by its square."""
    return math.fsum(2.0 * (math.sqrt(1.0 + r * r) - 1.0) for r in residuals)


def _lone_ttft_s(law: StepLaw, trace: Trace, place: int, budget: int) -> float:
    """Time to first token of a request that has the engine to itself: its chunks, and the launch of the step after them."""
    request = trace.requests[place]
    done, prompt = trace.cached[place], len(request.prompt)
    end_s = launched_s = 0.0
    while done < prompt:
        chunk = min(prompt - done, budget)
        shape = BatchShape(chunk, 0, 0, chunk * (done + chunk / 2), 1)
        launched_s += law.launch_seconds(shape)
        end_s = max(end_s + law.gpu_seconds(shape), launched_s)
        done += chunk
    if len(request.output) > 1:
        end_s = max(end_s, launched_s + law.graph_launch_s)
    return law.ingress_s + end_s + law.egress_s


def _spans(trace: Trace) -> list[tuple[float, float, float]]:
    """When each request arrived, had its first token and its last, as the client saw it."""
    return [
        (r.arrived_at, r.arrived_at + s.ttft_s, r.arrived_at + s.e2e_s)
        for r, s in zip(trace.requests, trace.served, strict=True)
    ]


def _alone(trace: Trace) -> list[int]:
    """The places of the calls during which there was no other."""
    spans = _spans(trace)
    found, busy_until = [], -math.inf
    for place, (sent_at, _, done_at) in enumerate(spans):
        follows = spans[place + 1][0] if place + 1 < len(spans) else math.inf
        if trace.weights[place] and busy_until <= sent_at and done_at <= follows:
            found.append(place)
        busy_until = max(busy_until, done_at)
    return found


def _pure_decodes(trace: Trace) -> list[tuple[int, float, BatchShape]]:
    """The calls that wrote their answer while no prompt was read, the gap between their tokens (s) and the mean batch meanwhile."""
    spans = _spans(trace)
    longest_s = max(done_at - sent_at for sent_at, _, done_at in spans)
    arrivals = [span[0] for span in spans]
    found = []
    for place, (_, first_at, done_at) in enumerate(spans):
        gap_s = trace.steady_s[place]
        if not trace.weights[place] or gap_s is None:
            continue
        span_s = done_at - first_at
        reading_s = seqs = context = 0.0
        for other in range(bisect_left(arrivals, first_at - longest_s), bisect_right(arrivals, done_at)):
            sent, first, done = spans[other]
            if other != place:
                reading_s += max(0.0, min(done_at, first) - max(first_at, sent))
            share_s = min(done_at, done) - max(first_at, first)
            if share_s <= 0.0:
                continue
            request = trace.requests[other]
            written = ((max(first_at, first) + min(done_at, done)) / 2 - first) / (done - first) * len(request.output)
            seqs += share_s / span_s
            context += share_s / span_s * (len(request.prompt) + written)
        if reading_s <= _PURE_SHARE * span_s:
            found.append((place, gap_s, BatchShape(0, round(seqs), round(context), 0.0, round(seqs))))
    return found


# By replay


def _by_replay(profile: Profile, trace: Trace, tolerances: Sequence[tuple[float, float]], iterations: int) -> Fitted:
    """Rule 2."""

    def residuals(law: StepLaw) -> list[float]:
        return _residuals(trace, replay(profile, law, trace), tolerances)

    bounds = _bounds(trace)
    bounds["mixed_s"] = (1e-5, 1e-4, 0.1)
    law = profile.law
    for step in (
        0.06,
        0.02,
    ):  # wide differences first: where a queue builds up, times jump with the least change of the law
        fitted = least_squares_fit(law, bounds, residuals, iterations=iterations, step=step, pull=0.05)
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
    if _blocks_wanted(trace) < 0.6 * formula:
        return replace(trace, caveats=[*trace.caveats, f"num_blocks {formula}: by memory, the run never needed them"])

    def cost(blocks: int) -> float:
        candidate = replace(trace, settings=replace(trace.settings, num_blocks=blocks))
        return _cost(_residuals(trace, replay(profile, profile.law, candidate), tolerances))

    least = max(-(-(len(r.prompt) + len(r.output)) // trace.settings.block_size) for r in trace.requests) + 1
    coarse = min({max(least, formula * percent // 100) for percent in range(36, 165, 8)}, key=cost)
    best = min({max(least, coarse * percent // 100) for percent in range(94, 108, 2)}, key=cost)
    if cost(best) >= _FAR_BETTER * cost(formula):
        return replace(trace, caveats=[*trace.caveats, f"num_blocks {formula}: by memory, the run contradicts it not"])
    said = f"num_blocks {best}: by calls that waited for them (by memory {formula})"
    return replace(trace, settings=replace(trace.settings, num_blocks=best), caveats=[*trace.caveats, said])


def _blocks_wanted(trace: Trace) -> int:
    """The most KV blocks that the calls in flight at once would have filled, what they found in the cache left out."""
    changes = []
    for (sent_at, _, done_at), request, cached in zip(_spans(trace), trace.requests, trace.cached, strict=True):
        blocks = -(-(len(request.prompt) + len(request.output) - cached) // trace.settings.block_size)
        changes += [(sent_at, 1, blocks), (done_at, 0, -blocks)]
    most = wanted = 0
    for _, _, blocks in sorted(changes):
        wanted += blocks
        most = max(most, wanted)
    return most


def _error_pct(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean absolute error of (measured, predicted) in percent."""
    return 100.0 * math.fsum(abs(p / r - 1.0) for r, p in pairs) / max(1, len(pairs))
