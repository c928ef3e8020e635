"""Parts "ring" and "mixture": identity noise on distributions with known density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from methods import rows, train
from toys import denoiser_error, noisy_data, reference, sliced_wasserstein

from ambient_sci.priors import Prior


class Part:
    """One of the two problems.

    Attributes:
        RUNS: what is trained.
    """

    RUNS = ("clean", "noisy", "staged", "joint", "em")

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
        """Train, sample, score; the metric's floor (two draws of the truth) is scored beside it."""
        data = noisy_data(self.name, size, 0.0 if run == "clean" else level, seed)
        prior, seconds = train(data, run, settings, seed, folder, device)
        truth = reference(self.name, settings["samples"], seed)

        def score(shown: Prior, samples: torch.Tensor) -> dict[str, Any]:
            errors = denoiser_error(shown, self.name)
            return {
                "sliced_w2": sliced_wasserstein(samples.cpu(), truth),
                "worst_denoiser_error": max(errors.values()),
                "denoiser_error": errors,
            }

        found = rows(run, prior.cpu(), level, settings, seed, score)
        floor = sliced_wasserstein(reference(self.name, settings["samples"], seed + 100), truth)
        return {"rows": found, "floor": floor, "training_seconds": round(seconds, 1)}
