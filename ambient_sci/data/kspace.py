r"""From a raw scan to measurements: whitening, oversampling, coil compression, scale, coil maps.

In this order, each step keeping the noise white:

1. whitening: y <- s L^{-1} y, Psi = L L^H the covariance of the coils' noise, s^2 = tr(Psi) / N, so that
every coil has
   complex noise variance s^2 and the units stay the scanner's; sigma = s / sqrt(2) per real channel;
2. readout oversampling: inverse transform along the readout, crop, transform back (orthonormal: noise stays
white); 3. coil compression: y <- V^H y with orthonormal columns V, the leading singular vectors of the data
over the coils; 4. scale: the 99.9th percentile of the zero-filled root-sum-of-squares volume becomes 1, and
is recorded; 5. coil maps: ESPIRiT (Uecker et al., 2014; sigpy) on the whitened, compressed calibration
region, normalised to
   sum_c |s_c|^2 = 1 on their support and zero elsewhere.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch

from ambient_sci.data.images import percentile_scale
from ambient_sci.data.noise_estimation import (
    WHITENED_SIGMA,
    estimate_kspace_noise,
    kspace_corners,
    noise_covariance,
    whiten,
    whitening_matrix,
)
from ambient_sci.data.raw import RawScan, centred_fft, crop_centre
from ambient_sci.errors import InputError
from ambient_sci.operators import normalise_maps
from ambient_sci.progress import track

#: ESPIRiT's calibration region: at most this many central samples a side are used, and at least so many are
#: needed.
MAX_CALIBRATION, MIN_CALIBRATION = 24, 8


@dataclass
class PreparedScan:
    """k-space (S, N, H, W) scaled, its mask (S, H, W), coil maps (S, N, H, W) of several coils, sigma and its
    standard error."""

    kspace: np.ndarray
    mask: np.ndarray
    coil_maps: np.ndarray | None
    noise_std: float
    noise_std_error: float | None
    scale: float
    slices: np.ndarray
    notes: list[str] = field(default_factory=list)


def prepare(
    scan: RawScan,
    *,
    noise_std: float | None = None,
    noise_scaled: bool = True,
    compress: int | None = None,
    remove_oversampling: bool = True,
) -> PreparedScan:
    """Whiten, crop, compress, scale and calibrate one scan.

    noise_std: per real channel, after scaling if ``noise_scaled``, else in the units of the scan; the coils are then
    taken for white and are not whitened. Without it, the noise scan decides, or else the corners of k-space.
    compress: number of virtual coils.

    Raises: InputError for NaN, a mask that contradicts the data, empty slices, or too small a calibration region.
    """
    kspace = scan.kspace.astype(np.complex64)
    if not np.isfinite(kspace).all():
        raise InputError(f"{scan.origin}: NaN or infinite values in k-space")
    mask = sampled(kspace, scan.mask, scan.origin)
    maps = None if scan.coil_maps is None else _stated_maps(scan)
    notes = list(scan.notes)
    kspace, maps, sigma, error = _whiten(scan, kspace, mask, maps, noise_std, notes)
    if remove_oversampling and scan.readout_size is not None:
        kspace, mask = _remove_oversampling(kspace, mask, scan.readout_size, notes)
    maps = None if maps is None else _fit_maps(maps, kspace, scan.origin)
    if compress is not None and compress < kspace.shape[1]:
        kspace, maps = _compress(kspace, maps, compress, notes)
    scale = percentile_scale(np.sqrt((np.abs(_image(kspace)) ** 2).sum(1)))
    kspace = kspace / np.float32(scale)
    kept = np.arange(len(kspace))
    if kspace.shape[1] > 1:
        maps, kept = _calibrate(kspace, mask, maps, scan.origin, notes)
    return PreparedScan(
        kspace[kept],
        mask[kept],
        None if kspace.shape[1] == 1 or maps is None else maps[kept],
        sigma if noise_std is not None and noise_scaled else sigma / scale,
        None if error is None else error / scale,
        scale,
        kept,
        notes,
    )


def combined_images(ready: PreparedScan) -> np.ndarray:
    """S^H F^H y of a prepared scan, (S, H, W) complex64, in its scaled units."""
    images = _image(ready.kspace)
    return images[:, 0] if ready.coil_maps is None else (ready.coil_maps.conj() * images).sum(1)


def _calibrate(
    kspace: np.ndarray, mask: np.ndarray, maps: np.ndarray | None, origin: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised coil maps (S, N, H, W), estimated if there are none, and the slices in which they are not empty."""
    if maps is None:
        maps = estimate_maps(kspace, mask, origin)
        notes.append("coil maps by ESPIRiT")
    maps = normalise_maps(torch.from_numpy(maps.astype(np.complex64))).numpy()
    kept = np.flatnonzero(np.abs(maps).reshape(len(maps), -1).any(axis=1))
    if len(kept) == 0:
        raise InputError(f"{origin}: the coil maps are zero everywhere")
    if len(kept) < len(kspace):
        message = f"{len(kspace) - len(kept)} slices without signal in any coil left out"
        warnings.warn(f"{origin}: {message}", stacklevel=2)
        notes.append(message)
    return maps, kept


