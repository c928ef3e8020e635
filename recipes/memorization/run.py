"""Quality against memorisation over the noise frozen in the training images. One command, table and figures.

    python -m recipes.memorization.run --part digits [--profile two-core|full] [--images 300] [--levels 0 0.4]
    [--seeds 1] [--features efficientnet-lite0 …] [--out runs/memorization]

Every cell (training images, sigma_n, seed, stop) is written to its own JSON file when it is done; a cell that
is there is not made again, one that was interrupted goes on from its checkpoint. Table and figures are of all
cells there are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from ambient_sci.errors import InputError
from recipes.grid import Grid, fill, parser
from recipes.memorization.cells import jobs, work
from recipes.memorization.report import write_report

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    """Make the cells asked for that are missing, then table and figures."""
    options = parse(arguments)
    settings = load_settings(options.profile, options.part)
    if options.features:
        first = next(iter(settings["features"].values()))
        asked = {**first, "quality": True, "memory": True, "at": "every"}
        frontier = {"x": ["copies", options.features[-1]], "y": ["kid", options.features[0]]}
        features = dict.fromkeys(options.features, asked)
        settings = {**settings, "features": features, "frontier": frontier}
    grid = Grid(options.out / options.profile / options.part)
    if not options.table_only:
        chosen = {
            job.cell().name: job for job in jobs(settings, options.images, options.levels, options.seeds)
        }
        cells = [job.cell() for job in chosen.values()]
        grid.run(cells, lambda cell: work(chosen[cell.name], grid.out, options.device))
    text = write_report(grid, settings)
    print(text)
    if options.readme:
        fill(HERE / "README.md", f"{options.profile} {options.part}", text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = parser(__doc__, "runs/memorization")
    found.add_argument(
        "--part", required=True, help="digits, faces; with --profile full: ffhq, cifar10, tiny-imagenet"
    )
    found.add_argument("--profile", default="two-core", choices=["two-core", "full"])
    found.add_argument("--images", nargs="+", type=int, help="only these numbers of training images")
    found.add_argument("--levels", nargs="+", type=float, help="only these sigma_n, in published units")
    found.add_argument("--seeds", nargs="+", type=int)
    found.add_argument(
        "--features",
        nargs="+",
        metavar="NAME",
        help="measure on these instead (inception:FILE dinov2:FILE): the first is the figure's quality, the "
        "last its memory",
    )
    found.add_argument("--readme", action="store_true", help="put the table into the recipe's README")
    return found.parse_args(arguments)


def load_settings(profile: str, part: str) -> dict[str, Any]:
    """The settings of a part in a profile of config.yaml.

    Raises:
        InputError: a part that this profile does not have.
    """
    parts = yaml.safe_load((HERE / "config.yaml").read_text())[profile]
    if part not in parts:
        raise InputError(f"--part: expected one of {', '.join(parts)} with --profile {profile}, got {part!r}")
    return parts[part]


if __name__ == "__main__":
    main()
