"""Raw MR scans into a measurement file: read one after the other, prepared, appended."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sci.data.hdf5_writer import close_together
from ambient_sci.data.import_options import ImportOptions, design_of, history_of
from ambient_sci.data.kspace import PreparedScan, combined_images, crop_slices, prepare
from ambient_sci.data.layout import to_numpy
from ambient_sci.data.raw import RawScan
from ambient_sci.data.readers.arrays import as_array, load_npy, read_array_scan, read_npz_scan
from ambient_sci.data.readers.bart import read_bart, read_cfl
from ambient_sci.data.readers.fastmri import read_fastmri
from ambient_sci.data.readers.guard import listed, naming, one_line, say
from ambient_sci.data.readers.ismrmrd import read_ismrmrd
from ambient_sci.data.subjects import stem, subjects_of
from ambient_sci.data.writing import ImageWriter, MeasurementWriter
from ambient_sci.errors import InputError
from ambient_sci.progress import track

#: Masks looked at for a design.
_SAMPLED_MASKS = 4096
_READERS = {"fastmri": read_fastmri, "ismrmrd": read_ismrmrd, "bart": read_bart, "npz": read_npz_scan}


def write_scans(
    scans: Iterable[tuple[Path, RawScan]],
    out: Path,
    chosen: ImportOptions,
    overwrite: bool,
    reference: Path | None = None,
    padding: int | None = None,
    notes: Sequence[str] = (),
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
        notes: what the history says first.

    Raises:
        InputError: unusable scans, mixed shapes, or no scan at all; nothing is written then.
    """
    writer: MeasurementWriter | None = None
    truth = None if reference is None else ImageWriter(reference, overwrite=overwrite)
    masks: list[np.ndarray] = []
    volumes: list[dict[str, Any]] = []
    notes = list(notes)
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
            notes += [history_of(path, ready.notes)]
        if writer is None:
            raise InputError("import: no scan found")
        found = torch.from_numpy(np.concatenate(masks)[:, None].astype(np.float32))
        notes += _never_measured(np.concatenate(masks), out)
        writer.set_design(*design_of(found, chosen.design))
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


def read_scans(kind: str, paths: list[Path], chosen: ImportOptions) -> Iterator[tuple[Path, RawScan]]:
    root = Path(os.path.commonpath([str(p.parent) for p in paths]))
    subjects = subjects_of([str(p.relative_to(root)) for p in paths])
    for path, subject in zip(track(paths, f"importing {len(paths)} scans"), subjects, strict=True):
        with naming(path):
            scan = _READERS[kind](path)
        if scan.subject == stem(path.name):  # the file does not say whose it is
            scan.subject = subject
        yield path, _completed(scan, chosen)


def array_scan(source: Any, chosen: ImportOptions) -> tuple[Path, RawScan]:
    """k-space from an array or .npy file, with the mask that was given for it."""
    named = isinstance(source, (str, os.PathLike))
    path = Path(source) if named else Path("array")
    kspace = load_npy(path) if named else as_array(source, "kspace")
    mask = None if chosen.mask is None else _array(chosen.mask, "mask")
    return path, _completed(read_array_scan(kspace, path, mask), chosen)


def _completed(scan: RawScan, chosen: ImportOptions) -> RawScan:
    """A scan with the subject, noise readouts and coil maps that were given for it."""
    scan.subject = one_line(scan.subject if chosen.subject is None else chosen.subject, 200)
    if chosen.noise_scan is not None:
        noise = _array(chosen.noise_scan, "noise_scan")
        scan.noise = noise.reshape(noise.shape[0], -1) if noise.shape[0] == scan.kspace.shape[1] else noise
    if chosen.coil_maps is not None:
        scan.coil_maps = _array(chosen.coil_maps, "coil_maps")
    return scan


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
