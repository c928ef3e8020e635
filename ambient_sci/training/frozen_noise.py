r"""Training at high levels on one noisy copy of each image that is never drawn anew: against memorisation.

Algorithm 1 of "Does Generation Require Memorization?" (Shah et al. 2025). With levels sigma drawn as always,

    sigma <  sigma_n    y = x_0,                     sigma_y = 0          denoising
    sigma >= sigma_n    y = x_0 + sigma_n n_i,       sigma_y = sigma_n    the Ambient loss

n_i belongs to image i for the whole run: what is learned at the levels where an image takes its shape comes
from x_0 + sigma_n n_i alone, and of x_0 it can hold no more than that says. Drawn anew each time, the noise
would average out, and the clean image would be taught after all. sigma_n = 0 is plain denoising, to the bit.

Both are one call of one loss, since sigma_y is one a sample. Data that have noise of their own, sigma_i, get
the rest of it: y_i + sqrt(sigma_n^2 - sigma_i^2) n_i, where sigma_i < sigma_n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ambient_sci.data.loader import CACHE_BYTES
from ambient_sci.noise import expand
from ambient_sci.randomness import seeded

#: Stream of randomness of the seed of `FrozenNoiseConfig`, which has nothing to do with the run's.
_IMAGES = 0


class Frozen(NamedTuple):
    """Measurements as the levels of a step see them: y, its noise level, and the largest of it in each
    sample, (B,), on the CPU."""

    y: Tensor
    sigma_y: Tensor
    largest: Tensor


class FrozenNoise:
    """The noise n_i of every sample, a function of (seed, i): on every machine, and after every resume, the
    same.

    Args:
        sigma_n: in the units of the data.
        seed: of the noise.
        num: samples of the data; noise of all of them is kept where that takes less than `CACHE_BYTES`, and
            drawn again with each batch where it does not.
        shape: of a measurement.
        device: where measurements come.
    """

    def __init__(
        self, sigma_n: float, seed: int, num: int, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.sigma_n, self.seed, self.shape, self.device = sigma_n, seed, shape, device
        self._kept: Tensor | None = None
        if sigma_n > 0 and num * math.prod(shape) * 4 < CACHE_BYTES:
            self._kept = self._drawn(torch.arange(num)).to(device)

    def noise(self, indices: Tensor) -> Tensor:
        """n_i of these samples, (B, ...), on the device."""
        if self._kept is None:
            return self._drawn(indices).to(self.device, non_blocking=True)
        return self._kept[indices.to(self.device, non_blocking=True)]

    def _drawn(self, indices: Tensor) -> Tensor:
        # On the CPU whatever the device: another device has another stream, and a run that is resumed on it
        # would see a second noise of the same image.
        return torch.stack(
            [torch.randn(self.shape, generator=seeded(self.seed, _IMAGES, i)) for i in indices.tolist()]
        )

    def __call__(self, indices: Tensor, y: Tensor, sigma_y: Tensor, largest: Tensor, sigma: Tensor) -> Frozen:
        """The measurements of a batch for these levels.

        Args:
            indices: which samples they are, (B,), on the CPU.
            y: measurements, (B, ...).
            sigma_y: their noise, (B,) or of the shape of ``y``.
            largest: the largest of it in each sample, (B,), on the CPU.
            sigma: levels to train at, (B,), on the CPU.
        """
        if self.sigma_n == 0:
            return Frozen(y, sigma_y, largest)
        wanted = torch.where(sigma >= self.sigma_n, self.sigma_n, 0.0).to(sigma_y)
        rest = (expand(wanted, y) ** 2 - expand(sigma_y, y) ** 2).clamp(min=0).sqrt()
        if sigma_y.ndim > 1:
            wanted = expand(wanted, sigma_y)
        return Frozen(
            y + rest * self.noise(indices).to(y),
            torch.maximum(sigma_y, wanted),
            torch.maximum(largest, torch.where(sigma >= self.sigma_n, self.sigma_n, 0.0).to(largest)),
        )
