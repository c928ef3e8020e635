"""What is compared: a training configuration for each run, and the samples drawn from what it gives.

A run of staged consistency contains an Ambient run: its anchor. One training therefore gives three rows of
the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.priors import NetworkConfig, Prior, StagedPrior
from ambient_sci.sampling import generate
from ambient_sci.training import ConsistencyConfig, EMConfig, LevelConfig, LossConfig, TrainConfig, fit
from recipes.counted import Counted

#: run -> rows of the table
ROWS = {
    "clean": ("clean oracle",),
    "noisy": ("noisy-as-clean",),
    "staged": ("ambient full", "ambient truncated", "staged"),
    "joint": ("joint",),
    "em": ("em",),
}


def configuration(run: str, settings: dict[str, Any], seed: int, device: str) -> TrainConfig:
    """The training configuration of a run of a part's ``settings`` (config.yaml)."""
    base = TrainConfig(
        seed=seed,
        max_steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        precision=settings.get("precision", "fp32"),
        betas=(0.9, 0.999),
        final_ratio=0.0,
        centre=False,
        warmup_steps=settings.get("warmup_steps", 50),
        micro_batches=settings.get("micro_batches", 1),
        ema_decay=0.999,
        ema_half_life_images=settings.get("ema_half_life_images"),
        augmentations=tuple(settings.get("augmentations", ())),
        log_interval=200,
        checkpoint_minutes=1.0,
        device=device,  # type: ignore[arg-type]
        network=NetworkConfig(**settings["network"]),
        levels=LevelConfig(
            kind="concentrated", sigma_max=settings["sigma_max"], floor=settings["sigma_min"], relative=False
        ),
        loss=LossConfig(c_min=0.02),
    )
    below = {"sigma_min": settings["sigma_min"], **settings["consistency"]}
    if run in ("clean", "noisy"):  # data that are free of noise, or declared to be: see `declared`
        return replace(base, levels=replace(base.levels, kind=settings["clean_levels"]))
    if run == "mask-conditional":
        loss = replace(base.loss, keep=settings["keep"])
        return replace(base, loss=loss, levels=replace(base.levels, kind="log-uniform"))
    if run == "staged":
        return replace(base, consistency=ConsistencyConfig(**below))
    if run == "joint":
        return replace(base, consistency=ConsistencyConfig(mode="joint", **{**below, **settings["joint"]}))
    levels = replace(base.levels, kind=settings["clean_levels"])
    em = EMConfig(**settings["em"])
    return replace(base, loss=LossConfig(), levels=levels, max_steps=None, em=em)


def declared(data: Any, run: str) -> Any:
    """Measurements as a run is told of them: noisy-as-clean takes noisy images for clean ones."""
    operator, y, sigma_y = data
    return (operator, y, 0.0) if run == "noisy" else (operator, y, sigma_y)


def train(
    data: Any, run: str, settings: dict[str, Any], seed: int, folder: Path, device: str
) -> tuple[Prior, float]:
    """The prior of a run, resumed if it was interrupted, and the seconds it took this time."""
    begun = time.monotonic()
    resume = (folder / "config.json").exists()
    prior = fit(declared(data, run), configuration(run, settings, seed, device), folder, resume=resume)
    return prior, time.monotonic() - begun


def draw(prior: Prior, num: int, sigma_min: float, settings: dict[str, Any], seed: int) -> tuple[Tensor, int]:
    """``num`` samples and the network evaluations a sample took."""
    counted = Counted(prior)
    samples = generate(
        counted,
        num,
        steps=settings["sampler_steps"],
        sigma_min=sigma_min,
        sigma_max=settings["sigma_max"],
        batch_size=settings["sampler_batch"],
        generator=torch.Generator().manual_seed(3000 + seed),
    )
    return samples, counted.forwards // num


def shown_and_level(row: str, prior: Prior, sigma_n: float, settings: dict[str, Any]) -> tuple[Prior, float]:
    """The prior that a row of the table samples from, and the level it stops at; "staged@0.04" stops at
    .04."""
    row, _, stop = row.partition("@")
    shown = prior.anchor if isinstance(prior, StagedPrior) and row != "staged" else prior
    low = sigma_n if row == "ambient truncated" else settings["sigma_min"]
    return shown, float(stop) if stop else low


def rows(
    run: str,
    prior: Prior,
    sigma_n: float,
    settings: dict[str, Any],
    seed: int,
    score: Callable[[Prior, Tensor], dict],
    keep: Callable[[str, Tensor], Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Sample and score every row that a run gives; ``keep`` is handed the samples of each."""
    found = {}
    for row in ROWS[run]:
        shown, low = shown_and_level(row, prior, sigma_n, settings)
        samples, evaluations = draw(shown, settings["samples"], low, settings, seed)
        if keep is not None:
            keep(row, samples)
        found[row] = {**score(shown, samples), "evaluations_per_sample": evaluations}
    return found
