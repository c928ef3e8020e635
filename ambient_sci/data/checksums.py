r"""Checksums of what the library writes: a file that carries them is trusted, and checked as it is read.

A writer checks every value it is given. So that readers need not do it again, a finished file records

- a checksum of each sample of each large dataset, the hash XXH3 (64 bits) of its bytes as they are stored, in
  the group ``xxh3_64``;
- the attribute ``verified``, written last: a digest of all attributes, of the names, types and shapes of all
  datasets, and of the contents of the small ones, the checksums among them.

Files of earlier versions have sums of their words v_j of 64 bits instead, in the group ``checksums``, with
fixed odd a_j:

    c = sum_j a_j v_j   mod 2^64

Opening a file costs the digest. A sample costs its checksum, a tenth of reading it at most. HDF5 looks after
the small datasets itself (its Fletcher-32 filter), so a flipped bit there is refused, and a digest that does
not match says that somebody edited the file: it is then checked value by value, like one of foreign make.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import h5py
import numpy as np
import xxhash

MARK = "verified"


@lru_cache(maxsize=16)
def _weights(words: int) -> np.ndarray:
    """Odd numbers of 64 bits, the same on every machine (splitmix64)."""
    z = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def row_sum(row: np.ndarray) -> int:
    """The sum of words of an array that lies in one piece: the checksum of earlier versions."""
    data = row.reshape(-1).view(np.uint8)
    if len(data) % 8:
        data = np.pad(data, (0, 8 - len(data) % 8))
    words = (data if data.ctypes.data % 8 == 0 else data.copy()).view("<u8")
    return int(np.einsum("j,j->", words, _weights(len(words))))  # twice as fast as @ for integers


#: How checksums are computed, by the group that holds them; the first is written.
KINDS: dict[str, Callable[[np.ndarray], int]] = {
    "xxh3_64": cast(Any, xxhash.xxh3_64_intdigest),
    "checksums": row_sum,
}
CHECKSUMS = next(iter(KINDS))


def row_checksums(block: np.ndarray, kind: str = CHECKSUMS) -> np.ndarray:
    """The checksum of each row of (B, ...), (B,) uint64."""
    return np.array([KINDS[kind](row) for row in np.ascontiguousarray(block)], np.uint64)


def digest(attributes: Mapping[str, Any], datasets: Mapping[str, h5py.Dataset]) -> str:
    """What the attribute ``verified`` holds.

    Args:
        attributes: the root attributes as Python values.
        datasets: all datasets by path, see `hdf5_safety.entries`.
    """
    found = hashlib.blake2b(digest_size=16)
    texts = {name: value for name, value in attributes.items() if name != MARK}
    found.update(json.dumps(texts, sort_keys=True, default=str).encode())
    for name, dataset in sorted(datasets.items()):
        found.update(f"|{name} {dataset.dtype.str} {dataset.shape}".encode())
        if not any(f"{kind}/{name}" in datasets for kind in KINDS):
            found.update(np.ascontiguousarray(dataset[()]).tobytes())
    return found.hexdigest()
