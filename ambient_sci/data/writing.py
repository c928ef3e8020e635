"""Writing measurement files and reference files: what ``files.py`` reads, validated sample by sample."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.data.files import DESIGN_STATUS, IMAGE_FORMAT, MEASUREMENT_FORMAT
from ambient_sci.data.hdf5_writer import Hdf5Writer
from ambient_sci.data.layout import (
    Layout,
    channels_to_complex,
    check_coil_map_values,
    check_image_shape,
    check_mask_values,
    check_noise_std,
    check_values,
    to_numpy,
)
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output

__all__ = ["ImageWriter", "MeasurementWriter", "check_output", "write_images", "write_measurements"]


class MeasurementWriter(Hdf5Writer):
    """Appends blocks of measurements to a new measurement file.

    ``shared_mask`` (1, ...) and ``shared_coil_maps`` (1, coils, H, W) serve all samples; otherwise each block
    brings its own. ``design``: a MaskDesign or its dictionary, with ``design_status`` "given" (default when
    there is one), "estimated" or "unknown". ``attributes`` are further root attributes.

    Raises: InputError for whatever ``MeasurementFile`` would refuse to read, or an output that exists.
    """

    kind = MEASUREMENT_FORMAT

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        operator: str,
        image_shape: Sequence[int],
        shared_mask: Any = None,
        shared_coil_maps: Any = None,
        design: Any = None,
        design_status: str | None = None,
        history: str = "",
        geometry: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ):
        super().__init__(path, history, geometry, attributes, overwrite)
        self.operator = operator
        self.image_shape = check_image_shape(image_shape)
        self.set_design(design, design_status)
        self._layout: Layout | None = None
        self._shared_mask = shared_mask
        self._shared_maps = shared_coil_maps
        self._noise: list[np.ndarray] = []
        self._noise_error: list[np.ndarray] = []

    def set_design(self, design: Any, status: str | None = None) -> None:
        """State how the masks were drawn; possible until the file is closed."""
        self.design: dict[str, Any] | None = design.to_dict() if hasattr(design, "to_dict") else design
        self.design_status = status or ("unknown" if design is None else "given")
        if self.design_status not in DESIGN_STATUS:
            expected = ", ".join(DESIGN_STATUS)
            raise InputError(f"design_status: expected one of {expected}, got {self.design_status!r}")

    def append(
        self,
        measurements: Any,
        *,
        noise_std: Any,
        mask: Any = None,
        coil_maps: Any = None,
        subjects: Sequence[str] | str | None = None,
        scale: Any = 1.0,
        noise_std_error: Any = None,
    ) -> None:
        """Append B samples, in the disk layout (complex) or the memory layout (two real channels) of
        ``layout.py``.

        measurements: (B, ...); noise_std: float or (B,), per real channel; mask: (1 or B, ...) of 0/1, needed
        unless shared or identity; coil_maps: (1 or B, coils, H, W) complex; noise_std_error: standard error
        of an estimated noise level.
        """
        block = self._to_disk(to_numpy(measurements, "measurements"))
        layout = self._layout = self._layout or Layout.infer(
            self.operator, self.image_shape, block.shape[1:], block.dtype.kind == "c"
        )
        if block.shape[1:] != layout.stored_shape or (block.dtype.kind == "c") != layout.is_complex:
            got = f"{block.shape[1:]} {block.dtype}"
            raise InputError(
                f"measurements: expected {layout.stored_shape} {layout.dtype} as before, got {got}"
            )
        num, first = len(block), len(self)
        levels = check_noise_std(noise_std, num)
        if self.operator == "identity" and mask is None and self._shared_mask is None:
            self._shared_mask = np.ones((1, 1, *self.image_shape[1:]), np.uint8)
        masks = self._prepare(mask, self._shared_mask, "mask", num, self._mask_to_disk)
        maps = self._prepare(coil_maps, self._shared_maps, "coil_maps", num, self._maps_to_disk)
        if masks is None:
            raise InputError(f"mask: missing, the operator {self.operator} needs one")
        if self.operator == "identity" and not masks.all():
            raise InputError(
                "mask: the operator identity measures everything, but the mask has zeros (use masking)"
            )
        if maps is None and layout.coils:
            raise InputError(f"coil_maps: missing, the measurements have {layout.coils} coils")
        check_values(layout.measurements_to_memory(block), layout.mask_to_memory(masks), first)
        if noise_std_error is not None:
            self._noise_error.append(check_noise_std(noise_std_error, num))
        self._append_common(num, subjects, scale)
        self._extend("measurements", block.astype(layout.dtype))
        self._store("mask", masks, self._shared_mask is not None, compression="gzip", compression_opts=1)
        self._store("coil_maps", maps, self._shared_maps is not None)
        self._noise.append(levels)

    def _store(self, name: str, block: np.ndarray | None, shared: bool, **options: Any) -> None:
        if block is not None and not (shared and name in self._open()):
            self._extend(name, block, **options)

    def _to_disk(self, block: np.ndarray) -> np.ndarray:
        """Complex stays complex, two-channel k-space becomes complex, real images stay real."""
        if len(block) == 0:
            raise InputError("measurements: expected at least one sample, got none")
        with np.errstate(over="ignore"):
            if block.dtype.kind == "c":
                return block.astype(np.complex64)
            if self.operator == "mri" and block.ndim in (4, 5) and block.shape[1] == 2:
                return channels_to_complex(block.astype(np.float32))
            return block.astype(np.float32)

    def _prepare(self, own: Any, shared: Any, name: str, num: int, convert) -> np.ndarray | None:
        if own is not None and shared is not None:
            raise InputError(f"{name}: a shared one was given already")
        given = shared if own is None else own
        if given is None:
            return None
        block = convert(to_numpy(given, name))
        if shared is not None and len(block) != 1:
            raise InputError(f"{name}: a shared one has first axis 1, got {len(block)}")
        if len(block) not in (1, num):
            raise InputError(f"{name}: expected first axis 1 or {num}, got {len(block)}")
        return block if shared is not None else np.broadcast_to(block, (num, *block.shape[1:]))

    def _mask_to_disk(self, mask: np.ndarray) -> np.ndarray:
        assert self._layout is not None
        c, h, w = self.image_shape
        if mask.ndim == 5 and mask.shape[1] == 1:  # (B, 1, 1, H, W), the memory layout of several coils
            mask = mask[:, 0]
        if self.operator == "mri" and mask.ndim == 4 and mask.shape[1] == 1:
            mask = mask[:, 0]
        if mask.ndim >= 2 and mask.shape[-1] == w and mask.shape[-2] in (1, h):  # line masks (…, 1, W)
            mask = np.broadcast_to(mask, (*mask.shape[:-2], h, w))
        if mask.ndim < 3:
            raise InputError(f"mask: expected (1 or B, ..., {h}, {w}), got {mask.shape}")
        self._layout.check_mask_shape(mask.shape[1:])
        check_mask_values(mask, len(self))
        return mask.astype(np.uint8)

    def _maps_to_disk(self, maps: np.ndarray) -> np.ndarray:
        assert self._layout is not None
        if maps.ndim != 4 or maps.dtype.kind != "c":
            raise InputError(
                f"coil_maps: expected complex (1 or B, coils, H, W), got {maps.dtype} {maps.shape}"
            )
        self._layout.check_coil_maps_shape(maps.shape[1:])
        check_coil_map_values(maps, len(self))
        return maps.astype(np.complex64)

    def _finish_attributes(self, file: h5py.File) -> None:
        file.create_dataset("noise_std", data=np.concatenate(self._noise))
        file.attrs["operator"] = self.operator
        file.attrs["image_shape"] = np.asarray(self.image_shape)
        file.attrs["design"] = json.dumps(self.design)
        file.attrs["design_status"] = self.design_status
        if self._noise_error:
            file.attrs["noise_std_error"] = float(np.max(np.concatenate(self._noise_error)))
        super()._finish_attributes(file)


class ImageWriter(Hdf5Writer):
    """Appends blocks of images to a new reference file (or file of samples)."""

    kind = IMAGE_FORMAT

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        history: str = "",
        geometry: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ):
        super().__init__(path, history, geometry, attributes, overwrite)

    def append(self, images: Any, *, subjects: Sequence[str] | str | None = None, scale: Any = 1.0) -> None:
        """Append (B, C, H, W) real or (B, H, W) complex images; InputError for other shapes, NaN or
        infinities."""
        block = to_numpy(images, "images")
        with np.errstate(over="ignore"):
            block = block.astype(np.complex64 if block.dtype.kind == "c" else np.float32)
        if len(block) == 0 or block.ndim != (3 if block.dtype.kind == "c" else 4):
            raise InputError(
                f"images: expected (N, C, H, W) real or (N, H, W) complex, got {block.dtype} {block.shape}"
            )
        if not np.isfinite(block).all():
            raise InputError("images: NaN or infinite values")
        self._append_common(len(block), subjects, scale)
        self._extend("images", block)


def write_measurements(
    path: str | os.PathLike[str],
    *,
    measurements: Any,
    mask: Any,
    noise_std: Any,
    operator: str,
    image_shape: Sequence[int],
    coil_maps: Any = None,
    design: Any = None,
    scale: Any = 1.0,
    subjects: Sequence[str] | str | None = None,
    history: str = "",
    overwrite: bool = False,
    design_status: str | None = None,
    noise_std_error: Any = None,
    geometry: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a measurement file from arrays (numpy or torch) in one go; see :class:`MeasurementWriter` for the
    arguments.

    A mask or coil maps whose first axis is 1 are stored once, shared by all samples. Returns the path.

    Raises: InputError when anything does not fit, or the file exists and ``overwrite`` is False; nothing is
    written then.
    """
    num = len(measurements)
    shared = {}
    if mask is not None and len(mask) == 1 and num > 1:
        shared["shared_mask"], mask = mask, None
    if coil_maps is not None and len(coil_maps) == 1 and num > 1:
        shared["shared_coil_maps"], coil_maps = coil_maps, None
    with MeasurementWriter(
        path,
        operator=operator,
        image_shape=image_shape,
        design=design,
        design_status=design_status,
        history=history,
        geometry=geometry,
        attributes=attributes,
        overwrite=overwrite,
        **shared,
    ) as writer:
        writer.append(
            measurements,
            noise_std=noise_std,
            mask=mask,
            coil_maps=coil_maps,
            subjects=subjects,
            scale=scale,
            noise_std_error=noise_std_error,
        )
    return writer.path


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
) -> Path:
    """Write a reference file (or file of samples) from (N, C, H, W) real or (N, H, W) complex images. Returns
    the path."""
    with ImageWriter(
        path, history=history, geometry=geometry, attributes=attributes, overwrite=overwrite
    ) as writer:
        writer.append(images, subjects=subjects, scale=scale)
    return writer.path
