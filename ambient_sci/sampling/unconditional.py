r"""Samplers that turn a denoiser into samples: each is one function, readable from top to bottom.

A denoiser is any callable (x, sigma) -> E[x_0 | x_t = x]. With a posterior denoiser E[x_0 | x_t, y] the same
functions sample the posterior. Levels come as a decreasing grid that ends at sigma_min > 0; what is returned
is the denoised image at that level.

    probability flow:  dx/dsigma = (x - D(x, sigma)) / sigma
                       `multistep`, second order, one evaluation a level;
                       `heun`, second order, two evaluations a level
    reverse SDE:       x_s = D + (s/t)^2 (x_t - D) + s sqrt(1 - (s/t)^2) z         `ancestral`, first order

Sources: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm
1; Lu et al., "DPM-Solver++" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import ChainNoise, Randomness, ancestral_step, draw_noise, karras_grid
from ambient_sci.priors import Guided, OneStepPrior
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.priors.given import Given
from ambient_sci.progress import track

Denoise = Callable[[Tensor, Tensor], Tensor]

#: Noise levels of `generate` where nothing is said.
STEPS = 40


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
    """Two-step exponential integrator of the probability flow (DPM-Solver++ 2M); n denoiser calls for n
    levels.

    The flow is linear in x given D, so over a step only D has to be extrapolated, linearly in log sigma from
    the last two levels: x_s = D' + (s/t) (x - D'). Arguments as for `heun`.
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
    """``steps`` decreasing levels from sigma_max to sigma_min: `karras_grid` with bend ``rho``, whose limit
    at infinity has equal ratios.

    The ends are exact: rounded, the last level could lie below what a prior has learned.

    Raises:
        InputError: as `karras_grid`; rho < 1.
    """
    if not rho >= 1:
        raise InputError(f"level grid: expected rho >= 1, got {rho}")
    if math.isfinite(rho):
        return karras_grid(steps, sigma_min, sigma_max, rho=rho)
    grid = karras_grid(steps, sigma_min, sigma_max)  # checks the numbers, and has the ends
    grid[1:-1] = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()[
        1:-1
    ]
    return grid


def _level(sigma: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)


