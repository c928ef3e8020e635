r"""Exact nearest neighbours of features by cosine similarity, in bounded memory.

    s(q, r) = q . r / (|q| |r|)

The references are read once, block by block, from wherever they lie (an array, a memory map, float16 or
float32), so their number is limited by the disk and not by memory. Products are in float32 with a few
candidates to spare; those are ranked again in float64.

How near is near depends on features and data: two faces of one person may be as similar as a copy. So
held-out real images, which no generator can have copied, go through the same search, and what they give is
part of the result.
"""

from __future__ import annotations

import mmap
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.errors import InputError

Rows = Any  # (n, d): a Tensor, a numpy array or a memory map
#: Candidates beyond k that are kept for the ranking in float64, whose order in float32 may differ.
SPARE = 8
BLOCK_BYTES = 64 << 20
QUERIES_AT_ONCE = 16384


@dataclass(frozen=True)
class Neighbours:
    """The k nearest references of each query, nearest first.

    Attributes:
        similarity: cosines (Q, k) float64, falling along the second axis.
        index: rows of the references (Q, k) int64.
        held_out: the same for held-out real images, whose similarities are the yardstick; None if there were
            none.
    """

    similarity: Tensor
    index: Tensor
    held_out: Neighbours | None = None

    def __repr__(self) -> str:
        queries, k = self.similarity.shape
        nearest = f"{queries} queries, k = {k}, similarity of the nearest {_median(self)} (median)"
        held_out = "no held-out images to compare with"
        if self.held_out is not None:
            held_out = f"held-out {len(self.held_out.similarity)}: {_median(self.held_out)}"
        return f"Neighbours({nearest}; {held_out})"


def _median(found: Neighbours) -> str:
    return f"{float(found.similarity[:, 0].median()):.3f}"


def neighbours(queries: Rows, references: Rows, k: int = 1, held_out: Rows | None = None) -> Neighbours:
    """The ``k`` references of largest cosine similarity, for each query and for each held-out image.

    Args:
        queries: features (Q, d) of generated images, a Tensor, an array or a memory map; they need not be
            normalised.
        references: features (N, d) of the training images, of any number.
        k: neighbours of each, 1 to N.
        held_out: features (H, d) of real images that were not trained on. Without them similarities have
            nothing to be compared with, which a warning says.

    Returns:
        `Neighbours`. Equal similarities come in no particular order.

    Raises:
        InputError: sizes that do not fit, or rows that are zero or not finite and so have no direction.
    """
    _check(queries, references, k, "queries")
    if held_out is None:
        warnings.warn(
            "neighbours: no held-out images, so these similarities have nothing to be compared with",
            stacklevel=2,
        )
        return _search(queries, references, k)
    _check(held_out, references, k, "held_out")
    found = _search(queries, references, k)
    return Neighbours(found.similarity, found.index, _search(held_out, references, k))


def _check(queries: Rows, references: Rows, k: int, name: str) -> None:
    for what, rows in ((name, queries), ("references", references)):
        if getattr(rows, "ndim", 0) != 2 or 0 in rows.shape:
            got = tuple(getattr(rows, "shape", ())) or type(rows).__name__
            raise InputError(f"neighbours: expected {what} (n, d) with n, d >= 1, got {got}")
    if queries.shape[1] != references.shape[1]:
        raise InputError(
            f"neighbours: expected {name} of {references.shape[1]} dimensions like the references, got "
            f"{queries.shape[1]}"
        )
    if not 1 <= k <= len(references):
        raise InputError(f"neighbours: expected 1 <= k <= {len(references)} (the references), got {k}")


def _search(queries: Rows, references: Rows, k: int) -> Neighbours:
    parts = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        q = _directions(queries, np.arange(start, min(start + QUERIES_AT_ONCE, len(queries))), torch.float32)
        candidates = _candidates(q, references, min(k + SPARE, len(references)))
        parts.append(_rank(queries, start, references, candidates, k))
    return Neighbours(torch.cat([s for s, _ in parts]), torch.cat([i for _, i in parts]))


def _candidates(q: Tensor, references: Rows, count: int) -> Tensor:
    """Rows of the ``count`` references of largest product in float32, (Q, count)."""
    step = max(1024, BLOCK_BYTES // (4 * max(len(q), references.shape[1])))
    best = torch.full((len(q), count), -torch.inf)
    index = torch.zeros(len(q), count, dtype=torch.int64)
    for start in range(0, len(references), step):
        block = _directions(references, np.arange(start, min(start + step, len(references))), torch.float32)
        products = q @ block.T
        # Most blocks have nothing for most queries, and a maximum costs less than a selection.
        touched = (products.amax(1) > best[:, -1]).nonzero()[:, 0]
        if len(touched) == 0:
            continue
        values, where = products[touched].topk(min(count, len(block)), dim=1)
        both = torch.cat([best[touched], values], 1)
        rows = torch.cat([index[touched], where + start], 1)
        best[touched], order = both.topk(count, dim=1)
        index[touched] = rows.gather(1, order)
    return index


def _rank(queries: Rows, start: int, references: Rows, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and rows of the best ``k`` candidates by products in float64."""
    step = max(1, BLOCK_BYTES // (8 * references.shape[1] * candidates.shape[1]))
    similarity, index = [], []
    for part_start, part in zip(range(0, len(candidates), step), candidates.split(step), strict=True):
        rows, place = np.unique(part.numpy(), return_inverse=True)
        near = _directions(references, rows, torch.float64)[torch.from_numpy(place.reshape(part.shape))]
        first = start + part_start
        q = _directions(queries, np.arange(first, first + len(part)), torch.float64)
        values, order = torch.einsum("qd,qcd->qc", q, near).clamp(-1, 1).topk(k, dim=1)
        similarity.append(values)
        index.append(part.gather(1, order))
    return torch.cat(similarity), torch.cat(index)


def _release(rows: Rows) -> None:
    """Let go of what was read of a mapped file: it stays in the system's cache, and does not pile up in this
    process."""
    mapped = getattr(rows, "_mmap", None)
    if isinstance(rows, np.memmap) and rows.mode in ("r", "r+") and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _directions(rows: Rows, which: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Unit vectors of some rows, (len(which), d), made in double precision where the rows are in it."""
    if isinstance(rows, Tensor):
        x = rows.detach()[torch.from_numpy(which).to(rows.device)].cpu()  # a copy
    else:
        contiguous = len(which) and which[-1] - which[0] + 1 == len(which)
        block = rows[which[0] : which[-1] + 1] if contiguous else rows[which]
        x = torch.from_numpy(np.array(block))
        _release(rows)
    x = x.to(torch.float64 if x.dtype == torch.float64 else dtype)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    usual = (norm > torch.finfo(dtype).tiny ** 0.5) & (norm < torch.inf)
    if not bool(usual.all()):
        x, norm = _rescaled(x, which)
    return x.div_(norm).to(dtype)


def _rescaled(x: Tensor, which: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest entry, so that no square overflows or vanishes, and their norms."""
    largest = x.abs().amax(1, keepdim=True)
    bad = (~(torch.isfinite(largest) & (largest > 0))).nonzero()
    if len(bad):
        row = int(which[int(bad[0, 0])])
        raise InputError(
            f"neighbours: expected features that are finite and not all zero, got others in row {row}"
        )
    x = x / largest
    return x, torch.linalg.vector_norm(x, dim=1, keepdim=True)
