r"""Has a prior memorised its training images? Three measures, each beside the same measure of images that
were not trained on.

    score    similarity of generated images to their nearest training image             here
    attack   a training image is noised or masked, and the prior samples what was lost  `memorization_attack`
    error    denoising error on held-out images over that on training images            `memorization_error`

None of them is a number with a meaning of its own. Similarity depends on the features and on how alike the
data are, so held-out images of the same source are always the yardstick: they cannot have been copied, and
what they score is what no memory scores.

Sources: Somepalli et al., "Diffusion Art or Digital Forgery?" (2023); Carlini et al., "Extracting Training
Data from Diffusion Models" (2023) for the calibrated ratio.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation.extractors import Extractor, Range, get_extractor, natural_range
from ambient_sci.evaluation.features import features_of
from ambient_sci.evaluation.memorization_images import Images, identity, shape_of, take
from ambient_sci.evaluation.memorization_statistics import above, copies, distribution, separation
from ambient_sci.evaluation.neighbours import Neighbours, neighbours

NEAREST = 50


@dataclass(frozen=True)
class MemorizationScore:
    """What `memorization_score` found: a report in JSON types, and the values behind it, one row a generated
    or held-out image.

    Attributes:
        report: numbers in JSON types.
        neighbours: similarities and rows of the nearest training images, of the generated and of the held-out
            images.
        ratio, held_out_ratio: distance to the nearest over the mean distance to the k nearest.
    """

    report: dict[str, Any]
    neighbours: Neighbours
    ratio: Tensor
    held_out_ratio: Tensor


def memorization_score(
    samples: Images,
    train: Images,
    held_out: Images,
    *,
    extractor: str | Extractor = "efficientnet-lite0",
    k: int = NEAREST,
    value_range: Range | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> MemorizationScore:
    """Similarity of generated images to their nearest training images, and the same of held-out real images.

    ``separation`` is the probability that a generated image is nearer to the training set than a held-out
    one: 0.5 without memory. The calibrated ratio, distance to the nearest over the mean distance to the k
    nearest, is small for a copy of one image and near 1 in a crowd, whatever the features' scale. ``copies``
    is the share of generated images whose ratio is smaller than that of 99 % of the held-out ones.

    Args:
        samples, train, held_out: images (N, C, H, W) of one shape, or files of them.
        extractor: see `get_extractor`.
        k: neighbours of the calibrated ratio, >= 2; at most the training images.
        value_range: what black and white are; default: `natural_range` of the training images.
        cache, batch_size, device, progress: see `features_of`.
        seed: of the bootstrap.

    Raises:
        InputError: images of different shapes, fewer than two training images, or what `features_of` and
            `neighbours` refuse.
    """
    sets = {"samples": samples, "train": train, "held_out": held_out}
    shapes = _shapes(sets)
    k = min(k, shapes["train"][0])
    if k < 2:
        raise InputError(
            f"memorization: expected at least 2 training images and k >= 2, got {shapes['train'][0]} and {k}"
        )
    found = get_extractor(extractor)
    if not found.rgb:
        value_range = None
    elif value_range is None:
        value_range = natural_range(take(train, range(min(1024, shapes["train"][0]))))
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
    features = {n: features_of(x, found, cache, value_range=value_range, **options) for n, x in sets.items()}
    near = neighbours(features["samples"], features["train"], k, held_out=features["held_out"])
    assert near.held_out is not None
    ratios = _ratio(near), _ratio(near.held_out)
    generator = torch.Generator().manual_seed(seed)
    report = {
        **identity(found, value_range),
        **{name: shape[0] for name, shape in shapes.items()},
        "similarity": _compared(near.similarity[:, 0], near.held_out.similarity[:, 0], generator),
        "ratio": {
            "k": k,
            "samples": distribution(ratios[0]),
            "held_out": distribution(ratios[1]),
            "separation": separation(-ratios[0], -ratios[1], generator),
            "copies": copies(ratios[0], ratios[1], generator),
        },
        "seed": seed,
    }
    return MemorizationScore(report, near, *ratios)


def _shapes(sets: dict[str, Images]) -> dict[str, tuple[int, ...]]:
    """The shapes of sets of images that have to be alike but for their numbers."""
    shapes = {name: shape_of(images) for name, images in sets.items()}
    expected = shapes["train"][1:]
    for name, shape in shapes.items():
        if shape[1:] != expected:
            raise InputError(f"memorization: expected {name} of shape {expected} like train, got {shape[1:]}")
    return shapes


def _compared(samples: Tensor, held_out: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Similarities of two kinds of images, with the counts of both and how far they are apart."""
    return {
        "samples": distribution(samples) | {"above": above(samples)},
        "held_out": distribution(held_out) | {"above": above(held_out)},
        "separation": separation(samples, held_out, generator),
    }


def _ratio(near: Neighbours) -> Tensor:
    """Distance of unit vectors to the nearest over the mean distance to all k; 0 where all k are at distance
    0."""
    distance = (2 - 2 * near.similarity).clamp(min=0).sqrt()
    mean = distance.mean(1)
    return torch.where(mean > 0, distance[:, 0] / mean, torch.zeros_like(mean))
