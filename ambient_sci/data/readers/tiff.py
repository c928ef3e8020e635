"""TIFF files: single pictures, stacks, ImageJ hyperstacks and OME-TIFF, one image at a time.

Every axis is used or refused by name. Y and X are the image and S its colours. C, the channels of a
microscope, needs to be told what they are (``channel``: one of them, all together, or each). Every other axis
(T, Z and what else there is) counts images of their own. Grey and colour of 8, 16 and 32 bits and
floating-point numbers are read as they are stored. Compressions that tifffile cannot undo by itself are left
to Pillow, where that is exact. Of an OME data set in several files each file is read for itself.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.data.readers.guard import check_claim, listed, one_line, reading
from ambient_sci.data.readers.tiff_about import about_of, channel_names, pixels, tag
from ambient_sci.errors import InputError

#: Axes of one image; every other one counts images.
_IMAGE, _CHANNEL = "YXS", "C"
_NAMES = {
    "T": "time points",
    "Z": "depths",
    "P": "positions",
    "R": "tiles",
    "I": "pages",
    "Q": "pages",
    "C": "channels",
}
#: More channels than this are taken for another axis.
_MOST_CHANNELS = 16
#: Marks of TIFF pages that are no images of their own: reduced copies (1) and transparency masks (4).
_SIDE = 0b101
_LOSSY = ("JPEG", "OJPEG", "ALT_JPEG", "WEBP", "JPEGXR", "JPEGXR_NDPI")


@dataclass(frozen=True)
class Plane:
    """One image of a file: its number there, a name, (C, H, W), and how to get at it."""

    page: int
    label: str
    shape: tuple[int, int, int]
    load: Callable[[], np.ndarray]
    #: largest value of its type; 1 for numbers that are taken as they are
    largest: float
    lossy: bool
    channel: int = 0


class Tiff:
    """An open TIFF file.

    Args:
        source: a path, or the bytes of the file.
        name: what messages call it.
        channel: which of several channels (axis C) to take, "together" for all as channels of one image,
            "each" for images of their own; None refuses several.
        pillow: reads one page (number) of what tifffile cannot, to (C, H, W).

    Attributes:
        planes: the images.
        notes: what was left out, and which axis counts what.
        about: "axes", "shape", "dtype", and "resolution" (pixels per unit along x and y), "unit", "spacing"
            where the file says so.

    Raises:
        InputError: damaged files, and what cannot be read exactly.
    """

    def __init__(
        self,
        source: Path | bytes,
        name: str,
        channel: int | str | None,
        pillow: Callable[[int], np.ndarray],
    ):
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        self.name, self.channel, self._pillow = name, channel, pillow
        self.notes: list[str] = []
        self._whole: dict[int, np.ndarray] = {}
        stored = len(source) if isinstance(source, bytes) else source.stat().st_size
        self._stored = stored
        with reading(name, "picture"):
            opened = io.BytesIO(source) if isinstance(source, bytes) else source
            self._file = tifffile.TiffFile(opened, _multifile=False)
            try:
                if len(self._file.pages) > 1 << 16:
                    raise InputError(f"{name}: {len(self._file.pages)} pages")
                self.planes = self._find()
                self._check_imagej()
                self.about = about_of(self._file)
            except BaseException:
                self._file.close()
                raise
        colours = {p.shape[0] for p in self.planes if self.channel is None and p.shape[0] > 1}
        self.notes += [f"{n} colours (axis S) as channels of one image" for n in sorted(colours)]
        if not self.planes:
            raise InputError(f"{name}: no image in it")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, number: int) -> np.ndarray:
        """One image, (C, H, W), as stored. InputError when it is damaged."""
        with reading(self.name, "picture"):
            return self.planes[number].load()

    # -- which images there are

    def _find(self) -> list[Plane]:
        kinds = {s.kind for s in self._file.series}
        if kinds <= {"uniform", "generic"}:
            return self._pages()
        planes: list[Plane] = []
        for number, series in enumerate(self._file.series):
            planes += self._of_series(number, series, len(planes))
        return planes

    def _pages(self) -> list[Plane]:
        """A file without any description of its axes: its pages, in their order."""
        pages = [self._file.pages[k] for k in range(len(self._file.pages))]
        sides = [k for k, p in enumerate(pages) if tag(p, 254, 0) & _SIDE]
        if sides:
            self.notes.append(f"{len(sides)} of {len(pages)} pages are thumbnails or masks and are left out")
        found = [
            Plane(k, f"page {k}", self._shape(p.axes, p.shape, p), self._of_page(k, p), *_kind(p))
            for k, p in enumerate(pages)
            if k not in sides
        ]
        strange = [p for p in pages if set(p.axes) - set(_IMAGE) or not set("YX") <= set(p.axes)]
        if strange:
            raise InputError(
                f"{self.name}: expected pages of axes Y and X, got {strange[0].axes} {strange[0].shape}"
            )
        if len(found) > 1:
            self.notes.append(f"{len(found)} pages as images of their own")
        if self._file.is_ome:
            self._check_spread()
        return found

    def _check_spread(self) -> None:
        """Of an OME data set in several files the pages of this one are read, whatever axes they lie "
        "along."""
        sizes = {a: int(n) for a, n in re.findall(r'\bSize([TCZ])="(\d+)"', pixels(self._file))}
        several = ", ".join(f"{a} of {n}" for a, n in sizes.items() if n > 1)
        samples = re.findall(r'\bSamplesPerPixel="(\d+)"', self._file.ome_metadata or "")
        if sizes.get("C", 1) > sum(map(int, samples[:1])) and self.channel != "each":
            raise InputError(
                f"{self.name}: part of an OME data set in several files with axes {several}; expected the "
                "files of "
                "one channel, with --channel each"
            )
        self.notes.append(f"part of an OME data set in several files; axes {several} are not told apart")

    def _of_page(self, number: int, page: Any) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            check_claim(
                self.name, page.shape, page.dtype.itemsize if page.dtype else 1, self._stored, "pixels"
            )
            array = self._decoded(page)
            return array if array is not None else self._pillow(number)

        return load

    def _of_series(self, number: int, series: Any, before: int) -> list[Plane]:
        """The images of one series of a file that describes its axes."""
        axes, shape = series.axes, series.shape
        if "Y" not in axes or "X" not in axes:
            raise InputError(f"{self.name}: expected axes Y and X, got {axes} {shape}")
        check_claim(self.name, shape, series.dtype.itemsize, self._stored, "pixels")
        if len(series.levels) > 1:
            self.notes.append(f"{len(series.levels) - 1} copies of lower resolution are left out")
        each = self.channel == "each"
        counting = [a for a in axes if a not in _IMAGE and (each or a != _CHANNEL)]
        sizes = [shape[axes.index(a)] for a in counting]
        self._say_axes(counting, sizes)
        channels = [None] if each else self._channels(series)
        pages = list(series.pages)
        planes = []
        for k, index in enumerate(itertools.product(*map(range, sizes))):
            at = dict(zip(counting, index, strict=True))
            indices = [at if c is None else {**at, _CHANNEL: c} for c in channels]
            if any(self._page_of(series, pages, i) is None for i in indices):
                raise InputError(f"{self.name}: the image at {at} is missing in the file")
            label = ", ".join(f"{a} = {i}" for a, i in at.items()) or f"page {before + k}"
            one = self._shape(axes, shape, series.keyframe)
            size = (one[0] * len(channels), *one[1:])
            load = self._of_indices(number, series, pages, indices)
            kind = _kind(series.keyframe)
            planes.append(Plane(before + k, label, size, load, *kind, at.get(_CHANNEL, 0)))
        return planes

    def _say_axes(self, counting: list[str], sizes: list[int]) -> None:
        several = [(a, n) for a, n in zip(counting, sizes, strict=True) if n > 1]
        if several:
            words = " x ".join(f"{n} {_NAMES.get(a, 'places')} (axis {a})" for a, n in several)
            self.notes.append(f"{math.prod(n for _, n in several)} images of their own: {words}")

    def _channels(self, series: Any) -> list[int]:
        """Which channels an image has; InputError while nobody has said what several are."""
        axes, count = series.axes, 1
        if _CHANNEL in axes:
            count = series.shape[axes.index(_CHANNEL)]
        if count == 1:
            return [0]
        names = channel_names(self._file)
        what = f"{count} channels (axis C{': ' + listed(names, 6) if names else ''})"
        one = f"--channel 0 to {count - 1} for one of them"
        if self.channel == "together":
            if "S" in axes or count > _MOST_CHANNELS:
                colours = " of colours (axis S)" * ("S" in axes)
                raise InputError(
                    f"{self.name}: {what}{colours} cannot be channels of one image; expected {one}"
                )
            self.notes.append(f"{what} together as one image")
            return list(range(count))
        if self.channel is None or not 0 <= int(self.channel) < count:
            got = "none" if self.channel is None else self.channel
            raise InputError(
                f"{self.name}: {what}; expected {one}, --channel together for images of {count} channels, or "
                f"--channel each for images of their own; got {got}"
            )
        chosen = int(self.channel)
        called = f" ({one_line(names[chosen], 40)})" if chosen < len(names) else ""
        self.notes.append(f"channel {chosen}{called} of {count} (axis C); the others are left out")
        return [chosen]

    # -- pixels

    def _shape(self, axes: str, shape: tuple[int, ...], page: Any) -> tuple[int, int, int]:
        colours = shape[axes.index("S")] if "S" in axes else 1
        if _has_alpha(page):
            colours -= 1
        if page.photometric.name == "PALETTE":
            colours = 3
        return colours, shape[axes.index("Y")], shape[axes.index("X")]

    def _page_of(self, series: Any, pages: list[Any], at: Mapping[str, int]) -> Any:
        """The page that holds an index, None for one that is in another file, the series where pages do not
        divide it."""
        lead = _leading(series, pages)
        if lead is None:
            return series
        flat = np.ravel_multi_index([at.get(a, 0) for a in series.axes[: len(lead)]], lead) if lead else 0
        return pages[int(flat)]

    def _of_indices(
        self, number: int, series: Any, pages: list[Any], indices: list[dict[str, int]]
    ) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            found = []
            for index in indices:
                page = self._page_of(series, pages, index)
                if page is series:
                    array, axes = self._all_of(number, series), series.axes
                    array = array[tuple(slice(None) if a in _IMAGE else index[a] for a in axes)]
                    found.append(
                        _arranged(array, "".join(a for a in axes if a in _IMAGE), series.keyframe, self.name)
                    )
                    continue
                array = self._decoded(page, series, index)
                found.append(self._pillow(page.index) if array is None else array)
            return np.concatenate(found)

        return load

    def _all_of(self, number: int, series: Any) -> np.ndarray:
        if number not in self._whole:
            self._whole = {number: series.asarray()}
        return self._whole[number]

    def _decoded(
        self, page: Any, series: Any = None, index: Mapping[str, int] | None = None
    ) -> np.ndarray | None:
        """The pixels of a page (C, H, W), None where Pillow has to read them."""
        plain = page.keyframe.photometric.name in ("MINISBLACK", "RGB") and page.dtype is not None
        if not plain or page.dtype.kind == "b" or page.keyframe.bitspersample not in (8, 16, 32, 64):
            return None
        if tag(page.keyframe, 274, 1) != 1:  # a photograph that is to be turned
            return None
        if page.dtype.kind == "c":
            raise InputError(f"{self.name}: complex numbers in a TIFF; save them as .npy")
        try:
            array = page.asarray()
        except (ValueError, KeyError, RuntimeError) as error:
            if "imagecodecs" in str(error) or "not supported" in str(error):
                return None
            raise
        axes = page.keyframe.axes
        if series is not None:
            lead = _leading(series, list(series.pages)) or ()
            axes, array = series.axes[len(lead) :], array.reshape(series.shape[len(lead) :])
            array, axes = _picked(array, axes, index or {}), _kept_axes(axes)
        return _arranged(array, axes, page.keyframe, self.name)

    # -- what else the file says

    def _check_imagej(self) -> None:
        """InputError for an ImageJ stack that is not all there."""
        description = str(tag(self._file.pages[0], 270, ""))
        counts = [line[7:] for line in description.splitlines() if line.startswith("images=")]
        if not description.startswith("ImageJ=") or not counts:
            return
        found = sum(
            math.prod(n for a, n in zip(s.axes, s.shape, strict=True) if a not in _IMAGE)
            for s in self._file.series
        )
        if counts[0] != str(found):
            raise InputError(
                f"{self.name}: an ImageJ stack of {one_line(counts[0], 20)} images in {found} pages"
            )


