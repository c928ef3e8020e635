"""Part "digits": noisy digits, sigma_n in {.1, .2} where images lie in [-1, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from digit_scores import Scores, images, spread
from methods import rows, train

from ambient_sci.operators import Identity
from ambient_sci.priors import Prior


class Part:
    """Digits with identity noise.

    Attributes:
        RUNS: what is trained.
    """

    RUNS = ("clean", "noisy", "staged", "joint")

    def __init__(self, name: str) -> None:
        self.name = name

    def levels(self, settings: dict[str, Any]) -> list[float]:
        """Noise levels of the data."""
        return settings["sigma_n"]

    def run(
        self,
        run: str,
        level: float,
        size: int,
        seed: int,
        settings: dict[str, Any],
        folder: Path,
        device: str,
    ) -> dict[str, Any]:
        """Train, draw, score; the same scores of as many images of the training part are the floor."""
        score = Scores(folder.parent)
        clean = images("test10k")[0][:size]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 + seed))
        sigma = 0.0 if run == "clean" else level
        prior, seconds = train(
            (Identity((1, 28, 28)), clean + sigma * noise, sigma), run, settings, seed, folder, device
        )

        def scored(shown: Prior, samples: torch.Tensor) -> dict[str, Any]:
            return score(samples)

        found = rows(run, prior, level, settings, seed, scored)
        floor = score(spread(settings["samples"]))
        return {"rows": found, "floor": floor, "training_seconds": round(seconds, 1)}
