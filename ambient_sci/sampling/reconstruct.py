r"""Posterior reconstruction: p(x_0 | y) for y = A x_0 + sigma_y n, any prior, any linear operator, many
images and samples in one batch.
"""

from __future__ import annotations

from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.baselines import BASELINES
from ambient_sci.priors.base import Prior
from ambient_sci.sampling.checks import check_measurements, sampler_options
from ambient_sci.sampling.classic import reconstruct_classically
from ambient_sci.sampling.moments import Moments, add_to
from ambient_sci.sampling.result import Reconstruction
from ambient_sci.sampling.run import Run
from ambient_sci.sampling.samplers import POINT_ESTIMATES, POSTERIOR_SAMPLERS

__all__ = ["POINT_ESTIMATES", "POSTERIOR_SAMPLERS", "Run", "reconstruct", "sampler_options"]


@torch.no_grad()
def reconstruct(
    prior: Prior | None,
    operator: LinearPhysics,
    y: Tensor,
    sigma_y: float | Tensor,
    *,
    samples: int = 8,
    sampler: str = "mmps",
    steps: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    **options: Any,
) -> Reconstruction:
    """Sample the posterior p(x_0 | y) of y = A x_0 + sigma_y n.

    Args:
        prior: see the samplers for the kind they need; None for classic reconstructions.
        operator: A, an operator of this library or any deepinv ``LinearPhysics``.
        y: measurements, (B, ...).
        sigma_y: their noise level per real channel, >= 0: float, (B,), or of the shape of ``y`` where noise
            differs by entry.
        samples: number S of posterior samples for each image.
        sampler: a name in `POSTERIOR_SAMPLERS`: for unconditional priors "mmps" (moment matching, the
            default), "daps", "smc" (exact in the limit), "pnp-dm", "pigdm", "dps"; for mask-conditional ones
            "a-dps" and "one-step" (a point estimate).
            Or a classic reconstruction, a point estimate without a prior: a name in
                `ambient_sci.baselines.BASELINES`, see `reconstruct_classically`.
        steps: noise levels; default: the sampler's.
        sigma_min, sigma_max: ends of the grid; by default what the prior has learned (see `level_range`).
        rho: bend of the grid, see `level_grid`; default: the sampler's.
        batch_size: chains (samples x images) at a time; it changes speed and memory, not the samples.
            Default: what fits into memory.
        generator: source of randomness.
        progress: show a progress bar.
        **options: settings of the sampler: the keyword arguments of its function, e.g. ``tolerance`` and
            ``max_iterations`` of `MMPS`.

    Returns:
        mean, std, samples (S, B, C, H, W) and a report, in the type of ``y`` (float32 where that is shorter)
        and on its device. The samples are draws; ``mean`` averages what each of them is the mean of, which
        has less noise than the average of the draws, and ``report["mean_of"]`` says so: "conditional means",
        or "draws" where the sampler has no such means.

    Raises:
        InputError: non-linear physics, shapes that do not match, sigma_y missing or negative, non-finite
            measurements, unknown options; samples that are not finite.
        ConditioningError: a prior of the other kind.
    """
    if sampler in BASELINES:
        ignored = {"steps": steps, "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
        y, levels = check_measurements(prior, operator, y, sigma_y, sampler)
        return reconstruct_classically(operator, y, levels, sampler, ignored, options)
    run = Run.prepare(
        prior,
        operator,
        y,
        sigma_y,
        samples,
        sampler,
        steps,
        (sigma_min, sigma_max, rho),
        batch_size,
        generator,
        options,
    )
    images = torch.empty(run.samples, len(y), *prior.shape, dtype=run.y.dtype, device=y.device)
    moments = [Moments() for _ in y]
    for chunk, draws in run.parts(progress=progress):
        some, rows = (slice(r.start, r.stop) for r in (chunk.samples, chunk.images))
        images[some, rows] = draws.samples
        add_to(moments[rows], draws)
    mean, std = (torch.cat([get(m) for m in moments]) for get in (Moments.mean, Moments.std))
    report = run.report(float(std.square().mean().sqrt()))
    return Reconstruction(mean.to(images), std.to(images), images, report)
