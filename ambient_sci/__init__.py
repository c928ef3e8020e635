"""ambient_sci: diffusion priors from noisy and incomplete measurements, and posterior samples with error bars
that hold.

Public names load on first use, so that importing the package (and ``ambient-sci --help``) costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ambient_sci._version import __version__

_ROOMS = (
    "errors",
    "noise",
    "tweedie",
    "operators",
    "priors",
    "losses",
    "data",
    "baselines",
    "sampling",
    "training",
    "evaluation",
)
_NAMES = {
    "fit": "training",
    "generate": "sampling",
    "reconstruct": "sampling",
    "Reconstruction": "sampling",
    "load_prior": "priors",
    "TrainConfig": "training",
    "EMConfig": "training",
    "JointConfig": "training",
    "LevelConfig": "training",
    "LossConfig": "training",
    "NetworkConfig": "priors",
    "StagedConfig": "training",
    "fit_em": "training",
    "plot": "plotting",
    "InputError": "errors",
}

__all__ = [
    "EMConfig",
    "InputError",
    "JointConfig",
    "LevelConfig",
    "LossConfig",
    "NetworkConfig",
    "Reconstruction",
    "StagedConfig",
    "TrainConfig",
    "__version__",
    "baselines",
    "data",
    "errors",
    "evaluation",
    "fit",
    "fit_em",
    "generate",
    "load_prior",
    "losses",
    "noise",
    "operators",
    "plot",
    "priors",
    "reconstruct",
    "sampling",
    "training",
    "tweedie",
]

if TYPE_CHECKING:
    from ambient_sci import (
        baselines,
        data,
        errors,
        evaluation,
        losses,
        noise,
        operators,
        priors,
        sampling,
        training,
        tweedie,
    )
    from ambient_sci.errors import InputError
    from ambient_sci.plotting import plot
    from ambient_sci.priors import NetworkConfig, load_prior
    from ambient_sci.sampling import Reconstruction, generate, reconstruct
    from ambient_sci.training import (
        EMConfig,
        JointConfig,
        LevelConfig,
        LossConfig,
        StagedConfig,
        TrainConfig,
        fit,
        fit_em,
    )


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"ambient_sci.{name}")
    if name in _NAMES:
        return getattr(import_module(f"ambient_sci.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'ambient_sci' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
