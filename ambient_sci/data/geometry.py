"""Where slices lie: places along a stack, affines in RAS millimetres, and what cropping does to them.

An affine takes array indices (i, j, k) to millimetres towards right, anterior and superior. Positions of
slices come from the data; a stack is one volume only when all of them lie where origin + number * step says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ambient_sci.errors import InputError

#: LPS, in which DICOM and ISMRMRD count, to RAS.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Places:
    """Slices of one stack: the number of each, how many places there are, and position = origin + number *
    step."""

    numbers: np.ndarray
    count: int
    origin: np.ndarray
    step: np.ndarray
    #: largest distance (mm) between a stated position and the one that follows from origin and step
    rounding: float

    @property
    def missing(self) -> int:
        """Places without a slice."""
        return self.count - len(self.numbers)


def places(positions: np.ndarray, normal: np.ndarray, thickness: float) -> Places:
    """Number the slices of a stack by their positions (S, 3), along the normal; against it when they come in
    that order.

    Gaps that are multiples of the smallest one are places without a slice.

    Raises: InputError for several slices at one position, or gaps that are not multiples (within 1 %).
    """
    positions = np.asarray(positions, dtype=np.float64)
    if not np.isfinite(positions).all():
        raise InputError("slice positions: NaN or infinite values")
    if len(positions) == 1:
        return Places(np.zeros(1, np.int64), 1, positions[0], normal * thickness, 0.0)
    height = positions @ normal
    if (np.diff(height) < 0).all():
        height = -height
    order = np.argsort(height, kind="stable")
    gaps = np.diff(height[order])
    if gaps.min() < 1e-3:
        raise InputError("several images at one position (echoes or time points?)")
    base = float(gaps.min())
    numbers = np.empty(len(positions), np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(np.rint(gaps / base).astype(np.int64))])
    count = int(numbers.max()) + 1
    first, last = positions[order[0]], positions[order[-1]]
    step = (last - first) / (count - 1)
    off = np.linalg.norm(positions - first - numbers[:, None] * step, axis=1).max()
    if off > 1e-3 + 0.01 * np.linalg.norm(step) or count > 10 * len(positions):
        raise InputError(f"slices at uneven distances, {gaps.min():.4g} to {gaps.max():.4g} mm")
    return Places(numbers, count, first, step, float(off))


def direction_cosines(row: Sequence[float], column: Sequence[float]) -> np.ndarray:
    """The unit vectors along both image axes and their normal, (3, 3) columns.

    Raises: InputError unless the two are unit vectors at right angles (within 1e-3), as every format demands.
    """
    pair = np.array([row, column], dtype=np.float64)
    if pair.shape != (2, 3) or not np.isfinite(pair).all() or np.abs(pair @ pair.T - np.eye(2)).max() > 1e-3:
        raise InputError(
            f"orientation: expected two unit vectors at right angles, got {np.round(pair, 4).tolist()}"
        )
    return np.column_stack([*pair, np.cross(*pair)])


def check_affine(affine: np.ndarray) -> np.ndarray:
    """The affine itself; InputError when it is not a finite, invertible (4, 4) matrix."""
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.abs(affine).max() > 1e6:
        raise InputError("affine: expected a finite (4, 4) matrix of millimetres")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError("affine: expected one that is invertible, got voxels of no volume")
    return affine


def translation(i: float = 0, j: float = 0, k: float = 0) -> np.ndarray:
    """New indices to old ones: old = new + (i, j, k)."""
    grid = np.eye(4)
    grid[:3, 3] = (i, j, k)
    return grid


def resampling(axis: int, old: int, new: int) -> np.ndarray:
    """New indices to old ones when an axis of a field of view has ``new`` pixels instead of ``old``, the
    centre n // 2 kept."""
    grid = np.eye(4)
    grid[axis, axis] = old / new
    grid[axis, 3] = old // 2 - (new // 2) * old / new
    return grid


def zooming(axis: int, first: float, zoom: float) -> np.ndarray:
    """New indices to old ones when a pixel along an axis is a block of ``zoom`` old ones, the first block
    beginning at ``first``: old = first + zoom new + (zoom - 1) / 2."""
    grid = np.eye(4)
    grid[axis, axis] = zoom
    grid[axis, 3] = first + (zoom - 1) / 2
    return grid


#: Largest size of a volume along an axis: what NIfTI-1 can say.
LARGEST_AXIS = 32_767


def check_geometry(geometry: object, num: int) -> None:
    """Raise InputError unless a geometry says of each of ``num`` images at most once where it lies.

    Args:
        geometry: what a file records: a table, its ``volumes`` each with name, affine (4, 4), shape of three
            sizes, axis of the slices, number of its first image, and numbers of its slices.
        num: images in the file.
    """
    if not isinstance(geometry, dict):
        raise InputError(f"geometry: expected a table, got {type(geometry).__name__}")
    volumes = geometry.get("volumes") or []
    if not isinstance(volumes, list):
        raise InputError(f"geometry: expected a list of volumes, got {type(volumes).__name__}")
    end = 0
    for number, volume in enumerate(volumes):
        try:
            first, slices = _checked_volume(volume)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"geometry: expected volumes with name, affine, shape, axis, first and slices, got another "
                f"one at {number} ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
            ) from None
        if first < end or first + slices > num:
            raise InputError(
                f"geometry: expected each of {num} images in one volume, got images {first} to "
                f"{first + slices - 1} in volume {number} after {end} before"
            )
        end = first + slices


def _checked_volume(volume: dict) -> tuple[int, int]:
    """Number of the first image of a volume, and how many it has; ValueError and its kin where it is none."""
    affine = np.asarray(volume["affine"], np.float64)
    shape, axis, slices = volume["shape"], volume["axis"], volume["slices"]
    numbers = [*shape, axis, volume["first"], *slices]
    if not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in numbers):
        raise ValueError("numbers that are not whole")
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"an affine of shape {affine.shape}, or not finite")
    if len(shape) != 3 or not all(1 <= n <= LARGEST_AXIS for n in shape) or axis not in (0, 1, 2):
        raise ValueError(f"shape {shape}, axis {axis}")
    if not slices or len(set(slices)) < len(slices) or not 0 <= min(slices) <= max(slices) < shape[axis]:
        raise ValueError(f"slices {slices[:4]} of {shape[axis]}, or one twice")
    if not isinstance(volume["name"], str) or volume["first"] < 0:
        raise ValueError(f"name {volume['name']!r}, first {volume['first']}")
    return int(volume["first"]), len(slices)
