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
_DPI, _CELL, _WIDEST = 110, 1.6, 12.8  # dots per inch; inches


@dataclass(frozen=True)
class Panel:
    """One row of a sheet.

    Attributes:
        name: what it says beside it.
        images: (n, H, W), or (n, H, W, 3) in colour.
        window: the values that are black and white; default: 0 (or less, where there are such values) to the
            99.9th percentile.
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
    low = 0.0 if float(images.min()) >= 0 else float(np.percentile(images, 0.1))
    high = float(np.percentile(images, 99.9))
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
    columns = max(len(t) for _, t in lines)
    height, width = panels[0].images.shape[1:3]
    cell = max(_CELL, min(max(height, width) / _DPI, _WIDEST / max(columns, len(lines))))
    figure = Figure(figsize=(cell * columns + 0.6, (cell + 0.17) * len(lines) + 0.5), layout="constrained")
    axes: Any = figure.subplots(len(lines), columns, squeeze=False)
    smooth = "nearest" if cell * _DPI >= max(height, width) else "antialiased"
    for row, (panel, names) in enumerate(lines):
        low, high = panel.window or window(panel.images)
        for column in range(columns):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            if column >= len(names):
                axis.set_visible(False)
                continue
            image = np.rot90(panel.images[column]) if turn else panel.images[column]
            if image.ndim == 3:
                image = np.clip((image - low) / (high - low), 0, 1)
            colours = "magma" if panel.spread else "gray"
            axis.imshow(image, cmap=colours, vmin=low, vmax=high, interpolation=smooth)
            if names[column]:
                axis.set_title(names[column], fontsize=7)
        scale = f"\n{low:.3g} to {high:.3g}" if panel.spread else ""
        axes[row, 0].set_ylabel(panel.name + scale, fontsize=8)
    figure.suptitle(heading, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as part:
        figure.savefig(part, dpi=_DPI, format=out.suffix[1:].lower())


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
