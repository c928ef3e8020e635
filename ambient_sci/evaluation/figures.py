"""Figures: reconstructions side by side with their error bars, and calibration at a glance.

Every function writes one PNG, whole or not at all, with matplotlib's Agg canvas: no display is needed and no
global matplotlib state is touched. Images share one gray window, [0, peak of the person] unless another white
is asked for (from the darkest value on for real images that go below 0); the standard deviation and the error
share one colour scale, so that "is the error where the standard deviation says it is" can be read off, and
their ratio has its own: where error bars hold it is flat.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation.metrics import graded, psnr, volume_peak
from ambient_sci.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPREAD_MAP, MARK = "magma", "tab:blue"
RATIO, RATIO_TOP = "|error| / std", 4.0


def reconstruction_figure(
    path: str | os.PathLike[str],
    reference: Tensor,
    estimates: Mapping[str, Tensor],
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    labels: Sequence[str] | None = None,
    peak: float | Tensor | None = None,
    white: float | Tensor | None = None,
    mean_title: str = "posterior mean",
) -> Path:
    """One row a slice: truth, each estimate, posterior mean, its standard deviation, its error, and the error
    in standard deviations.

    Args:
        path: PNG to write.
        reference: the truth, (B, 1|2, H, W).
        estimates: name to images, in the order of the columns (input first, then baselines).
        mean, std: posterior mean and per-channel standard deviation, (B, 1|2, H, W). For complex images the
            maps shown are sqrt(std_re^2 + std_im^2) and |mean - truth|, which are to be compared with each
            other.
        labels: one a row.
        peak: full scale, one number or one a slice; default: the 99.9th percentile of ``reference``.
        mean_title: title of the posterior mean's column.

    Raises:
        InputError: images that do not match the reference.
    """
    scale = _one_each(volume_peak(reference) if peak is None else peak, reference)
    top = scale if white is None else _one_each(white, reference)
    columns = {"truth": reference, **estimates, **({} if mean is None else {mean_title: mean})}
    maps = _spread_and_error(mean, std, reference)
    sheet = _Sheet(len(reference), len(columns) + len(maps), bars=_bars(len(columns), maps))
    black = min(0.0, float(graded(reference).min()))
    for column, (name, images) in enumerate(columns.items()):
        scores = None if name == "truth" else psnr(images, reference, scale)
        for row, image in enumerate(graded(images).mean(1)):
            axes = sheet.cell(row, column, name if row == 0 else None)
            axes.imshow(_numpy(image), cmap="gray", vmin=black, vmax=float(top[row]), interpolation="nearest")
            if column == 0 and labels is not None:
                axes.set_ylabel(labels[row], fontsize=10)
            if scores is not None:
                _corner(axes, f"{float(scores[row]):.1f} dB")
    _draw_maps(sheet, maps, len(columns))
    return save(sheet.figure, path)


def tissue_white(images: Tensor) -> Tensor:
    """What to show white where something bright and dull, such as the scalp, would leave the rest dark: the
    95th percentile of the pixels above a tenth of the brightest, of each image, (B,)."""
    shown = [x[x > 0.1 * x.max()] for x in graded(images).double().flatten(1)]
    return torch.stack([x.quantile(0.95) if len(x) else torch.ones((), dtype=x.dtype) for x in shown])


def _one_each(value: float | Tensor, images: Tensor) -> Tensor:
    """One number, or one an image, as (B,)."""
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1).expand(len(images))


def _bars(first: int, maps: Mapping[str, Tensor]) -> set[int]:
    """The columns that have a colour bar on their right."""
    shared = len(maps) - (RATIO in maps)
    return {first + k - 1 for k in {shared, len(maps)} if k > 0}


def _draw_maps(sheet: _Sheet, maps: Mapping[str, Tensor], first: int) -> None:
    """Standard deviation and error on one colour scale, their ratio on its own."""
    top = _upper([image for name, image in maps.items() if name != RATIO])
    for column, (name, images) in enumerate(maps.items(), start=first):
        limit = RATIO_TOP if name == RATIO else top
        for row, image in enumerate(images):
            axes = sheet.cell(row, column, name if row == 0 else None)
            drawn = axes.imshow(_numpy(image), cmap=SPREAD_MAP, vmin=0, vmax=limit, interpolation="nearest")
            if row == sheet.rows - 1 and column in sheet.bars:
                bar = sheet.figure.colorbar(drawn, cax=sheet.bar(column), extend="max")
                bar.ax.tick_params(labelsize=9)
                bar.set_ticks([t for t in bar.get_ticks() if t <= limit])


class _Sheet:
    """A sheet of square cells laid out in inches, so that any number of rows and columns looks the same."""

    CELL, GAP, LEFT, TOP, BOTTOM, BAR = 1.5, 0.05, 0.28, 0.34, 0.1, 0.7

    def __init__(self, rows: int, columns: int, bars: set[int]) -> None:
        self.rows, self.columns, self.bars = rows, columns, bars
        step = self.CELL + self.GAP
        self.width = self._left(columns) + 0.05
        self.height = self.TOP + rows * step + self.BOTTOM
        self.figure = _figure(self.width, self.height)

    def cell(self, row: int, column: int, title: str | None) -> Axes:
        bottom = self.BOTTOM + (self.rows - 1 - row) * (self.CELL + self.GAP)
        return _bare(self._axes(self._left(column), bottom, self.CELL, self.CELL), title)

    def bar(self, column: int) -> Axes:
        """The colour bar on the right of a column."""
        left = self._left(column) + self.CELL + self.GAP + 0.06
        return self._axes(left, self.BOTTOM, 0.16, self.rows * (self.CELL + self.GAP) - self.GAP)

    def _left(self, column: int) -> float:
        """Where a column begins: behind the cells and colour bars before it."""
        before = sum(bar < column for bar in self.bars)
        return self.LEFT + column * (self.CELL + self.GAP) + before * self.BAR

    def _axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)


def _spread_and_error(mean: Tensor | None, std: Tensor | None, reference: Tensor) -> dict[str, Tensor]:
    if mean is None:
        return {}
    if mean.shape == reference.shape:
        error = torch.linalg.vector_norm(mean - reference, dim=1)
    else:
        error = torch.linalg.vector_norm(graded(mean) - graded(reference), dim=1)
    if std is None:
        return {"|error|": error}
    if std.shape[0] != len(reference) or std.shape[-2:] != reference.shape[-2:]:
        raise InputError(
            f"figure: expected a standard deviation like the reference {tuple(reference.shape)}, "
            f"got {tuple(std.shape)}"
        )
    spread = torch.linalg.vector_norm(std, dim=1)
    ratio = torch.where(spread > 0, error / spread.clamp(min=1e-30), 0.0)
    return {"std": spread, "|error|": error, RATIO: ratio}


def _upper(maps: Any) -> float:
    """Top of the colour scale: the 99.5th percentile, so that a few pixels do not darken the rest."""
    values = torch.cat([m.flatten().double() for m in maps]) if maps else torch.ones(1)
    return max(float(values.sort().values[math.ceil(0.995 * (len(values) - 1))]), 1e-12)


def calibration_figure(path: str | os.PathLike[str], results: Mapping[str, Mapping[str, Any]]) -> Path:
    """One row a test: coverage of central intervals, ranks, and TARP where there is one.

    Args:
        path: PNG to write.
        results: title to a result of `with_truth` or `held_out_rows`.
    """
    width = 3 if any("tarp" in r for r in results.values()) else 2
    figure = _figure(3.5 * width + 0.3, 3.3 * len(results) + 0.1)
    grid = figure.subplots(len(results), width, squeeze=False)
    for (title, result), row in zip(results.items(), grid, strict=True):
        _coverage_panel(row[0], result["coverage"])
        _rank_panel(row[1], result["ranks"])
        if width == 3 and "tarp" in result:
            _curve_panel(row[2], result["tarp"])
        elif width == 3:
            row[2].set_visible(False)
        row[0].annotate(
            title,
            (0, 1),
            (-38, 12),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=11,
            weight="bold",
        )
    figure.tight_layout(h_pad=2.0)
    return save(figure, path)


def _coverage_panel(axes: Axes, coverage: Mapping[str, Mapping[str, float]]) -> None:
    nominal = [float(k) / 100 for k in coverage]
    observed = [c["observed"] for c in coverage.values()]
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot([0, *nominal, 1], [0, *observed, 1], color=MARK)
    axes.plot(nominal, observed, "o", color=MARK, markersize=5)
    for x, y in zip(nominal, observed, strict=True):
        axes.annotate(f"{100 * y:.0f} %", (x, y), (7, -10), textcoords="offset points", fontsize=9)
    _labelled(axes, "nominal coverage", "observed coverage")
    axes.set(xlim=(0, 1.16), ylim=(0, 1.02), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])


def _rank_panel(axes: Axes, ranks: Mapping[str, Sequence[float]]) -> None:
    """Share of truths in each tenth of the samples; band: two standard deviations under calibration."""
    frequencies, std = ranks["frequencies"], ranks["std"]
    centres = [(k + 0.5) / len(frequencies) for k in range(len(frequencies))]
    flat = 1 / len(frequencies)
    axes.bar(centres, frequencies, width=0.9 * flat, color=MARK, alpha=0.75)
    edges = [k * flat for k in range(len(frequencies) + 1)]
    low, high = ([flat + f * 2 * s for s in (*std, std[-1])] for f in (-1, 1))
    axes.fill_between(edges, low, high, step="post", color="0.4", alpha=0.35, linewidth=0)
    axes.axhline(flat, color="0.3", linewidth=1)
    _labelled(axes, "rank of the truth among samples", "share of entries")
    axes.set(xlim=(0, 1), ylim=(0, max(1.9 * flat, 1.1 * max(frequencies))))


def _curve_panel(axes: Axes, tarp: Mapping[str, Any]) -> None:
    total, covered = 0.0, [0.0]
    for share in tarp["frequencies"]:
        total += share
        covered.append(total)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot(tarp["edges"], covered, color=MARK)
    axes.text(0.05, 0.9, f"p = {tarp['p']:.2g}", transform=axes.transAxes, fontsize=10)
    _labelled(axes, "credibility (TARP)", "expected coverage")
    axes.set(xlim=(0, 1), ylim=(0, 1))


# -- common ------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _labelled(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)


def _bare(axes: Axes, title: str | None) -> Axes:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title is not None:
        axes.set_title(title, fontsize=11, pad=5)
    return axes


def _corner(axes: Axes, text: str) -> None:
    axes.text(
        0.97,
        0.03,
        text,
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=10,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.5, "linewidth": 0},
    )


def _numpy(image: Tensor) -> Any:
    return image.detach().cpu().float().numpy()


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the PNG, whole or not at all."""
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return Path(path)
