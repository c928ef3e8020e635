"""Cells of the table: one prior (or classic method), one way to reconstruct, one acceleration; scored against
the truth and without it.

scores      PSNR, SSIM, NRMSE of magnitudes: mean over slices, then people; the spread is over people
truth       std / error, and how often 80 % intervals hold the truth (real and imaginary part of every pixel)
held out    the same for a fifth of the measured rows, which samples from the other rows predict: needs no
            truth
"""

from __future__ import annotations

import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ambient_sci.data import MeasurementFile
from ambient_sci.errors import InputError
from ambient_sci.evaluation import (
    hold_out,
    reconstruction_table,
    std_over_error,
    sweep,
    with_truth,
    zero_filled,
)
from ambient_sci.priors import Prior
from ambient_sci.sampling import Reconstruction, reconstruct, reconstruct_to_file
from recipes.grid import Cell
from recipes.mri.priors import KINDS, accelerations
from recipes.mri.scans import Evaluation

CLASSIC = ("zero-filled", "sense", "l1-wavelet", "tv")
#: Kind of prior -> ways to reconstruct with it. What SSDU trains has no meaning at other levels of noise, so
#: it has one step only.
METHODS = {
    **dict.fromkeys(("clean", "noisy", "em"), ("mmps",)),
    "k-space": ("one-step", "a-dps"),
    "ssdu": ("one-step",),
    "robust": ("one-step",),
}
assert set(METHODS) == set(KINDS)


def make_cell(prior: str | None, method: str, acceleration: float, profile: dict[str, Any]) -> Cell:
    """A cell of the table; ``prior`` is None for classic methods. One process makes all cells of a prior: it
    trains it, too."""
    entry = {"kind": "classic"} if prior is None else profile["priors"][prior]
    settings = {
        "prior": prior,
        "kind": entry["kind"],
        "R_train": None if prior is None else accelerations(entry),
        "method": method,
        "R_test": acceleration,
    }
    return Cell(f"{prior or 'classic'}--{method}--R{acceleration:g}", settings, group=prior or "classic")


def all_cells(profile: dict[str, Any]) -> list[Cell]:
    """Every cell of a profile, those of one prior together; priors whose ``order`` is high (they take long)
    first."""
    found = [make_cell(None, method, r, profile) for method in CLASSIC for r in profile["test"]]
    for name, entry in profile["priors"].items():
        if entry["kind"] not in METHODS:
            raise InputError(f"priors.{name}.kind: expected one of {', '.join(KINDS)}, got {entry['kind']!r}")
        methods = METHODS[entry["kind"]]
        found += [make_cell(name, method, r, profile) for r in profile["test"] for method in methods]
    return sorted(found, key=lambda cell: -profile["priors"].get(cell.group, {}).get("order", 0))


def chosen(
    cells: list[Cell], patterns: list[str] | None, priors: list[str] | None, test: list[float] | None
) -> list[Cell]:
    """The cells that all filters let pass; patterns are shell patterns of names, "classic" stands for the
    classic methods."""
    return [
        c
        for c in cells
        if (patterns is None or any(fnmatch.fnmatch(c.name, p) for p in patterns))
        and (priors is None or any(fnmatch.fnmatch(str(c.group), p) for p in priors))
        and (test is None or c.settings["R_test"] in test)
    ]


def run_cell(
    cell: Cell, prior: Prior | None, profile: dict[str, Any], scans: Evaluation, folder: Path
) -> dict[str, Any]:
    """Reconstruct and score; the images go to ``folder``/NAME.h5."""
    if prior is None:
        result = classic(cell.settings["method"], scans)
        result.save(folder / f"{cell.name}.h5", overwrite=True)
    else:
        result = sampled(cell, prior, profile, scans, folder)
    table = reconstruction_table({"scores": result.mean}, scans.truth, scans.subjects, scans.peaks)
    found: dict[str, Any] = {
        "scores": table["methods"]["scores"],
        "slices": table["slices"],
        "report": result.report,
    }
    if prior is not None and cell.settings["method"] == "mmps":
        found["std_over_error"] = std_over_error(result, scans.truth, scans.subjects)
        generator = torch.Generator().manual_seed(profile["scans"]["seed"])
        truth = with_truth(result.samples, scans.truth, subjects=scans.subjects, generator=generator)
        found["with_truth"] = summary(truth)
        found["held_out"] = summary(held_out(prior, profile, scans))
    return found


def summary(calibration: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a calibration: coverage, std / error, verdict."""
    coverage = {
        k: {"observed": v["observed"], "expected": v["expected"]} for k, v in calibration["coverage"].items()
    }
    kept = ("samples", "measurements", "std_over_error", "signal_std_over_error", "verdict")
    return {"coverage": coverage, **{k: calibration[k] for k in kept if k in calibration}}


def classic(method: str, scans: Evaluation) -> Reconstruction:
    """A classic method at the weight of best PSNR against the truth, an oracle's choice in its favour."""
    with MeasurementFile(scans.path) as file:
        operator, y = file.operator(), file.measurements()
    if method == "zero-filled":
        return Reconstruction.from_samples(zero_filled(operator, y)[None], {})
    peak = torch.tensor([scans.peaks[s] for s in scans.subjects])
    best = sweep(method, operator, y, scans.truth, peak=peak)
    report = {
        "weight": best.weight,
        "interior": best.interior,
        "converged": best.converged,
        "sweep": best.table,
    }
    return Reconstruction.from_samples(best.image[None], report)


def device_of(prior: Prior) -> torch.device:
    """Where a prior is; a Gaussian, which EM may end with, has buffers alone."""
    return next(chain(prior.parameters(), prior.buffers())).device


def sampled(
    cell: Cell, prior: Prior, profile: dict[str, Any], scans: Evaluation, folder: Path
) -> Reconstruction:
    """By the sampler of the cell with the profile's settings; goes on where it was interrupted."""
    path, method = folder / f"{cell.name}.h5", cell.settings["method"]
    where = device_of(prior)
    with MeasurementFile(scans.path) as file:
        reconstruct_to_file(
            prior,
            file,
            path,
            sampler=method,
            generator=torch.Generator().manual_seed(profile["scans"]["seed"]),
            overwrite=True,
            progress=True,
            device=where,
            **profile.get(method, {}),
        )
    return Reconstruction.load(path)


def held_out(prior: Prior, profile: dict[str, Any], scans: Evaluation) -> dict[str, Any]:
    """Calibration on held-out rows of the test scans, from measurements alone."""
    settings, where = dict(profile["held_out"]), device_of(prior)
    keep, samples = settings.pop("keep"), settings.pop("samples")
    generator = torch.Generator().manual_seed(profile["scans"]["seed"] + 1)
    with MeasurementFile(scans.path) as file:
        operator, y, sigma = file.operator(), file.measurements(), file.sigma()

    def draw(kept: Any, seen: torch.Tensor) -> torch.Tensor:
        result = reconstruct(
            prior,
            kept.to(where),
            seen.to(where),
            sigma,
            samples=samples,
            sampler="mmps",
            generator=generator,
            progress=True,
            **{**{k: v for k, v in profile["mmps"].items() if k != "samples"}, **settings},
        )
        return result.samples.cpu()

    return hold_out(draw, operator, y, sigma, keep=keep, generator=generator, subjects=scans.subjects)
