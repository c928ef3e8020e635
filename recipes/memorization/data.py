"""The images of a cell: those to train on, drawn by the seed, and real ones that are never trained on.

digits: of MNIST's 10,000 test images; held out are its 60,000 training images. faces: of ORL's 400 pictures,
300, and the other 100 (other pictures of the same people: a stricter yardstick than other people). files: of
one file of images; held out is another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.errors import InputError
from recipes import small_images
from recipes.scripts import script


class Data(NamedTuple):
    """Training and held-out images, (N, C, H, W), values in [-1, 1]."""

    train: Tensor
    held_out: Tensor


def load(settings: dict[str, Any], num: int, seed: int, held_out: int) -> Data:
    """``num`` training images drawn by ``seed``, and up to ``held_out`` others, the same for every seed where
    there are enough.

    Args:
        settings: ``data`` of config.yaml.

    Raises:
        InputError: fewer images than asked for, or no file (with the steps that make it).
    """
    kind: Callable[..., Data] = {"digits": _digits, "faces": _faces, "files": _files}[settings["kind"]]
    return kind(settings, num, seed, held_out)


def pick(there: int, num: int, seed: int) -> list[int]:
    """``num`` of ``there`` rows, drawn by ``seed``, in their order."""
    if num > there:
        raise InputError(f"memorization: expected at least {num} images to train on, got {there}")
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:num].tolist())


def _digits(settings: dict[str, Any], num: int, seed: int, held_out: int) -> Data:
    train, other = (small_images.images(part)[0] for part in ("test10k", "train60k"))
    return Data(train[pick(len(train), num, seed)], other[:held_out])


@lru_cache(maxsize=1)
def _all_faces(size: int) -> Tensor:
    return torch.from_numpy(script("faces").load(size)[0]) * 2 - 1


def _faces(settings: dict[str, Any], num: int, seed: int, held_out: int) -> Data:
    images = _all_faces(settings["size"])
    train, other = script("faces").split("image", seed)
    return Data(images[train[pick(len(train), num, seed)]], images[other[:held_out]])


def _files(settings: dict[str, Any], num: int, seed: int, held_out: int) -> Data:
    missing = [path for path in (settings["train"], settings["held_out"]) if not Path(path).exists()]
    if missing:
        steps = script(settings["script"]).STEPS if "script" in settings else "see datasets/"
        raise InputError(f"{missing[0]}: expected a file of images, found none; {steps}")
    with ReferenceFile(settings["train"]) as train, ReferenceFile(settings["held_out"]) as other:
        rows = pick(len(train), num, seed)
        return Data(train.images(rows), other.images(slice(0, held_out)))
