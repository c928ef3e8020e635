r"""What measurements say about themselves: how much was measured, by which masks, how large the images are.

A survey looks at a bounded part of the data, so that a data set of a million samples is judged as fast as one
of thousands.

The standard deviation of the clean images, which scales network and levels, comes from noisy rows alone: with
m_i and v_i the mean and the second moment of row i over the samples that measured it,

    d^2 = (1 / #pixels) sum_i (v_i - sigma_y^2) - m^2,        m: mean of the image where T = I, else 0.

Complete data (every row measured, T^H T = I) are noisy images: A^H y = x_0 + sigma_y n with white n of the
same level. Coil maps that are cropped to a support make T^H T a projection P; outside it the image is known
to be 0, and P A^H y + sigma_y (1 - P) n' completes the noise.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.files import MeasurementFile
from ambient_sci.data.loader import MeasurementArrays
from ambient_sci.data.many_files import MeasurementFiles
from ambient_sci.errors import InputError
from ambient_sci.operators import Identity, MaskDesign, RowMaskedOperator

Measurements = MeasurementFile | MeasurementFiles | MeasurementArrays

#: Masks looked at, and the memory they may take: what a design is judged by and estimated from.
SURVEYED = 4096
SURVEY_BYTES = 256 << 20
_PROBE = 512  # samples looked at for the data's standard deviation
_CHUNK = 64


def spread(num: int, count: int) -> np.ndarray:
    """At most ``count`` different indices, evenly spread over range(num)."""
    return np.unique(np.linspace(0, num - 1, min(num, count)).astype(np.int64))


# -- masks ---------------------------------------------------------------------------------------------------


def survey_masks(data: Measurements) -> tuple[float, Tensor]:
    """How much is measured, and by which masks.

    Args:
        data: measurements.

    Returns:
        The measured fraction of all rows of all samples, 1 exactly where nothing is missing; and at most
        `SURVEYED` masks, evenly spread over the data, (n, m, H, W) uint8.
    """
    if data.operator_name == "identity":
        return 1.0, torch.ones(1, 1, 1, 1, dtype=torch.uint8)
    if isinstance(data, MeasurementArrays):
        masks = data.operator().network_mask
        ones = sum(int(block.count_nonzero()) for block in masks.split(_CHUNK))
        return ones / masks.numel(), masks[_surveyed(len(masks), masks[0].numel())].to(torch.uint8)
    num = 1 if data.shared_mask else len(data)
    chosen = _surveyed(num, math.prod(data.mask([0]).shape))
    blocks = [
        data.mask(rows).to(torch.uint8) for rows in np.array_split(chosen, math.ceil(len(chosen) / _CHUNK))
    ]
    return data.measured_fraction, torch.cat([b[:, :, 0] if b.ndim == 5 else b for b in blocks])


def _surveyed(num: int, size: int) -> np.ndarray:
    return spread(num, max(1, min(SURVEYED, SURVEY_BYTES // size)))


def check_design(design: MaskDesign, masks: Tensor, num: int) -> None:
    """Raise unless the design can have drawn the surveyed masks (n, m, H, W) of ``num`` samples.

    Raises:
        InputError: it cannot: the weights of held-out rows would be wrong.
    """
    numbers = spread(num, len(masks))
    for rows in np.array_split(np.arange(len(masks)), math.ceil(len(masks) / _CHUNK)):
        design.check_drawn(masks[rows[0] : rows[-1] + 1].float(), numbers[rows])


# -- complete data as noisy images ---------------------------------------------------------------------------


@lru_cache(maxsize=8)
def identity(shape: tuple[int, ...], device: torch.device) -> Identity:
    """The identity operator of a shape, made once a device."""
    return Identity(shape).to(device)


def combine(
    operator: RowMaskedOperator, y: Tensor, sigma: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Fully measured y as the noisy image A^H y (B, C, H, W), white noise of level ``sigma`` (B,) everywhere.

    Args:
        operator: complete.
        y: its measurements.
        sigma: noise levels (B,); of the shape of y only where T is the identity.
        generator: fills in noise outside the support of coil maps.

    Raises:
        InputError: T^H T is neither the identity nor a projection onto a support (coil maps not normalised),
            or noise that differs by entry of k-space, which has another covariance in the image.
    """
    if sigma.ndim > 1 and operator.name == "mri":
        raise InputError(
            "noise_std: expected one level a sample for fully sampled k-space (its noise is white in the "
            "image), got one for each entry"
        )
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
            "coil maps: expected sum_c |s_c|^2 = 1 (0 outside a support) for fully sampled data, got other "
            f"values in {int(wrong.sum())} of {len(wrong)} samples; normalise them "
            "(ambient_sci.operators.normalise_maps)"
        )
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype).to(image.device)
    return torch.where(inside, image, sigma.reshape(-1, *[1] * (image.ndim - 1)) * noise)


