"""The library's own backbones: a U-Net with folded patches, and a multilayer perceptron for vectors and tiny
images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.priors.config import NetworkConfig
from ambient_sci.priors.given import Given
from ambient_sci.priors.unet import DiffusionUNet


class Backbone(nn.Module):
    """F(x, level, given): what a prior's preconditioning surrounds.

    A subclass answers `at` a time in the units of its embedding, and says how a noise level is told there
    (`clock`). Inputs come in the type of the first parameter, levels in float32 or better.

    Attributes:
        takes: what it is told besides x and the level, a type of `Given`; None: nothing.
        multiple: what height and width have to be multiples of; `call_network` pads others.
        any_size: its weights do for images of any size.
    """

    takes: type[Given] | None = None
    multiple: int = 1
    any_size: bool = False

    def clock(self, level: Tensor) -> Tensor:
        """Time of the noise levels (B,). Sinusoids resolve steps of order one: log sigma spans about ten,
        stretched here to hundreds."""
        return 250 * level.log()

    def at(self, x: Tensor, time: Tensor, given: Any = None) -> Tensor:
        """``x`` (B, in, H, W) at ``time`` (B,) to (B, out, H, W)."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")

    def forward(self, x: Tensor, level: Tensor, given: Any = None) -> Tensor:
        """``x`` (B, in, H, W) at noise ``level`` (B,) to (B, out, H, W)."""
        return self.at(x, self.clock(level), given)


class UNet(Backbone):
    """`DiffusionUNet` with folded patches and a noise-level input."""

    any_size = True

    def __init__(self, config: NetworkConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.multiple = config.size_factor
        fold = config.patch**2
        self.patch = config.patch
        self.body = DiffusionUNet(
            in_channels * fold,
            out_channels * fold,
            channels=config.channels,
            blocks=config.blocks,
            attention=config.attention or (False,) * len(config.channels),
            head=config.head_channels,
            groups=config.norm_groups,
        )

    def at(self, x: Tensor, time: Tensor, given: Any = None) -> Tensor:
        """``x`` (B, in, H, W) at ``time`` (B,) to (B, out, H, W)."""
        if self.patch > 1:
            x = nn.functional.pixel_unshuffle(x, self.patch)
        x = self.body(x, time)
        return nn.functional.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class MLP(Backbone):
    """Fully connected network on flattened inputs with a Fourier embedding of log sigma: for vectors and tiny
    images."""

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
            # torch's default shrinks the signal at every layer: what is not linear in x then stays too weak
            # to be learned from.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.SiLU()]
        last = nn.Linear(widths[-1], math.prod(out_shape))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.body = nn.Sequential(*layers, last)

    def clock(self, level: Tensor) -> Tensor:
        """log sigma."""
        return level.log()

    def at(self, x: Tensor, time: Tensor, given: Any = None) -> Tensor:
        """``x`` (B, ...) at ``time`` (B,) to (B, *out_shape)."""
        phase = time[:, None] * self.frequencies
        inputs = torch.cat([x.flatten(1), phase.sin().to(x), phase.cos().to(x)], 1)
        return self.body(inputs).reshape(-1, *self.out_shape)
