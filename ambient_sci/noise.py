r"""Noise processes, noise levels and the step between them.

Inside the library every process is variance exploding (VE),

    x_t = x_0 + sigma_t z,        z ~ N(0, I),

with sigma_t per real channel. A variance-preserving (VP) state x_t = alpha x_0 + sigma z, alpha = sqrt(1 -
sigma^2), is the VE state x_t / alpha at level sigma / alpha, and the predictions of a VP network are linear
in x_0:

    epsilon = (x_t - alpha x_0) / sigma,        v = alpha epsilon - sigma x_0.

So one implementation of every loss and sampler serves all of them; the functions below translate at the
border.

Sources: Song et al., "Score-Based Generative Modeling through SDEs" (2021); Karras et al., "Elucidating the
Design Space of Diffusion-Based Generative Models" (2022); Salimans & Ho, "Progressive Distillation" (2022)
for v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ambient_sci.errors import InputError

Process = Literal["ve", "vp"]
Prediction = Literal["sample", "epsilon", "v"]


def expand(level: float | Tensor, like: Tensor) -> Tensor:
    """A noise level as a tensor that broadcasts over the (B, ...) tensor ``like``.

    Args:
        level: one value, (B,) one per sample, or as many axes as ``like`` that broadcast to it: noise that
            differs from entry to entry.
        like: gives shape, type and device.

    Raises:
        InputError: a level of any other shape.
    """
    if isinstance(level, (int, float)):
        # Filled where it is needed: copying a number to a device would wait for it.
        kind = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        return torch.full([1] * like.ndim, level, dtype=kind, device=like.device)
    level = torch.as_tensor(level, dtype=like.dtype if like.is_floating_point() else None, device=like.device)
    if level.ndim == like.ndim and level.ndim > 1:
        if all(a in (1, b) for a, b in zip(level.shape, like.shape, strict=True)):
            return level
    elif level.ndim < 2 and level.numel() in (1, like.shape[0]):
        return level.reshape(-1, *([1] * (like.ndim - 1)))
    raise InputError(
        f"noise level: expected one value or one per sample ({like.shape[0]}), or one per entry "
        f"{tuple(like.shape)}, "
        f"got shape {tuple(level.shape)}"
    )


class ChainNoise:
    """One random stream for each chain of a batch, so that a chain's sample does not depend on what it is
    batched with.

    Args:
        seeds: one integer for each chain.
        device: where the streams live: that of what they are added to, so that nothing waits for the host. A
            seed means other numbers on another kind of device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(s)) for s in seeds]

    def draw(self, like: Tensor) -> Tensor:
        """Standard normal noise like ``like`` (chains, ...), each chain from its own stream."""
        kind = {"dtype": like.dtype, "device": self.device}
        rows = [torch.randn(like.shape[1:], generator=g, **kind) for g in self.generators]
        return torch.stack(rows).to(like.device)


Randomness = torch.Generator | ChainNoise | None


def draw_noise(like: Tensor, generator: Randomness) -> Tensor:
    """Standard normal noise of the shape, type and device of ``like``; a CPU generator serves tensors on any
    device."""
    if isinstance(generator, ChainNoise):
        return generator.draw(like)
    device = like.device if generator is None else generator.device
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device)
    return noise if device == like.device else noise.to(like.device)


# -- processes and what networks predict ---------------------------------------------------------------------


def vp_alpha(sigma: float | Tensor) -> Tensor:
    """Signal scale alpha = sqrt(1 - sigma^2) of a variance-preserving state with noise scale sigma in [0, 1].

    As (1 - sigma) (1 + sigma): where sigma is near 1, the first factor is exact and 1 - sigma^2 is mostly
    rounding.
    """
    sigma = torch.as_tensor(sigma)
    return ((1 - sigma) * (1 + sigma)).clamp(min=0).sqrt()


