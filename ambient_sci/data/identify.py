"""What a source is, before any reader looks at it: by its name, and by what the file begins with or holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.data.files import IMAGE_FORMAT, MEASUREMENT_FORMAT
from ambient_sci.data.hdf5_file import format_of
from ambient_sci.data.readers.guard import check_regular, listed, open_hdf5
from ambient_sci.data.readers.pictures import hidden
from ambient_sci.errors import InputError


def identify(source: Any) -> tuple[str, list[Path]]:
    """What a source is: "images", "masked", "npz", "fastmri", "ismrmrd" or "bart", and the files of a raw
    one."""
    if not isinstance(source, (str, os.PathLike)) or str(source).startswith("brains:"):
        return "images", []
    path = Path(source)
    if path.is_dir():
        return _identify_folder(path)
    suffix = path.suffix.lower()
    pair = (
        path
        if suffix == ".cfl"
        else path.with_name(path.name + ".cfl")
        if suffix != ".hdr"
        else path.with_suffix(".cfl")
    )
    if suffix == ".cfl" or pair.exists():
        return "bart", [path]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    check_regular(path)
    if suffix == ".npz":
        names = _npz_names(path)
        return ("npz" if "kspace" in names else "masked" if "mask" in names else "images"), [path]
    return (_identify_hdf5(path), [path]) if suffix in (".h5", ".hdf5", ".mrd") else ("images", [])


def _identify_folder(path: Path) -> tuple[str, list[Path]]:
    """A folder (and what is below it) of one kind of raw scans, or of images."""
    files = sorted(p for p in path.rglob("*") if not p.is_dir() and not hidden(str(p.relative_to(path))))
    raw = [p for p in files if p.suffix.lower() in (".h5", ".hdf5", ".mrd", ".cfl")]
    raw += [p for p in files if p.suffix.lower() == ".npz" and "kspace" in _npz_names(p)]
    kinds = {p: "npz" if p.suffix.lower() == ".npz" else identify(p)[0] for p in raw}
    if len(set(kinds.values())) > 1 or "images" in kinds.values():
        raise InputError(
            f"{path}: expected a folder of one kind of raw scans, got {sorted(set(kinds.values()))} "
            f"({listed([p.name for p in raw])})"
        )
    return (kinds[raw[0]], raw) if raw else ("images", [])


def _npz_names(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except Exception:  # whatever is wrong, the reader says it in one line
        return []


def _identify_hdf5(path: Path) -> str:
    with open_hdf5(path) as file:
        kind = format_of(file)
        names = sorted(file)
        groups = [
            file.get(n, getlink=True) and file.get(n)
            for n in names
            if isinstance(file.get(n, getlink=True), h5py.HardLink)
        ]
        acquisitions = any(isinstance(g, h5py.Group) and {"xml", "data"} <= set(g) for g in groups)
        if kind == MEASUREMENT_FORMAT:
            raise InputError(f"{path}: is a measurement file already, there is nothing to import")
    if kind == IMAGE_FORMAT:
        return "images"
    if "kspace" in names:
        return "fastmri"
    if acquisitions:
        return "ismrmrd"
    raise InputError(
        f"{path}: expected fastMRI (kspace) or ISMRMRD (xml, data) HDF5, got "
        f"{listed(names, 8) or 'an empty file'}"
    )
