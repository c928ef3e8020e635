"""Losses: plain denoising, operator-aware Tweedie (ambient), consistency, distillation; one value a sample
each, (B,)."""

from __future__ import annotations

from ambient_sci.losses.consistency_loss import consistency, consistency_step, squared_expectation_gap
from ambient_sci.losses.distillation_loss import distillation, karras_levels
from ambient_sci.losses.tweedie_loss import (
    AmbientStep,
    ambient,
    ambient_step,
    denoise_measurement,
    denoising,
    kept_weight,
    weighted_error,
)

#: The short name of `denoise_measurement`.
estimate = denoise_measurement

__all__ = [
    "AmbientStep",
    "ambient",
    "ambient_step",
    "consistency",
    "consistency_step",
    "denoise_measurement",
    "denoising",
    "distillation",
    "estimate",
    "karras_levels",
    "kept_weight",
    "squared_expectation_gap",
    "weighted_error",
]
