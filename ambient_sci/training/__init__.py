"""Training: configuration, the loop, checkpoints and resume. Names load on first use; `TrainConfig` needs no
torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {
    "ConsistencyConfig": "stage_configs",
    "EMConfig": "stage_configs",
    "ConsistencyStage": "below_noise",
    "DistillConfig": "stage_configs",
    "DistillationStage": "distillation",
    "JointConfig": "stage_configs",
    "JointStage": "below_noise",
    "StagedConfig": "stage_configs",
    "distill": "trainer",
    "fit_em": "trainer",
    "em_report": "em",
    "FrozenNoiseConfig": "config",
    "LevelConfig": "config",
    "LossConfig": "config",
    "TrainConfig": "config",
    "TrainingDiverged": "errors",
    "TrainingInterrupted": "errors",
    "AmbientStage": "stages",
    "Batches": "batches",
    "Drawn": "batches",
    "OneModule": "loop",
    "ProcessLost": "errors",
    "initial_prior": "stages",
    "Reporter": "report",
    "RunFolder": "run_folder",
    "Selection": "selection",
    "Stage": "loop",
    "explicit_config": "trainer",
    "fit": "trainer",
    "make_accelerator": "trainer",
    "open_source": "source",
    "run_stage": "loop",
}

__all__ = [
    "AmbientStage",
    "Batches",
    "ConsistencyConfig",
    "ConsistencyStage",
    "DistillConfig",
    "DistillationStage",
    "Drawn",
    "EMConfig",
    "FrozenNoiseConfig",
    "JointConfig",
    "JointStage",
    "LevelConfig",
    "LossConfig",
    "OneModule",
    "ProcessLost",
    "Reporter",
    "RunFolder",
    "Selection",
    "Stage",
    "StagedConfig",
    "TrainConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
    "distill",
    "em_report",
    "explicit_config",
    "fit",
    "fit_em",
    "initial_prior",
    "make_accelerator",
    "open_source",
    "run_stage",
]

if TYPE_CHECKING:
    from ambient_sci.training.batches import Batches, Drawn
    from ambient_sci.training.below_noise import ConsistencyStage, JointStage
    from ambient_sci.training.config import FrozenNoiseConfig, LevelConfig, LossConfig, TrainConfig
    from ambient_sci.training.distillation import DistillationStage
    from ambient_sci.training.em import em_report
    from ambient_sci.training.errors import ProcessLost, TrainingDiverged, TrainingInterrupted
    from ambient_sci.training.loop import OneModule, Stage, run_stage
    from ambient_sci.training.report import Reporter
    from ambient_sci.training.run_folder import RunFolder
    from ambient_sci.training.selection import Selection
    from ambient_sci.training.source import open_source
    from ambient_sci.training.stage_configs import (
        ConsistencyConfig,
        DistillConfig,
        EMConfig,
        JointConfig,
        StagedConfig,
    )
    from ambient_sci.training.stages import AmbientStage, initial_prior
    from ambient_sci.training.trainer import distill, explicit_config, fit, fit_em, make_accelerator


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"ambient_sci.training.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'ambient_sci.training' has no attribute {name!r}")
