"""Measurement files from data that others wrote: images and raw MR scans.

- Images (npy/npz, pictures, zips, volumes, DICOM, see ``sources.py``) become noisy, complete measurements, y
= x + sigma n. Magnitudes of MR have Rician noise; the file says so and a warning is given.
- Raw MR scans (fastMRI and ISMRMRD HDF5, BART cfl/hdr, npz with ``kspace``; single files or folders of one
kind) become MRI measurements, y = M (F S x + sigma n), as ``kspace.py`` says.
- npz with ``images`` and ``mask`` becomes masked measurements, y = M (x + sigma n).

A noise level that is not given is estimated, and its standard error recorded; noise that is not white is
warned of. A mask design that is not given is estimated from the masks when there are enough different ones,
else it is unknown; the file says which. What readers left out or guessed is in the file's history.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sci.data.identify import identify
from ambient_sci.data.import_options import ImportOptions, design_of, history_of
from ambient_sci.data.import_scans import read_scans, write_scans
from ambient_sci.data.layout import check_noise_std, to_numpy
from ambient_sci.data.noise_estimation import estimate_noise
from ambient_sci.data.readers.arrays import image_arrays
from ambient_sci.data.readers.fastmri import common_padding
from ambient_sci.data.readers.guard import naming, say
from ambient_sci.data.sources import ImageSource, open_source
from ambient_sci.data.whiteness import THRESHOLD, noise_correlation
from ambient_sci.data.writing import MeasurementWriter
from ambient_sci.errors import InputError
from ambient_sci.progress import track
from ambient_sci.whole_files import check_output
from ambient_sci.whole_sets import only_maker

_BLOCK = 64
#: Images looked at for a noise level.
_SAMPLED = 512


def import_source(
    source: Any, out: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
) -> Path:
    """Write a measurement file from foreign data; ``options`` are those of :class:`ImportOptions`. Returns
    the path.

    Raises: InputError for anything missing, unreadable, contradictory or of mixed shapes; nothing is written
    then.
    """
    out = check_output(out, overwrite)
    with only_maker(out):
        _import(source, out, overwrite, ImportOptions(**options))
    return out


def _import(source: Any, out: Path, overwrite: bool, chosen: ImportOptions) -> None:
    """What kind of data it is decides who reads them."""
    left_out: list[str] = []
    kind, paths = identify(source, left_out)
    if kind == "images":
        _refuse_options(chosen, "images", ("noise_scan", "coil_maps", "compress", "design"))
        images = open_source(
            source, size=chosen.size, plane=chosen.plane, min_foreground=chosen.min_foreground
        )
        _import_images(images, out, chosen, overwrite)
    elif kind == "masked":
        _refuse_options(chosen, "masked images", ("noise_scan", "coil_maps", "compress", "size"))
        _import_masked(paths[0], out, chosen, overwrite)
    else:
        _refuse_options(chosen, "raw scans", ("size",))
        padding = common_padding(paths) if kind == "fastmri" and len(paths) > 1 else None
        padding = 0 if padding is None and kind == "fastmri" and len(paths) > 1 else padding
        scans = read_scans(kind, paths, chosen)
        write_scans(scans, out, chosen, overwrite, padding=padding, notes=left_out)


def _refuse_options(chosen: ImportOptions, what: str, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(chosen, name) is not None]
    if given:
        raise InputError(f"import of {what}: {', '.join(given)} has no meaning here")


# -- images


def _import_images(images: ImageSource, out: Path, chosen: ImportOptions, overwrite: bool) -> None:
    levels, errors, how, attributes = _image_noise(images, chosen)
    if images.magnitude:
        attributes["magnitude"] = True
        warnings.warn(
            f"{images.origin}: magnitude images have Rician noise; it is taken for Gaussian, which is "
            "wrong where the signal is "
            "not well above the noise",
            stacklevel=4,
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
        writer.history = history_of(images.origin, [how, *images.notes])


def _image_noise(
    images: ImageSource, chosen: ImportOptions
) -> tuple[np.ndarray, np.ndarray | None, str, dict[str, Any]]:
    """Noise levels (N,), their standard errors (None when given), how they were found, and attributes about
    it."""
    num = len(images)
    given = images.noise_std if chosen.noise_std is None else chosen.noise_std
    if given is not None:
        scaled = chosen.noise_std is not None and chosen.noise_units == "scaled"
        scale = 1.0 if scaled else np.broadcast_to(images.scale, (num,))
        how = "noise level given" if chosen.noise_std is not None else "noise level stated by the file"
        return check_noise_std(given / scale, num).astype(np.float64), None, how, {}
    levels, errors = np.zeros(num), np.zeros(num)
    correlations = []
    # Volumes have scales, and so noise levels, of their own; other images are taken to share one.
    for group in np.unique(images.scale) if isinstance(images.scale, np.ndarray) else [None]:
        rows = np.arange(num) if group is None else np.flatnonzero(images.scale == group)
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED)).astype(int))]
        looked_at = images.images(some)
        with naming(images.origin):
            found = estimate_noise(looked_at)
        levels[rows], errors[rows] = found.sigma, found.standard_error
        correlations.append(noise_correlation(looked_at) or 0.0)
    how = "noise level estimated from diagonal details"
    return levels, errors, how, _whiteness(max(correlations, key=abs), images)


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


def _import_masked(path: Path, out: Path, chosen: ImportOptions, overwrite: bool) -> None:
    """npz with images (zero where missing), mask, noise_std."""
    images = open_source(path)
    mask = _masks(path, images)
    num = len(images)
    if chosen.noise_std is not None:
        level = chosen.noise_std / (
            np.broadcast_to(images.scale, (num,)) if chosen.noise_units == "original" else 1.0
        )
    else:
        level = images.noise_std
    if level is None:
        raise InputError(f"{path}: the noise level of incomplete images cannot be estimated; give noise_std")
    with naming(path):
        level = check_noise_std(level, num)
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
