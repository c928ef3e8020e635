r"""Least squares with an L1 penalty for a batch of MRI slices, by sigpy's operators and proximal maps.

    argmin_x  1/2 ||A x - y||^2 + w ||G x||_1          A = M F S;  G: finite differences or wavelet transform

by the split Bregman iteration (ADMM; Goldstein & Osher 2009), over-relaxed with r = 1.7:

    x <- argmin_x 1/2 ||A x - y||^2 + rho/2 ||G x - v + u||^2
    h <- r G x + (1 - r) v
    v <- soft(h + u, w / rho)
    u <- u + h - v

With one coil the first step is diagonal in k-space (G^H G is circulant for periodic differences and 1 for an
orthogonal wavelet); with several it is a few steps of preconditioned conjugate gradients. The iteration stops
when the relative primal residual ||G x - v|| and the relative dual residual rho ||G^H (v - v_old)|| are both
below a tolerance (Boyd et al. 2011, section 3.3). Slices share the stopping rule and the
scalars of conjugate gradients, not the problem: each one's solution is the same as alone, to the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sigpy as sp
import torch
from torch import Tensor

from ambient_sci.operators.mri import MRI, to_complex

# First threshold w / rho as a fraction of the image's peak: it sets the speed, not the solution.
SHRINKAGE = 0.05
RELAXATION = 1.7
CHECK_EVERY = 10
# rho is adapted while the residuals differ by more than this factor, for so many steps (it must end to
# converge).
BALANCE, ADAPT_UNTIL = 10.0, 500

Array = np.ndarray[Any, Any]
Solve = Callable[[Array, Array, float], Array]


def encoding(operator: MRI, y: Tensor) -> tuple[Any, Array]:
    """P F S as a sigpy operator on complex slices (B, H, W), and measurements (B, [coils,] H, W) for it."""
    operator._check_measurement(y)
    data = np.ascontiguousarray(to_complex((y.detach() * operator.mask.to(y)).cpu()).numpy())
    images = (len(data), *data.shape[-2:])
    mask = _mask(operator).astype(data.real.dtype)
    maps = operator.coil_maps
    if maps is None:
        return sp.linop.Multiply(images, mask) * sp.linop.FFT(images, axes=(-2, -1)), data
    lifted = sp.linop.Reshape((len(data), 1, *images[1:]), images)
    coils = sp.linop.Multiply(lifted.oshape, maps.cpu().numpy().astype(data.dtype))
    fourier = sp.linop.FFT(coils.oshape, axes=(-2, -1))
    return sp.linop.Multiply(fourier.oshape, mask) * fourier * coils * lifted, data


def finite_differences(shape: tuple[int, ...]) -> tuple[Any, Array]:
    """Periodic first differences over rows and columns, and what G^H G multiplies centred k-space by."""
    frequencies = (2 * np.pi * (np.arange(n) - n // 2) / n for n in shape[-2:])
    rows, columns = (2 - 2 * np.cos(f) for f in frequencies)
    return sp.linop.FiniteDifference(shape, axes=(-2, -1)), rows[:, None] + columns


def wavelet(shape: tuple[int, ...]) -> tuple[Any, Array]:
    """Orthogonal Daubechies-4; zero extension keeps all that is not zero, so G^H G = 1."""
    return sp.linop.Wavelet(shape, axes=(-2, -1)), np.ones(shape[-2:])


class SplitBregman(sp.alg.Alg):
    """The iteration above.

    Args:
        solve: (right, x, rho) -> (A^H A + rho G^H G)^-1 right, x being the last image.
        back: A^H y.
        sparsify: G.
        weight: w, broadcastable to G x.
        rho: first penalty.
        start: (x, v, rho u) of a neighbouring problem (u scaled back to the dual variable, which does not
            depend on rho), or None.
        tolerance, max_iterations: when to stop.
    """

    def __init__(
        self,
        solve: Solve,
        back: Array,
        sparsify: Any,
        weight: Array,
        rho: float,
        start: tuple[Array, Array, Array] | None,
        tolerance: float,
        max_iterations: int,
    ) -> None:
        super().__init__(max_iterations)
        self.solve, self.back, self.sparsify, self.rho, self.tolerance = solve, back, sparsify, rho, tolerance
        self.x, self.v = (back, sparsify(back)) if start is None else start[:2]
        self.u = np.zeros_like(self.v) if start is None else start[2] / rho
        self.shrink = sp.prox.L1Reg(self.v.shape, weight)
        self.primal = self.dual = self.change = float("inf")

    def _update(self) -> None:
        x, v = self.x, self.v
        self.x = self.solve(self.back + self.rho * self.sparsify.H(v - self.u), x, self.rho)
        sparse = self.sparsify(self.x)
        relaxed = RELAXATION * sparse + (1 - RELAXATION) * v
        self.v = self.shrink(1 / self.rho, relaxed + self.u)
        self.u = self.u + relaxed - self.v
        if (self.iter + 1) % CHECK_EVERY == 0 or self.iter + 1 == self.max_iter:
            self.primal = _relative(sparse - self.v, sparse)
            self.dual = _relative(self.sparsify.H(self.v - v), self.sparsify.H(self.u))
            self.change = _relative(self.x - x, self.x)
            if not self.converged and self.iter < ADAPT_UNTIL:
                self._balance()

    def _balance(self) -> None:
        """A larger rho presses the primal residual, a smaller one the dual; the dual variable rho u stays."""
        if max(self.primal, self.dual) < BALANCE * min(self.primal, self.dual):
            return
        factor = 2.0 if self.primal > self.dual else 0.5
        self.rho *= factor
        self.u = self.u / factor

    @property
    def converged(self) -> bool:
        """Both relative residuals are below the tolerance."""
        return max(self.primal, self.dual) < self.tolerance

    def _done(self) -> bool:
        return self.converged or self.iter >= self.max_iter


def minimise(
    operator: MRI,
    y: Tensor,
    penalty: Callable[[tuple[int, ...]], tuple[Any, Array]],
    weight: Array,
    start: tuple[Array, Array, Array] | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[SplitBregman, float]:
    """Run it with `finite_differences` or `wavelet` and a weight for each slice, (B,); returns the finished
    iteration and its objective."""
    linop, data = encoding(operator, y)
    sparsify, symbol = penalty(linop.ishape)
    # sigpy's wavelet transform makes an odd number of slices even by an empty one before the first.
    weight = np.pad(weight, (sparsify.oshape[-3] - len(weight), 0), mode="edge")[:, None, None]
    back = linop.H(data)
    symbol = symbol.astype(back.real.dtype)
    # One rho for the batch; the thresholds w / rho are those of each slice.
    rho = float(weight.mean()) / (SHRINKAGE * (float(np.abs(back).max()) or 1.0))
    if operator.coil_maps is None:
        solve = _diagonal_solve(_mask(operator), symbol)
    else:
        solve = _iterative_solve(linop.N, sparsify, operator.mask.mean().item(), symbol)
    algorithm = SplitBregman(solve, back, sparsify, weight, rho, start, tolerance, max_iterations)
    sp.app.App(algorithm, show_pbar=False).run()
    misfit = 0.5 * float(np.linalg.norm(linop(algorithm.x) - data)) ** 2
    return algorithm, misfit + float((weight * np.abs(sparsify(algorithm.x))).sum())


def conjugate_gradients(
    operator: MRI, y: Tensor, weight: Array, start: Array | None, tolerance: float, max_iterations: int
) -> tuple[Array, int, float, float]:
    """(A^H A + w) x = A^H y, w (B,): returns x, iterations, relative residual and objective."""
    linop, data = encoding(operator, y)
    weight = weight.astype(data.real.dtype)[:, None, None]
    back = linop.H(data)
    x = np.array(back if start is None else start)
    normal = linop.N + sp.linop.Multiply(linop.ishape, weight)
    # Stops on the recursion's residual, which drifts from the true one in float32: aim lower, then measure.
    limit = 0.1 * tolerance * float(np.linalg.norm(back))
    algorithm = sp.alg.ConjugateGradient(normal, back, x, max_iter=max_iterations, tol=limit)
    sp.app.App(algorithm, show_pbar=False).run()
    misfit = 0.5 * float(np.linalg.norm(linop(x) - data)) ** 2
    objective = misfit + 0.5 * float((weight * np.abs(x) ** 2).sum())
    return x, algorithm.iter, _relative(normal(x) - back, back), objective


def _diagonal_solve(mask: Array, symbol: Array) -> Solve:
    def solve(right: Array, x: Array, rho: float) -> Array:
        diagonal = mask + rho * symbol
        # The mean has no gradient: where it was not measured either, nothing determines it, and it stays
        # zero.
        inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
        return _circulant(inverse, right)

    return solve


def _iterative_solve(data_normal: Any, sparsify: Any, rate: float, symbol: Array) -> Solve:
    def solve(right: Array, x: Array, rho: float) -> Array:
        x = x.copy()
        normal = data_normal + rho * sparsify.H * sparsify
        inverse = 1 / (rate + rho * symbol)  # what the normal operator is on average
        steps = sp.alg.ConjugateGradient(normal, right, x, P=lambda r: _circulant(inverse, r), max_iter=3)
        sp.app.App(steps, show_pbar=False).run()
        return x

    return solve


def _circulant(diagonal: Array, x: Array) -> Array:
    return sp.ifft((diagonal * sp.fft(x, axes=(-2, -1))).astype(x.dtype), axes=(-2, -1))


def _mask(operator: MRI) -> Array:
    return operator.mask[:, 0].cpu().numpy()


def _relative(difference: Array, whole: Array) -> float:
    return float(np.linalg.norm(difference) / max(np.linalg.norm(whole), np.finfo(np.float32).tiny))


def as_image(x: Array, like: Tensor) -> Tensor:
    """Complex (B, H, W) to (B, 2, H, W) with the type and device of ``like``."""
    return torch.view_as_real(torch.from_numpy(np.ascontiguousarray(x))).movedim(-1, 1).contiguous().to(like)
