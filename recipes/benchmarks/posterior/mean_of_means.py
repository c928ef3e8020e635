"""How many samples make a posterior mean: of draws, of conditional means, and with opposite noise.

    python -m recipes.benchmarks.posterior.mean_of_means --out runs/benchmark-posterior/means

The packaged prior and the middle slice of each of the packaged test people, three problems with the default
sampler: half of the pixels missing and R = 2.5 MRI, both with noise 0.05, and denoising at 0.15. Sixty-four
samples of each, in groups of four; the PSNR of a mean of n is averaged over the 64 / n sets of n.

    draws        the average of the samples
    conditional  the average of conditional means                           (antithetic=False)
    mean         what `reconstruct` returns: the same, with a control from opposite noise

CRPS and coverage are those of groups of four draws, averaged; std / error is that of the standard deviation
of four over the error of the mean of all.

One JSON file a group and problem: an interrupted run goes on, and several processes share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ambient_sci as asci
from ambient_sci.data import brains
from ambient_sci.data.simulate import smooth_phase, with_phase
from ambient_sci.evaluation import psnr
from ambient_sci.evaluation.calibration import with_truth
from ambient_sci.operators import MRI, Identity, Masking, RowMaskedOperator, make_design
from ambient_sci.sampling.moments import Moments
from ambient_sci.sampling.run import Run
from ambient_sci.whole_files import read_tensors, write_json, write_tensors
from recipes.grid import Cell, Grid, parser, table

PRIOR, GROUP = "pretrained:brain64", 4
#: Problem to its noise.
PROBLEMS = {"inpainting": 0.05, "denoising": 0.15, "MRI, R = 2.5": 0.05}
NUMBERS = (1, 2, 4, 8, 16, 64)


def problem_of(name: str) -> tuple[RowMaskedOperator, Tensor, Tensor]:
    """(operator, y, truth) of the middle slice of each person."""
    images, people = brains("test")
    rows = [people.index(p) + people.count(p) // 2 for p in dict.fromkeys(people)]
    generator = torch.Generator().manual_seed(11)
    num, (height, width) = len(rows), images.shape[-2:]
    truth = with_phase(torch.as_tensor(images)[rows], smooth_phase(num, height, width, generator))
    shape = tuple(truth.shape[1:])
    if name == "inpainting":
        pixels = (torch.rand(num, 1, height, width, generator=generator) < 0.5).float()
        operator: RowMaskedOperator = Masking(pixels, img_size=shape)
    elif name == "denoising":
        operator = Identity(shape)
    else:
        design = make_design("lines-uniform", image_shape=shape, acceleration=2.5)
        operator = MRI(design.sample(num, generator))
    clean = operator.A(truth)
    y = clean + PROBLEMS[name] * operator.mask * torch.randn(clean.shape, generator=generator)
    return operator, y, truth


def measure(prior: Any, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One group of samples, their conditional means and controls, into a file beside the JSON; and scores."""
    operator, y, truth = problem_of(name)
    run = Run.prepare(
        prior, operator, y, PROBLEMS[name], GROUP, "mmps", None, (None, None, None), GROUP * len(y),
        torch.Generator().manual_seed(seed), {"precision": "auto"},
    )  # fmt: skip
    ((_, draws),) = run.parts()
    found = {k: v for k in ("samples", "means", "controls") if (v := getattr(draws, k)) is not None}
    path = folder / f"{seed:03d} {name}.safetensors"
    write_tensors(path, {k: v.contiguous() for k, v in found.items()}, {})
    std = moments(found, range(GROUP)).std().square().mean().sqrt()
    report = run.report(float(std))
    scores = with_truth(draws.samples, truth)
    counts = ("network_evaluations", "jacobian_products", "direct_chains", "bias_of_solves", "notes")
    return {
        "tensors": path.name,
        "crps": scores["crps"]["observed"],
        "coverage_80": scores["coverage"]["80"]["observed"],
        "std_over_error_of_draws": scores["std_over_error"]["ratio"],
        "std": float(std),
        **{k: report[k] for k in counts if k in report},
    }


def moments(tensors: dict[str, Tensor], chosen: Iterable[int], upto: str = "controls") -> Moments:
    """Moments of the samples ``chosen``: of "samples" alone, with their "means", or with "controls", too."""
    kinds = ("samples", "means", "controls")
    known = kinds[: kinds.index(upto) + 1]
    found = Moments()
    for k in chosen:
        found.add(*(tensors[kind][k] if kind in tensors else None for kind in known))
    return found


def quality(folder: Path, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """PSNR of means of 1 to all samples, averaged over disjoint sets of them; scores averaged over groups."""
    name, parts = cells[0]["problem"], [read_tensors(folder / c["tensors"])[0] for c in cells]
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    truth, total = problem_of(name)[2], GROUP * len(parts)
    found: dict[str, Any] = {"problem": name, "psnr": {}}
    for title, upto in (("draws", "samples"), ("conditional", "means"), ("mean", "controls")):
        found["psnr"][title] = {}
        for number in (n for n in NUMBERS if n <= total):
            sets = [range(k, k + number) for k in range(0, total - number + 1, number)]
            means = [moments(tensors, chosen, upto).mean() for chosen in sets]
            each = torch.stack([psnr(mean, truth, 1.0).mean() for mean in means])
            found["psnr"][title][number] = float(each.mean())
    whole = moments(tensors, range(total)).mean()
    spread = sum(c["std"] ** 2 for c in cells) / len(cells)
    found["std_over_error"] = (spread / float((whole - truth).square().mean())) ** 0.5
    for key in ("crps", "coverage_80"):
        found[key] = sum(c[key] for c in cells) / len(cells)
    return found


def results_table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each problem and kind of mean."""
    lines = [{**f, "kind": kind} for f in found for kind in f["psnr"]]

    def decibels(number: int) -> Callable[[list[dict[str, Any]]], str]:
        return lambda own: format(own[0]["psnr"][own[0]["kind"]].get(number, float("nan")), ".2f")

    rows = {"problem": lambda line: line["problem"], "mean of": lambda line: line["kind"]}
    columns = [
        *((f"{n} sample" + "s" * (n > 1), decibels(n)) for n in NUMBERS),
        ("CRPS", lambda own: format(own[0]["crps"], ".5f")),
        ("80 % intervals cover", lambda own: f"{100 * own[0]['coverage_80']:.1f} %"),
        ("std / error", lambda own: format(own[0]["std_over_error"], ".2f")),
    ]
    return table(lines, rows, columns)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, write ``table.json``, print the table."""
    options = parser(__doc__, "runs/benchmark-posterior/means")
    options.add_argument("--groups", type=int, default=16, help="groups of four samples")
    chosen = options.parse_args(arguments)
    grid = Grid(chosen.out / "groups")
    cells = [
        Cell(f"{seed:03d} {name}", {"problem": name, "seed": seed, "prior": PRIOR})
        for seed in range(chosen.groups)
        for name in PROBLEMS
    ]
    if not chosen.table_only:
        prior = asci.load_prior(PRIOR)
        prior.requires_grad_(False)
        grid.run(cells, lambda c: measure(prior, c.settings["problem"], c.settings["seed"], grid.out))
    made = grid.read(cells)
    by_problem = {name: [c for c in made if c["problem"] == name] for name in PROBLEMS}
    found = [quality(grid.out, own) for own in by_problem.values() if own]
    write_json(chosen.out / "table.json", found)
    print("\n" + results_table(found))


if __name__ == "__main__":
    main()
