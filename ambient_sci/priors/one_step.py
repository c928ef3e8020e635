r"""One-step generators: networks that turn noise into an image in one call.

    G(z) = D(sigma z, sigma, given),     z ~ N(0, 1)

D is a denoiser in form only, at one level and nowhere else: what distillation makes of it
(`ambient_sci.training.distillation`) answers pure noise with an image, not with a mean of images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior, Tensors, description_of, rebuild_prior
from ambient_sci.priors.given import Given, KeptRows
from ambient_sci.priors.network import NetworkPrior


class OneStepPrior(Prior):
    """A generator G(z) = D(sigma z, sigma); `generate` draws from it in one call.

    No sampler that walks from level to level takes it: its ``conditioning`` is "one-step".

    Args:
        network: D. One that takes kept rows is told that every row is kept.
        sigma: the level it is called at.

    Raises:
        InputError: a level that is not positive.
    """

    kind = "one-step"

    def __init__(self, network: Prior, sigma: float) -> None:
        super().__init__()
        if not 0 < sigma < float("inf"):
            raise InputError(f"one-step generator: expected a level > 0, got {sigma}")
        self.network, self.sigma = network, float(sigma)
        self.takes = None if network.takes is KeptRows else network.takes
        self.shape, self.data_std = tuple(network.shape), network.data_std
        self.sigma_min = self.sigma_max = self.sigma

    @property
    def conditioning(self) -> Any:
        """ "one-step"."""
        return "one-step"

    def draw(self, z: Tensor, given: Given | None = None) -> Tensor:
        """G(z) of standard normal ``z``, (B, C, H, W)."""
        return self(self.sigma * z, self.sigma, given)

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """D(x, sigma, given) at ``sigma``, the one level.

        Raises:
            InputError: a number that is another level (levels in tensors are trusted).
        """
        self.check_given(given)
        if isinstance(sigma, (int, float)) and abs(sigma / self.sigma - 1) > 1e-6:
            raise InputError(f"one-step generator: expected its one level {self.sigma:g}, got {sigma:g}")
        if self.network.takes is KeptRows:
            return self.network(x, sigma, self._everything(x))
        return self.network(x, sigma) if given is None else self.network(x, sigma, given)

    def _everything(self, x: Tensor) -> KeptRows:
        """Every row kept, in the form the network was shown its masks in."""
        from ambient_sci.operators import Masking

        channels = self.network.config.mask_channels if isinstance(self.network, NetworkPrior) else 1
        mask = torch.ones((1, channels, *self.shape[1:]), dtype=x.dtype, device=x.device)
        return KeptRows(Masking._trusted(mask, self.shape))

    def describe(self) -> dict[str, Any]:
        """The level and the network."""
        return {"kind": self.kind, "sigma": self.sigma, "network": description_of(self.network)}

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`."""
        return cls(rebuild_prior(description["network"], tensors), description["sigma"])

    def saved_tensors(self) -> Tensors:
        """Those of the network."""
        return self.network.saved_tensors()
