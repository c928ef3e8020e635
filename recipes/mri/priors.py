"""What is trained: one prior for each entry of ``priors`` in config.yaml, all with the same network.

clean            every row, declared free of noise: denoising. The upper bound (on measured scans, which have
                 noise: taken for
                 clean, as published)
noisy            every row, with noise: Ambient loss, unconditional
em               rows missing: expectation maximisation, unconditional
k-space          rows missing: operator-aware Ambient loss, mask-conditional; one acceleration, or several in
                 one model;
                 ``ablation`` takes a part of the loss away (`ablation_stages`)
ssdu, robust     rows missing: deepinv's losses (`ssdu`), a network that reconstructs in one step
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.data import MeasurementFile
from ambient_sci.errors import InputError
from ambient_sci.precision import native_bfloat16
from ambient_sci.priors import Prior, load_prior
from ambient_sci.training import (
    AmbientStage,
    EMConfig,
    LevelConfig,
    LossConfig,
    OneModule,
    Reporter,
    RunFolder,
    TrainConfig,
    em_report,
    fit,
    make_accelerator,
    open_source,
    run_stage,
)
from ambient_sci.whole_files import write_json
from recipes.mri.ablation_stages import ARMS
from recipes.mri.scans import Scans
from recipes.mri.ssdu import SplittingStage

KINDS = ("clean", "noisy", "em", "k-space", "ssdu", "robust")
#: Keeps the random streams of the members of a model of several accelerations apart.
_SEED_STRIDE = 1_000_003


def accelerations(entry: dict[str, Any]) -> list[float]:
    """R of the scans that an entry of ``priors`` is trained on; 1 where nothing is missing."""
    found = entry.get("R", 1)
    return list(found) if isinstance(found, list) else [found]


def configuration(entry: dict[str, Any], profile: dict[str, Any], device: str) -> TrainConfig:
    """The training configuration of an entry of ``priors``: the profile's, with what the entry says
    otherwise."""
    settings = {
        **profile["training"],
        "network": profile["network"],
        "levels": {**profile["levels"], **entry.get("levels", {})},
        "device": device,
    }
    if settings.get("precision") == "auto":
        settings["precision"] = "bf16" if native_bfloat16(make_accelerator(device).device) else "fp32"
    kind = entry["kind"]
    if kind not in KINDS:
        raise InputError(f"priors: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    base = TrainConfig.from_dict({**settings, "max_steps": entry.get("steps", settings["max_steps"])})
    if kind == "em":
        levels = LevelConfig(**{**profile["levels"], **profile["em"].get("levels", {})})
        own = {**profile["em"], **({"laps": entry["laps"]} if "laps" in entry else {})}
        em = EMConfig(**{k: v for k, v in own.items() if k not in ("levels", "slices")})
        return replace(base, max_steps=None, em=em, levels=levels)
    if kind in ("clean", "noisy"):
        return base
    # Masks do not survive a transposition; nor does their design survive reflections about another centre
    # than its own.
    names = tuple(a for a in base.augmentations if a != "transpose")
    return replace(base, augmentations=names)


def kept_fraction(keep: float | str, acceleration: float) -> float:
    """Fraction of measured rows that the network is shown: a number, or "R+1" for the published R -> R + 1,
    that is R / (R + 1)."""
    if keep == "R+1":
        return acceleration / (acceleration + 1)
    if not isinstance(keep, float) or not 0 < keep < 1:
        raise InputError(f"priors: keep: expected a fraction in (0, 1) or 'R+1', got {keep!r}")
    return keep


class SeveralAccelerations(OneModule):
    """One mask-conditional network for scans of several accelerations, a batch of each in turn, each with the
    weights of its own design.

    Every acceleration has slices of its own: two scans of one slice would share noise, and together be less
    undersampled than either.

    Args:
        files: measurement files, one an acceleration, of the same slices.
        configs: one each; they differ in the loss.
        arm: of `ablation_stages`.
    """

    name = "ambient"

    def __init__(
        self, files: list[Path], configs: list[TrainConfig], accelerator: Any, arm: str = "full"
    ) -> None:
        self.arm = arm
        self.stages: list[AmbientStage] = []
        for k, (path, config) in enumerate(zip(files, configs, strict=True)):
            with MeasurementFile(path) as scans:
                rows = torch.arange(k, len(scans), len(files))
                data = (scans.operator(rows), scans.measurements(rows), scans.sigma(rows))
            initial: Any = self.stages[0].module if self.stages else None
            own = replace(config, seed=config.seed + k * _SEED_STRIDE)
            self.stages.append(ARMS[arm](open_source(data, own), own, accelerator, initial=initial))
        self.module: nn.Module = self.stages[0].module

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data."""
        parts = {f"part {k}": stage.source.fingerprint() for k, stage in enumerate(self.stages)}
        return {**parts, "ablation": self.arm}

    def loss(self, step: int, part: int = 0) -> Tensor:
        """Of a batch of one acceleration."""
        return self.stages[step % len(self.stages)].loss(step, part)

    def indices(self, step: int, part: int = 0) -> list[int]:
        """Slices of that batch, counted within its acceleration."""
        return self.stages[step % len(self.stages)].indices(step, part)


