"""Fits a step law to a real engine's trace: the engine model serves the same requests in virtual time, again and again, until their
times match."""

import math
from collections.abc import Sequence
from dataclasses import replace

from fanmark.loadgen.fitting import bounds_of, coefficient, etas, ideal_law, least_squares_fit
from fanmark.loadgen.traces import Served, Trace, replay
from fanmark.servers.engine.step_time import StepLaw
from fanmark.servers.profiles import Profile


def fit_trace(trace: Trace, requests: int | None = None, iterations: int = 8) -> Profile:
    """The law that makes the engine model serve the first `requests` requests (all) as they were served.

    All requests of the trace are replayed each time, as later ones load the engine too, but only the first ones' times are looked
    at: per request TPOT, end-to-end and TTFT (against its mean: a TTFT may be near 0), and the means of all three.
    """
    profile = trace.prior()
    real = trace.served[:requests]
    settings, known = trace.settings, not any("efficiencies mean nothing" in line for line in trace.caveats)
    ideal = ideal_law(trace.model, trace.chip, settings)
    law = _scaled_to(profile, replace(profile.law, fixed_s=profile.law.fixed_s / 2), trace, real)
    if not known:
        ideal = law
    bounds = bounds_of(law, ideal, slack=1.0 if known else 10.0)
    bounds["mixed_s"] = (1e-5, 1e-3, 0.1)
    bounds["eager_launch_s"] = (1e-3, max(2e-3, law.eager_launch_s), 0.5)

    def residuals(candidate: StepLaw) -> list[float]:
        return _trace_residuals(real, replay(profile, candidate, trace)[: len(real)])

    # Wide differences first: where the cache overflows, times jump with the least change of the law.
    for step in (0.06, 0.02):
        fitted = least_squares_fit(law, bounds, residuals, iterations=iterations, step=step, pull=0.3)
        law = fitted.law
        bounds = {name: (low, coefficient(law, name), high) for name, (low, _, high) in bounds.items()}
    profile = replace(
        profile,
        name=f"fitted on {trace.name}",
        law=fitted.law,
        origin="fitted",
        intervals=fitted.intervals,
        confidence="B",
    )
    return replace(profile, fit=etas(profile) if known else {})


def _trace_residuals(real: Sequence[Served], predicted: Sequence[Served]) -> list[float]:
    ttft_mean = math.fsum(r.ttft_s for r in real) / len(real)
    found = []
    for r, p in zip(real, predicted, strict=True):
        found.append((p.ttft_s - r.ttft_s) / ttft_mean * 5.0)
        found.append((p.e2e_s / r.e2e_s - 1.0) * 10.0)
        if r.tpot_s and p.tpot_s:
            found.append((p.tpot_s / r.tpot_s - 1.0) * 10.0)
    for at in range(3):
        pairs = [(r[at] or 0.0, p[at] or 0.0) for r, p in zip(real, predicted, strict=True)]
        found.append((math.fsum(p for _, p in pairs) / max(1e-9, math.fsum(r for r, _ in pairs)) - 1.0) * 100.0)
    return found


def _scaled_to(profile: Profile, law: StepLaw, trace: Trace, real: Sequence[Served]) -> StepLaw:
    """The law slowed down or sped up as a whole until the mean end-to-end time is about right: where the fit starts."""
    names = ("dense_s", "expert_s", "token_s", "context_s", "attention_s", "fixed_s", "eager_launch_s", "sequence_s")
    target = math.fsum(r.e2e_s for r in real)
    for _ in range(6):
        served = replay(profile, law, trace)[: len(real)]
        factor = target / math.fsum(s.e2e_s for s in served)
        if 0.9 < factor < 1.1:
            break
        law = replace(law, **{name: getattr(law, name) * factor for name in names})
    return law
