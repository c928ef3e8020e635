r"""The statistics that all measures of memorisation share: distributions, counts above thresholds, AUC, and
their intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Published for copies: Somepalli et al. (2023) and the works after them, on their features. On others they
#: are marks, not verdicts.
THRESHOLDS = (0.9, 0.95, 0.99)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RESAMPLES = 1000
#: Share of real images that were never trained on that a threshold for copies may take for copies.
FALSE_ALARMS = 0.01
_Z = 1.959963984540054


def distribution(values: Tensor) -> dict[str, Any]:
    """Number, mean, smallest, largest and quantiles of values of any shape."""
    flat = values.flatten().double()
    quantiles = torch.quantile(
        flat[:: max(1, len(flat) // 10_000_000)], torch.tensor(QUANTILES, dtype=torch.float64)
    )
    named = {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
    return {
        "count": len(flat),
        "mean": float(flat.mean()),
        "min": float(flat.min()),
        "max": float(flat.max()),
        "quantiles": named,
    }


def above(values: Tensor, thresholds: tuple[float, ...] = THRESHOLDS) -> dict[str, Any]:
    """How many values exceed each threshold, as count, fraction and Wilson's 95 % interval of the
    fraction."""
    flat = values.flatten()
    return {f"{t:g}": _share(int((flat > t).sum()), len(flat)) for t in thresholds}


def _share(count: int, of: int) -> dict[str, Any]:
    p, z2 = count / of, _Z**2
    centre = (p + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * (p * (1 - p) / of + z2 / (4 * of**2)) ** 0.5
    return {"count": count, "fraction": p, "interval": [max(centre - half, 0.0), min(centre + half, 1.0)]}


def auc(first: Tensor, second: Tensor) -> float:
    """Probability that a value of ``first`` (n,) exceeds one of ``second`` (m,), ties counting half."""
    a, b = first.flatten().double().contiguous(), second.flatten().double().sort().values
    below = torch.searchsorted(b, a, right=False) + torch.searchsorted(b, a, right=True)
    return float(below.double().mean()) / (2 * len(b))


def separation(first: Tensor, second: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """`auc` with a bootstrap interval over the values, which are one an image."""
    return {"auc": auc(first, second), "interval": bootstrap(auc, first, second, generator)}


def copies(
    values: Tensor, held_out: Tensor, generator: torch.Generator, false_alarms: float = FALSE_ALARMS
) -> dict[str, Any]:
    """Share of images nearer to the training set than all but ``false_alarms`` of the held-out ones are.

    The threshold is the held-out images' own quantile, so that the share of a prior without memory is
    ``false_alarms`` on any features. The bootstrap interval resamples both: the threshold is an estimate.

    Args:
        values, held_out: a distance to the training set, small for copies, (n,) and (m,).
        generator: of the bootstrap.
        false_alarms: see above; with fewer than 1 / false_alarms held-out images the threshold is near the
            smallest of theirs.
    """

    def threshold(held: Tensor) -> float:
        return float(torch.quantile(held.double(), false_alarms))

    def share(own: Tensor, held: Tensor) -> float:
        return float((own.double() < threshold(held)).double().mean())

    return {
        "false_alarms": false_alarms,
        "threshold": threshold(held_out),
        "fraction": share(values, held_out),
        "interval": bootstrap(share, values, held_out, generator),
    }


def bootstrap(
    statistic: Callable[[Tensor, Tensor], float],
    first: Tensor,
    second: Tensor,
    generator: torch.Generator,
    resamples: int = RESAMPLES,
) -> list[float]:
    """95 % percentile interval of a statistic of two independent sets of images, (n, ...) and (m, ...), each
    resampled."""
    values = []
    for _ in range(resamples):
        picks = (torch.randint(len(s), (len(s),), generator=generator) for s in (first, second))
        i, j = picks
        values.append(statistic(first[i], second[j]))
    ends = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    return [float(e) for e in ends]
