"""A read-only HDF5 file of the library's own format: handles, attributes, rows checked as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.checksums import CHECKSUMS, KINDS, MARK, digest, row_checksums
from ambient_sci.data.geometry import check_geometry
from ambient_sci.data.hdf5_safety import entries, plain_dataset, plain_group
from ambient_sci.errors import InputError
from ambient_sci.numbers import check_numbers

#: Versions that are read. Version 1 keeps subjects and scales as attributes and has no checksums.
FORMAT_VERSIONS = (1, 2)
#: Files with checksums are compared with them when opened up to this size; larger ones as they are read.
FULL_CHECK_BYTES = 64 << 20
FULL_CHECK_ROWS = 4096
TEXTS = "texts"
LARGEST_SCALE = 1e37
_CHUNK_BYTES = 32 << 20
#: Rows of fewer values are read together where they follow each other.
_SMALL_ROW = 1 << 15

Indices = int | slice | Sequence[int] | np.ndarray | Tensor | None


def one_line(error: BaseException) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())


def parse_json(text: str, name: str) -> Any:
    """JSON, or an InputError that says where it was expected."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{name}: expected JSON, got {str(text)[:60]!r}") from None


def plain(value: Any) -> Any:
    """An HDF5 attribute as a plain Python value."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [v.decode() if isinstance(v, bytes) else v for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def scales_in_range(scale: np.ndarray) -> bool:
    """Whether these are positive numbers that single precision, which volumes are written in, can hold."""
    return bool(((scale >= 1 / LARGEST_SCALE) & (scale <= LARGEST_SCALE)).all())


def format_of(file: h5py.File) -> str | None:
    """The attribute ``format`` of an HDF5 file, whichever way its text is stored; None without one."""
    found = plain(file.attrs.get("format"))
    return found if isinstance(found, str) else None


def _scattered(
    dataset: h5py.Dataset, rows: np.ndarray, checksum: Callable[[np.ndarray], int] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of a dataset in any order, each read into its place, and their checksums.

    h5py's own indexing would copy each row there; and a row that was just read is in the processor's cache.
    """
    shape = dataset.shape[1:]
    block = np.empty((len(rows), *shape), dataset.dtype)
    sums = None if checksum is None else np.empty(len(rows), np.uint64)
    target, space = h5py.h5s.create_simple((1, *shape)), dataset.id.get_space()
    kind, corner = h5py.h5t.py_create(dataset.dtype), (0,) * len(shape)
    for k, row in enumerate(rows):
        space.select_hyperslab((int(row), *corner), (1, *shape))
        dataset.id.read(target, space, block[k : k + 1], kind)
        if checksum is not None and sums is not None:
            sums[k] = checksum(block[k])
    return block, sums