def as_noisy_images(
    operator: RowMaskedOperator, y: Tensor, sigma: Tensor, generator: torch.Generator | None = None
) -> tuple[RowMaskedOperator, Tensor]:
    """Complete measurements as noisy images: the identity, and `combine` of them."""
    if operator.name == "identity":
        return operator, y
    return identity(tuple(operator.img_size), y.device), combine(operator, y, sigma, generator)


# -- statistics ----------------------------------------------------------------------------------------------


def data_std(data: Measurements, complete: bool) -> float:
    """The standard deviation of the clean images, see `data_moments`."""
    return data_moments(data, complete)[1]


def data_moments(data: Measurements, complete: bool) -> tuple[float, float]:
    """Estimate mean m and standard deviation d of the clean images (equation of the module) from 512 samples.

    The mean of k-space is not that of images: for incomplete MRI m is 0, and d is the root mean square.

    Args:
        data: measurements.
        complete: every row of every sample is measured.

    Raises:
        InputError: a variance below that of the noise.
    """
    generator = torch.Generator().manual_seed(0)
    count = first = second = torch.zeros((), dtype=torch.float64)
    chosen = spread(len(data), _PROBE)
    for indices in np.array_split(chosen, math.ceil(len(chosen) / _CHUNK)):
        rows = torch.from_numpy(indices)
        operator, y, sigma = data.operator(rows), data.measurements(rows), data.sigma(rows)
        if complete:
            operator, y = as_noisy_images(operator, y, sigma, generator)
        y, mask = y.double(), operator.mask.double().expand_as(y)
        level = sigma.double().reshape(-1, *([1] * (y.ndim - 1))) if sigma.ndim == 1 else sigma.double()
        count = count + mask.sum(0)
        first = first + (mask * y).sum(0)
        second = second + (mask * (y**2 - level**2)).sum(0)
    seen = count > 0
    rows_per_entry = count.numel() / math.prod(data.image_shape)  # above 1 with several coils
    power = float((second[seen] / count[seen]).mean()) * rows_per_entry
    in_image_space = complete or data.operator_name != "mri"
    mean = float((first[seen] / count[seen]).mean()) if in_image_space else 0.0
    if not power > mean**2:
        raise InputError(
            "measurements: expected a variance above that of the noise, got one below it "
            f"(difference {power - mean**2:.3g}): the data hold no signal, or noise_std is too large"
        )
    return mean, math.sqrt(power - mean**2)


def fingerprint(data: Measurements) -> dict[str, Any]:
    """What identifies the data, of JSON types: checked when a run is resumed.

    ``content`` is of 8 samples; a file of the library's own adds the digest of all of them, which it carries
    (``file``).
    """
    some = data.measurements(torch.from_numpy(spread(len(data), 8))).cpu().contiguous()
    found = {
        "operator": data.operator_name,
        "image_shape": list(data.image_shape),
        "samples": len(data),
        "measurement_shape": list(some.shape[1:]),
        "noise_std": [float(data.noise_std.min()), float(data.noise_std.max())],
        "content": hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16],
    }
    prompts = data.prompts(spread(len(data), 8).tolist())
    if prompts is not None:
        parts = [t.cpu().numpy().tobytes() for t in vars(prompts).values() if t is not None]
        found["prompts"] = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    if data.checksum is not None:
        found["file"] = data.checksum
    return found
