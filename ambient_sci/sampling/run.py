"""One request for posterior samples, checked and worked off in chunks of chains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior, require_mask_conditional, require_unconditional
from ambient_sci.priors.tiled import TiledPrior
from ambient_sci.progress import track
from ambient_sci.sampling.batching import Chunk, chunks, default_batch_size
from ambient_sci.sampling.checks import check_measurements, check_numbers, check_sampler
from ambient_sci.sampling.notes import merge, notes, solver_bias
from ambient_sci.sampling.problem import Draws, PosteriorSampler, Problem
from ambient_sci.sampling.samplers import POSTERIOR_SAMPLERS
from ambient_sci.sampling.unconditional import chain_seeds, level_grid, level_range


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
    left: dict[float, float] = field(default_factory=dict)

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

    def parts(self, *, progress: bool = False) -> Iterator[tuple[Chunk, Draws]]:
        """(chunk, draws of shape (s, n, C, H, W)) for every chunk. One that does not fit on the device is
        halved, and so are all that follow.
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
                    found = self._sample(sampler, chunk)
                except torch.OutOfMemoryError:
                    if not halves:
                        raise
                    self.batch_size = halves[-1].chains
                    waiting.appendleft(chunk)
                    continue
                yield chunk, found

    def _sample(self, sampler: PosteriorSampler, chunk: Chunk) -> Draws:
        images = slice(chunk.images.start, chunk.images.stop)
        whole = len(chunk.images) == len(self.y)
        operator = self.operator if whole else self.operator[images]  # type: ignore[index]
        seeds = self.seeds[chunk.samples.start : chunk.samples.stop, images].flatten().tolist()
        problem = Problem(self.prior, operator, self.y[images], self.sigma_y[images], self.sigmas, seeds)
        found = sampler.run(problem, **self.options)
        draws = found if isinstance(found, Draws) else Draws(found)
        images_of = [x for x in (draws.samples, draws.means, draws.controls) if x is not None]
        for x in {id(x): x for x in images_of}.values():
            check_numbers(x, problem.report, self.name)
        mean_of = "draws" if draws.means is None else "conditional means"
        self.totals = merge(self.totals, {**problem.report, "mean_of": mean_of})
        for level, square in draws.left.items():
            self.left[level] = self.left.get(level, 0.0) + square * chunk.chains
        shape = (len(chunk.samples), len(chunk.images))
        return replace(
            draws,
            **{
                name: None if x is None else x.detach().unflatten(0, shape)
                for name in ("samples", "means", "controls")
                for x in [getattr(draws, name)]
            },
        )

    def report(self, std: float) -> dict[str, Any]:
        """How the samples were made and how well the solves went; JSON types.

        Args:
            std: root mean square of the posterior's standard deviation; 0 if it is not known.
        """
        settings = {
            "sampler": self.name,
            "steps": len(self.sigmas),
            "sigma_min": float(self.sigmas[-1]),
            "sigma_max": float(self.sigmas[0]),
            "samples": self.samples,
            "options": dict(self.options),
        }
        if isinstance(self.prior, TiledPrior):
            settings["tile_overlap"] = self.prior.overlap
        report = {**settings, **self.totals}
        if self.left and std > 0:
            chains = self.samples * len(self.y)
            report["bias_of_solves"] = solver_bias({t: sq / chains for t, sq in self.left.items()}, std)
        return {**report, **notes(self.prior, report)}


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
