r"""From measurements to batches that a loss can take, and what they say about themselves.

Which stage runs follows from the data:

- *Complete* (identity; or every row measured, T^H T = I): A^H y = x_0 + sigma_y n with white n of the same
  level, so the noisy image itself is the training datum, x_tn = A^H y, and an unconditional prior is learned.
  Coil maps that are cropped to a support make T^H T a projection P; outside it the image is known to be 0,
  and x_tn = P A^H y + sigma_y (1 - P) n' completes the noise.
- *Incomplete*: rows are missing; a mask-conditional prior is learned from (y, M) by holding out further rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ambient_sci.data.survey import (
    Measurements,
    as_noisy_images,
    check_design,
    combine,
    data_moments,
    fingerprint,
    survey_masks,
)
from ambient_sci.errors import InputError
from ambient_sci.operators import MaskDesign, RowMaskedOperator, estimate_design
from ambient_sci.operators.foreign import CONVERTED
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.given_data import open_measurements

__all__ = [
    "Measurements",
    "NoisyBatch",
    "Source",
    "combine",
    "default_keep",
    "judge",
    "open_measurements",
    "open_source",
    "survey_masks",
]


class NoisyBatch(NamedTuple):
    """Operator, measurement and noise level (B,) of some samples; ``y`` is the noisy image where the data are
    complete.
    """

    operator: RowMaskedOperator
    y: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Source:
    """Measurements with what training needs to know about them; made by `open_source`.

    Attributes:
        measurements: the data.
        complete: every row of every sample is measured.
        design: how masks were drawn (incomplete data only).
        reason: what will be trained and why, in words.
        data_std: standard deviation of the clean images, estimated.
        data_mean: their mean, estimated; 0 where it is not known or, for complex images, has no meaning.
    """

    measurements: Measurements
    complete: bool
    design: MaskDesign | None
    reason: str
    data_std: float = math.nan
    data_mean: float = 0.0

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.measurements.image_shape)

    @property
    def noise_std(self) -> Tensor:
        """Noise level of every sample, (N,), on the CPU: the largest of its entries where they differ."""
        return self.measurements.noise_std.float().cpu()

    def ready(
        self, operator: RowMaskedOperator, y: Tensor, sigma: Tensor, generator: torch.Generator
    ) -> NoisyBatch:
        """A batch as a loss takes it; ``generator`` (CPU) fills in noise outside the support of coil maps."""
        if self.complete:
            return NoisyBatch(*as_noisy_images(operator, y, sigma, generator), sigma)
        # Its masks were surveyed when the data were judged, so splits need not look at them again.
        operator.design = operator._drawn_by = self.design
        return NoisyBatch(operator, y, sigma)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data, and what was made of them: checked when a run is resumed."""
        design = None if self.design is None else self.design.to_dict()
        found = {**fingerprint(self.measurements), "complete": self.complete, "design": design}
        operator = self.measurements.operator([0]) if found["operator"] == "linear" else None
        return found if operator is None else {**found, "physics": operator.response()}


def open_source(measurements: Any, config: TrainConfig) -> Source:
    """Open and judge measurements, in any form that `open_measurements` takes.

    Raises:
        InputError: not readable, not finite, noise that explains all variance, masks that the stated design
            cannot have drawn, or a loss that the data do not allow.
        IdentifiabilityError: rows are missing by a design that leaves some unsupervised, or by an unknown
            one.
    """
    return judge(open_measurements(measurements), config)


def judge(data: Measurements, config: TrainConfig) -> Source:
    """`open_source` of measurements that are open already."""
    if data.operator_name == "linear":
        raise InputError(
            f"measurements: expected an Identity, Masking or MRI operator (or deepinv's "
            f"{', '.join(CONVERTED)}), got {data.operator()!r}; from any linear operator a prior is "
            "learned by expectation maximisation: config.em, or fit_em"
        )
    fraction, masks = survey_masks(data)
    complete = fraction == 1
    keep = config.loss.keep
    if complete and keep not in (None, 1.0):
        raise InputError(f"loss.keep: expected 1 for complete data (nothing has to be held out), got {keep}")
    design = None
    if not complete:
        design = data.design or estimate_design(masks)
        check_design(design, masks, 1 if data.shared_mask else len(data))
        design.check_trainable(default_keep(complete) if keep is None else keep)
    source = Source(data, complete, design, _reason(data, fraction, design))
    mean, std = data_moments(data, complete)
    complex_images = data.image_shape[0] == 2
    return replace(source, data_std=std, data_mean=0.0 if complex_images else mean)


def default_keep(complete: bool) -> float:
    """Fraction of measured rows to show the network: all of complete data, three quarters where rows are
    missing.
    """
    return 1.0 if complete else 0.75


def _reason(data: Measurements, fraction: float, design: MaskDesign | None) -> str:
    low, high = float(data.noise_std.min()), float(data.noise_std.max())
    noise = "no noise" if high == 0 else f"noise {low:g}" if low == high else f"noise {low:g} to {high:g}"
    head = f"{len(data)} samples, operator {data.operator_name}, {noise}"
    if fraction < 1:
        status = "" if design is None else f" (mask design {design.name}, {design.status})"
        return (
            f"{head}, {100 * fraction:.0f} % of rows measured{status}: operator-aware Ambient loss with "
            "held-out rows, "
            "a mask-conditional prior. Samplers that need an unconditional one refuse it"
        )
    scan = (
        "fully sampled, so coil-combined images carry white noise of the same level"
        if data.operator_name == "mri"
        else "complete"
    )
    if high == 0:
        return f"{head}, {scan}: denoising loss, an unconditional prior"
    return (
        f"{head}, {scan}: Ambient loss, an unconditional prior; levels below the noise of the data are "
        "not learned"
    )
