"""Measurement files and reference files (HDF5), read lazily and validated when opened.

A measurement file holds what a scanner delivers, ``y = M (T x + sigma_y n)``, and nothing else:

- ``measurements`` (N, ...) complex64 or float32, chunked by sample; ``mask`` (N or 1, ...) uint8;
  ``coil_maps`` (N or 1, coils, H, W) complex64; ``noise_std`` (N or scalar) float32, per *real channel*
  (layouts: ``layout.py``);
- attributes: ``format``, ``format_version``, ``operator``, ``design`` (JSON) with ``design_status`` (given,
  estimated or unknown), ``image_shape``, ``scale``, ``subjects``, ``history``, ``geometry`` (JSON:
  orientation, and for each volume its affine, shape, slice axis, slice numbers and first sample).

``scale`` turns stored values into the original units: original = stored * scale. Clean images live in a
*separate* reference file (``images`` (N, C, H, W) float32 or (N, H, W) complex64), which the trainer has no
argument for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.layout import (
    Layout,
    check_coil_map_values,
    check_image_shape,
    check_mask_values,
    check_noise_std,
    check_values,
    complex_to_channels,
)
from ambient_sci.errors import InputError

MEASUREMENT_FORMAT = "ambient_sci measurements"
IMAGE_FORMAT = "ambient_sci images"
FORMAT_VERSION = 1
DESIGN_STATUS = ("given", "estimated", "unknown")
#: Files below this size are read through once when opened; larger ones are checked batch by batch as they are
#: read.
FULL_SCAN_BYTES = 2 << 30
_CHUNK_BYTES = 32 << 20

Indices = int | slice | Sequence[int] | np.ndarray | Tensor | None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _python(value: Any) -> Any:
    """An HDF5 attribute as a plain Python value."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [v.decode() if isinstance(v, bytes) else v for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


