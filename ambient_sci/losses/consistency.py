r"""Consistency: what noisy data cannot supervise, the denoiser must agree with itself about.

An exact denoiser is a martingale under its own reverse process,

    D(x_t, t) = E[D(x_s, s) | x_t],     x_s = D + (s^2/t^2)(x_t - D) + s sqrt(1 - s^2/t^2) z,     D = D(x_t, t),     s < t.

A smooth denoiser that is exact at sigma_n and satisfies this for all s < t <= sigma_n is exact below sigma_n as well. With m >= 2 independent
draws of x_s and D_s^j = D(x_s^j, s), the squared violation has the unbiased estimator, entry by entry,

    (D_t - mean_j D_s^j)^2 - var_j(D_s^j) / m         (var with m - 1 in the denominator)

The variance must go: the square of the mean alone is minimised by a D_s that ignores its input. For m = 2 the estimator is the product of
two independent residuals (D_t - D_s^1)(D_t - D_s^2).

The step must be the *stochastic* one. Along the probability-flow ODE the relation is false.

Sources: Daras et al., "Consistent Diffusion Models" (2023) and "Consistent Diffusion Meets Tweedie" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.losses.ambient import estimate
from ambient_sci.noise import ancestral_step, expand
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior, require_unconditional


def squared_expectation_gap(target: Tensor, draws: Tensor) -> Tensor:
    """Unbiased estimate of (target - E[draw])^2 from independent ``draws`` (m, ...), m >= 2, entry by entry; can be negative."""
    m = draws.shape[0]
    return (target - draws.mean(0)).square() - draws.var(0, unbiased=True) / m


def consistency(
    prior: Prior,
    x_t: Tensor,
    sigma_t: float | Tensor,
    sigma_s: float | Tensor,
    *,
    draws: int = 4,
    denoised: Tensor | None = None,
    operator: RowMaskedOperator | None = None,
    generator: torch.Generator | None = None,
    detach_target: bool = False,
) -> Tensor:
    """Consistency loss between levels sigma_t and sigma_s < sigma_t, (B,), weighted by lambda(sigma_s), mean over entries.

    Args:
        prior: the denoiser, or a `StagedPrior`. Unconditional, or mask-conditional together with ``operator``.
        x_t: states (B, C, H, W); with ``operator``, y~ in measurement space (values off its rows are ignored).
        sigma_t, sigma_s: float or (B,), 0 < sigma_s < sigma_t.
        draws: m >= 2 independent draws of x_s, evaluated in one batched call.
        denoised: D(x_t, sigma_t) with its graph, if a loss has already computed it: saves one evaluation.
        operator: the kept rows B. They are walked with A_B h; the residual is taken on the *whole* of h, or held-out
            components would have no supervision below sigma_y.
        generator: source of the draws.
        detach_target: no gradient through D_s. Its fixed point is not anchored; for ablations.

    Raises:
        InputError: draws < 2, or not 0 < sigma_s < sigma_t.
        ConditioningError: the prior does not match ``operator``.
    """
    if draws < 2:
        raise InputError(f"consistency: expected at least 2 draws for an unbiased estimate, got {draws}")
    batch = x_t.shape[0]
    t, s = (expand(level, x_t).flatten().expand(batch) for level in (sigma_t, sigma_s))
    if not bool(((s > 0) & (s < t)).all()):
        raise InputError("consistency: expected 0 < sigma_s < sigma_t for every sample")
    if operator is None:
        require_unconditional(prior, "consistency without an operator")
    if denoised is None:
        denoised = prior(x_t, sigma_t) if operator is None else estimate(prior, operator, x_t, sigma_t)
    centre = denoised if operator is None else operator.A(denoised)

    def repeat(value: Tensor) -> Tensor:
        return value.repeat(draws, *([1] * (value.ndim - 1)))

    x_s = ancestral_step(repeat(x_t), repeat(centre), repeat(t), repeat(s), generator=generator)
    if operator is None:
        after = prior(x_s, repeat(s))
    else:
        rows = operator if operator.batch_size == 1 else operator[torch.arange(batch).repeat(draws)]
        after = estimate(prior, rows, x_s, repeat(s))
    after = after.unflatten(0, (draws, batch))
    if detach_target:
        after = after.detach()
    gap = squared_expectation_gap(denoised, after)
    return prior.loss_weight(s) * gap.flatten(1).mean(1)
