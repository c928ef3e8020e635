"""The Ambient loss with one part of it taken away: stages of training for `ablations`, and for entries of
config.yaml.

full             the loss as it is
no-tweedie       c = 1: kept rows are fitted noise and all
unit-weights     held-out rows count 1 instead of 1 / P(measured | kept)
keep-acs         calibration lines are always shown to the network, never held out
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ambient_sci import losses
from ambient_sci.noise import expand
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.operators.split import Split
from ambient_sci.training import AmbientStage, Batches
from ambient_sci.training.stages import ambient_of


class UnitWeights(Batches):
    """Held-out rows that are measured rarely count rarely."""

    def split(self, operator: RowMaskedOperator, num: int, generator: torch.Generator, mask: Tensor) -> Split:
        """The split as it is, with weights 1 on every measured row."""
        split = super().split(operator, num, generator, mask)
        return replace(split, weights=split.operator.mask)


class KeptCalibration(Batches):
    """At sigma = sigma_y, where estimates are made, nothing then supervises the calibration lines."""

    def split(self, operator: RowMaskedOperator, num: int, generator: torch.Generator, mask: Tensor) -> Split:
        """The split as it is, with the calibration lines moved to the kept ones."""
        return operator.split(keep=self.keep, generator=generator, num=num, mask=mask, keep_calibration=True)


class NoTweedie(AmbientStage):
    """The loss without the correction for the noise of the data."""

    def loss(self, step: int, part: int = 0) -> Tensor:
        """Squared errors of kept and held-out rows against what was measured."""
        drawn, prior = self.batches.draw(step, part), self.module
        found = ambient_of(prior, drawn, self.config.loss)  # type: ignore[arg-type]
        error = (drawn.operator.transform(found.denoised) - drawn.y).square()
        level = expand(drawn.sigma, drawn.y)
        return losses.weighted_error(prior, drawn.split, found.denoised, level, error, error)  # type: ignore[arg-type]


def unit_weights(source: Any, config: Any, accelerator: Any, initial: Any = None) -> AmbientStage:
    """The Ambient stage on batches of `UnitWeights`."""
    return AmbientStage(source, config, accelerator, initial, UnitWeights(source, config, accelerator))


def keep_calibration(source: Any, config: Any, accelerator: Any, initial: Any = None) -> AmbientStage:
    """The Ambient stage on batches of `KeptCalibration`."""
    return AmbientStage(source, config, accelerator, initial, KeptCalibration(source, config, accelerator))


#: Arm -> what makes its stage: (source, config, accelerator, initial prior).
ARMS: dict[str, Any] = {
    "full": AmbientStage,
    "no-tweedie": NoTweedie,
    "unit-weights": unit_weights,
    "keep-acs": keep_calibration,
}
