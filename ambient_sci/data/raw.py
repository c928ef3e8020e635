"""Raw MR scans in memory: what the readers of fastMRI, ISMRMRD, BART and npz files return, and the transforms
they share.

A ``RawScan`` is Cartesian k-space (S, N, H, W) of S slices and N coils, zero frequency at index n // 2, H the
readout; where it was sampled; and whatever else the file says (noise readouts, oversampling, geometry). Scans
with a second phase-encoding direction are transformed along the readout, which makes slices of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ambient_sci.errors import InputError


@dataclass
class Part:
    """Consecutive slices of a scan that are one volume: a contrast, a repetition, a slab."""

    first: int
    numbers: np.ndarray
    count: int
    #: array indices (H, W, number) of the whole k-space matrix to RAS millimetres; None: the file does not
    #: say
    affine: np.ndarray | None = None
    #: False when the affine has voxel sizes only
    positioned: bool = True
    name: str = ""


@dataclass
class RawScan:
    """One acquisition. ``noise``: noise readouts (N, n). ``noise_std``: per real channel, in the units of
    ``kspace``."""

    kspace: np.ndarray
    subject: str
    origin: str
    mask: np.ndarray | None = None
    noise: np.ndarray | None = None
    noise_std: float | None = None
    coil_maps: np.ndarray | None = None
    #: samples of the readout that remain when its oversampling is removed; None: there is none
    readout_size: int | None = None
    #: the readout became the slices (3-D scans)
    sliced_readout: bool = False
    parts: list[Part] = field(default_factory=list)
    #: acquisitions that were averaged; ``noise`` is that of their mean
    averages: int = 1
    notes: list[str] = field(default_factory=list)

    def volumes(self) -> list[Part]:
        """The parts; the whole scan when the file does not divide it."""
        return self.parts or [Part(0, np.arange(len(self.kspace)), len(self.kspace))]


def centred_fft(array: np.ndarray, axis: int, inverse: bool = False) -> np.ndarray:
    """Centred orthonormal Fourier transform along one axis, complex64."""
    import scipy.fft

    transform = scipy.fft.ifft if inverse else scipy.fft.fft
    moved = scipy.fft.ifftshift(array, axes=axis)
    return scipy.fft.fftshift(transform(moved, axis=axis, norm="ortho"), axes=axis).astype(np.complex64)


def crop_centre(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The central ``size`` entries of an axis, the centre (index n // 2) kept at index size // 2."""
    start = array.shape[axis] // 2 - size // 2
    return np.take(array, np.arange(start, start + size), axis=axis)


def slices_along_readout(scan: RawScan, kspace: np.ndarray, mask: np.ndarray) -> RawScan:
    """3-D k-space (V, N, X, Y, Z) with full readouts as V X slices (Y, Z): the transform along X is a unitary
    sum of its own.

    mask: (V, X, Y, Z). The parts of ``scan`` are those of the V volumes, with affines over (x, y, z).

    Raises: InputError for readouts that are not full.
    """
    lines = mask.any(axis=1)
    if (mask != lines[:, None]).any():
        raise InputError(f"{scan.origin}: expected full readouts in a 3-D scan, got a partial echo")
    hybrid = centred_fft(kspace, axis=2, inverse=True)
    num, readout = len(hybrid), hybrid.shape[2]
    scan.kspace = np.ascontiguousarray(
        np.moveaxis(hybrid, 2, 1).reshape(-1, hybrid.shape[1], *hybrid.shape[3:])
    )
    scan.mask = np.repeat(lines, readout, axis=0)
    order = np.eye(4)[:, [1, 2, 0, 3]]  # indices (y, z, x) to (x, y, z)
    parts = scan.parts or [Part(v, np.zeros(1, np.int64), 1) for v in range(num)]
    scan.parts = [
        Part(
            v * readout,
            np.arange(readout),
            readout,
            None if p.affine is None else p.affine @ order,
            p.positioned,
            p.name,
        )
        for v, p in enumerate(parts)
    ]
    scan.sliced_readout = True
    scan.notes.append("3-D scan cut into slices along the readout")
    return scan
