"""What consistency converges to on a scalar Gaussian N(0, v), where everything is linear, and ways to get it wrong that look right."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import F64, normal, seeded, z_score
from torch import Tensor, nn

from ambient_sci.losses import consistency, squared_expectation_gap
from ambient_sci.noise import ancestral_step
from ambient_sci.priors import Prior, StagedPrior

V, T, S = 0.5, 0.4, 0.2
NUM = 200_000


class LinearPrior(Prior):
    """The denoiser of N(0, v) with v to be learned, of images (1, 1, 1)."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance), dtype=F64))
        self.shape, self.data_std = (1, 1, 1), math.sqrt(V)

    def forward(self, x: Tensor, sigma: float | Tensor, mask: Tensor | None = None) -> Tensor:
        v = self.log_variance.exp()
        level = torch.as_tensor(sigma, dtype=F64).reshape(-1, 1, 1, 1)
        return v / (v + level**2) * x


def states(level: float, variance: float = V, seed: int = 0) -> Tensor:
    return math.sqrt(variance + level**2) * normal(NUM, 1, 1, 1, seed=seed)


def slopes(prior: Prior, parameter: Tensor, t: float, variance: float = V) -> Tensor:
    """d loss / d log v of every sample, with the same draws on both sides of a central difference."""
    step, values = 1e-4, []
    with torch.no_grad():
        for move in (step, -2 * step):
            parameter += move
            values.append(consistency(prior, states(t, variance), t, S, draws=2, generator=seeded(1)))
        parameter += step
    return (values[0] - values[1]) / (2 * step)


def test_the_square_of_the_mean_is_biased_by_the_variance():
    """At the exact denoiser the estimator has mean zero, |z| < 4.5 (7e-6); the square of the mean alone has var / m, and shrinking D_s
    makes it smaller: it would be learned wrong."""
    exact, x = LinearPrior(V), states(T)
    with torch.no_grad():
        x_t, d_t = x.repeat(2, 1, 1, 1), exact(x, T)
        x_s = ancestral_step(x_t, d_t.repeat(2, 1, 1, 1), T, S, generator=seeded(2))
        draws = exact(x_s, S).unflatten(0, (2, NUM))
    assert abs(z_score(squared_expectation_gap(d_t, draws))) < 4.5
    spread = (V / (V + S**2)) ** 2 * S**2 * (1 - (S / T) ** 2)
    biased = (d_t - draws.mean(0)).square()
    assert float(biased.mean()) == pytest.approx(spread / 2, rel=0.02)

    def slope(estimate) -> float:
        return float((estimate(1.01 * draws) - estimate(0.99 * draws)).mean()) / 0.02

    right = slope(lambda d: squared_expectation_gap(d_t, d))
    wrong = slope(lambda d: (d_t - d.mean(0)).square())
    assert abs(right) < 0.05 * wrong  # wrong = spread > 0: it asks for a smaller D_s


def test_gradient_through_both_is_anchored():
    """Below a frozen exact anchor, the expected gradient is zero at v and pulls towards it elsewhere."""
    for variance, sign in ((V, 0), (1.3 * V, 1), (0.7 * V, -1)):
        below = LinearPrior(variance)
        z = z_score(slopes(StagedPrior(LinearPrior(V), below, T), below.log_variance, T))
        assert abs(z) < 4.5 if sign == 0 else z * sign > 20, (variance, z)


class Stopped(LinearPrior):
    """A prior whose answers are constants."""

    def __init__(self, prior: Prior) -> None:
        super().__init__(V)
        self.prior = prior

    def forward(self, x: Tensor, sigma: float | Tensor, mask: Tensor | None = None) -> Tensor:
        return self.prior(x, sigma).detach()


def stopped(prior: Prior, x: Tensor, t: float) -> Tensor:
    """The consistency loss without gradient through D_s."""
    return consistency(Stopped(prior), x, t, S, draws=2, denoised=prior(x, t), generator=seeded(1))


def test_stop_gradient_on_the_target_is_not_anchored():
    """Without gradient through D_s the anchor teaches nothing, and below it *every* v is a fixed point."""
    for variance in (V, 1.3 * V):
        below = LinearPrior(variance)
        hybrid = StagedPrior(LinearPrior(V).requires_grad_(False), below, T)
        x = states(T)[:1000]
        at_anchor = stopped(hybrid, x, T)
        assert not at_anchor.requires_grad
        # Between two levels below: D_t - E D_s is zero at every v, so its product with dD_t / dv is, too.
        t = 0.9 * T
        x = states(t, variance)
        loss = stopped(hybrid, x, t)
        (slope,) = torch.autograd.grad(loss.sum(), below.log_variance)
        scale = float(consistency(hybrid, x, t, S, draws=2, generator=seeded(1)).detach().abs().sum())
        assert abs(float(slope)) / scale < 0.02