def level_range(prior: Prior, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The levels a sampler should cover: down to what the prior has learned, up to where the image drowns in
    noise.

    Defaults: sigma_min = max(the prior's, data_std / 100); sigma_max = the prior's, else 100 data_std.

    Raises:
        InputError: not 0 < sigma_min < sigma_max.
    """
    low = max(prior.sigma_min, 0.01 * prior.data_std) if sigma_min is None else sigma_min
    high = (prior.sigma_max or 100 * prior.data_std) if sigma_max is None else sigma_max
    if not 0 < low < high:
        raise InputError(f"noise levels: expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    return low, high


def generation_grid(
    prior: Prior, steps: int | None, sigma_min: float | None, sigma_max: float | None, rho: float
) -> Tensor:
    """The levels of `generate`: `karras_grid` over `level_range`; for one step sigma_max alone.

    Without ``steps`` there are `STEPS`, or one for a one-step generator.

    Raises:
        InputError: impossible numbers, a sigma_min for one step, which has no use for it, or other levels
            than its own for a one-step generator.
    """
    if isinstance(prior, OneStepPrior):
        if steps not in (None, 1) or sigma_min is not None or sigma_max not in (None, prior.sigma):
            raise InputError(
                f"one-step generator: expected one step at its own level {prior.sigma:g}, got "
                f"{steps or 1} and levels {sigma_max} to {sigma_min}"
            )
        return torch.tensor([prior.sigma], dtype=torch.float64)
    steps = STEPS if steps is None else steps
    if steps != 1:
        return karras_grid(steps, *level_range(prior, sigma_min, sigma_max), rho=rho)
    if sigma_min is not None:
        raise InputError(f"noise levels: expected no sigma_min for one step, at sigma_max, got {sigma_min:g}")
    high = (prior.sigma_max or 100 * prior.data_std) if sigma_max is None else sigma_max
    if not 0 < high < math.inf:
        raise InputError(f"noise levels: expected 0 < sigma_max, got {high:g}")
    return torch.tensor([high], dtype=torch.float64)


def state_like(prior: Prior) -> Tensor:
    """An empty tensor of the type and on the device that a sampler's state should have: those of the prior's
    first floating-point tensor, but float32 at least, since states add up over many steps what a shorter type
    would round away.
    """
    tensors = (t for t in chain(prior.parameters(), prior.buffers()) if t.is_floating_point())
    first = next(tensors, torch.empty(0))
    return torch.empty(0, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)


def chain_seeds(num: int, generator: torch.Generator | None) -> list[int]:
    """One seed for each of ``num`` chains."""
    return torch.randint(2**62, (num,), generator=generator).tolist()


@torch.no_grad()
def generate(
    prior: Prior,
    num: int,
    *,
    steps: int | None = None,
    sampler: str = "heun",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    batch_size: int = 64,
    given: Given | None = None,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw images from an unconditional prior.

    The grid stops at sigma_min, by default the lowest level the prior has learned. For a prior trained on
    noisy data without consistency that is sigma_n, and what is returned is E[x_0 | x_sigma_n] ("truncated"):
    its covariance is Sigma (Sigma + sigma_n^2)^-1 Sigma, less than the data's.

    With one step what is returned is D(sigma_max z, sigma_max), which is an image if the prior is a one-step
    generator.

    Args:
        prior: unconditional.
        num: number of images.
        steps: noise levels, >= 1; default: 40, and 1 for a one-step generator.
        sampler: a name in `SAMPLERS`: "multistep", "heun" or "ancestral".
        sigma_min, sigma_max: ends of the grid; see `level_range`.
        rho: bend of the grid (Karras et al. 2022).
        batch_size: images at a time; the result does not depend on it.
        given: `Labels` or a `Prompt` with one row for each image, for priors that take them; without, images
            of all classes or of the empty prompt.
        guidance: scale of classifier-free guidance, see `Guided`; 1 is none.
        generator: source of randomness.
        progress: show a progress bar.

    Returns:
        (num, C, H, W), in the prior's type (float32 where that is shorter) and on its device.

    Raises:
        ConditioningError: a mask-conditional prior.
        InputError: an unknown sampler, impossible numbers, or images that are not finite.
    """
    require_generator(prior, "generate")
    check_generation("generate", num, sampler, batch_size)
    grid = generation_grid(prior, steps, sigma_min, sigma_max, rho)
    denoiser_of = None if given is None and guidance == 1 else told(prior, num, given, guidance)
    seeds = chain_seeds(num, generator)
    return chains(prior, seeds, grid, sampler, batch_size, denoiser_of=denoiser_of, progress=progress)


def require_generator(prior: Prior, what: str) -> None:
    """Raise ConditioningError unless images can be drawn from ``prior``."""
    if not isinstance(prior, OneStepPrior):
        require_unconditional(prior, what)


def told(prior: Prior, num: int, given: Given | None, guidance: float) -> Callable[[slice], Denoise]:
    """Which chains (a slice) -> their denoiser, told their rows of ``given``.

    Raises:
        ConditioningError: something else than the prior takes.
        InputError: another number of rows than images, or guidance without anything to be guided by.
    """
    prior.check_given(given)
    if given is None:
        raise InputError(
            f"guidance: expected labels or a prompt to be guided by, got none and a scale of {guidance:g}"
        )
    rows = len(next(t for t in vars(given).values() if isinstance(t, Tensor)))
    if rows != num:
        raise InputError(f"given: expected one row for each of {num} images, got {rows}")
    state, guided = state_like(prior), prior if guidance == 1 else Guided(prior, guidance)

    def denoiser_of(some: slice) -> Denoise:
        own = given[some].to(state.device)
        return lambda x, sigma: guided(x, sigma, own)

    return denoiser_of


def check_generation(what: str, num: int, sampler: str, batch_size: int) -> None:
    """Raise InputError unless ``sampler`` is one of `SAMPLERS` and both numbers are at least 1."""
    if sampler not in SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if num < 1 or batch_size < 1:
        raise InputError(f"{what}: expected num >= 1 and batch_size >= 1, got {num} and {batch_size}")


def chains(
    prior: Prior,
    seeds: list[int],
    grid: Tensor,
    sampler: str,
    batch_size: int,
    *,
    denoiser_of: Callable[[slice], Denoise] | None = None,
    progress: bool = False,
) -> Tensor:
    """One image for each seed, from pure noise down the levels of ``grid``, ``batch_size`` at a time.

    Args:
        denoiser_of: which chains (a slice) -> their denoiser; default: the prior for all.

    Raises:
        InputError: images that are not finite.
    """
    images, state = [], state_like(prior)
    for start in track(range(0, len(seeds), batch_size), "generating", enabled=progress):
        some = slice(start, min(start + batch_size, len(seeds)))
        noise = ChainNoise(seeds[some], state.device)
        x = float(grid[0]) * draw_noise(state.new_empty(some.stop - some.start, *prior.shape), noise)
        denoiser = prior if denoiser_of is None else denoiser_of(some)
        images.append(SAMPLERS[sampler](denoiser, x, grid, noise).to(state.dtype))
    found = torch.cat(images)
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            "images: expected finite values, got NaN or infinity: the prior's weights are damaged or diverged"
        )
    return found
