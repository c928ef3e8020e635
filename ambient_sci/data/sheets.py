"""Contact sheets: images in rows and columns, each row with a name and a window, bounded in size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output, whole_file

SUFFIXES = (".png", ".pdf", ".svg", ".jpg")
#: Most images of a row, and most rows of a sheet of one kind of images.
COLUMNS, LINES = 8, 4
_DPI, _CELL, _WIDEST = 110, 1.6, 12.8  # dots per inch; inches of an image, and of all images of a row
_LEFT, _TOP, _TITLE, _GAP, _NARROWEST = 0.5, 0.35, 0.16, 0.06, 3.2  # inches


@dataclass(frozen=True)
class Panel:
    """One row of a sheet.

    Attributes:
        name: what it says beside it.
        images: (n, H, W), or (n, H, W, 3) in colour.
        window: the values that are black and white; default: see `window`.
        spread: a standard deviation, in colours with its scale in the name.
    """

    name: str
    images: np.ndarray
    window: tuple[float, float] | None = None
    spread: bool = False


def picture(images: Tensor) -> np.ndarray:
    """(B, C, H, W) for display: the magnitude of complex images (two channels), colours last for three
    channels, else the channels' mean."""
    if images.shape[1] == 2:
        return images.square().sum(1).sqrt().numpy()
    if images.shape[1] == 3:
        return images.movedim(1, -1).numpy()
    return images.mean(1).numpy()


def window(images: np.ndarray) -> tuple[float, float]:
    """The values that are shown black and white: a few pixels do not darken the rest."""
    low, high = (float(np.percentile(images, p)) for p in (0.1, 99.9))
    if 0 <= low < 0.2 * high:  # next to nothing: black stays black
        low = 0.0
    return low, high if high > low else low + 1.0


def spread_rows(num: int, most: int = COLUMNS) -> np.ndarray:
    """Up to ``most`` of ``num`` rows, evenly spread."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).astype(int))


def check_sheet(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """The path of a sheet to write. InputError for another kind of file, or one that exists."""
    out = check_output(path, overwrite)
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"{out}: expected a picture name ending in {', '.join(SUFFIXES)}")
    return out


def draw(
    panels: Sequence[Panel], titles: Sequence[str], heading: str, out: Path, *, turn: bool = False
) -> None:
    """Write a sheet, whole or not at all.

    A single panel of more than `COLUMNS` images is broken into lines.

    Args:
        panels: rows of as many images as there are titles.
        titles: one for each image.
        heading: one line above.
        out: file to write.
        turn: RAS slices have their first axis to the right and their second upwards; show them upright.
    """
    from matplotlib.figure import Figure

    lines = _lines(panels, titles)
    columns = max(len(names) for _, names in lines)
    height, width = (int(n) for n in panels[0].images.shape[1:3])
    height, width = (width, height) if turn else (height, width)
    cell = max(_CELL, min(max(height, width) / _DPI, _WIDEST / max(columns, len(lines))))
    wide, high = cell * min(1, width / height), cell * min(1, height / width)  # inches of one image
    gap = max(1, round(0.04 * width))  # pixels between images
    titled = [any(names) for _, names in lines]
    sizes = [_LEFT + columns * wide * (1 + gap / width), _TOP + sum(high + _GAP + _TITLE * t for t in titled)]
    figure = Figure(figsize=(max(sizes[0], _NARROWEST), sizes[1]))
    top = sizes[1] - _TOP
    for (panel, names), title in zip(lines, titled, strict=True):
        top -= _TITLE * title + high
        across = (len(names) * (width + gap) - gap) / width * wide
        size = figure.get_size_inches()
        axis = figure.add_axes((_LEFT / size[0], top / size[1], across / size[0], high / size[1]))
        _row(axis, panel, names, gap, turn, cell * _DPI >= max(height, width))
        top -= _GAP
    figure.suptitle(heading, fontsize=9, y=1 - 0.1 / sizes[1], va="top")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as part:
        figure.savefig(part, dpi=_DPI, format=out.suffix[1:].lower())


def _row(axis: Any, panel: Panel, names: Sequence[str], gap: int, turn: bool, sharp: bool) -> None:
    """One row of images, side by side in one picture."""
    images = np.rot90(panel.images, axes=(1, 2)) if turn else panel.images
    low, high = panel.window or window(panel.images)
    if images.ndim == 4:
        images = np.clip((images - low) / (high - low), 0, 1)
    num, height, width = images.shape[:3]
    shown = np.full(
        (height, num * (width + gap) - gap, *images.shape[3:]), 1.0 if images.ndim == 4 else np.nan
    )
    for column, image in enumerate(images):
        start = column * (width + gap)
        shown[:, start : start + width] = image
        edges = [start - 0.5, start + width - 0.5, start + width - 0.5, start - 0.5, start - 0.5]
        axis.plot(edges, [-0.5, -0.5, height - 0.5, height - 0.5, -0.5], color="0.5", lw=0.5, clip_on=False)
        if names[column]:
            axis.text(start + width / 2, -0.5, names[column], fontsize=7, ha="center", va="bottom")
    colours = "magma" if panel.spread else "gray"
    smooth = "nearest" if sharp else "antialiased"
    axis.imshow(shown, cmap=colours, vmin=low, vmax=high, interpolation=smooth, aspect="auto")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    scale = f"\n{low:.3g} to {high:.3g}" if panel.spread else ""
    axis.set_ylabel(panel.name + scale, fontsize=8)


def _lines(panels: Sequence[Panel], titles: Sequence[str]) -> list[tuple[Panel, Sequence[str]]]:
    """Rows of the sheet with their titles, which only the first row of several panels has."""
    if len(panels) > 1 or len(titles) <= COLUMNS:
        return [(p, titles if k == 0 else [""] * len(titles)) for k, p in enumerate(panels)]
    (panel,) = panels
    shared = panel.window or window(panel.images)
    return [
        (Panel(panel.name, panel.images[k : k + COLUMNS], shared, panel.spread), titles[k : k + COLUMNS])
        for k in range(0, len(titles), COLUMNS)
    ]
