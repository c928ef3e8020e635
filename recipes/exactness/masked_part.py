"""Parts "masked" (digits) and "masked-mixture" (16 dimensions): a fraction of the entries missing at random,
the rest slightly noisy.

em                  an unconditional prior by expectation maximisation, sampled as it is
mask-conditional    the operator-aware Ambient loss, sampled with one fixed mask a chain (the published
                    baseline)
clean               a prior trained on the images themselves
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.operators import Identity, Independent, Masking
from ambient_sci.priors import Prior
from ambient_sci.sampling import generate_fixed_mask
from recipes.exactness import parts
from recipes.exactness.toys import reference, sliced_wasserstein, truth
from recipes.small_images import Scores, spread

NOISE = 0.05


class Part(parts.Part):
    """Masked digits, or the masked mixture."""

    RUNS = ("clean", "em", "mask-conditional")
    LEVELS = "missing"

    def problem(self, job: parts.Job, folder: Path) -> parts.Problem:
        """Incomplete measurements, or what they are of."""
        clean, score, floor = self._truth(job, folder)
        if job.run == "clean":
            return parts.Problem((Identity(tuple(clean.shape[1:])), clean, 0.0), score, floor)
        generator = torch.Generator().manual_seed(1000 + job.seed)
        design = Independent(tuple(clean.shape[1:]), "pixels", 1 - job.level)
        operator = Masking(design.sample(job.size, generator), img_size=tuple(clean.shape[1:]), design=design)
        noise = torch.randn(clean.shape, generator=generator) * operator.mask
        data = (operator, operator.A(clean) + NOISE * noise, NOISE)
        kept = None
        if job.run == "mask-conditional":
            kept = operator.split(keep=job.settings["keep"], generator=generator).kept
        return parts.Problem(data, score, floor, kept)

    def rows(self, job: parts.Job, prior: Prior, problem: parts.Problem) -> dict[str, dict[str, Any]]:
        """Mask-conditional priors sample with the masks of the data, further thinned; the others as they
        are."""
        if job.run != "mask-conditional":
            return super().rows(job, prior, problem)
        settings = job.settings
        samples = generate_fixed_mask(
            prior,
            problem.kept.to(next(prior.parameters()).device),
            settings["samples"],
            steps=settings["sampler_steps"],
            sigma_max=settings["sigma_max"],
            batch_size=settings["sampler_batch"],
            generator=torch.Generator().manual_seed(3000 + job.seed),
        )
        return {"mask-conditional, fixed mask": problem.score(prior, samples)}

    def _truth(
        self, job: parts.Job, folder: Path
    ) -> tuple[Tensor, Callable[[Prior, Tensor], Any], Callable[[], Any]]:
        """Clean images, what scores samples, and what as many draws of the truth score."""
        num = job.settings["samples"]
        if self.name == "masked":
            scores = Scores(folder)
            return spread(job.size), lambda _, samples: scores(samples), lambda: scores(spread(num))
        held_out, others = reference("mixture", num, job.seed), reference("mixture", num, job.seed + 100)
        clean = truth("mixture").sample(job.size, torch.Generator().manual_seed(2000 + job.seed)).float()

        def distance(samples: Tensor) -> dict[str, float]:
            return {"sliced_w2": sliced_wasserstein(samples.cpu(), held_out)}

        return clean, lambda _, samples: distance(samples), lambda: distance(others)
