"""Imports of images: noisy and complete ones (y = x + sigma n), and masked ones (y = M (x + sigma n))."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sci.data.clipping import check_plausible
from ambient_sci.data.image_source import ImageSource
from ambient_sci.data.import_options import ImportOptions, design_of, history_of
from ambient_sci.data.layout import check_noise_std, to_numpy
from ambient_sci.data.noise_estimation import estimate_noise
from ambient_sci.data.readers.arrays import image_arrays
from ambient_sci.data.readers.guard import naming, say
from ambient_sci.data.reduced_source import reduced
from ambient_sci.data.sources import open_source
from ambient_sci.data.whiteness import THRESHOLD, noise_correlation
from ambient_sci.data.writing import MeasurementWriter
from ambient_sci.errors import InputError
from ambient_sci.progress import track

_BLOCK = 64
#: Images looked at for a noise level.
_SAMPLED = 512


def import_images(source: Any, out: Path, chosen: ImportOptions, overwrite: bool) -> None:
    """Noisy images, complete, as measurements of identity."""
    reduction = chosen.reduction
    images = open_source(
        source,
        size=chosen.size if chosen.clean else None,
        plane=chosen.plane,
        min_foreground=chosen.min_foreground,
        channel=chosen.channel,
        mixed=bool(reduction),
    )
    images = reduced(images, reduction)
    levels, errors, how, attributes = _image_noise(images, chosen)
    if images.magnitude:
        attributes["magnitude"] = True
        warnings.warn(
            f"{images.origin}: magnitude images have Rician noise; it is taken for Gaussian, which is "
            "wrong where the signal is "
            "not well above the noise",
            stacklevel=3,
        )
    with MeasurementWriter(
        out,
        operator="identity",
        image_shape=images.image_shape,
        geometry=images.geometry,
        attributes=attributes,
        overwrite=overwrite,
    ) as writer:
        for start in track(range(0, len(images), _BLOCK), f"importing {len(images)} images"):
            rows = np.arange(start, min(start + _BLOCK, len(images)))
            writer.append(
                images.images(rows),
                noise_std=levels[rows],
                noise_std_error=None if errors is None else errors[rows],
                subjects=chosen.subject or [images.subjects[r] for r in rows],
                scale=images.scale_of(rows),
            )
        _say_clipping(images, float(levels.max()))
        writer.history = history_of(images.origin, [how, *images.notes])


def _say_clipping(images: ImageSource, level: float) -> None:
    """Warn of pixels at the ends of their type, once all images were read; clean ones may be there."""
    clipped = images.ends.text() if images.ends is not None and level > 0 else None
    if clipped:
        say(images.notes, images.origin, clipped)


def _sample(images: ImageSource, rows: np.ndarray) -> torch.Tensor:
    some = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED)).astype(int))
    return images.images(rows[some])


def _image_noise(
    images: ImageSource, chosen: ImportOptions
) -> tuple[np.ndarray, np.ndarray | None, str, dict[str, Any]]:
    """Noise levels (N,), their standard errors (None when given), how they were found, and attributes about
    it."""
    num = len(images)
    given = images.noise_std if chosen.noise_std is None else chosen.noise_std
    if given is not None:
        return _given_noise(images, chosen, given), None, _how_given(images, chosen), {}
    levels, errors = np.zeros(num), np.zeros(num)
    correlations = []
    # Volumes have scales, and so noise levels, of their own; colours made grey have less noise than grey
    # pictures; other images are taken to share one level.
    apart = images.scale, images.noise_factor, 0 if images.noise_group is None else images.noise_group
    kinds = np.stack([np.broadcast_to(v, (num,)) for v in apart])
    for group in np.unique(kinds, axis=1).T:
        rows = np.flatnonzero((kinds == group[:, None]).all(0))
        looked_at = _sample(images, rows)
        with naming(images.origin):
            found = estimate_noise(looked_at)
        levels[rows], errors[rows] = found.sigma, found.standard_error
        correlations.append(noise_correlation(looked_at) or 0.0)
    how = "noise level estimated from diagonal details"
    return levels, errors, how, _whiteness(max(correlations, key=abs), images)


def _given_noise(images: ImageSource, chosen: ImportOptions, given: float | np.ndarray) -> np.ndarray:
    """The levels of images whose pixels have, or had before a reduction, a level that is known."""
    scaled = chosen.noise_std is not None and chosen.noise_units == "scaled"
    num = len(images)
    scale = np.broadcast_to(images.scale, (num,))
    levels = np.broadcast_to(given / (1.0 if scaled else scale), (num,))
    if chosen.noise_std is not None and levels.max() > 0:
        looked_at = _sample(images, np.arange(num))
        ends = float(looked_at.min()), float(looked_at.max())
        with naming(images.origin):
            original = float(scale.max()) if scaled else 1.0
            doubt = check_plausible(float(levels.max()), *ends, original, clean=False)
        if doubt:
            say(images.notes, images.origin, doubt)
    return check_noise_std(levels * np.broadcast_to(images.noise_factor, (num,)), num).astype(np.float64)


def _how_given(images: ImageSource, chosen: ImportOptions) -> str:
    how = "noise level given" if chosen.noise_std is not None else "noise level stated by the file"
    factor = np.asarray(images.noise_factor)
    if (factor == 1).all():
        return how
    low, high = float(factor.min()), float(factor.max())
    times = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return f"{how} for the pixels as they came, times {times} after the reduction"


def _whiteness(correlation: float, images: ImageSource) -> dict[str, Any]:
    """Warn of pixels that are not independent; attributes that record it."""
    lossy = any("compressed with loss" in note for note in images.notes)
    if abs(correlation) <= THRESHOLD and not lossy:
        return {}
    why = (
        "compressed with loss"
        if lossy
        else f"neighbouring pixels are correlated by {correlation:.2f} in flat places"
    )
    say(
        images.notes,
        images.origin,
        f"the noise is not white ({why}: interpolated, smoothed, compressed or textured images): the "
        "estimated level can be several "
        "times too small; give noise_std, or images as they were acquired",
    )
    return {"noise_correlation": correlation}


def import_masked(path: Path, out: Path, chosen: ImportOptions, overwrite: bool) -> None:
    """npz with images (zero where missing), mask, noise_std."""
    images = open_source(path)
    mask = _masks(path, images)
    num = len(images)
    given = images.noise_std if chosen.noise_std is None else chosen.noise_std
    if given is None:
        raise InputError(f"{path}: the noise level of incomplete images cannot be estimated; give noise_std")
    with naming(path):
        level = _given_noise(images, chosen, given)
    design, status = design_of(torch.from_numpy(mask.astype(np.float32)), chosen.design)
    with (
        naming(path),
        MeasurementWriter(
            out,
            operator="masking",
            image_shape=images.image_shape,
            shared_mask=mask if len(mask) == 1 else None,
            design=design,
            design_status=status,
            history=history_of(path, ["noise level given", *images.notes]),
            overwrite=overwrite,
        ) as writer,
    ):
        for start in range(0, num, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, num))
            writer.append(
                images.images(rows),
                noise_std=level[rows],
                mask=None if len(mask) == 1 else mask[rows],
                subjects=chosen.subject or [images.subjects[r] for r in rows],
                scale=images.scale_of(rows),
            )


def _masks(path: Path, images: ImageSource) -> np.ndarray:
    """The masks of an npz, (1 or N, 1 or C, H, W) of 0/1. InputError for another number of them than of
    images, or other values."""
    mask = to_numpy(image_arrays(path)[0]["mask"], f"{path}: mask")
    mask = mask[:, None] if mask.ndim == 3 else mask[None, None] if mask.ndim == 2 else mask
    if mask.ndim != 4 or mask.shape[2:] != images.image_shape[1:]:
        raise InputError(
            f"{path}: expected masks of {images.image_shape[1:]} pixels like the images, got {mask.shape}"
        )
    if len(mask) not in (1, len(images)):
        raise InputError(f"{path}: expected 1 mask or {len(images)}, one an image, got {len(mask)}")
    if not np.isin(mask, (0, 1)).all():
        raise InputError(f"{path}: mask: expected only 0 and 1")
    return mask
