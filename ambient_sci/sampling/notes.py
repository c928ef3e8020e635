r"""What a result says of how it was made: counts of a run's parts as one, and notes for its reader.

The bias that truncated linear solves leave in a posterior mean, in posterior standard deviations. A solve at
level t that leaves d_t of the denoised image undone moves the next state x_s by (1 - s/t) d_t. From there on
the flow shrinks it as it shrinks everything, a mode of posterior variance c from sqrt(c + s^2) to sqrt(c).
Over all levels, the last one with s = 0,

    bias / std  ~  sum_t (1 - s/t) |d_t| / sqrt(c + s^2),

with |d_t| a root mean square over entries and chains, and c that of the posterior's standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ambient_sci.priors.base import Prior

#: Bias beside the spread from which a reader has to know of it: errors are 4 % larger than the spread says.
BIAS_NOTED = 0.3
#: The same for the solves of samplers that condition a Gaussian, by their relative residual.
RESIDUAL_NOTED = 0.1


def merge(totals: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Reports of two parts of a run as one: counts of solves and of chains add up, "worst_…" and "smallest_…"
    are extremes, the rest holds for each chain.
    """
    merged = dict(totals)
    for key, value in new.items():
        old = merged.get(key, value)
        if key.startswith(("solve", "direct")):
            merged[key] = merged.get(key, 0) + value
        elif key.startswith("smallest"):
            merged[key] = min(old, value)
        else:
            merged[key] = value if isinstance(value, str) else max(old, value)
    return merged


def stops_early(prior: Prior, low: float) -> bool:
    """Whether levels that end at ``low`` leave out spread that counts: more than a fiftieth of the data's
    standard deviation.
    """
    return low > 0.02 * prior.data_std


def solver_bias(left: Mapping[float, float], std: float) -> float:
    """Estimated bias of a posterior mean by what solves left undone, in posterior standard deviations.

    Args:
        left: noise level to mean square left undone per entry; the lowest level is the last.
        std: root mean square of the posterior's standard deviation, > 0.
    """
    levels = sorted(left, reverse=True)
    total = 0.0
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        total += (1 - s / t) * math.sqrt(left[t] / (std**2 + s**2))
    return total


def notes(prior: Prior, totals: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the result has to know: {"notes": [...]}, or nothing.

    Args:
        prior: the prior.
        totals: report of the run: its settings and the numbers of all its parts.
    """
    found, low = [prior.resized] if getattr(prior, "resized", "") else [], totals["sigma_min"]
    if stops_early(prior, low) and "final" in totals:
        learned = ", the lowest level the prior has learned" if low <= prior.sigma_min * (1 + 1e-6) else ""
        meaning = (
            "what is finer was drawn from a Gaussian of the right mean and covariance"
            if totals["final"] == "draw"
            else "samples are means of what is left open there, and spread too little"
        )
        found.append(f"sampling stopped at sigma = {low:g}{learned}: {meaning}")
    bias = totals.get("bias_of_solves")
    if bias is not None and bias > BIAS_NOTED:
        found.append(
            f"linear solves that ended early leave an estimated bias of {bias:.2g} posterior standard "
            f"deviations in the mean (more than {BIAS_NOTED:g}): repeat with twice as many iterations, "
            f"max_iterations={2 * totals['options'].get('max_iterations', 5)} (--max-iterations), and compare"
        )
    residual = totals.get("worst_relative_residual", 0.0)
    if bias is None and residual > RESIDUAL_NOTED:
        found.append(
            f"{totals['solves_above_tolerance']} of {totals['solves']} linear solves ended above the "
            f"tolerance, the worst at a relative residual of {residual:.2g}: the operator is ill-conditioned "
            f"for sampler {totals['sampler']!r}; {_remedy(totals)}"
        )
    return {"notes": found} if found else {}


def _remedy(totals: Mapping[str, Any]) -> str:
    """What to do about solves that condition a Gaussian."""
    if totals["sampler"] in ("daps", "pnp-dm"):
        return f"raise max_iterations={totals['options'].get('max_iterations', 100)}"
    return "compare with the default sampler, 'mmps'"
