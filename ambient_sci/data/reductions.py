r"""Smaller and fewer pixels, with noise that stays white: grey, crop, bin, size and patches, in this order.

White noise of level sigma becomes white noise of level f sigma, with

    grey    f = sqrt(sum_c w_c^2)      x = sum_c w_c x_c, channels with independent noise
    crop    f = 1
    bin k   f = 1/k                    means of k x k pixels that do not overlap
    size m  f = m/n                    means where m divides n, else the lowest m of n frequencies
    patch   f = 1                      (patches that overlap share their noise)

Any interpolation or anti-aliasing filter correlates neighbouring pixels and is not offered for noisy images.
Frequencies are those of the real Fourier basis at the centres of pixels, c = (j + 1/2)/n,

    1/sqrt(n),  sqrt(2/n) cos(2 pi k c),  sqrt(2/n) sin(2 pi k c),     k < m/2,   and sin(pi m c) for even m,

of which the matrix from n to m pixels takes each to its counterpart: its rows are orthonormal, so white noise
stays white exactly, and times sqrt(m/n) it keeps the mean. Edges wrap around: contrast between opposite edges
rings there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ambient_sci.errors import InputError

#: Weights of red, green and blue in grey (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Plan:
    """What a `Reduction` makes of images of one shape.

    Attributes:
        shape: (C, H, W) of each image that results.
        factor: noise level after, over the one before.
        zoom: pixels before, of one pixel after, along each axis.
        corners: (y, x) of each resulting image's upper left corner, in pixels before.
        dropped: fraction of the pixels before that are in no image.
        steps: what is done, in words.
    """

    shape: tuple[int, int, int]
    factor: float
    zoom: float
    corners: list[tuple[int, int]]
    dropped: float
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Reduction:
    """What is done to images before they are stored.

    Args:
        grey: colours (three channels) to grey, by `LUMA`.
        crop: (height, width) of the middle that is kept.
        bin: side of the blocks of pixels that are averaged, >= 2.
        size: side of square images after reduction, pixels.
        patch: side of the square patches that images are cut into.
        stride: pixels from one patch to the next; default ``patch``, no overlap.

    Raises:
        InputError: numbers that are no sizes, a stride without patches, ``size`` together with ``patch`` or
            ``bin``.
    """

    grey: bool = False
    crop: tuple[int, int] | None = None
    bin: int | None = None
    size: int | None = None
    patch: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("bin", 2), ("size", 1), ("patch", 1), ("stride", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}: expected at least {least} pixels, got {value}")
        if self.crop is not None and (len(self.crop) != 2 or min(self.crop) < 1):
            raise InputError(f"crop: expected a height and a width of at least 1 pixel, got {self.crop}")
        if self.stride is not None and self.patch is None:
            raise InputError("stride: expected a patch size with it, got none")
        if self.size is not None and (self.patch or self.bin):
            other = "patch" if self.patch else "bin"
            raise InputError(f"size: expected no {other} with it (reduce by bin, then cut patches), got both")

    def __bool__(self) -> bool:
        return self != Reduction()

    def plan(self, shape: Sequence[int], name: str = "image") -> Plan | None:
        """What is made of an image (C, H, W); None where it is smaller than a patch.

        Raises:
            InputError: an image that is too small for the crop, the bin or the size, or has no colours.
        """
        channels, height, width = (int(n) for n in shape)
        factor, zoom, steps = 1.0, 1.0, []
        if self.grey and channels == 3:
            channels, factor = 1, math.sqrt(sum(w * w for w in LUMA))
            steps.append(f"grey of {LUMA[0]:g} red, {LUMA[1]:g} green and {LUMA[2]:g} blue (BT.601)")
        elif self.grey and channels != 1:
            raise InputError(f"{name}: grey: expected 3 channels (colours) or 1, got {channels}")
        top, left, (high, wide), cropped = self._crop(height, width, name)
        steps += cropped
        if self.bin is not None:
            high, wide, binned = self._bin(high, wide, name)
            zoom, factor = float(self.bin), factor / self.bin
            steps += binned
        if self.size is not None and (high, wide) != (self.size, self.size):
            steps.append(self._size(high, wide, name))
            zoom, factor = high / self.size, factor * self.size / high
            high = wide = self.size
        side = self.patch
        kept = high * wide * zoom**2
        if side is None:
            corners = [(0, 0)]
        elif min(high, wide) < side:
            return None
        else:
            step = self.stride or side
            rows, columns = range(0, high - side + 1, step), range(0, wide - side + 1, step)
            corners = [(y, x) for y in rows for x in columns]
            kept = _covered(rows, side) * _covered(columns, side) * zoom**2
            every = f"every {step} pixels" if step != side else "side by side"
            steps.append(f"patches of {side} x {side} pixels, {every}")
            high = wide = side
        places = [(top + round(zoom * y), left + round(zoom * x)) for y, x in corners]
        return Plan((channels, high, wide), factor, zoom, places, 1 - kept / (height * width), tuple(steps))

    def _crop(self, height: int, width: int, name: str) -> tuple[int, int, tuple[int, int], list[str]]:
        if self.crop is None or self.crop == (height, width):
            return 0, 0, (height, width), []
        high, wide = self.crop
        if high > height or wide > width:
            raise InputError(f"{name}: crop: expected at most {height} x {width} pixels, got {high} x {wide}")
        return (
            (height - high) // 2,
            (width - wide) // 2,
            self.crop,
            [f"cropped to the middle {high} x {wide} pixels"],
        )

    def _bin(self, high: int, wide: int, name: str) -> tuple[int, int, list[str]]:
        k = int(self.bin or 1)
        if min(high, wide) < k:
            raise InputError(
                f"{name}: bin: expected at most {min(high, wide)}, got {k} for {high} x {wide} pixels"
            )
        return high // k, wide // k, [f"means of {k} x {k} pixels (noise level / {k})"]

    def _size(self, high: int, wide: int, name: str) -> str:
        size = int(self.size or 0)
        if high != wide:
            raise InputError(
                f"{name}: size: expected square images, got {high} x {wide}; noise cannot be padded: cut a "
                "square "
                f"out with --crop {min(high, wide)} {min(high, wide)}, or patches with --patch"
            )
        if size > high:
            raise InputError(
                f"{name}: size: expected at most {high} pixels, got {size}; enlarging correlates the noise"
            )
        way = "by means of blocks" if high % size == 0 else "to its lowest frequencies (edges wrap around)"
        return (
            f"reduced from {high} to {size} pixels {way}; noise stays white, its level is x {size / high:.4g}"
        )

    def apply(self, image: np.ndarray, number: int = 0) -> np.ndarray:
        """One of the images, float32 (C, h, w), that an image (C, H, W) becomes; its plan must exist."""
        return self.cut(self.reduced(image), number)

    def reduced(self, image: np.ndarray) -> np.ndarray:
        """An image after everything but the cutting into patches."""
        found = np.asarray(image, dtype=np.float64)
        if self.grey and len(found) == 3:
            found = np.tensordot(np.array(LUMA), found, axes=(0, 0))[None]
        top, left, (high, wide), _ = self._crop(*found.shape[1:], "image")
        found = found[:, top : top + high, left : left + wide]
        if self.bin is not None:
            found = _means(found, self.bin)
        if self.size is not None and found.shape[1:] != (self.size, self.size):
            whole = found.shape[1] % self.size == 0
            found = (
                _means(found, found.shape[1] // self.size) if whole else lowest_frequencies(found, self.size)
            )
        return found.astype(np.float32)

    def cut(self, reduced: np.ndarray, number: int) -> np.ndarray:
        """One patch of a reduced image."""
        if self.patch is None:
            return reduced
        step = self.stride or self.patch
        y, x = divmod(number, len(range(0, reduced.shape[2] - self.patch + 1, step)))
        return reduced[:, y * step : y * step + self.patch, x * step : x * step + self.patch]


def _covered(starts: range, side: int) -> int:
    """Pixels along an axis that lie in a patch."""
    return len(starts) * min(side, starts.step) + (side - min(side, starts.step))


def _means(image: np.ndarray, k: int) -> np.ndarray:
    """Means of blocks of k x k pixels; what fills no block is left out."""
    channels, high, wide = len(image), image.shape[1] // k, image.shape[2] // k
    blocks = image[:, : high * k, : wide * k].reshape(channels, high, k, wide, k)
    return blocks.mean(axis=(2, 4))


def fourier_matrix(size: int, old: int) -> np.ndarray:
    """The matrix (size, old) with orthonormal rows of the module's docstring, size <= old."""

    def basis(n: int) -> np.ndarray:
        centres = (np.arange(n) + 0.5) / n
        rows = [np.full(n, math.sqrt(1 / n))]
        for k in range(1, (size + 1) // 2):
            angle = 2 * math.pi * k * centres
            rows += [math.sqrt(2 / n) * np.cos(angle), math.sqrt(2 / n) * np.sin(angle)]
        if size % 2 == 0:
            last = np.sin(math.pi * size * centres)
            rows.append(last / np.linalg.norm(last))
        return np.stack(rows)

    return basis(size).T @ basis(old)


def lowest_frequencies(image: np.ndarray, size: int) -> np.ndarray:
    """(..., n, n) to (..., size, size), size <= n, by the lowest frequencies; the mean is kept."""
    old = image.shape[-1]
    matrix = fourier_matrix(size, old)
    return (size / old) * (matrix @ image @ matrix.T)
