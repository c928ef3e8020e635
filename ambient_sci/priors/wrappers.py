r"""Priors made of other models: deepinv denoisers, VP networks (epsilon, v or x_0 prediction), two priors by
level, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.noise import Prediction, expand, sample_from_ve_state
from ambient_sci.priors.backbones import build
from ambient_sci.priors.base import (
    Prior,
    Tensors,
    at_least_single,
    below,
    description_of,
    filled,
    per_sample,
    rebuild_prior,
)
from ambient_sci.priors.config import NetworkConfig
from ambient_sci.priors.given import Given, KeptRows
from ambient_sci.priors.network import call_network
from ambient_sci.priors.vp_times import Schedule, schedule_from_dict, schedule_to_dict


class DeepinvPrior(Prior):
    """Any denoiser with deepinv's call ``denoiser(x, sigma)`` as an unconditional prior.

    Args:
        denoiser: the model; sigma is passed per sample, (B,).
        shape: (C, H, W) of one image.
        data_std: standard deviation of the data it was trained on, per entry.
        sigma_min: lowest noise level it was trained for.
        sigma_max: highest noise level it was trained for.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        shape: tuple[int, ...],
        data_std: float,
        sigma_min: float = 0.0,
        sigma_max: float | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape, self.data_std = tuple(shape), float(data_std)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """denoiser(x, sigma), computed in the type of the denoiser's parameters."""
        self.check_given(given)
        z = at_least_single(x)
        return call_network(self.denoiser, z, per_sample(sigma, z)).to(x.dtype)


