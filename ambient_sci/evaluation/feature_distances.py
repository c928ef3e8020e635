r"""Distances between two sets of features: from streams, with their uncertainty, refused for too few samples.

    Frechet      |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)     from n, sum and sum of outer products;
                                                               interval by bootstrap
    KID          unbiased MMD^2, kernel (a.b / d + 1)^3        mean over subsets, interval by disjoint groups
    precision    share of samples within reach of a reference
    recall       share of references within reach of a sample

A point's reach is the distance to its k-th neighbour among its own kind (Kynkaanniemi et al. 2019).

On Inception features the first is called FID. On any others it is a Frechet distance on those features, and
its numbers compare with nothing but numbers on the same ones: every result names them. A covariance of fewer
samples than dimensions is singular and the distance means little: it is refused unless a number of principal
directions is stated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation.distances import kernel_distance

Rows = Any  # (n, d): a Tensor, a numpy array or a memory map
BLOCK = 4096
GROUPS = 10


class FeatureMoments:
    """Mean and covariance of features that arrive in blocks; float64, O(d^2) memory.

    Sums are taken about the first block's mean, so that features far from zero lose no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self._shift = self._sum = self._outer = torch.zeros(0, dtype=torch.float64)

    @classmethod
    def of(cls, features: Rows | Iterable[Rows]) -> FeatureMoments:
        """Moments of an array (n, d), read in blocks, or of an iterable of blocks."""
        moments = cls()
        for block in _blocks(features) if hasattr(features, "shape") else features:
            moments.update(block)
        return moments

    @classmethod
    def stated(cls, mean: Rows, covariance: Rows, n: int) -> FeatureMoments:
        """Moments as published: mean (d,) and unbiased covariance (d, d) of ``n`` features.

        Raises:
            InputError: other shapes, values that are not finite, or n < 2.
        """
        moments = cls()
        m, c = _tensor(mean), _tensor(covariance)
        finite = bool(torch.isfinite(m).all()) and bool(torch.isfinite(c).all())
        if m.ndim != 1 or c.shape != (len(m), len(m)) or not finite or n < 2:
            raise InputError(
                f"moments: expected a finite mean (d,) and covariance (d, d) of at least 2 features, got "
                f"{tuple(m.shape)}, {tuple(c.shape)} and {n}"
            )
        moments.n, moments._shift, moments._sum = n, m, torch.zeros_like(m)
        moments._outer = c * (n - 1)
        return moments

    def update(self, block: Rows) -> None:
        """Take in features (b, d)."""
        x = _tensor(block)
        if x.ndim != 2 or (self.n and x.shape[1] != len(self._shift)) or not bool(torch.isfinite(x).all()):
            expected = f"(b, {len(self._shift)})" if self.n else "(b, d)"
            raise InputError(
                f"moments: expected finite features {expected}, got {tuple(x.shape)}, or values that are "
                "not finite"
            )
        if self.n == 0:
            self._shift = x.mean(0)
            self._sum, self._outer = torch.zeros_like(self._shift), x.new_zeros(x.shape[1], x.shape[1])
        x = x - self._shift
        self.n += len(x)
        self._sum = self._sum + x.sum(0)
        self._outer = self._outer + x.T @ x

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self._shift + self._sum / self.n

    @property
    def covariance(self) -> Tensor:
        """(d, d), unbiased."""
        if self.n < 2:
            raise InputError(f"moments: expected at least 2 samples for a covariance, got {self.n}")
        return (self._outer - torch.outer(self._sum, self._sum) / self.n) / (self.n - 1)


def frechet(
    a: FeatureMoments | Rows, b: FeatureMoments | Rows, *, features: str, pca: int | None = None
) -> dict[str, Any]:
    """Frechet distance of the Gaussians with the moments of two sets of features.

    Args:
        a, b: samples and references: their moments, or features (n, d).
        features: the name of the features, which travels with the number.
        pca: compare on this many principal directions of ``b`` only, where there are too few samples for all.

    Returns:
        ``distance``, ``features``, ``samples``, ``references``, ``dimensions``, ``pca``.

    Raises:
        InputError: different dimensions, or no more samples than dimensions on either side.
    """
    x, y = (m if isinstance(m, FeatureMoments) else FeatureMoments.of(m) for m in (a, b))
    dim = len(y.mean) if y.n else 0
    if min(x.n, y.n) < 2 or len(x.mean) != dim:
        raise InputError(
            f"Frechet distance on {features}: expected two sets of one dimension and at least 2 samples each"
        )
    used = dim if pca is None else pca
    if not 1 <= used <= dim:
        raise InputError(f"Frechet distance on {features}: expected pca from 1 to {dim}, got {pca}")
    if min(x.n, y.n) <= used:
        raise InputError(
            f"Frechet distance on {features}: expected more samples than the {used} dimensions, got {x.n} "
            f"and {y.n}; "
            f"state a smaller number of principal directions (pca), or use KID"
        )
    c1, c2, difference = x.covariance, y.covariance, x.mean - y.mean
    if pca is not None:
        directions = torch.linalg.eigh(c2).eigenvectors[:, -pca:]
        c1, c2, difference = (
            directions.T @ c1 @ directions,
            directions.T @ c2 @ directions,
            directions.T @ difference,
        )
    # tr (C1 C2)^1/2 is the nuclear norm of F1^T F2 for any factors Ci = Fi Fi^T: no root of a product that is
    # not symmetric.
    f1, f2 = (_factor(c) for c in (c1, c2))
    overlap = float(torch.linalg.svdvals(f1.T @ f2).sum())
    distance = float(difference.square().sum() + c1.trace() + c2.trace()) - 2 * overlap
    return {
        "distance": max(distance, 0.0),
        "features": features,
        "samples": x.n,
        "references": y.n,
        "dimensions": dim,
        "pca": pca,
    }


