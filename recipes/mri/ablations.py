"""What the parts of the k-space loss are good for: one taken away at a time, several seeds, a small setting.

The arms are those of `ablation_stages`; coil maps vary from scan to scan. The score is the one-step estimate
at the noise level of the data, on people that were not trained on. A seed decides phases, maps, noise, masks,
initial weights and batches of the training; the test scans are the same for all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ambient_sci.data import MeasurementFile
from ambient_sci.evaluation import reconstruction_table
from ambient_sci.sampling import reconstruct
from ambient_sci.training import LossConfig, make_accelerator, open_source
from recipes.grid import Cell
from recipes.mri.ablation_stages import ARMS
from recipes.mri.priors import configuration, run_in_folder
from recipes.mri.scans import Scans


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
    config = replace(config, seed=seed, loss=LossConfig(keep=settings["keep"]))
    source, accelerator = open_source(train, config), make_accelerator(config.device)
    stage = ARMS[arm](source, config, accelerator)
    data = {**source.fingerprint(), "ablation": arm}
    prior = run_in_folder(stage, config, accelerator, folder / f"{arm}-s{seed}", data)
    where = next(prior.parameters()).device
    with MeasurementFile(test.path) as file:
        result = reconstruct(
            prior, file.operator().to(where), file.measurements().to(where), file.sigma(), sampler="one-step"
        )
    table = reconstruction_table({"scores": result.mean.cpu()}, test.truth, test.subjects, test.peaks)
    return {"scores": table["methods"]["scores"], "slices": table["slices"]}
