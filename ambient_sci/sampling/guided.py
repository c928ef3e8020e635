r"""Posterior samplers made of a posterior denoiser and an unconditional sampler, and those for
mask-conditional priors.

Each is one function of a `Problem`, readable from top to bottom.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.losses import denoise_measurement
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.precision import Precision, precision_context
from ambient_sci.priors.base import require_mask_conditional
from ambient_sci.sampling.antithetic import antithetic_control
from ambient_sci.sampling.conditioning import measured
from ambient_sci.sampling.denoising import directly, sample_directly
from ambient_sci.sampling.notes import stops_early
from ambient_sci.sampling.posterior import DPS, MMPS, PiGDM
from ambient_sci.sampling.problem import Draws, Problem
from ambient_sci.sampling.unconditional import SAMPLERS, Denoise


def integrate(
    problem: Problem,
    denoiser: Denoise,
    integrator: str,
    final: Denoise | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """The unconditional sampler of this name, from ``start``, or else pure noise, down the problem's
    levels."""
    if integrator not in SAMPLERS:
        raise InputError(f"integrator: expected one of {', '.join(SAMPLERS)}, got {integrator!r}")
    start = problem.start() if start is None else start
    return SAMPLERS[integrator](denoiser, start, problem.sigmas, problem.noise, final)


def sample_mmps(
    problem: Problem,
    *,
    integrator: str = "multistep",
    final: Literal["auto", "mean", "draw"] = "auto",
    direct: bool = True,
    antithetic: bool = True,
    **options: Any,
) -> Draws:
    """Moment matching posterior sampling: `MMPS` in an unconditional sampler.

    The sampler stops at sigma_min > 0 with x_min, where E[x_0 | x_min, y] leaves out the posterior's spread
    below sigma_min. That is nothing for a prior learned down to a small level, and most of it for one learned
    from noisy data, whose levels stop at their noise.

    Images whose measurement is complete, with white noise at a level that the prior knows, need none of it:
    they are denoised directly (`ambient_sci.sampling.denoising`), exactly in the mean and at a fraction of
    the cost.

    Args:
        problem: the chains.
        integrator: "multistep", "heun" or "ancestral".
        final: what a sample is: the "mean" E[x_0 | x_min, y]; a "draw" from N(E[x_0 | x_min, y], Cov[x_0 |
            x_min, y]), which restores the whole posterior covariance (exactly for Gaussian priors) at the
            cost of a few Jacobian products more; "auto": a draw where the levels end above a fiftieth of the
            data's standard deviation, the mean elsewhere. The posterior mean is the average of E[x_0 | x_min,
            y] in any case.
        direct: denoise complete measurements directly; otherwise, and with ``final`` "mean", they take the
            way of all others.
        antithetic: take noise off the posterior mean by a coarse flow from opposite noise
            (`ambient_sci.sampling.antithetic`), at a fifth of the time more; for "multistep" and "heun",
            since a chain of the reverse SDE forgets what it started from. Samples do not depend on it.
        **options: of `MMPS`.
    """
    if final not in ("auto", "mean", "draw"):
        raise InputError(f"final: expected auto, mean or draw, got {final!r}")
    ending = final
    if final == "auto":
        ending = "draw" if stops_early(problem.prior, float(problem.sigmas[-1])) else "mean"
    own = {k: v for k, v in options.items() if k in ("root_iterations", "precision")}

    def around(part: Problem) -> Draws:
        return _guided_by_moments(part, integrator, ending, antithetic, options)

    def straight(part: Problem) -> Draws:
        return sample_directly(part, final=ending, **own)

    whether = [direct and final != "mean" and can for can in directly(problem)]
    found = problem.by_image({False: around, True: straight}, whether)
    problem.report.update(final=ending)
    return found


def _guided_by_moments(
    problem: Problem, integrator: str, final: str, antithetic: bool, options: dict[str, Any]
) -> Draws:
    """Chains from pure noise, by `MMPS`."""
    denoiser = MMPS(problem.prior, problem.operator, problem.y, problem.sigma_y, **options)
    start = problem.start()
    if final == "mean":
        x = means = integrate(problem, denoiser, integrator, start=start)
    else:
        state = integrate(problem, denoiser, integrator, lambda x, sigma: x, start)
        means, x = denoiser.mean_and_draw(state, problem.level(float(problem.sigmas[-1])), problem.noise)
    found = Draws(x, means, left=denoiser.report.left())
    if antithetic and integrator in ("multistep", "heun"):
        found.controls, coarse = antithetic_control(problem, start / float(problem.sigmas[0]), options)
        denoiser.report.evaluations += coarse.evaluations
        denoiser.report.products += coarse.products
    problem.report.update(denoiser.report.to_dict())
    return found


def sample_pigdm(problem: Problem, *, integrator: str = "ancestral", **options: Any) -> Draws:
    """`PiGDM` in an unconditional sampler; its deviation is stated there.

    Args:
        problem: the chains.
        integrator: "ancestral", "multistep" or "heun".
        **options: of `PiGDM`.
    """
    denoiser = PiGDM(problem.prior, problem.operator, problem.y, problem.sigma_y, **options)
    x = integrate(problem, denoiser, integrator)
    problem.report.update(denoiser.report.to_dict())
    return Draws(x, x)


def sample_dps(problem: Problem, *, integrator: str = "ancestral", **options: Any) -> Draws:
    """`DPS` in an unconditional sampler; its deviation is stated there.

    Args:
        problem: the chains.
        integrator: "ancestral", "multistep" or "heun".
        **options: of `DPS`; ``limit`` follows from the levels unless given.
    """
    steepest = float((problem.sigmas[1:] / problem.sigmas[:-1]).min())
    options = {"limit": 1 / (1 - steepest**2), **options}
    denoiser = DPS(problem.prior, problem.operator, problem.y, problem.sigma_y, **options)
    x = integrate(problem, denoiser, integrator)
    problem.report.update(denoiser.report.to_dict())
    return Draws(x, x)


def require_own_operator(problem: Problem, what: str) -> RowMaskedOperator:
    """The operator, if it has the mask that a mask-conditional prior must be shown."""
    require_mask_conditional(problem.prior, what)
    if not isinstance(problem.operator, RowMaskedOperator):
        raise InputError(
            f"{what}: expected an operator of ambient_sci, whose mask the prior is shown, got "
            f"{type(problem.operator).__name__}"
        )
    return problem.operator


def sample_one_step(problem: Problem) -> Draws:
    """E[x_0 | y, A] of a mask-conditional prior in one evaluation, at the noise level of the measurements: no
    samples, no spread.
    """
    operator = require_own_operator(problem, "the one-step estimate")
    if problem.sigma_y.ndim > 1:
        raise InputError(
            "the one-step estimate: expected one noise level for each image, which is what a "
            "mask-conditional prior is told, "
            "got levels that differ by entry"
        )
    problem.report.update(network_evaluations=1)
    x = denoise_measurement(problem.prior, operator, problem.y, problem.sigma_y)
    return Draws(x, x)


def sample_a_dps(problem: Problem, *, step: float = 1.0, precision: Precision = "fp32") -> Tensor:
    r"""Ambient diffusion posterior sampling: what a mask-conditional prior h allows in place of a posterior
    sampler.

        x_s = x_t + (s - t) / t (x_t - h_t) - step / ||y - A h_t||  grad_{x_t} ||y - A h_t||^2,
        h_t = h(A^H A x_t, sigma_t, A)

    Euler steps with the measured mask fixed throughout; norms are those of each sample. Published setting:
    500 steps, sigma_max 10, sigma_min 0.004, step 1, for images scaled to a maximum of one.

    Known deviation: h is a function of the measured coordinates of x_t, so the samples have no more
    directions of spread than there are measured rows (their covariance is rank-deficient), and the normalised
    step has no noise level in it. A good image, no error bars.

    Source: Aali et al., "Ambient Diffusion Posterior Sampling" (2024).

    Args:
        problem: the chains.
        step: size of the gradient steps, in the units of the images, >= 0.
        precision: of the network.
    """
    operator = require_own_operator(problem, "A-DPS")
    x, levels = problem.start(), [float(s) for s in problem.sigmas]
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        x.requires_grad_()
        with torch.enable_grad():
            h = _conditional(problem, operator, x, t, precision)
            misfit = measured(operator, problem.y - operator.A(h)).flatten(1).norm(dim=1)
            gradient = torch.autograd.grad(misfit.sum(), x)[0]
        x = (x + (s - t) / t * (x - h) - 2 * step * gradient).detach()
    problem.report.update(network_evaluations=len(levels), jacobian_products=len(levels) - 1)
    return _conditional(problem, operator, x, levels[-1], precision)


def _conditional(
    problem: Problem, operator: RowMaskedOperator, x: Tensor, sigma: float, precision: Precision
) -> Tensor:
    """h(A^H A x, sigma, A)."""
    with precision_context(precision, x.device):
        return denoise_measurement(problem.prior, operator, operator.A(x), problem.level(sigma))