def sampled(kspace: np.ndarray, stated: np.ndarray | None, origin: str) -> np.ndarray:
    """Where k-space (S, N, H, W) was measured, (S, H, W) bool: where the mask says so and some coil is not
    exactly zero.

    Raises: InputError when there are non-zero samples outside the stated mask, or a slice without any.
    """
    measured = np.asarray(kspace.any(axis=1))
    if stated is not None:
        stated = np.broadcast_to(stated, measured.shape).astype(bool)
        outside = int((measured & ~stated).sum())
        if outside:
            raise InputError(
                f"{origin}: the mask contradicts the data, {outside} samples outside it are not zero"
            )
    empty = np.flatnonzero(~measured.reshape(len(measured), -1).any(axis=1))
    if len(empty):
        raise InputError(f"{origin}: slice {int(empty[0])} of k-space is all zero")
    return measured


def _stated_maps(scan: RawScan) -> np.ndarray:
    """Coil maps that came with the scan, (S, N, H or cropped H, W) complex64."""
    maps = np.asarray(scan.coil_maps)
    maps = maps[None] if maps.ndim == 3 else maps
    slices, coils, _, width = scan.kspace.shape
    fits = maps.ndim == 4 and maps.shape[1] == coils and maps.shape[3] == width and len(maps) in (1, slices)
    if maps.dtype.kind != "c" or not fits:
        want = f"(1 or {slices}, {coils}, H, {width})"
        raise InputError(f"{scan.origin}: expected complex coil maps {want}, got {maps.dtype} {maps.shape}")
    if not np.isfinite(maps).all() or not maps.any():
        raise InputError(f"{scan.origin}: expected finite coil maps that are not all zero")
    return np.broadcast_to(maps, (slices, *maps.shape[1:])).astype(np.complex64)


def _fit_maps(maps: np.ndarray, kspace: np.ndarray, origin: str) -> np.ndarray:
    """Maps of the oversampled field of view cropped like the readout; maps of the cropped one as they are."""
    if maps.shape[2] < kspace.shape[2]:
        raise InputError(
            f"{origin}: expected coil maps of {kspace.shape[2]} readout samples, got {maps.shape[2]}"
        )
    return crop_centre(maps, axis=2, size=kspace.shape[2])


def _whiten(
    scan: RawScan,
    kspace: np.ndarray,
    mask: np.ndarray,
    maps: np.ndarray | None,
    noise_std: float | None,
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray | None, float, float | None]:
    """Whitened k-space and maps, sigma per real channel and its standard error (None when it was given)."""
    given = scan.noise_std if noise_std is None else noise_std
    if given is not None:
        notes.append("noise level given, coils taken for white")
        return kspace, maps, float(given), None
    data = torch.from_numpy(kspace)
    if kspace.shape[1] == 1 and scan.noise is None:
        sigma, error = estimate_kspace_noise(data, torch.from_numpy(mask))
        notes.append("noise level from the corners of k-space")
        return kspace, maps, sigma, error
    if scan.noise is not None:
        samples = torch.from_numpy(np.asarray(scan.noise, np.complex64))
        if samples.shape[0] != kspace.shape[1]:
            raise InputError(
                f"{scan.origin}: expected noise of {kspace.shape[1]} coils, got {tuple(samples.shape)}"
            )
        notes.append("coils whitened with the noise scan")
    else:
        samples = kspace_corners(data, torch.from_numpy(mask))
        notes.append("coils whitened with the corners of k-space")
    covariance = noise_covariance(samples)
    level = math.sqrt(float(covariance.diagonal().real.mean()))
    matrix = level * whitening_matrix(covariance)
    white = None if maps is None else whiten(torch.from_numpy(maps), matrix).numpy()
    # A variance from n complex samples of N coils has relative standard error 1 / sqrt(N n); a level half of
    # that.
    error = level * WHITENED_SIGMA / (2 * math.sqrt(samples.numel()))
    return whiten(data, matrix).numpy(), white, level * WHITENED_SIGMA, error


