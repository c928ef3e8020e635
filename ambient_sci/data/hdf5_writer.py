"""An HDF5 file that is written whole or not at all, with the checksums that let readers trust it.

A writer fills a temporary file beside its goal and renames it when it is complete, so a killed job or a bad
sample leaves nothing behind. Samples are appended in blocks, so a data set need never fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from ambient_sci.data.checksums import CHECKSUMS, MARK, digest, row_checksums
from ambient_sci.data.geometry import check_geometry
from ambient_sci.data.hdf5_file import FORMAT_VERSIONS, TEXTS, one_line, plain, scales_in_range
from ambient_sci.data.hdf5_output import Output
from ambient_sci.data.hdf5_safety import entries
from ambient_sci.data.layout import Numbers, to_numpy
from ambient_sci.errors import InputError
from ambient_sci.whole_files import Part, check_output

#: Longer texts are datasets: HDF5 protects those, and attributes up to 64 kB, by checksums of its own.
_LONGEST_ATTRIBUTE = 32_000


class Hdf5Writer:
    """A temporary HDF5 file that takes its name on success and disappears on failure."""

    kind: str

    def __init__(self, path, history: str, geometry: Mapping[str, Any] | None, attributes, overwrite: bool):
        self.path = check_output(path, overwrite)
        self.history = history
        self.geometry = dict(geometry or {})
        self.attributes = dict(attributes or {})
        self._num = 0
        self._names: dict[str, int] = {}  # subjects, numbered as they come
        self._subjects: list[np.ndarray] = []
        self._scales: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._sums: dict[str, list[np.ndarray]] = {}
        self._overwrite = overwrite
        #: files that were made from one of this name; they go when it is replaced
        self.stale: Sequence[Path] = ()
        self._output: Output | None = None
        self._part: Part | None = None

    def __len__(self) -> int:
        return self._num

    def _open(self) -> Output:
        if self._output is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._part = Part(self.path)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({one_line(error)})") from None
            self._output = Output(self._part.path, self.path)
        return self._output

    def _extend(self, name: str, block: np.ndarray, **options: Any) -> None:
        """Append rows to a dataset, and their checksums to what the file will say of them."""
        output = self._open()
        with output.at_work():
            if name not in output.file:
                chunks = (1, *block.shape[1:])
                options = {"maxshape": (None, *block.shape[1:]), "chunks": chunks, **options}
                output.file.create_dataset(name, data=block, **options)
            else:
                dataset = output.file[name]
                assert isinstance(dataset, h5py.Dataset)
                if dataset.shape[1:] != block.shape[1:]:
                    expected = f"expected samples of shape {dataset.shape[1:]} like the first"
                    raise InputError(f"{name}: {expected}, got {block.shape[1:]}")
                dataset.resize(len(dataset) + len(block), axis=0)
                dataset[len(dataset) - len(block) :] = block
        self._sums.setdefault(name, []).append(row_checksums(block))

    def _append_common(
        self, num: int, subjects: Sequence[str] | str | None, scale: Any, labels: Any = None
    ) -> None:
        if subjects is None or isinstance(subjects, str):
            subjects = [subjects or "unknown"] * num
        if len(subjects) != num:
            raise InputError(f"subjects: expected {num}, one a sample, got {len(subjects)}")
        scales = to_numpy(scale, "scale").astype(np.float64)
        if scales.shape not in ((), (num,)) or not scales_in_range(scales):
            raise InputError(f"scale: expected one positive number or {num} of them, got {scale}")
        if (labels is not None) != (len(self._labels) > 0) and self._num:
            raise InputError("labels: expected them for all samples or for none")
        if labels is not None:
            self._labels.append(_checked_labels(labels, num))
        self._num += num
        codes = [self._names.setdefault(str(s), len(self._names)) for s in subjects]
        self._subjects.append(np.array(codes, np.int32))
        self._scales.append(np.broadcast_to(scales, (num,)))

    # -- the end ---------------------------------------------------------------------------------------------

    def _small(self, name: str, data: np.ndarray) -> None:
        """A dataset that is read whole when the file is opened; HDF5 keeps its checksum."""
        self._open().file.create_dataset(name, data=data, fletcher32=True, chunks=True)

    def _text(self, name: str, text: str) -> None:
        """A text of fixed length, or a dataset where it is long: HDF5 protects both, but not its heap."""
        data = text.encode()
        if len(data) > _LONGEST_ATTRIBUTE or b"\0" in data:
            self._small(f"{TEXTS}/{name}", np.frombuffer(data, np.uint8))
        else:
            self._open().file.attrs[name] = np.array(data, f"S{max(len(data), 1)}")

    def _say(self, text: str) -> None:
        """Add to the history."""
        self.history = f"{self.history}; {text}" if self.history else text

    def _say_step(self, file: h5py.File, numbers: Numbers) -> None:
        """What turns uint8 into values, as an attribute and in words."""
        if numbers.name == "uint8":
            file.attrs["step"] = numbers.step
            file.attrs["offset"] = numbers.offset
            plus = f" {numbers.offset:+.9g}" if numbers.offset else ""
            self._say(f"stored as uint8, value = stored x {numbers.step:.9g}{plus}")

    def _finish(self, file: h5py.File) -> None:
        """What is known when all samples are there; subclasses add to it."""
        scales = np.concatenate(self._scales)
        self._text("format", self.kind)
        file.attrs["format_version"] = FORMAT_VERSIONS[-1]
        if (scales == scales[0]).all():
            file.attrs["scale"] = scales[0]
        else:
            self._small("scale", scales)
        self._small("subject", np.concatenate(self._subjects))
        self._small("subject_names", np.frombuffer(json.dumps(list(self._names)).encode(), np.uint8))
        if self._labels:
            self._small("labels", np.concatenate(self._labels))
        self._text("history", self.history)
        check_geometry(self.geometry, self._num)
        self._text("geometry", json.dumps(self.geometry))
        for name, value in self.attributes.items():
            if name in file.attrs or name in (MARK, "step", "offset", "complex_pairs"):
                raise InputError(f"attributes: {name!r} is a name of the format")
            if isinstance(value, str):
                self._text(name, value)
            else:
                file.attrs[name] = value

    def _sign(self, file: h5py.File) -> None:
        """The checksums and, last, the mark over everything."""
        for name, sums in self._sums.items():
            self._small(f"{CHECKSUMS}/{name}", np.concatenate(sums))
        datasets = entries(file, (CHECKSUMS, TEXTS), 1 << 62)
        attributes = {name: plain(value) for name, value in file.attrs.items()}
        for path, dataset in datasets.items():
            if path.startswith(f"{TEXTS}/"):
                attributes[path.partition("/")[2]] = dataset[()].tobytes().decode()
        file.attrs[MARK] = np.bytes_(digest(attributes, datasets).encode())

    def close(self) -> None:
        """Complete the file and give it its name. Raises InputError when nothing was appended."""
        close_together(self)

    def finish(self) -> None:
        """Complete the file, and bring it to the disk, under another name still.

        Raises:
            InputError: nothing was appended, or the disk is full.
        """
        if self._output is None or self._part is None:
            raise InputError(f"{self.path}: no sample to write")
        with self._output.at_work():
            self._finish(self._output.file)
            self._sign(self._output.file)
        self._output.finish()
        check_output(self.path, self._overwrite)
        try:
            self._part.settle()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({one_line(error)})") from None

    def discard(self) -> None:
        """Throw the temporary file away, whatever state it is in."""
        try:
            if self._output is not None:
                self._output.close()
        finally:
            self._output = None
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


def close_together(*writers: Hdf5Writer) -> None:
    """Complete files that belong together and give them their names: all of them, or none.

    Every file is complete on the disk before the first gets its name. Files that they replace go before that,
    from the second on: killed in between, a pair is short of one, never of two generations.

    Raises:
        InputError: nothing was appended to one of them, or the disk is full.
    """
    for writer in writers:
        writer.finish()
    for path in (*(w.path for w in writers[1:]), *(p for w in writers for p in w.stale)):
        path.unlink(missing_ok=True)
    for writer in writers:
        assert writer._part is not None
        writer._part.commit()


def _checked_labels(labels: Any, num: int) -> np.ndarray:
    found = to_numpy(labels, "labels")
    if found.dtype.kind not in "iu" or found.shape != (num,) or (found < 0).any() or (found >= 2**31).any():
        raise InputError(
            f"labels: expected {num} whole numbers from 0, got {found.dtype} of shape {found.shape}"
        )
    return found.astype(np.int32)
