r"""Problems whose clean distribution is known exactly, and distances to it.

    ring      five modes at radius 1 in the plane, mode std .15
    mixture   eight modes in 16 dimensions, standard normal centres scaled by 1/2, mode std .15

Distance: sliced Wasserstein-2 over fixed random directions. Error of a denoiser: root mean square over
samples *and entries* of D(x, sigma) - E[x_0 | x] at x = x_0 + sigma z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ambient_sci.evaluation.distances import sliced_wasserstein
from ambient_sci.operators import Identity
from ambient_sci.priors import GaussianMixturePrior, Prior

MODE_STD = 0.15
__all__ = ["denoiser_error", "noisy_data", "reference", "sliced_wasserstein", "truth"]
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


def truth(name: str) -> GaussianMixturePrior:
    """The clean distribution of a part, as a prior with images (1, 1, n)."""
    if name == "ring":
        angle = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
        means = torch.stack([angle.cos(), angle.sin()], 1)
    else:
        generator = torch.Generator().manual_seed(16)
        means = 0.5 * torch.randn(8, 16, generator=generator, dtype=torch.float64)
    return GaussianMixturePrior(means[:, None, None], MODE_STD)


def noisy_data(name: str, num: int, sigma_n: float, seed: int) -> tuple[Identity, Tensor, float]:
    """Measurements y = x_0 + sigma_n z of ``num`` fresh draws; sigma_n = 0 gives clean data."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = truth(name).sample(num, generator)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return Identity(tuple(x.shape[1:])), (x + sigma_n * noise).float(), sigma_n


def reference(name: str, num: int, seed: int) -> Tensor:
    """A fresh draw of the truth."""
    return truth(name).sample(num, torch.Generator().manual_seed(5000 + seed))


@torch.no_grad()
def denoiser_error(prior: Prior, name: str, num: int = 20_000) -> dict[str, float]:
    """RMS error of D by noise level, against the exact posterior mean."""
    exact, generator = truth(name), torch.Generator().manual_seed(9)
    x0 = exact.sample(num, generator)
    errors = {}
    for sigma in LEVELS:
        x = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        got = prior(x.float(), sigma).double()
        errors[f"{sigma:g}"] = float((got - exact(x, sigma)).square().mean().sqrt())
    return errors
