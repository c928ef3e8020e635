r"""Backbones by name: the networks that a prior's preconditioning can surround.

    register(name, factory)        factory(in_channels, out_channels, shape, **options) -> nn.Module with
                                   forward(x, level[, given])

| name | network | options |
|---|---|---|
| unet | `ambient_sci.priors.unet` | the fields of `NetworkConfig` |
| mlp | multilayer perceptron | the fields of `NetworkConfig` |
| ncsnpp | deepinv ``NCSNpp``, the NCSN++ and DDPM++ networks of Song et al. (2021) and EDM | deepinv's |
| adm | deepinv ``ADMUNet``, of Dhariwal & Nichol (2021) and EDM | deepinv's |
| diffusers-unet | diffusers ``UNet2DModel`` | diffusers' |
| diffusers-conditional-unet | diffusers ``UNet2DConditionModel``, takes a `Prompt` | diffusers' |

A network that is registered can be trained, averaged, saved, loaded and resumed by its name and its options;
whoever loads it has to register it first. ``forward(x, level)`` is enough where nothing else is told; a
module's attribute ``takes`` names a type of `Given`, ``multiple`` what height and width have to be multiples
of (images of other sizes are padded, see `ambient_sci.priors.padding`), and ``any_size = True`` says that its
weights do for images of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ambient_sci.errors import InputError
from ambient_sci.priors.config import NetworkConfig
from ambient_sci.priors.registry import BUILT_IN, REGISTERED, names

if TYPE_CHECKING:
    import torch
    from torch import nn

Factory = Callable[..., "nn.Module"]

__all__ = ["Factory", "build", "names", "register"]


def register(name: str, factory: Factory, *, replace: bool = False) -> None:
    """Make ``factory`` known as ``name``.

    Args:
        name: what `NetworkConfig.kind` says; stored with every prior of this backbone.
        factory: (in_channels, out_channels, shape, **options) -> nn.Module; in_channels counts the mask's
            channels of a mask-conditional prior, shape is (C, H, W), options are ``NetworkConfig.options``.
        replace: allow a name that is taken by another registration.

    Raises:
        InputError: a name of the library's own, or one that is taken.
    """
    if name in BUILT_IN or (name in REGISTERED and not replace):
        raise InputError(f"backbone: expected a new name, got {name!r}, which is taken")
    REGISTERED[name] = factory


def build(
    config: NetworkConfig,
    shape: tuple[int, ...],
    extra_channels: int = 0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The network of a configuration, with initial weights that ``generator`` decides (default: a fixed
    seed).

    Args:
        config: name and options.
        shape: (C, H, W) of one image: what comes out; what goes in has ``extra_channels`` more (of a mask).

    Raises:
        InputError: an unknown name, or options that the network does not take.
    """
    import torch

    # Layers initialise from torch's global generator; fork it so that a seed decides and nobody else's stream
    # moves.
    with torch.random.fork_rng(devices=[]):
        if generator is None:
            seed = 0
        else:  # drawn on the CPU even where layers are made without memory
            seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        torch.default_generator.manual_seed(seed)
        return _make(config, shape, extra_channels)


def _make(config: NetworkConfig, shape: tuple[int, ...], extra: int) -> nn.Module:
    if config.kind == "mlp":
        from ambient_sci.priors.networks import MLP

        return MLP(config, math.prod(shape) + extra * math.prod(shape[1:]), shape)
    if len(shape) != 3:
        raise InputError(f"{config.kind} prior: expected images (C, H, W), got shape {shape}")
    if config.kind == "unet":
        from ambient_sci.priors.networks import UNet

        return UNet(config, shape[0] + extra, shape[0])
    factory = REGISTERED.get(config.kind) or _foreign(config.kind)
    try:
        return factory(shape[0] + extra, shape[0], shape, **config.options)
    except InputError:
        raise
    except Exception as error:  # whatever a foreign constructor raises is about its options
        what = " ".join(str(error).split())[:200]
        raise InputError(
            f"network {config.kind}: expected options that it takes, got {config.options} "
            f"({type(error).__name__}: {what})"
        ) from None


def _foreign(kind: str) -> Factory:
    from ambient_sci.priors import foreign_networks

    if kind not in foreign_networks.FACTORIES:
        raise InputError(
            f"network: expected kind {', '.join(names())}, got {kind!r}: register it first (priors.backbones)"
        )
    return foreign_networks.FACTORIES[kind]
