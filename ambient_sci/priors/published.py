r"""Priors in the preconditioning of published networks, where it is none of the library's own.

    VEPrior                  D(x, sigma) = x + sigma F(x, log(sigma / 2))                  [Song et al. 2021]
    AmbientDiffusionPrior    h(x, sigma, B) = c_skip x + c_out F(c_in [x, m])              [Daras et al. 2023]

The second is mask-conditional: x = A_B^H y~ is zero where nothing was kept, m is the mask of B on as many
channels as the image has, and EDM's preconditioning is around both, with the network's first channels as the
answer. VP networks are `VPPrior`, EDM's own `NetworkPrior`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import expand
from ambient_sci.priors.backbones import build
from ambient_sci.priors.base import Prior, Tensors, at_least_single, filled, per_sample
from ambient_sci.priors.config import NetworkConfig
from ambient_sci.priors.given import Given, KeptRows
from ambient_sci.priors.network import call_network


class _Published(Prior):
    """A backbone by name with a preconditioning of its own."""

    def __init__(
        self,
        network: NetworkConfig,
        shape: tuple[int, ...],
        data_std: float,
        sigma_min: float,
        sigma_max: float | None,
        about: dict[str, Any] | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.config, self.about = network, about or {}
        self.shape, self.data_std = tuple(shape), float(data_std)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.network = build(network, self.shape, self._extra(), generator)

    def _extra(self) -> int:
        """Channels that the network sees beside the image's."""
        return 0

    def describe(self) -> dict[str, Any]:
        """Network, range and origin."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "data_std": self.data_std,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "network": asdict(self.config),
            "about": self.about,
        }

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`."""
        values = dict(description)
        network = NetworkConfig(**values.pop("network"))
        return filled(lambda: cls(network, **values), tensors)


class VEPrior(_Published):
    r"""A network of the variance exploding SDE as published: D(x, sigma) = x + sigma F(x, log(sigma / 2)).

    Args:
        network: configuration of the backbone F.
        shape: (C, H, W) of one image.
        data_std: standard deviation of the data per entry.
        sigma_min: lowest level it was trained for.
        sigma_max: highest level it was trained for.
        about: what a model card should say.
        generator: source of the initial weights.
    """

    kind = "ve"

    def __init__(
        self,
        network: NetworkConfig,
        shape: tuple[int, ...],
        data_std: float,
        sigma_min: float = 0.0,
        sigma_max: float | None = None,
        about: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(network, shape, data_std, sigma_min, sigma_max, about, generator)
        self.takes = getattr(self.network, "takes", None)

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """D(x, sigma), in the type of ``x`` (float32 at least)."""
        self.check_given(given)
        z = at_least_single(x)
        levels = per_sample(sigma, z)
        time = (levels / 2).clamp(min=1e-6).log()
        answer = call_network(self.network, z, time, given, at=True)
        return (z + expand(levels, z) * answer).to(x.dtype)


class AmbientDiffusionPrior(_Published):
    r"""A mask-conditional network of Ambient Diffusion: EDM's preconditioning around image and mask.

        h = c_skip x + c_out F(c_in [x, m])[:C],      x = A_B^H y~,  m the mask of B on C channels

    Args:
        network: configuration of the backbone F.
        shape: (C, H, W) of one image.
        data_std: standard deviation d in the preconditioning.
        sigma_min: lowest level it was trained for.
        sigma_max: highest level it was trained for.
        about: what a model card should say.
        generator: source of the initial weights.
    """

    kind = "ambient-diffusion"
    takes = KeptRows

    def __init__(
        self,
        network: NetworkConfig,
        shape: tuple[int, ...],
        data_std: float,
        sigma_min: float = 0.0,
        sigma_max: float | None = None,
        about: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(network, shape, data_std, sigma_min, sigma_max, about, generator)

    def _extra(self) -> int:
        return self.shape[0]

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """h(x, sigma, B), in the type of ``x`` (float32 at least); ``given`` = `KeptRows`."""
        self.check_given(given)
        assert isinstance(given, KeptRows)
        z = at_least_single(x)
        mask = given.mask
        if mask.ndim != z.ndim or mask.shape[1] not in (1, z.shape[1]):
            raise InputError(
                f"Ambient Diffusion prior: expected a mask (1 or B, 1 or {z.shape[1]}, H, W), got "
                f"{tuple(mask.shape)}"
            )
        levels = per_sample(sigma, z)
        level = expand(levels, z)
        scale = (self.data_std**2 + level**2).rsqrt()
        inputs = scale * torch.cat([z, mask.to(z).expand_as(z)], 1)
        answer = call_network(self.network, inputs, levels.clamp(min=1e-6))
        return ((self.data_std * scale) ** 2 * z + level * self.data_std * scale * answer).to(x.dtype)
