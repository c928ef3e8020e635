r"""The first hour: two folders of noisy pictures, the commands of the README with nothing else given, and
total variation at its best weight beside them.

    python -m recipes.benchmarks.first_hour --out runs/first_hour

300 pictures of blurred ellipses and 300 faces of thirty people, 32 px, brightness in [0, 1], noise of 0.15,
go through

    ambient-sci import noisy.npy --out noisy.h5
    ambient-sci train noisy.h5 --out run --max-minutes 1.5          (and 5)

and the prior is scored on

- *denoising*: the posterior mean E[x | y] = D(y, sigma_y), one call, with the noise level that the import
  estimated, of the 300 pictures themselves and of 32 new ones, faces of people that training never saw;
  beside deepinv's ``TVDenoiser``;
- *half of the pixels missing*, new pictures with the same noise: the mean of posterior samples (MMPS); beside
  ``reconstruct(None, operator, y, sigma, sampler="tv")``.

Total variation has the one weight, of a grid a factor of 2^(1/4) apart, that is best *against the truth*.
PSNR in dB, peak 1, mean over pictures. What is there is kept; a run that was interrupted goes on (the time of
a training counts training alone). ``--steps`` limits trainings by steps in the place of minutes, for machines
that are not idle. Defaults were chosen on the data of ``--seed 10``; the README's numbers are of another.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ambient_sci as asci
from ambient_sci.data import MeasurementFile
from ambient_sci.operators import Masking
from ambient_sci.training import RunFolder
from recipes.grid import Cell, Grid, parser, say, table

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("ellipses", "faces")
NUM, NEW, SIZE, NOISE, MISSING, SAMPLES = 300, 32, 32, 0.15, 0.5, 4
#: Weights of total variation, in units of the image.
WEIGHTS = tuple(0.04 * 2 ** (k / 4) for k in range(13))
TASKS = ("denoising the 300", "denoising new ones", "half of the pixels missing")


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, print the table."""
    options = parse(arguments)
    grid = Grid(options.out)
    limits = options.steps or options.minutes
    word = "steps" if options.steps else "minutes"
    cells = [
        Cell(f"{kind}-{word}-{limit:g}", {"data": kind, word: limit, "seed": options.seed}, group=kind)
        for kind in KINDS
        for limit in limits
    ]
    if not options.table_only:
        grid.run(cells, lambda cell: first_hour(cell, options))
    print(report(grid.read(cells), word))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = parser(__doc__, "runs/first_hour")
    found.add_argument("--minutes", type=float, nargs="+", default=[1.5, 5.0], help="limits of the trainings")
    found.add_argument("--steps", type=int, nargs="+", help="limits in steps, in the place of minutes")
    found.add_argument("--seed", type=int, default=11, help="of pictures, noise, masks and trainings")
    found.add_argument("--new", type=int, default=NEW, help="pictures that are scored")
    return found.parse_args(arguments)


# -- pictures ------------------------------------------------------------------------------------------------