def _leading(series: Any, pages: list[Any]) -> tuple[int, ...] | None:
    """The sizes of the axes that count pages, None where pages do not divide the series."""
    inner = tuple(series.keyframe.shape)
    lead = tuple(series.shape[: max(series.ndim - len(inner), 0)])
    while lead and math.prod(lead) > len(pages):
        lead = lead[:-1]
    rest = tuple(series.shape[len(lead) :])
    same = math.prod(rest) == math.prod(inner) and math.prod(lead) == len(pages)
    return lead if same else None


def _picked(array: np.ndarray, axes: str, index: Mapping[str, int]) -> np.ndarray:
    """One image of an array that has further axes."""
    return array[tuple(slice(None) if a in _IMAGE else index.get(a, 0) for a in axes)]


def _kept_axes(axes: str) -> str:
    return "".join(a for a in axes if a in _IMAGE)


def _arranged(array: np.ndarray, axes: str, page: Any, name: str) -> np.ndarray:
    """(C, H, W) from the axes of one image, opaque alpha taken off."""
    array = np.transpose(array, [axes.index(a) for a in "SYX" if a in axes])
    array = array[None] if array.ndim == 2 else array
    if _has_alpha(page):
        full = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1
        if (array[-1] != full).any():
            raise InputError(f"{name}: has transparent pixels, which have no one colour; flatten it first")
        array = array[:-1]
    if len(array) > _MOST_CHANNELS:
        raise InputError(f"{name}: expected at most {_MOST_CHANNELS} channels, got {len(array)} (axis S)")
    if (
        array.dtype.kind in "iu"
        and array.dtype.itemsize > 2
        and np.abs(array.astype(np.int64)).max() > 1 << 24
    ):
        raise InputError(f"{name}: integers above 2^24 are not exact in float32; rescale them first")
    return array


def _has_alpha(page: Any) -> bool:
    extra = tuple(getattr(page.keyframe, "extrasamples", ()) or ())
    return bool(extra) and int(extra[-1]) in (1, 2) and page.keyframe.samplesperpixel in (2, 4)


def _kind(page: Any) -> tuple[float, bool]:
    """The largest value of a page's type, and whether it was compressed with loss."""
    page = page.keyframe
    unsigned = page.dtype is not None and page.dtype.kind in "ub"
    bits = max(int(page.bitspersample), 8)
    largest = float(2**bits - 1) if unsigned and bits <= 16 else 1.0
    return largest, page.compression.name in _LOSSY
