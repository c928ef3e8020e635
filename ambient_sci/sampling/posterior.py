r"""Posterior denoisers: an unconditional prior with a measurement folded in, E[x_0 | x_t, y].

For y = A x_0 + sigma_y n, with p(x_0 | x_t) replaced by a Gaussian of its first two moments N(D, V),

    E[x_0 | x_t, y] = D + V A^H (sigma_y^2 I + A V A^H)^-1 (y - A D).                                   (*)

Any sampler that takes a denoiser then samples p(x_0 | y). The moments are D = D(x_t, sigma_t) and, by Tweedie's second-order
formula, V = sigma_t^2 J with J the Jacobian of D (a symmetric matrix for an exact denoiser): moment matching posterior sampling.
For Gaussian priors (*) is exact.

Source: Rozet et al., "Learning Diffusion Priors from Observations by Expectation Maximization" (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.noise import expand
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.sampling.solvers import conjugate_gradient


class SolverReport:
    """What the linear solves of a sampling run reached, over all chains and steps."""

    def __init__(self) -> None:
        self.solves = self.iterations = self.unfinished = self.stopped = self.evaluations = 0
        self.worst = 0.0

    def add(self, residual: Tensor, iterations: int, stopped: Tensor, tolerance: float) -> None:
        """Record one batched solve."""
        self.solves += residual.numel()
        self.iterations += iterations
        self.unfinished += int((residual > tolerance).sum())
        self.stopped += int(stopped.sum())
        self.worst = max(self.worst, float(residual.max()))

    def to_dict(self) -> dict[str, Any]:
        """Numbers for the result's report."""
        return {
            "network_evaluations": self.evaluations,
            "solves": self.solves,
            "solver_iterations": self.iterations,
            "solves_above_tolerance": self.unfinished,
            "solves_stopped_by_guard": self.stopped,
            "worst_relative_residual": self.worst,
        }


class MMPS:
    """Moment matching posterior denoiser (*), for any linear operator.

    The covariance V = sigma_t^2 J^T is applied by vector-Jacobian products through *one* forward graph per call; the system is solved
    in measurement space for all chains at once, each with its own step sizes and its own guard (`conjugate_gradient`).

    Args:
        prior: unconditional.
        operator: A, any deepinv ``LinearPhysics`` that treats the B chains independently.
        y: measurements, (B, ...), one for each chain.
        sigma_y: noise level, float or (B,), >= 0.
        tolerance: relative residual at which a solve stops.
        max_iterations: Jacobian products per call at most.

    Raises:
        ConditioningError: a mask-conditional prior.
    """

    def __init__(
        self,
        prior: Prior,
        operator: LinearPhysics,
        y: Tensor,
        sigma_y: float | Tensor,
        *,
        tolerance: float = 1e-2,
        max_iterations: int = 5,
    ) -> None:
        require_unconditional(prior, "MMPS")
        self.prior, self.operator, self.y = prior, operator, y
        self.variance = expand(sigma_y, y) ** 2
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.report = SolverReport()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t = x, y] at level ``sigma`` (B,), under the Gaussian of matched moments."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = self.prior(x, sigma)
        scale = expand(sigma, x) ** 2
        self.report.evaluations += 1

        def covariance(v: Tensor) -> Tensor:
            return scale * torch.autograd.grad(denoised, x, v, retain_graph=True)[0]

        mean = denoised.detach()
        residual = self.y - self.operator.A(mean)
        if isinstance(self.operator, RowMaskedOperator):
            residual = (
                residual * self.operator.mask
            )  # rows that were not measured must not enter, whatever y holds there
        solution = conjugate_gradient(
            lambda u: self.variance * u + self.operator.A(covariance(self.operator.A_adjoint(u))),
            residual,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        self.report.add(solution.residual, solution.iterations, solution.stopped, self.tolerance)
        return mean + covariance(self.operator.A_adjoint(solution.u))
