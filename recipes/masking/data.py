"""The images of each part, and what samples are judged by: distances to held-out images, and to the nearest
training images.

| part | learned from | held out | features |
|---|---|---|---|
| digits | of MNIST's 10,000 test images | its 60,000 training images | `small_images` |
| faces | ORL, 30 people, up to 300 pictures | 10 other people, 100 pictures | EfficientNet-Lite0 |
| celeba, cifar10, afhq | ``--data``, as datasets/ writes it | the same | ``--features`` |

The images that a prior is trained on are never seen whole by it, except by the clean one; neighbours are
sought among them all the same, whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.errors import InputError
from ambient_sci.evaluation import features_of, frechet, kid, neighbours
from recipes.small_images import Scores, images, spread

#: Held-out images that are looked at for their nearest training images.
HELD_OUT = 500
#: Principal directions of the Frechet distance where there are too few images for all.
PCA = 32
FILES = {
    "celeba": (
        "celeba64/train.h5",
        "celeba64/test.h5",
        "python datasets/celeba.py SOURCE --out DATA/celeba64",
    ),
    "cifar10": (
        "cifar10/train50k.h5",
        "cifar10/test10k.h5",
        "python datasets/cifar10.py SOURCE --out DATA/cifar10",
    ),
    "afhq": ("afhq64/train.h5", "afhq64/test.h5", "python datasets/afhq.py SOURCE --out DATA/afhq64"),
}


@dataclass
class Images:
    """What a part learns from, and what its samples are judged by.

    Attributes:
        train: (N, C, H, W), clean.
        held_out: images that neighbours are sought for, as a yardstick.
        features: images to features (N, d), for neighbours.
        distances: samples to their distances from held-out images.
        truth: as many real images as are asked for, held out: what samples would score at best.
    """

    train: Tensor
    held_out: Tensor
    features: Callable[[Tensor], Tensor]
    distances: Callable[[Tensor], dict[str, float]]
    truth: Callable[[int], Tensor]


def load(part: str, size: int, seed: int, folder: Path, data: Path, features: str) -> Images:
    """The images of a part, ``size`` of them to learn from, drawn by the seed.

    Args:
        part: see the module's table.
        size: training images.
        seed: of that draw.
        folder: keeps what the cells of the part share.
        data: folder of data sets that are files.
        features: for parts that are files.

    Raises:
        InputError: an unknown part, data that are not there (with the way to get them), or too few of them.
    """
    if part == "digits":
        return _digits(size, folder)
    if part == "faces":
        return _faces(size, seed, "efficientnet-lite0", folder / "features")
    if part in FILES:
        return _files(part, size, seed, data, features, folder / "features")
    raise InputError(f"part: expected digits, faces, {', '.join(FILES)}, got {part!r}")


def _digits(size: int, folder: Path) -> Images:
    folder.mkdir(parents=True, exist_ok=True)
    scores, others = Scores(folder), images("train60k")[0]
    standard = lambda x: (scores.features(x.cpu()) - scores.mean) / scores.std  # noqa: E731
    # Of other writers than those of the 10,000: further on in the held-out images.
    return Images(spread(size), others[-HELD_OUT:], standard, scores, lambda num: others[:num])


@lru_cache(maxsize=1)
def _faces_script() -> Any:
    """datasets/faces.py; by its path, because another library has the name `datasets`."""
    path = Path(__file__).parents[2] / "datasets" / "faces.py"
    spec = importlib.util.spec_from_file_location("ambient_faces", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _faces(size: int, seed: int, features: str, cache: Path, pixels: int = 32) -> Images:
    script = _faces_script()
    x, people = script.load(pixels)
    train, held = script.split("person")
    x = torch.from_numpy(x) * 2 - 1
    rows = _some(train.tolist(), size, seed)
    return _of(x[rows], x[held.tolist()], features, (-1.0, 1.0), cache)


def _files(part: str, size: int, seed: int, data: Path, features: str, cache: Path) -> Images:
    train, held, command = FILES[part]
    for path in (data / train, data / held):
        if not path.exists():
            raise InputError(
                f"{path}: expected the data of part {part}, found none; make them with `{command}`, which "
                "names the steps that get SOURCE, and give --data DATA"
            )
    with ReferenceFile(data / train) as file:
        x = file.images(_some(list(range(len(file))), size, seed))
    with ReferenceFile(data / held) as file:
        others = file.images(slice(0, min(len(file), 10_000)))
    return _of(x, others, features, (-1.0, 1.0), cache)


def _some(rows: list[int], size: int, seed: int) -> list[int]:
    """``size`` of the rows, drawn by the seed, in their order."""
    if size > len(rows):
        raise InputError(f"points: expected at most the {len(rows)} images that there are, got {size}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4000 + seed))
    return sorted(rows[int(k)] for k in order[:size])


def _of(train: Tensor, held: Tensor, features: str, value_range: tuple[float, float], cache: Path) -> Images:
    """Images that are judged on an extractor's features, each computed once."""

    def found(x: Tensor) -> Tensor:
        return torch.from_numpy(features_of(x.cpu(), features, cache, value_range=value_range).copy())

    real = found(held)

    def distances(samples: Tensor) -> dict[str, float]:
        own = found(samples)
        pca = PCA if min(len(own), len(real)) <= own.shape[1] else None
        return {
            "frechet": frechet(own, real, features=features, pca=pca)["distance"],
            "kid": kid(own, real, features=features, subset=min(1000, len(real), len(own)))["mean"],
        }

    return Images(train, held[:HELD_OUT], found, distances, lambda num: held[:num])


def nearest(data: Images, samples: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """Cosine similarity of samples to their nearest training images, beside that of held-out images to
    theirs.

    Returns:
        ``similarity`` and ``held_out_similarity`` (medians), ``copies`` (share of samples nearer than 99 % of
        the held-out images: 0.01 without memory); similarity (N,) and number of the nearest training image
        (N,) of every sample.
    """
    found = neighbours(
        data.features(samples), data.features(data.train), 1, held_out=data.features(data.held_out)
    )
    assert found.held_out is not None
    own, other = (torch.as_tensor(n.similarity)[:, 0].float() for n in (found, found.held_out))
    numbers = {
        "similarity": float(own.median()),
        "held_out_similarity": float(other.median()),
        "copies": float((own > other.quantile(0.99)).float().mean()),
    }
    return numbers, own, torch.as_tensor(found.index)[:, 0]
