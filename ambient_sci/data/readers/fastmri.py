"""fastMRI (HDF5; Zbontar et al., 2018): k-space, the ISMRMRD header, and the mask of test files."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from ambient_sci.data.raw import Part, RawScan
from ambient_sci.data.readers.guard import hdf5_array, hdf5_member, one_line, open_hdf5, reading
from ambient_sci.data.readers.ismrmrd_header import parse_header
from ambient_sci.errors import InputError


def read_fastmri(path: Path) -> RawScan:
    """A fastMRI file: ``kspace`` (S, N, H, W) or (S, H, W), ``ismrmrd_header``, and ``mask`` (W,) of test
    files.

    Raises: InputError for missing keys, real k-space, or an order of axes that contradicts the header.
    """
    with open_hdf5(path, "fastMRI file") as file:
        kspace = hdf5_array(file, "kspace", path)
        mask = hdf5_array(file, "mask", path)
        stated = hdf5_array(file, "ismrmrd_header", path)
        patient = file.attrs.get("patient_id")
        others = sorted(set(file) - {"kspace", "mask", "ismrmrd_header"})
    if kspace is None or kspace.dtype.kind != "c" or kspace.ndim not in (3, 4) or kspace.size == 0:
        got = "none" if kspace is None else f"{kspace.dtype} {kspace.shape}"
        raise InputError(
            f"{path}: expected complex kspace (slices, coils, H, W) or (slices, H, W), got {got}"
        )
    scan = RawScan(kspace if kspace.ndim == 4 else kspace[:, None], path.stem, str(path))
    if isinstance(patient, (bytes, str)):
        scan.subject = patient.decode(errors="replace") if isinstance(patient, bytes) else patient
    if others:
        scan.notes.append(f"not read: {', '.join(one_line(o, 40) for o in others)}")
    if stated is not None:
        _geometry(scan, stated, path)
    if mask is not None:
        scan.mask = _columns(mask, scan.kspace.shape, path)
    return scan


def _geometry(scan: RawScan, stated: np.ndarray, path: Path) -> None:
    """Oversampling and voxel sizes, all that these files say about geometry."""
    header = parse_header(stated.ravel()[0] if stated.size else b"", str(path))
    encoding = header.encodings[0]
    if scan.kspace.shape[-2] != encoding.encoded[0]:
        raise InputError(
            f"{path}: expected the readout of {encoding.encoded[0]} samples on axis -2 of kspace, got "
            f"shape {scan.kspace.shape}; "
            "is the order of axes (slices, coils, readout, phase)?"
        )
    if encoding.trajectory != "cartesian":
        raise InputError(f"{path}: expected a Cartesian trajectory, got {encoding.trajectory}")
    scan.readout_size = encoding.readout_size
    x, y, z = encoding.voxel
    # The columns span the encoded field of view, however many of them the publisher added or left out.
    y *= encoding.encoded[1] / scan.kspace.shape[-1]
    num = len(scan.kspace)
    scan.parts = [Part(0, np.arange(num), num, np.diag([x, y, z or 1.0, 1.0]), positioned=False)]


def _columns(mask: np.ndarray, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if mask.dtype.kind not in "fiub" or mask.size != shape[-1] or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"{path}: expected a mask of {shape[-1]} columns, each 0 or 1, got {mask.dtype} {mask.shape}"
        )
    return np.broadcast_to(mask.reshape(1, 1, -1) != 0, (1, *shape[-2:]))


def common_padding(paths: list[Path]) -> int | None:
    """Zero columns that the publisher added on each side in all of several fully sampled files: the fewest;
    None if one has a mask.

    Only one slice of each file is read.
    """
    fewest = None
    for path in paths:
        with open_hdf5(path, "fastMRI file") as file:
            if "mask" in file:
                return None
            kspace = hdf5_member(file, "kspace", path)
            if not isinstance(kspace, h5py.Dataset) or kspace.ndim not in (3, 4) or kspace.size == 0:
                return None
            shape = kspace.shape
            with reading(path, "fastMRI file"):
                middle = np.asarray(kspace[shape[0] // 2]).reshape(-1, shape[-1]).any(axis=0)
        filled = np.flatnonzero(middle)
        if not len(filled):
            return None
        own = int(min(filled[0], shape[-1] - 1 - filled[-1]))
        fewest = own if fewest is None else min(fewest, own)
    return fewest
