"""What a set of samples is worth, and what it gives away: quality and memory, on features by their names."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.evaluation import (
    Extractor,
    features_of,
    frechet_interval,
    get_extractor,
    kid,
    memorization_score,
)
from ambient_sci.whole_files import digest_of
from recipes.memorization.data import Data
from recipes.small_images import Scores

VALUES = (-1.0, 1.0)
#: A covariance of more entries than this is not worth a hundred bootstrap resamples here.
WIDEST = 256


@lru_cache(maxsize=4)
def extractor(name: str, folder: Path) -> Extractor:
    """`get_extractor`, and "digits": the 70 standardised features of recipes/exactness, trained in
    ``folder``."""
    if name != "digits":
        return get_extractor(name)
    scores = Scores(folder)
    identity = digest_of(scores.model.state_dict())
    return Extractor(name, lambda x: (scores.features(x) - scores.mean) / scores.std, f"digits {identity}")


def measure(
    samples: Path, data: Data, features: dict[str, dict[str, Any]], folder: Path, last: bool, device: str
) -> dict[str, Any]:
    """Every measure of a file of samples that config.yaml asks for.

    Args:
        samples: a file of images.
        data: what was trained on, and what was not.
        features: of config.yaml.
        folder: what is shared between cells: features of real images.
        last: whether this is the last stop.
        device: of the features' network.
    """
    found: dict[str, Any] = {}
    for name, asked in features.items():
        if last or asked["at"] == "every":
            with ReferenceFile(samples) as file:
                own = file.images(slice(0, asked["samples"]))
            held = data.held_out[: asked["held_out"]]
            found[name] = _on(extractor(name, folder), own, data.train, held, asked, folder, device)
    return found


def _on(
    features: Extractor,
    samples: Tensor,
    train: Tensor,
    held_out: Tensor,
    asked: dict[str, Any],
    folder: Path,
    device: str,
) -> dict[str, Any]:
    """Quality and memory on one kind of features."""
    options: dict[str, Any] = {"value_range": VALUES, "cache": folder / "features", "device": device}
    found: dict[str, Any] = {}
    if asked.get("quality"):
        x, reference = (features_of(images, features, **options) for images in (samples, held_out))
        found["kid"] = kid(x, reference, features=features.name)
        if x.shape[1] <= min(WIDEST, len(x) - 1):
            found["frechet"] = frechet_interval(x, reference, features=features.name)
    if asked.get("memory"):
        found["memory"] = memorization_score(samples, train, held_out, extractor=features, **options).report
    return found
