"""Figures of memorisation: pairs of images with their nearest neighbours, what came back from attacks,
distributions, error curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.evaluation.figures import MARK, _figure, _labelled, _numpy, _Sheet, save
from ambient_sci.evaluation.memorization_statistics import THRESHOLDS
from ambient_sci.evaluation.metrics import graded

HELD_OUT = "0.45"


def pairs_figure(
    path: str | os.PathLike[str], columns: Mapping[str, Tensor], notes: Mapping[str, Sequence[str]]
) -> Path:
    """One row an image, one column a kind; all in one gray window (colours in [0, 1] of the same window).

    Args:
        path: PNG to write.
        columns: title to images (B, C, H, W).
        notes: title to a text for each image, put under it.
    """
    first = next(iter(columns.values()))
    black, white = (
        float(v)
        for v in torch.quantile(graded(first).flatten().float()[:10_000_000], torch.tensor([0.0, 1.0]))
    )
    sheet = _Sheet(len(first), len(columns), bars=set())
    for column, (title, images) in enumerate(columns.items()):
        for row, image in enumerate(images):
            axes = sheet.cell(row, column, title if row == 0 else None)
            if image.shape[0] == 3:
                shown = ((image - black) / max(white - black, 1e-12)).clamp(0, 1).permute(1, 2, 0)
                axes.imshow(_numpy(shown), interpolation="nearest")
            else:
                grey = graded(image[None])[0].mean(0)
                axes.imshow(_numpy(grey), cmap="gray", vmin=black, vmax=white, interpolation="nearest")
            if title in notes:
                axes.text(
                    0.03,
                    0.03,
                    notes[title][row],
                    transform=axes.transAxes,
                    fontsize=9,
                    color="white",
                    bbox=_BOX,
                )
    return save(sheet.figure, path)


_BOX = {"facecolor": "black", "alpha": 0.55, "pad": 1.5, "linewidth": 0}


def distributions_figure(
    path: str | os.PathLike[str], panels: Mapping[str, Mapping[str, Tensor]], label: str = "similarity"
) -> Path:
    """Histograms, one panel a title, of two kinds of images each; the first is drawn full, the second as an
    outline.

    Args:
        path: PNG to write.
        panels: title to {name: values}.
        label: of the horizontal axis.
    """
    figure = _figure(3.6 * len(panels), 2.8)
    for number, (title, kinds) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        values = {name: _numpy(v.flatten().double()) for name, v in kinds.items()}
        low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
        edges = np.linspace(low, high if high > low else low + 1e-6, 31)
        for place, (name, v) in enumerate(values.items()):
            style: dict[str, Any] = (
                {"color": MARK, "alpha": 0.7} if place == 0 else {"color": HELD_OUT, "histtype": "step"}
            )
            axes.hist(
                v, bins=list(edges), weights=np.full(v.shape, 1 / len(v)), label=f"{name} ({len(v)})", **style
            )
        for threshold in THRESHOLDS:
            if low <= threshold <= high:
                axes.axvline(threshold, color="0.8", linewidth=0.8, zorder=0)
        axes.set_title(title, fontsize=11)
        axes.legend(fontsize=8, frameon=False)
        _labelled(axes, label, "share" if number == 0 else "")
    figure.tight_layout()
    return save(figure, path)


def error_figure(path: str | os.PathLike[str], levels: Sequence[Mapping[str, Any]]) -> Path:
    """Denoising error on held-out over training images by noise level, with its intervals; 1 is no memory.

    Ratios beyond 100 are drawn at 100, with an arrow.
    """
    figure = _figure(4.6, 3.2)
    axes = figure.add_subplot()
    top = 100.0
    sigma = [row["sigma"] for row in levels]
    ratio = [min(row["ratio"], top) for row in levels]
    ends = np.array([[min(e, top) for e in row["interval"]] for row in levels])
    axes.axhline(1, color="0.7", linewidth=1)
    axes.fill_between(sigma, ends[:, 0], ends[:, 1], color=MARK, alpha=0.25, linewidth=0)
    axes.plot(sigma, ratio, color=MARK, marker="o", markersize=3)
    for row in levels:
        if row["ratio"] > top:
            axes.annotate(
                "",
                (row["sigma"], top * 1.5),
                (row["sigma"], top),
                arrowprops={"arrowstyle": "->", "color": MARK},
            )
    axes.set(xscale="log", yscale="log")
    if max(ratio) >= top:
        axes.set_ylim(top=top * 2)
    _labelled(axes, "noise level", "error, held out / trained on")
    figure.tight_layout()
    return save(figure, path)


def frontier_figure(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: tuple[str, str],
    none: float | None = None,
) -> Path:
    """Two measures against each other, both better when small: one curve a name, a point with its intervals
    and a text.

    Args:
        path: PNG to write.
        curves: name to points in the order in which they are joined: ``x``, ``y``, ``x_interval``,
            ``y_interval``, ``text``; the first curve is drawn full, the others dashed.
        labels: of the axes.
        none: what the horizontal measure is without any effect, drawn as a line.

    The vertical axis is logarithmic where all its intervals are above 0.
    """
    figure = _figure(5.2, 3.8)
    axes = figure.add_subplot()
    if none is not None:
        axes.axvline(none, color="0.8", linewidth=1, zorder=0)
    for number, (name, points) in enumerate(curves.items()):
        x, y = ([float(p[axis]) for p in points] for axis in "xy")
        reach = [
            np.abs(np.array([p[f"{axis}_interval"] for p in points]).T - np.array(values))
            for axis, values in (("x", x), ("y", y))
        ]
        colour = f"C{number}"
        style = "-" if number == 0 else "--"
        axes.errorbar(
            x, y, xerr=reach[0], yerr=reach[1], fmt="o" + style, color=colour, markersize=4, linewidth=1,
            elinewidth=0.7, alpha=0.85, label=name,
        )  # fmt: skip
        place = (4, 4) if number == 0 else (4, -10)
        style_of_text: dict[str, Any] = {"xytext": place, "textcoords": "offset points", "fontsize": 8}
        for p in points:
            axes.annotate(p["text"], (p["x"], p["y"]), color=colour, **style_of_text)
    if all(p["y_interval"][0] > 0 for points in curves.values() for p in points):
        axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)
    _labelled(axes, *labels)
    figure.tight_layout()
    return save(figure, path)


def ranked_figure(
    path: str | os.PathLike[str], panels: Mapping[str, Mapping[str, Tensor]], label: str = "similarity"
) -> Path:
    """Values from the largest to the smallest, one panel a title, one line a name; lines at 0.9, 0.95 and
    0.99.

    Names come in pairs, the second of which, "… held out", has the colour of the first and is dotted.

    Args:
        path: PNG to write.
        panels: title to {name: values}.
        label: of the vertical axis.
    """
    figure = _figure(3.4 * len(panels), 3.0)
    for number, (title, kinds) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for threshold in THRESHOLDS:
            axes.axhline(threshold, color="0.85", linewidth=0.8, zorder=0)
        for place, (name, values) in enumerate(kinds.items()):
            ranked = _numpy(values.flatten().double().sort(descending=True).values)
            style: dict[str, Any] = {"color": f"C{place // 2}"}
            if name.endswith("held out"):
                style |= {"linestyle": ":", "alpha": 0.8}
            axes.plot(np.linspace(0, 100, len(ranked)), ranked, label=name, linewidth=1.2, **style)
        axes.set_title(title, fontsize=11)
        axes.legend(fontsize=7, frameon=False, loc="lower left")
        _labelled(axes, "images, in % by rank", label if number == 0 else "")
    figure.tight_layout()
    return save(figure, path)