def train(name: str, profile: dict[str, Any], scans: Scans, folder: Path, device: str) -> Prior:
    """The prior ``name`` of a profile: loaded if it is done, continued if it was interrupted.

    ``folder``/NAME is its run folder; ``folder``/NAME.json says, at the end, how long it took.

    Raises:
        InputError: a prior that is not in the profile, or settings that do not fit.
    """
    if name not in profile["priors"]:
        raise InputError(f"prior: expected one of {', '.join(profile['priors'])}, got {name!r}")
    run, done = folder / name, folder / f"{name}.json"
    if done.exists():
        return load_prior(run / "prior", make_accelerator(device).device)
    entry = profile["priors"][name]
    config = configuration(entry, profile, device)
    resumed, begun = (run / "config.json").exists(), time.monotonic()
    prior = _trained(entry, profile, config, scans, run)
    note: dict[str, Any] = {"entry": entry, "seconds": round(time.monotonic() - begun, 1), "resumed": resumed}
    if config.em is not None:
        note["laps"] = [{k: r[k] for k in ("lap", "crps", "seconds")} for r in em_report(run)]
    write_json(done, note)
    return prior


def _trained(
    entry: dict[str, Any], profile: dict[str, Any], config: TrainConfig, scans: Scans, run: Path
) -> Prior:
    kind, rates = entry["kind"], accelerations(entry)
    resume = (run / "config.json").exists()
    if kind == "noisy":
        return fit(scans.training(1), config, run, resume=resume)
    if kind == "clean":
        with MeasurementFile(scans.training(1, clean=True)) as file:
            declared = (file.operator(), file.measurements(), 0.0)
        return fit(declared, config, run, resume=resume)
    if kind == "em":
        return fit(scans.training(rates[0], slices=profile["em"].get("slices")), config, run, resume=resume)
    files = [scans.training(r) for r in rates]
    accelerator = make_accelerator(config.device)
    if kind == "k-space":
        configs = [
            replace(config, loss=LossConfig(keep=kept_fraction(entry["keep"], r), **entry.get("loss", {})))
            for r in rates
        ]
        arm = entry.get("ablation", "full")
        if arm not in ARMS:
            raise InputError(f"priors: ablation: expected one of {', '.join(ARMS)}, got {arm!r}")
        together = SeveralAccelerations(files, configs, accelerator, arm)
        return run_in_folder(together, configs[0], accelerator, run, together.fingerprint())
    stage = SplittingStage(files[0], config, accelerator, robust=kind == "robust", **profile["ssdu"])
    return run_in_folder(stage, config, accelerator, run, stage.fingerprint())


def run_in_folder(
    stage: Any, config: TrainConfig, accelerator: Any, path: Path, data: dict[str, Any]
) -> Prior:
    """A stage of this recipe in a run folder, from its checkpoint if there is one; ``data`` must then be the
    same."""
    run, description = RunFolder(path), {"data": data}
    run.reopen(config, description) if (path / "config.json").exists() else run.create(config, description)
    options: Any = {"folder": run, "resume": True, "reporter": Reporter()}
    return run_stage(stage, config, accelerator=accelerator, **options).eval()
