"""Does a learned prior's sampler hold out: 16 samples of 16 slices timed, and 10,000 solves without NaN.

    python -m recipes.benchmarks.posterior.capacity runs/quickstart/run --out
    runs/benchmark-posterior/capacity

RUN is a prior trained by the quickstart. The slices are those of the quickstart's other people (16 of them,
evenly spaced), measured anew for every problem: the first one is the quickstart's (R = 2.5, sigma_y = .05)
and is timed, the others go through accelerations 1 to 8, one to four coils, and noise from none to .2. A
solve is one linear system (sigma_y^2 I + A V A^H) u = r of the MMPS sampler. One JSON file a problem: an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ambient_sci as asci
from ambient_sci.data import brains
from ambient_sci.data.simulate import smooth_phase, with_phase
from ambient_sci.operators import MRI, birdcage_maps, make_design
from ambient_sci.priors import Prior
from recipes.grid import Cell, Grid, table

SLICES, SAMPLES = 16, 16
SETTINGS = {"steps": 16, "max_iterations": 3, "sigma_max": 10.0}


def problems() -> list[tuple[float, int, float]]:
    """(R, coils, sigma_y), the quickstart's first."""
    others = itertools.product((4.0, 8.0, 2.5, 1.0), (1, 4), (0.05, 0.01, 0.0, 0.2))
    return [(2.5, 1, 0.05), *[p for p in others if p != (2.5, 1, 0.05)]]


def measurements(
    acceleration: float, coils: int, sigma_y: float, seed: int
) -> tuple[MRI, torch.Tensor, torch.Tensor]:
    """(operator, y, truth) of 16 slices."""
    images, _ = brains("test")
    rows = torch.linspace(0, len(images) - 1, SLICES).round().long()
    generator = torch.Generator().manual_seed(seed)
    images = torch.as_tensor(images)[rows]
    height, width = images.shape[-2:]
    truth = with_phase(images, smooth_phase(SLICES, height, width, generator))
    mask = torch.ones(1, 1, height, width)
    if acceleration > 1:
        design = make_design("lines-uniform", image_shape=(2, height, width), acceleration=acceleration)
        mask = design.sample(SLICES, generator)
    operator = MRI(mask, birdcage_maps(coils, height, width)[None] if coils > 1 else None)
    clean = operator.A(truth)
    noise = sigma_y * torch.randn(clean.shape, generator=generator)
    return operator, clean + noise * operator.mask, truth


def measure(prior: Prior, problem: tuple[float, int, float], seed: int, samples: int) -> dict[str, Any]:
    """Sample one problem; counts, seconds, and whether everything is finite."""
    acceleration, coils, sigma_y = problem
    operator, y, truth = measurements(acceleration, coils, sigma_y, seed)
    generator = torch.Generator().manual_seed(seed)
    begun, busy = time.perf_counter(), time.process_time()
    options = {**SETTINGS, "precision": "auto"}
    options |= {"direct": False, "antithetic": False}  # what counts here are the solves of samples
    result = asci.reconstruct(
        prior, operator, y, sigma_y, samples=samples, generator=generator, progress=True, **options
    )
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    not_finite = int((~torch.isfinite(result.samples)).flatten(2).any(2).sum())
    keys = ("solves", "solves_above_tolerance", "solves_stopped_by_guard", "worst_relative_residual")
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "threads": torch.get_num_threads(),
        "chains_not_finite": not_finite,
        "rmse": float((result.mean - truth).square().mean().sqrt()),
        "largest_value": float(result.samples.abs().max()),
        **{key: result.report[key] for key in keys},
    }


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown, with the totals."""

    def number(key: str, form: str = "d") -> Callable[[Any], str]:
        return lambda own: format(own[0][key] if isinstance(own, list) else own[key], form)

    rows = {
        "R": number("acceleration", "g"),
        "coils": number("coils"),
        "sigma_y": number("sigma_y", "g"),
        "chains": lambda result: str(result["samples"] * result["slices"]),
    }
    columns = [
        ("seconds", number("seconds", ".0f")),
        ("solves", number("solves")),
        ("above 1e-2", number("solves_above_tolerance")),
        ("worst residual", number("worst_relative_residual", ".2f")),
        ("not finite", number("chains_not_finite")),
        ("largest abs. value", number("largest_value", ".2f")),
    ]
    total, bad = (sum(r[key] for r in results) for key in ("solves", "chains_not_finite"))
    return f"{table(results, rows, columns)}\n\n{total} solves, {bad} chains not finite"


def main(arguments: list[str] | None = None) -> None:
    """The timed problem, then as many others as the number of solves takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a prior's run folder")
    parser.add_argument("--solves", type=int, default=10_000, help="at least so many in all")
    parser.add_argument(
        "--samples", type=int, default=2, help="of each slice, for the problems that are not timed"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-posterior/capacity"))
    options = parser.parse_args(arguments)
    grid, prior = Grid(options.out), asci.load_prior(options.run)
    results: list[dict[str, Any]] = []
    for k, problem in enumerate(itertools.cycle(problems())):
        settings = dict(zip(("acceleration", "coils", "sigma_y"), problem, strict=True))
        settings |= {"samples": SAMPLES if k == 0 else options.samples, "slices": SLICES}
        cell = Cell(f"{k:03d}", settings)
        grid.run([cell], lambda cell, p=problem, k=k: measure(prior, p, k, cell.settings["samples"]))
        results += grid.read([cell])
        if sum(r["solves"] for r in results) >= options.solves:
            break
    print(results_table(results))


if __name__ == "__main__":
    main()
