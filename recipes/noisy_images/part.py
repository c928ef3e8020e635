"""A cell: images made noisy once, a prior from them alone, its samples scored and kept for a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators import Identity
from ambient_sci.priors import Prior
from recipes.exactness import methods, parts
from recipes.exactness.run import job_name
from recipes.noisy_images.data import noisy, scores, training_images

SHOWN = 16


class Part(parts.Part):
    """Noisy images of a data set.

    Args:
        name: the data set.
        noise: "high", levels in units of the clean images' standard deviation over all entries, or "low",
            levels of images in [-1, 1].
    """

    RUNS = ("clean", "noisy", "staged")

    def __init__(self, name: str, noise: str) -> None:
        super().__init__(name)
        self.LEVELS = {"high": "relative", "low": "sigma_n"}[noise]
        self.noise = noise
        self._clean: Tensor | None = None

    def seeds(self, settings: dict[str, Any], level: float) -> list[int]:
        """More of them at some levels."""
        return settings.get("seeds_at", {}).get(level, settings["seeds"])

    def images(self, job: parts.Job) -> Tensor:
        """The clean images of a cell."""
        if self._clean is None:
            self._clean = training_images(job.settings, self.name)
        if job.size > len(self._clean):
            raise InputError(
                f"points: expected at most the {len(self._clean)} images of {self.name}, got {job.size}"
            )
        return self._clean[: job.size]

    def sigma(self, job: parts.Job) -> float:
        """Noise of the data, absolute."""
        unit = float(self.images(job).double().std()) if self.noise == "high" else 1.0
        return job.level * unit

    def problem(self, job: parts.Job, folder: Path) -> parts.Problem:
        """Noisy images; as many of the scored images' kind are the floor."""
        clean, sigma = self.images(job), self.sigma(job)
        score, floor = scores(job.settings, self.name, folder / "features")
        y = noisy(clean, sigma, job.seed)
        seen = {"clean": clean[:SHOWN].contiguous(), "noisy": y[:SHOWN].contiguous()}
        kept = folder / f"{job_name(job)}.samples.safetensors"

        def keep(row: str, samples: Tensor) -> None:
            seen[row] = samples[:SHOWN].float().cpu().contiguous()
            save_file(seen, kept)

        data = (Identity(tuple(clean.shape[1:])), y, sigma)
        return parts.Problem(data, lambda shown, samples: score(samples), floor, keep=keep)

    def rows(self, job: parts.Job, prior: Prior, problem: parts.Problem) -> dict[str, dict[str, Any]]:
        """Rows of the table, with the level at which truncated sampling stops."""
        sigma = self.sigma(job)
        found = methods.rows(job.run, prior, sigma, job.settings, job.seed, problem.score, problem.keep)
        return {row: {**values, "sigma_n": sigma} for row, values in found.items()}