class VPPrior(Prior):
    r"""A variance-preserving network as a (variance-exploding) prior.

        F at the VP state alpha x,   alpha = 1 / sqrt(1 + sigma^2),   VP noise scale alpha sigma
        D(x, sigma) = x - sigma F                                                  F predicts epsilon
                      x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) F              F predicts v
                      F                                                            F predicts x_0

    F alone runs in the type of its weights. An error r of its output is one of sigma r in D for epsilon, and
    of at most r for v and x_0: an epsilon network in bfloat16 (r = 0.002) is worth 3 % at SDXL's highest
    level, 14.6, and nothing is left of it at 500.

    Args:
        network: F(state, t[, given]) with t as ``time`` says, or the configuration of a backbone, which can
            be saved and trained.
        shape: (C, H, W) of one image.
        data_std: standard deviation of the data per entry.
        prediction: what F predicts: "epsilon", "v" or "sample".
        time: a `VPSchedule`, whose time is interpolated in log sigma, or another schedule of
            `ambient_sci.priors.vp_times`; or a function of the VP noise scale (B,); default: the noise scale
            itself.
        sigma_min: lowest VE level it was trained for.
        sigma_max: highest VE level it was trained for.
        generator: source of a backbone's initial weights.
        about: what a model card should say.
    """

    kind = "vp"

    def __init__(
        self,
        network: Callable[..., Tensor] | NetworkConfig,
        shape: tuple[int, ...],
        data_std: float,
        prediction: Prediction = "epsilon",
        time: Schedule | Callable[[Tensor], Tensor] | None = None,
        sigma_min: float = 0.0,
        sigma_max: float | None = None,
        generator: torch.Generator | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.about = about or {}
        if prediction not in ("epsilon", "v", "sample"):
            raise InputError(f"prediction: expected 'sample', 'epsilon' or 'v', got {prediction!r}")
        self.config = network if isinstance(network, NetworkConfig) else None
        self.network = (
            build(network, tuple(shape), 0, generator) if isinstance(network, NetworkConfig) else network
        )
        self.takes = getattr(self.network, "takes", None)
        self.time, self.prediction = time, prediction
        self.shape, self.data_std = tuple(shape), float(data_std)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """D(x, sigma) as above, in the type of ``x`` (float32 at least)."""
        self.check_given(given)
        z = at_least_single(x)
        levels = per_sample(sigma, z)
        alpha = (1 + levels**2).rsqrt()
        if isinstance(self.time, Schedule):
            t = self.time.time(levels)
        else:
            t = levels * alpha if self.time is None else self.time(levels * alpha)
        predicted = call_network(self.network, expand(alpha, z) * z, t, given, at=True)
        return sample_from_ve_state(predicted, z, expand(levels, z), self.prediction).to(x.dtype)

    def describe(self) -> dict[str, Any]:
        """Network, prediction, times and range."""
        if self.config is None or not (self.time is None or isinstance(self.time, Schedule)):
            raise InputError(
                "saving a VP prior: expected a backbone by name (NetworkConfig) and time = VPSchedule or "
                "None, got a network or a time "
                "that only Python knows; register the network (priors.backbones.register)"
            )
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "data_std": self.data_std,
            "prediction": self.prediction,
            "time": None if self.time is None else schedule_to_dict(self.time),
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "network": asdict(self.config),
            "about": self.about,
        }

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`."""
        values = dict(description)
        network, time = NetworkConfig(**values.pop("network")), values.pop("time")
        schedule = None if time is None else schedule_from_dict(time)
        return filled(lambda: cls(network, time=schedule, **values), tensors)


class StagedPrior(Prior):
    """Two denoisers by noise level: ``anchor`` answers sigma >= sigma_n, ``below`` answers under it.

    Staged consistency trains ``anchor`` on the noisy data and then, with it frozen, ``below``: what the data
    cannot supervise.

    Args:
        anchor: prior for sigma >= sigma_n.
        below: prior for sigma < sigma_n.
        sigma_n: the level where the two meet: the noise of the data, or a margin above it.

    Raises:
        InputError: priors of different shapes or conditioning.
    """

    kind = "staged"

    def __init__(self, anchor: Prior, below: Prior, sigma_n: float) -> None:
        super().__init__()
        for what in ("shape", "conditioning", "takes"):
            if getattr(anchor, what) != getattr(below, what):
                raise InputError(
                    f"staged prior: expected two priors of one {what}, got {getattr(anchor, what)} and "
                    f"{getattr(below, what)}"
                )
        self.takes = anchor.takes
        self.anchor, self.below, self.sigma_n = anchor, below, float(sigma_n)
        self.shape, self.data_std = anchor.shape, anchor.data_std
        self.sigma_min, self.sigma_max = below.sigma_min, anchor.sigma_max
        self.separates_rows = anchor.separates_rows or below.separates_rows

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """Each sample by the prior of its noise level.

        A level that is a Python number decides without looking at a tensor. A batch on both sides of sigma_n
        is cut in two.
        """
        self.check_given(given)
        least = self.sigma_n * (1 - 1e-6)
        if not isinstance(sigma, Tensor):
            return (self.anchor if sigma >= least else self.below)(x, sigma, given)
        levels = per_sample(sigma, x)
        high = levels >= least
        share = float(high.to(torch.float32).mean())  # one look at the device for both questions
        if share in (0.0, 1.0):
            return (self.anchor if share else self.below)(x, levels, given)
        out = torch.empty_like(x)
        for prior, part in ((self.anchor, high.nonzero()[:, 0]), (self.below, (~high).nonzero()[:, 0])):
            out[part] = prior(x[part], levels[part], None if given is None else given[part])
        return out

    def describe(self) -> dict[str, Any]:
        """sigma_n and both parts."""
        parts = {"anchor": description_of(self.anchor), "below": description_of(self.below)}
        return {"kind": self.kind, "sigma_n": self.sigma_n, **parts}

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`."""
        parts = [rebuild_prior(description[name], below(tensors, name)) for name in ("anchor", "below")]
        return cls(*parts, description["sigma_n"])

    def saved_tensors(self) -> Tensors:
        """Those of both parts."""
        parts = {"anchor": self.anchor, "below": self.below}
        return {f"{name}.{k}": t for name, prior in parts.items() for k, t in prior.saved_tensors().items()}


class Guided(Prior):
    """Classifier-free guidance: D = D(x) + scale (D(x, given) - D(x)) [Ho & Salimans 2022].

    Args:
        prior: takes labels or a prompt, and was trained with some of them dropped.
        scale: 1 is the conditional prior itself, above it the condition counts for more than it should.

    Raises:
        InputError: a prior without labels or prompts to drop.
    """

    def __init__(self, prior: Prior, scale: float) -> None:
        super().__init__()
        if prior.takes in (None, KeptRows):
            raise InputError(
                "guidance: expected a prior that takes labels or a prompt, got one that takes neither"
            )
        self.prior, self.scale, self.takes = prior, float(scale), prior.takes
        self.shape, self.data_std = prior.shape, prior.data_std
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max

    def forward(self, x: Tensor, sigma: float | Tensor, given: Any = None) -> Tensor:  # type: ignore[override]
        """The equation above, both answers in one batch; without ``given`` the unconditional answer."""
        self.check_given(given)
        if given is None or self.scale == 1:
            return self.prior(x, sigma, given)
        batch, levels = len(x), per_sample(sigma, x)
        which = torch.arange(2 * batch, device=x.device) >= batch
        both = self.prior(
            x.repeat(2, *([1] * (x.ndim - 1))), levels.repeat(2), given.repeat(2).dropped(which)
        )
        told, free = both.split(batch)
        return free + self.scale * (told - free)
