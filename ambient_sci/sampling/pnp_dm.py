r"""PnP-DM: a split Gibbs sampler that takes turns between the measurement and the prior.

The image and its copy, tied by N(z; x, rho^2 I), have the joint law p(x) p(y | z) N(z; x, rho^2 I). Its conditionals are

    z | x, y    Gaussian, drawn exactly (`Likelihood.draw`)
    x | z       x_0 given x_rho = z: the prior's reverse diffusion, started at level rho

rho decreases from sigma_max to its final value and stays there for the second half of the iterations.

Known deviation: x has the posterior for measurement noise sigma_y^2 + rho^2 in place of sigma_y^2 (A A^H = I). In one
dimension with prior variance .25 and sigma_y^2 = .04, rho = .1 gives 1.21 times the variance and .97 times the gain; with 4 and 1 it is
1.01 and 1.00. A small rho costs iterations: a mode of posterior variance v needs about v / rho^2 of them to move.

Source: Wu et al., "Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import ancestral_step
from ambient_sci.priors.base import require_unconditional
from ambient_sci.sampling.conditioning import Likelihood
from ambient_sci.sampling.precision import Precision
from ambient_sci.sampling.problem import Problem


def sample_pnp_dm(
    problem: Problem,
    *,
    coupling: float | None = None,
    inner_steps: int = 8,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    precision: Precision = "fp32",
) -> Tensor:
    """Split Gibbs sampling (equations above); ``steps`` iterations of ``inner_steps`` network evaluations each.

    Args:
        problem: the chains; its levels are those that rho goes through, and end at sigma_min.
        coupling: final rho, > 0 and at least the prior's sigma_min; default: a tenth of the prior's data_std, or its sigma_min if larger.
        inner_steps: levels of the reverse diffusion from rho to sigma_min, >= 2.
        tolerance, max_iterations: of the likelihood steps, where they have no closed form; they cost no network evaluations.
        precision: of the network.

    Raises:
        InputError: a coupling outside the levels, or fewer than two inner steps.
    """
    require_unconditional(problem.prior, "PnP-DM")
    low, high = float(problem.sigmas[-1]), float(problem.sigmas[0])
    rho_min = max(0.1 * problem.prior.data_std, low) if coupling is None else coupling
    if not low <= rho_min < high or inner_steps < 2:
        raise InputError(
            f"pnp-dm: expected {low:g} <= coupling < {high:g} and inner_steps >= 2, got {rho_min:g} and {inner_steps}"
        )
    likelihood = Likelihood(
        problem.operator, problem.y, problem.sigma_y, tolerance=tolerance, max_iterations=max_iterations
    )
    iterations = len(problem.sigmas)
    x = problem.start()
    for i in range(iterations):
        rho = rho_min * (high / rho_min) ** max(1 - 2 * i / iterations, 0.0)
        z = likelihood.draw(x, rho, problem.noise)
        x = _reverse_diffusion(problem, z, rho, low, inner_steps, precision)
    likelihood.report.evaluations += iterations * inner_steps
    problem.report.update(likelihood.report.to_dict())
    return x


def _reverse_diffusion(
    problem: Problem, x: Tensor, rho: float, low: float, steps: int, precision: Precision
) -> Tensor:
    """x_0 given x_rho = x: ancestral steps to ``low``, then the denoised image."""
    fractions = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = [float(rho * (min(low / rho, 1.0)) ** f) for f in fractions]
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        denoised = problem.denoise(x, t, precision)
        x = ancestral_step(x, denoised, t, s, generator=problem.noise) if s > 0 else denoised
    return x
