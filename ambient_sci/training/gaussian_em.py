r"""A Gaussian fitted to incomplete, noisy measurements by expectation maximisation: where EM for a network
begins.

For y_i = A_i x + sigma_i n, A_i = M_i T, and x ~ N(mu, Sigma):

    P_i = A_i^H (A_i Sigma A_i^H + sigma_i^2 I)^-1 A_i   and
    b_i = A_i^H (A_i Sigma A_i^H + sigma_i^2 I)^-1 (y_i - A_i mu)
    E-step   E[x | y_i] = mu + Sigma b_i,      Cov[x | y_i] = Sigma - Sigma P_i Sigma
    M-step   mu <- mean_i E[x | y_i],          Sigma <- mean_i Cov[x | y_i] + cov_i E[x | y_i]

in closed form (`fit_gaussian`): every iteration raises the likelihood of the measurements, whose maximum is
the limit. Sum of the P_i first, and the two products with Sigma are taken once an iteration.

sigma_i may differ from entry to entry, and be 0. Without noise the likelihood has no maximum as soon as there
are fewer samples than unknowns: a Gaussian that is flat along what they leave open explains them infinitely
well, and its systems cannot be solved. So noise below `NOISE_FLOOR` times the standard deviation of the data
counts as that much; a fit says so where that happened.

Images too large for a covariance matrix get a stationary one (`fit_stationary`). Its E-step draws x ~ p(x |
y_i) exactly, by conjugate gradients: x_p ~ N(mu, Sigma), n ~ N(0, I), K u = y_i - A_i x_p - sigma_i n, x =
x_p + Sigma A_i^H u, with K = A_i Sigma A_i^H + sigma_i^2 I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import draw_noise, expand
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.priors import GaussianPrior, operator_matrix
from ambient_sci.priors.stationary import StationaryGaussianPrior
from ambient_sci.sampling import conjugate_gradient
from ambient_sci.training.source import Measurements

#: Entries of an image, and of a measurement, up to which a full covariance is fitted.
LARGEST_FULL = 1024
#: Noise that is assumed at least, in units of the standard deviation of the data.
NOISE_FLOOR = 1e-3
_CHUNK_ENTRIES = 1 << 23  # entries of the systems solved at a time
_CG_ITERATIONS, _CG_TOLERANCE = 150, 1e-3


@dataclass
class GaussianFit:
    """A fitted Gaussian, and how it was reached.

    Attributes:
        prior: the Gaussian.
        log_likelihood: of the measurements, a number a sample, before each iteration; empty for the
            stationary fit.
        noise_floor: the noise level that stood in for smaller ones; None where there were none.
    """

    prior: GaussianPrior | StationaryGaussianPrior
    log_likelihood: list[float]
    noise_floor: float | None = None


def fit_initial(
    data: Measurements, indices: Tensor, iterations: int, generator: torch.Generator
) -> GaussianFit:
    """The Gaussian fit that the size of the images allows, on the samples ``indices``, in float32."""
    operator, y, sigma = data.operator(indices), data.measurements(indices), data.sigma(indices)
    small = max(math.prod(data.image_shape), math.prod(y.shape[1:])) <= LARGEST_FULL
    if small and _shares_transform(operator):
        fit = fit_gaussian(operator, y, sigma, data.image_shape, iterations=iterations)
        prior = fit.prior
        return replace(fit, prior=GaussianPrior(prior.mean.float(), prior.cov.float()))
    if len(data.image_shape) != 3:
        raise InputError(f"EM: expected images (C, H, W) of this size, got shape {data.image_shape}")
    stationary = fit_stationary(
        operator, y, sigma, data.image_shape, iterations=iterations, generator=generator
    )
    floor = NOISE_FLOOR * stationary.data_std
    lowest = float(expand(sigma, y).expand_as(y)[(operator.mask > 0).expand_as(y)].min())
    return GaussianFit(stationary, [], floor if lowest < floor else None)


def fit_gaussian(
    operator: RowMaskedOperator,
    y: Tensor,
    sigma_y: float | Tensor,
    shape: tuple[int, ...],
    *,
    iterations: int = 100,
    tolerance: float = 1e-7,
) -> GaussianFit:
    """Maximum-likelihood Gaussian of the images behind measurements, by exact EM, in float64.

    Args:
        operator: of all samples, one transform T for all (masks may differ).
        y: measurements (N, ...).
        sigma_y: noise level, float, (N,) or of the shape of y; at least `NOISE_FLOOR` (above) is assumed.
        shape: (C, H, W) of an image.
        iterations: at most.
        tolerance: stop when an iteration adds less than this to the log-likelihood of a measured entry.

    Raises:
        InputError: coil maps that differ between samples.
    """
    if not _shares_transform(operator):
        raise InputError("Gaussian EM: expected one set of coil maps for all samples, got one each")
    device = y.device
    full = operator[:1].with_mask(torch.ones_like(operator.mask[:1]).expand(1, *y.shape[1:]))
    transform = operator_matrix(full, shape).to(device)[0]
    mask = operator.mask.double().expand(y.shape).flatten(1)
    rows = y.double().flatten(1) * mask
    variance = expand(sigma_y, y.double()).expand_as(y).flatten(1) ** 2
    floor = NOISE_FLOOR * _spread(mask, rows)
    least = float(variance[mask > 0].min())
    variance = variance.clamp(min=floor**2)
    mean, cov = _first_guess(transform, mask, rows, variance)
    history: list[float] = []
    for _ in range(iterations):
        mean, cov, likelihood = _iterate(transform, mask, rows, variance, mean, cov)
        history.append(likelihood / len(y))
        gain = (history[-1] - history[-2]) / float(mask.sum(1).mean()) if len(history) > 1 else math.inf
        if gain < tolerance:
            break
    return GaussianFit(GaussianPrior(mean.reshape(shape), cov), history, floor if least < floor**2 else None)


def _shares_transform(operator: RowMaskedOperator) -> bool:
    maps = getattr(operator, "coil_maps", None)
    return maps is None or maps.shape[0] == 1


def _spread(mask: Tensor, rows: Tensor) -> float:
    """Standard deviation of measured rows about their means over the samples; their size where each was
    measured once.
    """
    mean = rows.sum(0) / mask.sum(0).clamp(min=1)
    about = float((rows - mean * mask).square().sum())
    return math.sqrt((about or float(rows.square().sum())) / float(mask.sum()))


def _first_guess(transform: Tensor, mask: Tensor, rows: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the samples that measured a row; white covariance of the variance that noise leaves."""
    count = mask.sum(0).clamp(min=1)
    mean_rows = rows.sum(0) / count
    rest = ((rows - mean_rows * mask).square() - variance * mask).sum(0) / count
    power = float(rest.sum().clamp(min=0)) / transform.shape[1]
    noise = float((variance * mask).sum() / mask.sum())
    mean = torch.linalg.lstsq(transform, mean_rows[:, None]).solution[:, 0]
    return mean, max(power, 1e-3 * noise) * torch.eye(
        transform.shape[1], dtype=transform.dtype, device=transform.device
    )


