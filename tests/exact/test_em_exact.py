"""EM on Gaussian data reaches the maximum-likelihood Gaussian of the incomplete measurements, found here by
another way.
"""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import F64, gaussian_prior, normal, random_mask, seeded
from torch import Tensor

from ambient_sci.operators import MRI, Identity, Independent, Masking, RowMaskedOperator
from ambient_sci.priors import operator_matrix
from ambient_sci.training.gaussian_em import fit_gaussian, fit_stationary

NUM = 400


def problem(name: str) -> tuple[RowMaskedOperator, Tensor, Tensor, tuple[int, ...]]:
    """Operator, measurements and noise levels (N,) of Gaussian images."""
    shape = (2, 2, 2) if name.startswith("mri") else (1, 2, 3)
    x = gaussian_prior(shape, seed=3).sample(NUM, seeded(4))
    if name == "noise":
        operator: RowMaskedOperator = Identity(shape)
    elif name.startswith("mri"):
        operator = MRI(random_mask(NUM, 1, 2, 2, keep=0.7, seed=5))
    else:
        design = Independent(shape, "pixels", 0.7)
        operator = Masking(design.sample(NUM, seeded(5)), img_size=shape, design=design)
    # "none": no noise. "entry": noise that differs from entry to entry, some of it zero. "mix": noise that
    # differs from sample to sample, some of it zero, and rows missing in three of four samples.
    sigma = torch.full((NUM,), 0.4, dtype=F64)
    if name.endswith("mix"):
        sigma = torch.linspace(0, 0.8, NUM, dtype=F64)
        mask = operator.mask.clone()
        mask[::4] = 1
        operator = operator.with_mask(mask)
    if name.endswith("none"):
        sigma = torch.zeros(NUM, dtype=F64)
    operator = operator.to(F64)
    if name.endswith("entry"):
        sigma = (0.8 * torch.rand(NUM, *shape, generator=seeded(7), dtype=F64) - 0.2).clamp(min=0)
    noise = sigma.reshape(NUM, *(shape if sigma.ndim > 1 else [1] * 3)) * normal(NUM, *shape, seed=6)
    return operator, operator.A(x) + noise * operator.mask, sigma, shape


