r"""Conditioning an isotropic Gaussian on linear measurements: no network, exact, the building block of the
split samplers.

For x ~ N(m, r^2 I) and y = A x + sigma_y n,

    E[x | y] = m + r^2 A^H (sigma_y^2 I + r^2 A A^H)^-1 (y - A m),

and a draw from p(x | y) is the same correction applied to a draw (x', y') from the joint law (Matheron's
rule):

    x' = m + r z,   y' = A x' + sigma_y n',        x = x' + r^2 A^H (sigma_y^2 I + r^2 A A^H)^-1 (y - y').

sigma_y may differ from entry to entry of y: read sigma_y^2 I as the diagonal matrix of its squares. For a
row-masked square isometry A A^H is the mask and the inverse a division; otherwise conjugate gradients, at the
cost of operator products only. sigma_y = 0 is allowed.

Sources: Matheron's rule as in Wilson et al., "Pathwise Conditioning of Gaussian Processes" (2021).
"""

from __future__ import annotations

from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.noise import Randomness, draw_noise, expand
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.sampling.solvers import conjugate_gradient


class SolverReport:
    """What the network evaluations and linear solves of a sampling run came to, over all chains and steps.

    Counts that depend on values stay where these are computed until `to_dict` asks for them: an accelerator
    is not waited for.
    """

    def __init__(self) -> None:
        self.evaluations = self.products = self.solves = self.iterations = 0
        self.unfinished: int | Tensor = 0
        self.stopped: int | Tensor = 0
        self.worst: Tensor | None = None
        self._left: list[tuple[Tensor, Tensor]] = []

    def add(self, residual: Tensor, iterations: int, stopped: Tensor, tolerance: float) -> None:
        """Record one batched solve."""
        self.solves += residual.numel()
        self.iterations += iterations
        self.unfinished = self.unfinished + (residual > tolerance).sum()
        self.stopped = self.stopped + stopped.sum()
        worst = residual.max()
        self.worst = worst if self.worst is None else torch.maximum(self.worst, worst)

    def add_left(self, sigma: Tensor, left: Tensor, entries: int) -> None:
        """Record what a batched solve at the levels ``sigma`` (B,) left undone of an image of ``entries``
        entries: norms (B,)."""
        self._left.append((sigma[0], left.square().mean() / entries))

    def left(self) -> dict[float, float]:
        """Mean square that the solves of each noise level left undone, per entry of the image, over all
        chains."""
        if not self._left:
            return {}
        found: dict[float, list[float]] = {}
        # All of them in one look at the device.
        values = torch.stack([torch.stack(pair).double() for pair in self._left]).tolist()
        for sigma, square in values:
            found.setdefault(sigma, []).append(square)
        return {sigma: sum(squares) / len(squares) for sigma, squares in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Numbers for the result's report; solves only where there were any."""
        network = {"network_evaluations": self.evaluations, "jacobian_products": self.products}
        if self.worst is None:
            return network
        return {
            **network,
            "solves": self.solves,
            "solver_iterations": self.iterations,
            "solves_above_tolerance": int(self.unfinished),
            "solves_stopped_by_guard": int(self.stopped),
            "worst_relative_residual": float(self.worst),
        }


def measured(operator: LinearPhysics, residual: Tensor) -> Tensor:
    """``residual`` on the rows that were measured: the others must not enter, whatever y holds there."""
    return residual * operator.mask if isinstance(operator, RowMaskedOperator) else residual


def number_or_levels(level: float | Tensor, like: Tensor) -> float | Tensor:
    """A level that multiplies ``like``: a number as it is (carried to an accelerator it would be waited for),
    (B,) expanded.
    """
    return level if isinstance(level, (int, float)) else expand(level, like)


def row_scale(noise: Tensor, spread: float | Tensor) -> float | Tensor:
    """1 / sqrt(noise + spread) for noise variances that differ by entry, else 1: what makes the rows of a
    system equal in weight.

    Systems noise I + A V A^H are solved as S (noise I + A V A^H) S v = S r, u = S v. Krylov methods do not
    see a common factor; without S, rows of little noise, of which most is known, would be the last to be
    fitted.
    """
    return (noise + spread).rsqrt() if noise[0].numel() > 1 else 1.0


class Likelihood:
    """p(y | x) = N(y; A x, sigma_y^2 I) as what isotropic Gaussians are conditioned on.

    Args:
        operator: A, any deepinv ``LinearPhysics`` that treats the B chains independently.
        y: measurements, (B, ...), one for each chain.
        sigma_y: noise level, float, (B,) or of the shape of y, >= 0.
        tolerance, max_iterations: of the solves, where no closed form exists.
    """

    def __init__(
        self,
        operator: LinearPhysics,
        y: Tensor,
        sigma_y: float | Tensor,
        *,
        tolerance: float = 1e-4,
        max_iterations: int = 100,
    ) -> None:
        self.operator, self.y = operator, y
        self.sigma_y = expand(sigma_y, y)
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.closed_form = isinstance(operator, RowMaskedOperator) and operator.square
        self.report = SolverReport()

    def residual(self, x: Tensor) -> Tensor:
        """y - A x on the rows that were measured."""
        return measured(self.operator, self.y - self.operator.A(x))

    def whiten(self, residual: Tensor, r: float | Tensor) -> Tensor:
        """(sigma_y^2 I + r^2 A A^H)^-1 residual, for a residual that is zero on rows that were not
        measured."""
        noise, spread = self.sigma_y**2, number_or_levels(r, residual) ** 2
        if self.closed_form:
            return residual / (noise + spread)
        scale = row_scale(noise, spread)

        def system(v: Tensor) -> Tensor:
            u = scale * v
            return scale * (noise * u + spread * self.operator.A(self.operator.A_adjoint(u)))

        solution = conjugate_gradient(
            system, scale * residual, tolerance=self.tolerance, max_iterations=self.max_iterations
        )
        self.report.add(solution.residual, solution.iterations, solution.stopped, self.tolerance)
        return scale * solution.u

    def mean(self, m: Tensor, r: float | Tensor) -> Tensor:
        """E[x | y] for x ~ N(m, r^2 I)."""
        return m + number_or_levels(r, m) ** 2 * self.operator.A_adjoint(self.whiten(self.residual(m), r))

    def draw(self, m: Tensor, r: float | Tensor, noise: Randomness) -> Tensor:
        """A draw from p(x | y) for x ~ N(m, r^2 I)."""
        spread = number_or_levels(r, m)
        x = m + spread * draw_noise(m, noise)
        residual = self.residual(x) - measured(self.operator, self.sigma_y * draw_noise(self.y, noise))
        return x + spread**2 * self.operator.A_adjoint(self.whiten(residual, r))

    def log_evidence(self, m: Tensor, r: float | Tensor) -> Tensor:
        """log p(y) for x ~ N(m, r^2 I), (B,), up to a constant that depends on r, A and sigma_y only."""
        residual = self.residual(m)
        return -0.5 * (residual * self.whiten(residual, r)).flatten(1).sum(1)


def prior_spread(sigma: float | Tensor, data_std: float) -> float | Tensor:
    """r with r^2 = sigma^2 d^2 / (sigma^2 + d^2): standard deviation of x_0 given x_t if the prior were N(0,
    d^2 I).
    """
    return sigma * data_std / (sigma**2 + data_std**2) ** 0.5
