"""Complete measurements with white noise are denoised directly: exactly in the mean, without a solve."""

from __future__ import annotations

import deepinv
import pytest
import torch
from test_posterior import real_prior
from test_samplers_exact import draw_mixture, sliced_wasserstein
from torch import Tensor

from ambient_sci.operators import MRI, Identity, Masking
from ambient_sci.priors import GaussianMixturePrior
from ambient_sci.sampling import reconstruct

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(prior, batch: int, sigma: float | Tensor, seed: int = 0) -> Tensor:
    x = prior.sample(batch, generator(seed))
    level = torch.as_tensor(sigma, dtype=F64).reshape(-1, 1, 1, 1)
    return x + level * torch.randn(x.shape, generator=generator(seed + 1), dtype=F64)


COMPLETE = {
    "identity": Identity((2, 8, 8)),
    "mask of ones": Masking(torch.ones(1, 1, 8, 8), img_size=(2, 8, 8)),
    "fully sampled scan": MRI(torch.ones(8, 8, dtype=F64)),
    "deepinv": deepinv.physics.Denoising(),
}


@pytest.mark.parametrize("kind", COMPLETE)
@pytest.mark.parametrize("low", [0.3, 0.05])
def test_gaussian_posteriors_are_exact(kind, low):
    """The mean to rounding, whatever the number of samples; the covariance to its Monte Carlo error. The
    prior's levels end at the noise, or below it."""
    operator, prior = COMPLETE[kind], real_prior(2)
    image = noisy(prior, 2, 0.3)
    y = operator.A(image)
    exact, cov = prior.posterior(Identity((2, 8, 8)), image, 0.3)
    result = reconstruct(
        prior, operator, y, 0.3, samples=300, sigma_min=low, root_iterations=12, generator=generator(2)
    )
    assert torch.allclose(result.mean.flatten(1), exact.flatten(1), atol=1e-8)
    assert "solves" not in result.report and result.report["direct_chains"] == 600
    ratio = result.std.square().flatten(1).mean() / cov.diagonal(dim1=1, dim2=2).mean()
    assert abs(float(ratio) - 1) < 0.03
    # Along the axes of the exact covariance the samples have its variances: a sum of 300 x 128 squares.
    values, axes = torch.linalg.eigh(cov[0])
    along = (result.samples[:, 0].flatten(1) - exact[0].flatten()) @ axes
    assert torch.allclose((along.square() / values).mean(), torch.tensor(1.0).double(), atol=0.04)


def test_mixtures_have_the_exact_mean_and_the_right_samples():
    """A posterior of several modes: the mean in closed form, samples as far from the posterior as exact ones
    of that number are, within a third."""
    g = generator(3)
    means = 0.5 * torch.randn(4, 2, 3, 3, generator=g, dtype=F64)
    prior = GaussianMixturePrior(
        means, torch.tensor([0.15, 0.2, 0.25, 0.3]).double(), torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    )
    y = noisy(prior, 6, 0.9, seed=5)
    weights, centres, covs = posterior = prior.posterior(Identity((2, 3, 3)), y, 0.9)
    assert weights.max(1).values.min() < 0.8
    result = reconstruct(
        prior, Identity((2, 3, 3)), y, 0.9, samples=512, batch_size=4096, generator=generator(1)
    )
    assert torch.allclose(
        result.mean.flatten(1), (weights[..., None] * centres).sum(1).reshape(6, -1), atol=1e-8
    )
    reference = draw_mixture(*posterior, 4096, g)
    floor = torch.stack([sliced_wasserstein(draw_mixture(*posterior, 512, g), reference) for _ in range(8)])
    assert sliced_wasserstein(result.samples.flatten(2), reference) < 1.33 * floor.mean()


def test_one_sample_has_the_mean_already():
    prior = real_prior(1)
    y = noisy(prior, 2, 0.3)
    result = reconstruct(prior, Identity((1, 8, 8)), y, 0.3, samples=1, generator=generator())
    exact, _ = prior.posterior(Identity((1, 8, 8)), y, 0.3)
    assert torch.allclose(result.mean.flatten(1), exact.flatten(1), atol=1e-8)


