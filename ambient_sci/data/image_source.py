"""N images from anywhere, read lazily, with what is known of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.clipping import Ends
from ambient_sci.errors import InputError


@dataclass
class ImageSource:
    """N images, read lazily by ``read(rows) -> (B, C, H, W)``."""

    image_shape: tuple[int, int, int]
    subjects: list[str]
    read: Callable[[np.ndarray], Tensor]
    origin: str
    scale: float | np.ndarray = 1.0
    geometry: dict[str, Any] = field(default_factory=dict)
    #: True when the numbers are magnitudes of MR images: their noise is Rician, not Gaussian.
    magnitude: bool = False
    #: what was left out, guessed or turned; it may grow while images are read
    notes: list[str] = field(default_factory=list)
    #: noise level that the source states, in its original units; one number or (N,)
    noise_std: float | np.ndarray | None = None
    #: class of each image (N,), None where the source has no classes
    labels: np.ndarray | None = None
    #: step and offset of images that are stored as 8 bits, None for any others
    eight_bits: tuple[float, float] | None = None
    #: noise level of an image, over that of its pixels as they came; one number or (N,)
    noise_factor: float | np.ndarray = 1.0
    #: images of one group share a noise level, (N,); None: all do that have one scale and factor
    noise_group: np.ndarray | None = None
    #: names of the images for messages; empty: by number
    names: list[str] = field(default_factory=list)
    #: (C, H, W) of one image, where they differ
    shape_of: Callable[[int], tuple[int, ...]] | None = None
    #: counts the pixels at the ends of their type while images are read
    ends: Ends | None = None

    def __len__(self) -> int:
        return len(self.subjects)

    def images(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) float32. InputError for NaN, infinities or a shape unlike the first image's."""
        images = self.read(rows)
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"{self.origin}: expected images {self.image_shape}, got {tuple(images.shape[1:])}"
            )
        bad = ~torch.isfinite(images).flatten(1).all(1)
        if bad.any():
            raise InputError(
                f"{self.origin}: NaN or infinite values in image {int(rows[int(bad.nonzero()[0, 0])])}"
            )
        return images

    def labels_of(self, rows: np.ndarray) -> np.ndarray | None:
        """The classes of some images, None where the source has none."""
        return None if self.labels is None else self.labels[rows]

    def scale_of(self, rows: np.ndarray) -> Any:
        """The scale of some samples."""
        return self.scale[rows] if isinstance(self.scale, np.ndarray) else self.scale
