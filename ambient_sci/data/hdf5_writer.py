"""An HDF5 file that is written whole or not at all.

A writer fills a temporary file beside its goal and renames it when it is complete, so a killed job or a bad sample
leaves nothing behind. Samples are appended in blocks, so a data set need never fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import h5py
import numpy as np

from ambient_sci.data.files import FORMAT_VERSION
from ambient_sci.data.layout import to_numpy
from ambient_sci.errors import InputError
from ambient_sci.whole_files import Part, check_output


class Hdf5Writer:
    """A temporary HDF5 file that takes its name on success and disappears on failure."""

    kind: str

    def __init__(self, path, history: str, geometry: Mapping[str, Any] | None, attributes, overwrite: bool):
        self.path = check_output(path, overwrite)
        self.history = history
        self.geometry = dict(geometry or {})
        self.attributes = dict(attributes or {})
        self.subjects: list[str] = []
        self._scales: list[float] = []
        self._overwrite = overwrite
        self._file: h5py.File | None = None
        self._part: Part | None = None

    def __len__(self) -> int:
        return len(self.subjects)

    def _open(self) -> h5py.File:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Version 1.10 of the format stores attributes of more than 64 kB (the subjects of a large data
            # set).
            self._part = Part(self.path)
            self._file = h5py.File(self._part.path, "w", libver="v110", locking=False)
        return self._file

    def _extend(self, name: str, block: np.ndarray, **options: Any) -> None:
        file = self._open()
        if name not in file:
            file.create_dataset(
                name, data=block, maxshape=(None, *block.shape[1:]), chunks=(1, *block.shape[1:]), **options
            )
            return
        dataset = file[name]
        assert isinstance(dataset, h5py.Dataset)
        if dataset.shape[1:] != block.shape[1:]:
            raise InputError(
                f"{name}: expected samples of shape {dataset.shape[1:]} like the first, got {block.shape[1:]}"
            )
        dataset.resize(len(dataset) + len(block), axis=0)
        dataset[len(dataset) - len(block) :] = block

    def _append_common(self, num: int, subjects: Sequence[str] | str | None, scale: Any) -> None:
        subjects = (
            ["unknown"] * num
            if subjects is None
            else [subjects] * num
            if isinstance(subjects, str)
            else list(subjects)
        )
        if len(subjects) != num:
            raise InputError(f"subjects: expected {num}, one a sample, got {len(subjects)}")
        scales = (
            np.broadcast_to(to_numpy(scale, "scale").astype(np.float64), (num,))
            if np.ndim(scale) == 0
            else np.asarray(scale)
        )
        if scales.shape != (num,) or not np.isfinite(scales).all() or (scales <= 0).any():
            raise InputError(f"scale: expected one positive number or {num} of them, got {scale}")
        self.subjects += [str(s) for s in subjects]
        self._scales += [float(s) for s in scales]

    def _finish_attributes(self, file: h5py.File) -> None:
        scales = np.asarray(self._scales)
        file.attrs["format"] = self.kind
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["scale"] = scales[0] if (scales == scales[0]).all() else scales
        file.attrs["subjects"] = np.array(self.subjects, dtype=h5py.string_dtype())
        file.attrs["history"] = self.history
        file.attrs["geometry"] = json.dumps(self.geometry)
        for name, value in self.attributes.items():
            if name in file.attrs:
                raise InputError(f"attributes: {name!r} is a name of the format")
            file.attrs[name] = value

    def close(self) -> None:
        """Complete the file and give it its name. Raises InputError when nothing was appended."""
        if self._file is None or self._part is None:
            raise InputError(f"{self.path}: no sample to write")
        self._finish_attributes(self._file)
        self._file.close()
        self._file = None
        check_output(self.path, self._overwrite)
        self._part.commit()

    def discard(self) -> None:
        """Throw the temporary file away."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._part is not None:
            self._part.discard()

    def __enter__(self):
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> Literal[False]:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()
        return False
