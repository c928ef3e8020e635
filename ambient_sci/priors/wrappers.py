r"""Priors made of other models: any deepinv denoiser, and any VP network (epsilon, v or x_0 prediction)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.noise import Prediction, expand, sample_from_prediction, ve_to_vp
from ambient_sci.priors.base import Prior, match_dtype, require_mask_conditional


class DeepinvPrior(Prior):
    """Any denoiser with deepinv's call ``denoiser(x, sigma)`` as an unconditional prior.

    Args:
        denoiser: the model; sigma is passed per sample, (B,).
        shape: (C, H, W) of one image.
        data_std: standard deviation of the data it was trained on, per entry.
        sigma_min, sigma_max: the range of noise levels it was trained for.
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

    def forward(self, x: Tensor, sigma: float | Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """denoiser(x, sigma), computed in the type of the denoiser's parameters."""
        if mask is not None:
            require_mask_conditional(self, "a mask")
        z = match_dtype(self.denoiser, x)
        return self.denoiser(z, expand(sigma, z).flatten().expand(z.shape[0])).to(x.dtype)


class VPPrior(Prior):
    """A variance-preserving network as a (variance-exploding) prior.

        D(x, sigma) = x_0 from F(alpha x, t),   alpha = 1 / sqrt(1 + sigma^2),   VP noise scale alpha sigma

    Args:
        network: F(state, t) with t whatever ``time`` returns.
        shape, data_std: as for every prior.
        prediction: what F predicts: "epsilon", "v" or "sample".
        time: VP noise scale (B,) -> the network's time argument; default: the noise scale itself.
        sigma_min, sigma_max: the range of VE levels it was trained for.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        shape: tuple[int, ...],
        data_std: float,
        prediction: Prediction = "epsilon",
        time: Callable[[Tensor], Tensor] | None = None,
        sigma_min: float = 0.0,
        sigma_max: float | None = None,
    ) -> None:
        super().__init__()
        self.network, self.time, self.prediction = network, time, prediction
        self.shape, self.data_std = tuple(shape), float(data_std)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: Tensor, sigma: float | Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x_0 at the equivalent VP state, computed in the type of the network's parameters."""
        if mask is not None:
            require_mask_conditional(self, "a mask")
        z = match_dtype(self, x)
        state, scale = ve_to_vp(z, expand(sigma, z).flatten().expand(z.shape[0]))
        t = scale if self.time is None else self.time(scale)
        return sample_from_prediction(self.network(state, t), state, scale, self.prediction).to(x.dtype)


class StagedPrior(Prior):
    """Two denoisers by noise level: ``anchor`` answers sigma >= sigma_n, ``below`` answers under it.

    Staged consistency trains ``anchor`` on the noisy data and then, with it frozen, ``below``: what the data cannot supervise.

    Args:
        anchor: prior for sigma >= sigma_n.
        below: prior for sigma < sigma_n.
        sigma_n: the level where the two meet: the noise of the data, or a margin above it.

    Raises:
        InputError: priors of different shapes or conditioning.
    """

    def __init__(self, anchor: Prior, below: Prior, sigma_n: float) -> None:
        super().__init__()
        for what in ("shape", "conditioning"):
            if getattr(anchor, what) != getattr(below, what):
                raise InputError(
                    f"staged prior: expected two priors of one {what}, got {getattr(anchor, what)} and {getattr(below, what)}"
                )
        self.conditioning = anchor.conditioning
        self.anchor, self.below, self.sigma_n = anchor, below, float(sigma_n)
        self.shape, self.data_std = anchor.shape, anchor.data_std
        self.sigma_min, self.sigma_max = below.sigma_min, anchor.sigma_max
        self.uses_gram = anchor.uses_gram or below.uses_gram

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        sigma: float | Tensor,
        mask: Tensor | None = None,
        gram: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Each sample by the prior of its noise level; a batch on one side of sigma_n costs one network, another one both."""
        levels = expand(sigma, x).flatten().expand(x.shape[0])
        high = levels >= self.sigma_n * (1 - 1e-6)
        if bool(high.all()):
            return self.anchor.conditional(x, levels, mask, gram)
        if not bool(high.any()):
            return self.below.conditional(x, levels, mask, gram)
        if mask is not None:  # gram is a function of the whole batch
            above, below = (p.conditional(x, levels, mask, gram) for p in (self.anchor, self.below))
            return torch.where(high.reshape(-1, *([1] * (x.ndim - 1))), above, below)
        out = torch.empty_like(x)
        for prior, part in ((self.anchor, high), (self.below, ~high)):
            out[part] = prior(x[part], levels[part])
        return out
