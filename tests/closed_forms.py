"""Small exact problems and statistics that the tests share. Everything in float64, everything from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ambient_sci import losses
from ambient_sci.noise import expand
from ambient_sci.operators import MRI, Identity, Masking, RowMaskedOperator, normalise_maps
from ambient_sci.priors import GaussianMixturePrior, GaussianPrior, NetworkConfig, NetworkPrior

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def gaussian_prior(shape: tuple[int, ...], seed: int = 0) -> GaussianPrior:
    """A Gaussian with a full covariance of eigenvalues between .1 and 2, and a mean that is not zero."""
    n = math.prod(shape)
    vectors, _ = torch.linalg.qr(normal(n, n, seed=seed))
    cov = vectors * torch.logspace(-1, math.log10(2), n, dtype=F64) @ vectors.T
    return GaussianPrior(normal(*shape, seed=seed + 1), (cov + cov.T) / 2)


def mixture_prior(shape: tuple[int, ...], seed: int = 0, components: int = 3) -> GaussianMixturePrior:
    """A mixture whose components overlap at the noise levels of the tests."""
    std = torch.linspace(0.3, 0.7, components, dtype=F64)
    weights = torch.arange(1, components + 1, dtype=F64)
    return GaussianMixturePrior(0.7 * normal(components, *shape, seed=seed), std, weights)


PRIORS = {"gaussian": gaussian_prior, "mixture": mixture_prior}


def coil_maps(coils: int, height: int, width: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Random normalised complex128 maps (batch, coils, H, W)."""
    real, imag = normal(2, batch, coils, height, width, seed=seed)
    return normalise_maps(torch.complex(real, imag))


def random_mask(batch: int, *shape: int, keep: float = 0.6, seed: int = 0) -> Tensor:
    """0/1 of which no sample is empty."""
    mask = (torch.rand(batch, *shape, generator=seeded(seed)) < keep).to(F64)
    mask.flatten(1)[:, 0] = 1.0
    return mask


def operator_zoo(batch: int = 3, size: tuple[int, int] = (4, 3)) -> dict[str, RowMaskedOperator]:
    """One operator of every kind over (2, H, W) images, a mask for each sample, in float64; sizes even and odd."""
    mask = random_mask(batch, 1, *size)
    zoo = {
        "identity": Identity((2, *size)),
        "masking": Masking(mask, (2, *size)),
        "masking of entries": Masking(random_mask(batch, 2, *size, seed=1), (2, *size)),
        "mri": MRI(mask),
        "mri, coils": MRI(mask, coil_maps(3, *size)),
        "mri, coils of each scan": MRI(mask, coil_maps(3, *size, batch=batch, seed=5)),
    }
    return {name: operator.to(F64) for name, operator in zoo.items()}


def ambient_step(
    prior, operator, y, sigma_y, sigma, *, keep=1.0, generator=None, keep_calibration=False, **options
) -> losses.AmbientStep:
    """`losses.ambient` with what it computed on the way: draws the split, then takes the step."""
    split = operator.split(keep=keep, generator=generator, num=len(y), keep_calibration=keep_calibration)
    return losses.ambient_step(prior, split, y, sigma_y, sigma, generator=generator, **options)


def uncorrected(prior, operator, y, sigma_y, sigma, *, keep=1.0, generator=None, **options) -> Tensor:
    """The ambient loss without Tweedie's correction, c = 1: kept rows are fitted noise and all."""
    split = operator.split(keep=keep, generator=generator, num=len(y))
    step = losses.ambient_step(prior, split, y, sigma_y, sigma, generator=generator, **options)
    error = (operator.transform(step.denoised) - y).square()
    return losses.weighted_error(
        prior, split, step.denoised, expand(sigma, y), error, error if split.holds_out else None
    )


def z_score(values: Tensor) -> float:
    """Mean over its standard error. For a true mean of zero |z| > 4.5 has probability 7e-6 (normal approximation)."""
    return float(values.mean() / (values.std() / math.sqrt(values.numel())))


def dense(operator: RowMaskedOperator, sample: int) -> Tensor:
    """A of one sample as a matrix whose rows are the measured ones only, built column by column."""
    one = operator[sample]
    size = math.prod(one.img_size)
    columns = [one.A(e.reshape(1, *one.img_size)).flatten() for e in torch.eye(size, dtype=F64)]
    measured = one.mask.expand(1, *one.measurement_size).flatten() > 0
    return torch.stack(columns, 1)[measured]


NETWORK_SHAPE = (2, 8, 8)
UNET = NetworkConfig(channels=(8, 16), norm_groups=4, head_channels=8)
MLP = NetworkConfig(kind="mlp", channels=(24, 24))


def network(
    conditioning: str = "unconditional", config: NetworkConfig = UNET, seed: int = 0, **options
) -> NetworkPrior:
    """A network prior whose last layer is not zero, as after training."""
    prior = NetworkPrior(NETWORK_SHAPE, 0.7, conditioning, config, generator=seeded(seed), **options)
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(seed)))
    return prior.eval()
