r"""The noise level of data that do not state it, and the whitening of coils.

Images. White noise of level sigma stays white noise of level sigma under any unit-norm filter, while a
diagonal detail filter h h^T (h the high-pass of a wavelet) removes what is smooth, straight along an axis, or
rare:

    sigma = median |h h^T * y| / 0.6745                                                    (Donoho &
    Johnstone, 1994)

The filter is applied at every pixel (not decimated) where it fits inside the image. Texture at the finest
scale adds to the estimate: on smooth images it is right to its standard error, on textured ones it is an
upper bound (64-px heads with sigma = .05 of the largest intensity: about 6 % too high).

k-space. Signal falls off with frequency; the corners of k-space are noise, sigma = median |Re, Im| / 0.6745
there. What signal is left in the corners makes this an upper bound, too.

Whitening. With Psi = (1/n) sum_j eta_j eta_j^H the covariance of n noise readouts (the 1/n matters: without
it whitened data have variance 1/n) and Psi = L L^H, the coils L^{-1} y have complex variance 1: sigma =
1/sqrt(2) per real channel.

The noise of magnitude images is Rician, not Gaussian: no estimate here is right where signal and noise are
alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ambient_sci.errors import InputError

#: median of |N(0, 1)|
MEDIAN_NORMAL = 0.6744897501960817
#: noise level per real channel of data whitened to complex variance 1
WHITENED_SIGMA = 1 / math.sqrt(2)
#: Relative radii outside which k-space counts as a corner, the preferred one first.
CORNER_RADII = (1.3, 1.2, 1.1, 1.0)
_GROUPS = 16


class NoiseEstimate(NamedTuple):
    """Noise level per real channel and the standard error of the estimate (jackknife; it does not see a bias
    by texture)."""

    sigma: float
    standard_error: float


def _median_level(values: np.ndarray) -> float:
    values = np.abs(values[values != 0])
    return float(np.median(values)) / MEDIAN_NORMAL if values.size else 0.0


def _jackknife(groups: list[np.ndarray]) -> NoiseEstimate:
    """The level of all values together, with a standard error from leaving out one group at a time."""
    groups = [g for g in groups if np.any(g != 0)]
    if not groups:
        return NoiseEstimate(0.0, 0.0)
    sigma = _median_level(np.concatenate(groups))
    count = len(groups)
    if count < 4:  # too few groups to tell: the error of the median of so many independent normal values
        return NoiseEstimate(sigma, 1.166 * sigma / math.sqrt(sum(int((g != 0).sum()) for g in groups)))
    left_out = [_median_level(np.concatenate(groups[:k] + groups[k + 1 :])) for k in range(count)]
    return NoiseEstimate(sigma, math.sqrt((count - 1) * float(np.var(left_out))))


def estimate_noise(images: Tensor) -> NoiseEstimate:
    """Noise level common to images (B, C, H, W), per real channel, from their diagonal details.

    Padding does not count: neither do places where the filter meets pixels that are exactly 0, nor details
    that are exactly 0. Constant images give 0.

    Raises: InputError for images under 4 pixels, or with NaN or infinities.
    """
    import pywt

    height, width = images.shape[-2:]
    if min(height, width) < 4:
        raise InputError(f"noise level: expected images of at least 4 x 4 pixels, got {height} x {width}")
    if not torch.isfinite(images).all():
        raise InputError("noise level: NaN or infinite values")
    wavelet = pywt.Wavelet("sym4" if min(height, width) >= 16 else "haar")
    high_pass = torch.tensor(wavelet.dec_hi, dtype=torch.float64)
    flat = images.double().reshape(-1, 1, height, width)
    detail = torch.nn.functional.conv2d(flat, torch.outer(high_pass, high_pass)[None, None])
    # Differences of equal numbers leave rounding errors, not zeros.
    detail[detail.abs() < 1e-9 * images.abs().max()] = 0
    padding = torch.nn.functional.max_pool2d(flat.eq(0).double(), len(high_pass), stride=1) > 0
    if not padding.all():
        detail[padding] = 0
    if len(detail) >= _GROUPS:
        groups = [part.numpy().ravel() for part in detail.tensor_split(_GROUPS)]
    else:
        tiles = [tile for band in detail.tensor_split(4, dim=2) for tile in band.tensor_split(4, dim=3)]
        groups = [tile.numpy().ravel() for tile in tiles]
    return _jackknife(groups)


def kspace_corners(kspace: Tensor, mask: Tensor | None = None) -> Tensor:
    """Samples in the corners of centred k-space (B, N, H, W), as coil vectors (N, n).

    Corners lie outside an ellipse of relative radius 1.3 (2 % of k-space); of 1.2, 1.1 or 1, which touches
    the middle of the edges (21 %), if there are fewer than 1000 samples. ``mask``: (1 or B, H, W) of 0/1,
    only measured samples are taken. Samples that are zero in every coil (not acquired) are left out.

    Raises: InputError when fewer than 64 samples a coil remain.
    """
    height, width = kspace.shape[-2:]
    v = (torch.arange(height, dtype=torch.float64) - height // 2) / max(height / 2, 1)
    u = (torch.arange(width, dtype=torch.float64) - width // 2) / max(width / 2, 1)
    measured = kspace.ne(0).any(1)
    if mask is not None:
        measured = measured & mask.bool()
    square = v[:, None] ** 2 + u[None] ** 2
    for radius in CORNER_RADII:
        chosen = measured & (square > radius**2)
        if int(chosen.sum()) >= 1000:
            break
    values = kspace.movedim(1, 0)[:, chosen]
    if values.shape[1] < 64:
        raise InputError(
            "noise level: expected at least 64 measured samples in the k-space corners, got "
            f"{values.shape[1]}; "
            "give the noise level or a noise scan"
        )
    return values


def estimate_kspace_noise(kspace: Tensor, mask: Tensor | None = None) -> NoiseEstimate:
    """Noise level per real channel common to complex k-space (B, N, H, W), coils white and alike, from its
    corners.

    Raises: InputError as :func:`kspace_corners`.
    """
    corners = torch.view_as_real(kspace_corners(kspace, mask).resolve_conj()).double()
    return _jackknife([part.numpy().ravel() for part in corners.tensor_split(_GROUPS, dim=1)])


def noise_covariance(noise: Tensor) -> Tensor:
    """Psi = (1/n) sum_j eta_j eta_j^H, complex (N, N), of noise readouts (N, ...) of N coils.

    Raises: InputError with fewer than 4 N readouts, too few for a covariance.
    """
    samples = noise.reshape(len(noise), -1).to(torch.complex128)
    coils, count = samples.shape
    if count < 4 * coils:
        raise InputError(f"noise scan: expected at least {4 * coils} samples for {coils} coils, got {count}")
    return samples @ samples.mH / count


def whitening_matrix(covariance: Tensor) -> Tensor:
    """L^{-1} with Psi = L L^H, complex128 (N, N).

    Raises: InputError when Psi is not positive definite (a dead coil, or one coil that copies another).
    """
    covariance = covariance.to(torch.complex128)
    levels = torch.linalg.eigvalsh(covariance)
    if not torch.isfinite(levels).all() or levels[0] <= 1e-10 * levels[-1]:
        raise InputError(
            "noise covariance: expected one that is positive definite, got eigenvalues "
            f"{float(levels[0]):.3g} to {float(levels[-1]):.3g}; a coil is dead or copies another"
        )
    lower = torch.linalg.cholesky(covariance)
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)


def whiten(kspace: Tensor, matrix: Tensor) -> Tensor:
    """Apply a whitening matrix (N, N) over the coils of (B, N, ...) k-space, or of coil maps; complex64."""
    return torch.einsum("mn,bn...->bm...", matrix, kspace.to(matrix.dtype)).to(torch.complex64)
