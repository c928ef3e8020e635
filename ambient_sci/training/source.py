r"""From measurements to batches that a loss can take, and what they say about themselves.

Which stage runs follows from the data:

- *Complete* (identity; or every row measured, T^H T = I): A^H y = x_0 + sigma_y n with white n of the same level, so the noisy
  image itself is the training datum, x_tn = A^H y, and an unconditional prior is learned. Coil maps that are cropped to a support make
  T^H T a projection P; outside it the image is known to be 0, and x_tn = P A^H y + sigma_y (1 - P) n' completes the noise.
- *Incomplete*: rows are missing; a mask-conditional prior is learned from (y, M) by holding out further rows.

The standard deviation of the clean data, which scales network and levels, comes from noisy rows alone: with m_i and v_i the mean and
the second moment of row i over the samples that measured it,

    d^2 = (1 / #pixels) sum_i (v_i - sigma_y^2) - m^2,        m: mean of the image where T = I, else 0.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data import MeasurementArrays, MeasurementFile
from ambient_sci.data.loader import CACHE_BYTES
from ambient_sci.errors import InputError
from ambient_sci.operators import Identity, MaskDesign, RowMaskedOperator, estimate_design
from ambient_sci.training.config import TrainConfig

_PROBE = 512  # samples looked at for the data's standard deviation and for the fingerprint
_CHUNK = 64


Measurements = MeasurementFile | MeasurementArrays


class NoisyBatch(NamedTuple):
    """Operator, measurement and noise level (B,) of some samples; ``y`` is the noisy image where the data are complete."""

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
    """

    measurements: Measurements
    complete: bool
    design: MaskDesign | None
    reason: str
    data_std: float = math.nan

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.measurements.image_shape)

    @property
    def noise_std(self) -> Tensor:
        """Noise level of every sample, (N,), on the CPU."""
        return self.measurements.noise_std.float().cpu()

    def ready(
        self, operator: RowMaskedOperator, y: Tensor, sigma: Tensor, generator: torch.Generator
    ) -> NoisyBatch:
        """A batch as a loss takes it; ``generator`` (CPU) fills in noise outside the support of coil maps."""
        if not self.complete:
            operator.design = self.design
            return NoisyBatch(operator, y, sigma)
        if operator.name != "identity":
            y, operator = combine(operator, y, sigma, generator), identity(self.image_shape, y.device)
        return NoisyBatch(operator, y, sigma)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: checked when a run is resumed."""
        data = self.measurements
        some = data.measurements(torch.from_numpy(_spread(len(data), 8))).cpu().contiguous()
        return {
            "operator": data.operator_name,
            "image_shape": list(self.image_shape),
            "samples": len(data),
            "measurement_shape": list(some.shape[1:]),
            "noise_std": [float(data.noise_std.min()), float(data.noise_std.max())],
            "complete": self.complete,
            "design": None if self.design is None else self.design.to_dict(),
            "content": hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16],
        }


def open_source(
    measurements: str | os.PathLike[str] | tuple[RowMaskedOperator, Tensor, float | Tensor],
    config: TrainConfig,
) -> Source:
    """Open and judge measurements: a file, or (operator, y, sigma_y).

    Raises:
        InputError: not readable, not finite, noise that explains all variance, or a loss that the data do not allow.
        IdentifiabilityError: rows are missing by a design that leaves some unsupervised, or by an unknown one.
    """
    return judge(open_measurements(measurements), config)


def judge(data: Measurements, config: TrainConfig) -> Source:
    """`open_source` of measurements that are open already."""
    fraction, masks = survey_masks(data)
    complete = fraction == 1
    keep = config.loss.keep
    if complete and keep not in (None, 1.0):
        raise InputError(f"loss.keep: expected 1 for complete data (nothing has to be held out), got {keep}")
    design = None
    if not complete:
        design = data.design or estimate_design(masks)
        design.check_trainable(default_keep(complete) if keep is None else keep)
    source = Source(data, complete, design, _reason(data, fraction, design))
    return replace(source, data_std=_data_std(source))


def open_measurements(measurements: Any) -> Measurements:
    """A file (in memory where it is small) or (operator, y, sigma_y) as measurements; InputError if they are neither."""
    if isinstance(measurements, (str, os.PathLike)):
        file = MeasurementFile(measurements)
        return MeasurementArrays.read(file) if file.nbytes < CACHE_BYTES else file
    if not isinstance(measurements, tuple) or len(measurements) != 3:
        got = (
            f"{len(measurements)} values" if isinstance(measurements, tuple) else type(measurements).__name__
        )
        raise InputError(f"measurements: expected a path or (operator, y, sigma_y), got {got}")
    operator, y, sigma_y = measurements
    if not isinstance(operator, RowMaskedOperator):
        raise InputError(
            f"measurements: expected an Identity, Masking or MRI operator, got {type(operator).__name__}"
        )
    data = MeasurementArrays(operator, y.detach().float() if isinstance(y, Tensor) else y, sigma_y)
    if operator.name == "masking":  # a mask of one channel serves any number: the data say how many there are
        data.image_shape = tuple(y.shape[1:])
    return data


def default_keep(complete: bool) -> float:
    """Fraction of measured rows to show the network: all of complete data, three quarters where rows are missing."""
    return 1.0 if complete else 0.75


def _reason(data: Measurements, fraction: float, design: MaskDesign | None) -> str:
    low, high = float(data.noise_std.min()), float(data.noise_std.max())
    noise = "no noise" if high == 0 else f"noise {low:g}" if low == high else f"noise {low:g} to {high:g}"
    head = f"{len(data)} samples, operator {data.operator_name}, {noise}"
    if fraction < 1:
        status = "" if design is None else f" (mask design {design.name}, {design.status})"
        return (
            f"{head}, {100 * fraction:.0f} % of rows measured{status}: operator-aware Ambient loss with held-out rows, "
            "a mask-conditional prior. Samplers that need an unconditional one refuse it"
        )
    scan = (
        "fully sampled, so coil-combined images carry white noise of the same level"
        if data.operator_name == "mri"
        else "complete"
    )
    if high == 0:
        return f"{head}, {scan}: denoising loss, an unconditional prior"
    return f"{head}, {scan}: Ambient loss, an unconditional prior; levels below the noise of the data are not learned"


# -- masks -----------------------------------------------------------------------------------------------------------------------


def survey_masks(data: Measurements) -> tuple[float, Tensor]:
    """Measured fraction of all rows, and all masks (N or 1, m, H, W)."""
    if data.operator_name == "identity":
        return 1.0, torch.ones(1, 1, 1, 1)
    if isinstance(data, MeasurementArrays):
        masks = data.operator().network_mask
    else:
        num = 1 if data.shared_mask else len(data)
        chunks = [data.mask(np.arange(i, min(i + _CHUNK, num))) for i in range(0, num, _CHUNK)]
        masks = torch.cat([c[:, :, 0] if c.ndim == 5 else c for c in chunks])
    return float(masks.double().mean()), masks


# -- complete data as noisy images -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def identity(shape: tuple[int, ...], device: torch.device) -> Identity:
    return Identity(shape).to(device)


def combine(
    operator: RowMaskedOperator, y: Tensor, sigma: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Fully measured y as the noisy image A^H y (B, C, H, W), white noise of level ``sigma`` (B,) everywhere.

    Raises:
        InputError: T^H T is neither the identity nor a projection onto a support (coil maps not normalised).
    """
    image = operator.A_adjoint(y)
    if operator.isometry:
        return image
    ones = torch.zeros_like(image)
    ones[:, 0] = 1
    support = operator.A_adjoint_A(ones)[:, :1]  # sum_c |s_c|^2
    inside = support > 0.5
    wrong = ((support - inside.float()).abs() > 1e-3).flatten(1).any(1)
    if bool(wrong.any()):
        raise InputError(
            "coil maps: expected sum_c |s_c|^2 = 1 (0 outside a support) for fully sampled data, got other values in "
            f"{int(wrong.sum())} of {len(wrong)} samples; normalise them (ambient_sci.operators.normalise_maps)"
        )
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype).to(image.device)
    return torch.where(inside, image, sigma.reshape(-1, 1, 1, 1) * noise)


