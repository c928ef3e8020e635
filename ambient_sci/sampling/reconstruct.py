r"""Posterior reconstruction: p(x_0 | y) for y = A x_0 + sigma_y n, any prior, any linear operator, many
images and samples in one batch.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.baselines import BASELINES
from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior, require_mask_conditional, require_unconditional
from ambient_sci.progress import track
from ambient_sci.sampling.batching import Chunk, chunks, default_batch_size
from ambient_sci.sampling.classic import reconstruct_classically
from ambient_sci.sampling.guided import stops_early
from ambient_sci.sampling.problem import PosteriorSampler, Problem
from ambient_sci.sampling.result import Reconstruction
from ambient_sci.sampling.samplers import POINT_ESTIMATES, POSTERIOR_SAMPLERS
from ambient_sci.sampling.unconditional import chain_seeds, level_grid, level_range

__all__ = ["POINT_ESTIMATES", "POSTERIOR_SAMPLERS", "Run", "reconstruct"]


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
        and on its device.

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
    for chunk, x in run.parts(progress=progress):
        images[chunk.samples.start : chunk.samples.stop, chunk.images.start : chunk.images.stop] = x
    return Reconstruction.from_samples(images, run.report())


@dataclass
class Run:
    """A checked request for samples of a few images, worked off in rectangular chunks of chains.

    What a chain becomes depends on its seed alone, not on the chunk it is in. ``batch_size`` is the number of
    chains to try at a time; it falls to what has fitted where that was too many.
    """

    prior: Prior
    operator: LinearPhysics
    y: Tensor
    sigma_y: Tensor
    sigmas: Tensor
    name: str
    samples: int
    seeds: Tensor
    batch_size: int
    options: dict[str, Any]
    totals: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        prior: Prior,
        operator: LinearPhysics,
        y: Tensor,
        sigma_y: float | Tensor,
        samples: int,
        name: str,
        steps: int | None,
        grid: tuple[float | None, float | None, float | None],
        batch_size: int | None,
        generator: torch.Generator | None,
        options: dict[str, Any],
    ) -> Run:
        """Check everything that a user gave, and say what is wrong with it."""
        sampler = check_sampler(name, samples, batch_size, options)
        steps = sampler.steps if steps is None else steps
        y, levels = check_measurements(prior, operator, y, sigma_y, name)
        needs = require_unconditional if sampler.conditioning == "unconditional" else require_mask_conditional
        needs(prior, name)
        low, high = level_range(prior, *grid[:2])
        samples = 1 if sampler.point_estimate else samples
        return cls(
            prior,
            operator,
            y,
            levels,
            level_grid(steps, low, high, sampler.rho if grid[2] is None else grid[2]),
            name,
            samples,
            torch.tensor(chain_seeds(samples * len(y), generator)).reshape(samples, len(y)),
            batch_size or default_batch_size(prior, y),
            options,
        )

    def parts(self, *, progress: bool = False) -> Iterator[tuple[Chunk, Tensor]]:
        """(chunk, samples (s, n, C, H, W)) for every chunk. One that does not fit on the device is halved,
        and so are all that follow.
        """
        sampler = POSTERIOR_SAMPLERS[self.name]
        rules = {
            "all_images": len(self.y) > 1 and not isinstance(self.operator, RowMaskedOperator),
            "all_samples": sampler.population,
        }
        plan = list(chunks(len(self.y), self.samples, self.batch_size, **rules))
        for whole in track(plan, f"{self.name} sampling", enabled=progress):
            waiting = deque([whole])
            while waiting:
                chunk = waiting.popleft()
                halves = halve(chunk, **rules)
                if chunk.chains > self.batch_size and halves:
                    waiting.extendleft(reversed(halves))
                    continue
                try:
                    x = self._sample(sampler, chunk)
                except torch.OutOfMemoryError:
                    if not halves:
                        raise
                    self.batch_size = halves[-1].chains
                    waiting.appendleft(chunk)
                    continue
                yield chunk, x

    def _sample(self, sampler: PosteriorSampler, chunk: Chunk) -> Tensor:
        images = slice(chunk.images.start, chunk.images.stop)
        whole = len(chunk.images) == len(self.y)
        operator = self.operator if whole else self.operator[images]  # type: ignore[index]
        seeds = self.seeds[chunk.samples.start : chunk.samples.stop, images].flatten().tolist()
        problem = Problem(self.prior, operator, self.y[images], self.sigma_y[images], self.sigmas, seeds)
        x = sampler.run(problem, **self.options)
        check_numbers(x, problem.report, self.name)
        self.totals = merge(self.totals, problem.report)
        return x.detach().unflatten(0, (len(chunk.samples), len(chunk.images)))

    def report(self) -> dict[str, Any]:
        """How the samples were made and how well the solves went; JSON types."""
        settings = {
            "sampler": self.name,
            "steps": len(self.sigmas),
            "sigma_min": float(self.sigmas[-1]),
            "sigma_max": float(self.sigmas[0]),
            "samples": self.samples,
            "options": dict(self.options),
        }
        return {**settings, **self.totals, **notes(self.prior, settings["sigma_min"], self.totals)}


def halve(chunk: Chunk, *, all_images: bool, all_samples: bool) -> list[Chunk]:
    """The chunk in two, by samples or else by images; nothing where neither may or can be divided."""
    s, i = chunk.samples, chunk.images
    if len(s) > 1 and not all_samples:
        middle = len(s) // 2
        return [Chunk(i, s[:middle]), Chunk(i, s[middle:])]
    if len(i) > 1 and not all_images:
        middle = len(i) // 2
        return [Chunk(i[:middle], s), Chunk(i[middle:], s)]
    return []


def merge(totals: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Reports of two parts of a run as one: counts of solves add up, "worst_…" and "smallest_…" are extremes,
    the rest holds for each chain.
    """
    merged = dict(totals)
    for key, value in new.items():
        old = merged.get(key, value)
        if key.startswith("solve"):
            merged[key] = merged.get(key, 0) + value
        elif key.startswith("smallest"):
            merged[key] = min(old, value)
        else:
            merged[key] = value if isinstance(value, str) else max(old, value)
    return merged


