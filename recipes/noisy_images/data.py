"""The images of the recipe and how samples of them are scored.

Digits and clothes come from package registries (datasets/). Priors learn from 60,000 images; scores are
Frechet distance and KID to the 10,000 others, on the 70 features of `recipes.small_images`, whose classifier
has seen the 60,000. Published sets are image files that datasets/cifar10.py, celeba.py and ffhq.py write;
scores are on the features of an extractor by name ("efficientnet-lite0", or "inception:FILE" for FID),
against the training images, as published.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.errors import InputError
from ambient_sci.evaluation.feature_distances import frechet, kid
from ambient_sci.evaluation.features import features_of
from recipes.small_images import Scores, images, spread

SMALL = ("digits", "clothes")
KID_REFERENCE = 10_000
RANGE = (-1.0, 1.0)

Score = Callable[[Tensor], dict[str, Any]]


def training_images(settings: dict[str, Any], data: str) -> Tensor:
    """Clean images to be made noisy, (N, C, H, W) in [-1, 1].

    Raises:
        InputError: no such file; the message says how to get it.
    """
    if data in SMALL:
        return images("train60k", data)[0]
    return _file(settings).images(slice(None))


def scores(settings: dict[str, Any], data: str, folder: Path) -> tuple[Score, Callable[[], dict[str, Any]]]:
    """samples -> scores, and the scores of as many images that are not among the reference (published sets:
    that are held out)."""
    num = settings["samples"]
    if data in SMALL:
        score = Scores(folder, data, "test10k")
        return score, lambda: score(spread(num, data, "train60k"))
    score = ExtractorScores(settings, folder)
    return score, lambda: score(_file(settings, "held_out").images(slice(0, num)))


class ExtractorScores:
    """Frechet distance and KID to the training images, on the features of an extractor; ``folder`` keeps
    those of the reference."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.name, self.options = settings["features"], {"value_range": RANGE, "batch_size": 250}
        self.reference = features_of(_file(settings), self.name, folder / "features", **self.options)

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """The names of the features are in the names of the scores."""
        found = features_of(samples.cpu().clamp(*RANGE), self.name, **self.options)
        short = self.name.partition(":")[0]
        distance = frechet(found, self.reference, features=short)["distance"]
        some = self.reference[:KID_REFERENCE]
        return {f"frechet, {short}": distance, f"kid, {short}": kid(found, some, features=short)["mean"]}


def _file(settings: dict[str, Any], part: str = "train") -> ReferenceFile:
    path = Path(settings["files"][part])
    if not path.exists():
        raise InputError(f"{path}: expected the images, got no such file; {settings['how']}")
    return ReferenceFile(path)


def noisy(clean: Tensor, sigma: float, seed: int) -> Tensor:
    """One noise for each image, drawn once: a function of the seed alone."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 + seed))
    return clean + sigma * noise