def _iterate(
    transform: Tensor, mask: Tensor, rows: Tensor, variance: Tensor, mean: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor, float]:
    """One EM iteration, and the log-likelihood of the parameters it began with."""
    num, size = len(rows), len(mean)
    covered = transform @ cov @ transform.mT
    shifts, precision, likelihood = [], torch.zeros_like(covered), 0.0
    largest = int(mask.sum(1).max())
    identity = torch.eye(largest, dtype=rows.dtype, device=rows.device)
    for part in torch.arange(num, device=rows.device).split(max(_CHUNK_ENTRIES // largest**2, 1)):
        # The measured rows of each sample, first; a system costs the cube of their number. Samples with fewer
        # are filled up with rows of unit variance and residual zero, which change neither solution nor
        # likelihood.
        chosen = mask[part].argsort(dim=1, descending=True, stable=True)[:, :largest]
        m, noise = mask[part].gather(1, chosen), variance[part].gather(1, chosen)
        pairs = (chosen[:, :, None].expand(-1, -1, largest), chosen[:, None, :].expand(-1, largest, -1))
        system = m[:, :, None] * covered[pairs] * m[:, None, :] + torch.diag_embed(noise * m + 1 - m)
        factor = torch.linalg.cholesky(system)
        residual = m * (rows[part] - transform @ mean).gather(1, chosen)
        inverse = torch.cholesky_solve(identity.expand_as(factor), factor) * m[:, :, None] * m[:, None, :]
        solved = (inverse @ residual[..., None])[..., 0]
        log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum()
        constant = math.log(2 * math.pi) * m.sum()
        likelihood -= 0.5 * float((residual * solved).sum() + log_det + constant)
        precision.index_put_(pairs, inverse, accumulate=True)
        shifts.append(torch.zeros_like(rows[part]).scatter(1, chosen, solved) @ transform)
    moved = torch.cat(shifts) @ cov  # E[x | y_i] - mu
    left = cov - cov @ (transform.mT @ (precision / num) @ transform) @ cov
    step = moved.mean(0)
    new = left + (moved - step).mT @ (moved - step) / num
    return (
        mean + step,
        (new + new.mT) / 2
        + 1e-14 * torch.trace(new) / size * torch.eye(size, dtype=new.dtype, device=new.device),
        likelihood,
    )


def fit_stationary(
    operator: RowMaskedOperator,
    y: Tensor,
    sigma_y: float | Tensor,
    shape: tuple[int, ...],
    *,
    iterations: int = 30,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
) -> StationaryGaussianPrior:
    """Stationary Gaussian of the images behind measurements, by EM with exact posterior draws; any operator
    of the library.

    The mean of the last half of the iterations is returned, which averages the draws' noise out.

    Args:
        operator, y, shape: as for `fit_gaussian`; coil maps may differ.
        sigma_y: noise level, float, (N,) or of the shape of y; at least `NOISE_FLOOR` of the fit's standard
            deviation is assumed.
        iterations: number of E-steps.
        generator: of the draws.
        batch_size: samples at a time.
    """
    sigma = expand(sigma_y, y).expand(len(y), *[-1] * (y.ndim - 1))
    images = operator.A_adjoint(y)
    mean = images.mean(0)
    prior = StationaryGaussianPrior(mean, _first_spectrum(operator, y, sigma, mean))
    sums = [torch.zeros_like(mean), torch.zeros_like(mean)]
    for iteration in range(iterations):
        x = torch.cat(
            [
                _posterior_draws(
                    prior,
                    operator if operator.batch_size == 1 else operator[part],
                    y[part],
                    sigma[part],
                    generator,
                )
                for part in torch.arange(len(y)).split(batch_size)
            ]
        )
        mean = x.mean(0)
        spectrum = torch.fft.fft2(x - mean, norm="ortho").abs().square().mean(0)
        prior = StationaryGaussianPrior(mean, spectrum)
        if iteration >= iterations // 2:
            sums = [sums[0] + mean, sums[1] + spectrum]
    count = iterations - iterations // 2
    return StationaryGaussianPrior(sums[0] / count, sums[1] / count)


def _first_spectrum(operator: RowMaskedOperator, y: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
    """Variances of the Fourier modes to start from, (C, H, W), from second moments of each row over the
    samples that measured it.

    Rows of k-space are the modes, but for what coil maps, which are smooth, mix of their neighbours;
    elsewhere the start is flat. EM forgets a start slowly where few samples measure, so it should not be far
    off there: averaging over *measurements* instead, of which masks of variable density put most where the
    power is, would give every mode several times the variance that it has.
    """
    mask = operator.mask.to(y).expand(y.shape)
    count = mask.sum(0)
    power = ((y.square() - sigma**2) * mask).sum(0)
    # In units of the data: where noise is all there is, something has to be left to start from.
    least = max(1e-6 * float((y.square() * mask).sum() / mask.sum()), torch.finfo(y.dtype).tiny)
    if operator.name != "mri":
        seen = count > 0
        flat = float((power[seen] / count[seen]).mean()) * y[0].numel() / mean.numel()
        return max(flat - float(mean.square().mean()), least) * torch.ones_like(mean)
    if y.ndim == 5:  # coils add up, as sum_c |s_c|^2 = 1
        power, count = power.sum(1), count[:, 0]
    kernel = torch.ones(1, 1, 5, 5, dtype=y.dtype, device=y.device)
    near = torch.nn.functional.conv2d(torch.stack([power.sum(0), count.sum(0)])[:, None], kernel, padding=2)
    modes = torch.where(near[1, 0] > 0, near[0, 0] / near[1, 0].clamp(min=1), near.new_zeros(()))
    modes = torch.fft.ifftshift(modes.clamp(min=max(1e-3 * float(modes.mean()), least)))
    mirrored = modes.flip(0, 1).roll((1, 1), (0, 1))
    return ((modes + mirrored) / 2).expand(mean.shape).contiguous()


def _posterior_draws(
    prior: StationaryGaussianPrior,
    operator: RowMaskedOperator,
    y: Tensor,
    sigma: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """One exact draw of p(x | y) for each measurement."""
    sigma = sigma.clamp(min=NOISE_FLOOR * prior.data_std)
    x = prior.sample(len(y), generator)
    residual = (y - sigma * draw_noise(y, generator)) * operator.mask - operator.A(x)
    u = conjugate_gradient(
        lambda v: operator.A(prior.covariance(operator.A_adjoint(v))) + sigma**2 * v,
        residual,
        tolerance=_CG_TOLERANCE,
        max_iterations=_CG_ITERATIONS,
    ).u
    return x + prior.covariance(operator.A_adjoint(u))
