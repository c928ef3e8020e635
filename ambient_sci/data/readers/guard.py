"""The border to foreign files: what may be opened, how much it may claim to hold, and one line for whatever
goes wrong.

Formats say how large their content is before it is read. A claim is believed when the file is large enough to
hold it: at most ``RATIO`` bytes for each stored one (compression, sparse data), or ``FREE_BYTES`` in all, and
never more than the limit (16 GB; AMBIENT_SCI_MAX_GB sets another).
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.errors import InputError

FREE_BYTES = 256 << 20
RATIO = 100
LIMIT_VARIABLE = "AMBIENT_SCI_MAX_GB"


def one_line(error: object, length: int = 200) -> str:
    """A message as one printable line: control characters (terminal escapes) are written out."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= length else text[: length - 3] + "..."


@contextmanager
def reading(path: Any, what: str) -> Iterator[None]:
    """Around calls into a library that reads ``path``: anything it raises becomes one InputError that names
    the file.

    Libraries raise errors of every kind for damaged files, so every kind is caught; keep the block small.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: not a readable {what} (more memory needed than there is)") from None
    except Exception as error:
        detail = re.sub(r" <[^<>]* object at 0x[0-9a-f]+>", "", one_line(error)) or type(error).__name__
        raise InputError(f"{path}: not a readable {what} ({detail})") from None


@contextmanager
def naming(path: Any) -> Iterator[None]:
    """Errors about the content of ``path`` name it."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file; InputError for pipes, devices (also behind links), empty and
    missing files."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{one_line(path)}: cannot be opened ({one_line(error)})") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: expected a regular file, got a folder, pipe or device")
    if found.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return found.st_size


def check_claim(path: Any, shape: Sequence[int], itemsize: int, stored: int, what: str = "data") -> None:
    """InputError when an array of this shape cannot honestly come from ``stored`` bytes, or is beyond the
    limit.

    Raises: InputError for negative sizes or an unreasonable claim.
    """
    if any(int(n) < 0 for n in shape):
        raise InputError(f"{path}: expected sizes >= 0 of {what}, got {tuple(shape)}")
    claimed = math.prod(int(n) for n in shape) * itemsize
    try:
        limit = int(float(os.environ.get(LIMIT_VARIABLE, "16")) * (1 << 30))
    except (ValueError, OverflowError):
        raise InputError(f"{LIMIT_VARIABLE}: expected a number, got {os.environ[LIMIT_VARIABLE]!r}") from None
    if claimed > limit:
        size = f"{claimed / (1 << 30):.3g} GB"
        raise InputError(
            f"{path}: {what} of {size} is above the limit of {limit / (1 << 30):.3g} GB ({LIMIT_VARIABLE})"
        )
    if claimed > FREE_BYTES and claimed > RATIO * stored and LIMIT_VARIABLE not in os.environ:
        raise InputError(
            f"{path}: claims {claimed >> 20} MB of {what} in {max(stored >> 10, 1)} kB, which looks like a "
            "bomb "
            f"(set {LIMIT_VARIABLE} if it is not)"
        )


def say(notes: list[str], origin: Any, text: str) -> None:
    """Record what was left out or guessed, and warn of it."""
    notes.append(text)
    warnings.warn(f"{origin}: {text}", stacklevel=3)


def listed(names: Sequence[Any], most: int = 3) -> str:
    """Some names and how many more."""
    rest = len(names) - most
    return ", ".join(one_line(n, 80) for n in names[:most]) + (f" and {rest} more" if rest > 0 else "")


# -- HDF5


@contextmanager
def open_hdf5(path: Path, what: str = "HDF5 file") -> Iterator[h5py.File]:
    """A foreign HDF5 file for reading. Whatever HDF5 raises in the block becomes one InputError."""
    check_regular(path)
    _check_heaps(path)
    with reading(path, what):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            state = "truncated" if "truncated" in str(error) else "not an HDF5 file, or a damaged one"
            raise InputError(f"{path}: {state} ({one_line(error)})") from None
        with file:
            yield file