def vp_to_ve(x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """VP state (x, sigma) as the VE state (x / alpha, sigma / alpha). Exact: both have the same posterior of
    x_0.

    Raises:
        InputError: sigma outside [0, 1); at 1 nothing of x_0 is left, and there is no VE state.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if not bool(((sigma >= 0) & (sigma < 1)).all()):
        raise InputError(f"VP noise scale: expected 0 <= sigma < 1, got {sigma.flatten().tolist()[:4]}")
    alpha = vp_alpha(sigma)
    return x / expand(alpha, x), sigma / alpha


def ve_to_vp(x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """VE state (x, sigma) as the VP state (alpha x, alpha sigma) with alpha = 1 / sqrt(1 + sigma^2); inverse
    of `vp_to_ve`."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    alpha = (1 + sigma**2).rsqrt()
    return x * expand(alpha, x), sigma * alpha


def sample_from_prediction(prediction: Tensor, x: Tensor, sigma: float | Tensor, kind: Prediction) -> Tensor:
    """x_0 from what a VP network predicts at the VP state ``x`` with noise scale ``sigma`` < 1.

    "sample": x_0 itself; "epsilon": x_0 = (x - sigma eps) / alpha; "v": x_0 = alpha x - sigma v.
    """
    scale = expand(sigma, x)
    alpha = vp_alpha(scale)
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (x - scale * prediction) / alpha
    if kind == "v":
        return alpha * x - scale * prediction
    raise InputError(f"prediction: expected 'sample', 'epsilon' or 'v', got {kind!r}")


def sample_from_ve_state(prediction: Tensor, x: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """x_0 from what a VP network predicts, in terms of the VE state ``x`` = VP state / alpha at level
    ``sigma`` (broadcast over x).

        epsilon    x_0 = x - sigma eps                        what rounds eps by r rounds x_0 by sigma r
        v          x_0 = (x - sqrt(1 + sigma^2) sigma v) / (1 + sigma^2)
                                                              ... by sigma / sqrt(1 + sigma^2) r, at most r
        sample     x_0 itself                                 ... by r

    No power of a noise scale near 1 is subtracted from 1, so nothing is lost at high levels but what the
    network lost.
    """
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return x - sigma * prediction
    if kind == "v":
        total = 1 + sigma**2
        return x / total - sigma * total.rsqrt() * prediction
    raise InputError(f"prediction: expected 'sample', 'epsilon' or 'v', got {kind!r}")


@dataclass(frozen=True)
class VPSchedule:
    """The discrete times of a VP network trained on ``steps`` noise scales, as a function of the VE level.

        beta_k evenly spaced (in its square root for "scaled-linear"),
        alpha_k^2 = prod_{j <= k} (1 - beta_j),
        sigma_k = sqrt(1 - alpha_k^2) / alpha_k                            the VE level of time k

    Between two of them time is interpolated in log sigma, as is usual with Karras grids; beyond them it is
    that of the nearest.

    Attributes:
        kind: "scaled-linear" (Stable Diffusion, SDXL) or "linear" (Ho et al. 2020).
        beta_start, beta_end, steps: defaults are those of Stable Diffusion and SDXL.
    """

    kind: Literal["scaled-linear", "linear"] = "scaled-linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in ("scaled-linear", "linear"):
            raise InputError(f"VP schedule: expected scaled-linear or linear, got {self.kind!r}")
        if not 0 < self.beta_start <= self.beta_end < 1 or not 2 <= self.steps <= 1_000_000:
            raise InputError("VP schedule: expected 0 < beta_start <= beta_end < 1 and 2 to 1,000,000 steps")

    def levels(self) -> Tensor:
        """VE level of each time, (steps,) float64, increasing."""
        low, high = torch.tensor([self.beta_start, self.beta_end], dtype=torch.float64)
        if self.kind == "linear":
            beta = torch.linspace(float(low), float(high), self.steps, dtype=torch.float64)
        else:
            beta = torch.linspace(float(low.sqrt()), float(high.sqrt()), self.steps, dtype=torch.float64) ** 2
        log_signal = torch.log1p(-beta).cumsum(0)  # log alpha^2
        return torch.expm1(-log_signal).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Time in [0, steps - 1] of VE levels (B,), in their type (float32 at least)."""
        levels = self.levels().log().to(sigma.device)
        log = sigma.double().clamp(min=1e-12).log()
        above = torch.searchsorted(levels, log).clamp(1, self.steps - 1)
        low, high = levels[above - 1], levels[above]
        return (above - 1 + ((log - low) / (high - low)).clamp(0, 1)).to(
            torch.promote_types(sigma.dtype, torch.float32)
        )


def prediction_from_sample(x0: Tensor, x: Tensor, sigma: float | Tensor, kind: Prediction) -> Tensor:
    """Inverse of `sample_from_prediction`: what a VP network of this kind should predict when the clean image
    is ``x0``."""
    scale = expand(sigma, x)
    alpha = vp_alpha(scale)
    if kind == "sample":
        return x0
    epsilon = (x - alpha * x0) / scale
    if kind == "epsilon":
        return epsilon
    if kind == "v":
        return alpha * epsilon - scale * x0
    raise InputError(f"prediction: expected 'sample', 'epsilon' or 'v', got {kind!r}")


# -- levels to train at --------------------------------------------------------------------------------------


class LevelDistribution(Protocol):
    """A distribution of training noise levels.

    ``minimum`` (float or (num,)) is the noise that the data already has; levels (num,) come in its type,
    float64 for a number.
    """

    sigma_max: float

    def sample(
        self, num: int, *, minimum: float | Tensor = 0.0, generator: torch.Generator | None = None
    ) -> Tensor: ...


def _minimum(minimum: float | Tensor, num: int, floor: float, sigma_max: float) -> Tensor:
    # In the type of ``minimum``: rounded to a shorter one, a level could come out below the noise of the
    # data.
    low = torch.as_tensor(minimum, dtype=None if torch.is_tensor(minimum) else torch.float64)
    if low.ndim > 1 or (low.ndim == 1 and low.shape[0] not in (1, num)):
        raise InputError(
            f"noise levels: expected one minimum or one per sample ({num}), got {tuple(low.shape)}"
        )
    low = low.expand(num).clamp(min=floor)
    if bool((low >= sigma_max).any()):
        raise InputError(
            f"noise levels: expected sigma_max above the noise of the data ({float(low.max()):g}), got "
            f"{sigma_max:g}"
        )
    return low


@dataclass(frozen=True)
class LogUniform:
    """log sigma uniform between the noise of the data (at least ``floor``) and ``sigma_max``."""

    sigma_max: float = 10.0
    floor: float = 2e-3

    def sample(
        self, num: int, *, minimum: float | Tensor = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        low = _minimum(minimum, num, self.floor, self.sigma_max)
        return low * (self.sigma_max / low) ** torch.rand(num, generator=generator)


@dataclass(frozen=True)
class LogNormal:
    """log sigma ~ N(mean, std^2), the EDM distribution (Karras et al. 2022), *truncated* to the noise of the
    data and sigma_max.

    Truncation is by inversion of the distribution function, so no mass piles up at the ends and each draw
    uses one uniform.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_max: float = 20.0
    floor: float = 2e-3

    def sample(
        self, num: int, *, minimum: float | Tensor = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        low = _minimum(minimum, num, self.floor, self.sigma_max)
        kind, low = low.dtype, low.double()
        cdf = torch.special.ndtr((low.log() - self.mean) / self.std)
        top = torch.special.ndtr(
            torch.tensor((math.log(self.sigma_max) - self.mean) / self.std, dtype=torch.float64)
        )
        u = cdf + (top - cdf) * torch.rand(num, generator=generator).double()
        sigma = (self.mean + self.std * torch.special.ndtri(u)).exp()
        return torch.maximum(sigma, low).clamp(max=self.sigma_max).to(kind)


@dataclass(frozen=True)
class Concentrated:
    """sigma = sigma_n (sigma_max / sigma_n)^(u^power), u uniform: dense just above the noise of the data.

    An error of the denoiser at sigma_n is amplified below it, so accuracy there must come first.
    """

    sigma_max: float = 10.0
    power: float = 2.0
    floor: float = 2e-3

    def sample(
        self, num: int, *, minimum: float | Tensor = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        low = _minimum(minimum, num, self.floor, self.sigma_max)
        return low * (self.sigma_max / low) ** (torch.rand(num, generator=generator) ** self.power)


# -- levels to sample at -------------------------------------------------------------------------------------


def karras_grid(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """``steps`` decreasing levels from sigma_max to sigma_min > 0, evenly spaced in sigma^(1/rho) (Karras et
    al. 2022, eq. 5).

    float64. The grid ends at sigma_min: a sampler returns the denoised image there, the step to zero needs no
    level of its own.

    Raises:
        InputError: fewer than two steps, or not 0 < sigma_min < sigma_max.
    """
    if steps < 2 or not 0 < sigma_min < sigma_max:
        raise InputError(
            f"level grid: expected steps >= 2 and 0 < sigma_min < sigma_max, got {steps}, {sigma_min:g}, "
            f"{sigma_max:g}"
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    grid = (high + ramp * (low - high)) ** rho
    grid[0], grid[-1] = (
        sigma_max,
        sigma_min,
    )  # exactly: rounded, the last level could lie below what a prior has learned
    return grid


def ancestral_step(
    x: Tensor,
    denoised: Tensor,
    sigma_t: float | Tensor,
    sigma_s: float | Tensor,
    *,
    generator: Randomness = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""One step of the reverse SDE from sigma_t to sigma_s <= sigma_t,

        x_s = D + (s^2 / t^2) (x_t - D) + s sqrt(1 - s^2 / t^2) z,

    the exact conditional q(x_s | x_t, x_0) of the VE process with x_0 replaced by D = E[x_0 | x_t] (Ho et al.
    2020 in VE form). Give ``noise`` to fix z, else it is drawn from ``generator``.
    """
    if noise is None:
        noise = draw_noise(x, generator)
    if isinstance(sigma_t, (int, float)) and isinstance(sigma_s, (int, float)):
        # Numbers stay numbers: to carry them to an accelerator is a copy that waits.
        ratio = (sigma_s / sigma_t) ** 2
        return denoised + ratio * (x - denoised) + sigma_s * math.sqrt(max(1 - ratio, 0.0)) * noise
    s, t = expand(sigma_s, x), expand(sigma_t, x)
    ratio = (s / t) ** 2
    return denoised + ratio * (x - denoised) + s * (1 - ratio).clamp(min=0).sqrt() * noise
