r"""Complete measurements with white noise: y is a state of the diffusion already.

For A = I, y = x_0 + sigma_y n *is* x_t at the level t = sigma_y; so is A^H y for any complete square isometry
(a fully sampled scan of one coil). Hence, for any prior,

    E[x_0 | y] = D(A^H y, sigma_y)                     one call of the denoiser, no approximation
    x_0 | y                                            the prior's reverse diffusion, started from A^H y

and no linear system is solved. The reverse diffusion is a chain of Gaussians of the right moments: with
share = s^2 / t^2 and V = t^2 J, J the Jacobian of D, the law of x_s given x_t has

    mean  D + share (x_t - D),        covariance  (1 - share)^2 V + s^2 (1 - share) I,

since x_s = (1 - share) x_0 + share x_t + s sqrt(1 - share) z. Both are exact (Tweedie's first and second
formula), so the chain is exact for Gaussian priors whatever its steps; for others each step is wrong in third
cumulants, by (1 - share)^3. The last step goes to s = 0, where it draws what the levels leave open.

Sources: Efron, "Tweedie's formula and selection bias" (2011) for the moments; Song et al., "Score-Based
Generative Modeling through SDEs" (2021) for the reverse diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import deepinv
import torch
from torch import Tensor

from ambient_sci.noise import draw_noise, expand
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.precision import Precision
from ambient_sci.sampling.conditioning import SolverReport
from ambient_sci.sampling.posterior import linearise
from ambient_sci.sampling.problem import Draws, Problem
from ambient_sci.sampling.solvers import gaussian_draw

#: Largest ratio of two levels. Three products are enough for the root of a step's covariance then, whose
#: eigenvalues are within a factor of four of each other.
RATIO, PRODUCTS = 2.0, 3
#: Levels that are equal to a thousandth are the same: noise is not known better, and float32 rounds.
SAME = 1e-3


def is_complete_isometry(operator: object) -> bool:
    """Whether A^H y = x_0 + sigma_y n with n white: an identity of this library or of deepinv, a mask
    of ones, one coil fully sampled."""
    if isinstance(operator, RowMaskedOperator):
        return operator.square and operator.complete
    return type(operator) is deepinv.physics.Denoising


def directly(problem: Problem) -> list[bool]:
    """Which images can be denoised directly: complete and isometric, white noise, at a level that the prior
    knows and the levels span."""
    if problem.image_sigma_y.ndim > 1 or not is_complete_isometry(problem.image_operator):
        return [False] * problem.images
    low = max(float(problem.sigmas[-1]), problem.prior.sigma_min)
    high = float(problem.sigmas[0])
    return [low * (1 - SAME) <= level <= high for level in problem.image_sigma_y.tolist()]


def sample_directly(
    problem: Problem, *, final: str, root_iterations: int = 5, precision: Precision = "fp32"
) -> Draws:
    """Samples and posterior means of images that `directly` allows (equations above).

    Args:
        problem: the chains. Its levels are passed through from sigma_y down, as many to a factor, or two to a
            factor of four where they are coarser.
        final: "draw" to end at 0, "mean" to end with D at the lowest level.
        root_iterations: Jacobian products of the last draw.
        precision: of the network.
    """
    low, high = float(problem.sigmas[-1]), float(problem.sigmas[0])
    ratio = min(RATIO, (high / low) ** (1 / (len(problem.sigmas) - 1)))
    # A thousandth of slack: a level that is the lowest but for rounding takes no step to it.
    steps = [
        max(math.ceil(math.log(level / low / (1 + SAME)) / math.log(ratio)), 0)
        for level in problem.image_sigma_y.tolist()
    ]

    def chains_of(count: int) -> Callable[[Problem], Draws]:
        return lambda part: _descend(part, count, low, final, root_iterations, precision)

    return problem.by_image({k: chains_of(k) for k in set(steps)}, steps)


def _descend(
    problem: Problem, steps: int, low: float, final: str, root_iterations: int, precision: Precision
) -> Draws:
    """From A^H y down ``steps`` levels of equal ratio to ``low``, and to the end; each chain from its own
    sigma_y."""
    report = SolverReport()
    start = problem.sigma_y.clamp(min=low)
    x = problem.operator.A_adjoint(problem.y)
    mean: Tensor | None = None
    for k in range(steps + 1):
        last = k == steps
        t = start * (low / start) ** (k / max(steps, 1))
        s = torch.zeros_like(t) if last else start * (low / start) ** ((k + 1) / steps)
        denoised, transposed_jacobian = linearise(problem.prior, x, t, report, precision)
        mean = denoised if mean is None else mean
        if last and final == "mean":
            x = denoised
            break
        before, after = expand(t, x), expand(s, x)
        share = (after / before) ** 2
        learned, fresh = ((1 - share) * before) ** 2, after**2 * (1 - share)

        def covariance(v: Tensor, learned=learned, fresh=fresh, product=transposed_jacobian) -> Tensor:  # noqa: ANN001
            return learned * product(v) + fresh * v

        z = draw_noise(x, problem.noise)
        spread = gaussian_draw(covariance, z, iterations=root_iterations if last else PRODUCTS)
        x = denoised + share * (x - denoised) + spread
    problem.report.update(report.to_dict(), direct_chains=len(x))
    return Draws(x, mean)
