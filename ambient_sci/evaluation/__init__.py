"""Evaluation: metrics, sweeps of classic baselines, calibration, distribution distances, figures, reports."""

from __future__ import annotations

import importlib
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
    "reconstruction_figure": "figures",
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


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
