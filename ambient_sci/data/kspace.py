r"""From a raw scan to measurements: whitening, oversampling, padding, coil compression, scale, coil maps.

In this order, each step keeping the noise white:

1. whitening: y <- s L^{-1} y, Psi = L L^H the covariance of the coils' noise, s^2 = tr(Psi) / N, so that
   every coil has complex noise variance s^2 and the units stay the scanner's; sigma = s / sqrt(2) per real
   channel;
2. readout oversampling: inverse transform along the readout, crop, transform back (orthonormal: noise stays
   white);
3. zero padding: outer lines of k-space that were never measured around a fully sampled matrix are cut off.
   The field of view stays;
4. coil compression: y <- V^H y with orthonormal columns V, the leading singular vectors of the data over the
   coils;
5. scale: the 99.9th percentile of the zero-filled root-sum-of-squares volume becomes 1, and is recorded;
6. coil maps: ESPIRiT (Uecker et al., 2014; sigpy) on the whitened, compressed calibration region, normalised
   to sum_c |s_c|^2 = 1 on their support and zero elsewhere.

Cropping moves pixels: ``grid`` takes array indices of what comes out to those of the k-space matrix that went
in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ambient_sci.data.geometry import resampling, translation
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
from ambient_sci.data.readers.guard import say
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
    #: which slices of the scan these are
    slices: np.ndarray
    notes: list[str] = field(default_factory=list)
    #: indices (h, w, s) of these arrays to those of the scan's matrix, (4, 4)
    grid: np.ndarray = field(default_factory=lambda: np.eye(4))


def prepare(
    scan: RawScan,
    *,
    noise_std: float | None = None,
    noise_scaled: bool = True,
    compress: int | None = None,
    remove_oversampling: bool = True,
    padding: int | None = 0,
) -> PreparedScan:
    """Whiten, crop, compress, scale and calibrate one scan.

    Args:
        scan: what a reader returned.
        noise_std: per real channel, after scaling if ``noise_scaled``, else in the units of the scan; the
            coils are then taken for white and are not whitened. Without it, the noise scan decides, or else
            the corners of k-space.
        noise_scaled: see ``noise_std``.
        compress: number of virtual coils.
        remove_oversampling: crop the readout to its field of view.
        padding: lines of zero padding cut off on each side at most; None: all.

    Raises:
        InputError: NaN, a mask that contradicts the data, nothing measured, or too small a calibration
            region.
    """
    notes = list(scan.notes)
    kspace = scan.kspace.astype(np.complex64)
    if not np.isfinite(kspace).all():
        raise InputError(f"{scan.origin}: NaN or infinite values in k-space")
    mask = sampled(kspace, scan.mask, scan.origin)
    maps = None if scan.coil_maps is None else _stated_maps(scan)
    kspace, mask, maps, kept = _with_signal(scan, kspace, mask, maps, notes)
    kspace, maps, sigma, error = _whiten(scan, kspace, mask, maps, noise_std, notes)
    grid = np.eye(4)
    if remove_oversampling and scan.readout_size is not None and not scan.sliced_readout:
        kspace, mask, grid = _remove_oversampling(kspace, mask, scan.readout_size, notes)
    if maps is None:
        kspace, mask, padded = _remove_padding(kspace, mask, padding, notes)
        grid = grid @ padded
    else:
        maps = _fit_maps(maps, kspace, scan.origin)
    if compress is not None and compress < kspace.shape[1]:
        kspace, maps = _compress(kspace, maps, compress, notes)
    scale = percentile_scale(np.sqrt((np.abs(_image(kspace)) ** 2).sum(1)))
    kspace = kspace / np.float32(scale)
    seen = np.arange(len(kspace))
    if kspace.shape[1] > 1:
        maps, seen = _calibrate(kspace, mask, maps, scan.origin, notes)
    return PreparedScan(
        kspace[seen],
        mask[seen],
        None if kspace.shape[1] == 1 or maps is None else maps[seen],
        sigma if noise_std is not None and noise_scaled else sigma / scale,
        None if error is None else error / scale,
        scale,
        kept[seen],
        notes,
        grid,
    )


def crop_slices(scan: RawScan) -> RawScan:
    """A scan that was cut into slices along an oversampled readout, without the slices outside the field of
    view."""
    size = scan.readout_size
    if not scan.sliced_readout or size is None:
        return scan
    readout = scan.parts[0].count
    start = readout // 2 - size // 2
    kept = np.concatenate([p.first + np.arange(start, start + size) for p in scan.parts])
    parts = [
        replace(
            p,
            first=n * size,
            numbers=np.arange(size),
            count=size,
            affine=None if p.affine is None else p.affine @ translation(k=start),
        )
        for n, p in enumerate(scan.parts)
    ]
    notes = [*scan.notes, f"readout oversampling removed, {readout} to {size} slices"]
    mask = None if scan.mask is None else scan.mask[kept]
    return replace(scan, kspace=scan.kspace[kept], mask=mask, parts=parts, notes=notes, readout_size=None)


def combined_images(ready: PreparedScan) -> np.ndarray:
    """S^H F^H y of a prepared scan, (S, H, W) complex64, in its scaled units."""
    images = _image(ready.kspace)
    return images[:, 0] if ready.coil_maps is None else (ready.coil_maps.conj() * images).sum(1)


def _calibrate(
    kspace: np.ndarray, mask: np.ndarray, maps: np.ndarray | None, origin: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised coil maps (S, N, H, W), estimated if there are none, and the slices in which they are not
    empty."""
    if maps is None:
        maps = estimate_maps(kspace, mask, origin)
        notes.append("coil maps by ESPIRiT")
    maps = normalise_maps(torch.from_numpy(maps.astype(np.complex64))).numpy()
    kept = np.flatnonzero(np.abs(maps).reshape(len(maps), -1).any(axis=1))
    if len(kept) == 0:
        raise InputError(f"{origin}: the coil maps are zero everywhere")
    if len(kept) < len(kspace):
        say(notes, origin, f"{len(kspace) - len(kept)} slices without signal in any coil left out")
    return maps, kept


