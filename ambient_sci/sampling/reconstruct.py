r"""Posterior reconstruction: p(x_0 | y) for y = A x_0 + sigma_y n, any prior, any linear operator, many images and samples in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.losses import estimate
from ambient_sci.noise import ChainNoise, draw_noise, expand, karras_grid
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior, require_mask_conditional, require_unconditional
from ambient_sci.progress import track
from ambient_sci.sampling.posterior import MMPS
from ambient_sci.sampling.result import Reconstruction, ResultWriter
from ambient_sci.sampling.unconditional import SAMPLERS, chain_seeds, level_range


@dataclass
class Problem:
    """One batch of chains: what a posterior sampler works on.

    Attributes:
        prior: the prior.
        operator: A for all chains.
        y: measurements, one for each chain, (B, ...).
        sigma_y: noise level of each chain, (B,).
        sigmas: decreasing noise levels.
        noise: one random stream for each chain.
        options: settings of the sampler.
        report: numbers a sampler adds.
    """

    prior: Prior
    operator: LinearPhysics
    y: Tensor
    sigma_y: Tensor
    sigmas: Tensor
    noise: ChainNoise
    options: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def start(self) -> Tensor:
        """Pure noise at the highest level, one image for each chain."""
        reference = next(iter(self.prior.state_dict().values()), self.y)
        like = torch.empty(len(self.y), *self.prior.shape, dtype=self.y.dtype, device=reference.device)
        return draw_noise(like, self.noise) * float(self.sigmas[0])


def sample_mmps(problem: Problem, integrator: str = "heun", **options: Any) -> Tensor:
    """Moment matching posterior sampling: `MMPS` in an unconditional sampler ("heun" or "ancestral")."""
    if integrator not in SAMPLERS:
        raise InputError(f"mmps: expected integrator heun or ancestral, got {integrator!r}")
    denoiser = MMPS(problem.prior, problem.operator, problem.y, problem.sigma_y, **options)
    x = SAMPLERS[integrator](denoiser, problem.start(), problem.sigmas, problem.noise)
    problem.report.update(denoiser.report.to_dict())
    return x


def sample_one_step(problem: Problem) -> Tensor:
    """E[x_0 | y, A] of a mask-conditional prior in one evaluation, at the noise level of the measurements: no samples, no spread."""
    require_mask_conditional(problem.prior, "the one-step estimate")
    if not isinstance(problem.operator, RowMaskedOperator):
        raise InputError(
            f"one-step: expected an operator of ambient_sci, got {type(problem.operator).__name__}"
        )
    problem.report.update(network_evaluations=1)
    return estimate(problem.prior, problem.operator, problem.y, problem.sigma_y)


POSTERIOR_SAMPLERS: dict[str, Callable[..., Tensor]] = {"mmps": sample_mmps, "one-step": sample_one_step}
POINT_ESTIMATES = frozenset({"one-step"})


class RepeatedPhysics(LinearPhysics):
    """A foreign physics with parameters for a batch of B, applied to k B chains (k samples of each image, sample-major)."""

    def __init__(self, physics: LinearPhysics, batch: int) -> None:
        super().__init__(noise_model=physics.noise_model)
        self.physics, self.batch = physics, batch

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """physics.A, one sample of all images at a time."""
        return torch.cat([self.physics.A(part, **kwargs) for part in x.split(self.batch)])

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """physics.A_adjoint, one sample of all images at a time."""
        return torch.cat([self.physics.A_adjoint(part, **kwargs) for part in y.split(self.batch)])


def _chains(operator: LinearPhysics, images: Tensor, batch: int) -> LinearPhysics:
    """The operator of the chains ``images``: for each chain, the index of its image among ``batch``."""
    if isinstance(operator, RowMaskedOperator):
        return operator if operator.batch_size == 1 else operator[images]
    if batch == 1:
        return operator
    return RepeatedPhysics(operator, batch)


def _check(
    prior: Prior, operator: LinearPhysics, y: Tensor, sigma_y: Any, sampler: str, samples: int
) -> Tensor:
    if sampler not in POSTERIOR_SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(POSTERIOR_SAMPLERS)}, got {sampler!r}")
    if samples < 1:
        raise InputError(f"samples: expected at least 1, got {samples}")
    if not isinstance(operator, LinearPhysics):
        raise InputError(
            f"{sampler}: expected a linear operator (deepinv LinearPhysics), got {type(operator).__name__}: "
            "these samplers are for linear measurements only"
        )
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise InputError(f"measurements: expected one real floating-point tensor, got {type(y).__name__}")
    if not bool(torch.isfinite(y).all()):
        raise InputError("measurements: expected finite values, got NaN or infinity")
    if sigma_y is None:
        raise InputError("sigma_y: expected the noise level of the measurements, got None")
    levels = torch.as_tensor(sigma_y, dtype=y.dtype)
    if levels.numel() not in (1, len(y)) or not bool((torch.isfinite(levels) & (levels >= 0)).all()):
        raise InputError(f"sigma_y: expected one value >= 0, or one per image ({len(y)}), got {sigma_y}")
    try:
        shape = tuple(operator.A_adjoint(y).shape)
    except InputError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"measurements {tuple(y.shape)} do not fit the operator {type(operator).__name__}: {str(error).splitlines()[0]}"
        ) from None
    if shape[1:] != tuple(prior.shape):
        raise InputError(
            f"operator: expected images of the prior's shape {tuple(prior.shape)}, got {shape[1:]}"
        )
    return levels.flatten().expand(len(y)).contiguous()


@torch.no_grad()
def reconstruct(
    prior: Prior,
    operator: LinearPhysics,
    y: Tensor,
    sigma_y: float | Tensor,
    *,
    samples: int = 8,
    sampler: str = "mmps",
    steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    progress: bool = False,
    **options: Any,
) -> Reconstruction:
    """Sample the posterior p(x_0 | y) of y = A x_0 + sigma_y n.

    Args:
        prior: see the samplers for the kind they need.
        operator: A, an operator of this library or any deepinv ``LinearPhysics``.
        y: measurements, (B, ...).
        sigma_y: their noise level per real channel, float or (B,), >= 0.
        samples: number S of posterior samples for each image.
        sampler: "mmps" (unconditional priors) or "one-step" (mask-conditional priors; a point estimate).
        steps: noise levels.
        sigma_min, sigma_max: ends of the grid; by default what the prior has learned (see `level_range`). Where
            sigma_min is the noise level of the training data, nothing below it was learned and the report says so.
        rho: bend of the grid.
        batch_size: chains (samples x images) at a time; it changes speed and memory, not the samples.
        generator: source of randomness.
        progress: show a progress bar.
        **options: settings of the sampler, e.g. ``tolerance`` and ``max_iterations`` of `MMPS`.

    Returns:
        mean, std, samples (S, B, C, H, W) and a report, in the type of ``y`` and on its device.

    Raises:
        InputError: non-linear physics, shapes that do not match, sigma_y missing or negative, non-finite measurements.
        ConditioningError: a prior of the other kind.
    """
    levels = _check(prior, operator, y, sigma_y, sampler, samples)
    samples = 1 if sampler in POINT_ESTIMATES else samples
    chunks = run_chunks(
        prior,
        operator,
        y,
        levels,
        samples,
        sampler,
        steps,
        (sigma_min, sigma_max, rho),
        batch_size,
        generator,
        progress,
        options,
    )
    parts, report = [], {}
    for _, part, report in chunks:
        parts.append(part)
    return Reconstruction.from_samples(torch.cat(parts).unflatten(0, (samples, len(y))), report)


def run_chunks(
    prior: Prior,
    operator: LinearPhysics,
    y: Tensor,
    levels: Tensor,
    samples: int,
    sampler: str,
    steps: int,
    grid: tuple[float | None, float | None, float],
    batch_size: int,
    generator: torch.Generator | None,
    progress: bool,
    options: dict[str, Any],
):
    """Yield (chain indices, images, report so far) for all samples x images chains, sample-major, ``batch_size`` at a time."""
    batch = len(y)
    low, high = level_range(prior, *grid[:2])
    sigmas = karras_grid(steps, low, high, rho=grid[2])
    seeds = chain_seeds(samples * batch, generator)
    foreign = not isinstance(operator, RowMaskedOperator) and batch > 1
    size = max(batch_size // batch, 1) * batch if foreign else batch_size
    totals: dict[str, Any] = {}
    for start in track(range(0, samples * batch, size), f"{sampler} sampling", enabled=progress):
        chains = torch.arange(start, min(start + size, samples * batch))
        images = chains % batch
        problem = Problem(
            prior,
            _chains(operator, images, batch),
            y[images],
            levels[images].to(y.device),
            sigmas,
            ChainNoise(seeds[start : start + size]),
            options,
        )
        try:
            x = POSTERIOR_SAMPLERS[sampler](problem, **options)
        except TypeError as error:
            if "unexpected keyword" in str(error):
                raise InputError(f"sampler {sampler!r}: {error}") from None
            raise
        totals = _merge(totals, problem.report)
        yield (
            chains,
            x,
            {
                "sampler": sampler,
                "steps": steps,
                "sigma_min": low,
                "sigma_max": high,
                "samples": samples,
                "options": dict(options),
                **totals,
                **_notes(prior, low, totals),
            },
        )


def _merge(totals: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Counts add up, "worst_…" is a maximum."""
    merged = dict(totals)
    for key, value in new.items():
        old = merged.get(key, 0)
        merged[key] = max(old, value) if key.startswith("worst") else old + value
    return merged


