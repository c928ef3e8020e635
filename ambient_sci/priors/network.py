r"""The learned prior: a network in EDM preconditioning.

    D(x, sigma) = c_skip x + c_out F(c_in x, sigma)
    c_skip = d^2 / (d^2 + sigma^2),     c_in = 1 / sqrt(d^2 + sigma^2),     c_out = d sigma / sqrt(d^2 + sigma^2)

with d the standard deviation of the clean data [Karras et al. 2022]. A mask-conditional prior is shown x = A_B^H y~ and the mask. What is left to
learn after the best scaling has standard deviation c_out on kept rows and d on missing ones, which nothing was seen of; with
G = A_B^H A_B, the projection on kept rows (masks, one coil) or nearly one (several coils),

    h(x, sigma, B) = c_skip x + d u + (c_out - d) G u,     u = F(c_in x / sqrt(f), sigma, B),

f the fraction of rows kept, to which the power of x is proportional. For B = I it is the same as above. As sigma -> 0 the estimate agrees with what was
measured whatever the network says, where G is a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.noise import expand
from ambient_sci.priors.base import Prior, match_dtype, require_mask_conditional
from ambient_sci.priors.config import NetworkConfig, PriorConfig


class UNet(nn.Module):
    """MONAI's ``DiffusionModelUNet`` with folded patches and a noise-level input."""

    def __init__(self, config: NetworkConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        from monai.networks.nets import DiffusionModelUNet

        fold = config.patch**2
        self.patch = config.patch
        self.body = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=in_channels * fold,
            out_channels=out_channels * fold,
            channels=config.channels,
            num_res_blocks=config.blocks,
            attention_levels=config.attention or (False,) * len(config.channels),
            num_head_channels=config.head_channels,
            norm_num_groups=config.norm_groups,
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``x`` (B, in, H, W), ``sigma`` (B,) to (B, out, H, W)."""
        if self.patch > 1:
            x = nn.functional.pixel_unshuffle(x, self.patch)
        # Sinusoidal embeddings resolve steps of order one: log sigma spans about ten, so it is stretched to hundreds.
        x = self.body(x, timesteps=250 * sigma.log())
        return nn.functional.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class MLP(nn.Module):
    """Fully connected network on flattened inputs with a Fourier embedding of log sigma: for vectors and tiny images."""

    def __init__(self, config: NetworkConfig, in_size: int, out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.out_shape = out_shape
        half = config.embedding // 2
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(math.log(0.25), math.log(8.0), half)), persistent=False
        )
        widths = (in_size + 2 * half, *config.channels)
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layer = nn.Linear(a, b)
            # torch's default shrinks the signal at every layer: what is not linear in x then stays too weak to be learned from.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.SiLU()]
        last = nn.Linear(widths[-1], math.prod(out_shape))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.body = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``x`` (B, ...), ``sigma`` (B,) to (B, *out_shape)."""
        phase = sigma.log()[:, None] * self.frequencies
        return self.body(torch.cat([x.flatten(1), phase.sin(), phase.cos()], 1)).reshape(-1, *self.out_shape)


def _build(config: PriorConfig, generator: torch.Generator | None) -> nn.Module:
    extra = config.mask_channels if config.conditioning == "mask-conditional" else 0
    # Layers initialise from torch's global generator; fork it so that a seed decides and nobody else's stream moves.
    with torch.random.fork_rng(devices=[]):
        seed = torch.randint(2**31 - 1, (), generator=generator) if generator is not None else torch.tensor(0)
        torch.default_generator.manual_seed(int(seed))
        if config.network.kind == "mlp":
            size = math.prod(config.shape) + extra * math.prod(config.shape[1:])
            return MLP(config.network, size, config.shape)
        if len(config.shape) != 3:
            raise InputError(f"U-Net prior: expected images (C, H, W), got shape {config.shape}")
        config.network.check_size(*config.shape[1:])
        return UNet(config.network, config.shape[0] + extra, config.shape[0])


class NetworkPrior(Prior):
    """A denoising network as a prior.

    Args:
        shape: (C, H, W) of one image.
        data_std: standard deviation d of the clean data per entry.
        conditioning: "unconditional" or "mask-conditional".
        network: architecture, a `NetworkConfig`.
        sigma_min: lowest noise level trained; samplers stop there.
        sigma_max: highest noise level trained.
        mask_channels: channels of the mask that a mask-conditional network is shown.
        about: what a model card should say.
        generator: source of the initial weights; default: a fixed seed.

    Raises:
        InputError: a size the network cannot divide, a wrong conditioning, a data_std that is not positive.
    """

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
    ) -> None:
        super().__init__()
        self.config = PriorConfig(
            shape=tuple(shape),
            data_std=float(data_std),
            conditioning=conditioning,  # type: ignore[arg-type]
            sigma_min=float(sigma_min),
            sigma_max=sigma_max,
            mask_channels=mask_channels,
            network=network or NetworkConfig(),
            about=about or {},
        )
        self.shape, self.data_std = self.config.shape, self.config.data_std
        self.conditioning = self.config.conditioning
        self.sigma_min, self.sigma_max = self.config.sigma_min, self.config.sigma_max
        self.uses_gram = self.conditioning == "mask-conditional"
        self.network = _build(self.config, generator)

    @classmethod
    def from_config(cls, config: PriorConfig) -> NetworkPrior:
        """A prior of this description, with initial weights."""
        return cls(**{k: getattr(config, k) for k in config.__dataclass_fields__})

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        sigma: float | Tensor,
        mask: Tensor | None = None,
        gram: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The equations above, in the type of ``x``; ``mask`` and ``gram`` (G as a function of images) for mask-conditional priors.

        Raises:
            ConditioningError: a mask for an unconditional prior, or mask or ``gram`` missing for a mask-conditional one.
        """
        if mask is not None:
            require_mask_conditional(self, "a mask")
        z = match_dtype(self, x)
        level = expand(sigma, z)
        variance = self.data_std**2 + level**2
        skip, scale = self.data_std**2 / variance, variance.rsqrt()
        kept = level * scale  # c_out / d
        levels = level.flatten().expand(z.shape[0]).clamp(min=1e-6)
        if self.conditioning == "unconditional":
            rest = kept * self.network(z * scale, levels).to(z.dtype)
        else:
            mask = self._expanded_mask(mask, z)
            if gram is None:
                raise ConditioningError(
                    "mask-conditional prior: expected gram, the function A^H A of the kept rows, got none (losses.denoise_measurement hands it over)"
                )
            fraction = expand(mask.flatten(1).mean(1).clamp(min=1e-3), z)
            inputs = torch.cat([z * scale * fraction.rsqrt(), mask], 1)
            rest = self.network(inputs, levels).to(z.dtype)
            seen = gram(rest)
            rest = (
                rest - seen
            ) + kept * seen  # in this order: on kept rows nothing is left of the first term to round
        return (skip * z + self.data_std * rest).to(x.dtype)

    def _expanded_mask(self, mask: Tensor | None, x: Tensor) -> Tensor:
        if mask is None:
            raise ConditioningError("mask-conditional prior: expected the mask of kept rows, got none")
        if mask.ndim != x.ndim or mask.shape[1] != self.config.mask_channels:
            raise InputError(
                f"mask-conditional prior: expected a mask (1 or B, {self.config.mask_channels}, H, W), got {tuple(mask.shape)}"
            )
        return mask.to(x).expand(x.shape[0], -1, *x.shape[2:])
