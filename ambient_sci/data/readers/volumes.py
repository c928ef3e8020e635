"""Volumes through nibabel: NIfTI-1 and -2, Analyze, FreeSurfer MGH, MINC, AFNI, PAR/REC. Axes become RAS,
lengths millimetres.

What the header says about values and places is used: slope and intercept, sform or qform, voxel sizes and
their unit. Time points, echoes and the like (a fourth axis) are volumes of their own. What is no image
(CIFTI, vectors, meshes, colours) is refused.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.data.geometry import check_affine
from ambient_sci.data.readers.guard import (
    check_claim,
    check_regular,
    listed,
    naming,
    one_line,
    open_hdf5,
    reading,
    say,
)
from ambient_sci.errors import InputError

VOLUMES = (".nii", ".nii.gz", ".mgz", ".mgh", ".mgh.gz", ".mnc", ".par", ".head", ".img", ".img.gz", ".hdr")
#: Files that carry the values of a header file beside them.
_VALUE_FILES = {".par": (".REC", ".rec"), ".head": (".BRIK", ".BRIK.gz"), ".hdr": (".img", ".img.gz", ".IMG")}
_TO_MM = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}
#: NIfTI intent codes whose values are no intensities: vectors, matrices, points, meshes.
_NO_IMAGE = (1003, 1004, 1005, 1006, 1007, 1008, 1009, 1010, 2001, 2002, 2003, 2004, 2005)


@dataclass
class Volume:
    """A volume (X, Y, Z) real or complex in RAS axes, its affine, whose it is, and what to call it."""

    values: np.ndarray
    affine: np.ndarray
    subject: str
    name: str
    #: False when the file states no position
    positioned: bool = True
    #: slice numbers that exist along ``axis``; None: all
    present: np.ndarray | None = None
    axis: int = 2
    magnitude: bool = True
    notes: list[str] = field(default_factory=list)


def is_volume(path: Path) -> bool:
    """By its name: a file of values (.rec, .BRIK) is read through its header."""
    return path.name.lower().endswith(VOLUMES) and not (
        path.name.lower().endswith((".img", ".img.gz")) and _beside(path, (".hdr", ".HDR")) is not None
    )


def header_file(path: Path) -> Path | None:
    """The header beside a file of values (.REC, .BRIK, .img); None when there is none, or ``path`` is
    none."""
    for header, values in _VALUE_FILES.items():
        if path.name.lower().endswith(tuple(v.lower() for v in values)):
            return _beside(path, (header, header.upper()))
    return None


def read_volumes(path: Path, subject: str, name: str) -> Iterator[Volume]:
    """The volumes in a file, one for each entry of a fourth axis.

    Raises: InputError for damaged files, what is no image, affines that are not invertible, NaN or
        infinities.
    """
    notes: list[str] = []
    stored = _stored(path)
    image = _load(path)
    header: Any = image.header
    shape = tuple(int(n) for n in image.shape)
    check_claim(path, shape, 8, stored)
    affine, positioned = _affine(image, path, notes)
    _check_intent(header, path, notes)
    with reading(path, "volume"):
        values = np.asarray(image.dataobj)
    if type(image).__name__.startswith("Minc") and values.ndim == 4:
        values = np.moveaxis(values, 0, -1)  # MINC has time first
    values = _four_axes(values, path)
    with reading(path, "volume"):
        values, affine = _canonical(values, affine)
    count = values.shape[3]
    if count > 1:
        notes.append(f"{count} volumes along the fourth axis as volumes of their own")
    empty = [k for k in range(count) if not values[..., k].any()]
    if empty and len(empty) < count:
        say(notes, path, f"{len(empty)} of {count} volumes are all zero and are left out: {listed(empty)}")
    for k in [k for k in range(count) if k not in empty] or [0]:
        one = values[..., k]
        if not np.isfinite(one).all():
            at = f" of volume {k}" if count > 1 else ""
            raise InputError(f"{path}: NaN or infinite values in {int((~np.isfinite(one)).sum())} voxels{at}")
        label = f"{name}_{k:0{len(str(count - 1))}d}" if count > 1 else name
        own = np.complex64 if one.dtype.kind == "c" else np.float32
        yield Volume(one.astype(own), affine, subject, label, positioned, notes=notes)


def _beside(path: Path, suffixes: tuple[str, ...]) -> Path | None:
    """A file of the same name with another suffix."""
    name = path.name
    base = name[:-3] if name.lower().endswith(".gz") else name
    base = base.rsplit(".", 1)[0]
    found = [path.with_name(base + s) for s in suffixes]
    return next((f for f in found if f.exists()), None)


def _stored(path: Path) -> int:
    """Bytes of the values of a file; a gzip stream is read to its end, where its checksum is."""
    if path.suffix.lower() == ".head":
        others = _VALUE_FILES[".head"]
    else:
        others = _VALUE_FILES.get(path.suffix.lower(), ())
    check_regular(path)
    values = _beside(path, others) if others else path
    if values is None:
        raise InputError(f"{path}: the values are missing, expected {' or '.join(others)} beside it")
    stored = check_regular(values)
    if values.name.lower().endswith(".mnc"):
        _check_minc(values)
    if values.name.lower().endswith((".gz", ".mgz")):
        with reading(values, "gzip file"), gzip.open(values) as stream:
            total = 0
            while block := stream.read(1 << 20):
                total += len(block)
                check_claim(values, (total,), 1, stored, "unpacked data")
    return stored


def _check_minc(path: Path) -> None:
    """MINC 2 is HDF5: nothing in it may point into another file."""
    import h5py

    if not h5py.is_hdf5(path):
        return
    with open_hdf5(path, "MINC file") as file:
        found: list[str] = []

        def visit(name: str, link: Any) -> None:
            if isinstance(link, h5py.ExternalLink):
                found.append(name)
            elif isinstance(link, h5py.HardLink):
                member = file[name]
                if isinstance(member, h5py.Dataset) and (member.is_virtual or member.external):
                    found.append(name)

        file.visititems_links(visit)
        if found:
            raise InputError(f"{path}: {one_line(found[0], 60)!r} is kept in another file; refused")


def _load(path: Path) -> Any:
    import nibabel
    from nibabel.spatialimages import SpatialImage

    with reading(path, "volume"):
        image = nibabel.load(path)
    kind = type(image).__name__
    if kind.startswith("Cifti") or not isinstance(image, SpatialImage):
        raise InputError(f"{path}: {kind.removesuffix('Image')} holds no volume on a grid; not read")
    return image


def _affine(image: Any, path: Path, notes: list[str]) -> tuple[np.ndarray, bool]:
    """The affine in millimetres, and whether the file states a position."""
    header = image.header
    if image.affine is None:
        raise InputError(f"{path}: states no affine")
    with naming(path):
        affine = check_affine(image.affine)
    positioned = True
    if hasattr(header, "get_sform"):
        positioned = _check_forms(header, path, notes)
        with reading(path, "NIfTI header"):
            unit = header.get_xyzt_units()[0]
        if unit == "unknown":
            notes.append("unit of length not stated, taken for mm")
        affine = np.diag([*[_TO_MM.get(unit, 1.0)] * 3, 1.0]) @ affine
        if _TO_MM.get(unit, 1.0) != 1:
            notes.append(f"affine in {unit}, converted to mm")
    elif type(image).__name__ in ("AnalyzeImage", "Spm99AnalyzeImage", "Spm2AnalyzeImage"):
        positioned = path.with_suffix(".mat").exists()
        if not positioned:
            say(
                notes,
                path,
                "Analyze states no orientation: left and right are those of nibabel's default (first axis "
                "to the left)",
            )
    return affine, positioned


def _check_forms(header: Any, path: Path, notes: list[str]) -> bool:
    """sform and qform of NIfTI: which is used, and whether they agree."""
    with reading(path, "NIfTI header"):
        sform, s_code = header.get_sform(coded=True)
        try:
            qform, q_code = header.get_qform(coded=True)
        except Exception as error:
            if not s_code:
                raise
            notes.append(f"qform is damaged ({one_line(error, 60)}), sform used")
            return True
    if not s_code and not q_code:
        say(notes, path, "sform_code and qform_code are 0: orientation unknown, left and right are a guess")
        return False
    if s_code and q_code and qform is not None:
        corners = np.array([[0, 0, 0, 1], [*(np.array(header.get_data_shape()[:3] + (1, 1))[:3] - 1), 1]]).T
        apart = float(np.abs((sform - qform) @ corners).max())
        if not apart < 0.01:
            say(
                notes,
                path,
                f"sform and qform differ by up to {apart:.3g}; sform (code {int(s_code)}) is used",
            )
    return True


def _check_intent(header: Any, path: Path, notes: list[str]) -> None:
    if not hasattr(header, "get_intent"):
        return
    with reading(path, "NIfTI header"):
        code = int(header["intent_code"])
        name = str(header.get_intent()[0])
    if code in _NO_IMAGE:
        raise InputError(
            f"{path}: intent {name!r} ({code}) holds vectors, matrices or meshes, not intensities; not read"
        )
    if code:
        say(
            notes,
            path,
            f"intent {name!r} ({code}): the values are taken as they are, though they may be no intensities",
        )


def _four_axes(values: np.ndarray, path: Path) -> np.ndarray:
    """(X, Y, Z, T) from 2 to 5 axes. InputError for vectors, colours, empty axes."""
    if values.dtype.kind not in "fciub":
        raise InputError(
            f"{path}: expected a volume of numbers, got {values.dtype} {values.shape} (colours?)"
        )
    while values.ndim > 4 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 5 and values.shape[3] == 1:
        raise InputError(f"{path}: a fifth axis of {values.shape[4]} (vectors or components); not read")
    if values.ndim > 4 or values.ndim < 2 or values.size == 0:
        raise InputError(f"{path}: expected a 3-D or 4-D volume, got shape {values.shape}")
    return values.reshape(*values.shape, *[1] * (4 - values.ndim))


def _canonical(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine in the axes that are closest to RAS."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    turn = io_orientation(affine)
    return apply_orientation(values, turn), affine @ inv_ornt_aff(turn, values.shape[:3])
