"""What a source is, before any reader looks at it: by its name, and by what the file begins with or holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.data.files import IMAGE_FORMAT, MEASUREMENT_FORMAT
from ambient_sci.data.hdf5_file import format_of
from ambient_sci.data.readers.guard import check_regular, listed, open_hdf5, say
from ambient_sci.data.readers.pictures import hidden
from ambient_sci.errors import InputError

HDF5 = (".h5", ".hdf5", ".mrd")


def identify(source: Any, notes: list[str] | None = None) -> tuple[str, list[Path]]:
    """What a source is: "images", "masked", "npz", "fastmri", "ismrmrd" or "bart", and the files of a raw
    one; ``notes`` takes what was left out of a folder."""
    if not isinstance(source, (str, os.PathLike)) or str(source).startswith("brains:"):
        return "images", []
    path = Path(source)
    if path.is_dir():
        return _identify_folder(path, [] if notes is None else notes)
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
    return (_identify_hdf5(path), [path]) if suffix in HDF5 else ("images", [])


def _identify_folder(path: Path, notes: list[str]) -> tuple[str, list[Path]]:
    """A folder (and what is below it) of one kind of raw scans, or of images.

    HDF5 files that are no scans (our own outputs, somebody's tables) are left out, which is said.
    """
    files = sorted(p for p in path.rglob("*") if not p.is_dir() and not hidden(str(p.relative_to(path))))
    raw = [p for p in files if p.suffix.lower() in (*HDF5, ".cfl")]
    raw += [p for p in files if p.suffix.lower() == ".npz" and "kspace" in _npz_names(p)]
    kinds, others = {}, {}
    for p in raw:
        found = (
            "npz" if p.suffix.lower() == ".npz" else "bart" if p.suffix.lower() == ".cfl" else hdf5_kind(p)
        )
        (kinds if found in ("npz", "bart", "fastmri", "ismrmrd") else others)[p] = found
    if len(set(kinds.values())) > 1:
        raise InputError(
            f"{path}: expected a folder of one kind of raw scans, got {sorted(set(kinds.values()))} "
            f"({listed([p.name for p in raw])})"
        )
    if others and not kinds:
        first = next(iter(others))
        raise InputError(f"{first}: expected raw scans or images in the folder, got {others[first]}")
    if others:
        what = listed([f"{p.relative_to(path)} ({kind})" for p, kind in others.items()], 4)
        say(notes, path, f"HDF5 files that are no raw scans are left out: {what}")
    return (next(iter(kinds.values())), list(kinds)) if kinds else ("images", [])


def _npz_names(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except Exception:  # whatever is wrong, the reader says it in one line
        return []


def hdf5_kind(path: Path) -> str:
    """What an HDF5 file is: "fastmri", "ismrmrd", "images", or something else, in words.

    Raises:
        InputError: a damaged file.
    """
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
        return "a measurement file already"
    if kind == IMAGE_FORMAT:
        return "images"
    if "kspace" in names:
        return "fastmri"
    return "ismrmrd" if acquisitions else listed(names, 8) or "an empty file"


def _identify_hdf5(path: Path) -> str:
    found = hdf5_kind(path)
    if found == "a measurement file already":
        raise InputError(f"{path}: is a measurement file already, there is nothing to import")
    if found in ("fastmri", "ismrmrd", "images"):
        return found
    raise InputError(f"{path}: expected fastMRI (kspace) or ISMRMRD (xml, data) HDF5, got {found}")
