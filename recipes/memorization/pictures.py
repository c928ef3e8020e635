"""Figures of images: what networks make of noisy training images, and samples beside their nearest training
images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.evaluation import neighbours
from ambient_sci.evaluation.memorization_figures import pairs_figure
from ambient_sci.priors import load_prior
from recipes.memorization.cells import Job

#: Of the figure of denoised images, in published units.
LEVELS = (0.2, 0.5, 1.0, 2.0, 4.0)
IMAGES, SAMPLES = 2, 8


def write_pictures(out: Path, jobs: list[Job], show: list[float]) -> list[Path]:
    """The figures of every number of images, of the first seed there is.

    Args:
        out: folder of the runs and of the figures.
        jobs: last stops that are there.
        show: which sigma_n.
    """
    written = []
    for num in dict.fromkeys(job.images for job in jobs):
        first = next(job.seed for job in jobs if job.images == num)
        own = [job for job in jobs if (job.images, job.seed) == (num, first) and job.sigma_n in show]
        own = [job for job in own if (out / job.run / f"samples-{job.step}.h5").exists()]
        if own:
            own.sort(key=lambda job: job.sigma_n)
            written += [samples(out, num, own), denoised(out, num, own)]
    return written


def title(job: Job) -> str:
    """The method of a run."""
    return "DSM" if job.sigma_n == 0 else f"sigma_n {job.sigma_n:g}"


def samples(out: Path, num: int, jobs: list[Job]) -> Path:
    """The first samples of every run, and real images that were held out, each beside the nearest training
    image; the numbers are cosines of their pixels."""
    data, columns, notes = jobs[0].data(), {}, {}
    held_out, train = data.held_out[:SAMPLES], data.train.flatten(1)
    for job in jobs:
        with ReferenceFile(out / job.run / f"samples-{job.step}.h5") as file:
            columns[title(job)] = file.images(slice(0, SAMPLES))
    for name, drawn in {**columns, "held out": held_out}.items():
        near = neighbours(drawn.flatten(1), train, held_out=held_out.flatten(1))
        columns |= {name: drawn, f"nearest to {name}": data.train[near.index[:, 0]]}
        notes[name] = [f"{v:.2f}" for v in near.similarity[:, 0].tolist()]
    order = [f"{kind}{name}" for name in notes for kind in ("", "nearest to ")]
    return pairs_figure(out / f"samples-n{num}.png", {name: columns[name] for name in order}, notes)


@torch.no_grad()
def denoised(out: Path, num: int, jobs: list[Job]) -> Path:
    """D(x + sigma z, sigma) of training images x at rising levels: one row the noisy image, one a network."""
    x = jobs[0].data().train[:IMAGES]
    priors = [load_prior(out / job.run) for job in jobs]
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    columns: dict[str, Tensor] = {}
    for level in LEVELS:
        sigma = level * priors[0].data_std / 0.5
        rows = [(x + sigma * z).clamp(-1, 1), *(prior(x + sigma * z, sigma) for prior in priors), x]
        columns[f"sigma {level:g}"] = torch.stack(rows, 1).flatten(0, 1)
    words = ["noisy", *map(title, jobs), "image"]
    return pairs_figure(out / f"denoised-n{num}.png", columns, {"sigma 0.2": words * len(x)})
