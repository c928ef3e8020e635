"""Images back to NIfTI: original units, the geometry that the import recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ambient_sci.data.hdf5_writer import check_output
from ambient_sci.data.layout import channels_to_complex
from ambient_sci.errors import InputError


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
    import nibabel

    array = np.asarray(images, dtype=np.float32)
    if array.ndim != 4 or array.shape[1] not in (1, 2) or len(array) == 0:
        raise InputError(f"NIfTI export: expected images (N, 1 or 2, H, W), got {array.shape}")
    scales = np.broadcast_to(np.asarray(scale, dtype=np.float32), (len(array),))
    planes = channels_to_complex(array) if array.shape[1] == 2 else array[:, 0]
    planes = planes * scales[:, None, None]
    planes = np.abs(planes) if magnitude and array.shape[1] == 2 else planes
    volumes = list((geometry or {}).get("volumes") or []) or _stacks(subjects, planes)
    if sum(len(v["slices"]) for v in volumes) != len(planes):
        known = sum(len(v["slices"]) for v in volumes)
        raise InputError(f"NIfTI export: the geometry is of {known} slices, got {len(planes)} images")
    paths = _names(Path(folder), [str(v["name"]) for v in volumes], suffix)
    for path in paths:
        check_output(path, overwrite)
    built = [_volume(planes, v) for v in volumes]
    for path, volume, description in zip(paths, built, volumes, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".partial-{path.name}")
        try:
            nibabel.save(nibabel.Nifti1Image(volume, np.asarray(description["affine"])), temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return paths


def _stacks(subjects: Sequence[str] | None, planes: np.ndarray) -> list[dict[str, Any]]:
    """A volume for each run of images of one subject, slices along the last axis, no position known."""
    names = list(subjects) if subjects is not None else ["images"] * len(planes)
    starts = [k for k, name in enumerate(names) if k == 0 or name != names[k - 1]]
    volumes = []
    for start, stop in zip(starts, [*starts[1:], len(names)], strict=True):
        count = stop - start
        shape = [*planes.shape[1:], count]
        volume = {"name": names[start], "affine": np.eye(4), "shape": shape, "axis": 2, "first": start}
        volumes.append({**volume, "slices": list(range(count))})
    return volumes


def _volume(planes: np.ndarray, description: Mapping[str, Any]) -> np.ndarray:
    """One volume from its slices."""
    axis, numbers, first = int(description["axis"]), list(description["slices"]), int(description["first"])
    volume = np.zeros(description["shape"], planes.dtype)
    stack = np.moveaxis(volume, axis, 0)
    if stack.shape[1:] != planes.shape[1:]:
        raise InputError(
            f"NIfTI export: expected slices {stack.shape[1:]} of {description['name']}, got {planes.shape[1:]}"
        )
    stack[numbers] = planes[first : first + len(numbers)]
    return volume


def _names(folder: Path, names: list[str], suffix: str) -> list[Path]:
    """A file for each volume; several of one subject are numbered."""
    safe = [re.sub(r"[^\w.-]+", "_", name).strip(".") or "volume" for name in names]
    numbered = [f"{n}_{safe[:k].count(n) + 1}" if safe.count(n) > 1 else n for k, n in enumerate(safe)]
    return [folder / f"{name}{suffix}.nii.gz" for name in numbered]
