r"""Total variation for any linear operator, a batch of images at once.

    argmin_x  1/2 ||A x - y||^2 + w sum_pixels |(D x)|_2          D: `TVDenoiser.nabla` of deepinv

by the split Bregman iteration (ADMM; Goldstein & Osher 2009):

    x <- (A^H A + rho D^T D)^-1 (A^H y + rho D^T (v - u))        conjugate gradients from the last x
    v <- shrink(D x + u, w / rho)                                 by the length at each pixel
    u <- u + D x - v

Weights, rho, residuals and the scalars of conjugate gradients are those of each image, (B,): a batch only
shares the number of steps. The iteration stops when the relative primal residual ||D x - v|| and the relative
dual residual rho ||D^T (v - v_old)|| of every image are below a tolerance (Boyd et al. 2011, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from deepinv.models import TVDenoiser
from torch import Tensor

# First threshold w / rho as a fraction of the image's peak: it sets the speed, not the solution.
SHRINKAGE = 0.05
#: Steps of conjugate gradients for an x.
INNER = 8
# The residuals are looked at every so many steps; rho is adapted while they differ by more than this factor,
# at first.
CHECK_EVERY, BALANCE, ADAPT_UNTIL = 10, 3.0, 2000

difference, backward = TVDenoiser.nabla, TVDenoiser.nabla_adjoint


class End(NamedTuple):
    """A finished iteration; ``state`` is (x, v, rho u) and starts a neighbouring problem."""

    state: tuple[Tensor, Tensor, Tensor]
    steps: int
    primal: float
    dual: float
    change: float
    objective: float
    converged: bool


@torch.no_grad()
def minimise(
    operator: Any,
    y: Tensor,
    weight: Tensor,
    start: tuple[Tensor, Tensor, Tensor] | None,
    tolerance: float,
    max_iterations: int,
) -> End:
    """The minimiser for weights (B,)."""
    back = operator.A_adjoint(y)
    weight = weight.to(back)
    rho = weight / (SHRINKAGE * back.flatten(1).abs().amax(1).clamp(min=torch.finfo(back.dtype).tiny))
    x, v = (back, difference(back)) if start is None else start[:2]
    u = torch.zeros_like(v) if start is None else start[2] / _like(rho, v)
    primal = dual = change = torch.full_like(rho, torch.inf)
    steps = 0
    while steps < max_iterations and not bool((torch.maximum(primal, dual) < tolerance).all()):
        for _ in range(min(CHECK_EVERY, max_iterations - steps)):
            old = x, v
            right = back + _like(rho, x) * backward(v - u)
            x = conjugate_gradients(_normal(operator, rho), right, x)
            sparse = difference(x)
            v = shrink(sparse + u, weight / rho)
            u = u + sparse - v
            steps += 1
        primal = _relative(sparse - v, sparse)
        dual = _relative(backward(v - old[1]), backward(u))
        change = _relative(x - old[0], x)
        if steps < ADAPT_UNTIL:
            factor = _balance(primal, dual, tolerance)
            rho, u = rho * factor, u / _like(factor, u)
    worst = [float(r.max()) for r in (primal, dual, change)]
    value = float(objective(operator, y, weight, x).sum())
    return End((x, v, _like(rho, u) * u), steps, *worst, value, max(worst[:2]) < tolerance)


def objective(operator: Any, y: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """1/2 ||A x - y||^2 + w TV(x) of each image, (B,)."""
    misfit = 0.5 * (operator.A(x) - y).square().flatten(1).sum(1)
    return misfit + weight.to(x) * difference(x).square().sum(-1).sqrt().flatten(1).sum(1)


def shrink(g: Tensor, threshold: Tensor) -> Tensor:
    """Vectors on the last axis, shortened by ``threshold`` (B,)."""
    length = g.square().sum(-1, keepdim=True).sqrt()
    return g * (1 - _like(threshold, g) / length.clamp(min=torch.finfo(g.dtype).tiny)).clamp(min=0)


def conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor, x: Tensor) -> Tensor:
    """A few steps towards ``normal``(x) = ``right`` from ``x``, with the scalars of each image."""
    residual = right - normal(x)
    direction, norm = residual, _dot(residual, residual)
    for _ in range(INNER):
        image = normal(direction)
        # An image that is solved has no residual: 0 / 0 would be its step.
        step = _like(_divided(norm, _dot(direction, image)), x)
        x, residual = x + step * direction, residual - step * image
        last, norm = norm, _dot(residual, residual)
        direction = residual + _like(_divided(norm, last), x) * direction
    return x


def _normal(operator: Any, rho: Tensor) -> Callable[[Tensor], Tensor]:
    """A^H A + rho D^T D."""
    return lambda x: operator.A_adjoint_A(x) + _like(rho, x) * backward(difference(x))


def _balance(primal: Tensor, dual: Tensor, tolerance: float) -> Tensor:
    """What to multiply rho by: a larger one presses the primal residual, a smaller one the dual."""
    low, high = torch.minimum(primal, dual), torch.maximum(primal, dual)
    factor = torch.where(primal > dual, 2.0, 0.5)
    return torch.where((high < BALANCE * low) | (high < tolerance), 1.0, factor).to(primal)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _relative(part: Tensor, whole: Tensor) -> Tensor:
    norm = whole.flatten(1).norm(dim=1).clamp(min=torch.finfo(part.dtype).tiny)
    return part.flatten(1).norm(dim=1) / norm


def _like(scalars: Tensor, x: Tensor) -> Tensor:
    return scalars.reshape(-1, *[1] * (x.ndim - 1))