def _remove_oversampling(
    kspace: np.ndarray, mask: np.ndarray, size: int, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Crop the readout's field of view to ``size`` samples; only where every measured line is a full
    readout."""
    lines = mask.any(axis=1)
    if (mask != lines[:, None]).any():
        notes.append("readout oversampling kept: partial echo")
        return kspace, mask
    image = crop_centre(centred_fft(kspace, axis=-2, inverse=True), axis=-2, size=size)
    notes.append(f"readout oversampling removed, {kspace.shape[-2]} to {size} samples")
    return centred_fft(image, axis=-2), np.repeat(lines[:, None], size, axis=1)


def _compress(
    kspace: np.ndarray, maps: np.ndarray | None, coils: int, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Project onto the leading singular vectors over the coils."""
    if coils < 1:
        raise InputError(f"coil compression: expected at least 1 coil, got {coils}")
    samples = np.moveaxis(kspace, 1, 0).reshape(kspace.shape[1], -1)
    energy, vectors = np.linalg.eigh(samples @ samples.conj().T)
    basis = vectors[:, ::-1][:, :coils].conj().T
    kept = float(energy[::-1][:coils].sum() / energy.sum())
    notes.append(f"{kspace.shape[1]} coils compressed to {coils} ({100 * kept:.2f} % of the energy)")
    project = "cn,sn...->sc..."
    compressed = np.einsum(project, basis, kspace).astype(np.complex64)
    return compressed, None if maps is None else np.einsum(project, basis, maps).astype(np.complex64)


def _image(kspace: np.ndarray) -> np.ndarray:
    return centred_fft(centred_fft(kspace, axis=-1, inverse=True), axis=-2, inverse=True)


def calibration_width(mask: np.ndarray) -> int:
    """Side of the largest central square that is measured in every slice of (S, H, W)."""
    always = np.asarray(mask.all(axis=0))
    rows, columns = mask.shape[1:]
    width = 0
    for n in range(1, min(rows, columns) + 1):
        top, left = rows // 2 - n // 2, columns // 2 - n // 2
        if not always[top : top + n, left : left + n].all():
            break
        width = n
    return width


def estimate_maps(kspace: np.ndarray, mask: np.ndarray, origin: str = "coil maps") -> np.ndarray:
    """ESPIRiT maps (S, N, H, W), zero outside their support.

    Raises: InputError when fewer than ``MIN_CALIBRATION`` central samples a side are measured in every slice.
    """
    from sigpy.mri.app import EspiritCalib

    width = calibration_width(mask)
    if width < MIN_CALIBRATION:
        raise InputError(
            f"{origin}: expected a fully sampled centre of k-space of at least {MIN_CALIBRATION} samples a side for ESPIRiT, got "
            f"{width}; give coil maps instead"
        )
    width = min(width, MAX_CALIBRATION)
    kernel = 6 if width >= 12 else 4
    maps = np.zeros_like(kspace)
    for k in track(range(len(kspace)), f"coil maps of {origin}"):
        with np.errstate(invalid="ignore", divide="ignore"):
            # sigpy refers phases to the first coil, 0/0 where that coil is zero.
            found = EspiritCalib(kspace[k], calib_width=width, kernel_width=kernel, show_pbar=False).run()
        maps[k] = np.nan_to_num(found, nan=0.0)
    return maps
