"""Evaluation: metrics, sweeps of classic baselines, calibration, distribution distances, figures, reports."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOMES = {
    "magnitude": "metrics",
    "volume_peak": "metrics",
    "psnr": "metrics",
    "ssim": "metrics",
    "nrmse": "metrics",
    "reconstruction_table": "metrics",
    "format_table": "metrics",
    "zero_filled": "ambient_sci.baselines",
    "sense": "ambient_sci.baselines",
    "l1_wavelet": "ambient_sci.baselines",
    "total_variation": "ambient_sci.baselines",
    "sweep": "sweeps",
    "with_truth": "calibration",
    "held_out_rows": "calibration",
    "std_over_error": "calibration",
    "hold_out": "calibration",
    "chi_squared": "chi_squared",
    "sliced_wasserstein": "distances",
    "frechet_distance": "distances",
    "kernel_distance": "distances",
    "energy_distance": "distances",
    "distribution_distances": "distances",
    "ProximalScore": "proximal",
    "proximal_score": "proximal",
    "FeatureMoments": "feature_distances",
    "frechet": "feature_distances",
    "frechet_interval": "feature_distances",
    "kid": "feature_distances",
    "precision_recall": "feature_distances",
    "compare_features": "feature_distances",
    "features_of": "features",
    "share_features": "features",
    "Protocol": "protocol",
    "run_protocol": "protocol",
    "Extractor": "extractors",
    "get_extractor": "extractors",
    "neighbours": "neighbours",
    "Neighbours": "neighbours",
    "memorization_score": "memorization",
    "memorization_attack": "memorization_attack",
    "memorization_error": "memorization_error",
    "reconstruction_figure": "figures",
    "tissue_white": "figures",
    "calibration_figure": "figures",
    "evaluate": "report",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Public names load their module on first use: importing this package imports no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    return getattr(importlib.import_module(home if "." in home else f"{__name__}.{home}"), name)


class _Package(ModuleType):
    """A function may share the name of its module (`neighbours`, `chi_squared`): the name stays the
    function's.

    Importing a module binds it in its package, where it would hide the function from then on.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
