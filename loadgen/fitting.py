"""The fitter: coefficients of a step law by least squares on their logarithms, whatever the residuals are of.

Rules of the file:
1. All coefficients are fitted as logarithms between bounds; below, the data sheet bounds them: no efficiency exceeds 1. One that ends
   at its bound says that a mechanism is missing or the sheet is wrong, and `fit` names the efficiencies.
2. A coefficient that the data do not tell apart stays near its prior (a weak pull), and its interval is wide.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fanmark.servers.engine.step_time import StepLaw
from fanmark.servers.profiles import Chip, Efficiencies, Model, Profile, Settings, prior_law

HOST = "host_s"  # ingress_s + egress_s: a client cannot tell them apart
INGRESS_SHARE = 0.6

Bounds = dict[str, tuple[float, float, float]]  # of a coefficient: low, start, high


@dataclass(frozen=True, slots=True)
class Fitted:
    law: StepLaw
    intervals: dict[str, tuple[float, float]]
    evaluations: int


def set_coefficients(law: StepLaw, fitted: dict[str, float]) -> StepLaw:
    values: dict[str, Any] = dict(fitted)
    if HOST in values:
        host = values.pop(HOST)
        values |= {"ingress_s": INGRESS_SHARE * host, "egress_s": (1.0 - INGRESS_SHARE) * host}
    return replace(law, **values)


def coefficient(law: StepLaw, name: str) -> float:
    return law.ingress_s + law.egress_s if name == HOST else float(getattr(law, name))


def least_squares_fit(
    law: StepLaw,
    bounds: Bounds,
    residuals: Callable[[StepLaw], list[float]],
    *,
    iterations: int,
    step: float,
    pull: float,
) -> Fitted:
    """Minimise robustly over the coefficients in `bounds` (low, start, high); 95 % intervals by the curvature at the end."""
    import numpy as np
    from scipy.optimize import least_squares

    names = list(bounds)
    low, start, high = (np.log([bounds[name][i] for name in names]) for i in range(3))
    start = np.clip(start, low + 1e-3, high - 1e-3)

    def law_at(y: Any) -> StepLaw:
        return set_coefficients(law, {name: float(v) for name, v in zip(names, np.exp(y), strict=True)})

    def all_residuals(y: Any) -> Any:
        return np.concatenate([residuals(law_at(y)), pull * (y - start)])

    found: Any = least_squares(
        all_residuals,
        start,
        bounds=(low, high),
        diff_step=[step] * len(names),
        max_nfev=iterations,
        loss="soft_l1",
        f_scale=1.0,
    )
    count = len(found.fun) - len(names)
    # The pull is no datum: it only keeps the matrix regular.
    noise = math.sqrt(float(np.sum(found.fun[:count] ** 2)) / max(1, count - len(names)))
    spread = np.sqrt(np.diag(np.linalg.pinv(found.jac.T @ found.jac))) * noise
    ends = np.exp(np.clip([found.x - 1.96 * spread, found.x + 1.96 * spread], low, high))
    intervals = {name: (float(ends[0][i]), float(ends[1][i])) for i, name in enumerate(names)}
    return Fitted(law_at(found.x), intervals, found.nfev)


def bounds_of(prior: StepLaw, ideal: StepLaw, slack: float = 1.0) -> Bounds:
    """(low, start, high) of the coefficients that any measurement speaks of. `slack` > 1 lets them under the data sheet's."""
    found = {
        name: (getattr(ideal, name) / slack, getattr(prior, name), getattr(ideal, name) * factor)
        for name, factor in (("dense_s", 30.0), ("token_s", 10.0), ("context_s", 10.0), ("attention_s", 50.0))
    }
    if prior.experts:
        found["expert_s"] = (ideal.expert_s / slack, prior.expert_s, ideal.expert_s * 10.0)
    found["sequence_s"] = (1e-7, max(2e-5, prior.sequence_s), max(1e-3, prior.sequence_s * 20.0))
    found["knee"] = (1.3, 2.5, 6.0)
    return found


def ideal_law(model: Model, chip: Chip, settings: Settings) -> StepLaw:
    return prior_law(model, chip, settings, Efficiencies(1.0, 1.0, 1.0, 1.0))


def etas(profile: Profile) -> dict[str, float]:
    return {f"eta_{name}": value for name, value in profile.efficiencies().items()}
