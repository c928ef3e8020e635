"""A file is data, never a pointer to other files, and holds no more than its size allows.

Links, external storage and virtual datasets are refused: following them would read another local file as
measurements. A size that a dataset claims is compared with the size of the file before anything is allocated.
"""

from __future__ import annotations

import math

import h5py

from ambient_sci.errors import InputError

#: What deflate can save at most: a compressed dataset claims no more than this many bytes for each byte of
#: the file.
LARGEST_COMPRESSION = 1032


def plain_dataset(file: h5py.Group, name: str, file_bytes: int) -> h5py.Dataset:
    """A dataset whose values lie in this very file.

    Args:
        file: an open file, or a group of it.
        name: of one of its entries.
        file_bytes: size of the file, which bounds what a dataset can hold.

    Raises:
        InputError: a missing dataset, a soft or external link, external storage, a virtual dataset, or a
            claimed size that the file cannot hold.
    """
    link = file.get(name, getlink=True)
    if link is None:
        raise InputError(f"the dataset {name!r} is missing")
    if not isinstance(link, h5py.HardLink):
        raise InputError(f"{name}: expected data, got a link to another place ({type(link).__name__})")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"the dataset {name!r} is missing (a {type(dataset).__name__} has its name)")
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{name}: expected data, got a dataset whose values lie in other files")
    claimed = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    if claimed > file_bytes * (LARGEST_COMPRESSION if _compressed(dataset) else 1):
        raise InputError(f"{name}: claims {claimed} bytes, more than a file of {file_bytes} bytes can hold")
    return dataset


def _compressed(dataset: h5py.Dataset) -> bool:
    settings = dataset.id.get_create_plist()
    filters = {settings.get_filter(k)[0] for k in range(settings.get_nfilters())}
    return bool(filters - {h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_SHUFFLE})


def plain_group(file: h5py.Group, name: str) -> h5py.Group:
    """A group of this very file; InputError for anything else of its name."""
    group = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(group, h5py.Group):
        raise InputError(f"{name}: expected a group of datasets, got something else")
    return group


def entries(file: h5py.File, groups: tuple[str, ...], file_bytes: int) -> dict[str, h5py.Dataset]:
    """The datasets of the root and of the named groups by path, each of them plain.

    Raises:
        InputError: one that `plain_dataset` refuses; groups of other names are left alone.
    """
    found: dict[str, h5py.Dataset] = {}
    for name in file:
        if name in groups:
            group = plain_group(file, name)
            found |= {f"{name}/{k}": plain_dataset(group, k, file_bytes) for k in group}
        elif not (
            isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Group)
        ):
            found[name] = plain_dataset(file, name, file_bytes)
    return found
