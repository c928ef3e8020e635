"""Pictures out: PNG and TIFF, whole or not at all, with what was done to the numbers in words.

Numbers go out as they are where their type holds them: floating-point numbers in TIFF, grey levels (rounded,
and cut off at the ends of the type, which is counted) where the pictures came as whole numbers. Otherwise
they are spread over a window, black to white, which is said and stands in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.errors import InputError
from ambient_sci.whole_files import whole_file

_TYPES = {8: np.uint8, 16: np.uint16, 32: np.float32}
#: ImageJ's axes in their order; its files hold less than 4 GB.
_IMAGEJ, _IMAGEJ_BYTES = "TZCYX", 2 << 30


@dataclass
class Encoding:
    """How numbers become those of a file.

    Attributes:
        bits: 8 or 16 (whole numbers), or 32 (floating point, as they are).
        window: the values that become 0 and the largest number; None: numbers are rounded as they are.
    """

    bits: int
    window: tuple[float, float] | None = None
    _clipped: int = 0
    _total: int = 0

    @property
    def dtype(self) -> np.dtype:
        """The type on disk."""
        return np.dtype(_TYPES[self.bits])

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Numbers as they are stored; those beyond the ends are cut off and counted."""
        if self.bits == 32:
            return values.astype(np.float32)
        top, found = 2**self.bits - 1, values.astype(np.float64)
        if self.window is not None:
            low, high = self.window
            found = (found - low) * (top / (high - low))
        found = np.rint(found)
        self._total += found.size
        self._clipped += int(((found < 0) | (found > top)).sum())
        return np.clip(found, 0, top).astype(self.dtype)

    def text(self) -> str:
        """What was done to the numbers."""
        if self.bits == 32:
            return "floating-point numbers in original units"
        cut = self._clipped / max(self._total, 1)
        said = f"; {100 * cut:.2g} % of the pixels lie beyond and are cut off" if cut else ""
        if self.window is None:
            return f"{self.bits} bits, original grey levels{said}"
        low, high = self.window
        return f"{self.bits} bits, black is {low:.6g} and white {high:.6g} in original units{said}"


def full_window(values: Iterable[np.ndarray]) -> tuple[float, float]:
    """From the least value (0 where none is below) to the largest; never empty."""
    low, high = 0.0, -math.inf
    for block in values:
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    return low, high if high > low else low + 1.0


def write_png(path: Path, image: np.ndarray, encoding: Encoding, facts: Mapping[str, Any]) -> None:
    """One picture, (1 or 3, H, W), with ``facts`` as texts in the file.

    Raises:
        InputError: other channels, or colour of 16 bits, which no library at hand writes.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if len(image) not in (1, 3) or encoding.bits == 32:
        raise InputError(
            f"{path}: expected grey or colour of 8 or 16 bits for PNG; a .tif or .npy file holds others"
        )
    if len(image) == 3 and encoding.bits == 16:
        raise InputError(f"{path}: expected 8 bits for colour in PNG (--bits 8), or a .tif file, got 16 bits")
    stored = encoding.encode(image)
    texts = PngInfo()
    for name, value in {**facts, "encoding": encoding.text()}.items():
        texts.add_text(name, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("wb") as file:
        Image.fromarray(stored[0] if len(stored) == 1 else np.moveaxis(stored, 0, -1)).save(
            file, "PNG", pnginfo=texts
        )


@dataclass(frozen=True)
class Stack:
    """How pages lie in a TIFF.

    Attributes:
        axes, shape: what counts pages, e.g. "TZ" and (2, 3); their product is the number of pages.
        resolution: pixels per unit along x and y, if known.
        unit: of the resolution.
        spacing: between depths (axis Z), in the unit.
        labels: a name for each page.
    """

    axes: str
    shape: tuple[int, ...]
    resolution: tuple[float, float] | None = None
    unit: str = ""
    spacing: float | None = None
    labels: Sequence[str] = ()


def write_tiff(
    path: Path,
    pages: Iterable[np.ndarray],
    page_shape: Sequence[int],
    encoding: Encoding,
    stack: Stack,
    facts: Any,
) -> None:
    """A stack of pages (1, 3 or more channels, H, W), one in memory at a time.

    Grey pages of up to T, Z and C axes are an ImageJ hyperstack, which Fiji, napari and tifffile read with
    their axes; anything else has its axes in tifffile's own description.
    """
    import tifffile

    channels, height, width = page_shape
    colour = channels == 3
    shape: tuple[int, ...] = (*stack.shape, height, width)
    axes = stack.axes + "YX"
    if colour:
        shape, axes = (*stack.shape, height, width, 3), stack.axes + "YXS"
    elif channels > 1:
        shape, axes = (*stack.shape, channels, height, width), stack.axes + "CYX"

    def planes() -> Iterable[np.ndarray]:
        for page in pages:
            stored = encoding.encode(page)
            yield from ([np.moveaxis(stored, 0, -1)] if colour else stored)

    size = math.prod(shape) * encoding.dtype.itemsize
    imagej = not colour and len(set(axes)) == len(axes) and set(axes) <= set(_IMAGEJ) and size < _IMAGEJ_BYTES
    imagej = imagej and list(axes) == sorted(axes, key=_IMAGEJ.index)
    pages_stored = math.prod(stack.shape) * (1 if colour else channels)
    options = _descriptions(stack, axes, {**facts, "encoding": encoding.text()}, imagej, pages_stored)
    options["photometric"] = "rgb" if colour else "minisblack"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        with tifffile.TiffWriter(part, imagej=imagej, bigtiff=size >= _IMAGEJ_BYTES) as writer:
            writer.write(planes(), shape=shape, dtype=encoding.dtype, software="ambient_sci", **options)


def _descriptions(stack: Stack, axes: str, facts: dict[str, Any], imagej: bool, pages: int) -> dict[str, Any]:
    """Axes, units, labels and facts as tifffile takes them."""
    about: dict[str, Any] = {"axes": axes}
    if stack.unit:
        about["unit"] = stack.unit
    if stack.spacing is not None:
        about["spacing"] = stack.spacing
    if len(stack.labels) == pages:
        about["Labels"] = list(stack.labels)
    about |= {"Info": json.dumps(facts), "mode": "grayscale"} if imagej else facts
    options: dict[str, Any] = {"metadata": about}
    if stack.resolution is not None:
        unit = {"inch": 2, "cm": 3}.get(stack.unit, 1)
        options |= {"resolution": stack.resolution, "resolutionunit": unit}
    return options
