"""Measurement files and reference files (HDF5), read lazily; checked when written, or when opened.

A measurement file holds what a scanner delivers, ``y = M (T x + sigma_y n)``, and nothing else:

- ``measurements`` (N, ...) complex64, float32, float16 or uint8, chunked by sample; ``mask`` (N or 1, ...)
  uint8; ``coil_maps`` (N or 1, coils, H, W) complex64; ``noise_std`` float32, per *real channel*: one number,
  (N,), or (N or 1, ...) of the shape of a measurement in memory for noise that differs by entry (layouts:
  ``layout.py``);
- prompts, optional: ``prompts.py``;
- ``labels`` (N,) int32, optional; ``subject`` (N,) int32, numbers into the JSON text ``subject_names``;
  ``scale`` (N,) where it differs between samples;
- attributes: ``format``, ``format_version``, ``operator``, ``design`` (JSON) with ``design_status`` (given,
  estimated or unknown), ``image_shape``, ``scale``, ``history``, ``geometry`` (JSON: orientation, and for
  each volume its affine, shape, slice axis, slice numbers and first sample); ``step`` for uint8, value =
  stored * step;
- ``checksums`` of every sample and the attribute ``verified``: see ``checksums.py``. A file that has them,
  unchanged, is opened without reading masks, maps and values again; any other is read through, value by
  value.

``scale`` turns values into the original units: original = value * scale. Clean images live in a *separate*
reference file (``images`` (N, C, H, W) float32, float16 or uint8, or (N, H, W) complex64), which the trainer
has no argument for.
"""

from __future__ import annotations

import math
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.hdf5_file import Hdf5File, Indices, parse_json
from ambient_sci.data.layout import (
    Layout,
    Numbers,
    check_coil_map_values,
    check_image_shape,
    check_levels,
    check_mask_values,
    check_noise_map_shape,
    check_noise_std,
    check_values,
)
from ambient_sci.data.prompts import TEXTS as PROMPT_TEXTS
from ambient_sci.data.prompts import Prompts, StoredPrompts, check_text_values
from ambient_sci.errors import InputError
from ambient_sci.priors.given import Prompt

MEASUREMENT_FORMAT = "ambient_sci measurements"
IMAGE_FORMAT = "ambient_sci images"
DESIGN_STATUS = ("given", "estimated", "unknown")
#: Files without checksums have their measurements read through when opened if they are below this size; those
#: of larger ones are checked batch by batch as they are read.
FULL_SCAN_BYTES = 2 << 30

_TYPES = {"c": "float32", "f2": "float16", "f4": "float32", "u1": "uint8"}
_NO_ROWS = np.zeros(1, np.int64)


def _numbers(dataset: h5py.Dataset, attributes: dict[str, Any]) -> Numbers:
    name = _TYPES["c" if dataset.dtype.kind == "c" else dataset.dtype.str[1:]]
    if name != "uint8":
        return Numbers(name)
    return Numbers(name, float(attributes.get("step", 1.0)), float(attributes.get("offset", 0.0)))