def frechet_interval(
    a: Rows,
    b: FeatureMoments | Rows,
    *,
    features: str,
    pca: int | None = None,
    resamples: int = 100,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """`frechet` with a 95 % interval for the samples that happened to be drawn: 1.96 standard deviations of
    bootstrap resamples of ``a`` to both sides.

    Resampling adds a bias of its own to the distance, about as large as the one that it has already; so the
    resamples' spread is used and their level is not. The references stay what they are.

    Args:
        a: features of samples, (n, d).
        b, features, pca: see `frechet`.
        resamples, generator: of the bootstrap; default: a fixed seed.
    """
    generator = generator or torch.Generator().manual_seed(0)
    x = _tensor(a)
    reference = b if isinstance(b, FeatureMoments) else FeatureMoments.of(b)
    found = frechet(x, reference, features=features, pca=pca)
    again = []
    for _ in range(resamples):
        rows = torch.randint(len(x), (len(x),), generator=generator)
        again.append(frechet(x[rows], reference, features=features, pca=pca)["distance"])
    half = 1.96 * float(np.std(again, ddof=1))
    return {**found, "interval": [max(found["distance"] - half, 0.0), found["distance"] + half]}


def kid(
    a: Rows,
    b: Rows,
    *,
    features: str,
    subset: int = 1000,
    subsets: int = 50,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """KID of features (n, d) and (m, d), with a 95 % interval.

    The estimate is `kernel_distance`'s. The interval is Student's, from the estimates of 10 disjoint random
    groups of each set, whose mean varies no less than the estimate: it errs on the wide side.

    Args:
        a, b: samples and references.
        features: the name of the features, which travels with the number.
        subset, subsets, generator: see `kernel_distance`.

    Raises:
        InputError: fewer than 20 samples on either side (10 groups of two), or different dimensions.
    """
    if min(len(a), len(b)) < 2 * GROUPS:
        raise InputError(
            f"KID on {features}: expected at least {2 * GROUPS} samples on each side, got {len(a)} and "
            f"{len(b)}"
        )
    generator = generator or torch.Generator().manual_seed(0)
    x, y = _tensor(a, torch.float32), _tensor(b, torch.float32)
    found = kernel_distance(x, y, subset=subset, subsets=subsets, generator=generator)
    size = min(len(x), len(y), GROUPS * subset) // GROUPS
    orders = [
        torch.randperm(len(s), generator=generator)[: GROUPS * size].reshape(GROUPS, size) for s in (x, y)
    ]
    parts = [kernel_distance(x[i], y[j], subset=size)["mean"] for i, j in zip(*orders, strict=True)]
    half = float(student.ppf(0.975, GROUPS - 1)) * float(np.std(parts, ddof=1)) / GROUPS**0.5
    return {
        "mean": found["mean"],
        "interval": [found["mean"] - half, found["mean"] + half],
        "std_of_subsets": found["std"],
        "features": features,
        "samples": len(x),
        "references": len(y),
    }


def precision_recall(a: Rows, b: Rows, *, features: str, k: int = 3) -> dict[str, Any]:
    """Precision and recall of samples ``a`` against references ``b``, features (n, d) and (m, d), by
    distances in blocks.

    Both depend on how many there are: compare only between sets of equal numbers.

    Args:
        a, b: samples and references.
        features: the name of the features, which travels with the numbers.
        k: the neighbour whose distance is a point's reach.

    Raises:
        InputError: no more than ``k`` samples on either side, or different dimensions.
    """
    x, y = _tensor(a, torch.float32), _tensor(b, torch.float32)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or k < 1:
        raise InputError(f"precision on {features}: expected two sets (n, d) of one dimension and k >= 1")
    if min(len(x), len(y)) <= k:
        raise InputError(
            f"precision on {features}: expected more than k = {k} samples, got {len(x)} and {len(y)}"
        )
    return {
        "precision": _covered(x, y, k),
        "recall": _covered(y, x, k),
        "k": k,
        "features": features,
        "samples": len(x),
        "references": len(y),
    }


def compare_features(
    a: Rows, b: Rows, *, features: str, pca: int | None = None, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Frechet distance, KID, precision and recall of samples ``a`` against references ``b``, each with the
    name of the features."""
    return {
        "frechet": frechet(a, b, features=features, pca=pca),
        "kid": kid(a, b, features=features, generator=generator),
        "precision_recall": precision_recall(a, b, features=features),
    }


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of ``points`` within any centre's reach, the distance to its k-th other centre."""
    step = max(1, (16 << 20) // max(len(points), len(centres)))
    near = [
        torch.cdist(block, centres).topk(k + 1, largest=False).values[:, -1] for block in centres.split(step)
    ]
    reach = torch.cat(near)  # the nearest centre to a centre is itself
    inside = sum(int((torch.cdist(block, centres) <= reach).any(1).sum()) for block in points.split(step))
    return inside / len(points)


def _factor(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _blocks(features: Rows) -> Iterable[Rows]:
    for start in range(0, len(features), BLOCK):
        yield features[start : start + BLOCK]


def _tensor(rows: Rows, dtype: torch.dtype = torch.float64) -> Tensor:
    return (rows.detach().cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))).to(dtype)
