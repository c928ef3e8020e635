"""Writing reference files and files of samples: images, validated sample by sample."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.data.files import IMAGE_FORMAT
from ambient_sci.data.hdf5_writer import Hdf5Writer
from ambient_sci.data.layout import Numbers, to_numpy
from ambient_sci.errors import InputError


class ImageWriter(Hdf5Writer):
    """Appends blocks of images to a new reference file (or file of samples).

    Args:
        path: the file; it appears when the writer is closed.
        history, geometry, attributes, overwrite: as of `MeasurementWriter`.
        dtype: numbers on disk, "float32" or, for real images, "uint8".
        step, offset: of uint8: value = stored * step + offset (2/255 and -1: images in [-1, 1]). An array of
            uint8 given to `append` holds stored numbers.
    """

    kind = IMAGE_FORMAT

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        history: str = "",
        geometry: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        dtype: str = "float32",
        step: float = 1 / 255,
        offset: float = 0.0,
    ):
        super().__init__(path, history, geometry, attributes, overwrite)
        if dtype == "float16":
            raise InputError("images: expected dtype float32 or uint8, got float16")
        self._numbers = Numbers(dtype, step, offset) if dtype == "uint8" else Numbers(dtype)

    def append(
        self,
        images: Any,
        *,
        subjects: Sequence[str] | str | None = None,
        scale: Any = 1.0,
        labels: Any = None,
    ) -> None:
        """Append (B, C, H, W) real or (B, H, W) complex images; InputError for other shapes, NaN or
        infinities."""
        block = to_numpy(images, "images")
        if not (self._numbers.name == "uint8" and block.dtype == np.uint8):
            with np.errstate(over="ignore"):
                block = block.astype(np.complex64 if block.dtype.kind == "c" else np.float32)
        if len(block) == 0 or block.ndim != (3 if block.dtype.kind == "c" else 4):
            raise InputError(
                f"images: expected (N, C, H, W) real or (N, H, W) complex, got {block.dtype} {block.shape}"
            )
        if not np.isfinite(block).all():
            raise InputError("images: NaN or infinite values")
        stored = self._numbers.to_disk(block, "images")
        self._append_common(len(block), subjects, scale, labels)
        self._extend("images", stored)

    def _finish(self, file: h5py.File) -> None:
        self._say_step(file, self._numbers)
        super()._finish(file)


def write_images(
    path: str | os.PathLike[str],
    *,
    images: Any,
    subjects: Sequence[str] | str | None = None,
    scale: Any = 1.0,
    history: str = "",
    overwrite: bool = False,
    geometry: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    step: float = 1 / 255,
    offset: float = 0.0,
    labels: Any = None,
) -> Path:
    """Write a reference file (or file of samples) from (N, C, H, W) real or (N, H, W) complex images.

    Args:
        path, history, overwrite, geometry, attributes, dtype, step, offset: see `ImageWriter`.
        images, subjects, scale, labels: see `ImageWriter.append`.

    Returns:
        The path.

    Raises:
        InputError: other shapes, NaN or infinities, or a file that exists.
    """
    with ImageWriter(
        path,
        history=history,
        geometry=geometry,
        attributes=attributes,
        overwrite=overwrite,
        dtype=dtype,
        step=step,
        offset=offset,
    ) as writer:
        writer.append(images, subjects=subjects, scale=scale, labels=labels)
    return writer.path