class _Hdf5File:
    """A read-only HDF5 file that opens its own handle in each process, so that workers may fork or be
    spawned."""

    kind: str
    attributes: dict[str, Any]  # the root attributes as plain Python values

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._handle: h5py.File | None = None
        self._owner: int | None = None
        try:
            self._load(self._open())
        except InputError as error:
            self.close()
            raise type(error)(f"{self.path}: {_one_line(error)}") from None
        except (OSError, RuntimeError, KeyError, TypeError, UnicodeDecodeError) as error:
            self.close()
            raise InputError(f"{self.path}: damaged file ({_one_line(error)})") from None

    def _load(self, file: h5py.File) -> None:
        raise TypeError("use MeasurementFile or ReferenceFile")

    def _open(self) -> h5py.File:
        """This process's handle. A handle inherited through fork is left to the parent."""
        if self._handle is None or self._owner != os.getpid():
            if not self.path.is_file():
                raise InputError(
                    "no such file" if not self.path.exists() else "expected an HDF5 file, got a folder"
                )
            try:
                self._handle = h5py.File(self.path, "r")
            except OSError as error:
                what = (
                    "truncated or damaged"
                    if "truncated" in str(error)
                    else "not an HDF5 file, or a damaged one"
                )
                raise InputError(f"{what} ({_one_line(error)})") from None
            self._owner = os.getpid()
        return self._handle

    def _read_attributes(self, file: h5py.File) -> dict[str, Any]:
        attributes = {name: _python(value) for name, value in file.attrs.items()}
        found = attributes.get("format")
        if found != self.kind:
            what = f"a file of format {found!r}" if found else f"a foreign HDF5 file with {sorted(file)[:6]}"
            hint = "; `ambient-sci import` reads fastMRI and ISMRMRD files" if not found else ""
            raise InputError(f"expected {self.kind}, got {what}{hint}")
        if attributes.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"expected format version {FORMAT_VERSION}, got {attributes.get('format_version')}"
            )
        return attributes

    def _dataset(self, file: h5py.File, name: str, dtypes: Sequence[type]) -> h5py.Dataset:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"the dataset {name!r} is missing")
        if dataset.dtype not in [np.dtype(d) for d in dtypes]:
            raise InputError(
                f"{name}: expected {' or '.join(d.__name__ for d in dtypes)}, got {dataset.dtype}"
            )
        return dataset

    def _read_common(self, num: int) -> None:
        """The attributes that both kinds of file share: subjects, scale, history, geometry."""
        self._num = num
        self.subjects: list[str] = [str(s) for s in self.attributes.get("subjects") or ["unknown"] * num]
        if len(self.subjects) != num:
            raise InputError(f"subjects: expected {num}, one a sample, got {len(self.subjects)}")
        scale = np.asarray(self.attributes.get("scale", 1.0), dtype=np.float64)
        if scale.shape not in ((), (num,)) or not np.isfinite(scale).all() or (scale <= 0).any():
            raise InputError(
                f"scale: expected one positive number or {num} of them, got {_one_line(ValueError(scale))}"
            )
        #: original units = stored value * scale; a float, or (N,) when it differs between samples.
        self.scale: float | np.ndarray = float(scale) if scale.ndim == 0 else scale
        self.history: str = str(self.attributes.get("history", ""))
        self.geometry: dict[str, Any] = _json(self.attributes.get("geometry") or "{}", "geometry") or {}

    @property
    def orientation(self) -> str:
        """ "RAS" for anatomical slices ``volume[:, :, k]`` (display them with ``np.rot90``), else ""."""
        return str(self.geometry.get("orientation", ""))

    def rows(self, indices: Indices) -> np.ndarray:
        """Sample numbers (B,) for an int, slice, sequence, or None for all."""
        if indices is None:
            return np.arange(self._num)
        if isinstance(indices, slice):
            return np.arange(self._num)[indices]
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        rows = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if rows.ndim != 1 or (rows < -self._num).any() or (rows >= self._num).any():
            raise IndexError(f"{self.path}: samples 0 to {self._num - 1} exist, asked for {indices}")
        return np.where(rows < 0, rows + self._num, rows)

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        dataset = self._open()[name]
        assert isinstance(dataset, h5py.Dataset)
        try:
            if len(rows) and (np.diff(rows) == 1).all():
                return dataset[int(rows[0]) : int(rows[-1]) + 1]
            block = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
            for k, row in enumerate(rows):
                block[k] = dataset[int(row)]
            return block
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot read {name!r}, the file is damaged ({_one_line(error)})"
            ) from None

    def _chunks(self, dataset: h5py.Dataset) -> Iterator[np.ndarray]:
        per_sample = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:])))
        step = max(1, _CHUNK_BYTES // per_sample)
        for start in range(0, len(dataset), step):
            yield np.arange(start, min(start + step, len(dataset)))

    def __len__(self) -> int:
        return self._num

    def close(self) -> None:
        """Close this process's handle; the next read opens it again."""
        if self._handle is not None and self._owner == os.getpid():
            self._handle.close()
        self._handle = None

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_owner": None}


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected JSON, got {str(text)[:60]!r}") from None


class MeasurementFile(_Hdf5File):
    """Measurements with their masks, coil maps and noise levels; validated when opened, read lazily.

    Every array is checked on opening: types, shapes, 0/1 masks, maps, noise levels; and, for files under 2 GB
    (``FULL_SCAN_BYTES``), every value (finite, zero outside the mask). Larger files have their values checked
    as they are read.

    Raises: InputError (one line) for a missing, truncated or foreign file, or any of the above.
    """

    kind = MEASUREMENT_FORMAT

    def _load(self, file: h5py.File) -> None:
        self.attributes = self._read_attributes(file)
        measurements = self._dataset(file, "measurements", (np.complex64, np.float32))
        if measurements.ndim < 3 or len(measurements) == 0:
            raise InputError(f"measurements: expected (N, ...) with N >= 1, got shape {measurements.shape}")
        self.operator_name: str = str(self.attributes.get("operator"))
        self.layout = Layout.infer(
            self.operator_name,
            self.attributes.get("image_shape"),
            measurements.shape[1:],
            measurements.dtype.kind == "c",
        )
        self.image_shape: tuple[int, int, int] = self.layout.image_shape
        self._read_common(len(measurements))
        self._check_masks(file)
        self._check_coil_maps(file)
        if "noise_std" not in file:
            raise InputError("noise_std: the noise level is absent")
        levels = self._dataset(file, "noise_std", (np.float32, np.float64))[()]
        #: noise level of each sample (N,), per real channel
        self.noise_std = torch.from_numpy(check_noise_std(levels, self._num))
        self._check_design()
        self._verified = False
        if self.path.stat().st_size < FULL_SCAN_BYTES:
            for rows in self._chunks(measurements):
                check_values(self._raw_measurements(rows), self._mask_of(rows), int(rows[0]))
            self._verified = True

    def _check_masks(self, file: h5py.File) -> None:
        self._mask_count = 0
        if "mask" not in file and self.operator_name == "identity":
            return
        mask = self._dataset(file, "mask", (np.uint8,))
        if mask.ndim < 3 or len(mask) not in (1, self._num):
            raise InputError(f"mask: expected 1 or {self._num} masks, got shape {mask.shape}")
        self.layout.check_mask_shape(mask.shape[1:])
        self._mask_count = len(mask)
        for rows in self._chunks(mask):
            block = self._read("mask", rows)
            check_mask_values(block, int(rows[0]))
            if self.operator_name == "identity" and not block.all():
                raise InputError(
                    "mask: the operator identity measures everything, but the mask has zeros (use masking)"
                )

    def _check_coil_maps(self, file: h5py.File) -> None:
        self._map_count = 0
        if "coil_maps" not in file:
            if self.layout.coils:
                raise InputError(f"coil_maps: missing, the measurements have {self.layout.coils} coils")
            return
        maps = self._dataset(file, "coil_maps", (np.complex64,))
        if maps.ndim != 4 or len(maps) not in (1, self._num):
            raise InputError(f"coil_maps: expected (1 or {self._num}, coils, H, W), got shape {maps.shape}")
        self.layout.check_coil_maps_shape(maps.shape[1:])
        self._map_count = len(maps)
        for rows in self._chunks(maps):
            check_coil_map_values(self._read("coil_maps", rows), int(rows[0]))

    def _check_design(self) -> None:
        self.design_dict: dict[str, Any] | None = _json(self.attributes.get("design") or "null", "design")
        self.design_status = str(self.attributes.get("design_status", "unknown"))
        if self.design_status not in DESIGN_STATUS:
            raise InputError(
                f"design_status: expected one of {', '.join(DESIGN_STATUS)}, got {self.design_status!r}"
            )

    def _raw_measurements(self, rows: np.ndarray) -> Tensor:
        return self.layout.measurements_to_memory(self._read("measurements", rows))

    def _mask_of(self, rows: np.ndarray) -> Tensor | None:
        if self._mask_count == 0:
            return None
        rows = np.zeros(1, np.int64) if self._mask_count == 1 else rows
        return self.layout.mask_to_memory(self._read("mask", rows))

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
    def nbytes(self) -> int:
        """Bytes of all measurements, masks and coil maps in memory."""
        per_mask = 4 * int(np.prod(self.image_shape[1:]))
        per_map = 8 * (self.coils or 0) * int(np.prod(self.image_shape[1:]))
        return (
            self._num * 4 * int(np.prod(self.measurement_shape))
            + self._mask_count * per_mask
            + self._map_count * per_map
        )

    @property
    def design(self):
        """How the masks were drawn (a MaskDesign), or None when unknown or not needed."""
        if self.design_dict is None:
            return None
        from ambient_sci.operators import design_from_dict

        return design_from_dict(self.design_dict)

    def measurements(self, indices: Indices = None) -> Tensor:
        """y (B, *measurement_shape) float32; zeros where the mask is 0."""
        rows = self.rows(indices)
        y = self._raw_measurements(rows)
        if not self._verified:
            check_values(y, self._mask_of(rows), int(rows[0]) if len(rows) else 0)
        return y

    def sigma(self, indices: Indices = None) -> Tensor:
        """Noise level per real channel, (B,) float32."""
        return self.noise_std[torch.from_numpy(self.rows(indices))]

    def mask(self, indices: Indices = None) -> Tensor:
        """M (1 or B, ...) float32 of 0/1, broadcastable to the measurement; the first axis is 1 when all
        samples share it."""
        mask = self._mask_of(self.rows(indices))
        return torch.ones(1, 1, *self.image_shape[1:]) if mask is None else mask

    def coil_maps(self, indices: Indices = None) -> Tensor | None:
        """Coil maps (1 or B, coils, H, W) complex64, None for anything but multi-coil MRI."""
        if self._map_count == 0:
            return None
        rows = np.zeros(1, np.int64) if self._map_count == 1 else self.rows(indices)
        return torch.from_numpy(self._read("coil_maps", rows))

    def operator(self, indices: Indices = None):
        """The RowMaskedOperator of these samples: same T, their masks and coil maps."""
        from ambient_sci.operators import build_operator

        return build_operator(
            self.operator_name, self.mask(indices), self.image_shape, self.coil_maps(indices), self.design
        )


class ReferenceFile(_Hdf5File):
    """Images, one a sample: clean references for evaluation, or generated samples.

    Raises: InputError for a missing, truncated or foreign file, wrong shapes or types, NaN or infinities.
    """

    kind = IMAGE_FORMAT

    def _load(self, file: h5py.File) -> None:
        self.attributes = self._read_attributes(file)
        images = self._dataset(file, "images", (np.float32, np.complex64))
        if len(images) == 0 or images.ndim != (3 if images.dtype.kind == "c" else 4):
            got = f"{images.shape} {images.dtype}"
            raise InputError(f"images: expected (N, C, H, W) float32 or (N, H, W) complex64, got {got}")
        self._complex = images.dtype.kind == "c"
        self.image_shape = check_image_shape((2, *images.shape[1:]) if self._complex else images.shape[1:])
        self._read_common(len(images))
        self._verified = False
        if self.path.stat().st_size < FULL_SCAN_BYTES:
            for rows in self._chunks(images):
                self.images(rows)
            self._verified = True

    def images(self, indices: Indices = None) -> Tensor:
        """Images (B, C, H, W) float32; complex ones as two channels."""
        rows = self.rows(indices)
        block = self._read("images", rows)
        images = complex_to_channels(block) if self._complex else torch.from_numpy(block)
        if not self._verified and not torch.isfinite(images).all():
            raise InputError("images: NaN or infinite values")
        return images
