"""Where the weights of a run come from: the configuration, a network of one's own, another prior."""

from __future__ import annotations

import copy
import itertools
import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ambient_sci.errors import InputError
from ambient_sci.priors import NetworkConfig, Prior
from ambient_sci.priors.backbones import names
from ambient_sci.priors.registry import MODULE, REGISTERED
from ambient_sci.sampling.border import as_prior
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.source import Source

#: How far the scale of the data may be from that of a prior to go on from.
LARGEST_RATIO = 3.0
_numbers = itertools.count()


def with_network(config: TrainConfig, network: Any, saved: bool) -> TrainConfig:
    """``config`` with a network in place of its own.

    Args:
        config: the run.
        network: a `NetworkConfig`; the name of a backbone; or a module, forward(x, level) of x (B, in, H, W)
            and noise levels (B,) to (B, out, H, W), of which a copy is trained, from the weights it has.
        saved: whether the run is written to a folder, which a module is not.

    Raises:
        InputError: something else, or a module for a run that is written.
    """
    if network is None:
        return config
    if isinstance(network, NetworkConfig):
        return replace(config, network=network)
    if isinstance(network, str):
        return replace(config, network=NetworkConfig(kind=network))
    if isinstance(network, Prior) or not isinstance(network, nn.Module):
        hint = "; a prior to go on from is init_from" if isinstance(network, Prior) else ""
        raise InputError(
            f"network: expected a NetworkConfig, one of {', '.join(names())}, "
            f"or a module, got {type(network).__name__}{hint}"
        )
    name = type(network).__name__
    if saved or config.em is not None:
        how = f"priors.backbones.register({name.lower()!r}, factory)"
        raise InputError(
            "network: expected a registered name where weights are written to a folder, got the module "
            f"{name}, which no file can rebuild; register how it is made: {how}, with "
            "factory(in_channels, out_channels, shape, **options) -> module, and give "
            f"network={name.lower()!r}"
        )
    kind = f"{MODULE}{name}-{next(_numbers)}"

    def factory(in_channels: int, out_channels: int, shape: tuple[int, ...], **options: Any) -> nn.Module:
        _try(network, in_channels, out_channels, shape)
        return copy.deepcopy(network)

    REGISTERED[kind] = factory
    return replace(config, network=NetworkConfig(kind=kind))


def _try(network: nn.Module, ins: int, outs: int, shape: tuple[int, ...]) -> None:
    """One call of a copy on zeros: InputError unless it answers in the right shape."""
    expected = (
        f"forward(x (B, {ins}, {shape[1]}, {shape[2]}), level (B,)) -> (B, {outs}, {shape[1]}, {shape[2]})"
    )
    own = next(network.parameters(), torch.zeros(()))
    x = torch.zeros(2, ins, *shape[1:], dtype=own.dtype, device=own.device)
    try:
        with torch.no_grad():
            found = copy.deepcopy(network)(x, torch.ones(2, device=own.device))
    except Exception as error:  # whatever a module of somebody else raises
        what = " ".join(str(error).split())[:160]
        raise InputError(
            f"network {type(network).__name__}: expected {expected}, got {type(error).__name__}: {what}"
        ) from None
    if not isinstance(found, torch.Tensor) or found.shape != (2, outs, *shape[1:]):
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise InputError(f"network {type(network).__name__}: expected {expected}, got {got} for B = 2")


def prior_to_start_from(
    config: TrainConfig, initial: Any, init_from: Any
) -> tuple[TrainConfig, Prior | None]:
    """The prior to go on from, from any of the places that may name one, and the configuration that says so.

    Raises:
        InputError: two of them, or no prior there.
    """
    if initial is not None and init_from is not None:
        raise InputError("init_from: expected one prior to go on from, got initial as well")
    given = init_from if initial is None else initial
    if isinstance(given, (str, os.PathLike)):
        config = replace(config, init_from=os.fspath(given))
        given = None
    if given is not None:
        return config, as_prior(given, "init_from")
    return config, None if config.init_from is None else as_prior(config.init_from, "init_from")


def check_scale(prior: Prior, source: Source) -> None:
    """Refuse a prior of images of another scale: what it has learned would be far from every level trained.

    Raises:
        InputError: standard deviations that differ by more than `LARGEST_RATIO`.
    """
    ratio = source.data_std / prior.data_std
    if not 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
        raise InputError(
            f"init_from: expected data of about the prior's scale (standard deviation {prior.data_std:.3g}), "
            f"got {source.data_std:.3g}; multiply measurements and noise levels by {1 / ratio:.3g}"
        )
