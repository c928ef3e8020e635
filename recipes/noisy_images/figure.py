"""What the samples look like: a row a method, the same starting noise in every column."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from ambient_sci.evaluation.figures import save

ORDER = ("clean", "noisy", "clean oracle", "noisy-as-clean", "ambient full", "ambient truncated", "staged")
TITLES = {"clean": "clean images", "noisy": "what priors learn from"}


def samples_figures(out: Path) -> list[Path]:
    """A figure for each noise level and seed of the cells in ``out``: samples-LEVEL-sSEED.png."""
    rows: dict[tuple[float, int], dict[str, Tensor]] = {}
    for path in sorted(out.glob("*.json")):
        cell, samples = json.loads(path.read_text()), path.with_suffix(".samples.safetensors")
        if samples.exists():
            rows.setdefault((cell["level"], cell["seed"]), {}).update(load_file(samples))
    clean = next((found for (level, _), found in rows.items() if level == 0), {})
    oracle = {row: samples for row, samples in clean.items() if row not in TITLES}
    shown = {key: {**oracle, **found} for key, found in rows.items() if key[0] > 0}
    return [figure(out / f"samples-{level:g}-s{seed}.png", found) for (level, seed), found in shown.items()]


def figure(path: Path, rows: dict[str, Tensor]) -> Path:
    """One row of images (B, C, H, W) in [-1, 1] a method; black is -1, white is 1, what lies outside is
    clipped in the picture alone."""
    names = [name for name in ORDER if name in rows]
    columns = min(len(rows[name]) for name in names)
    sheet = Figure(figsize=(0.55 * columns + 1.6, 0.6 * len(names)), dpi=150)
    for row, name in enumerate(names):
        for column in range(columns):
            axes = sheet.add_axes(_place(row, column, len(names), columns))
            image = (rows[name][column].clamp(-1, 1) + 1) / 2
            axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
        low = 1 - (row + 0.5) / len(names)
        sheet.text(0.005, low, TITLES.get(name, name), fontsize=8, va="center")
    return save(sheet, path)


def _place(row: int, column: int, rows: int, columns: int) -> tuple[float, float, float, float]:
    left = 1.55 / (0.55 * columns + 1.6)
    width, height = (1 - left) / columns, 1 / rows
    return left + column * width, 1 - (row + 1) * height, 0.95 * width, 0.95 * height
