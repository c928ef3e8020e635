"""DICOM series as volumes: slices sorted along their normal, rescaled, with the affine in RAS millimetres."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.errors import InputError


def read_dicom_folder(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The series below a folder, one at a time: patient, volume (X, Y, Z) float32 in RAS axes, affine (4, 4).

    Raises: InputError when there is no DICOM image, or the slices of a series differ in shape or orientation.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError:
        raise InputError("reading DICOM needs pydicom: pip install 'ambient-sci[io]'") from None
    series: dict[str, list[Path]] = {}
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]
    for path in files:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except (InvalidDicomError, OSError):
            continue
        if "Rows" in header and "Columns" in header:
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(path)
    if not series:
        raise InputError(f"{folder}: no DICOM images in it")
    for paths in series.values():
        yield _read_series([pydicom.dcmread(p) for p in paths], paths[0])


def _read_series(slices: list[Any], first: Path) -> tuple[str, np.ndarray, np.ndarray]:
    import nibabel

    shapes = {(int(s.Rows), int(s.Columns)) for s in slices}
    if len(shapes) > 1:
        raise InputError(f"{first}: slices of mixed shapes in one series, {sorted(shapes)}")
    cosines = np.array([_numbers(s, "ImageOrientationPatient", (1, 0, 0, 0, 1, 0)) for s in slices])
    if np.ptp(cosines, axis=0).max() > 1e-3:
        raise InputError(f"{first}: slices of mixed orientations in one series")
    # Patient coordinates are LPS: along a row (increasing column), along a column (increasing row), and the
    # normal.
    along_row, along_column = cosines[0, :3], cosines[0, 3:]
    normal = np.cross(along_row, along_column)
    positions = np.array([_numbers(s, "ImagePositionPatient", (0, 0, k)) for k, s in enumerate(slices)])
    order = np.argsort(positions @ normal, kind="stable")
    distance = np.diff((positions @ normal)[order])
    if len(distance) and distance.min() < 1e-3:
        raise InputError(
            f"{first}: several images at one position (echoes or time points?), expected one volume a series"
        )
    volume = np.stack([_pixels(slices[k], first) for k in order], axis=-1).swapaxes(0, 1)
    spacing = _numbers(slices[0], "PixelSpacing", (1, 1))
    step = float(np.median(distance)) if len(distance) else float(slices[0].get("SliceThickness", None) or 1)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([along_row * spacing[1], along_column * spacing[0], normal * step], axis=1)
    affine[:3, 3] = positions[order[0]]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.astype(np.float32), affine))
    subject = str(slices[0].get("PatientID", "") or first.parent.name)
    return subject, np.asarray(image.dataobj), np.asarray(image.affine)


def _numbers(header: Any, name: str, default: tuple[float, ...]) -> np.ndarray:
    return np.array([float(v) for v in (header.get(name) or default)])


def _pixels(header: Any, path: Path) -> np.ndarray:
    """One slice (rows, columns) with the rescale slope and intercept applied."""
    try:
        pixels = header.pixel_array
    except Exception as error:  # pydicom raises many kinds for transfer syntaxes it cannot decode
        raise InputError(
            f"{path}: the DICOM pixels cannot be decoded ({' '.join(str(error).split())[:200]})"
        ) from None
    if pixels.ndim != 2:
        raise InputError(
            f"{path}: expected single-frame grey DICOM images, got pixels of shape {pixels.shape}"
        )
    return pixels * float(header.get("RescaleSlope", 1) or 1) + float(header.get("RescaleIntercept", 0) or 0)
