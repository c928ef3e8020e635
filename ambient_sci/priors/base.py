r"""What a prior is: a denoiser, D(x, sigma) = E[x_0 | x_0 + sigma z = x].

An *unconditional* prior answers for fully observed noisy images and nothing else; any posterior sampler can use it. A
*mask-conditional* one answers E[x_0 | y~, B] from the zero-filled image A_B^H y~ and the mask B, for masks like those it was
trained with. The second is **not** a prior in the sense of the first: asked for B = I it was never trained, and measured in a posterior
sampler it is worse than zero filling. So every prior says which kind it is and what needs the other kind refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from deepinv.models import Denoiser
from torch import Tensor

from ambient_sci.errors import ConditioningError

Conditioning = Literal["unconditional", "mask-conditional"]


class Prior(Denoiser):
    """Base of all priors. A deepinv ``Denoiser``, so it plugs into deepinv's samplers and plug-and-play algorithms.

    Attributes:
        shape: of one image, (C, H, W).
        data_std: standard deviation of the data per entry; scales losses and preconditioning.
        conditioning: "unconditional" or "mask-conditional".
        sigma_min: lowest noise level at which the denoiser is meaningful; 0 if all are.
        sigma_max: highest trained noise level, None if there is no limit.
        uses_gram: whether a mask-conditional prior wants A_B^H A_B beside the mask (``gram`` of `forward`).
    """

    shape: tuple[int, ...]
    data_std: float
    conditioning: Conditioning = "unconditional"
    sigma_min: float = 0.0
    sigma_max: float | None = None
    uses_gram: bool = False

    def forward(self, x: Tensor, sigma: float | Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """E[x_0 | x]: ``x`` (B, C, H, W) at noise level ``sigma`` (float or (B,)).

        Mask-conditional priors: ``x`` = A_B^H y~ and ``mask`` (1|B, m, H, W). Those that use it take a further argument ``gram``, the
        function A_B^H A_B of images; `conditional` hands over what each takes.
        """
        raise TypeError(f"{type(self).__name__} does not say how it denoises")

    def conditional(
        self, x: Tensor, sigma: float | Tensor, mask: Tensor | None, gram: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """`forward` with ``mask``, and with ``gram`` if this prior uses it."""
        return self(x, sigma, mask, gram) if self.uses_gram else self(x, sigma, mask)

    def loss_weight(self, sigma: Tensor, fraction: float | Tensor = 1.0) -> Tensor:
        r"""lambda(sigma) = (d^2 + sigma^2) / (d^2 (sigma^2 + (1 - f) d^2)), the inverse of the error a best linear denoiser leaves per entry.

        For complete data (f = 1) it is the EDM weight 1/sigma^2 + 1/d^2; with a fraction f of the rows kept, the missing rest
        leaves an error of (1 - f) d^2 that no sigma makes small.
        """
        # Not as 1 - f d^2 / (d^2 + sigma^2): in float32 that cancels to zero long before sigma does.
        variance = self.data_std**2
        return (variance + sigma**2) / (variance * (sigma**2 + (1 - fraction) * variance))

    def save(self, path: str | Path) -> None:
        """Write to a folder (prior.json and weights.safetensors), whole or not at all; `load_prior` reads it back."""
        from ambient_sci.priors.storage import save_prior

        save_prior(self, path)


def require_unconditional(prior: Prior, what: str) -> None:
    """Raise ConditioningError, with the way out, if ``prior`` is mask-conditional and ``what`` needs E[x_0 | x_t]."""
    if getattr(prior, "conditioning", "unconditional") != "unconditional":
        raise ConditioningError(
            f"{what} needs an unconditional prior, got a mask-conditional one: it estimates E[x0 | kept rows], not E[x0 | x_t]. "
            "Use the one-step estimate or A-DPS, or get an unconditional prior by EM or from fully sampled noisy scans"
        )


def require_mask_conditional(prior: Prior, what: str) -> None:
    """Raise ConditioningError, with the way out, if ``prior`` is unconditional and ``what`` needs E[x_0 | y~, B]."""
    if getattr(prior, "conditioning", "unconditional") != "mask-conditional":
        raise ConditioningError(
            f"{what} needs a mask-conditional prior (trained on incomplete measurements), got an unconditional one: "
            "use MMPS or another posterior sampler with it"
        )


def match_dtype(prior: torch.nn.Module, x: Tensor) -> Tensor:
    """``x`` in the floating type of the prior's tensors; networks are float32 even where a sampler works in float64."""
    tensors = (t for t in chain(prior.parameters(), prior.buffers()) if t.is_floating_point())
    first = next(tensors, None)
    return x if first is None else x.to(first.dtype)
