"""Parts "ring" and "mixture": identity noise on distributions with known density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ambient_sci.priors import Prior
from recipes.exactness import parts
from recipes.exactness.toys import denoiser_error, noisy_data, reference, sliced_wasserstein


class Part(parts.Part):
    """One of the two problems."""

    RUNS = ("clean", "noisy", "staged", "joint", "em")

    def problem(self, job: parts.Job, folder: Path) -> parts.Problem:
        """Noisy points; scored by the distance to the truth and the error of the denoiser."""
        data = noisy_data(self.name, job.size, 0.0 if job.run == "clean" else job.level, job.seed)
        truth = reference(self.name, job.settings["samples"], job.seed)

        def score(shown: Prior, samples: Tensor) -> dict[str, Any]:
            errors = denoiser_error(shown, self.name)
            return {
                "sliced_w2": sliced_wasserstein(samples.cpu(), truth),
                "worst_denoiser_error": max(errors.values()),
                "denoiser_error": errors,
            }

        def floor() -> float:
            return sliced_wasserstein(reference(self.name, job.settings["samples"], job.seed + 100), truth)

        return parts.Problem(data, score, floor)

    def rows(self, job: parts.Job, prior: Prior, problem: parts.Problem) -> dict[str, dict[str, Any]]:
        """The networks are tiny: they sample on the CPU."""
        return super().rows(job, prior.cpu(), problem)
