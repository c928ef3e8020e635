r"""Memorisation by attack: most of a suspected image is taken away, and the prior samples it back.

    noise      x_sigma = x + sigma z;    ancestral samples of p(x | x_sigma)
    inpaint    y = M x + sigma_y n;      MMPS samples of p(x | y), M keeps the upper rows

The MMSE estimates beside are D(x_sigma, sigma) for noise, and the mean of the samples for inpainting.

A prior that remembers the image returns it; one that does not returns another that fits. How alike "another
that fits" is, the same attack on held-out images says.

Source: Daras et al., "Consistent Diffusion Meets Tweedie" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation.extractors import Extractor, Range, get_extractor, natural_range
from ambient_sci.evaluation.features import features_of
from ambient_sci.evaluation.memorization_images import Images, chosen_images, identity
from ambient_sci.evaluation.memorization_statistics import above, distribution, separation
from ambient_sci.noise import ChainNoise, draw_noise, karras_grid
from ambient_sci.operators import Masking
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.progress import track
from ambient_sci.sampling import reconstruct
from ambient_sci.sampling.unconditional import ancestral, chain_seeds, level_range

#: Products of a solve in the inpainting attack. A memory has a denoiser of steps, whose Jacobian is far from
#: any Gaussian's: with the sampler's usual 5 products the perfect memory of 20 images is caught in 99 of 100
#: draws, with 15 in all.
PRODUCTS = 15


@dataclass(frozen=True)
class MemorizationAttack:
    """What `memorization_attack` found.

    Attributes:
        report: numbers in JSON types.
        suspects, controls: attack ("noise", "inpaint") to what came back: ``image`` (B, ...), ``attacked``
            (B, ...), ``samples`` (S, B, ...), ``mmse`` (B, ...), and ``similarity`` (S, B),
            ``mmse_similarity`` (B,) with the image itself.
    """

    report: dict[str, Any]
    suspects: dict[str, dict[str, Tensor]]
    controls: dict[str, dict[str, Tensor]] | None


def memorization_attack(
    prior: Prior,
    train: Images,
    held_out: Images | None = None,
    *,
    extractor: str | Extractor = "efficientnet-lite0",
    level: float | None = None,
    hidden: float = 0.5,
    num: int = 32,
    samples: int = 4,
    steps: int = 40,
    value_range: Range | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> MemorizationAttack:
    r"""Take most of an image away and let the prior sample it back: noise up to a level, or hide the lower
    rows.

        noise      x_sigma = x + sigma z;    ancestral samples of p(x | x_sigma)
        inpaint    y = M x + sigma_y n;      MMPS samples of p(x | y), M keeps the upper rows

    The MMSE estimates beside are D(x_sigma, sigma) for noise, and the mean of the samples for inpainting.

    What comes back is compared with the image itself: similarity of features, and error of the pixels that
    were hidden (of all pixels for noise) in data standard deviations. A prior that remembers the image
    returns it; one that does not returns another that fits.

    Args:
        prior: unconditional.
        train: suspected images (N, C, H, W), or a file of them.
        held_out: images that were not trained on, for the same attack. Without them nothing can be concluded,
            which the report says.
        extractor, value_range: see `memorization_score`.
        level: noise level of the first attack; default: 4 data standard deviations (fewer for images of less
            than 576 values, see `_default_level`), at most the highest trained level.
        hidden: share of the rows that the second attack hides, the lower ones, > 0 and < 1.
        num: images attacked of each kind, drawn by the seed.
        samples: draws for each image.
        steps: noise levels of the first attack's sampler.
        batch_size: chains at a time; it does not change the results.
        device: where the extractor computes; the prior computes where it is.
        seed: of everything random.
        progress: show progress bars.

    Raises:
        InputError: images of another shape than the prior's, or numbers out of range.
        ConditioningError: a mask-conditional prior.
    """
    low, level = _levels(prior, level)
    if not 0 < hidden < 1 or min(num, samples, batch_size) < 1 or steps < 2:
        raise InputError(
            "memorization attack: expected 0 < hidden < 1, num, samples and batch_size >= 1 and steps >= 2, "
            f"got {hidden}, {num}, {samples}, {batch_size} and {steps}"
        )
    found = get_extractor(extractor).to(device)
    generator = torch.Generator().manual_seed(seed)
    sets = {"train": chosen_images(prior, train, num, generator, "train")}
    if held_out is not None:
        sets["held_out"] = chosen_images(prior, held_out, num, generator, "held_out")
    if not found.rgb:
        value_range = None
    elif value_range is None:
        value_range = natural_range(sets["train"])
    grid, mask = karras_grid(steps, low, level), _lower_part(prior.shape, hidden)
    settings: dict[str, Any] = {
        "samples": samples,
        "batch_size": batch_size,
        "generator": generator,
        "progress": progress,
    }
    results: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, images in sets.items():
        noise = _noise_attack(prior, images, grid, **settings)
        inpaint = _inpaint_attack(prior, images, mask, **settings)
        results[name] = {
            attack: {**result, **_resemblance(result, found, value_range, prior.data_std, device)}
            for attack, result in (("noise", noise), ("inpaint", inpaint))
        }
    return _found(
        results,
        generator,
        **identity(found, value_range),
        level=level,
        hidden=float(1 - mask.mean()),
        samples=samples,
        steps=steps,
        seed=seed,
    )


def _found(
    results: dict[str, dict[str, dict[str, Tensor]]], generator: torch.Generator, **about: Any
) -> MemorizationAttack:
    """The results with their report, of which ``about`` is the part that was asked for."""
    suspects, controls = results["train"], results.get("held_out")
    report = {
        **about,
        "suspects": len(suspects["noise"]["image"]),
        "controls": 0 if controls is None else len(controls["noise"]["image"]),
        "attacks": {
            attack: _attack_report(result, None if controls is None else controls[attack], generator)
            for attack, result in suspects.items()
        },
    }
    return MemorizationAttack(report, suspects, controls)


def _levels(prior: Prior, level: float | None) -> tuple[float, float]:
    """The noise levels that the first attack's sampler ends and starts at."""
    require_unconditional(prior, "memorization attack")
    if len(prior.shape) != 3 or prior.shape[1] * prior.shape[2] < 2:
        raise InputError(
            "memorization attack: expected a prior of images (C, H, W) of 2 pixels or more, got "
            f"{prior.shape}"
        )
    low, high = level_range(prior, None, None)
    level = min(_default_level(prior), high) if level is None else level
    if not low < level <= high:
        raise InputError(
            f"memorization attack: expected a noise level above {low:.3g} and up to {high:.3g}, got {level:g}"
        )
    return low, level


