"""The figure of the README: the packaged prior on three people it has never seen.

    python docs/figures/hero.py

Truth, zero-filled, total variation (weight chosen with the truth in hand, for each slice by itself),
posterior mean, standard deviation, and |error| / standard deviation, which is flat where the error bars hold.
Scans are those of ``ambient-sci quickstart`` (R = 2.5, noise 0.05), simulated from real anatomy.
Numbers of the caption go to standard output.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ambient_sci as asci
from ambient_sci.evaluation import psnr, sweep, zero_filled
from ambient_sci.quickstart import PRETRAINED, Settings, make_scans

#: Where the tumour of patient 1 lies in the upright slice: first and last row, first and last column.
LESION = (35, 42, 11, 18)
STD_TOP, RATIO_TOP = 0.12, 4.0


def scans(settings: Settings) -> tuple[asci.operators.MRI, Tensor, Tensor, list[str]]:
    """Operator, measurements, truth and name of the middle slice of each person."""
    with tempfile.TemporaryDirectory() as folder:
        make_scans(Path(folder), settings, seed=0, overwrite=False, train=False)
        with (
            asci.data.MeasurementFile(Path(folder) / "test.h5") as file,
            asci.data.ReferenceFile(Path(folder) / "test_clean.h5") as clean,
        ):
            people = list(file.subjects)
            rows = [people.index(p) + people.count(p) // 2 for p in dict.fromkeys(people)]
            return (
                file.operator(rows),
                file.measurements(rows),
                clean.images(rows),
                list(dict.fromkeys(people)),
            )


def upright(x: Tensor) -> Tensor:
    """Slices are stored in RAS axes: turned, as a person looks at them."""
    return x.rot90(1, (-2, -1))


def modulus(x: Tensor) -> Tensor:
    """Magnitude of complex images with two channels, (B, H, W)."""
    return torch.linalg.vector_norm(x, dim=1)


def draw(columns: dict[str, Tensor], truth: Tensor, people: list[str], out: Path) -> None:
    """The sheet: grey images in one window for each person, then the two maps with a colour bar each."""
    grey = [name for name in columns if name not in ("std", "|error| / std")]
    figure = Figure(figsize=(1.62 * len(columns) + 0.3, 1.62 * len(people) + 0.65), layout="constrained")
    grid = figure.add_gridspec(len(people) + 1, len(columns), height_ratios=[1] * len(people) + [0.07])
    axes = np.array(
        [[figure.add_subplot(grid[r, k]) for k in range(len(columns))] for r in range(len(people))]
    )
    shown = modulus(truth)
    tissue = [image[image > 0.1 * image.max()] for image in shown]
    white = [float(t.quantile(0.95)) for t in tissue]  # the scalp may clip: what matters is inside
    for k, (name, images) in enumerate(columns.items()):
        for row, image in enumerate(images if name not in grey else modulus(images)):
            axis = axes[row, k]
            axis.set(xticks=[], yticks=[])
            if name in grey:
                axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=white[row], interpolation="nearest")
            else:
                top = STD_TOP if name == "std" else RATIO_TOP
                drawn = axis.imshow(image.numpy(), cmap="magma", vmin=0, vmax=top, interpolation="nearest")
            if name in grey[1:]:
                value = float(psnr(images[row : row + 1], truth[row : row + 1], 1.0))
                axis.text(
                    0.97, 0.03, f"{value:.1f} dB", transform=axis.transAxes, ha="right", fontsize=8,
                    color="white", bbox={"facecolor": "black", "alpha": 0.6, "pad": 1.5, "linewidth": 0},
                )  # fmt: skip
            if row == 0:
                axis.set_title(name, fontsize=10)
            if k == 0:
                axis.set_ylabel(people[row], fontsize=9)
        if name not in grey:
            bar = figure.colorbar(
                drawn, cax=figure.add_subplot(grid[-1, k]), orientation="horizontal", extend="max"
            )
            bar.ax.tick_params(labelsize=8)
    top, bottom, left, right = LESION
    for k in (0, len(grey) - 1, len(columns) - 1):
        axes[0, k].annotate(
            "", ((left + right) / 2 + 3, (top + bottom) / 2 - 3),
            xytext=(18, -17), textcoords="offset points",
            arrowprops={"arrowstyle": "->", "color": "cyan", "linewidth": 1.2},
        )  # fmt: skip
    figure.savefig(out, dpi=150)


def main() -> None:
    """Reconstruct, draw, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("hero.png"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    settings = replace(Settings(), samples=options.samples, steps=options.steps)
    operator, y, truth, people = scans(settings)
    tuned = [
        sweep("tv", operator[k : k + 1], y[k : k + 1], truth[k : k + 1], peak=1.0) for k in range(len(y))
    ]
    prior = asci.load_prior(PRETRAINED)
    found = asci.reconstruct(
        prior, operator, y, settings.noise_std, samples=settings.samples, steps=settings.steps,
        max_iterations=settings.max_iterations, sigma_max=settings.sigma_max, progress=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    spread = modulus(found.std) * (1 + 1 / settings.samples) ** 0.5
    error = modulus(found.mean - truth)
    columns = {
        "truth": truth,
        "zero-filled": zero_filled(operator, y),
        "total variation": torch.cat([t.image for t in tuned]),
        "posterior mean": found.mean,
        "std": spread,
        "|error| / std": error / spread,
    }
    columns = {name: upright(images) for name, images in columns.items()}
    draw(columns, upright(truth), people, options.out)
    ratio = columns["|error| / std"]
    top, bottom, left, right = LESION
    inside = upright(error)[0, top : bottom + 1, left : right + 1].square().mean().sqrt()
    inside = inside / upright(spread)[0, top : bottom + 1, left : right + 1].square().mean().sqrt()
    for person, e, s in zip(people, error, spread, strict=True):
        print(f"{person}: std / error {float((s.square().mean() / e.square().mean()).sqrt()):.2f}")
    largest = ratio[0, top : bottom + 1, left : right + 1].max()
    print(f"lesion of {people[0]}: error / std {float(inside):.2f}, largest {float(largest):.1f}")
    print(f"all pixels above 3: {100 * float((ratio > 3).float().mean()):.2f} %")


if __name__ == "__main__":
    main()
