r"""Conjugate gradients for a batch of systems K_b u_b = r_b that are only nearly symmetric positive definite.

K = sigma_y^2 I + sigma_t^2 A J A^H, with J the Jacobian of a *learned* denoiser, is close to symmetric positive definite but not exactly, and
plain conjugate gradients can then break down: a search direction of zero or negative curvature, residuals that grow, in the end NaN. Each
system of the batch is therefore watched by itself and, where something is wrong, left at the best iterate it had. What was reached is
reported, never hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Solution:
    """Result of `conjugate_gradient`.

    Attributes:
        u: best iterate of each system.
        residual: ||K u - r|| / ||r|| of each system, (B,).
        iterations: applications of K.
        stopped: systems that broke down or lost progress before the tolerance was met, (B,) bool.
    """

    u: Tensor
    residual: Tensor
    iterations: int
    stopped: Tensor


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, broadcastable over it."""
    return (a * b).flatten(1).sum(1).reshape(-1, *([1] * (a.ndim - 1)))


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    r: Tensor,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 10,
    growth: float = 10.0,
) -> Solution:
    """Solve K u = r for each sample of the batch, starting from u = 0.

    Args:
        apply: u -> K u on the whole batch; must treat samples independently.
        r: right-hand sides, (B, ...).
        tolerance: stop a system at ||K u - r|| <= tolerance ||r||.
        max_iterations: applications of K at most.
        growth: a system whose residual norm exceeds this many times its best so far has lost progress and is stopped.
    """
    u, residual, direction = torch.zeros_like(r), r.clone(), r.clone()
    square = _dot(r, r)
    start = square.clone()
    best, best_u = square.clone(), u
    active = square > 0
    stopped = torch.zeros_like(active)
    iterations = 0
    while iterations < max_iterations and bool(active.any()):
        image = apply(direction)
        iterations += 1
        curvature = _dot(direction, image)
        sound = torch.isfinite(curvature) & (curvature > 0)
        stopped |= active & ~sound
        active &= sound
        step = torch.where(active, square / torch.where(sound, curvature, 1.0), 0.0)
        u = u + step * torch.where(active, direction, 0.0)
        residual = residual - step * torch.where(active, image, 0.0)
        new = _dot(residual, residual)
        improved = active & (new < best)
        best_u = torch.where(improved, u, best_u)
        best = torch.where(improved, new, best)
        lost = active & ~(new <= growth**2 * best)
        stopped |= lost
        active &= ~lost & (new > tolerance**2 * start)
        direction = residual + torch.where(active, new / square, 0.0) * direction
        square = torch.where(active, new, square)
    relative = torch.where(start > 0, best / torch.where(start > 0, start, 1.0), 0.0).sqrt()
    return Solution(best_u, relative.flatten(), iterations, stopped.flatten())
