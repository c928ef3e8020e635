"""A list of measurement files as one data set, e.g. the shards of one that is too large for a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.files import MeasurementFile
from ambient_sci.data.hdf5_file import Indices
from ambient_sci.data.prompts import Prompts
from ambient_sci.errors import InputError
from ambient_sci.priors.given import Prompt


class MeasurementFiles:
    """Several measurement files, one after the other, with the interface of `MeasurementFile`.

    Sample i is sample i - offset of the file it lies in; offsets are the cumulated sizes.

    Args:
        files: paths, or open files. They must agree in operator, shapes, mask design, labels (all or none),
            prompts (all or none, of one shape) and in whether noise differs by entry.

    Raises:
        InputError: no file, one that cannot be read, or files that do not agree.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str] | MeasurementFile]):
        if isinstance(files, (str, bytes)) or not len(files):
            raise InputError("measurements: expected a list of measurement files, got none")
        self.files = [f if isinstance(f, MeasurementFile) else MeasurementFile(f) for f in files]
        first = self.files[0]
        for file in self.files[1:]:
            for what, ours, theirs in zip(_FACTS, _facts(first), _facts(file), strict=True):
                if ours != theirs:
                    raise InputError(f"{file.path}: expected {what} {ours} as in {first.path}, got {theirs}")
        self.offsets = np.cumsum([0] + [len(f) for f in self.files])
        self.operator_name = first.operator_name
        self.image_shape = first.image_shape
        self.measurement_shape = first.measurement_shape
        self.coils = first.coils
        self.noise_by_entry = first.noise_by_entry
        self.noise_std = torch.cat([f.noise_std for f in self.files])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def design(self):
        """How the masks were drawn, see `MeasurementFile`."""
        return self.files[0].design

    @property
    def subjects(self) -> list[str]:
        """The subject of each sample; one name in two files is one person."""
        return [s for f in self.files for s in f.subjects]

    @property
    def scale(self) -> float | np.ndarray:
        """Original units over values: a float, or (N,) where it differs."""
        scales = np.concatenate([np.broadcast_to(np.asarray(f.scale), (len(f),)) for f in self.files])
        return float(scales[0]) if (scales == scales[0]).all() else scales

    @property
    def nbytes(self) -> int:
        """Bytes of everything in memory."""
        return sum(f.nbytes for f in self.files)

    @property
    def shared_mask(self) -> bool:
        """Never: each file has masks of its own, even if it is one."""
        return len(self.files) == 1 and self.files[0].shared_mask

    @property
    def measured_fraction(self) -> float:
        """Measured entries over all entries; 1 exactly if nothing is missing."""
        parts = [f.measured_fraction for f in self.files]
        if all(p == 1 for p in parts):
            return 1.0
        return sum(p * len(f) for p, f in zip(parts, self.files, strict=True)) / len(self)

    @property
    def checksum(self) -> str | None:
        """The digest of all files, or None if one carries none."""
        sums = [f.checksum for f in self.files]
        if any(s is None for s in sums):
            return None
        return hashlib.blake2b("".join(map(str, sums)).encode(), digest_size=16).hexdigest()

    def rows(self, indices: Indices) -> np.ndarray:
        """Sample numbers (B,) for an int, slice, sequence, or None for all."""
        if indices is None or isinstance(indices, slice):
            return np.arange(len(self))[slice(None) if indices is None else indices]
        rows = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if rows.ndim != 1 or (rows < -len(self)).any() or (rows >= len(self)).any():
            raise IndexError(f"samples 0 to {len(self) - 1} exist, asked for {indices}")
        return np.where(rows < 0, rows + len(self), rows)

    def _parts(self, indices: Indices) -> tuple[list[tuple[MeasurementFile, np.ndarray]], Tensor]:
        """The files that hold the samples with their rows there, and the order that puts them back."""
        rows = self.rows(indices)
        which = np.searchsorted(self.offsets, rows, side="right") - 1
        order = np.argsort(which, kind="stable")
        parts = [(self.files[k], rows[order][which[order] == k] - self.offsets[k]) for k in np.unique(which)]
        return parts, torch.from_numpy(np.argsort(order))

    def _gathered(self, indices: Indices, name: str, empty: Tensor | None = None) -> Tensor:
        parts, back = self._parts(indices)
        blocks = [getattr(file, name)(rows) for file, rows in parts]
        # What one file says once for all its samples is said for each of them.
        blocks = [b.expand(len(rows), *b.shape[1:]) for b, (_, rows) in zip(blocks, parts, strict=True)]
        return torch.cat(blocks)[back]

    def measurements(self, indices: Indices = None) -> Tensor:
        """y (B, *measurement_shape) float32."""
        return self._gathered(indices, "measurements")

    def sigma(self, indices: Indices = None) -> Tensor:
        """Noise level per real channel: (B,), or of the shape of y where it differs by entry."""
        return self._gathered(indices, "sigma")

    def labels(self, indices: Indices = None) -> Tensor | None:
        """Class of each sample (B,) int64, or None."""
        return None if self.files[0].labels([0]) is None else self._gathered(indices, "labels")

    def prompts(self, indices: Indices = None) -> Prompt | None:
        """The prompt of each of these samples, or None."""
        if self.files[0].prompts([0]) is None:
            return None
        parts, back = self._parts(indices)
        found: list[Any] = [file.prompts(rows) for file, rows in parts]

        def together(name: str) -> Tensor | None:
            tensors = [getattr(one, name) for one in found]
            return None if tensors[0] is None else torch.cat(tensors)[back]

        tokens = together("tokens")
        assert tokens is not None
        return Prompt(tokens, together("pooled"), together("time_ids"))

    def all_prompts(self) -> Prompts | None:
        """The prompts of all samples, the texts of each file once; None where there are none."""
        found = [file.all_prompts() for file in self.files]
        return None if found[0] is None else Prompts.joined([p for p in found if p is not None])

    def mask(self, indices: Indices = None) -> Tensor:
        """M (B, ...) float32 of 0/1."""
        return self._gathered(indices, "mask")

    def coil_maps(self, indices: Indices = None) -> Tensor | None:
        """Coil maps (B, coils, H, W) complex64, None for anything but multi-coil MRI."""
        return None if self.coils is None else self._gathered(indices, "coil_maps")

    def operator(self, indices: Indices = None):
        """The RowMaskedOperator of these samples."""
        from ambient_sci.operators import MRI, Masking

        parts, _ = self._parts(indices)
        if len(parts) == 1 or self.operator_name == "identity":
            return parts[0][0].operator(parts[0][1])
        if self.operator_name == "masking":
            return Masking._trusted(self.mask(indices), self.image_shape, self.design)
        isometry = all(file.isometric(rows) for file, rows in parts)
        return MRI._trusted(
            self.mask(indices), self.coil_maps(indices), self.design, isometry=isometry, own=True
        )

    def close(self) -> None:
        """Close the handles of this process."""
        for file in self.files:
            file.close()

    def __enter__(self) -> MeasurementFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_FACTS = (
    "operator",
    "image shape",
    "measurement shape",
    "mask design",
    "labels",
    "noise by entry",
    "prompts",
)


def _facts(file: MeasurementFile) -> tuple[Any, ...]:
    labelled = "labels" if file.labels([0]) is not None else "no labels"
    shape = tuple(file.measurement_shape)
    prompt = file.prompts([0])
    told = None if prompt is None else [None if t is None else tuple(t.shape) for t in vars(prompt).values()]
    return (
        file.operator_name,
        file.image_shape,
        shape,
        file.design_dict,
        labelled,
        file.noise_by_entry,
        "no prompts" if told is None else f"prompts of {told}",
    )
