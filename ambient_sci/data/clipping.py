"""Noise levels against what images can show: pixels at the ends of their type, levels beyond any range.

Noise that is cut off at 0 or at the largest value has lost a part of its variance and is not Gaussian, and an
estimate of its level is too small. A level above the whole range of the images is nearly always one in other
units.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ambient_sci.errors import InputError

#: Share of pixels at one end from which clipping is said.
SHARE = 0.01
#: A level this many times the range of clean images is refused; from one range on it is said.
IMPOSSIBLE = 3.0


class Ends:
    """Counts the pixels at the ends of their type, or of floating-point numbers at their extremes.

    Args:
        largest: the largest value that the type holds; 1 for types without ends.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self._seen: set[int] = set()
        self._total = 0
        self._low, self._high = (math.inf, 0), (-math.inf, 0)

    def look(self, number: int, values: np.ndarray) -> None:
        """Count the pixels of an image as stored; one that was counted before is not counted again."""
        if number in self._seen or values.size == 0 or values.dtype.kind == "c":
            return
        self._seen.add(number)
        self._total += values.size
        self._low = _count(values, self._low, float(values.min()), min)
        self._high = _count(values, self._high, float(values.max()), max)

    def text(self) -> str | None:
        """What to say about clipping, None where there is none."""
        low, high = self._low[0], self._high[0]
        if self._total == 0 or low >= high:
            return None
        found = []
        for value, count, kind in ((low, self._low[1], "smallest"), (high, self._high[1], "largest")):
            share = count / self._total
            if share > SHARE and self._is_end(value, kind):
                found.append(f"{100 * share:.2g} % of the pixels are at {value:g}, the {kind} value")
        if not found:
            return None
        return (
            " and ".join(found)
            + ": noise there is clipped; it is not Gaussian, and its level is underestimated"
        )

    def _is_end(self, value: float, kind: str) -> bool:
        """Of whole numbers only the type's ends count, and a camera's of 10, 12 and 14 bits."""
        if self.largest == 1:
            return True
        if kind == "smallest":
            return value == 0
        return value == self.largest or (self.largest == 65535 and value in (1023, 4095, 16383))


def _count(
    values: np.ndarray, before: tuple[float, int], own: float, best: Callable[[float, float], float]
) -> tuple[float, int]:
    """The least (or largest) value so far, and how many pixels have it."""
    value = best(before[0], own)
    return value, (before[1] if value == before[0] else 0) + int((values == value).sum())


def check_plausible(sigma: float, low: float, high: float, scale: float, *, clean: bool) -> str | None:
    """Compare a given noise level with images that reach from ``low`` to ``high``, all as stored.

    Args:
        sigma: the level.
        low, high: least and largest value of the images.
        scale: original units over stored ones; other than 1 where stored values are in [0, 1].
        clean: the images are without noise; otherwise their range includes it.

    Returns:
        what to warn of, or None.

    Raises:
        InputError: a level that cannot be meant.
    """
    span = max(high, 0.0) - min(low, 0.0)
    if span == 0 or sigma <= span:
        return None
    said = f"noise level {sigma:g}, but the images reach from {low:.4g} to {high:.4g}"
    if scale != 1 and sigma <= span * scale:
        said += f"; in original units it would be {sigma / scale:.4g}: --noise-units original"
    limit = IMPOSSIBLE * span if clean else max(span, 1.0) if scale != 1 else span
    if sigma > limit:
        raise InputError(f"noise level: expected one within the range of the images, got {said}")
    return (
        f"{said}: {'they disappear in the noise' if clean else 'with noise in them they would reach further'}"
    )
