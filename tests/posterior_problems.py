"""Gaussian inverse problems with known posteriors, for the tests of the samplers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_sci.operators import MRI, Masking, RowMaskedOperator
from ambient_sci.priors import GaussianPrior


@dataclass
class GaussianProblem:
    """y = A x + sigma_y n with x from a Gaussian prior, and the exact posterior of each image."""

    prior: GaussianPrior
    operator: RowMaskedOperator
    y: Tensor
    sigma_y: float
    mean: Tensor
    cov: Tensor

    def coordinates(self, x: Tensor) -> Tensor:
        """T x, flat: the coordinates in which rows are measured or not."""
        return self.operator.transform(x.reshape(-1, *self.prior.shape)).flatten(1)

    def scores(self, samples: Tensor) -> dict[str, float]:
        """Errors of posterior samples (S, B, C, H, W) in units of what exact samples would have.

        "mean": error of the sample mean over its Monte-Carlo floor sqrt(tr C / S). "observed", "unobserved": sample variance over exact
        variance, averaged over the measured and the other coordinates. All averaged over the B images.
        """
        s, batch = samples.shape[:2]
        error = (samples.mean(0) - self.mean).square().sum() * s / self.cov.diagonal(dim1=1, dim2=2).sum()
        ratios: dict[str, list[Tensor]] = {"observed": [], "unobserved": []}
        for b in range(batch):
            measured = self.operator.mask[b % len(self.operator.mask)].expand(self.y.shape[1:]).flatten() > 0
            transformed = self.coordinates(samples[:, b])
            exact = self.coordinates(self.coordinates(self.cov[b]).T).diagonal()
            ratio = transformed.var(0) / exact
            ratios["observed"].append(ratio[measured])
            ratios["unobserved"].append(ratio[~measured])
        return {"mean": float(error.sqrt()), **{k: float(torch.cat(v).mean()) for k, v in ratios.items()}}


def stationary_prior(size: int = 8, power: float = 2.0, std: float = 1.0, low: float = 1.0) -> GaussianPrior:
    """Complex images (2, size, size) with power spectrum (low^2 + |k|^2)^(-power / 2), scaled to ``std`` per entry."""
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    spectrum = (low**2 + k[:, None] ** 2 + k[None] ** 2) ** (-power / 2)
    row = torch.fft.ifft2(spectrum).real
    index = torch.arange(size)
    shift = (index[:, None] - index[None]) % size
    cov = row[shift[:, None, :, None], shift[None, :, None, :]].reshape(size**2, size**2)
    cov = torch.block_diag(cov, cov) / cov[0, 0] * std**2
    return GaussianPrior(0.3 * torch.ones(2, size, size, dtype=torch.float64), (cov + cov.T) / 2)


def operator_for(kind: str, batch: int, size: int, generator: torch.Generator) -> RowMaskedOperator:
    """Random lines of k-space with the centre ("mri") or random pixels ("masking"), another mask for each image."""
    if kind == "mri":
        lines = (torch.rand(batch, 1, size, generator=generator) < 0.4).double()
        lines[..., size // 2] = 1
        return MRI(lines.expand(batch, size, size))
    pixels = (torch.rand(batch, 1, size, size, generator=generator) < 0.5).double()
    return Masking(pixels, img_size=(2, size, size))


def gaussian_problem(
    kind: str, *, batch: int = 2, sigma_y: float = 0.1, size: int = 8, seed: int = 0, **prior_settings: float
) -> GaussianProblem:
    """A measurement of each of ``batch`` draws from a stationary Gaussian prior, and the exact posteriors."""
    g = torch.Generator().manual_seed(seed)
    prior = stationary_prior(size, **prior_settings)
    operator = operator_for(kind, batch, size, g)
    clean = operator.A(prior.sample(batch, g))
    noise = torch.randn(clean.shape, generator=g, dtype=torch.float64) * operator.mask
    y = clean + sigma_y * noise
    return GaussianProblem(prior, operator, y, sigma_y, *prior.posterior(operator, y, sigma_y))