# -- statistics ------------------------------------------------------------------------------------------------------------------


def _spread(num: int, count: int) -> np.ndarray:
    """At most ``count`` different indices, evenly spread over range(num)."""
    return np.unique(np.linspace(0, num - 1, min(num, count)).astype(np.int64))


def _data_std(source: Source) -> float:
    """Estimate the standard deviation of the clean images (the equation of the module)."""
    data, generator = source.measurements, torch.Generator().manual_seed(0)
    count = first = second = torch.zeros((), dtype=torch.float64)
    spread = _spread(len(data), _PROBE)
    for indices in np.array_split(spread, math.ceil(len(spread) / _CHUNK)):
        rows = torch.from_numpy(indices)
        batch = source.ready(data.operator(rows), data.measurements(rows), source.noise_std[rows], generator)
        y, mask = batch.y.double(), batch.operator.mask.double().expand_as(batch.y)
        level = batch.sigma.double().reshape(-1, *([1] * (y.ndim - 1)))
        count = count + mask.sum(0)
        first = first + (mask * y).sum(0)
        second = second + (mask * (y**2 - level**2)).sum(0)
    seen = count > 0
    rows_per_entry = count.numel() / math.prod(source.image_shape)  # above 1 with several coils
    power = float((second[seen] / count[seen]).mean()) * rows_per_entry
    in_image_space = source.complete or data.operator_name != "mri"
    mean = float((first[seen] / count[seen]).mean()) if in_image_space else 0.0
    if not power > mean**2:
        raise InputError(
            "measurements: expected a variance above that of the noise, got one below it "
            f"(difference {power - mean**2:.3g}): the data hold no signal, or noise_std is too large"
        )
    return math.sqrt(power - mean**2)
