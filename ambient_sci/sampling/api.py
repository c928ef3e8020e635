"""What users call: `reconstruct` and `generate`, with everything they may be given; see
`ambient_sci.sampling.border` for what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Never

import torch
from torch import Tensor

from ambient_sci.baselines import BASELINES
from ambient_sci.errors import InputError
from ambient_sci.precision import Precision
from ambient_sci.priors.given import Given
from ambient_sci.sampling.border import (
    Array,
    PriorLike,
    as_device,
    as_generator,
    as_prior,
    as_request,
    device_of,
    moved,
)
from ambient_sci.sampling.reconstruct import reconstruct as sample_posterior
from ambient_sci.sampling.result import Reconstruction
from ambient_sci.sampling.sizes import fitted, image_shape
from ambient_sci.sampling.unconditional import generate as draw_images

Integrator = Literal["multistep", "heun", "ancestral"]
SamplerName = Literal[
    "mmps", "daps", "smc", "pnp-dm", "pigdm", "dps", "a-dps", "one-step",
    "zero-filled", "sense", "l1-wavelet", "tv",
]  # fmt: skip


def reconstruct(
    prior: PriorLike | None,
    operator: Any,
    y: Array | None = None,
    sigma_y: float | Array | None = None,
    *,
    samples: int = 8,
    sampler: SamplerName | str = "mmps",
    steps: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    indices: Sequence[int] | None = None,
    precision: Precision | None = None,
    integrator: Integrator | None = None,
    final: Literal["auto", "mean", "draw"] | None = None,
    antithetic: bool | None = None,
    direct: bool | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    root_iterations: int | None = None,
    inner_steps: int | None = None,
    coupling: float | None = None,
    particles: int | None = None,
    resample_below: float | None = None,
    data_std: float | None = None,
    limit: float | None = None,
    step: float | None = None,
    weight: float | Tensor | None = None,
    tile_overlap: int | None = None,
    **unknown: Never,
) -> Reconstruction:
    """Sample the posterior p(x_0 | y) of y = A x_0 + sigma_y n.

    Images may be of another size than the prior's; what is done then is said, and noted in the report.

    Args:
        prior: a prior, the folder of one or of a training run, or "pretrained:NAME"; see the samplers for the
            kind they need. None for classic reconstructions.
        operator: A, an operator of this library or any deepinv ``LinearPhysics``; or a measurement file, the
            path of one, or `MeasurementArrays`, without ``y`` and ``sigma_y``.
        y: measurements, (B, ...), a tensor or a NumPy array; one without the batch counts as a batch of one.
        sigma_y: their noise level per real channel, >= 0: float, (B,), or of the shape of ``y`` where noise
            differs by entry. Default: the level of the operator's noise model, which has to be Gaussian.
        samples: number S of posterior samples for each image.
        sampler: for unconditional priors "mmps" (moment matching, the default), "daps", "smc" (exact in the
            limit), "pnp-dm", "pigdm", "dps"; for mask-conditional ones "a-dps" and "one-step" (a point
            estimate); classic reconstructions without a prior, point estimates: "zero-filled", "tv", and for
            MRI "sense" and "l1-wavelet".
        steps: noise levels; default: the sampler's.
        sigma_min, sigma_max: ends of the grid; by default what the prior has learned (see `level_range`).
        rho: bend of the grid, see `level_grid`; default: the sampler's.
        batch_size: chains (samples x images) at a time; it changes speed and memory, not the samples.
            Default: what fits into memory.
        seed: of all randomness, a whole number >= 0: the same seed, the same samples.
        generator: source of randomness, in place of a seed.
        device: where to compute: "auto", "cpu", "cuda" or a device. Default: where the prior is. Operator and
            measurements are copied there.
        progress: show progress on standard error: a bar, or a line every half minute where that is no
            terminal.
        indices: which samples of a measurement file; default: all.
        precision: of the network: "fp32", "bf16", or "auto" (bf16 where the hardware multiplies it natively).
        integrator: mmps, pigdm, dps: how to walk down the levels, see `ambient_sci.sampling.unconditional`.
        final: mmps: return the mean at the lowest level, a draw, or what suits it ("auto").
        antithetic: mmps: whether the mean has a control from opposite noise, which takes most of the Monte
            Carlo error off a mean of few samples for a fifth of the time; default: yes. Samples are the same.
        direct: mmps: whether complete measurements of white noise are denoised without any solve; default:
            yes, where the prior has learned their level.
        tolerance: mmps, daps, pnp-dm, classic: relative residual at which a solve stops, > 0.
        max_iterations: mmps, daps, pnp-dm, classic: iterations of a solve at most.
        root_iterations: mmps: Jacobian products for the square root of a covariance.
        inner_steps, coupling: pnp-dm, see `ambient_sci.sampling.pnp_dm`.
        particles, resample_below: smc, see `ambient_sci.sampling.smc`.
        data_std: pigdm, smc: standard deviation of the images; default: the prior's.
        limit: dps: see `DPS`.
        step: a-dps: length of its gradient step.
        weight: classic: of the penalty, one or one for each image; default: of least estimated risk.
        tile_overlap: images larger than the prior's are covered with tiles that share so many pixels at
            least, see `Prior.at_shape`; default: a quarter of a tile.

    Returns:
        mean, std, samples (S, B, C, H, W) and a report, in the type of ``y`` (float32 where that is shorter)
        and on the device where ``y`` was. From a measurement file also subjects, scale, geometry and source.

    Raises:
        InputError: what is not of its kind, non-linear physics, shapes that do not match, sigma_y missing or
            negative, non-finite measurements, settings that the sampler does not have; samples that are not
            finite.
        ConditioningError: a prior of the other kind.

    Examples:
        >>> import ambient_sci as asci, deepinv
        >>> physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.1))
        >>> prior = asci.load_prior("pretrained:brain64")
        >>> result = asci.reconstruct(prior, physics, y, seed=0)  # doctest: +SKIP
        >>> result.plot()  # doctest: +SKIP
    """
    given = {
        "precision": precision, "integrator": integrator, "final": final, "antithetic": antithetic,
        "direct": direct, "tolerance": tolerance,
        "max_iterations": max_iterations, "root_iterations": root_iterations, "inner_steps": inner_steps,
        "coupling": coupling, "particles": particles, "resample_below": resample_below, "data_std": data_std,
        "limit": limit, "step": step, "weight": weight, **unknown,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    generator = as_generator(generator, seed, "reconstruct")
    if sampler not in BASELINES or prior is not None:
        prior = as_prior(prior, "reconstruct", device)
    request = as_request(prior, operator, y, sigma_y, indices, "reconstruct")
    home = request.y.device
    request = moved(request, as_device(device) or device_of(prior) or home)
    prior = fitted(prior, image_shape(request.operator, request.y), tile_overlap)
    result = sample_posterior(
        prior, request.operator, request.y, request.sigma_y, samples=samples, sampler=sampler, steps=steps,
        sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, batch_size=batch_size, generator=generator,
        progress=progress, **options,
    )  # fmt: skip
    for name in ("mean", "std", "samples"):
        setattr(result, name, getattr(result, name).to(home))
    for name, value in request.about.items():
        setattr(result, name, value)
    return result


def generate(
    prior: PriorLike,
    num: int,
    *,
    steps: int | None = None,
    sampler: Integrator = "heun",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    batch_size: int = 64,
    given: Given | None = None,
    guidance: float = 1.0,
    size: tuple[int, int] | None = None,
    tile_overlap: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw images from an unconditional prior; see `ambient_sci.sampling.unconditional.generate`.

    Args:
        prior: a prior, the folder of one or of a training run, or "pretrained:NAME".
        num: number of images.
        steps: noise levels, >= 1; default: 40, and 1 for a one-step generator.
        sampler: "multistep", "heun" or "ancestral".
        sigma_min, sigma_max: ends of the grid; see `level_range`.
        rho: bend of the grid (Karras et al. 2022).
        batch_size: images at a time; the result does not depend on it.
        given: `Labels` or a `Prompt` with one row for each image, for priors that take them.
        guidance: scale of classifier-free guidance, see `Guided`; 1 is none.
        size: height and width of the images; default: the prior's.
        tile_overlap: of the tiles that cover images larger than the prior's, see `Prior.at_shape`.
        seed: of all randomness, a whole number >= 0.
        generator: source of randomness, in place of a seed.
        device: where to compute; default: where the prior is.
        progress: show progress on standard error.

    Returns:
        (num, C, H, W), in the prior's type (float32 where that is shorter) and where it was computed.

    Raises:
        ConditioningError: a mask-conditional prior.
        InputError: what is not of its kind, an unknown sampler, impossible numbers, or images that are not
            finite.
    """
    generator = as_generator(generator, seed, "generate")
    if isinstance(num, bool) or not isinstance(num, int):
        raise InputError(f"generate: expected num to be a whole number, got {num!r}")
    found = as_prior(prior, "generate", device)
    found = fitted(found, (found.shape[0], *(size or found.shape[1:])), tile_overlap)
    return draw_images(
        found, num, steps=steps, sampler=sampler, sigma_min=sigma_min,
        sigma_max=sigma_max, rho=rho, batch_size=batch_size, given=given, guidance=guidance,
        generator=generator, progress=progress,
    )  # fmt: skip
