r"""The learned prior: a network in EDM preconditioning.

    D(x, sigma) = c_skip x + c_out F(c_in x, sigma)
    c_skip = d^2 / (d^2 + sigma^2),     c_in = 1 / sqrt(d^2 + sigma^2),
    c_out = d sigma / sqrt(d^2 + sigma^2)

with d the standard deviation of the clean data [Karras et al. 2022]. Data of mean m are seen around it:
D(x, sigma) = m + D_0(x - m, sigma), with D_0 the above; a mask-conditional prior answers m + h_0(x - m G 1)
(G below). Images in [0, 1] vary less than they are bright, and a network would have to learn m first.

A mask-conditional prior is shown x = A_B^H y~ and the mask. What is left to learn after the best scaling has
standard deviation c_out on kept rows and d on missing ones, which nothing was seen of; with G = A_B^H A_B,
the projection on kept rows (masks, one coil) or nearly one (several coils),

    h(x, sigma, B) = c_skip x + d u + (c_out - d) G u,     u = F(c_in x / sqrt(f), sigma, B),

f the fraction of rows kept, to which the power of x is proportional. For B = I it is the same as above. As
sigma -> 0 the estimate agrees with what was measured whatever the network says, where G is a projection.

F alone runs in the type of its weights: everything around it is computed in the type of x, float32 at least.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.noise import expand
from ambient_sci.priors.backbones import build
from ambient_sci.priors.base import Prior, Tensors, at_least_single, filled, per_sample
from ambient_sci.priors.config import NetworkConfig, PriorConfig
from ambient_sci.priors.given import Given, KeptRows
from ambient_sci.priors.networks import Backbone
from ambient_sci.priors.padding import multiple_of, on_multiples
from ambient_sci.priors.registry import is_module


def call_network(
    network: nn.Module | Any, x: Tensor, level: Tensor, given: Given | None = None, *, at: bool = False
) -> Tensor:
    """network(x, level[, given]) in the type of its first floating parameter, answered in the type of ``x``.

    This is the one door through which numbers enter half precision and leave it, and through which images of
    a size that the network cannot divide are padded and cropped (`ambient_sci.priors.padding`). Levels stay
    in float32 at least. ``at``: the level is a time in the units of a backbone's embedding.
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    own = next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)
    level = level.to(torch.promote_types(own, torch.float32))
    told = () if given is None else (given,)
    function = network.at if at and isinstance(network, Backbone) else network
    answer = on_multiples(lambda z: function(z, level, *told), x.to(own), multiple_of(network))
    return answer.to(x.dtype)


def _setting(name: str) -> Any:
    """A field of ``self.config`` as an attribute that can be read and set."""

    def read(self: NetworkPrior) -> Any:
        return getattr(self.config, name)

    def write(self: NetworkPrior, value: Any) -> None:
        self.config = dataclasses.replace(self.config, **{name: value})

    return property(read, write)


class NetworkPrior(Prior):
    """A denoising network as a prior.

    Args:
        shape: (C, H, W) of one image.
        data_std: standard deviation d of the clean data per entry, about their mean.
        data_mean: mean m of the clean data.
        conditioning: "unconditional" or "mask-conditional".
        network: the backbone, a `NetworkConfig`.
        sigma_min: lowest noise level trained; samplers stop there.
        sigma_max: highest noise level trained.
        mask_channels: channels of the mask that a mask-conditional network is shown.
        about: what a model card should say.
        generator: source of the initial weights; default: a fixed seed.

    Raises:
        InputError: options that the network does not take, a wrong conditioning, a data_std that is not
            positive.
    """

    kind = "network"

    def __init__(
        self,
        shape: tuple[int, ...],
        data_std: float,
        conditioning: str = "unconditional",
        network: NetworkConfig | None = None,
        sigma_min: float = 0.0,
        sigma_max: float | None = None,
        mask_channels: int = 1,
        about: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        data_mean: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = PriorConfig(
            shape=tuple(shape),
            data_std=float(data_std),
            data_mean=float(data_mean),
            conditioning=conditioning,  # type: ignore[arg-type]
            sigma_min=float(sigma_min),
            sigma_max=sigma_max,
            mask_channels=mask_channels,
            network=network or NetworkConfig(),
            about=about or {},
        )
        masked = self.config.conditioning == "mask-conditional"
        self.network = build(
            self.config.network, self.config.shape, mask_channels if masked else 0, generator
        )
        self.takes = KeptRows if masked else getattr(self.network, "takes", None)
        self.separates_rows = masked

    # Settings live in `config` alone: what is seen is what is saved.
    shape = _setting("shape")
    data_std = _setting("data_std")
    data_mean = _setting("data_mean")
    sigma_min = _setting("sigma_min")
    sigma_max = _setting("sigma_max")

    @classmethod
    def from_config(cls, config: PriorConfig) -> NetworkPrior:
        """A prior of this description, with initial weights."""
        return cls(**{k: getattr(config, k) for k in config.__dataclass_fields__})

    def describe(self) -> dict[str, Any]:
        """The configuration."""
        if is_module(self.config.network.kind):
            raise InputError(
                "saving a prior: expected a network that a file can name, got a module that was handed in; "
                "register how it is made (priors.backbones.register) and give that name as the network"
            )
        return {"kind": self.kind, **self.config.to_dict()}

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`."""
        config = PriorConfig.from_dict(description)
        return filled(lambda: cls.from_config(config), tensors)

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """The equations above, in the type of ``x``; ``given`` = `KeptRows` for mask-conditional priors.

        Raises:
            ConditioningError: rows, labels or a prompt that this prior does not take, or rows missing that it
                needs.
        """
        self.check_given(given)
        z = at_least_single(x)
        mean = self.data_mean
        if mean:  # without one, nothing is computed
            z = z - mean * (given.gram(torch.ones_like(z)) if isinstance(given, KeptRows) else 1)
        levels = per_sample(sigma, z)
        level = expand(levels, z)
        variance = self.data_std**2 + level**2
        skip, scale = self.data_std**2 / variance, variance.rsqrt()
        kept = level * scale  # c_out / d
        levels = levels.clamp(min=1e-6)
        if isinstance(given, KeptRows):
            mask = self._expanded_mask(given.mask, z)
            fraction = expand(mask.flatten(1).mean(1).clamp(min=1e-3), z)
            inputs = torch.cat([z * scale * fraction.rsqrt(), mask], 1)
            rest = call_network(self.network, inputs, levels)
            seen = given.gram(rest)
            rest = (
                rest - seen
            ) + kept * seen  # in this order: on kept rows nothing is left of the first term to round
        else:
            rest = kept * call_network(self.network, z * scale, levels, given)
        answer = skip * z + self.data_std * rest
        return (answer + mean if mean else answer).to(x.dtype)

    def _expanded_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        if mask.ndim != x.ndim or mask.shape[1] != self.config.mask_channels:
            raise InputError(
                f"mask-conditional prior: expected a mask (1 or B, {self.config.mask_channels}, H, W), got "
                f"{tuple(mask.shape)}"
            )
        return mask.to(x).expand(x.shape[0], -1, *x.shape[2:])
