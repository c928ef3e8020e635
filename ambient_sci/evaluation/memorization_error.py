r"""Memorisation by the denoising error: how much better a prior knows its training images than others of
their kind, level by level.

ratio(sigma) = mean over held-out of |D(x + sigma z, sigma) - x|^2  /  the same over training images
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation.memorization_images import Images, chosen_images
from ambient_sci.evaluation.memorization_statistics import auc, bootstrap, separation
from ambient_sci.noise import ChainNoise, draw_noise
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.progress import track
from ambient_sci.sampling.unconditional import chain_seeds


@dataclass(frozen=True)
class MemorizationError:
    """What `memorization_error` found.

    Attributes:
        report: numbers in JSON types; ``levels`` holds one entry for each noise level.
        train, held_out: mean squared denoising error of each image at each level, (B, levels).
    """

    report: dict[str, Any]
    train: Tensor
    held_out: Tensor


def memorization_error(
    prior: Prior,
    train: Images,
    held_out: Images,
    *,
    levels: int = 12,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    num: int = 256,
    draws: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> MemorizationError:
    r"""Denoising error on held-out images over that on training images, at each noise level.

        ratio(sigma) = mean over held-out of |D(x + sigma z, sigma) - x|^2  /  the same over training images

    Above 1, the prior knows its training images better than others of their kind at that level. Both ends are
    calm: noise that hides nothing, and noise that hides all. Intervals are pointwise: of twelve levels
    without memory, one may lie above 1 in its interval.

    Args:
        prior: unconditional.
        train, held_out: images (N, C, H, W) of the prior's shape, or files of them.
        levels: noise levels, in equal ratios.
        sigma_min, sigma_max: ends; default: the prior's, between 0.02 and 20 data standard deviations.
        num: images of each kind, drawn by the seed.
        draws: noises for each image and level.
        batch_size: images at a time; it does not change the results.
        seed: of everything random.
        progress: show a progress bar.

    Raises:
        InputError: images of another shape, fewer than two, or numbers out of range.
        ConditioningError: a mask-conditional prior.
    """
    require_unconditional(prior, "memorization error")
    low = max(prior.sigma_min, 0.02 * prior.data_std) if sigma_min is None else sigma_min
    high = min(prior.sigma_max or float("inf"), 20 * prior.data_std) if sigma_max is None else sigma_max
    if not 0 < low < high or min(levels, num) < 2 or min(draws, batch_size) < 1:
        raise InputError(
            "memorization error: expected 0 < sigma_min < sigma_max, levels and num >= 2, draws and "
            "batch_size >= 1, got "
            f"{low:g}, {high:g}, {levels}, {num}, {draws} and {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    grid = torch.logspace(float(np.log10(low)), float(np.log10(high)), levels, dtype=torch.float64)
    errors = []
    for name, images in (("train", train), ("held_out", held_out)):
        chosen = chosen_images(prior, images, num, generator, name)
        if len(chosen) < 2:
            raise InputError(f"memorization error: expected at least 2 images of {name}, got {len(chosen)}")
        errors.append(_denoising_errors(prior, chosen, grid, draws, batch_size, generator, progress))
    weighted = [(e * prior.loss_weight(grid) / grid.numel()).sum(1) for e in errors]
    rows = [
        _level_report(prior, float(s), errors[0][:, i], errors[1][:, i], generator)
        for i, s in enumerate(grid)
    ]
    report = {
        "train": len(errors[0]),
        "held_out": len(errors[1]),
        "draws": draws,
        "seed": seed,
        "levels": rows,
        "memorised_at": [row["sigma"] for row in rows if row["interval"][0] > 1],
        "separation": separation(weighted[1], weighted[0], generator),
    }
    return MemorizationError(report, *errors)


@torch.no_grad()
def _denoising_errors(
    prior: Prior,
    images: Tensor,
    grid: Tensor,
    draws: int,
    batch_size: int,
    generator: torch.Generator,
    progress: bool,
) -> Tensor:
    """Mean squared error per entry, (B, levels), averaged over ``draws`` noises; every image has a noise
    stream of its own."""
    seeds = chain_seeds(len(images), generator)
    errors = torch.zeros(len(images), len(grid), dtype=torch.float64)
    for start in track(range(0, len(images), batch_size), "denoising", enabled=progress):
        x = images[start : start + batch_size]
        noise = ChainNoise(seeds[start : start + batch_size])
        for column, sigma in enumerate(grid.tolist()):
            for _ in range(draws):
                difference = prior(x + sigma * draw_noise(x, noise), sigma) - x
                errors[start : start + len(x), column] += (
                    difference.double().square().flatten(1).mean(1).cpu() / draws
                )
    return errors


def _level_report(
    prior: Prior, sigma: float, train: Tensor, held_out: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    # A perfect memory has no error at all; the floor, 1e-12 of the data's variance, keeps its ratio a number.
    floor = 1e-12 * prior.data_std**2

    def ratio(held: Tensor, own: Tensor) -> float:
        return float((held.mean() + floor) / (own.mean() + floor))

    return {
        "sigma": sigma,
        "train": float(train.mean()),
        "held_out": float(held_out.mean()),
        "ratio": ratio(held_out, train),
        "interval": bootstrap(ratio, held_out, train, generator),
        "auc": auc(held_out, train),
    }
