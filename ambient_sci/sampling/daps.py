r"""DAPS: decoupled annealing posterior sampling, with the inner sampling done exactly.

At each level, from high to low,

    x^0   = D(x_t, sigma_t)                                            what the prior makes of the state
    x_0 ~ p(x_0 | y) for x_0 ~ N(x^0, r_t^2 I)                         the measurement
    x_s ~ N(x_0, sigma_s^2 I)                                          back to the next level

which for small sigma is a Gibbs sampler of the joint law of (x_0, x_t) given y. The likelihood keeps its own
noise level sigma_y at every level, and levels go down to sigma_min: with a fixed, larger tau or a high end
the posterior is another one. Two choices differ from the published algorithm, with the same limit for small
sigma:

- It runs Langevin steps for the middle line. For linear measurements that line is a Gaussian and is drawn
  exactly (`Likelihood.draw`): no step size to tune and no bias.
- It has r_t = sigma_t. Here r_t^2 = sigma_t^2 d^2 / (sigma_t^2 + d^2), which does not heat the image beyond
  its own spread d.

x^0 must be D: the end of the probability flow from x_t, also found in use, moves only half as far as the
noise that is added, and targets another law however fine the levels.

Deviation: with r = sigma a mode of prior variance v is sampled at level sigma with variance v (1 + sigma^2 /
2 v), and follows the levels down to sigma^2 ~ v / (levels per factor e). Twenty levels per factor e leave one
or two percent.

Source: Zhang et al., "Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing" (2024).
"""

from __future__ import annotations

from ambient_sci.noise import draw_noise
from ambient_sci.precision import Precision
from ambient_sci.priors.base import require_unconditional
from ambient_sci.sampling.conditioning import Likelihood, prior_spread
from ambient_sci.sampling.problem import Draws, Problem


def sample_daps(
    problem: Problem,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    precision: Precision = "fp32",
) -> Draws:
    """Decoupled annealing with exact inner draws (equations above). One network evaluation a level, no
    Jacobian. Samples are E[x_0 | x^0, y] at the lowest level.

    Args:
        problem: the chains; needs many levels, see above.
        tolerance, max_iterations: of the inner solves, where they have no closed form; they cost no network
            evaluations.
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
        x = likelihood.draw(estimate, prior_spread(t, problem.prior.data_std), problem.noise)
        x = x + s * draw_noise(x, problem.noise)
    likelihood.report.evaluations += len(levels)
    problem.report.update(likelihood.report.to_dict())
    x = likelihood.mean(
        problem.denoise(x, levels[-1], precision), prior_spread(levels[-1], problem.prior.data_std)
    )
    return Draws(x, x)