class MeasurementFile(Hdf5File):
    """Measurements with their masks, coil maps and noise levels, read lazily.

    A file of the library's own writer is trusted once its recorded checksum fits (``trusted``): types and
    shapes are looked at, and each sample is compared with its checksum when it is read; files below 64 MB and
    4,096 samples at once. Any other file is checked value by value: 0/1 masks, maps, noise levels; and, for
    files under 2 GB (``FULL_SCAN_BYTES``), all measurements (finite, zero outside the mask). Larger ones have
    their measurements checked as they are read.

    Raises:
        InputError: a missing, truncated, foreign or damaged file, in one line.
    """

    kind = MEASUREMENT_FORMAT

    def _load(self, file: h5py.File) -> None:
        self.attributes = self._read_attributes(file)
        self._num = 0
        types = (np.complex64, np.float32, np.float16, np.uint8)
        measurements = self._dataset(file, "measurements", types)
        if measurements.ndim < 3 or len(measurements) == 0:
            raise InputError(f"measurements: expected (N, ...) with N >= 1, got shape {measurements.shape}")
        self.operator_name: str = str(self.attributes.get("operator"))
        self.layout = self._layout_of(measurements)
        self.image_shape: tuple[int, int, int] = self.layout.image_shape
        self._read_common(file, len(measurements))
        self._shared: dict[str, Any] = {}  # what serves every sample, read once
        self._measured = [0, 0]
        self._find_masks(file)
        self._find_coil_maps(file)
        self._read_noise(file)
        self._read_design()
        self._read_prompts(file)
        self._verified = self.trusted
        if self.trusted:
            self._check_rows("measurements", file)
        elif self.path.stat().st_size < FULL_SCAN_BYTES:
            self._check_rows("measurements", file)
            self._verified = True

    def _layout_of(self, measurements: h5py.Dataset) -> Layout:
        pairs = bool(self.attributes.get("complex_pairs", False))
        numbers, shape = _numbers(measurements, self.attributes), measurements.shape[1:]
        if pairs and (numbers.name != "float16" or shape[-1] != 2):
            raise InputError(f"measurements: expected float16 pairs (N, ..., 2), got {measurements.shape}")
        return Layout.infer(
            self.operator_name,
            self.attributes.get("image_shape"),
            shape[:-1] if pairs else shape,
            pairs or measurements.dtype.kind == "c",
            numbers,
        )

    # -- opening ---------------------------------------------------------------------------------------------

    def _find_masks(self, file: h5py.File) -> None:
        self._mask_count = 0
        if not self._has(file, "mask") and self.operator_name == "identity":
            self._measured = [1, 1]
            return
        mask = self._dataset(file, "mask", (np.uint8,))
        if mask.ndim < 3 or len(mask) not in (1, self._num):
            raise InputError(f"mask: expected 1 or {self._num} masks, got shape {mask.shape}")
        self.layout.check_mask_shape(mask.shape[1:])
        self._mask_count = len(mask)
        self._check_rows("mask", file)
        if self.trusted:
            self._measured = [int(n) for n in self.attributes.get("measured", (0, 0))]

    def _find_coil_maps(self, file: h5py.File) -> None:
        self._map_count = 0
        self._isometric = np.ones(0, bool)
        if not self._has(file, "coil_maps"):
            if self.layout.coils:
                raise InputError(f"coil_maps: missing, the measurements have {self.layout.coils} coils")
            return
        maps = self._dataset(file, "coil_maps", (np.complex64,))
        if maps.ndim != 4 or len(maps) not in (1, self._num):
            raise InputError(f"coil_maps: expected (1 or {self._num}, coils, H, W), got shape {maps.shape}")
        self.layout.check_coil_maps_shape(maps.shape[1:])
        self._map_count = len(maps)
        self._isometric = np.zeros(len(maps), bool)
        if self.trusted:
            self._isometric = self._dataset(file, "isometric", (np.uint8,))[()].astype(bool)
        self._check_rows("coil_maps", file)

    def _read_noise(self, file: h5py.File) -> None:
        if not self._has(file, "noise_std"):
            raise InputError("noise_std: the noise level is absent")
        stored = self._dataset(file, "noise_std", (np.float32, np.float64))
        self._noise_rows = 0 if stored.ndim < 2 else len(stored)
        if stored.ndim < 2:
            levels = check_noise_std(stored[()], self._num)
        else:
            check_noise_map_shape(stored.shape, self._num, self.measurement_shape)
            self._largest = np.zeros(len(stored), np.float32)
            self._check_rows("noise_std", file)
            if self.trusted:
                self._largest = self._dataset(file, "noise_std_largest", (np.float32,))[()]
            levels = np.broadcast_to(self._largest, (self._num,)).copy()
        #: noise level of each sample (N,), per real channel: the largest of its entries where they differ
        self.noise_std = torch.from_numpy(levels)

    def _read_prompts(self, file: h5py.File) -> None:
        self._prompts: StoredPrompts | None = None
        names = [name for name in PROMPT_TEXTS if self._has(file, name)]
        if names:
            self._prompts = StoredPrompts(
                lambda name, types: self._dataset(file, name, types) if self._has(file, name) else None,
                self._read,
                self._num,
            )
        for name in names:
            self._check_rows(name, file)

    def _read_design(self) -> None:
        self.design_dict: dict[str, Any] | None = parse_json(
            self.attributes.get("design") or "null", "design"
        )
        self.design_status = str(self.attributes.get("design_status", "unknown"))
        if self.design_status not in DESIGN_STATUS:
            raise InputError(
                f"design_status: expected one of {', '.join(DESIGN_STATUS)}, got {self.design_status!r}"
            )

    def _check_values(self, name: str, block: np.ndarray, rows: np.ndarray) -> None:
        if name == "mask":
            check_mask_values(block, rows)
            self._measured[0] += int(block.sum(dtype=np.int64))
            self._measured[1] += block.size
            if self.operator_name == "identity" and not block.all():
                raise InputError(
                    "mask: the operator identity measures everything, but the mask has zeros (use masking)"
                )
        elif name == "coil_maps":
            check_coil_map_values(block, rows)
            self._isometric[rows] = isometric_maps(block)
        elif name == "noise_std":
            check_levels(block)
            self._largest[rows] = block.reshape(len(block), -1).max(1)
        elif name in PROMPT_TEXTS:
            check_text_values(name, block)
        else:
            check_values(self.layout.measurements_to_memory(block), self._mask_of(rows), rows)

    def _explain(self, name: str, block: np.ndarray, rows: np.ndarray) -> None:
        super()._explain(name, block, rows)
        if name == "mask" and self._mask_count == self._num:
            y = self.layout.measurements_to_memory(self._read("measurements", rows))
            check_values(y, self.layout.mask_to_memory(block), rows)

    # -- facts -----------------------------------------------------------------------------------------------

    @property
    def measured_fraction(self) -> float:
        """Measured entries of the masks over all entries; 1 exactly if nothing is missing."""
        if self.operator_name == "identity":
            return 1.0
        return self._measured[0] / self._measured[1]

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """Shape of one measurement in memory, e.g. (2, coils, H, W)."""
        return self.layout.memory_shape

    @property
    def coils(self) -> int | None:
        """Number of coils of multi-coil MRI, else None."""
        return self.layout.coils

    @property
    def shared_mask(self) -> bool:
        """True when one mask serves every sample."""
        return self._mask_count <= 1

    @property
    def noise_by_entry(self) -> bool:
        """True when the noise level differs between the entries of a measurement."""
        return self._noise_rows > 0

    @property
    def nbytes(self) -> int:
        """Bytes of all measurements, masks, coil maps and noise levels in memory."""
        pixels = math.prod(self.image_shape[1:])
        per_sample = 4 * math.prod(self.measurement_shape) * (2 if self.noise_by_entry else 1)
        return (
            self._num * per_sample
            + self._mask_count * 4 * pixels
            + self._map_count * 8 * (self.coils or 0) * pixels
            + (0 if self._prompts is None else self._prompts.nbytes)
        )

    @property
    def design(self):
        """How the masks were drawn (a MaskDesign), or None when unknown or not needed."""
        if self.design_dict is None:
            return None
        from ambient_sci.operators import design_from_dict

        if "design" not in self._shared:
            self._shared["design"] = design_from_dict(self.design_dict)
        return self._shared["design"]

    def isometric(self, indices: Indices = None) -> bool:
        """T^H T = I for these samples: no coil maps, or maps with sum_c |s_c|^2 = 1 everywhere."""
        return not self._map_count or bool(
            self._isometric[self._rows_of(self._map_count, self.rows(indices))].all()
        )

    # -- samples ---------------------------------------------------------------------------------------------

    def measurements(self, indices: Indices = None) -> Tensor:
        """y (B, *measurement_shape) float32; zeros where the mask is 0."""
        rows = self.rows(indices)
        y = self.layout.measurements_to_memory(self._read("measurements", rows))
        if not self._verified:
            try:
                check_values(y, self._mask_of(rows), rows)
            except InputError as error:
                raise InputError(self._placed(str(error))) from None
        return y

    def sigma(self, indices: Indices = None) -> Tensor:
        """Noise level per real channel: (B,) float32, or of the shape of y where it differs by entry."""
        rows = self.rows(indices)
        if not self.noise_by_entry:
            return self.noise_std[torch.from_numpy(rows)]
        levels = torch.from_numpy(self._read("noise_std", _NO_ROWS if self._noise_rows == 1 else rows))
        return levels.expand(len(rows), *self.measurement_shape)

    def prompts(self, indices: Indices = None) -> Prompt | None:
        """The prompt of each of these samples, or None for a file without prompts."""
        return None if self._prompts is None else self._prompts[self.rows(indices)]

    def all_prompts(self) -> Prompts | None:
        """The prompts of all samples, each text once; None for a file without."""
        return None if self._prompts is None else self._prompts.all()

    def mask(self, indices: Indices = None) -> Tensor:
        """M (1 or B, ...) float32 of 0/1, broadcastable to the measurement; the first axis is 1 when all
        samples share it."""
        mask = self._mask_of(self.rows(indices))
        return torch.ones(1, 1, *self.image_shape[1:]) if mask is None else mask.clone()

    def coil_maps(self, indices: Indices = None) -> Tensor | None:
        """Coil maps (1 or B, coils, H, W) complex64, None for anything but multi-coil MRI."""
        if self._map_count == 0:
            return None
        return torch.from_numpy(self._read("coil_maps", self._rows_of(self._map_count, self.rows(indices))))

    def operator(self, indices: Indices = None):
        """The RowMaskedOperator of these samples: same T, their masks and coil maps.

        Built without looking at values: they were checked when the file was written or opened.
        """
        from ambient_sci.operators import Identity, Masking

        if self.operator_name == "identity":
            return self._once("operator", lambda: Identity(self.image_shape))[:]
        rows = self.rows(indices)
        mask = self._mask_of(rows)
        assert mask is not None  # every other operator has masks
        if self.operator_name == "masking":
            return Masking._trusted(mask, self.image_shape, self.design)
        if self._map_count == 1:  # the maps of all samples are read, and their shift folded in, once
            one = self._once("operator", lambda: self._mri(mask, rows))
            return one._with_rows(mask, self.design)
        return self._mri(mask, rows)

    def _mri(self, mask: Tensor, rows: np.ndarray):
        from ambient_sci.operators import MRI

        return MRI._trusted(mask, self.coil_maps(rows), self.design, isometry=self.isometric(rows), own=True)

    def _mask_of(self, rows: np.ndarray) -> Tensor | None:
        if self._mask_count == 0:
            return None
        if self._mask_count == 1:
            return self._once("mask", lambda: self.layout.mask_to_memory(self._read("mask", _NO_ROWS)))
        return self.layout.mask_to_memory(self._read("mask", rows))

    @staticmethod
    def _rows_of(count: int, rows: np.ndarray) -> np.ndarray:
        return _NO_ROWS if count == 1 else rows

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shared": {}}


