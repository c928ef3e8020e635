"""Clean images from arrays and volumes: slicing, square padding, anti-aliased resizing, scaling.

A volume in RAS orientation (axes towards right, anterior, superior) is cut into slices ``volume[:, :, k]``
(axial),
``volume[:, j, :]`` (coronal) and ``volume[i, :, :]`` (sagittal). Slices keep these array axes; for a picture
with the head upright show ``np.rot90(slice)``. A volume is scaled so that its 99.9th percentile is 1;
brighter voxels exceed 1, nothing is clipped.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

from ambient_sci.errors import InputError

#: array axis that numbers the slices of a RAS volume
SLICE_AXES = {"axial": 2, "coronal": 1, "sagittal": 0}


def percentile_scale(volume: np.ndarray, percentile: float = 99.9) -> float:
    """The value that becomes 1: a percentile of the magnitude. InputError when it is 0 (an empty volume)."""
    scale = float(np.percentile(np.abs(volume), percentile))
    if not np.isfinite(scale):
        raise InputError("image: NaN or infinite values")
    # A volume that is dark almost everywhere has percentile 0; its maximum is the next best reference.
    scale = scale or float(np.abs(volume).max())
    if scale == 0:
        raise InputError("image: all zero, there is nothing to scale")
    return scale


def square_pad(image: np.ndarray) -> np.ndarray:
    """(..., H, W) zero-padded to (..., n, n), n = max(H, W), the content centred."""
    h, w = image.shape[-2:]
    n = max(h, w)
    top, left = (n - h) // 2, (n - w) // 2
    pad = [(0, 0)] * (image.ndim - 2) + [(top, n - h - top), (left, n - w - left)]
    return np.pad(image, pad)


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """(B, C, H, W) to (B, C, size, size): square padding, then a triangle filter as wide as the reduction
    (anti-aliased).

    The filter is non-negative: no ringing, and the range of the input is kept.
    """
    padded = torch.from_numpy(np.ascontiguousarray(square_pad(images), dtype=np.float32))
    if padded.shape[-1] == size:
        return padded.numpy()
    return interpolate(padded, (size, size), mode="bilinear", align_corners=False, antialias=True).numpy()


def slices(
    volume: np.ndarray, plane: str = "axial", min_foreground: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Slices (n, H, W) of a RAS volume and their numbers (n,), those with more than ``min_foreground``
    foreground.

    Foreground: the fraction of a slice's pixels above a tenth of the 99.9th percentile of the volume.
    """
    if plane not in SLICE_AXES:
        raise InputError(f"plane: expected one of {', '.join(SLICE_AXES)}, got {plane!r}")
    if volume.ndim != 3:
        raise InputError(f"volume: expected three axes, got shape {volume.shape}")
    stack = np.moveaxis(volume, SLICE_AXES[plane], 0)
    if min_foreground <= 0:
        return stack, np.arange(len(stack))
    foreground = (np.abs(stack) > 0.1 * percentile_scale(volume)).mean(axis=(1, 2))
    numbers = np.flatnonzero(foreground > min_foreground)
    return stack[numbers], numbers
