r"""Krylov methods for a batch of systems, each watched by itself: K_b u_b = r_b, and V_b^{1/2} z_b.

K = sigma_y^2 I + A V A^H, with V = sigma_t^2 J and J the Jacobian of a *learned* denoiser, is close to
symmetric positive definite but not exactly. Conjugate gradients then meet search directions of zero or
negative curvature, and iterates that explode. `minimal_residual` asks nothing of K: each product is made
orthogonal to the earlier ones and the step along it minimises ||K u - r||, which can only fall (generalised
conjugate residuals; the iterates of GMRES, up to where a step gains nothing: there it ends). It keeps all
directions, so it is for few iterations. `conjugate_gradient`, for K that are what they should be, keeps two.
Either leaves a system that breaks down at the best iterate it had, and says what was reached.

A Gaussian of covariance V, known only by its products, is drawn with the Lanczos process: for an orthonormal
basis Q of the Krylov space of (V, z) and T = Q^T V Q,

    V^{1/2} z  ~  |z| Q T^{1/2} e_1,

exact once the Krylov space is invariant, and best along the directions of large variance long before that.

Sources: Hestenes & Stiefel (1952); Eisenstat, Elman & Schultz, "Variational iterative methods for
nonsymmetric systems of linear equations" (1983); Chow & Saad, "Preconditioned Krylov subspace methods for
sampling multivariate Gaussian distributions" (2014).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Solution:
    """Result of a solve.

    Attributes:
        u: best iterate of each system.
        residual: ||K u - r|| / ||r|| of each system, (B,); infinite where r is not finite.
        iterations: applications of K.
        stopped: systems that broke down or lost progress before the tolerance was met, (B,) bool.
        image: L u, from `minimal_residual`.
        image_left: estimate of ||L u* - L u||, (B,), u* the exact solution, from `minimal_residual`.
    """

    u: Tensor
    residual: Tensor
    iterations: int
    stopped: Tensor
    image: Tensor | None = None
    image_left: Tensor | None = None


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """(B,), numbers or truth values, as a tensor that broadcasts over the (B, ...) tensor ``like``."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B,)."""
    return (a * b).flatten(1).sum(1)


def minimal_residual(
    apply: Callable[[Tensor], tuple[Tensor, Tensor]],
    r: Tensor,
    *,
    tolerance: float = 1e-2,
    max_iterations: int = 5,
) -> Solution:
    """Solve K u = r for each sample of the batch from u = 0, for any K; the residual never grows.

    What is left of L u is estimated at no product more: along the last direction p a residual of norm |K p|
    was worth |L p|, so one of norm |e| is taken to be worth |e| |L p| / |K p|.

    Args:
        apply: u -> (K u, L u) on the whole batch, treating samples independently. L is another linear map
            whose value at the solution is wanted: it comes along the way without one more product.
        r: right-hand sides, (B, ...).
        tolerance: stop a system at ||K u - r|| <= tolerance ||r||.
        max_iterations: applications of K at most; as many directions are kept.
    """
    r, start, stopped = _finite(r)
    u, residual, square = torch.zeros_like(r), r, start
    image: Tensor | None = None
    worth = torch.zeros_like(start)
    active = ~stopped & (start > 0)
    known: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(known) < max_iterations and bool(active.any()):
        direction = residual
        product, side = apply(direction)
        length = _dot(product, product)
        for earlier in known:
            share = _dot(earlier[1], product)
            direction, product, side = (
                x - broadcast(share, x) * e for x, e in zip((direction, product, side), earlier, strict=True)
            )
        norm = _dot(product, product)
        # What is left of the product is rounding: the system can do no better than it has.
        sound = torch.isfinite(norm) & (norm > 1e-10 * length) & torch.isfinite(side).flatten(1).all(1)
        stopped |= active & ~sound
        active &= sound
        scale = torch.where(active, norm, 1.0).rsqrt()
        direction, product, side = (
            torch.where(broadcast(active, x), broadcast(scale, x) * x, 0.0)
            for x in (direction, product, side)
        )
        known.append((direction, product, side))
        step = _dot(product, residual)
        u = u + broadcast(step, r) * direction
        residual = residual - broadcast(step, r) * product
        worth = torch.where(active, _dot(side, side).sqrt(), worth)
        gain = broadcast(step, side) * side
        image = gain if image is None else image + gain
        square = _dot(residual, residual)
        active = active & (square > tolerance**2 * start)
    left = worth * torch.where(torch.isfinite(square), square, 0.0).sqrt()
    return Solution(u, _relative(square, start), len(known), stopped, image, left)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    r: Tensor,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 10,
    growth: float = 10.0,
) -> Solution:
    """Solve K u = r for each sample of the batch from u = 0, for symmetric positive definite K; guarded where
    it is not.

    Args:
        apply: u -> K u on the whole batch; must treat samples independently.
        r: right-hand sides, (B, ...).
        tolerance: stop a system at ||K u - r|| <= tolerance ||r||.
        max_iterations: applications of K at most.
        growth: a system whose residual norm exceeds this many times its best so far has lost progress and is
            stopped.
    """
    r, start, stopped = _finite(r)
    u, residual, direction = torch.zeros_like(r), r.clone(), r.clone()
    square, best, best_u = start.clone(), start.clone(), u
    active = ~stopped & (square > 0)
    iterations = 0
    while iterations < max_iterations and bool(active.any()):
        product = apply(direction)
        iterations += 1
        curvature = _dot(direction, product)
        sound = torch.isfinite(curvature) & (curvature > 0)
        stopped |= active & ~sound
        active &= sound
        step = torch.where(active, square / torch.where(sound, curvature, 1.0), 0.0)
        u = _advance(u, direction, step, active)
        residual = _advance(residual, product, -step, active)
        new = _dot(residual, residual)
        improved = active & (new < best)
        best_u = torch.where(broadcast(improved, r), u, best_u)
        best = torch.where(improved, new, best)
        lost = active & ~(new <= growth**2 * best)
        stopped |= lost
        active &= ~lost & (new > tolerance**2 * start)
        direction = residual + broadcast(torch.where(active, new / square, 0.0), r) * direction
        square = torch.where(active, new, square)
    return Solution(best_u, _relative(best, start), iterations, stopped)


