r"""The weight of a baseline where no truth is at hand: the one of least estimated risk.

Stein's unbiased estimate of the risk in what was measured, E ||A x_w(y) - A x||^2, for Gaussian noise:

    S(w) = ||A x_w(y) - y||^2 - n sigma^2 + 2 sigma^2 tr d(A x_w)/dy,      n: real numbers that were measured
    tr d(A x_w)/dy = E_b b^T (A x_w(y + e b) - A x_w(y)) / e,              b: random signs

For denoising this is the mean squared error. For an operator that loses something it does not see the error
in what was lost. Each image has its own weight. Weights are tried a factor of two apart, beyond the ends
until the best has neighbours on both sides; a parabola through these three in log w says the weight.

Sources: Stein, "Estimation of the mean of a multivariate normal distribution" (1981); Ramani, Blu & Unser,
"Monte-Carlo SURE" (2008).
"""

from __future__ import annotations

from typing import Any

import torch
from deepinv import physics
from torch import Tensor

from ambient_sci.baselines.classic import METHODS, Minimiser
from ambient_sci.operators.base import RowMaskedOperator

#: First weights, as powers of two times the noise level, and how many may follow at either end.
FIRST, FURTHER = range(2, -5, -1), 6
#: Loose enough for a search; the size of the probe, in noise levels.
TOLERANCE, PROBE = 1e-3, 0.1
#: The noise level that a weight is relative to is at least this part of the peak of A^H y.
LOWEST = 1e-4


@torch.no_grad()
def least_risk(method: str, operator: Any, y: Tensor, sigma_y: Tensor, **options: Any) -> Minimiser:
    """A baseline at the weights of least estimated risk.

    Args:
        method: "tv", "l1-wavelet" or "sense".
        operator: A, as for the method.
        y: measurements, (B, ...).
        sigma_y: noise level of each image per real channel, (B,).
        options: tolerance, max_iterations of the last solve.

    Returns:
        the solution, with a weight for each image.
    """
    unit = (
        sigma_y.double().cpu().maximum(LOWEST * operator.A_adjoint(y).flatten(1).abs().amax(1).double().cpu())
    )
    unit = torch.where(unit > 0, unit, 1.0)
    risks: dict[int, Tensor] = {}
    last: tuple[Any, Any] = (None, None)
    for power in FIRST:
        risks[power], last = _risk(method, operator, y, sigma_y, unit * 2.0**power, last)
    for _ in range(FURTHER):
        powers = sorted(risks)
        best = torch.stack([risks[p] for p in powers]).argmin(0)
        ends = [powers[0] - 1] * bool((best == 0).any()) + [powers[-1] + 1] * bool(
            (best == len(powers) - 1).any()
        )
        for power in ends:
            risks[power], _ = _risk(method, operator, y, sigma_y, unit * 2.0**power, last)
        if not ends:
            break
    weight = unit * 2.0 ** _lowest(sorted(risks), risks)
    return METHODS[method](operator, y, weight, start=last[0], **options)


def measured(operator: Any, y: Tensor) -> Tensor:
    """1 where something was measured, in the shape of ``y``."""
    # Other operators have masks, too, but in a space of their own.
    if not isinstance(operator, (RowMaskedOperator, physics.Inpainting, physics.MRI)):
        return torch.ones_like(y)
    return (operator.mask != 0).to(y).expand_as(y)


def _risk(
    method: str, operator: Any, y: Tensor, sigma_y: Tensor, weight: Tensor, start: tuple[Any, Any]
) -> tuple[Tensor, tuple[Minimiser, Minimiser]]:
    """S(w) of each image, and both solutions, to start the next from."""
    kept = measured(operator, y)
    # The same signs for every weight, so that risks can be compared; drawn on the CPU, the same on every
    # device.
    signs = torch.randint(0, 2, y.shape, generator=torch.Generator().manual_seed(0)).to(y) * 2 - 1
    size = (PROBE * sigma_y.double().cpu()).clamp(min=1e-3 * weight.min()).to(y)
    size = size.reshape(-1, *[1] * (y.ndim - 1))
    solve = METHODS[method]
    found = solve(operator, y, weight, start=start[0], tolerance=TOLERANCE)
    moved = solve(operator, y + size * signs * kept, weight, start=start[1], tolerance=TOLERANCE)
    image = operator.A(found.image)
    trace = _sum(signs * kept * (operator.A(moved.image) - image) / size)
    variance = sigma_y.double().cpu().square()
    return _sum((kept * (image - y)).square()) - variance * (_sum(kept) - 2 * trace), (found, moved)


def _lowest(powers: list[int], risks: dict[int, Tensor]) -> Tensor:
    """Where the parabola through the best power of two and its neighbours is lowest, (B,)."""
    table = torch.stack([risks[p] for p in powers])
    best = table.argmin(0).clamp(1, len(powers) - 2)
    low, middle, high = (table.gather(0, (best + k)[None])[0] for k in (-1, 0, 1))
    bend = low - 2 * middle + high
    shift = torch.where(bend > 0, 0.5 * (low - high) / torch.where(bend > 0, bend, 1.0), 0.0).clamp(-1, 1)
    return torch.tensor(powers).double()[best] + shift


def _sum(x: Tensor) -> Tensor:
    return x.double().flatten(1).sum(1).cpu()
