r"""The prior of a finite set of images: the perfect memoriser.

    D(x, sigma) = sum_i r_i(x) x_i,        r_i proportional to exp(-|x - x_i|^2 / (2 sigma^2))

It is what denoising score matching has as its optimum on these images, and what a network that is trained too
long on too few tends to: its samples are copies. Tests of memorisation measure themselves by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.priors.base import TensorPrior, match_dtype, per_sample
from ambient_sci.priors.given import Given

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics


class EmpiricalPrior(TensorPrior):
    """Equal weight on each of ``images``.

    Args:
        images: (N, *shape), N >= 2, finite and not all the same.

    Raises:
        InputError: fewer images, or others.
    """

    kind = "empirical"
    arguments = ("images",)

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        if images.ndim < 2 or len(images) < 2 or not images.is_floating_point():
            raise InputError(
                "empirical prior: expected at least 2 images (N, *shape) of floats, got "
                f"{tuple(images.shape)}"
            )
        variance = float(images.double().var(0, correction=0).mean())
        if not 0 < variance < float("inf"):
            raise InputError("empirical prior: expected finite images that differ, got others")
        self.data_std = variance**0.5
        self.shape = tuple(images.shape[1:])
        self.register_buffer("images", images)

    def responsibilities(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Probabilities of the images given x_sigma = x, (B, N)."""
        z = match_dtype(self, x)
        distance = torch.cdist(
            z.flatten(1), self.images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        return (-distance / (2 * per_sample(sigma, z)[:, None] ** 2)).softmax(1)

    def forward(  # type: ignore[override]
        self, x: Tensor, sigma: float | Tensor, given: Given | None = None
    ) -> Tensor:
        """The images' mean, weighted by their responsibilities; ``sigma`` > 0."""
        self.check_given(given)
        mean = self.responsibilities(x, sigma) @ self.images.flatten(1)
        return mean.reshape(x.shape).to(x.dtype)

    def posterior(self, operator: LinearPhysics, y: Tensor, sigma_y: float | Tensor) -> Tensor:
        """Exact probabilities of the images given y = A x + sigma_y n, (B, N); for an operator of one sample,
        or as many as y."""
        weights = []
        level = torch.as_tensor(sigma_y, dtype=y.dtype, device=y.device).reshape(-1, *[1] * (y.ndim - 1))
        for image in self.images.to(y.dtype).unbind():
            residual = (y - operator.A(image.expand(len(y), *self.shape))) / level
            weights.append(-residual.flatten(1).square().sum(1) / 2)
        return torch.stack(weights, 1).softmax(1)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """``num`` of the images, drawn with replacement, (num, *shape)."""
        return self.images[
            torch.randint(len(self.images), (num,), generator=generator).to(self.images.device)
        ]
