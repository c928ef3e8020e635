r"""A Gaussian prior for images too large for a covariance matrix: stationary about its mean, so that Fourier
modes are independent.

    x_0 = mu + F^H sqrt(S) F z          D(x, sigma) = mu + F^H [S / (S + sigma^2)] F (x - mu)

F is the orthonormal Fourier transform of each channel, S >= 0 the spectrum. The mean image is free, and
carries what is not stationary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import draw_noise, expand
from ambient_sci.priors.base import TensorPrior, match_dtype, per_sample
from ambient_sci.priors.given import Given


class StationaryGaussianPrior(TensorPrior):
    """Gaussian with a mean image and a power spectrum.

    Args:
        mean: (C, H, W).
        spectrum: variances of the Fourier modes, (C, H, W) >= 0, S(k) = S(-k), as `torch.fft.fft2` orders
            them.

    Raises:
        InputError: shapes that differ, or a spectrum that is negative or zero everywhere.
    """

    kind = "stationary"
    arguments = ("mean", "spectrum")

    def __init__(self, mean: Tensor, spectrum: Tensor) -> None:
        super().__init__()
        if mean.ndim != 3 or mean.shape != spectrum.shape:
            raise InputError(
                f"stationary prior: expected mean and spectrum (C, H, W), got {tuple(mean.shape)} and "
                f"{tuple(spectrum.shape)}"
            )
        if not bool((spectrum >= 0).all()) or not bool((spectrum > 0).any()):
            raise InputError("stationary prior: expected a spectrum >= 0, somewhere positive")
        self.shape = tuple(mean.shape)
        self.data_std = float(spectrum.mean().sqrt())
        self.register_buffer("mean", mean)
        self.register_buffer("spectrum", spectrum)

    def _filtered(self, x: Tensor, gain: Tensor) -> Tensor:
        return torch.fft.ifft2(gain * torch.fft.fft2(x, norm="ortho"), norm="ortho").real

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """The Wiener filter mu + F^H [S / (S + sigma^2)] F (x - mu)."""
        self.check_given(given)
        z = match_dtype(self, x)
        total = self.spectrum + expand(per_sample(sigma, z), z) ** 2
        gain = torch.where(
            total > 0, self.spectrum / total, torch.ones_like(total)
        )  # sigma = 0 on a null mode: x itself
        return (self.mean + self._filtered(z - self.mean, gain)).to(x.dtype)

    def covariance(self, x: Tensor) -> Tensor:
        """Sigma x = F^H S F x."""
        return self._filtered(x, self.spectrum)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """``num`` draws, (num, C, H, W)."""
        z = draw_noise(self.mean.expand(num, *self.shape), generator)
        return self.mean + self._filtered(z, self.spectrum.sqrt())
