r"""Results back to the images they came from: NIfTI volumes in the original units, under the affine that the
import recorded.

    mean      |mean_s x_s|                     the magnitude of the posterior mean
    std       the result's std                 several channels: std_s |x_s| over the samples, S - 1 in the
                                             denominator
    samples   |x_s|                            a fourth axis, one sample after the other

times the scale of each image. Images of one channel are real and keep their sign. The spread of magnitudes is
not the magnitude of the spread of real and imaginary part: phase that is uncertain moves those, and no
magnitude image. Places of a volume without an image are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.exporters import fill_volume, rows_of, save_nifti, volume_paths, volumes_of
from ambient_sci.errors import InputError
from ambient_sci.sampling.result import ResultFile
from ambient_sci.whole_files import check_output

SUFFIXES = (".nii.gz", ".nii")


def export_nifti(
    result: str | Path,
    out: str | Path,
    *,
    what: str = "mean",
    overwrite: bool = False,
    suffix: str = ".nii.gz",
) -> list[Path]:
    """Write the volumes of a result file as NIfTI; returns their paths.

    Args:
        result: a result file (made by `reconstruct_to_file` or `Reconstruction.save`).
        out: FILE.nii.gz (or .nii) for the result of one volume; otherwise a folder, which gets
            NAME_WHAT.nii.gz for each volume.
        what: "mean", "std" or "samples", as in the module's docstring.
        overwrite: replace files that exist.
        suffix: of the files in a folder, ".nii.gz" or ".nii".

    Raises:
        InputError: another ``what``, a file name for several volumes, images of more than two channels, a
            standard deviation of a single sample, geometry that does not fit the images, or files that exist.
            Nothing is written then.
    """
    if what not in QUANTITIES:
        raise InputError(f"export: expected one of {', '.join(QUANTITIES)}, got {what!r}")
    out = Path(out)
    with ResultFile(result) as file:
        samples, num, channels, *size = file.shape
        if channels > 2:
            raise InputError(f"{result}: expected real or complex images (1 or 2 channels), got {channels}")
        if what == "std" and samples < 2:
            raise InputError(f"{result}: expected 2 or more samples for a standard deviation, got {samples}")
        volumes = volumes_of(file.geometry, file.subjects, (num, *size))
        paths = _paths(out, volumes, what, suffix)
        for path in paths:
            check_output(path, overwrite)
        scales = np.broadcast_to(np.asarray(file.scale, dtype=np.float32), (num,))
        for path, volume in zip(paths, volumes, strict=True):
            rows = rows_of(volume)
            planes = QUANTITIES[what](file, rows)  # (n, H, W) or (n, H, W, S)
            factor = scales[rows].reshape(-1, *[1] * (planes.ndim - 1))
            save_nifti(
                path,
                fill_volume(planes.numpy() * factor, volume),
                volume["affine"],
                positioned=volume.get("positioned", True),
            )
    return paths


def _paths(out: Path, volumes: list[dict], what: str, suffix: str) -> list[Path]:
    if not out.name.endswith(SUFFIXES):
        if out.is_file():
            raise InputError(f"{out}: expected FILE.nii.gz or a folder, got a file of another kind")
        return volume_paths(out, volumes, f"_{what}", suffix)
    if len(volumes) > 1:
        names = ", ".join(str(v["name"]) for v in volumes[:4]) + (", ..." if len(volumes) > 4 else "")
        raise InputError(f"{out}: expected a folder for {len(volumes)} volumes ({names}), got a file name")
    return [out]


def _magnitude(x: Tensor) -> Tensor:
    """(..., C, H, W) to (..., H, W)."""
    return x[..., 0, :, :] if x.shape[-3] == 1 else torch.linalg.vector_norm(x, dim=-3)


def _mean(file: ResultFile, rows: slice) -> Tensor:
    return _magnitude(file.mean(rows))


def _samples(file: ResultFile, rows: slice) -> Tensor:
    return _magnitude(file.samples(rows)).movedim(0, -1)


def _std(file: ResultFile, rows: slice) -> Tensor:
    if file.shape[2] == 1:
        return file.std(rows)[:, 0]
    return _samples(file, rows).double().std(-1).float()


QUANTITIES: dict[str, Callable[[ResultFile, slice], Tensor]] = {
    "mean": _mean,
    "std": _std,
    "samples": _samples,
}