def directly_denoised(operator, y, sigma, **settings) -> int:
    prior = settings.pop("prior", None) or real_prior(1)
    result = reconstruct(
        prior, operator, y, sigma, samples=2, steps=4, batch_size=64, generator=generator(), **settings
    )
    return result.report.get("direct_chains", 0)


def test_what_is_not_denoised_directly():
    prior, identity = real_prior(1), Identity((1, 8, 8))
    y = noisy(prior, 2, 0.3)
    learned = real_prior(1)
    learned.sigma_min = 0.3
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 3, 3] = 0
    maps = torch.randn(2, 8, 8, dtype=torch.complex128, generator=generator())
    scan = MRI(torch.ones(8, 8, dtype=F64), coil_maps=maps)
    both = real_prior(2)
    assert directly_denoised(identity, y, 0.3) == 4
    assert directly_denoised(identity, y.float(), 0.3, prior=learned.float()) == 4  # 0.3 rounded is still 0.3
    learned = learned.double()
    assert directly_denoised(identity, y, 0.25, prior=learned) == 0
    assert directly_denoised(identity, y, 0.25, prior=learned, sigma_min=0.1) == 0
    assert directly_denoised(identity, y, 0.3, sigma_min=0.4) == 0
    assert directly_denoised(identity, y, 3.0, sigma_max=2.0) == 0
    assert directly_denoised(identity, y, 0.3 + 0.1 * (y > 0)) == 0
    assert directly_denoised(Masking(mask, img_size=(1, 8, 8)), y * mask, 0.3) == 0
    assert directly_denoised(scan, scan.A(both.sample(2, generator())), 0.3, prior=both) == 0
    assert directly_denoised(identity, y, 0.3, direct=False) == 0
    assert directly_denoised(identity, y, 0.3, final="mean") == 0
    blur = deepinv.physics.Blur(filter=torch.ones(1, 1, 3, 3, dtype=F64) / 9, padding="circular")
    assert directly_denoised(blur, y, 0.3) == 0


@pytest.mark.parametrize("physics", ["ours", "deepinv"])
def test_an_image_is_the_same_alone_and_among_others(physics):
    """Levels that differ, one below what the prior knows, one far above: each image goes its own way,
    whatever the batch."""
    operator = Identity((1, 8, 8)) if physics == "ours" else deepinv.physics.Denoising()
    prior = real_prior(1)
    prior.sigma_min = 0.2
    levels = torch.tensor([0.1, 0.2, 0.3, 1.5]).double()
    y = noisy(prior, 4, levels)
    settings = {"samples": 3, "steps": 8}
    together = [
        reconstruct(prior, operator, y, levels, batch_size=b, generator=generator(1), **settings)
        for b in (1, 5, 64)
    ]
    assert together[0].report["direct_chains"] == 9
    for other in together[1:]:
        assert torch.allclose(together[0].samples, other.samples, atol=1e-9)
        assert torch.allclose(together[0].mean, other.mean, atol=1e-9)
        assert other.report["direct_chains"] == 9
    exact, _ = prior.posterior(Identity((1, 8, 8)), y[3:], 1.5)
    assert torch.allclose(together[0].mean[3:].flatten(1), exact.flatten(1), atol=1e-8)
    assert (together[0].samples[0] - together[0].samples[1]).abs().amax((1, 2, 3)).min() > 0.05


def test_it_is_cheap():
    """At the lowest level: one evaluation, and the products of the last draw."""
    prior = real_prior(1)
    prior.sigma_min = 0.3
    y = noisy(prior, 2, 0.3)
    result = reconstruct(prior, Identity((1, 8, 8)), y, 0.3, samples=2, generator=generator())
    assert result.report["network_evaluations"] == 1 and result.report["jacobian_products"] == 5
