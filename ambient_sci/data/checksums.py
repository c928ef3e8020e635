r"""Checksums of what the library writes: a file that carries them is trusted, and checked as it is read.

A writer checks every value it is given. So that readers need not do it again, a finished file records

- a checksum of each sample of each large dataset, in the group ``checksums``: with a row's bytes as words v_j
  of 64 bits and fixed odd a_j,

      c = sum_j a_j v_j   mod 2^64,

  which differs whenever a single word does (odd numbers have inverses), and for any other change but one in
  2^64;
- the attribute ``verified``, written last: a digest of all attributes, of the names, types and shapes of all
  datasets, and of the contents of the small ones, the checksums among them.

Opening a file costs the digest. A sample costs its checksum, less than looking at its values did. HDF5 looks
after the small datasets itself (its Fletcher-32 filter), so a flipped bit there is refused, and a digest that
does not match says that somebody edited the file: it is then checked value by value, like one of foreign
make.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import h5py
import numpy as np

CHECKSUMS = "checksums"
MARK = "verified"


@lru_cache(maxsize=16)
def _weights(words: int) -> np.ndarray:
    """Odd numbers of 64 bits, the same on every machine (splitmix64)."""
    z = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def row_checksums(block: np.ndarray) -> np.ndarray:
    """The checksum of each row of (B, ...), (B,) uint64."""
    rows = np.ascontiguousarray(block).reshape(len(block), math.prod(block.shape[1:])).view(np.uint8)
    if rows.shape[1] % 8:
        rows = np.pad(rows, ((0, 0), (0, 8 - rows.shape[1] % 8)))
    if rows.ctypes.data % 8:
        rows = rows.copy()
    words = rows.view("<u8")
    return np.einsum("bj,j->b", words, _weights(words.shape[1]))  # twice as fast as @ for integers


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
        if f"{CHECKSUMS}/{name}" not in datasets:
            found.update(np.ascontiguousarray(dataset[()]).tobytes())
    return found.hexdigest()
