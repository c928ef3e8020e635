r"""Posterior denoisers: an unconditional prior with a measurement folded in, E[x_0 | x_t, y].

For y = A x_0 + sigma_y n, Tweedie's formula for the posterior splits into the prior's denoiser and a
likelihood score,

    E[x_0 | x_t, y] = D(x_t) + sigma_t^2 grad log p(y | x_t),

and any sampler that takes a denoiser then samples p(x_0 | y). p(y | x_t) needs p(x_0 | x_t), which is
replaced by a Gaussian N(D, V):

    V = sigma_t^2 J    `MMPS`    J the Jacobian of D: the true second moment (Tweedie's second-order formula)
    V = r_t^2 I        `PiGDM`   r_t^2 = sigma_t^2 d^2 / (sigma_t^2 + d^2), d the data's standard deviation
    V = 0              `DPS`

    grad log p(y | x_t) = J^T A^H (sigma_y^2 I + A V A^H)^-1 (y - A D).

Only MMPS is exact for Gaussian priors. It needs no derivative beyond J, since sigma_t^2 J^T = V there:

    E[x_0 | x_t, y] = D + V A^H (sigma_y^2 I + A V A^H)^-1 (y - A D).                                   (*)

Where noise differs from entry to entry of y, sigma_y^2 I is the diagonal matrix of the squared levels.

Sources: Rozet et al., "Learning Diffusion Priors from Observations by Expectation Maximization" (2024); Song
et al., "Pseudoinverse-Guided Diffusion Models for Inverse Problems" (2023); Chung et al., "Diffusion
Posterior Sampling" (2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.noise import Randomness, draw_noise, expand
from ambient_sci.precision import Precision, precision_context
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.sampling.conditioning import Likelihood, SolverReport, measured, prior_spread, row_scale
from ambient_sci.sampling.solvers import gaussian_draw, minimal_residual


def linearise(
    prior: Prior, x: Tensor, sigma: Tensor, report: SolverReport, precision: Precision = "fp32"
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """D(x, sigma) and v -> J^T v, every product through the one forward graph that is built here."""
    with torch.enable_grad(), precision_context(precision, x.device):
        x = x.detach().requires_grad_()
        denoised = prior(x, sigma).to(x.dtype)
    report.evaluations += 1

    def transposed_jacobian(v: Tensor) -> Tensor:
        report.products += 1
        return torch.autograd.grad(denoised, x, v, retain_graph=True)[0]

    return denoised.detach(), transposed_jacobian


class MMPS:
    """Moment matching posterior denoiser (*), for any linear operator.

    V is applied by vector-Jacobian products through one forward graph per call; the system is solved in
    measurement space for all chains at once, each with its own steps and its own guard (`minimal_residual`),
    and V A^H u is collected along the way.

    Args:
        prior: unconditional.
        operator: A, any deepinv ``LinearPhysics`` that treats the B chains independently.
        y: measurements, (B, ...), one for each chain.
        sigma_y: noise level, float, (B,) or of the shape of y, >= 0.
        tolerance: relative residual at which a solve stops.
        max_iterations: Jacobian products per solve at most.
        root_iterations: Jacobian products for the square root of V in `draw`.
        precision: of the network, see `precision_context`.

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
        root_iterations: int = 5,
        precision: Precision = "fp32",
    ) -> None:
        require_unconditional(prior, "MMPS")
        self.prior, self.operator, self.y = prior, operator, y
        self.sigma_y = expand(sigma_y, y)
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.root_iterations, self.precision = root_iterations, precision
        self.report = SolverReport()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t = x, y] at level ``sigma`` (B,), under the Gaussian of matched moments."""
        return self._mean(*self._moments(x, sigma), sigma)

    def draw(self, x: Tensor, sigma: Tensor, noise: Randomness) -> Tensor:
        """A draw from p(x_0 | x_t = x, y) = N(E[x_0 | x_t, y], V - V A^H (sigma_y^2 I + A V A^H)^-1 A V); see
        `mean_and_draw`.
        """
        return self.mean_and_draw(x, sigma, noise)[1]

    def mean_and_draw(self, x: Tensor, sigma: Tensor, noise: Randomness) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t = x, y] and a draw from p(x_0 | x_t = x, y), by Matheron's rule around the mean.

        v from N(0, V) and noise n of a measurement give what (*) would take off again,

            x_0 = E[x_0 | x_t, y] + v - V A^H (sigma_y^2 I + A V A^H)^-1 (A v + sigma_y n).

        A sampler that ends with this instead of the mean has the whole posterior covariance, whatever level
        it stopped at; exactly so for Gaussian priors. The last term is odd in (v, n), however early its solve
        ends: the mean returned is the mean of the draws, exactly, which is what averages over chains rely on.

        Args:
            x: (B, C, H, W).
            sigma: level of ``x``, (B,).
            noise: source of randomness.

        Returns:
            mean and draw, (B, C, H, W) each; one solve each, through one forward graph.
        """
        mean, covariance = self._moments(x, sigma)
        deviation = gaussian_draw(covariance, draw_noise(mean, noise), iterations=self.root_iterations)
        noisy = self.operator.A(deviation) + self.sigma_y * draw_noise(self.y, noise)
        deviation = deviation - self._correction(covariance, noisy, sigma)[0]
        mean = self._mean(mean, covariance, sigma)
        return mean, mean + deviation

    def _moments(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        mean, transposed_jacobian = linearise(self.prior, x, sigma, self.report, self.precision)
        scale = expand(sigma, x) ** 2
        return mean, lambda v: scale * transposed_jacobian(v)

    def _mean(self, mean: Tensor, covariance: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
        """(*), and what its solve left undone goes into the report."""
        image, left = self._correction(covariance, self.y - self.operator.A(mean), sigma)
        self.report.add_left(sigma, left, mean[0].numel())
        return mean + image

    def _correction(
        self, covariance: Callable[[Tensor], Tensor], residual: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """V A^H (sigma_y^2 I + A V A^H)^-1 residual, and an estimate of the norm of its error, (B,)."""
        noise = self.sigma_y**2
        scale = row_scale(noise, expand(prior_spread(sigma, self.prior.data_std), residual) ** 2)

        def system(v: Tensor) -> tuple[Tensor, Tensor]:
            u = scale * v
            image = covariance(self.operator.A_adjoint(u))
            return scale * (noise * u + self.operator.A(image)), image

        solution = minimal_residual(
            system,
            scale * measured(self.operator, residual),
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        self.report.add(solution.residual, solution.iterations, solution.stopped, self.tolerance)
        if solution.image is None or solution.image_left is None:
            return torch.zeros(()).to(residual), torch.zeros(len(residual)).to(residual)
        return solution.image, solution.image_left


class PiGDM:
    """Pseudo-inverse guidance with the prior's own variance: (*) with V = r_t^2 I inside the inverse. Two
    network passes a call.

    Known deviation: exact only where the prior's covariance is d^2 I. On 1-D Gaussian priors of another
    variance s^2 than the assumed one, in the reverse SDE: d = 1, s^2 = 0.25, sigma_y^2 = 0.04 gives 1.11
    times the variance and 0.92 times the gain; d = 1, s^2 = 4, sigma_y^2 = 1 gives 0.83 and 1.14. In the
    probability
    flow the errors are several times larger: use "ancestral".

    Args:
        prior, operator, y, sigma_y, precision: as for `MMPS`.
        data_std: d; default: the prior's.
    """

    def __init__(
        self,
        prior: Prior,
        operator: LinearPhysics,
        y: Tensor,
        sigma_y: float | Tensor,
        *,
        data_std: float | None = None,
        precision: Precision = "fp32",
    ) -> None:
        require_unconditional(prior, "PiGDM")
        self.prior, self.precision = prior, precision
        self.likelihood = Likelihood(operator, y, sigma_y)
        self.data_std = prior.data_std if data_std is None else data_std
        self.report = self.likelihood.report

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D + sigma^2 J^T A^H (sigma_y^2 I + r^2 A A^H)^-1 (y - A D)."""
        mean, transposed_jacobian = linearise(self.prior, x, sigma, self.report, self.precision)
        white = self.likelihood.whiten(self.likelihood.residual(mean), prior_spread(sigma, self.data_std))
        return mean + expand(sigma, x) ** 2 * transposed_jacobian(self.likelihood.operator.A_adjoint(white))


class DPS:
    """Diffusion posterior sampling: (*) with V = 0 inside the inverse, that is p(y | x_t) = N(y; A D,
    sigma_y^2 I).

        m = D + J^T A^H kappa (y - A D),        kappa = min(sigma_t^2 / sigma_y^2, limit / c)

    The first is the definition; it is stiff, 1 / sigma_y^2 being far too confident at high levels. The second
    keeps a step of a sampler from overshooting the data: with ``limit`` = 1 / (1 - s^2 / t^2) for an
    ancestral step from t to s, and c = |A A^H r|^2 / |A^H r|^2 of each sample the squared norm of A along its
    residual, the step at most meets the measurements. It vanishes as the steps get fine. Each entry of y has
    the kappa of its own noise.

    Known deviation, in the reverse SDE on 1-D Gaussian priors: s^2 = 0.25, sigma_y^2 = 0.04 gives 0.58 times
    the variance and 1.16 times the gain; s^2 = 4, sigma_y^2 = 1 gives 0.62 and 1.23. Over-confident: spread
    from DPS is not an error bar.

    Args:
        prior, operator, y, sigma_y, precision: as for `MMPS`.
        limit: see above; default: none.
    """

    def __init__(
        self,
        prior: Prior,
        operator: LinearPhysics,
        y: Tensor,
        sigma_y: float | Tensor,
        *,
        limit: float = float("inf"),
        precision: Precision = "fp32",
    ) -> None:
        require_unconditional(prior, "DPS")
        self.prior, self.precision, self.limit = prior, precision, limit
        self.likelihood = Likelihood(operator, y, sigma_y)
        self.report = self.likelihood.report

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D + J^T A^H kappa (y - A D)."""
        mean, transposed_jacobian = linearise(self.prior, x, sigma, self.report, self.precision)
        operator, residual = self.likelihood.operator, self.likelihood.residual(mean)
        back = operator.A_adjoint(residual)
        ahead, length = operator.A(back).flatten(1).square().sum(1), back.flatten(1).square().sum(1)
        # Where A^H r is nothing there is nowhere to step to, and any norm will do.
        norm = torch.where((ahead > 0) & (length > 0), ahead / length, 1.0)
        kappa = torch.minimum(
            expand(sigma, residual) ** 2 / self.likelihood.sigma_y**2, expand(self.limit / norm, residual)
        )
        return mean + transposed_jacobian(operator.A_adjoint(kappa * residual))