def _default_level(prior: Prior) -> float:
    """min(4, sqrt(n) / 6) data standard deviations, for images of n values.

    Two images differ by about sqrt(2 n) standard deviations, so that up to this level their log-likelihoods
    stay some 36 apart: enough for a perfect memory of some tens of images, whose pixels go together, to tell
    which it was. More noise would hide it even from such a memory.
    """
    return min(4.0, float(np.prod(prior.shape)) ** 0.5 / 6) * prior.data_std


def _noise_attack(
    prior: Prior,
    images: Tensor,
    grid: Tensor,
    *,
    samples: int,
    batch_size: int,
    generator: torch.Generator,
    progress: bool,
) -> dict[str, Tensor]:
    """Images (B, ...) noised to the first level of ``grid``, and ``samples`` ancestral draws back from the
    same noisy images."""
    level, count = float(grid[0]), len(images)
    start = ChainNoise(chain_seeds(count, generator))
    noisy = images + level * draw_noise(images, start)
    chains = torch.tensor(chain_seeds(samples * count, generator))
    drawn, mmse = [], []
    with torch.no_grad():
        for begin in track(range(0, samples * count, batch_size), "attack by noise", enabled=progress):
            which = torch.arange(begin, min(begin + batch_size, samples * count))
            drawn.append(ancestral(prior, noisy[which % count], grid, ChainNoise(chains[which].tolist())))
        for part in noisy.split(batch_size):
            mmse.append(prior(part, level))
    return {
        "image": images,
        "attacked": noisy,
        "samples": torch.cat(drawn).reshape(samples, *images.shape),
        "mmse": torch.cat(mmse),
        "hidden": torch.ones_like(images[:1]),
    }


