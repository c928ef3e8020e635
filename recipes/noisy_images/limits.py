r"""Where deconvolution of images stops, by theory: what their covariance leaves to be recovered.

    python -m recipes.noisy_images.limits --data digits [--points 60000] [--levels 0.4 0.8 1.6 3.2]

A principal direction of variance s^2, seen in n images with noise sigma_n, has a sample variance with
relative error sqrt(2 / n), and s^2 is what is left of it when sigma_n^2 is taken off: a relative error

    epsilon = sqrt(2 / n) (1 + sigma_n^2 / s^2)

For Gaussian data this is the whole problem, and no method does better. Directions above ``--error`` are
lost: they come back with a spread that is a guess. For other data it is what second moments tell; finer
structure is lost earlier. Printed by level (in standard deviations of the images): how many directions are
kept, and the share of the variance in them.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from recipes.noisy_images.data import SMALL
from recipes.small_images import images


def recoverable(variances: Tensor, sigma_n: float, points: int, error: float) -> Tensor:
    """Which directions of these variances are recovered to a relative ``error``, bool."""
    return math.sqrt(2 / points) * (1 + sigma_n**2 / variances.clamp(min=1e-12)) <= error


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, choices=SMALL)
    parser.add_argument("--points", type=int, default=60_000)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.4, 0.8, 1.6, 3.2])
    parser.add_argument("--error", type=float, default=0.1)
    arguments = parser.parse_args()
    x = images("train60k", arguments.data)[0].flatten(1).double()
    variances, std = torch.linalg.eigvalsh(torch.cov(x.T)), float(x.std())
    print("| noise, data standard deviations | absolute | directions recovered | variance in them |")
    print("|---|---|---|---|")
    for level in arguments.levels:
        kept = recoverable(variances, level * std, arguments.points, arguments.error)
        share = float(variances[kept].sum() / variances.sum())
        print(f"| {level:g} | {level * std:.3f} | {int(kept.sum())} of {len(variances)} | {share:.1%} |")


if __name__ == "__main__":
    main()
