"""What the parts of the k-space loss are good for: three switches, one at a time, several seeds, a small
setting.

    full             the loss as it is
    no-tweedie       c = 1: kept rows are fitted noise and all
    unit-weights     held-out rows count 1 instead of 1 / P(measured | kept); coil maps vary from scan to scan
    keep-acs         calibration lines are always shown to the network, never held out

The score is the one-step estimate at the noise level of the data, on people that were not trained on. A seed
decides phases, maps, noise, masks, initial weights and batches of the training; the test scans are the same
for all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ambient_sci.data import MeasurementFile
from ambient_sci.evaluation import reconstruction_table
from ambient_sci.sampling import reconstruct
from ambient_sci.training import LossConfig, fit
from recipes.grid import Cell
from recipes.mri.priors import configuration
from recipes.mri.scans import Scans

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-tweedie": {"tweedie": False},
    "unit-weights": {"held_out_weights": "unit"},
    "keep-acs": {"hold_out_calibration": False},
}


def ablation_cells(profile: dict[str, Any]) -> list[Cell]:
    """Every arm with every seed."""
    settings = profile["ablation"]
    pairs = [(arm, seed) for seed in settings["seeds"] for arm in ARMS]
    return [Cell(f"{arm}-s{seed}", {"arm": arm, "seed": seed, "R": settings["R"]}) for arm, seed in pairs]


def run_ablation(arm: str, seed: int, profile: dict[str, Any], folder: Path, device: str) -> dict[str, Any]:
    """Train one arm with one seed and score it."""
    settings = profile["ablation"]
    scans_of = {"train": {**settings["scans"], "seed": 100 + seed}, "test": settings["scans"]}
    train = Scans(scans_of["train"], folder / "scans" / f"seed-{seed}").training(settings["R"])
    test = Scans(scans_of["test"], folder / "scans" / "test").test(settings["R"])
    small = {k: {**profile.get(k, {}), **settings.get(k, {})} for k in ("network", "training", "levels")}
    config = configuration({"kind": "k-space"}, small, device)
    config = replace(config, seed=seed, loss=LossConfig(keep=settings["keep"], **ARMS[arm]))
    run = folder / f"{arm}-s{seed}"
    prior = fit(train, config, run, resume=(run / "config.json").exists())
    where = next(prior.parameters()).device
    with MeasurementFile(test.path) as file:
        result = reconstruct(
            prior, file.operator().to(where), file.measurements().to(where), file.sigma(), sampler="one-step"
        )
    table = reconstruction_table({"scores": result.mean.cpu()}, test.truth, test.subjects, test.peaks)
    return {"scores": table["methods"]["scores"], "slices": table["slices"]}