def _check_heaps(path: Path) -> None:
    """InputError for damaged global heaps, where strings and readouts of any length lie: HDF5 loops for ever
    in some of them.

    A heap is GCOL, version 1, its size; then objects, each with index, count, size and data in steps of 8
    bytes. Index 0 is free space.
    """
    magic = b"GCOL\x01\x00\x00\x00"
    with (
        reading(path, "HDF5 file"),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        start = data.find(magic)
        while start >= 0:
            (size,) = struct.unpack_from("<Q", data, start + 8)
            at, end = start + 16, start + size
            if not 16 <= size <= len(data) - start:
                raise InputError(f"{path}: damaged HDF5 file (a heap of {size} bytes)")
            while at + 16 <= end:
                index, _, _, length = struct.unpack_from("<HHIQ", data, at)
                step = length if index == 0 else 16 + (length + 7) // 8 * 8
                if not 16 <= step <= end - at:
                    raise InputError(
                        f"{path}: damaged HDF5 file (an object of {length} bytes in a heap of {size})"
                    )
                at += step
            start = data.find(magic, end)


def hdf5_member(group: h5py.Group, name: str, path: Path) -> h5py.Group | h5py.Dataset | None:
    """The member of a group that lies in this very file, None when there is none.

    Raises: InputError for soft and external links, virtual data sets and external storage: they would read
        other files.
    """
    link = group.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise InputError(f"{path}: {name!r} is a {type(link).__name__}, which can read another file; refused")
    member = group[name]
    if isinstance(member, h5py.Dataset) and (member.is_virtual or member.external):
        kind = "virtual" if member.is_virtual else "stored outside"
        raise InputError(f"{path}: the data set {name!r} is {kind}, which can read another file; refused")
    return member if isinstance(member, (h5py.Group, h5py.Dataset)) else None


def hdf5_array(group: h5py.Group, name: str, path: Path) -> np.ndarray | None:
    """A data set as an array, its size checked before it is read; None when there is none."""
    member = hdf5_member(group, name, path)
    if member is None:
        return None
    if not isinstance(member, h5py.Dataset):
        raise InputError(f"{path}: expected a data set {name!r}, got a group")
    check_claim(path, member.shape or (), member.dtype.itemsize, member.id.get_storage_size(), repr(name))
    with reading(path, f"data set {name!r}"):
        return np.asarray(member[()])


def check_lengths(dataset: h5py.Dataset, path: Path) -> None:
    """InputError when records claim sequences longer than the file: HDF5 would allocate them before it looks.

    On disk a sequence is its length (4 bytes) and where it lies. Records behind a filter are not looked into.
    """
    kind = dataset.id.get_type()
    if not isinstance(kind, h5py.h5t.TypeCompoundID) or dataset.ndim != 1:
        return
    members = range(kind.get_nmembers())
    offsets = [kind.get_member_offset(m) for m in members if kind.get_member_class(m) == h5py.h5t.VLEN]
    stored, size = path.stat().st_size, kind.get_size()
    for block in _raw_records(dataset, path, size):
        count = len(block) // size
        for offset in offsets:
            lengths = np.ndarray((count,), "<u4", block, offset, (size,))
            if count and int(lengths.max()) > stored:
                raise InputError(
                    f"{path}: damaged HDF5 file (a sequence of {lengths.max()} values in {stored} bytes)"
                )


def _raw_records(dataset: h5py.Dataset, path: Path, size: int) -> Iterator[bytes]:
    """The bytes of unfiltered records as they lie in the file."""
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is not None:
            with path.open("rb") as file:
                file.seek(start)
                yield file.read(len(dataset) * size)
    elif dataset.id.get_create_plist().get_nfilters() == 0:
        for number in range(dataset.id.get_num_chunks()):
            place = dataset.id.get_chunk_info(number).chunk_offset
            yield dataset.id.read_direct_chunk(place)[1]
