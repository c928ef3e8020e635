"""Images back to NIfTI: original units, the geometry that the import recorded."""

from __future__ import annotations

import gzip
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ambient_sci.data.layout import channels_to_complex
from ambient_sci.data.origins import select_origins
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output, whole_file


def write_nifti(
    folder: str | os.PathLike[str],
    images: Tensor | np.ndarray,
    *,
    geometry: Mapping[str, Any] | None = None,
    subjects: Sequence[str] | None = None,
    scale: float | np.ndarray = 1.0,
    magnitude: bool = True,
    suffix: str = "",
    overwrite: bool = False,
) -> list[Path]:
    """Write images (N, 1 or 2, H, W), in the order of the file they come from, as volumes NAME +
    SUFFIX.nii.gz.

    geometry, subjects, scale: of the measurement file. Slices go back to their places in the volume,
    multiplied by their scale, under its affine; places without an image are 0. Without geometry the images of
    a subject are stacked. Complex images become magnitudes, or complex64 volumes when ``magnitude`` is False.

    Raises: InputError when images and geometry do not match, or a file exists and ``overwrite`` is False.
    """
    array = np.asarray(images, dtype=np.float32)
    if array.ndim != 4 or array.shape[1] not in (1, 2) or len(array) == 0:
        raise InputError(f"NIfTI export: expected images (N, 1 or 2, H, W), got {array.shape}")
    scales = np.broadcast_to(np.asarray(scale, dtype=np.float32), (len(array),))
    planes = channels_to_complex(array) if array.shape[1] == 2 else array[:, 0]
    planes = planes * scales[:, None, None]
    planes = np.abs(planes) if magnitude and array.shape[1] == 2 else planes
    volumes = volumes_of(geometry, subjects, planes.shape)
    paths = volume_paths(Path(folder), volumes, suffix)
    for path in paths:
        check_output(path, overwrite)
    built = [fill_volume(planes[rows_of(v)], v) for v in volumes]
    for path, volume, description in zip(paths, built, volumes, strict=True):
        save_nifti(path, volume, description["affine"], positioned=description.get("positioned", True))
    return paths


def volumes_of(
    geometry: Mapping[str, Any] | None, subjects: Sequence[str] | None, shape: Sequence[int]
) -> list[dict[str, Any]]:
    """Descriptions of the volumes that images of ``shape`` (N, H, W) belong to: name, affine, shape, slice
    axis, slice numbers and first image.

    Raises: InputError when the geometry is of another number of images, or of images of another size.
    """
    volumes = list((geometry or {}).get("volumes") or []) or _stacks(subjects, shape)
    known = sum(len(v["slices"]) for v in volumes)
    if known != shape[0]:
        raise InputError(f"NIfTI export: the geometry is of {known} slices, got {shape[0]} images")
    for volume in volumes:
        plane = [n for axis, n in enumerate(volume["shape"]) if axis != int(volume["axis"])]
        if plane != list(shape[1:]):
            raise InputError(
                f"NIfTI export: expected slices {tuple(plane)} of {volume['name']}, got {tuple(shape[1:])}"
            )
    return volumes


def rows_of(volume: Mapping[str, Any]) -> slice:
    """The images of one volume."""
    return slice(int(volume["first"]), int(volume["first"]) + len(volume["slices"]))


def select_geometry(geometry: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The geometry of some samples of a file, ascending: volumes keep their shape and affine, and those of
    their slices that are among them."""
    place = {row: k for k, row in enumerate(rows)}
    kept = []
    for volume in geometry.get("volumes") or []:
        mine = rows_of(volume)
        own = zip(range(mine.start, mine.stop), volume["slices"], strict=True)
        found = [(place[row], where) for row, where in own if row in place]
        if found:
            kept.append({**volume, "first": found[0][0], "slices": [where for _, where in found]})
    chosen = {**geometry, **({"volumes": kept} if "volumes" in geometry else {})}
    if "pictures" in geometry:
        chosen["pictures"] = select_origins(geometry["pictures"], rows)
    return chosen


def fill_volume(planes: np.ndarray, description: Mapping[str, Any]) -> np.ndarray:
    """One volume from its slices (n, H, W), or several on a further axis from (n, H, W, S); places without a
    slice are 0."""
    volume = np.zeros([*description["shape"], *planes.shape[3:]], planes.dtype)
    stack = np.moveaxis(volume, int(description["axis"]), 0)
    stack[list(description["slices"])] = planes
    return volume


def save_nifti(path: Path, volume: np.ndarray, affine: Any, positioned: bool = True) -> None:
    """A NIfTI file in millimetres, whole or not at all; sform and qform codes 0 when nobody knows where the
    volume lies."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, np.asarray(affine, dtype=np.float64))
    image.header.set_xyzt_units("mm")
    if not positioned:
        image.set_sform(None, 0)
        image.set_qform(np.asarray(affine, dtype=np.float64), 0)
    with whole_file(path) as part, part.open("wb") as file:
        # nibabel.save would choose by the name, and the part has another one. No time of day: the same volume
        # gives the same bytes.
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def volume_paths(
    folder: Path, volumes: Sequence[Mapping[str, Any]], suffix: str = "", kind: str = ".nii.gz"
) -> list[Path]:
    """A file for each volume, by its name; several of one subject are numbered."""
    return [folder / f"{name}{suffix}{kind}" for name in safe_names([str(v["name"]) for v in volumes])]


def safe_names(names: Sequence[str]) -> list[str]:
    """Names that are good for files, one for each; equal ones are numbered."""
    safe = [re.sub(r"[^\w.-]+", "_", name).strip(".") or "volume" for name in names]
    counts, seen = Counter(safe), Counter()
    found = []
    for name in safe:
        seen[name] += 1
        found.append(f"{name}_{seen[name]}" if counts[name] > 1 else name)
    return found


def _stacks(subjects: Sequence[str] | None, images: Sequence[int]) -> list[dict[str, Any]]:
    """A volume for each run of images of one subject, slices along the last axis, no position known."""
    names = list(subjects) if subjects else ["images"] * images[0]
    starts = [k for k, name in enumerate(names) if k == 0 or name != names[k - 1]]
    volumes = []
    for start, stop in zip(starts, [*starts[1:], len(names)], strict=True):
        count = stop - start
        shape = [*images[1:], count]
        volume = {"name": names[start], "affine": np.eye(4), "shape": shape, "axis": 2, "first": start}
        volumes.append({**volume, "slices": list(range(count)), "positioned": False})
    return volumes