def pictures(kind: str, new: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clean pictures to learn from (300, H, W), and ``new`` others, in [0, 1]."""
    generator = np.random.default_rng(seed)
    if kind == "ellipses":
        clean = script("docs/tutorials/cells.py").cells(NUM + new, SIZE, generator)
        return clean[:NUM], clean[NUM:]
    faces = script("datasets/faces.py")
    images, _ = faces.load(SIZE)
    train, others = faces.split("person")
    return images[train, 0], images[generator.choice(others, new, replace=False), 0]


def script(path: str) -> ModuleType:
    """A script of the repository that is in no package."""
    name = f"ambient_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Pair = tuple[Tensor, Tensor]


def prepare(folder: Path, kind: str, options: argparse.Namespace) -> tuple[Pair, Pair]:
    """``folder``/noisy.h5, made by the import; and the 300 pictures and the new ones, each clean and noisy,
    (B, 1, H, W)."""
    train, new = pictures(kind, options.new, options.seed)
    generator = np.random.default_rng([options.seed, 1])
    noisy = train + NOISE * generator.standard_normal(train.shape)
    measured = new + NOISE * generator.standard_normal(new.shape)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "noisy.h5").exists():
        np.save(folder / "noisy.npy", noisy.astype(np.float32))
        command("import", folder / "noisy.npy", "--out", folder / "noisy.h5")
    images = (torch.from_numpy(x.astype(np.float32))[:, None] for x in (train, noisy, new, measured))
    own_clean, own_noisy, new_clean, new_noisy = images
    return (own_clean, own_noisy), (new_clean, new_noisy)


def command(*words: Any) -> None:
    """``ambient-sci`` with these words, as a user starts it."""
    say("ambient-sci " + " ".join(map(str, words)))
    subprocess.run([sys.executable, "-m", "ambient_sci", *map(str, words)], check=True)


# -- one training and what it is worth -----------------------------------------------------------------------


def first_hour(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and score all tasks."""
    kind, folder = cell.settings["data"], options.out / cell.settings["data"]
    own, (clean, noisy) = prepare(folder, kind, options)
    run = folder / f"run-{cell.name}"
    limit = (
        ("--max-steps", cell.settings["steps"])
        if "steps" in cell.settings
        else ("--max-minutes", cell.settings["minutes"])
    )
    more = ["--resume"] if (run / "run.json").exists() else []
    command("train", folder / "noisy.h5", "--out", run, *limit, "--device", options.device, *more)
    prior = asci.load_prior(run)
    with MeasurementFile(folder / "noisy.h5") as file:
        sigma = float(file.noise_std.max())
    generator = torch.Generator().manual_seed(options.seed)
    seen = (torch.rand(clean.shape, generator=generator) >= MISSING).float()
    scores = {
        TASKS[0]: scored(*own, denoised(prior, own[1], sigma), denoised_by_tv(*own)),
        TASKS[1]: scored(clean, noisy, denoised(prior, noisy, sigma), denoised_by_tv(clean, noisy)),
        TASKS[2]: scored(
            clean,
            noisy * seen,
            inpainted(prior, noisy, seen, sigma, generator),
            inpainted_by_tv(clean, noisy, seen, sigma),
        ),
    }
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    chosen = RunFolder(run).read_json("run.json").get("chosen", {})
    last = {"steps_made": log[-1]["step"], "training_seconds": log[-1]["seconds"]}
    return {"sigma": sigma, "scores": scores, "chosen": chosen.get("because"), **last}


def scored(clean: Tensor, seen: Tensor, ours: Tensor, tv: tuple[float, Tensor]) -> dict[str, float]:
    """PSNR of each."""
    found = {"measured": psnr(seen, clean), "ours": psnr(ours, clean), "tv": psnr(tv[1], clean)}
    return {**{key: round(value, 3) for key, value in found.items()}, "weight": round(tv[0], 4)}


def psnr(x: Tensor, clean: Tensor) -> float:
    """Mean over pictures, in dB, peak 1."""
    return float(-10 * (x - clean).square().flatten(1).mean(1).log10().mean())


@torch.no_grad()
def denoised(prior: Any, noisy: Tensor, sigma: float) -> Tensor:
    """E[x | y] of white noise: one call."""
    device = next(prior.parameters()).device
    return prior(noisy.to(device), max(sigma, prior.sigma_min)).cpu()


def denoised_by_tv(clean: Tensor, noisy: Tensor) -> tuple[float, Tensor]:
    """deepinv's total variation at its best weight."""
    from deepinv.models import TVDenoiser

    tv = TVDenoiser(n_it_max=1000)
    return best(clean, lambda weight: tv(noisy, weight))


def inpainted(prior: Any, noisy: Tensor, seen: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """The mean of posterior samples."""
    operator = Masking(seen)
    settings: Any = {"samples": SAMPLES, "generator": generator}
    return asci.reconstruct(prior, operator, operator.A(noisy), sigma, **settings).mean.cpu()


def inpainted_by_tv(clean: Tensor, noisy: Tensor, seen: Tensor, sigma: float) -> tuple[float, Tensor]:
    """Total variation at its best weight."""
    operator = Masking(seen)
    y = operator.A(noisy)

    def at(weight: float) -> Tensor:
        result: Any = asci.reconstruct(None, operator, y, sigma, sampler="tv", weight=weight)  # type: ignore[arg-type]
        return result.mean

    return best(clean, at)


def best(clean: Tensor, at: Any) -> tuple[float, Tensor]:
    """The weight of best PSNR and its pictures; it has worse ones on both sides."""
    found = {weight: at(weight) for weight in WEIGHTS}
    weight = max(found, key=lambda w: psnr(found[w], clean))
    assert WEIGHTS[0] < weight < WEIGHTS[-1], f"the best weight {weight} is at the end of the grid"
    return weight, found[weight]


def report(cells: list[dict[str, Any]], word: str) -> str:
    """A line for each training and task."""
    lines = [(cell, task, cell["scores"][task]) for cell in cells for task in TASKS]
    return table(
        lines,
        {
            "pictures": lambda line: line[0]["data"],
            "task": lambda line: line[1],
            word: lambda line: f"{line[0][word]:g}",
        },
        [
            ("steps", lambda own: str(own[0][0]["steps_made"])),
            ("measured", lambda own: f"{own[0][2]['measured']:.1f}"),
            ("total variation", lambda own: f"{own[0][2]['tv']:.2f} (weight {own[0][2]['weight']:.3f})"),
            ("posterior mean", lambda own: f"{own[0][2]['ours']:.2f}"),
            ("gain", lambda own: f"{own[0][2]['ours'] - own[0][2]['tv']:+.2f}"),
        ],
    )


if __name__ == "__main__":
    main()