def _inpaint_attack(
    prior: Prior,
    images: Tensor,
    mask: Tensor,
    *,
    samples: int,
    batch_size: int,
    generator: torch.Generator,
    progress: bool,
) -> dict[str, Tensor]:
    """What MMPS puts into the hidden rows of images (B, ...)."""
    operator = Masking(mask.to(images), tuple(images.shape[1:])).to(images.device)
    sigma_y = 0.01 * prior.data_std
    noise = draw_noise(images, ChainNoise(chain_seeds(len(images), generator)))
    y = operator.A(images + sigma_y * noise)
    found = reconstruct(
        prior,
        operator,
        y,
        sigma_y,
        samples=samples,
        sampler="mmps",
        max_iterations=PRODUCTS,
        batch_size=batch_size,
        generator=generator,
        progress=progress,
    )
    return {
        "image": images,
        "attacked": y,
        "samples": found.samples,
        "mmse": found.mean,
        "hidden": (1 - operator.mask).expand_as(images[:1]),
    }


def _resemblance(
    result: dict[str, Tensor],
    extractor: Extractor,
    value_range: Range | None,
    scale: float,
    device: str | torch.device,
) -> dict[str, Tensor]:
    """Similarity with the image itself of every draw and of the MMSE estimate, and their errors where
    something was hidden."""
    image, draws, hidden = result["image"], result["samples"], result["hidden"]

    def features(images: Tensor) -> Tensor:
        rows = features_of(images.cpu(), extractor, value_range=value_range, device=device)
        return torch.nn.functional.normalize(torch.from_numpy(np.array(rows)).double(), dim=1)

    def error(images: Tensor) -> Tensor:
        squared = ((images - image) * hidden).double().square().sum((-3, -2, -1)) / float(hidden.sum())
        return (squared.sqrt() / scale).cpu()

    truth = features(image)
    drawn = features(draws.flatten(0, 1)).reshape(*draws.shape[:2], -1)
    return {
        "similarity": (drawn * truth).sum(-1),
        "mmse_similarity": (features(result["mmse"]) * truth).sum(-1),
        "error": error(draws),
        "mmse_error": error(result["mmse"]),
    }


def _attack_report(
    suspects: dict[str, Tensor], controls: dict[str, Tensor] | None, generator: torch.Generator
) -> dict[str, Any]:
    """Distributions of similarity and error for both kinds of images, and how far apart they are, one value
    an image."""
    report: dict[str, Any] = {}
    for kind in ("similarity", "mmse_similarity", "error", "mmse_error"):
        sign = -1 if "error" in kind else 1
        sides = {"suspects": suspects[kind], "controls": None if controls is None else controls[kind]}
        report[kind] = {name: None if v is None else distribution(v) for name, v in sides.items()}
        if sign > 0:
            for name, values in sides.items():
                if values is not None:
                    report[kind][name]["above"] = above(values)
        if controls is not None:
            first, second = (
                sign * v[kind].reshape(-1, v["image"].shape[0]).mean(0) for v in (suspects, controls)
            )
            report[kind]["separation"] = separation(first, second, generator)
    return report


def _lower_part(shape: tuple[int, ...], hidden: float) -> Tensor:
    """A mask (1, 1, H, W) that hides about this share of the rows, the lower ones: at least one, never all.

    A half and not a centred box: of centred objects a box leaves the empty border, from which nobody could
    tell which image it was.
    """
    height, width = shape[-2:]
    mask = torch.ones(1, 1, height, width)
    if height > 1:
        mask[..., height - min(max(round(height * hidden), 1), height - 1) :, :] = 0
    else:
        mask[..., width - min(max(round(width * hidden), 1), width - 1) :] = 0
    return mask
