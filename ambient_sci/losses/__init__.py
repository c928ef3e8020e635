"""Losses: plain denoising, operator-aware Tweedie (ambient), consistency. Every loss returns one value a sample, (B,)."""

from __future__ import annotations

from ambient_sci.losses.ambient import AmbientStep, ambient, ambient_step, denoising, estimate, kept_weight
from ambient_sci.losses.consistency import consistency, squared_expectation_gap

__all__ = [
    "AmbientStep",
    "ambient",
    "ambient_step",
    "consistency",
    "denoising",
    "estimate",
    "kept_weight",
    "squared_expectation_gap",
]