def notes(prior: Prior, low: float, totals: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the result has to know: {"notes": [...]}, or nothing."""
    found = []
    if stops_early(prior, low) and "final" in totals:
        learned = ", the lowest level the prior has learned" if low <= prior.sigma_min * (1 + 1e-6) else ""
        meaning = (
            "what is finer was drawn from a Gaussian of the right mean and covariance"
            if totals["final"] == "draw"
            else "samples are means of what is left open there, and spread too little"
        )
        found.append(f"sampling stopped at sigma = {low:g}{learned}: {meaning}")
    if totals.get("solves_above_tolerance"):
        found.append(
            f"{totals['solves_above_tolerance']} of {totals['solves']} solves ended above the tolerance; "
            "worst relative residual "
            f"{totals['worst_relative_residual']:.2g}"
        )
    return {"notes": found} if found else {}


# -- the border ------------------------------------------------------------------------------------------

COUNTS = frozenset({"max_iterations", "root_iterations", "particles", "inner_steps"})
POSITIVE = frozenset({"tolerance", "data_std", "coupling", "resample_below"})


def check_sampler(
    name: str, samples: int, batch_size: int | None, options: dict[str, Any]
) -> PosteriorSampler:
    """The sampler of this name, if the numbers make sense and it has these options."""
    if name not in POSTERIOR_SAMPLERS:
        raise InputError(
            f"sampler: expected one of {', '.join(POSTERIOR_SAMPLERS)}, got {name!r}; a classic "
            f"reconstruction: {', '.join(BASELINES)}"
        )
    if samples < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(
            f"{name}: expected samples and batch_size of at least 1, got {samples} and {batch_size}"
        )
    known = sampler_options(name)
    unknown = [k for k in options if k not in known]
    if unknown:
        raise InputError(
            f"sampler {name}: expected options among {', '.join(known) or 'none'}, got {', '.join(unknown)}"
        )
    for option, value in options.items():
        if option in COUNTS and not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name}: expected {option} to be an integer >= 1, got {value}")
        if option in POSITIVE and value is not None and not 0 < value < math.inf:
            raise InputError(f"{name}: expected {option} to be a number > 0, got {value}")
    return POSTERIOR_SAMPLERS[name]


def sampler_options(name: str) -> list[str]:
    """Names of the settings that a sampler takes: the keyword arguments of its function and of its posterior
    denoiser.
    """
    sampler = POSTERIOR_SAMPLERS[name]
    functions = [sampler.run, *([sampler.denoiser] if sampler.denoiser is not None else [])]
    return [
        p.name
        for function in functions
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]


def check_measurements(
    prior: Prior | None, operator: Any, y: Any, sigma_y: Any, name: str
) -> tuple[Tensor, Tensor]:
    """Measurements, in float32 or better, and their noise levels, if measurements, operator and prior fit
    each other."""
    if not isinstance(operator, LinearPhysics):
        raise InputError(
            f"{name}: expected a linear operator (deepinv LinearPhysics), got {type(operator).__name__}: "
            "these samplers are for linear measurements only"
        )
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise InputError(f"measurements: expected one real floating-point tensor, got {type(y).__name__}")
    if y.ndim < 1 or len(y) == 0:
        raise InputError(f"measurements: expected (B, ...) of at least one image, got {tuple(y.shape)}")
    if not bool(torch.isfinite(y).all()):
        raise InputError("measurements: expected finite values, got NaN or infinity")
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    levels = check_noise(sigma_y, y)
    try:
        shape = tuple(operator.A_adjoint(y).shape)
    except InputError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"measurements {tuple(y.shape)} do not fit the operator {type(operator).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if not isinstance(operator, RowMaskedOperator):
        check_linear(operator, y, shape)
    if prior is not None and shape[1:] != tuple(prior.shape):
        raise InputError(
            f"operator: expected images of the prior's shape {tuple(prior.shape)}, got {shape[1:]}"
        )
    return y, levels


def check_linear(operator: LinearPhysics, y: Tensor, shape: tuple[int, ...]) -> None:
    """One look at a foreign physics, with random images: is A linear, and is its A_adjoint the adjoint of A?

        A(2 u - v) = 2 A u - A v,        <A u, w> = <u, A^H w>

    Every sampler here relies on both; with an adjoint that is only nearly one, posteriors come out wrong and
    no residual shows it.

    Raises:
        InputError: either does not hold to a thousandth.
    """
    name = type(operator).__name__
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(y) for _ in range(2))
    w = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    with torch.no_grad():
        image, other, both = operator.A(u), operator.A(v), operator.A(2 * u - v)
        back = operator.A_adjoint(w)
    if image.shape != y.shape:
        raise InputError(
            f"operator {name}: expected A of images {shape} to have the shape of the measurements "
            f"{tuple(y.shape)}, "
            f"got {tuple(image.shape)}"
        )
    size = float(image.norm() + other.norm()) or 1.0
    if not float((both - 2 * image + other).norm()) < 1e-3 * size:
        raise InputError(
            f"operator {name}: expected a linear A, got one with A(2 u - v) other than 2 A u - A v"
        )
    ahead, behind = float((image * w).sum(dtype=torch.float64)), float((u * back).sum(dtype=torch.float64))
    scale = float(image.norm() * w.norm() + u.norm() * back.norm()) or 1.0
    # Inner products of random vectors are some 1 / sqrt(n) of the product of their norms.
    if not abs(ahead - behind) < 1e-3 * scale / max(y.numel(), u.numel()) ** 0.5:
        raise InputError(
            f"operator {name}: expected A_adjoint to be the adjoint of A, got <A u, w> = {ahead:.5g} and <u, "
            f"A_adjoint w> = {behind:.5g}"
        )


def check_noise(sigma_y: Any, y: Tensor) -> Tensor:
    """Noise levels of ``y``, (B,) or of its shape, in its type and on its device.

    Raises:
        InputError: no level, or not one value, one per image or one per entry, finite and >= 0.
    """
    if sigma_y is None:
        raise InputError("sigma_y: expected the noise level of the measurements, got None")
    levels = sigma_y if isinstance(sigma_y, Tensor) else torch.from_numpy(np.array(sigma_y))
    fits = levels.shape == y.shape or levels.numel() in (1, len(y))
    if levels.is_complex() or not fits or not bool((torch.isfinite(levels) & (levels >= 0)).all()):
        raise InputError(
            f"sigma_y: expected real values >= 0, one, one per image ({len(y)}) or one per entry "
            f"{tuple(y.shape)}, got "
            f"{levels.flatten()[:4].tolist()}{' ...' if levels.numel() > 4 else ''} of shape "
            f"{tuple(levels.shape)}"
        )
    levels = levels.to(y)
    return levels.flatten().expand(len(y)).contiguous() if levels.numel() in (1, len(y)) else levels


def check_numbers(x: Tensor, report: dict[str, Any], name: str) -> None:
    """Raise InputError for samples that are no numbers, or that came about without the measurements because
    these overflowed.
    """
    if not bool(torch.isfinite(x).all()):
        raise InputError(
            f"{name}: expected finite samples, got NaN or infinity: the prior's weights are damaged or "
            "diverged, "
            "or the levels overflow"
        )
    if report.get("worst_relative_residual") == math.inf:
        raise InputError(
            f"{name}: expected measurements and a denoiser whose squares are finite in {x.dtype}, got a "
            "solve that "
            "overflowed; scale the data"
        )
