"""A baseline at the weight that is best against the truth: an oracle's choice, in favour of the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ambient_sci.baselines import METHODS, Minimiser, zero_filled
from ambient_sci.errors import InputError
from ambient_sci.evaluation.metrics import psnr, volume_peak


@dataclass(frozen=True)
class Sweep:
    """A baseline at its best weight.

    Attributes:
        image: (B, 1|2, H, W).
        weight: the best one.
        interior: it has worse ones on both sides.
        table: one dict a weight, ascending: ``psnr`` and how well that weight was solved.
    """

    image: Tensor
    weight: float
    interior: bool
    table: list[dict[str, Any]]

    @property
    def converged(self) -> bool:
        """Every weight of the sweep was solved to the tolerance."""
        return all(row["converged"] for row in self.table)


def sweep(
    method: str,
    operator: Any,
    y: Tensor,
    reference: Tensor,
    weights: Sequence[float] | None = None,
    *,
    peak: float | Tensor | None = None,
    max_extensions: int = 12,
    **options: Any,
) -> Sweep:
    """Solve at several weights and keep the one of best PSNR **against the truth**.

    No user has the truth to choose a weight by: what is compared with this baseline has to pass the higher
    bar. The sweep is extended until its best weight has neighbours on both sides.

    Args:
        method: "tv", "l1-wavelet" or "sense".
        operator: A, as for `total_variation`.
        y: measurements; one weight serves all of them.
        reference: the truth, (B, 1|2, H, W).
        weights: first weights to try. Default: six, a factor of two apart, from 8 % of the peak of A^H y
            down.
        peak: full scale of the PSNR, one number or one an image; default: the 99.9th percentile of
            ``reference``.
        max_extensions: how many weights may be added beyond the ends.
        options: tolerance, max_iterations.

    Returns:
        the image at the best weight, and the table of all weights.

    Raises:
        InputError: an unknown method, fewer than two different weights, or a weight that is not positive.
    """
    if method not in METHODS:
        raise InputError(f"baseline: expected one of {', '.join(METHODS)}, got {method!r}")
    grid = _grid(operator, y, weights)
    full_scale = volume_peak(reference) if peak is None else peak
    runs: dict[float, tuple[Minimiser, float]] = {}

    def run(weight: float, start: Minimiser | None) -> Minimiser:
        solution = METHODS[method](operator, y, weight, start=start, **options)
        runs[weight] = (solution, float(psnr(solution.image, reference, full_scale).mean()))
        return solution

    def best_weight() -> float:
        return max(runs, key=lambda w: runs[w][1])

    last = None
    for weight in grid:
        last = run(weight, last)
    for _ in range(max_extensions):
        tried, best = sorted(runs), best_weight()
        if tried[0] < best < tried[-1]:
            break
        ratio = tried[0] / tried[1] if best == tried[0] else tried[-1] / tried[-2]
        run(best * ratio, runs[best][0])

    tried, best = sorted(runs), best_weight()
    table = [{**runs[w][0].summary(), "psnr": runs[w][1]} for w in tried]
    return Sweep(runs[best][0].image, best, tried[0] < best < tried[-1], table)


def _grid(operator: Any, y: Tensor, weights: Sequence[float] | None) -> list[float]:
    """The first weights, descending."""
    if weights is None:
        scale = volume_peak(zero_filled(operator, y)) or 1.0
        weights = [scale * 0.08 / 2**k for k in range(6)]
    grid = sorted({float(w) for w in weights}, reverse=True)
    if len(grid) < 2 or grid[-1] <= 0:
        raise InputError(f"baseline sweep: expected at least two positive weights, got {list(weights)}")
    return grid
