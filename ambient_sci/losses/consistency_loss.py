r"""Consistency: what noisy data cannot supervise, the denoiser must agree with itself about.

An exact denoiser is a martingale under its own reverse process,

    D(x_t, t) = E[D(x_s, s) | x_t],     x_s = D + (s^2/t^2)(x_t - D) + s sqrt(1 - s^2/t^2) z,
    D = D(x_t, t),     s < t.

A smooth denoiser that is exact at sigma_n and satisfies this for all s < t <= sigma_n is exact below sigma_n
as well. With m >= 2 independent draws of x_s and D_s^j = D(x_s^j, s), the squared violation has the unbiased
estimator, entry by entry,

    (D_t - mean_j D_s^j)^2 - var_j(D_s^j) / m         (var with m - 1 in the denominator)

The variance must go: the square of the mean alone is minimised by a D_s that ignores its input. For m = 2 the
estimator is the product of two independent residuals (D_t - D_s^1)(D_t - D_s^2). Gradients go through D_s as
well as through D_t: with D_s taken as a constant, every denoiser that is a martingale is a fixed point,
whatever the anchor says.

The step must be the *stochastic* one. Along the probability-flow ODE the relation is false.

*Antithetic* draws come in pairs of opposite noise z, -z, and D_s^j is the mean over a pair: of m draws, m/2
means are left that are independent, and the estimator with m/2 in place of m is unbiased as before. What of
D_s is linear in z cancels in a pair, and for close levels that is nearly all of it: for a Gaussian prior each
value of the loss is exactly its mean. So levels may be closer, where the step is less biased, and the
violation (which shrinks like the gap) does not drown in noise (which shrinks like its root).

For mixtures one step is biased, the more the farther apart the levels are. Close levels have little bias and
see little: of an error of D that builds up from t to s in n pairs, each sees an n-th, n^2 times less in the
square. *Sub-steps* keep the levels apart and the bias small: x_s is reached in q steps of equal factors, each
with D of the network as it is, without gradient. What is left of the gradient goes through D_t, D_s and the
first step; where D is exact it is zero as before. Far from there nothing holds the steps in between: at a
factor e^-1 in 4 or 8 steps training ran away on the ring, at e^-0.4 in 4 it did not.

The weight is lambda(s) as in the other losses: with a fraction f of the rows kept, the missing ones leave an
error that no s makes small, and weighing them by 1/s^2 would leave the lowest levels' missing rows to decide
alone.

Sources: Daras et al., "Consistent Diffusion Models" (2023) and "Consistent Diffusion Meets Tweedie" (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.losses.tweedie_loss import denoise_measurement
from ambient_sci.noise import ancestral_step, draw_noise, expand
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.priors.modes import evaluating


def squared_expectation_gap(target: Tensor, draws: Tensor) -> Tensor:
    """Unbiased estimate of (target - E[draw])^2 from independent ``draws`` (m, ...), m >= 2, entry by entry.

    It can be negative.
    """
    m = draws.shape[0]
    return (target - draws.mean(0)).square() - draws.var(0, unbiased=True) / m


def opposite_noise(like: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Noise for ``draws`` copies of ``like`` (B, ...), (draws B, ...): a half, and the same negated."""
    half = draw_noise(like.repeat(draws // 2, *([1] * (like.ndim - 1))), generator)
    return torch.cat([half, -half])


def consistency_step(
    prior: Prior,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    denoised: Tensor,
    *,
    draws: int = 4,
    antithetic: bool = False,
    substeps: int = 1,
    operator: RowMaskedOperator | None = None,
    given: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`consistency` for levels (B,) that are known to fit and a D_t that is there, (B,). Nothing is checked
    here.

    Args:
        prior: the denoiser at the levels ``s``.
        x_t, t, s: state and levels, see `consistency`.
        denoised: D(x_t, t) with its graph.
        draws, antithetic, substeps, operator, given, generator: see `consistency`.
    """
    batch = len(x_t)

    def repeat(value: Tensor) -> Tensor:
        return value.repeat(draws, *([1] * (value.ndim - 1)))

    told = None if given is None else given.repeat(draws)
    rows = operator
    if operator is not None and operator.batch_size > 1:
        rows = operator[torch.arange(batch).repeat(draws)]
    x, level, goal, answer = repeat(x_t), repeat(t), repeat(s), repeat(denoised)
    for left in range(substeps, 0, -1):
        if left < substeps:
            with torch.no_grad(), evaluating(prior):
                answer = _answer(prior, rows, x, level, told)
        lower = goal if left == 1 else level * (goal / level) ** (1 / left)
        centre = answer if rows is None else rows.A(answer)
        noise = opposite_noise(x_t, draws, generator) if antithetic else None
        x, level = ancestral_step(x, centre, level, lower, generator=generator, noise=noise), lower
    after = _answer(prior, rows, x, goal, told)
    after = after.unflatten(0, (draws, batch))
    if antithetic:
        after = after.unflatten(0, (2, draws // 2)).mean(0)
    gap = squared_expectation_gap(denoised, after)
    fraction = 1.0 if operator is None else operator.kept_fraction.to(s)
    return prior.loss_weight(s, fraction) * gap.flatten(1).mean(1)


def _answer(prior: Any, rows: RowMaskedOperator | None, x: Tensor, level: Tensor, told: Any) -> Tensor:
    """D of states, or h of measurements of ``rows``."""
    if rows is not None:
        return denoise_measurement(prior, rows, x, level, told)
    return prior(x, level) if told is None else prior(x, level, told)


def consistency(
    prior: Prior,
    x_t: Tensor,
    sigma_t: float | Tensor,
    sigma_s: float | Tensor,
    *,
    draws: int = 4,
    antithetic: bool = False,
    substeps: int = 1,
    denoised: Tensor | None = None,
    operator: RowMaskedOperator | None = None,
    given: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Consistency loss between levels sigma_t and sigma_s < sigma_t, (B,), weighted by lambda(sigma_s), mean
    over entries.

    Args:
        prior: the denoiser, or a `StagedPrior`. Unconditional, or mask-conditional together with
            ``operator``.
        x_t: states (B, C, H, W); with ``operator``, y~ in measurement space (values off its rows are
            ignored).
        sigma_t, sigma_s: float or (B,), 0 < sigma_s < sigma_t.
        draws: m >= 2 draws of x_s, evaluated in one batched call; independent, or
        antithetic: in pairs of opposite noise, m >= 4 and even.
        substeps: steps from sigma_t to sigma_s; each beyond the first costs m evaluations without gradient.
        denoised: D(x_t, sigma_t) with its graph, if a loss has already computed it: saves one evaluation.
        operator: the kept rows B. They are walked with A_B h; the residual is taken on the *whole* of h, or
            held-out components would have no supervision below sigma_y.
        given: what the denoiser is told besides, with a method ``repeat(times)`` that tiles the batch.
        generator: source of the draws.

    Raises:
        InputError: draws < 2 (antithetic: < 4, or odd), substeps < 1, or not 0 < sigma_s < sigma_t.
        ConditioningError: the prior does not match ``operator``.
    """
    if draws < 2:
        raise InputError(f"consistency: expected at least 2 draws for an unbiased estimate, got {draws}")
    if antithetic and (draws < 4 or draws % 2):
        raise InputError(f"consistency: expected 4 antithetic draws, or an even number above, got {draws}")
    if substeps < 1:
        raise InputError(f"consistency: expected at least 1 substep, got {substeps}")
    levels = [expand(level, x_t).flatten() for level in (sigma_t, sigma_s)]
    if any(len(level) not in (1, len(x_t)) for level in levels):
        raise InputError("consistency: expected one level per sample, got one per entry")
    t, s = (level.expand(len(x_t)) for level in levels)
    if not bool(((s > 0) & (s < t)).all()):
        raise InputError("consistency: expected 0 < sigma_s < sigma_t for every sample")
    if operator is None:
        require_unconditional(prior, "consistency without an operator")
    if denoised is None:
        denoised = _answer(prior, operator, x_t, t, given)
    options: Any = {"draws": draws, "antithetic": antithetic, "substeps": substeps, "generator": generator}
    return consistency_step(prior, x_t, t, s, denoised, operator=operator, given=given, **options)