def maximum_likelihood(
    operator: RowMaskedOperator, y: Tensor, sigma: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, float]:
    """Covariance and log-likelihood a sample, by a quasi-Newton method on mean and Cholesky factor."""
    n = math.prod(shape)
    a = operator_matrix(operator, shape).expand(len(y), -1, -1)
    mask = operator.mask.expand(y.shape).flatten(1)
    mean = torch.zeros(n, dtype=F64, requires_grad=True)
    root = torch.eye(n, dtype=F64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [mean, root], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        cov = a @ (root @ root.T) @ a.mT + torch.diag_embed(sigma.reshape(NUM, -1) ** 2 * mask + 1 - mask)
        law = torch.distributions.MultivariateNormal((a @ mean), cov)
        # Rows that were not measured are zero, of variance 1: a constant to take off.
        constant = -0.5 * math.log(2 * math.pi) * (1 - mask).sum(1)
        return -(law.log_prob(y.flatten(1) * mask) - constant).mean()

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return (root @ root.T).detach(), -float(loss().detach())


@pytest.mark.parametrize(
    "name",
    [
        *("noise", "masking", "mri", "masking-mix", "mri-mix"),
        *("noise-none", "masking-none", "mri-none", "noise-entry", "masking-entry", "mri-entry"),
    ],
)
def test_em_reaches_the_maximum_likelihood_covariance(name):
    """To 2 % of its norm; the likelihood rises at every iteration, and nothing has a higher one."""
    operator, y, sigma, shape = problem(name)
    fit = fit_gaussian(operator, y, sigma, shape, iterations=4000, tolerance=1e-9)
    best, likelihood = maximum_likelihood(operator, y, sigma, shape)
    error = float((fit.prior.cov - best).norm() / best.norm())
    assert error < 0.02, error
    history = torch.tensor(fit.log_likelihood)
    assert bool((history.diff() > -1e-10).all()) and len(history) > 3
    assert history[-1] == pytest.approx(likelihood, abs=2e-4)


def test_missing_noise_is_noticed():
    """What the test above would not pass: the noise left out of the model inflates the covariance by about
    sigma^2 = 0.16.
    """
    operator, y, sigma, shape = problem("noise")
    right = fit_gaussian(operator, y, sigma, shape, iterations=2000).prior.cov
    wrong = fit_gaussian(operator, y, 0.01, shape, iterations=2000).prior.cov
    assert float((wrong - right).diagonal().mean()) == pytest.approx(0.16, rel=0.05)


@pytest.mark.parametrize("sigma", [0.0, "entry"])
def test_fewer_samples_than_unknowns(sigma):
    """20 images of 36 pixels, where a likelihood without noise is unbounded: a Gaussian that is finite,
    explains the data, and says that a floor stood in for the noise.
    """
    operator = Masking(random_mask(20, 1, 6, 6), img_size=(1, 6, 6)).to(F64)
    y = operator.A(gaussian_prior((1, 6, 6)).sample(20, seeded()))
    levels = 0.0 if sigma == 0 else torch.where(normal(*y.shape, seed=1) > 0, 0.1, 0.0)
    fit = fit_gaussian(operator, y, levels, (1, 6, 6), iterations=200)
    assert torch.isfinite(fit.prior.cov).all() and torch.linalg.eigvalsh(fit.prior.cov)[0] > -1e-9
    assert fit.log_likelihood[-1] > fit.log_likelihood[0]
    assert fit.noise_floor is not None and 0 < fit.noise_floor < 2e-3 * float(y.std() + 1)
    assert fit_gaussian(operator, y, 0.1, (1, 6, 6), iterations=2).noise_floor is None


@pytest.mark.parametrize("name", ["noise", "masking", "mri"])
@pytest.mark.parametrize("form", ["none", "entry"])
def test_stationary_em_without_noise_and_with_noise_of_each_entry(name, form):
    """As below, with no noise, and with noise of 0 to 0.6 that differs by entry."""
    recovered(
        name, {"none": 0.0, "entry": 0.6 * torch.rand(300, 2, 8, 8, generator=seeded(8), dtype=F64)}[form]
    )


@pytest.mark.parametrize("name", ["noise", "masking", "mri"])
def test_stationary_em_recovers_mean_and_spectrum(name):
    """300 images of 8 x 8, spectrum ~ 1/k^2: each mode's variance is known to 8 % (one standard error of 300
    draws, and the noise's share), so the mean relative error over modes stays below 25 %.
    """
    recovered(name, 0.3)


def recovered(name: str, sigma: float | Tensor) -> None:
    shape, num = (2, 8, 8), 300
    k = torch.fft.fftfreq(8, dtype=F64)
    spectrum = (0.05 / (0.02 + k[:, None] ** 2 + k**2)).expand(shape)
    z = torch.fft.fft2(normal(num, *shape, seed=1), norm="ortho")
    x = 0.7 + torch.fft.ifft2(spectrum.sqrt() * z, norm="ortho").real
    if name == "noise":
        operator: RowMaskedOperator = Identity(shape)
    elif name == "mri":
        operator = MRI(random_mask(num, 1, 8, 8, keep=0.7, seed=2))
    else:
        operator = Masking(Independent(shape, "pixels", 0.7).sample(num, seeded(2)), img_size=shape)
    operator = operator.to(F64)
    y = operator.A(x) + sigma * normal(num, *shape, seed=3) * operator.mask
    prior = fit_stationary(operator, y, sigma, shape, iterations=30, generator=seeded(4))
    assert float((prior.spectrum / spectrum - 1).abs().mean()) < 0.25
    assert float(prior.mean.mean()) == pytest.approx(0.7, abs=0.1)
