"""What is done in a cell: corrupt, train, draw, judge, show.

clean               a prior trained on the images themselves
mask-conditional    the operator-aware Ambient loss, sampled with one fixed mask a chain: Ambient Diffusion
                    (Daras et al. 2023)
em                  an unconditional prior by expectation maximisation (Rozet et al. 2024), sampled as it is
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.data import write_images
from ambient_sci.evaluation.memorization_figures import pairs_figure
from ambient_sci.operators import Identity, Independent, Masking
from ambient_sci.priors import Prior
from ambient_sci.sampling import generate, generate_fixed_mask
from ambient_sci.training import TrainConfig, em_report, fit
from recipes.masking.data import Images, nearest

RUNS = ("clean", "mask-conditional", "em")
ROWS = {"clean": "clean", "mask-conditional": "mask-conditional, fixed mask", "em": "EM"}
PAIRS = 10


@dataclass(frozen=True)
class Job:
    """A cell.

    Attributes:
        run: one of `RUNS`.
        missing: fraction of the pixels; 0 for clean.
        size: training images.
        seed: of everything drawn.
        settings: of the part, config.yaml.
    """

    run: str
    missing: float
    size: int
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Names the cell's file."""
        return f"{self.run}-{self.missing:g}-n{self.size}-s{self.seed}"


def corrupted(clean: Tensor, job: Job) -> tuple[Any, Any]:
    """(operator, y, sigma_y) drawn once, and the rows that a mask-conditional prior is sampled with."""
    shape = tuple(clean.shape[1:])
    if job.run == "clean":
        return (Identity(shape), clean, 0.0), None
    generator, noise = torch.Generator().manual_seed(1000 + job.seed), job.settings["noise"]
    design = Independent(shape, "pixels", 1 - job.missing)
    operator = Masking(design.sample(len(clean), generator), img_size=shape, design=design)
    drawn = noise * torch.randn(clean.shape, generator=generator) * operator.mask
    kept = operator.split(keep=job.settings["keep"], generator=generator).kept
    return (operator, operator.A(clean) + drawn, noise), kept


def configuration(job: Job, device: str) -> TrainConfig:
    """The training of a run: the part's ``training``, with what the run adds."""
    values = {**job.settings["training"], "seed": job.seed, "device": device}
    if job.run == "mask-conditional":
        values["loss"] = {**values.get("loss", {}), "keep": job.settings["keep"]}
        values["levels"] = {**values["levels"], **job.settings["masked_levels"]}
    if job.run == "em":
        values |= {"max_steps": None, "em": job.settings["em"]}
    return TrainConfig.from_dict(values)


def draw(job: Job, prior: Prior, kept: Any, device: str) -> Tensor:
    """Samples of a prior."""
    settings = job.settings["sampler"]
    options = {k: settings[k] for k in ("steps", "sampler", "sigma_max", "batch_size")}
    generator = torch.Generator().manual_seed(3000 + job.seed)
    if job.run == "mask-conditional":
        rows = kept.to(next(prior.parameters()).device)
        return generate_fixed_mask(prior, rows, settings["samples"], generator=generator, **options)
    low = settings["sigma_min"]
    return generate(prior, settings["samples"], sigma_min=low, generator=generator, **options)


def work(job: Job, data: Images, folder: Path, device: str) -> dict[str, Any]:
    """A cell: its scores; the prior, the samples and the figure are in ``folder``."""
    measurements, kept = corrupted(data.train, job)
    prior = fit(measurements, configuration(job, device), folder / "run", resume=(folder / "run").is_dir())
    samples = draw(job, prior, kept, device).cpu().float()
    near, similarity, index = nearest(data, samples)
    write_images(folder / "samples.h5", images=samples, overwrite=True)
    best = similarity.topk(min(PAIRS, len(samples)))
    # Shown as they are seen: what lies outside [-1, 1] is clipped in the picture, and nowhere else.
    columns = {"generated": samples[best.indices].clamp(-1, 1), "nearest": data.train[index[best.indices]]}
    notes = {"nearest": [f"{v:.3f}" for v in best.values.tolist()]}
    pairs_figure(folder / "pairs.png", columns, notes)
    truth = data.truth(job.settings["sampler"]["samples"])
    found: dict[str, Any] = {
        "row": ROWS[job.run],
        **data.distances(samples),
        **near,
        "floor": {"real images": len(truth), **data.distances(truth)},
    }
    return {**found, "laps": em_report(folder / "run")} if job.run == "em" else found
