"""A radial scan through deepinv's non-uniform Fourier transform: the tutorial's code, and its posterior against the exact one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ambient_sci as asci

pytest.importorskip("mrinufft")
pytest.importorskip("finufft")

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "noncartesian.md"


@pytest.fixture(scope="module")
def tutorial() -> dict:
    """The names that the code of the page leaves behind."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def exact_mean(prior, physics, y: Tensor, sigma_y: float) -> Tensor:
    """mu = Sigma A^H (A Sigma A^H + sigma_y^2 I)^-1 y of a Gaussian of mean zero, by plain conjugate gradients."""

    def system(z: Tensor) -> Tensor:
        return physics.A(prior.covariance(physics.A_adjoint(z))) + sigma_y**2 * z

    z, r = torch.zeros_like(y), y.clone()
    p, rr = r.clone(), r.square().sum()
    for _ in range(400):
        q = system(p)
        alpha = rr / (p * q).sum()
        z, r = z + alpha * p, r - alpha * q
        rr, before = r.square().sum(), rr
        p = r + rr / before * p
    assert float(r.norm() / y.norm()) < 1e-3
    return prior.covariance(physics.A_adjoint(z))


def test_tutorial(tutorial: dict) -> None:
    """It reconstructs: the posterior mean beats least squares by far, and every solve converges."""
    result, truth, rmse = tutorial["result"], tutorial["truth"], tutorial["rmse"]
    assert result.samples.shape == (8, *truth.shape)
    assert result.report["solves_above_tolerance"] == 0
    assert rmse(result.mean) < 0.5 * rmse(tutorial["physics"].A_dagger(tutorial["y"]))


def test_samples_are_those_of_the_exact_posterior(tutorial: dict) -> None:
    """Images drawn from the prior itself: the mean is the exact one up to its Monte Carlo error, and errors are what the spread says."""
    prior, physics, sigma_y = tutorial["prior"], tutorial["physics"], tutorial["sigma_y"]
    g = torch.Generator().manual_seed(1)
    x = prior.sample(1, g)
    y = physics.A(x)
    y = y + sigma_y * torch.randn(y.shape, generator=g)
    result = asci.reconstruct(prior, physics, y, sigma_y, samples=12, max_iterations=60, generator=g)
    exact = exact_mean(prior, physics, y, sigma_y)
    spread = result.std.square().mean().sqrt()
    # The mean of 12 samples misses the exact mean by spread / sqrt(12); a wrong operator or level moves it by a spread or more.
    drawn = result.samples.mean(0)
    assert float((drawn - exact).square().mean().sqrt() / spread) == pytest.approx(12**-0.5, rel=0.25)
    assert float((result.mean - exact).square().mean().sqrt() / spread) < 0.6 * 12**-0.5
    assert float((x - exact).square().mean().sqrt() / spread) == pytest.approx(1, rel=0.15)
