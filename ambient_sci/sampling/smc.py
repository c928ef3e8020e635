r"""Twisted sequential Monte Carlo: the reference that is exact in the limit of many particles and fine
levels.

A population of particles x_t goes down the levels. It is moved by the ancestral step of a *posterior*
denoiser, whose error is known and made up for by weights: with the prior's own step p and the twisting
function psi,

    p(x_s | x_t) = N(D + (s/t)^2 (x_t - D), v I),        q(x_s | x_t) = N(D~ + (s/t)^2 (x_t - D~), v I),
    v = s^2 (1 - s^2/t^2)
    psi_t(x_t) = p(y | x_t) for x_0 ~ N(D, r_t^2 I),
    D~ = D + r_t^2 A^H (sigma_y^2 I + r_t^2 A A^H)^-1 (y - A D)

    w_s = w_t  p(x_s | x_t) psi_s(x_s) / (q(x_s | x_t) psi_t(x_t)).

Whatever psi is, the weighted population targets p(x_min) psi_min(x_min); psi and q only decide how many
particles are worth how much. Their effective sample size (sum w)^2 / sum w^2 is reported; when it falls below
a share of their number they are resampled. At the end x_0 is drawn from its Gaussian given x_min and y, so
that sigma_y = 0 is allowed.

What is left is the error of the steps themselves, first order in the log-ratio of levels, and of N(D, r^2 I)
at sigma_min.

Source: Wu et al., "Practical and Asymptotically Exact Conditional Sampling in Diffusion Models" (2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import ChainNoise, draw_noise
from ambient_sci.precision import Precision
from ambient_sci.priors.base import require_unconditional
from ambient_sci.sampling.conditioning import Likelihood, prior_spread
from ambient_sci.sampling.problem import Draws, Problem


def sample_smc(
    problem: Problem,
    *,
    particles: int = 256,
    resample_below: float = 0.5,
    data_std: float | None = None,
    precision: Precision = "fp32",
) -> Draws:
    """Twisted SMC (equations above): a population of each image, and as many draws from it as samples are
    wanted.

    Args:
        problem: the chains; the samples of an image come from one population, without replacement as far as
            weights allow.
        particles: population of each image; at least the number of samples.
        resample_below: share of the particles in (0, 1]; below this effective sample size they are resampled.
        data_std: d in r_t^2 = sigma_t^2 d^2 / (sigma_t^2 + d^2); default: the prior's.
        precision: of the network.

    Raises:
        InputError: fewer particles than samples, or a share outside (0, 1].
    """
    require_unconditional(problem.prior, "SMC")
    if particles < problem.samples or not 0 < resample_below <= 1:
        raise InputError(
            f"smc: expected particles >= samples ({problem.samples}) and resample_below in (0, 1], got "
            f"{particles} and {resample_below}"
        )
    population = problem.with_samples(particles)
    spread = problem.prior.data_std if data_std is None else data_std
    likelihood = Likelihood(population.operator, population.y, population.sigma_y)
    streams = ChainNoise(problem.seeds[: problem.images], problem.y.device)
    levels = [float(s) for s in problem.sigmas]

    x = population.start()
    denoised = population.denoise(x, levels[0], precision)
    twist = likelihood.log_evidence(denoised, prior_spread(levels[0], spread)).double()
    weights = twist.reshape(particles, problem.images)
    smallest = effective_size(weights)
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        effective = effective_size(weights)
        smallest = torch.minimum(smallest, effective)
        weights, index = resample(weights, effective < resample_below * particles, particles, streams)
        x, denoised, twist = x[index], denoised[index], twist[index]

        share = (s / t) ** 2
        deviation = s * (1 - share) ** 0.5
        z = draw_noise(x, population.noise)
        shift = (1 - share) * (likelihood.mean(denoised, prior_spread(t, spread)) - denoised) / deviation
        x = denoised + share * (x - denoised) + deviation * (z + shift)
        denoised = population.denoise(x, s, precision)
        ahead = likelihood.log_evidence(denoised, prior_spread(s, spread)).double()
        # log p - log q = (|z|^2 - |z + shift|^2) / 2, both steps being Gaussians of one variance.
        proposal = -(shift * (z + shift / 2)).flatten(1).sum(1).double()
        weights = weights + (proposal + ahead - twist).reshape(weights.shape)
        twist = ahead

    smallest = float(torch.minimum(smallest, effective_size(weights)).min())
    everyone = torch.ones(problem.images, dtype=torch.bool, device=x.device)
    _, index = resample(weights, everyone, problem.samples, streams)
    likelihood.report.evaluations += len(levels)
    end = prior_spread(levels[-1], spread)
    means = likelihood.mean(denoised, end).unflatten(0, weights.shape)
    # Every sample comes from one population, whose weighted mean is the mean of each of them.
    shares = weights.softmax(0).to(means.dtype)
    whole = torch.einsum("pi,pi...->i...", shares, means).repeat(problem.samples, 1, 1, 1)
    problem.report.update(likelihood.report.to_dict(), smallest_effective_sample_size=smallest)
    return Draws(likelihood.draw(denoised, end, population.noise)[index], whole)


def effective_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of log-weights (particles, images), (images,)."""
    return (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp()


def resample(weights: Tensor, which: Tensor, draws: int, streams: ChainNoise) -> tuple[Tensor, Tensor]:
    """Systematic resampling of the images ``which``; the others keep their particles.

    Args:
        weights: log-weights, (particles, images).
        which: (images,) bool.
        draws: number of particles to have afterwards; as many as before unless every image is resampled.
        streams: one for each image; each image uses one uniform, resampled or not.

    Returns:
        log-weights (draws, images), zero where resampled, and the flat index of the particles kept,
        sample-major.
    """
    particles, images = weights.shape
    uniform = [
        torch.rand((), generator=g, dtype=weights.dtype, device=streams.device) for g in streams.generators
    ]
    start = torch.stack(uniform).to(weights.device)
    points = (torch.arange(draws, dtype=weights.dtype, device=weights.device)[:, None] + start) / draws
    cumulative = weights.softmax(0).cumsum(0)
    chosen = torch.searchsorted(cumulative.T.contiguous(), points.T.contiguous()).T.clamp(max=particles - 1)
    if draws == particles:
        chosen = torch.where(which, chosen, torch.arange(particles, device=weights.device)[:, None])
        kept = torch.where(which, 0.0, weights)
    else:
        kept = torch.zeros_like(points)
    return kept, (chosen * images + torch.arange(images, device=weights.device)).flatten()
