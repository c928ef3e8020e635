"""Images for the measures of memorisation: from memory or from files, and what identifies the features that
they are judged by."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.errors import InputError
from ambient_sci.evaluation.extractors import Extractor, Range
from ambient_sci.priors.base import Prior, match_dtype

Images = Tensor | ReferenceFile | str | os.PathLike[str]


def identity(extractor: Extractor, value_range: Range | None) -> dict[str, Any]:
    """What the features of a report are."""
    return {"features": extractor.name, "fingerprint": extractor.fingerprint, "value_range": value_range}


def shape_of(images: Images) -> tuple[int, ...]:
    """(N, C, H, W)."""
    if isinstance(images, Tensor):
        return tuple(images.shape)
    if isinstance(images, ReferenceFile):
        return (len(images), *images.image_shape)
    with ReferenceFile(images) as file:
        return (len(file), *file.image_shape)


def take(images: Images, which: Any) -> Tensor:
    """The images of these numbers."""
    if isinstance(images, Tensor):
        return images[list(which)]
    if isinstance(images, ReferenceFile):
        return images.images(list(which))
    with ReferenceFile(images) as file:
        return file.images(list(which))


def chosen_images(prior: Prior, images: Images, num: int, generator: torch.Generator, name: str) -> Tensor:
    """Up to ``num`` images, drawn without replacement and in order, in the prior's type and on its device.

    Raises:
        InputError: images of another shape than the prior's.
    """
    shape = shape_of(images)
    if shape[1:] != tuple(prior.shape):
        raise InputError(
            f"memorization: expected {name} of shape {tuple(prior.shape)} like the prior's, got {shape[1:]}"
        )
    rows = torch.randperm(shape[0], generator=generator)[:num].sort().values.tolist()
    device = next((t.device for t in prior.state_dict().values()), torch.device("cpu"))
    return match_dtype(prior, take(images, rows)).to(device)
