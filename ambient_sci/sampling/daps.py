r"""DAPS: decoupled annealing posterior sampling, with the inner sampling done exactly.

At each level, from high to low,

    x^0   = D(x_t, sigma_t)                                            what the prior makes of the state
    x_0 ~ p(x_0 | y) for x_0 ~ N(x^0, sigma_t^2 I)                     the measurement
    x_s ~ N(x_0, sigma_s^2 I)                                          back to the next level

which for small sigma is a Gibbs sampler of the joint law of (x_0, x_t) given y. The likelihood keeps its own noise level sigma_y at
every level, and levels go down to sigma_min: for a fixed, larger tau or a high end the posterior is another one. The published algorithm runs
Langevin steps for the middle line; for linear measurements that line is a Gaussian and is drawn exactly (`Likelihood.draw`), with
no step size to tune and no bias.

The published x^0 is the end of the probability flow from x_t instead of D. That targets something else even as steps get fine: noise of
variance 2 sigma_t^2 is added per level against half of the prior's score, so that only D gives the posterior in the limit.

Deviation: at level sigma a mode of prior variance v is sampled with variance v (1 + sigma^2 / 2 v), and follows the levels down to
sigma^2 ~ v / (levels per factor e): a hundred levels a decade leave about one percent.

Source: Zhang et al., "Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing" (2024).
"""

from __future__ import annotations

from torch import Tensor

from ambient_sci.noise import draw_noise
from ambient_sci.priors.base import require_unconditional
from ambient_sci.sampling.conditioning import Likelihood
from ambient_sci.sampling.precision import Precision
from ambient_sci.sampling.problem import Problem


def sample_daps(
    problem: Problem,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    precision: Precision = "fp32",
) -> Tensor:
    """Decoupled annealing with exact inner draws (equations above). One network evaluation a level, no Jacobian.

    Args:
        problem: the chains; needs many levels, see above.
        tolerance, max_iterations: of the inner solves, where they have no closed form; they cost no network evaluations.
        precision: of the network.
    """
    require_unconditional(problem.prior, "DAPS")
    likelihood = Likelihood(
        problem.operator, problem.y, problem.sigma_y, tolerance=tolerance, max_iterations=max_iterations
    )
    levels = [float(s) for s in problem.sigmas]
    x = problem.start()
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        estimate = problem.denoise(x, t, precision)
        x = likelihood.draw(estimate, t, problem.noise)
        x = x + s * draw_noise(x, problem.noise)
    likelihood.report.evaluations += len(levels)
    problem.report.update(likelihood.report.to_dict())
    return likelihood.mean(problem.denoise(x, levels[-1], precision), levels[-1])