def sampled(kspace: np.ndarray, stated: np.ndarray | None, origin: str) -> np.ndarray:
    """Where k-space (S, N, H, W) was measured, (S, H, W) bool: where the mask says so and some coil is not
    exactly zero.

    Raises: InputError when there are non-zero samples outside the stated mask.
    """
    measured = np.asarray(kspace.any(axis=1))
    if stated is not None:
        stated = np.broadcast_to(stated, measured.shape).astype(bool)
        outside = int((measured & ~stated).sum())
        if outside:
            raise InputError(
                f"{origin}: the mask contradicts the data, {outside} samples outside it are not zero"
            )
    return measured


def _with_signal(
    scan: RawScan, kspace: np.ndarray, mask: np.ndarray, maps: np.ndarray | None, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """k-space, mask and maps without the slices that are zero in every coil, and the numbers of those that
    stay."""
    kept = np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1))
    if len(kept) == 0:
        raise InputError(f"{scan.origin}: k-space is all zero")
    if len(kept) == len(kspace):
        return kspace, mask, maps, kept
    empty = np.setdiff1d(np.arange(len(kspace)), kept)
    say(
        notes,
        scan.origin,
        f"slices {', '.join(map(str, empty[:8]))} of k-space are all zero and are left out",
    )
    return kspace[kept], mask[kept], None if maps is None else maps[kept], kept


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop the readout's field of view to ``size`` samples; only where every measured line is a full
    readout."""
    lines = mask.any(axis=1)
    if (mask != lines[:, None]).any():
        notes.append("readout oversampling kept: partial echo")
        return kspace, mask, np.eye(4)
    readout = kspace.shape[-2]
    image = crop_centre(centred_fft(kspace, axis=-2, inverse=True), axis=-2, size=size)
    notes.append(f"readout oversampling removed, {readout} to {size} samples")
    grid = translation(i=readout // 2 - size // 2)
    return centred_fft(image, axis=-2), np.repeat(lines[:, None], size, axis=1), grid


def _remove_padding(
    kspace: np.ndarray, mask: np.ndarray, most: int | None, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut off outer lines that were never measured around a matrix that is fully sampled, the centre n // 2
    kept."""
    grid = np.eye(4)
    rows, columns = (np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    inner = mask[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if not inner.all():
        return kspace, mask, grid
    for axis, name, filled in ((1, "rows", rows), (2, "columns", columns)):
        old = mask.shape[axis]
        size = _unpadded(old, int(filled[0]), int(filled[-1]), most)
        if size == old:
            continue
        kspace, mask = crop_centre(kspace, axis + 1, size), crop_centre(mask, axis, size)
        grid = grid @ resampling(axis - 1, old, size)
        notes.append(f"zero padding of k-space cut off, {old} to {size} {name}")
    return kspace, mask, grid


def _unpadded(old: int, first: int, last: int, most: int | None) -> int:
    """The smallest size about the centre that holds lines first to last, at most ``most`` fewer on each side.
    Even sizes stay even."""
    for size in range(2 - old % 2, old, 2):
        start = old // 2 - size // 2
        if start <= first and start + size > last and (most is None or start <= most):
            return size
    return old


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
            f"{origin}: expected a fully sampled centre of k-space of at least {MIN_CALIBRATION} samples a "
            f"side for ESPIRiT, got {width}; give coil maps instead"
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
