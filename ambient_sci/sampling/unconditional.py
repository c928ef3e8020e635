r"""Samplers that turn a denoiser into samples: each is one function, readable from top to bottom.

A denoiser is any callable (x, sigma) -> E[x_0 | x_t = x]. With a posterior denoiser E[x_0 | x_t, y] the same functions sample the
posterior. Levels come as a decreasing grid that ends at sigma_min > 0; what is returned is the denoised image at that level.

    probability flow:  dx/dsigma = (x - D(x, sigma)) / sigma
                       `multistep`, second order, one evaluation a level;   `heun`, second order, two evaluations a level
    reverse SDE:       x_s = D + (s/t)^2 (x_t - D) + s sqrt(1 - (s/t)^2) z         `ancestral`, first order

Sources: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm 1; Lu et al.,
"DPM-Solver++" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import ChainNoise, Randomness, ancestral_step, draw_noise, karras_grid
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.progress import track

Denoise = Callable[[Tensor, Tensor], Tensor]


def heun(
    denoiser: Denoise, x: Tensor, sigmas: Tensor, generator: Randomness = None, final: Denoise | None = None
) -> Tensor:
    """Heun's method on the probability flow; 2 n - 1 denoiser calls for n levels.

    Args:
        denoiser: (x, sigma) -> E[x_0 | x_t].
        x: start, (B, ...), at level sigmas[0].
        sigmas: decreasing levels, the last one > 0.
        generator: unused (the flow is deterministic); here so that samplers are interchangeable.
        final: (x, sigma) -> what to return of the last state; default: the denoiser.

    Returns:
        final(x, sigmas[-1]).
    """
    levels = [float(s) for s in sigmas]
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        slope = (x - denoiser(x, _level(t, x))) / t
        ahead = x + (s - t) * slope
        slope_ahead = (ahead - denoiser(ahead, _level(s, x))) / s
        x = x + (s - t) * (slope + slope_ahead) / 2
    return (final or denoiser)(x, _level(levels[-1], x))


def multistep(
    denoiser: Denoise, x: Tensor, sigmas: Tensor, generator: Randomness = None, final: Denoise | None = None
) -> Tensor:
    """Two-step exponential integrator of the probability flow (DPM-Solver++ 2M); n denoiser calls for n levels.

    The flow is linear in x given D, so over a step only D has to be extrapolated, linearly in log sigma from the last two
    levels: x_s = D' + (s/t) (x - D'). Arguments as for `heun`.
    """
    levels = [float(s) for s in sigmas]
    before: Tensor | None = None
    for i, (t, s) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        denoised = denoiser(x, _level(t, x))
        middle = denoised  # D half a step ahead
        if before is not None:
            ratio = math.log(t / s) / math.log(levels[i - 1] / t)
            middle = denoised + ratio / 2 * (denoised - before)
        x = middle + (s / t) * (x - middle)
        before = denoised
    return (final or denoiser)(x, _level(levels[-1], x))


def ancestral(
    denoiser: Denoise, x: Tensor, sigmas: Tensor, generator: Randomness = None, final: Denoise | None = None
) -> Tensor:
    """Ancestral sampling of the reverse SDE; n denoiser calls for n levels. Arguments as for `heun`."""
    levels = [float(s) for s in sigmas]
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        x = ancestral_step(x, denoiser(x, _level(t, x)), t, s, generator=generator)
    return (final or denoiser)(x, _level(levels[-1], x))


SAMPLERS: dict[str, Callable[..., Tensor]] = {"multistep": multistep, "heun": heun, "ancestral": ancestral}


def level_grid(steps: int, sigma_min: float, sigma_max: float, rho: float = math.inf) -> Tensor:
    """``steps`` decreasing levels from sigma_max to sigma_min: `karras_grid` with bend ``rho``, whose limit at infinity has equal ratios.

    Raises:
        InputError: as `karras_grid`; rho < 1.
    """
    if not rho >= 1:
        raise InputError(f"level grid: expected rho >= 1, got {rho}")
    if math.isfinite(rho):
        return karras_grid(steps, sigma_min, sigma_max, rho=rho)
    ends = karras_grid(2, sigma_min, sigma_max).log()  # checks them
    if steps < 2:
        return karras_grid(steps, sigma_min, sigma_max)
    return torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64).exp()


def _level(sigma: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)


def level_range(prior: Prior, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The levels a sampler should cover: down to what the prior has learned, up to where the image drowns in noise.

    Defaults: sigma_min = max(the prior's, data_std / 100); sigma_max = the prior's, else 100 data_std.

    Raises:
        InputError: not 0 < sigma_min < sigma_max.
    """
    low = max(prior.sigma_min, 0.01 * prior.data_std) if sigma_min is None else sigma_min
    high = (prior.sigma_max or 100 * prior.data_std) if sigma_max is None else sigma_max
    if not 0 < low < high:
        raise InputError(f"noise levels: expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    return low, high


def chain_seeds(num: int, generator: torch.Generator | None) -> list[int]:
    """One seed for each of ``num`` chains."""
    return torch.randint(2**62, (num,), generator=generator).tolist()


@torch.no_grad()
def generate(
    prior: Prior,
    num: int,
    *,
    steps: int = 40,
    sampler: str = "heun",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw images from an unconditional prior.

    The grid stops at sigma_min, by default the lowest level the prior has learned. For a prior trained on noisy data
    without consistency that is sigma_n, and what is returned is E[x_0 | x_sigma_n] ("truncated"): its
    covariance is Sigma (Sigma + sigma_n^2)^-1 Sigma, less than the data's.

    Args:
        prior: unconditional.
        num: number of images.
        steps: noise levels.
        sampler: "heun" or "ancestral".
        sigma_min, sigma_max: ends of the grid; see `level_range`.
        rho: bend of the grid (Karras et al. 2022).
        batch_size: images at a time; the result does not depend on it.
        generator: source of randomness.
        progress: show a progress bar.

    Returns:
        (num, C, H, W), in the prior's type and on its device.

    Raises:
        ConditioningError: a mask-conditional prior.
        InputError: an unknown sampler or impossible numbers.
    """
    require_unconditional(prior, "generate")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if num < 1 or batch_size < 1:
        raise InputError(f"generate: expected num >= 1 and batch_size >= 1, got {num} and {batch_size}")
    grid = karras_grid(steps, *level_range(prior, sigma_min, sigma_max), rho=rho)
    reference = next(iter(prior.state_dict().values()), torch.zeros(()))
    seeds = chain_seeds(num, generator)
    images = []
    for start in track(range(0, num, batch_size), "generating", enabled=progress):
        noise = ChainNoise(seeds[start : start + batch_size])
        like = torch.empty(
            len(noise.generators), *prior.shape, dtype=reference.dtype, device=reference.device
        )
        x = draw_noise(like, noise) * float(grid[0])
        images.append(SAMPLERS[sampler](prior, x, grid, noise))
    return torch.cat(images)
