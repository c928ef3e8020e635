"""Images from noisy images alone: clean, Ambient full, truncated and staged, noisy-as-clean. One command, one
table, one figure of samples a level.

    python -m recipes.noisy_images.run --data digits [--noise high|low] [--profile two-core|small|gpu]
    [--levels 0.8] [--seeds 3 4 5] [--runs clean staged] [--features inception:FILE] [--out runs/noisy_images]

High noise: levels in units of the clean images' standard deviation. Low noise: levels of images in [-1, 1],
as published. Every cell (run, noise, size, seed) is a JSON file; a cell that is there is not run again, and
one that was interrupted continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from ambient_sci.errors import InputError
from recipes.exactness.run import add_choices, make
from recipes.grid import parser
from recipes.noisy_images.figure import samples_figures
from recipes.noisy_images.part import Part
from recipes.noisy_images.published import published_table

CONFIG = Path(__file__).parent / "config.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Run the cells asked for that are missing; the table, the published one, and figures. The exit
    status."""
    options = parse(arguments)
    try:
        settings = load_settings(options)
        out = options.out / options.profile / options.data / options.noise
        common = {"data": options.data, "noise": options.noise, "profile": options.profile}
        print(make(Part(options.data, options.noise), settings, options, out, common))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.noise == "low":
        print(published_table(options.data))
    for path in samples_figures(out):
        print(path)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    config = yaml.safe_load(CONFIG.read_text())
    found = parser(__doc__, "runs/noisy_images")
    found.add_argument("--profile", default="two-core", choices=list(config))
    found.add_argument(
        "--data", required=True, choices=sorted({d for profile in config.values() for d in profile})
    )
    found.add_argument("--noise", default="high", choices=["high", "low"])
    found.add_argument("--features", help="of published sets: an extractor, see docs/memorisation.md")
    add_choices(found)
    return found.parse_args(arguments)


def load_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a data set in a profile of config.yaml.

    Raises:
        InputError: a data set that the profile does not have.
    """
    profile = yaml.safe_load(CONFIG.read_text())[options.profile]
    if options.data not in profile:
        raise InputError(
            f"--data: expected one of profile {options.profile}'s ({', '.join(profile)}), got {options.data}"
        )
    settings = profile[options.data]
    if options.features and "features" not in settings:
        raise InputError(
            f"--features: expected a published set, got {options.data}, which has features of its own"
        )
    return {**settings, "features": options.features} if options.features else settings


if __name__ == "__main__":
    sys.exit(main())