def _finite(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r with systems that are not finite set to zero, |r|^2 (infinite for those), and which they are."""
    start = _dot(r, r)
    broken = ~torch.isfinite(start)
    return torch.where(broadcast(broken, r), 0.0, r), torch.where(broken, float("inf"), start), broken


def _relative(square: Tensor, start: Tensor) -> Tensor:
    """sqrt(square / start); 0 for a right-hand side of zero, infinite for one that is not finite."""
    solvable = torch.isfinite(start) & (start > 0)
    return torch.where(solvable, square / torch.where(solvable, start, 1.0), start).sqrt()


def _advance(x: Tensor, direction: Tensor, step: Tensor, active: Tensor) -> Tensor:
    """x + step direction for the active samples; the others keep x even where the direction is not finite."""
    return torch.where(broadcast(active, x), x + broadcast(step, x) * direction, x)


def gaussian_draw(apply: Callable[[Tensor], Tensor], z: Tensor, *, iterations: int = 6) -> Tensor:
    """V^{1/2} z for each sample of the batch: a draw from N(0, V) if z is standard normal.

    The small matrix Q^T V Q is symmetrised and its negative eigenvalues (a learned Jacobian may have some)
    count as zero, so that the result is a draw from some Gaussian whatever ``apply`` does. With k iterations
    the covariance is exact for V with k distinct eigenvalues; a sample whose products are not finite gets
    zero.

    Args:
        apply: v -> V v on the whole batch, treating samples independently.
        z: standard normal, (B, ...).
        iterations: applications of V, >= 1.
    """
    norm = _dot(z, z).sqrt()
    tiny = torch.finfo(z.dtype).tiny
    basis = [z / broadcast(norm.clamp(min=tiny), z)]
    products: list[Tensor] = []
    while len(products) < iterations:
        product = torch.nan_to_num(apply(basis[-1]), 0.0, 0.0, 0.0)
        products.append(product)
        if len(products) == iterations:
            break
        remainder = product
        for _ in range(
            2
        ):  # twice is enough: full orthogonality although the products are only nearly symmetric
            for q in basis:
                remainder = remainder - broadcast(_dot(q, remainder), z) * q
        length = _dot(remainder, remainder).sqrt()
        # An invariant space is exhausted: nothing but rounding is left to go on with.
        alive = length > 1e-5 * _dot(product, product).sqrt()
        basis.append(torch.where(broadcast(alive, z), remainder / broadcast(length.clamp(min=tiny), z), 0.0))
    small = torch.stack([torch.stack([_dot(q, p) for p in products], 1) for q in basis], 1)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors[:, 0, :, None]
    return torch.stack([broadcast(norm * root[:, i, 0], z) * q for i, q in enumerate(basis)]).sum(0)
