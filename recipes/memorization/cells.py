"""A cell: one network at one of its stops, trained to there, sampled, measured.

The cells of a run (images, sigma_n, seed) are one group: the learning rate is constant, so that a run to step
4,000 goes on from the one to step 2,000 as if it had not stopped, and early stopping costs nothing but
sampling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ambient_sci.errors import InputError
from ambient_sci.operators import Identity
from ambient_sci.priors import Prior
from ambient_sci.sampling import generate_to_file
from ambient_sci.training import RunFolder, TrainConfig, fit
from recipes.grid import Cell
from recipes.memorization.data import Data, load
from recipes.memorization.scores import measure

#: Standard deviation of the images that levels are published for.
PUBLISHED_STD = 0.5


@dataclass(frozen=True)
class Job:
    """A cell of the table.

    Attributes:
        images: training images.
        sigma_n: noise frozen in them above that level, in published units; 0 is denoising score matching.
        seed: of images, noise, network and samples.
        step: the stop.
        settings: of the part, config.yaml.
    """

    images: int
    sigma_n: float
    seed: int
    step: int
    settings: dict[str, Any]

    @property
    def run(self) -> str:
        """Names the run folder."""
        return f"n{self.images}-sigma{self.sigma_n:g}-s{self.seed}"

    @property
    def last(self) -> bool:
        """Whether it is the run's last stop."""
        return self.step == max(self.settings["stops"])

    def cell(self) -> Cell:
        """The cell of the grid."""
        about = {"images": self.images, "sigma_n": self.sigma_n, "seed": self.seed, "step": self.step}
        return Cell(f"{self.run}-{self.step}", about, group=self.run)

    def data(self) -> Data:
        """What is trained on, and what is not."""
        held_out = max(asked["held_out"] for asked in self.settings["features"].values())
        return load(self.settings["data"], self.images, self.seed, held_out)


def jobs(
    settings: dict[str, Any],
    images: list[int] | None = None,
    levels: list[float] | None = None,
    seeds: list[int] | None = None,
) -> Iterator[Job]:
    """The cells of a part, those that say most first: all levels of the first seed and size, further sizes,
    further seeds."""
    runs = [
        (place, num, seed)
        for num, own in settings["images"].items()
        for place, seed in enumerate(own)
        if (images is None or num in images) and (seeds is None or seed in seeds)
    ]
    runs.sort(key=lambda run: run[0])
    for (_, num, seed), sigma_n in itertools.product(runs, settings["sigma_n"]):
        if levels is None or sigma_n in levels:
            for step in sorted(settings["stops"]):
                yield Job(num, float(sigma_n), seed, step, settings)


def configuration(job: Job, device: str) -> TrainConfig:
    """The training of a run, to this stop."""
    frozen = {"sigma_n": job.sigma_n / PUBLISHED_STD, "seed": job.seed}
    told = {"seed": job.seed, "max_steps": job.step, "device": device, "frozen_noise": frozen}
    return TrainConfig.from_dict({**job.settings["training"], **told})


def train(job: Job, data: Data, folder: Path, device: str) -> Prior:
    """The prior at this stop.

    Raises:
        InputError: the run has gone past it.
    """
    resume = (folder / "config.json").exists()
    saved = RunFolder(folder).load_checkpoint("ambient") if resume else None
    if saved is not None and saved[1]["step"] > job.step:
        raise InputError(
            f"{folder}: expected a run up to step {job.step}, got one at step {saved[1]['step']}, past this "
            "stop; remove the folder and it is trained again"
        )
    operator = Identity(tuple(data.train.shape[1:]))
    return fit((operator, data.train, 0.0), configuration(job, device), folder, resume=resume)


def work(job: Job, out: Path, device: str) -> dict[str, Any]:
    """Train, draw, measure; the run's folder is in ``out``, and holds the samples."""
    data, folder = job.data(), out / job.run
    prior = train(job, data, folder, device)
    features = job.settings["features"]
    samples = folder / f"samples-{job.step}.h5"
    if not samples.exists():
        generate_to_file(
            prior,
            max(a["samples"] for a in features.values() if job.last or a["at"] == "every"),
            samples,
            **job.settings["sampler"],
            generator=torch.Generator().manual_seed(3000 + job.seed),
            history=f"recipes/memorization {job.run}, step {job.step}",
        )
    place = next(iter(prior.parameters())).device
    return {"data_std": prior.data_std, "scores": measure(samples, data, features, out, job.last, str(place))}
