r"""Sampling images from a mask-conditional prior with one mask held fixed: the published baseline for masked
data.

    denoiser of a chain:   x, sigma -> h(A_B^H A_B x, sigma, B)          the same rows B at every level

in any unconditional sampler. A *baseline*, not a way to draw from the data: h is E[x_0 | A_B x_t], which
knows nothing of the rows outside B, so what those rows receive is a mean. With a Gaussian prior the samples'
covariance has the rank of A_B. An unconditional prior by EM (`ambient_sci.training.em`) has no such defect.

Source: Daras et al., "Ambient Diffusion: Learning Clean Distributions from Corrupted Data" (2023), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ambient_sci.losses import denoise_measurement
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior, require_mask_conditional
from ambient_sci.sampling.unconditional import (
    Denoise,
    chain_seeds,
    chains,
    check_generation,
    generation_grid,
)


@torch.no_grad()
def generate_fixed_mask(
    prior: Prior,
    operator: RowMaskedOperator,
    num: int,
    *,
    steps: int = 40,
    sampler: str = "heun",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw ``num`` images (num, C, H, W) from a mask-conditional prior, chain i with mask i modulo the masks
    of ``operator``.

    Args:
        prior: mask-conditional.
        operator: whose masks are used: masks like those of training, a fraction ``keep`` of whose rows the
            network was shown.
        steps, sampler, sigma_min, sigma_max, rho, batch_size, generator, progress: as for `generate`.

    Raises:
        ConditioningError: an unconditional prior, which `generate` samples as it is.
        InputError: an operator for images of another shape, an unknown sampler or impossible numbers.
    """
    require_mask_conditional(prior, "fixed-mask sampling")
    check_generation("fixed-mask sampling", num, sampler, batch_size)
    grid = generation_grid(prior, steps, sigma_min, sigma_max, rho)

    def denoiser_of(some: slice) -> Denoise:
        index = torch.arange(some.start, some.stop) % operator.batch_size
        rows = operator[index] if operator.batch_size > 1 else operator
        return lambda x, sigma: denoise_measurement(prior, rows, rows.A(x), sigma)

    seeds = chain_seeds(num, generator)
    return chains(prior, seeds, grid, sampler, batch_size, denoiser_of=denoiser_of, progress=progress)