def _notes(prior: Prior, low: float, totals: dict[str, Any]) -> dict[str, Any]:
    notes = []
    if prior.sigma_min > 0 and low >= prior.sigma_min:
        notes.append(
            f"the grid stops at sigma = {low:g}, the noise level of the training data: nothing below it has been learned, and samples "
            "are means of what is left open there"
        )
    if totals.get("solves_above_tolerance"):
        notes.append(
            f"{totals['solves_above_tolerance']} of {totals['solves']} solves ended above the tolerance; worst relative residual "
            f"{totals['worst_relative_residual']:.2g}"
        )
    return {"notes": notes} if notes else {}


def reconstruct_to_file(
    prior: Prior,
    measurements: Any,
    out: str | Path,
    *,
    samples: int = 8,
    sampler: str = "mmps",
    images_at_once: int = 16,
    indices: range | None = None,
    overwrite: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """Reconstruct a measurement file image by image into a result file, at the memory of one batch whatever the number of samples.

    Args:
        prior: as for `reconstruct`.
        measurements: an open `MeasurementFile`.
        out: result file to make.
        samples, sampler: as for `reconstruct`.
        images_at_once: images whose chains are batched together.
        indices: which images, a range of step 1; default all.
        **settings: further arguments of `reconstruct`.

    Returns:
        the report.
    """
    chosen = range(len(measurements)) if indices is None else indices
    samples = 1 if sampler in POINT_ESTIMATES else samples
    subjects = [measurements.subjects[i] for i in chosen] if measurements.subjects else []
    shape = (samples, len(chosen), *prior.shape)
    starts = range(0, len(chosen), images_at_once)
    totals: dict[str, Any] = {}
    with ResultWriter(out, shape, subjects, measurements.scale, overwrite=overwrite) as writer:
        for start in track(starts, f"{sampler} reconstruction", enabled=progress):
            index = list(chosen[start : start + images_at_once])
            result = reconstruct(
                prior,
                measurements.operator(index).to(device),
                measurements.measurements(index).to(device),
                measurements.sigma(index),
                samples=samples,
                sampler=sampler,
                generator=generator,
                progress=progress and len(starts) == 1,
                **settings,
            )
            writer.add(slice(start, start + len(index)), result.samples)
            counts = {k: v for k, v in result.report.items() if k.startswith(("solve", "worst", "network"))}
            totals = {**result.report, **_merge({k: totals[k] for k in counts if k in totals}, counts)}
        totals.pop("notes", None)
        writer.report = {**totals, **_notes(prior, float(totals["sigma_min"]), totals)}
    return writer.report
