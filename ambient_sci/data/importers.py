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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sci.data.hdf5_writer import close_together
from ambient_sci.data.identify import identify
from ambient_sci.data.kspace import PreparedScan, combined_images, crop_slices, prepare
from ambient_sci.data.layout import check_noise_std, to_numpy
from ambient_sci.data.noise_estimation import estimate_noise
from ambient_sci.data.raw import RawScan
from ambient_sci.data.readers.arrays import image_arrays, load_npy, read_npz_scan
from ambient_sci.data.readers.bart import read_bart, read_cfl
from ambient_sci.data.readers.fastmri import common_padding, read_fastmri
from ambient_sci.data.readers.guard import listed, naming, one_line, say
from ambient_sci.data.readers.ismrmrd import read_ismrmrd
from ambient_sci.data.sources import ImageSource, open_source
from ambient_sci.data.subjects import stem, subjects_of
from ambient_sci.data.whiteness import THRESHOLD, noise_correlation
from ambient_sci.data.writing import ImageWriter, MeasurementWriter
from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.operators import MaskDesign, estimate_design
from ambient_sci.progress import track
from ambient_sci.whole_files import check_output
from ambient_sci.whole_sets import only_maker

_BLOCK = 64
#: Images looked at for a noise level, and masks for a design.
_SAMPLED, _SAMPLED_MASKS = 512, 4096
_READERS = {"fastmri": read_fastmri, "ismrmrd": read_ismrmrd, "bart": read_bart, "npz": read_npz_scan}


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import. The first group is for all data, the second for images, the third for raw scans.

    noise_std: per real channel; estimated when None. noise_units: "scaled" (as stored, the default of the
        library) or "original" (grey levels, scanner units). design: the mask design, if known. subject: one
        name for everything.
    size, plane, min_foreground: see ``open_source``.
    noise_scan: noise readouts (N, n) complex: an array, .npy or BART file. coil_maps: an array, .npy or BART
        file instead of ESPIRiT.
        compress: number of virtual coils. remove_oversampling: crop the readout to its field of view.
            keep_padding: do not cut off zero padding around a fully sampled k-space.
    """

    noise_std: float | None = None
    noise_units: str = "scaled"
    design: MaskDesign | None = None
    subject: str | None = None
    size: int | None = None
    plane: str = "axial"
    min_foreground: float = 0.0
    noise_scan: Any = None
    coil_maps: Any = None
    compress: int | None = None
    remove_oversampling: bool = True
    keep_padding: bool = False

    def __post_init__(self) -> None:
        if self.noise_units not in ("scaled", "original"):
            raise InputError(f"noise_units: expected 'scaled' or 'original', got {self.noise_units!r}")
        if self.noise_std is not None:
            check_noise_std(self.noise_std, 1)


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
    kind, paths = identify(source)
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
        write_scans(_read_scans(kind, paths, chosen), out, chosen, overwrite, padding=padding)


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
        writer.history = _history(images.origin, [how, *images.notes])


def _history(origin: Any, notes: list[str]) -> str:
    return f"import {one_line(origin, 400)}: {'; '.join(dict.fromkeys(notes))}"


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
    design, status = _design(torch.from_numpy(mask.astype(np.float32)), chosen.design)
    with (
        naming(path),
        MeasurementWriter(
            out,
            operator="masking",
            image_shape=images.image_shape,
            shared_mask=mask if len(mask) == 1 else None,
            design=design,
            design_status=status,
            history=_history(path, ["noise level given", *images.notes]),
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


def _design(masks: torch.Tensor, given: MaskDesign | None) -> tuple[MaskDesign | None, str]:
    """The design to record and its status: given, estimated from the masks (n, m, H, W), or unknown."""
    if given is not None:
        return given, "given"
    if bool((masks != 0).all()):
        return None, "unknown"
    try:
        return estimate_design(masks), "estimated"
    except IdentifiabilityError:
        return None, "unknown"


# -- raw scans


def write_scans(
    scans: Iterable[tuple[Path, RawScan]],
    out: Path,
    chosen: ImportOptions,
    overwrite: bool,
    reference: Path | None = None,
    padding: int | None = None,
) -> None:
    """Prepare raw scans one after the other and write their measurement file.

    Args:
        scans: the scans with the files they are from.
        out: the file to write.
        chosen: options.
        overwrite: replace files that exist.
        reference: a file for their coil-combined images S^H F^H M y, in the same units. Of fully sampled
            scans these are what reconstructions are scored against; they have the noise of the scan.
        padding: lines of zero padding cut off on each side at most; None: all.

    Raises:
        InputError: unusable scans, mixed shapes, or no scan at all; nothing is written then.
    """
    writer: MeasurementWriter | None = None
    truth = None if reference is None else ImageWriter(reference, overwrite=overwrite)
    masks: list[np.ndarray] = []
    volumes: list[dict[str, Any]] = []
    notes: list[str] = []
    try:
        for path, scan in scans:
            scan = crop_slices(scan) if chosen.remove_oversampling else scan
            with naming(path):
                ready = _prepared(scan, chosen, padding)
            shape = (2, *ready.kspace.shape[2:])
            if writer is None:
                writer = MeasurementWriter(out, operator="mri", image_shape=shape, overwrite=overwrite)
                first = (path, ready.kspace.shape[1:])
            elif ready.kspace.shape[1:] != first[1]:
                raise InputError(
                    f"{path}: mixed shapes, k-space (coils, H, W) {ready.kspace.shape[1:]} unlike "
                    f"{first[1]} of {first[0].name}"
                )
            volumes += _volumes(scan, ready, len(writer))
            with naming(path):
                _append_scan(writer, scan, ready)
            if truth is not None:
                truth.append(combined_images(ready), subjects=scan.subject, scale=ready.scale)
            masks.append(ready.mask[: max(0, _SAMPLED_MASKS - sum(map(len, masks)))])
            notes += [_history(path, ready.notes)]
        if writer is None:
            raise InputError("import: no scan found")
        found = torch.from_numpy(np.concatenate(masks)[:, None].astype(np.float32))
        notes += _never_measured(np.concatenate(masks), out)
        writer.set_design(*_design(found, chosen.design))
        for file in filter(None, (writer, truth)):
            file.geometry, file.history = {"volumes": volumes}, "\n".join(notes)
        close_together(*filter(None, (writer, truth)))
    finally:
        for file in filter(None, (writer, truth)):
            file.discard()


def _prepared(scan: RawScan, chosen: ImportOptions, padding: int | None) -> PreparedScan:
    return prepare(
        scan,
        noise_std=chosen.noise_std,
        noise_scaled=chosen.noise_units == "scaled",
        compress=chosen.compress,
        remove_oversampling=chosen.remove_oversampling,
        padding=0 if chosen.keep_padding else padding,
    )


def _never_measured(masks: np.ndarray, out: Path) -> list[str]:
    """Outer lines around a fully sampled k-space that no scan has measured: nothing can supervise a prior
    there."""
    notes: list[str] = []
    ever = masks.any(axis=0)
    for name, filled in (
        ("rows", np.flatnonzero(ever.any(axis=1))),
        ("columns", np.flatnonzero(ever.any(axis=0))),
    ):
        size = ever.shape[0 if name == "rows" else 1]
        missing = np.setdiff1d(np.arange(size), filled)
        if len(missing) and len(filled) == filled[-1] - filled[0] + 1:
            say(
                notes,
                out,
                f"{name} {listed(missing.tolist(), 8)} of k-space are never measured (partial Fourier or "
                "padding)",
            )
    return notes


def _read_scans(kind: str, paths: list[Path], chosen: ImportOptions) -> Iterator[tuple[Path, RawScan]]:
    root = Path(os.path.commonpath([str(p.parent) for p in paths]))
    subjects = subjects_of([str(p.relative_to(root)) for p in paths])
    for path, subject in zip(track(paths, f"importing {len(paths)} scans"), subjects, strict=True):
        with naming(path):
            scan = _READERS[kind](path)
        if scan.subject == stem(path.name):  # the file does not say whose it is
            scan.subject = subject
        scan.subject = one_line(scan.subject if chosen.subject is None else chosen.subject, 200)
        if chosen.noise_scan is not None:
            noise = _array(chosen.noise_scan, "noise_scan")
            scan.noise = (
                noise.reshape(noise.shape[0], -1) if noise.shape[0] == scan.kspace.shape[1] else noise
            )
        if chosen.coil_maps is not None:
            scan.coil_maps = _array(chosen.coil_maps, "coil_maps")
        yield path, scan


def _array(value: Any, name: str) -> np.ndarray:
    """An array given as such, as .npy, or as a BART file (whose dimension 3 are the coils)."""
    if not isinstance(value, (str, os.PathLike)):
        return to_numpy(value, name)
    path = Path(value)
    if path.suffix == ".npy":
        return to_numpy(load_npy(path, f"{name} (numpy file)"), name)
    array = read_cfl(path)
    array = array.reshape(*array.shape, *[1] * (14 - array.ndim)) if array.ndim < 14 else array
    # (slices, coils, x, y) for maps; coils first for noise, whose other dimensions are all readouts.
    ordered = np.moveaxis(array, (13, 3), (0, 1)).reshape(array.shape[13], array.shape[3], array.shape[0], -1)
    return ordered if name == "coil_maps" else ordered.swapaxes(0, 1).reshape(array.shape[3], -1)


def _append_scan(writer: MeasurementWriter, scan: RawScan, ready: PreparedScan) -> None:
    multi = ready.coil_maps is not None
    writer.append(
        ready.kspace if multi else ready.kspace[:, 0],
        noise_std=ready.noise_std,
        noise_std_error=ready.noise_std_error,
        mask=ready.mask,
        coil_maps=ready.coil_maps,
        subjects=scan.subject,
        scale=ready.scale,
    )


def _volumes(scan: RawScan, ready: PreparedScan, first: int) -> list[dict[str, Any]]:
    """Geometry of the volumes of a scan, array axes (H, W, slice); slices that were left out leave their
    places empty."""
    height, width = ready.kspace.shape[2:]
    found = []
    for part in scan.volumes():
        rows = np.flatnonzero((ready.slices >= part.first) & (ready.slices < part.first + len(part.numbers)))
        if len(rows) == 0:
            continue
        affine = np.eye(4) if part.affine is None else part.affine @ ready.grid
        volume = {
            "name": scan.subject + part.name,
            "affine": affine.tolist(),
            "shape": [height, width, part.count],
            "axis": 2,
            "first": first + int(rows[0]),
            "slices": part.numbers[ready.slices[rows] - part.first].tolist(),
        }
        known = part.affine is not None and part.positioned
        found.append(volume if known else {**volume, "positioned": False})
    return found
