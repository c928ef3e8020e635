r"""PnP-DM: a split Gibbs sampler that takes turns between the measurement and the prior.

The image and its copy, tied by N(z; x, rho^2 I), have the joint law p(x) p(y | z) N(z; x, rho^2 I). Its
conditionals are

    z | x, y    Gaussian, drawn exactly (`Likelihood.draw`)
    x | z       x_0 given x_rho = z: the prior's reverse diffusion, started at level rho

rho decreases from sigma_max to its final value and stays there for the second half of the iterations.

Known deviation: x has the posterior for measurement noise sigma_y^2 + rho^2 in place of sigma_y^2 (A A^H =
I). In one dimension with prior variance 0.25 and sigma_y^2 = 0.04, rho = 0.1 gives 1.21 times the variance
and 0.97 times the gain; with 4 and 1 it is 1.01 and 1.00. A small rho costs iterations: a mode of posterior
variance v needs about v / rho^2 of them to move.

Source: Wu et al., "Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors" (2024).
"""

from __future__ import annotations

from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import ancestral_step, draw_noise
from ambient_sci.precision import Precision
from ambient_sci.priors.base import require_unconditional
from ambient_sci.sampling.conditioning import Likelihood, prior_spread
from ambient_sci.sampling.problem import Draws, Problem


def sample_pnp_dm(
    problem: Problem,
    *,
    coupling: float | None = None,
    inner_steps: int = 4,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    precision: Precision = "fp32",
) -> Draws:
    """Split Gibbs sampling (equations above); ``steps`` iterations of ``inner_steps`` network evaluations
    each.

    Args:
        problem: the chains; its levels are those that rho goes through, and end at sigma_min.
        coupling: final rho, > 0 and at least the prior's sigma_min; default: a tenth of the prior's data_std,
            or its sigma_min if larger.
        inner_steps: levels of the reverse diffusion from rho to sigma_min, >= 1.
        tolerance, max_iterations: of the likelihood steps, where they have no closed form; they cost no
            network evaluations.
        precision: of the network.

    Raises:
        InputError: a coupling outside the levels, or no inner steps.
    """
    require_unconditional(problem.prior, "PnP-DM")
    low, high = float(problem.sigmas[-1]), float(problem.sigmas[0])
    rho_min = max(0.1 * problem.prior.data_std, low) if coupling is None else coupling
    if not low <= rho_min < high or inner_steps < 1:
        raise InputError(
            f"pnp-dm: expected {low:g} <= coupling < {high:g} and inner_steps >= 1, got {rho_min:g} and "
            f"{inner_steps}"
        )
    likelihood = Likelihood(
        problem.operator, problem.y, problem.sigma_y, tolerance=tolerance, max_iterations=max_iterations
    )
    iterations = len(problem.sigmas)
    x = mean = problem.start()
    for i in range(iterations):
        rho = rho_min * (high / rho_min) ** max(1 - 2 * i / iterations, 0.0)
        z = likelihood.draw(x, rho, problem.noise)
        x, mean = _reverse_diffusion(problem, z, rho, low, inner_steps, precision)
    likelihood.report.evaluations += iterations * inner_steps
    problem.report.update(likelihood.report.to_dict())
    return Draws(x, mean)


def _reverse_diffusion(
    problem: Problem, x: Tensor, rho: float, low: float, steps: int, precision: Precision
) -> tuple[Tensor, Tensor]:
    """A draw of x_0 given x_rho = x, and its mean given the state at the lowest level: at each level x_0 from
    N(D, r^2 I), and x_s from its law given x_t and x_0.

    Without the spread of x_0, as in plain ancestral sampling, a few steps lose variance, and what is lost
    once an iteration adds up.
    """
    levels = [rho * (low / rho) ** (k / max(steps - 1, 1)) for k in range(steps)]
    mean = x
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        mean = problem.denoise(x, t, precision)
        clean = mean + prior_spread(t, problem.prior.data_std) * draw_noise(x, problem.noise)
        x = ancestral_step(x, clean, t, s, generator=problem.noise) if s > 0 else clean
    return x, mean