class Hdf5File:
    """A read-only HDF5 file with a handle in each process, so that workers may fork or be spawned."""

    kind: str
    attributes: dict[str, Any]  # the root attributes as plain Python values

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._handle: h5py.File | None = None
        self._owner: int | None = None
        self._checksums: dict[str, np.ndarray] = {}
        self._checksum_kind = CHECKSUMS
        try:
            self._load(self._open())
        except InputError as error:
            self.close()
            raise type(error)(self._placed(one_line(error))) from None
        except MemoryError:
            self.close()
            raise InputError(f"{self.path}: too large for the memory of this machine") from None
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            self.close()
            raise InputError(f"{self.path}: damaged file ({one_line(error)})") from None

    def _placed(self, text: str) -> str:
        return text if text.startswith(str(self.path)) else f"{self.path}: {text}"

    def _load(self, file: h5py.File) -> None:
        raise TypeError("use MeasurementFile or ReferenceFile")

    def _check_values(self, name: str, block: np.ndarray, rows: np.ndarray) -> None:
        """Raise InputError unless these rows of a dataset hold values that its kind may have."""
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
                cut = "truncated" in str(error)
                what = "truncated or damaged" if cut else "not an HDF5 file, or a damaged one"
                raise InputError(f"{what} ({one_line(error)})") from None
            self._owner = os.getpid()
        return self._handle

    # -- attributes ------------------------------------------------------------------------------------------

    def _read_attributes(self, file: h5py.File) -> dict[str, Any]:
        attributes = {name: plain(value) for name, value in file.attrs.items()}
        found = attributes.get("format")
        if found != self.kind:
            what = f"a file of format {found!r}" if found else f"a foreign HDF5 file with {sorted(file)[:6]}"
            hint = "; `ambient-sci import` reads fastMRI and ISMRMRD files" if not found else ""
            raise InputError(f"expected {self.kind}, got {what}{hint}")
        version = attributes.get("format_version")
        if version not in FORMAT_VERSIONS:
            raise InputError(
                f"expected format version {' or '.join(map(str, FORMAT_VERSIONS))}, got {version}"
            )
        self._read_mark(file, attributes)
        return attributes

    def _read_mark(self, file: h5py.File, attributes: dict[str, Any]) -> None:
        """Look at every entry, fetch long attributes, and take over the checksums of an unchanged file."""
        datasets = entries(file, (*KINDS, TEXTS), self._file_bytes)
        for path, dataset in datasets.items():
            if path.startswith(f"{TEXTS}/"):
                attributes[path.partition("/")[2]] = dataset[()].tobytes().decode()
        #: as its writer left it, so that opening it reads no values again
        self.trusted = attributes.get(MARK) is not None and attributes[MARK] == digest(attributes, datasets)
        kind = next((kind for kind in KINDS if kind in file), None)
        if self.trusted and kind is not None:
            self._checksums = {name: datasets[f"{kind}/{name}"][()] for name in plain_group(file, kind)}
            self._checksum_kind = kind

    def _has(self, file: h5py.File, name: str) -> bool:
        return file.get(name, getlink=True) is not None

    def _dataset(self, file: h5py.Group, name: str, dtypes: Sequence[type]) -> h5py.Dataset:
        dataset = plain_dataset(file, name, self._file_bytes)
        if dataset.dtype not in [np.dtype(d) for d in dtypes]:
            wanted = " or ".join(d.__name__ for d in dtypes)
            raise InputError(f"{name}: expected {wanted}, got {dataset.dtype}")
        return dataset

    @property
    def _file_bytes(self) -> int:
        return self.path.stat().st_size

    def _read_common(self, file: h5py.File, num: int) -> None:
        """What both kinds of file share: subjects, scale, history, geometry, labels."""
        self._num = num
        self._read_subjects(file)
        scale = self.attributes.get("scale", 1.0)
        if self._has(file, "scale"):
            scale = self._dataset(file, "scale", (np.float64,))[()]
        scale = np.asarray(scale, dtype=np.float64)
        if scale.shape not in ((), (num,)) or not scales_in_range(scale):
            raise InputError(
                f"scale: expected one positive number or {num} of them, got {one_line(ValueError(scale))}"
            )
        #: original units = stored value * scale; a float, or (N,) when it differs between samples.
        self.scale: float | np.ndarray = float(scale) if scale.ndim == 0 else scale
        self.history: str = str(self.attributes.get("history", ""))
        self.geometry: dict[str, Any] = parse_json(self.attributes.get("geometry") or "{}", "geometry") or {}
        check_numbers(self.geometry, "geometry")
        check_geometry(self.geometry, num)
        self._labels: np.ndarray | None = None
        if self._has(file, "labels"):
            self._labels = self._dataset(file, "labels", (np.int32,))[()]
            if self._labels.shape != (num,):
                raise InputError(f"labels: expected ({num},), one a sample, got shape {self._labels.shape}")

    def _read_subjects(self, file: h5py.File) -> None:
        """Codes and names; the names are decoded when somebody asks for them."""
        self._subject_list: list[str] | None = None
        self._subject_text = b""
        if self._has(file, "subject") and "subjects" not in self.attributes:
            #: which subject each sample is of, (N,), a number into `subject_names`
            self.subject_codes = self._dataset(file, "subject", (np.int32,))[()]
            self._subject_text = self._dataset(file, "subject_names", (np.uint8,))[()].tobytes()
        else:
            names = [str(s) for s in self.attributes.get("subjects") or ["unknown"] * self._num]
            numbers: dict[str, int] = {}
            self.subject_codes = np.array([numbers.setdefault(s, len(numbers)) for s in names], np.int32)
            self._subject_text = json.dumps(list(numbers)).encode()
        if self.subject_codes.shape != (self._num,):
            raise InputError(f"subjects: expected {self._num}, one a sample, got {self.subject_codes.size}")

    @property
    def subject_names(self) -> list[str]:
        """The different subjects, in the order in which they appear first."""
        names = parse_json(self._subject_text.decode(), "subject_names")
        if not isinstance(names, list) or not 0 <= self.subject_codes.min() <= self.subject_codes.max() < len(
            names
        ):
            raise InputError(f"{self.path}: subjects: expected a name for every number, got other names")
        return [str(n) for n in names]

    @property
    def subjects(self) -> list[str]:
        """The subject of each sample."""
        if self._subject_list is None:
            names = self.subject_names
            self._subject_list = [names[k] for k in self.subject_codes.tolist()]
        return self._subject_list

    @property
    def orientation(self) -> str:
        """ "RAS" for anatomical slices ``volume[:, :, k]`` (display them with ``np.rot90``), else ""."""
        return str(self.geometry.get("orientation", ""))

    # -- trust -----------------------------------------------------------------------------------------------

    @property
    def checksum(self) -> str | None:
        """A digest of the values of all samples, not of attributes; None if the file carries none."""
        if not self._checksums:
            return None
        found = hashlib.blake2b(digest_size=16)
        for name in sorted(self._checksums):
            found.update(name.encode() + self._checksums[name].tobytes())
        return found.hexdigest()

    def _check_rows(self, name: str, file: h5py.File) -> None:
        """Read a dataset through: all values of a file without checksums, the checksums of a small one."""
        dataset = file[name]
        assert isinstance(dataset, h5py.Dataset)
        small = self._file_bytes < FULL_CHECK_BYTES and len(dataset) <= FULL_CHECK_ROWS
        if self.trusted and not small:
            return
        for rows in self._chunks(dataset):
            block = self._read(name, rows)
            if not self.trusted:
                self._check_values(name, block, rows)

    # -- rows ------------------------------------------------------------------------------------------------

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

    def labels(self, indices: Indices = None) -> Tensor | None:
        """Class of each sample (B,) int64, or None for a file without labels."""
        if self._labels is None:
            return None
        return torch.from_numpy(self._labels[self.rows(indices)].astype(np.int64))

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a dataset as they are stored, compared with their checksums where there are any."""
        dataset = self._open()[name]
        assert isinstance(dataset, h5py.Dataset)
        expected, small = self._checksums.get(name), math.prod(dataset.shape[1:]) < _SMALL_ROW
        try:
            if small and len(rows) and (np.diff(rows) == 1).all():
                block = dataset[int(rows[0]) : int(rows[-1]) + 1]
                sums = None if expected is None else row_checksums(block, self._checksum_kind)
            else:
                checksum = None if expected is None else KINDS[self._checksum_kind]
                block, sums = _scattered(dataset, rows, checksum)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{self.path}: cannot read {name!r}, the file is damaged ({one_line(error)})"
            ) from None
        if expected is not None:
            wrong = np.flatnonzero(sums != expected[rows])
            if len(wrong):
                self._refuse(name, block[wrong[:1]], rows[wrong[:1]])
        return block

    def _refuse(self, name: str, block: np.ndarray, rows: np.ndarray) -> None:
        """The error of a row that is not what was written: what is impossible about it, if anything is."""
        try:
            self._explain(name, block, rows)
        except InputError as error:
            raise InputError(self._placed(str(error))) from None
        raise InputError(
            f"{self.path}: {name}: sample {int(rows[0])} is not what was written (its checksum differs): the "
            "file is "
            f"damaged, or was edited by hand (without its attribute {MARK!r} it is checked value by value "
            "instead)"
        )

    def _explain(self, name: str, block: np.ndarray, rows: np.ndarray) -> None:
        """Raise InputError if these rows cannot be right, whatever else the file holds."""
        self._check_values(name, block, rows)

    def _chunks(self, dataset: h5py.Dataset) -> Iterator[np.ndarray]:
        per_sample = max(1, dataset.dtype.itemsize * math.prod(dataset.shape[1:]))
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
