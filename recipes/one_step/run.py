"""One call in place of many: generators distilled from noisy data alone. One command, one table.

    python -m recipes.one_step.run --part ring [--profile two-core|gpu] [--seeds 3 4 5] [--runs staged
    ambient] [--out runs/one_step]

Parts: ring, mixture (five modes in the plane, eight in 16 dimensions), digits. Runs: a generator distilled
from the staged prior ("staged") and one from its anchor, the Ambient prior, asked below the noise of the
data as published ("ambient"). The prior is that of recipes/exactness, trained first where it is not there.
Every cell is a JSON file; an interrupted one continues from its checkpoints.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ambient_sci.data.loader import MeasurementArrays
from ambient_sci.evaluation import ProximalScore
from ambient_sci.priors import Prior, StagedPrior
from ambient_sci.sampling import generate
from ambient_sci.training import DistillConfig, Selection, TrainConfig, distill
from recipes.exactness import methods
from recipes.exactness.parts import Job, Problem, load_part, load_settings
from recipes.grid import Cell, Grid, mean_std, parser, table

HERE = Path(__file__).parent
RUNS = ("staged", "ambient")


def main(arguments: list[str] | None = None) -> None:
    """Make the cells that are missing, then print the table."""
    options = parse(arguments)
    own = yaml.safe_load((HERE / "config.yaml").read_text())[options.profile][options.part]
    settings = load_settings(options.profile, options.part)
    grid = Grid(options.out / options.profile / options.part)
    jobs = dict(chosen(options, own, settings))
    cells = [
        Cell(name, {"run": run, "level": job.level, "seed": job.seed}, group=f"{job.level:g}-{job.seed}")
        for name, (run, job) in jobs.items()
    ]
    if not options.table_only:
        part = load_part(options.part)
        grid.run(cells, lambda cell: made(*jobs[cell.name], own, part, grid.out, options.device))
    print(scores_table(grid.read()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = parser(__doc__, "runs/one_step")
    found.add_argument("--part", required=True, choices=["ring", "mixture", "digits"])
    found.add_argument("--profile", default="two-core", choices=["two-core", "gpu"])
    found.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    found.add_argument("--levels", nargs="+", type=float, help="noise levels (default: those of the part)")
    found.add_argument("--seeds", nargs="+", type=int)
    return found.parse_args(arguments)


def chosen(
    options: argparse.Namespace, own: dict[str, Any], settings: dict[str, Any]
) -> Iterator[tuple[str, tuple[str, Job]]]:
    """Names of cells, and what they are: which teacher, and the job of recipes/exactness that trains it."""
    levels, seeds = options.levels or own["sigma_n"], options.seeds or own["seeds"]
    for level, seed, run in itertools.product(levels, seeds, options.runs):
        yield f"{run}-{level:g}-s{seed}", (run, Job("staged", level, settings["points"][0], seed, settings))


def made(run: str, job: Job, own: dict[str, Any], part: Any, folder: Path, device: str) -> dict[str, Any]:
    """A cell: the teacher and its own samples, the generator and its samples, seconds of both."""
    problem = part.problem(job, folder)
    teacher, _ = methods.train(
        problem.data, "staged", job.settings, job.seed, folder / f"teacher-{job.level:g}-s{job.seed}", device
    )
    assert isinstance(teacher, StagedPrior)
    shown = teacher if run == "staged" else teacher.anchor
    out = folder / f"{run}-{job.level:g}-s{job.seed}"
    begun = time.monotonic()
    config, judge = configuration(own, job, device), selection(own, problem)
    resume = (out / "config.json").exists()
    generator = distill(shown, problem.data, config, out, resume=resume, selection=judge)
    seconds = time.monotonic() - begun
    rows = {
        "teacher, many calls": drawn(shown, job, problem, False),
        "teacher, truncated": drawn(teacher.anchor, job, problem, True),
        "generator, one call": drawn(generator, job, problem, None, shown),
    }
    return {"rows": rows, "floor": problem.floor(), "distillation_seconds": round(seconds, 1)}


def drawn(
    prior: Prior, job: Job, problem: Problem, truncated: bool | None, denoiser: Prior | None = None
) -> dict[str, Any]:
    """Scores of samples and seconds for a thousand of them. ``truncated``: stopped at the noise of the data;
    None: one call, and ``denoiser`` stands for it where a part also scores denoisers."""
    settings, begun = job.settings, time.monotonic()
    generator = torch.Generator().manual_seed(3000 + job.seed)
    levels: dict[str, Any] = {}
    if truncated is not None:
        low = job.level if truncated else settings["sigma_min"]
        levels = {"steps": settings["sampler_steps"], "sigma_min": low, "sigma_max": settings["sigma_max"]}
    samples = generate(
        prior, settings["samples"], batch_size=settings["sampler_batch"], generator=generator, **levels
    )
    seconds = 1000 * (time.monotonic() - begun) / len(samples)
    scores = quality(problem.score(denoiser or prior, samples))
    return {**scores, "seconds_per_1000": round(seconds, 4)}


def quality(scores: dict[str, Any]) -> dict[str, float]:
    """Of the scores of a part, those of the samples."""
    return {k: v for k, v in scores.items() if isinstance(v, (int, float)) and "denoiser" not in k}


def configuration(own: dict[str, Any], job: Job, device: str) -> TrainConfig:
    """The settings of distillation: those of config.yaml, on top of the teacher's."""
    base = methods.configuration("staged", job.settings, job.seed, device)
    return replace(
        base,
        consistency=None,
        max_steps=own["steps"],
        batch_size=own.get("batch_size", base.batch_size),
        final_ratio=own.get("final_ratio", 0.1),
        ema_half_life_images=own.get("ema_half_life_images"),
        distillation=DistillConfig(**own["distillation"]),
    )


def selection(own: dict[str, Any], problem: Problem) -> Selection:
    """The state is kept whose images, measured like the data, are most like them: no clean ones are
    needed."""
    operator, y, sigma = problem.data
    score = ProximalScore(MeasurementArrays(operator, y, sigma), num=own["judged"])
    return Selection(score, every=own["judge_every"], num=len(score))


def scores_table(cells: list[dict[str, Any]]) -> str:
    """Every score, mean (standard deviation over seeds)."""
    found = [
        (cell["level"], cell["run"], row, scores) for cell in cells for row, scores in cell["rows"].items()
    ]
    found.sort(key=lambda entry: entry[:3])
    keys = list(dict.fromkeys(key for *_, scores in found for key in scores))
    rows = {
        "sigma_n": lambda entry: f"{entry[0]:g}",
        "teacher": lambda entry: entry[1],
        "samples": lambda entry: entry[2],
    }

    def column(key: str) -> Any:
        return key, lambda own: mean_std(
            [scores[key] for *_, scores in own if key in scores] or [float("nan")]
        )

    text = table(found, rows, [("seeds", lambda own: str(len(own))), *map(column, keys)])
    return f"{text}\n\nfloor, what as many draws of the truth score: {[cell['floor'] for cell in cells]}"


if __name__ == "__main__":
    main()
