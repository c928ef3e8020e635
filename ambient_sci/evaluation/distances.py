r"""Distances between two sets of images: what a prior draws against what it should draw.

    sliced W2    sqrt( mean over directions of W2^2 of the projections )               on pixels
    energy       2 E|X - Y| - E|X - X'| - E|Y - Y'|                                    on pixels
    Frechet      |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)                  on given features
    KID          unbiased MMD^2, kernel (a.b / d + 1)^3 (Binkowski et al. 2018)        on given features

On Inception features the third is called FID; on any other features it is a Frechet distance on those
features, and its numbers compare with nothing but numbers from the same features. It is biased upwards by
some tr(C)/n; below a couple of thousand images use KID, which is not. All are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError

Features = Callable[[Tensor], Tensor]


def sliced_wasserstein(
    a: Tensor, b: Tensor, directions: int = 200, generator: torch.Generator | None = None
) -> float:
    """Sliced Wasserstein-2 distance of two sets of samples, (n, ...) and (m, ...).

    The metric floor, what two draws of the same distribution are apart, is of order std / sqrt(n): report it
    beside the number.

    Args:
        a, b: samples; n and m may differ (quantile functions are compared exactly).
        directions: random directions, uniform on the sphere.
        generator: for the directions; default: a fixed seed, so that every comparison uses the same.

    Raises:
        InputError: samples of different size, or none.
    """
    x, y = _pair(a, b)
    generator = generator or torch.Generator().manual_seed(0)
    z = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64).to(x.device)
    z = z / torch.linalg.vector_norm(z, dim=0)
    total = 0.0
    for part in z.split(64, dim=1):
        total += float(_squared_w2(x @ part, y @ part).sum())
    return (total / directions) ** 0.5


def frechet_distance(a: Tensor, b: Tensor, features: Features | None = None) -> float:
    """Frechet distance of Gaussians fitted to samples, on ``features`` or on the entries themselves.

    Raises:
        InputError: fewer than two samples, or samples of different size.
    """
    x, y = _pair(*_featured(a, b, features))
    if min(len(x), len(y)) < 2:
        raise InputError(
            f"Frechet distance: expected at least 2 samples on each side, got {len(x)} and {len(y)}"
        )
    # tr (C1^1/2 C2 C1^1/2)^1/2 is the nuclear norm of X1c X2c^T / sqrt((n-1)(m-1)): no matrix square root,
    # and no rank to lose.
    u, v = (s - s.mean(0) for s in (x, y))
    if min(len(u), len(v)) > u.shape[1]:
        u, v = (torch.linalg.qr(s, mode="r").R for s in (u, v))
    scale = ((len(x) - 1) * (len(y) - 1)) ** 0.5
    overlap = float(torch.linalg.matrix_norm(u @ v.T, ord="nuc")) / scale
    traces = float(x.var(0).sum() + y.var(0).sum())
    return max(float((x.mean(0) - y.mean(0)).square().sum()) + traces - 2 * overlap, 0.0)


def kernel_distance(
    a: Tensor,
    b: Tensor,
    features: Features | None = None,
    *,
    subset: int = 1000,
    subsets: int = 50,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """KID: unbiased squared maximum mean discrepancy with the cubic kernel; may be slightly negative.

    Args:
        a, b: samples (n, ...), (m, ...).
        features: images to features (n, d); None: the entries themselves.
        subset, subsets: the estimate is averaged over random subsets of this size. With at most ``subset``
            samples on both sides one estimate from all of them is made.
        generator: for the subsets; default: a fixed seed.

    Returns:
        ``mean``, and the ``std`` over subsets (0 for a single one).

    Raises:
        InputError: fewer than two samples, or samples of different size.
    """
    x, y = _pair(*_featured(a, b, features))
    if min(len(x), len(y)) < 2:
        raise InputError(f"KID: expected at least 2 samples on each side, got {len(x)} and {len(y)}")
    generator = generator or torch.Generator().manual_seed(0)
    size = min(subset, len(x), len(y))
    if max(len(x), len(y)) <= subset:
        estimates = torch.tensor([_mmd(x, y)], dtype=torch.float64)
    else:
        picks = ([torch.randperm(len(s), generator=generator)[:size] for s in (x, y)] for _ in range(subsets))
        estimates = torch.tensor([_mmd(x[i], y[j]) for i, j in picks], dtype=torch.float64)
    return {"mean": float(estimates.mean()), "std": float(estimates.std()) if len(estimates) > 1 else 0.0}


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely & Rizzo 2013); zero on average for equal laws."""
    x, y = _pair(a, b)
    if min(len(x), len(y)) < 2:
        raise InputError(
            f"energy distance: expected at least 2 samples on each side, got {len(x)} and {len(y)}"
        )
    within = sum(float(torch.pdist(s).mean()) for s in (x, y))
    return 2 * float(torch.cdist(x, y).mean()) - within


def distribution_distances(
    samples: Tensor,
    reference: Tensor,
    features: Features | None = None,
    feature_name: str = "pixels",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Every distance, the numbers of samples, and the floor: the distances between halves of the reference.

    Args:
        samples, reference: images (n, C, H, W), (m, C, H, W); m >= 4.
        features, feature_name: for Frechet and KID; the name says on what, and travels with the numbers.
        generator: for directions, subsets and halves; default: a fixed seed.
    """
    if len(reference) < 4 or len(samples) < 2:
        raise InputError(
            "distances: expected at least 2 samples and 4 references, "
            f"got {len(samples)} and {len(reference)}"
        )
    generator = generator or torch.Generator().manual_seed(0)
    order = torch.randperm(len(reference), generator=generator)
    halves = reference[order[: len(order) // 2]], reference[order[len(order) // 2 :]]

    def all_of(a: Tensor, b: Tensor) -> dict[str, Any]:
        return {
            "sliced_w2": sliced_wasserstein(a, b),
            f"frechet_on_{feature_name}": frechet_distance(a, b, features),
            f"kid_on_{feature_name}": kernel_distance(a, b, features),
            "energy": energy_distance(a, b),
        }

    return {
        "samples": len(samples),
        "references": len(reference),
        **all_of(samples, reference),
        "between_halves_of_the_reference": all_of(*halves),
    }


def _squared_w2(x: Tensor, y: Tensor) -> Tensor:
    """Exact squared W2 of one-dimensional samples, column by column: (n, k), (m, k) to (k,)."""
    x, y = x.sort(0).values, y.sort(0).values
    if len(x) == len(y):
        return (x - y).square().mean(0)
    # Both quantile functions are steps: integrate over the union of their jumps.
    jumps = torch.cat(
        [torch.arange(1, len(s) + 1, dtype=torch.float64, device=s.device) / len(s) for s in (x, y)]
    )
    jumps = jumps.sort().values
    widths = torch.diff(jumps, prepend=jumps.new_zeros(1))
    middle = jumps - widths / 2
    i, j = ((middle * len(s)).long().clamp(max=len(s) - 1) for s in (x, y))
    return ((x[i] - y[j]).square() * widths[:, None]).sum(0)


def _mmd(x: Tensor, y: Tensor) -> float:
    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def off_diagonal(k: Tensor) -> float:
        n = len(k)
        return float(k.sum() - k.trace()) / (n * (n - 1))

    return off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def _featured(a: Tensor, b: Tensor, features: Features | None) -> tuple[Tensor, Tensor]:
    if features is None:
        return a, b
    with torch.no_grad():
        return features(a), features(b)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim < 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 1:
        raise InputError(
            f"distance: expected two sets (n, ...) of one size, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return a.flatten(1).double(), b.flatten(1).double()