def isometric_maps(maps: np.ndarray) -> np.ndarray:
    """Whether sum_c |s_c|^2 = 1 everywhere, for each of (B, coils, H, W), (B,) bool."""
    from ambient_sci.operators.mri import coil_power, is_isometric

    power = coil_power(torch.from_numpy(np.require(maps, requirements=["C", "W"]))).flatten(1)
    return np.array([is_isometric(*p.aminmax()) for p in power], bool)


class ReferenceFile(Hdf5File):
    """Images, one a sample: clean references for evaluation, or generated samples.

    Raises:
        InputError: a missing, truncated, foreign or damaged file, wrong shapes or types, NaN or infinities.
    """

    kind = IMAGE_FORMAT

    def _load(self, file: h5py.File) -> None:
        self.attributes = self._read_attributes(file)
        images = self._dataset(file, "images", (np.float32, np.complex64, np.float16, np.uint8))
        if len(images) == 0 or images.ndim != (3 if images.dtype.kind == "c" else 4):
            got = f"{images.shape} {images.dtype}"
            raise InputError(f"images: expected (N, C, H, W) float32 or (N, H, W) complex64, got {got}")
        self._complex = images.dtype.kind == "c"
        self._numbers = _numbers(images, self.attributes)
        self.image_shape = check_image_shape((2, *images.shape[1:]) if self._complex else images.shape[1:])
        self._read_common(file, len(images))
        self._verified = self.trusted
        if self.trusted or self.path.stat().st_size < FULL_SCAN_BYTES:
            self._check_rows("images", file)
            self._verified = True

    def _check_values(self, name: str, block: np.ndarray, rows: np.ndarray) -> None:
        if not np.isfinite(block).all():
            raise InputError("images: NaN or infinite values")

    @property
    def eight_bits(self) -> tuple[float, float] | None:
        """Step and offset of images stored as uint8, value = stored * step + offset; None for others."""
        return (self._numbers.step, self._numbers.offset) if self._numbers.name == "uint8" else None

    def images(self, indices: Indices = None) -> Tensor:
        """Images (B, C, H, W) float32; complex ones as two channels."""
        rows = self.rows(indices)
        block = self._read("images", rows)
        if not self._verified:
            self._check_values("images", block, rows)
        return self._numbers.from_disk(block, self._complex)
