"""Part "digits": noisy digits, sigma_n in {0.1, 0.2} where images lie in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import torch

from ambient_sci.operators import Identity
from recipes.exactness import parts
from recipes.small_images import Scores, images, spread


class Part(parts.Part):
    """Digits with identity noise."""

    RUNS = ("clean", "noisy", "staged", "joint")

    def problem(self, job: parts.Job, folder: Path) -> parts.Problem:
        """Noisy digits; the same scores of as many images of the training part are the floor."""
        score = Scores(folder)
        clean = images("test10k")[0][: job.size]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 + job.seed))
        sigma = 0.0 if job.run == "clean" else job.level
        return parts.Problem(
            (Identity((1, 28, 28)), clean + sigma * noise, sigma),
            lambda shown, samples: score(samples),
            lambda: score(spread(job.settings["samples"])),
        )
