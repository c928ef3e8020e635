"""Writing measurement files and reference files: what ``files.py`` reads, validated sample by sample."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.data.files import DESIGN_STATUS, MEASUREMENT_FORMAT, isometric_maps
from ambient_sci.data.hdf5_writer import Hdf5Writer
from ambient_sci.data.image_writing import ImageWriter, write_images
from ambient_sci.data.layout import (
    Layout,
    Numbers,
    channels_to_complex,
    check_coil_map_values,
    check_image_shape,
    check_mask_values,
    check_noise_map,
    check_noise_std,
    check_values,
    to_numpy,
)
from ambient_sci.data.prompts import Prompts
from ambient_sci.data.prompts import store as store_prompts
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output

__all__ = ["ImageWriter", "MeasurementWriter", "check_output", "write_images", "write_measurements"]


class MeasurementWriter(Hdf5Writer):
    """Appends blocks of measurements to a new measurement file.

    Args:
        path: the file; it appears when the writer is closed.
        operator: "identity", "masking" or "mri".
        image_shape: (C, H, W).
        shared_mask: (1, ...), serves all samples; otherwise each block brings its own.
        shared_coil_maps: (1, coils, H, W), likewise.
        design: a MaskDesign or its dictionary.
        design_status: "given" (default when there is a design), "estimated" or "unknown".
        history: how the data were made.
        geometry: orientation and volumes, see `files`.
        attributes: further root attributes.
        overwrite: replace a file that is there.
        dtype: numbers on disk: "float32"; "float16", half the bytes, rounded by at most 1 part in 2,048 of
            each value (what that was for these data is written into the history); or "uint8" for real images
            of 8 bits.
        prompts: those of all samples, in the order in which they will be appended.
        step: of uint8: value = stored * step. An array of uint8 given to `append` holds stored numbers.

    Raises:
        InputError: whatever ``MeasurementFile`` would refuse to read, or an output that exists.
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
        dtype: str = "float32",
        step: float = 1 / 255,
        prompts: Prompts | None = None,
    ):
        super().__init__(path, history, geometry, attributes, overwrite)
        self._numbers = Numbers(dtype, step if dtype == "uint8" else 1.0)
        self.operator, self._prompts = operator, prompts
        self.image_shape = check_image_shape(image_shape)
        self.set_design(design, design_status)
        self._layout: Layout | None = None
        self._shared_mask = shared_mask
        self._shared_maps = shared_coil_maps
        self._noise: list[np.ndarray] = []  # (N,): the largest level of each sample
        self._noise_map: np.ndarray | None = None  # one map of levels for all samples
        self._noise_error: list[np.ndarray] = []
        self._isometric: list[np.ndarray] = []
        self._measured = [0, 0]  # entries of the masks that are 1, and all of them
        self._rounding = [0.0, 0.0]  # largest error of float16, also in noise levels

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
        labels: Any = None,
    ) -> None:
        """Append B samples, in the disk layout (complex) or the memory layout (two real channels) of
        ``layout.py``.

        Args:
            measurements: (B, ...).
            noise_std: per real channel: a float, (B,), or for noise that differs by entry (1 or B, ...), each
                axis 1 or that of a measurement in memory.
            mask: (1 or B, ...) of 0/1, needed unless shared or identity.
            coil_maps: (1 or B, coils, H, W) complex.
            subjects: one name, or B of them.
            scale: original units over values, one number or B.
            noise_std_error: standard error of an estimated noise level.
            labels: (B,) whole numbers, for all samples of a file or for none.
        """
        block = self._logical(to_numpy(measurements, "measurements"))
        layout = self._layout = self._layout or Layout.infer(
            self.operator, self.image_shape, block.shape[1:], block.dtype.kind == "c", self._numbers
        )
        if block.shape[1:] != layout.stored_shape or (block.dtype.kind == "c") != layout.is_complex:
            got = f"{block.shape[1:]} {block.dtype}"
            raise InputError(
                f"measurements: expected {layout.stored_shape} {layout.dtype} as before, got {got}"
            )
        num, first = len(block), len(self)
        levels, by_entry = self._levels(noise_std, num)
        masks, maps = self._masks_and_maps(mask, coil_maps, num)
        stored = self._numbers.to_disk(block, "measurements")
        in_memory = layout.measurements_to_memory(stored)
        check_values(in_memory, layout.mask_to_memory(masks), first)
        if noise_std_error is not None:
            self._noise_error.append(check_noise_std(noise_std_error, num))
        if self._numbers.name == "float16":
            self._note_rounding(block, in_memory.numpy(), levels)
        self._append_common(num, subjects, scale, labels)
        self._extend("measurements", stored)
        self._store_masks(masks, maps)
        self._noise.append(levels)
        if by_entry is not None:
            self._extend("noise_std", by_entry)

    def _levels(self, noise_std: Any, num: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The largest level of each sample, and the levels of entries as they are stored, if they differ.

        One map for several samples in the first block is the map of all; otherwise each sample has its own.
        """
        assert self._layout is not None
        by_entry = None
        if np.ndim(noise_std) >= 2:
            by_entry = check_noise_map(noise_std, num, self._layout.memory_shape)
        if not len(self):
            self._by_entry = by_entry is not None
            self._noise_map = by_entry if by_entry is not None and len(by_entry) == 1 < num else None
        elif (by_entry is not None) != self._by_entry:
            raise InputError("noise_std: expected levels for each entry in every block, or in none")
        if by_entry is None:
            return check_noise_std(noise_std, num), None
        largest = np.broadcast_to(by_entry.reshape(len(by_entry), -1).max(1), (num,))
        if self._noise_map is None:
            return largest, np.broadcast_to(by_entry, (num, *by_entry.shape[1:]))
        if not np.array_equal(by_entry, self._noise_map):
            raise InputError("noise_std: expected the one map of levels of the first block")
        return largest, None if len(self) else by_entry

    def _masks_and_maps(self, mask: Any, coil_maps: Any, num: int) -> tuple[np.ndarray, np.ndarray | None]:
        assert self._layout is not None
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
        if maps is None and self._layout.coils:
            raise InputError(f"coil_maps: missing, the measurements have {self._layout.coils} coils")
        return masks, maps

    def _store_masks(self, masks: np.ndarray, maps: np.ndarray | None) -> None:
        file = self._open().file
        if not (self._shared_mask is not None and "mask" in file):
            self._extend("mask", masks, compression="gzip", compression_opts=1)
            self._measured[0] += int(masks.sum(dtype=np.int64))
            self._measured[1] += masks.size
        if maps is not None and not (self._shared_maps is not None and "coil_maps" in file):
            self._extend("coil_maps", maps)
            self._isometric.append(isometric_maps(maps))

    def _note_rounding(self, block: np.ndarray, rounded: np.ndarray, levels: np.ndarray) -> None:
        exact = np.stack((block.real, block.imag), axis=1) if block.dtype.kind == "c" else block
        error = np.abs(exact.reshape(rounded.shape) - rounded).reshape(len(rounded), -1).max(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(error > 0, error / levels, 0.0)
        self._rounding = [
            max(self._rounding[0], float(error.max())),
            max(self._rounding[1], float(relative.max())),
        ]

    def _logical(self, block: np.ndarray) -> np.ndarray:
        """Complex stays complex, two-channel k-space becomes complex, real images and uint8 stay."""
        if len(block) == 0:
            raise InputError("measurements: expected at least one sample, got none")
        with np.errstate(over="ignore"):
            if block.dtype.kind == "c":
                return block.astype(np.complex64)
            if self.operator == "mri" and block.ndim in (4, 5) and block.shape[1] == 2:
                return channels_to_complex(block.astype(np.float32))
            if self._numbers.name == "uint8" and block.dtype == np.uint8:
                return block
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

    def _finish(self, file: h5py.File) -> None:
        if self._prompts is not None:
            store_prompts(self._prompts, len(self), self._extend, self._small)
        levels = np.concatenate(self._noise)
        if not self._by_entry:
            self._small("noise_std", levels)
        else:
            stored = file["noise_std"]
            assert isinstance(stored, h5py.Dataset)
            self._small("noise_std_largest", levels[: len(stored)])
        if self._isometric:
            self._small("isometric", np.concatenate(self._isometric).astype(np.uint8))
        file.attrs["measured"] = np.asarray(self._measured)
        file.attrs["image_shape"] = np.asarray(self.image_shape)
        self._text("operator", self.operator)
        self._text("design", json.dumps(self.design))
        self._text("design_status", self.design_status)
        if self._noise_error:
            file.attrs["noise_std_error"] = float(np.max(np.concatenate(self._noise_error)))
        assert self._layout is not None
        if self._layout.is_complex and self._numbers.name == "float16":
            file.attrs["complex_pairs"] = True
        if self._numbers.name == "float16":
            of_noise = (
                f", {self._rounding[1]:.2g} of the noise level" if np.isfinite(self._rounding[1]) else ""
            )
            self._say(f"stored as float16, rounded by at most {self._rounding[0]:.2g}{of_noise}")
        self._say_step(file, self._numbers)
        super()._finish(file)


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
    dtype: str = "float32",
    step: float = 1 / 255,
    labels: Any = None,
    prompts: Prompts | None = None,
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
        dtype=dtype,
        step=step,
        prompts=prompts,
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
            labels=labels,
        )
    return writer.path
