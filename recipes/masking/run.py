"""What is learned from images with missing pixels alone, and how near do its samples come to the images
behind them? One command, one table.

    python -m recipes.masking.run --part digits [--profile two-core] [--missing 0.2 0.5] [--runs em clean]
    python -m recipes.masking.run --part faces
    python -m recipes.masking.run --part celeba --profile gpu --data data --features inception:FILE

Every cell (run, fraction missing, images, seed) is its own JSON file with a figure of samples beside their
nearest training images; a cell that is there is not run again, an interrupted one goes on from its
checkpoint. The table is over all cells there are; published numbers stand below it and are marked so.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ambient_sci.errors import InputError
from recipes.grid import Cell, Grid, mean_std, parser, table
from recipes.masking.data import FILES, load
from recipes.masking.work import RUNS, Job, work

HERE = Path(__file__).parent
PARTS = ("digits", "faces", *FILES)
SCORES = {
    "frechet": "Frechet",
    "kid": "KID",
    "similarity": "similarity to nearest",
    "held_out_similarity": "of held-out images",
    "copies": "nearer than 99 % of held-out",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the cells asked for that are missing, then print the table."""
    options = parse(arguments)
    settings = load_settings(options.profile, options.part)
    grid = Grid(options.out / options.profile / options.part)
    jobs = {job.name: job for job in chosen(settings, options)}
    common = {"part": options.part, "profile": options.profile}
    cells = [
        Cell(name, {**common, "run": job.run, "missing": job.missing, "size": job.size, "seed": job.seed})
        for name, job in jobs.items()
    ]

    def make(cell: Cell) -> dict[str, Any]:
        job = jobs[cell.name]
        data = load(options.part, job.size, job.seed, grid.out, options.data, options.features)
        return work(job, data, grid.out / cell.name, options.device)

    if not options.table_only:
        grid.run(cells, make)
    print(scores_table(grid.read()))
    print(published_table(options.part))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = parser(__doc__, "runs/masking")
    found.add_argument("--part", required=True, choices=PARTS)
    found.add_argument("--profile", default="two-core", choices=["two-core", "gpu"])
    found.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    found.add_argument("--missing", nargs="+", type=float, help="fractions (default: all; clean is always 0)")
    found.add_argument("--images", nargs="+", type=int, help="training images (default: all of the part)")
    found.add_argument("--seeds", nargs="+", type=int)
    found.add_argument("--data", type=Path, default=Path("data"), help="folder of the sets of datasets/")
    found.add_argument("--features", default="efficientnet-lite0", help="inception:FILE for FID")
    return found.parse_args(arguments)


def load_settings(profile: str, part: str) -> dict[str, Any]:
    """The settings of a part in a profile of config.yaml.

    Raises:
        InputError: a part that this profile does not have.
    """
    found = yaml.safe_load((HERE / "config.yaml").read_text())[profile]
    if part not in found:
        raise InputError(f"part {part}: expected one of {', '.join(found)} in profile {profile}")
    return found[part]


def chosen(settings: dict[str, Any], options: argparse.Namespace) -> Iterator[Job]:
    """The cells that the options ask for; clean is trained once, at 0 missing."""
    seeds = settings["seeds"] if options.seeds is None else options.seeds
    sizes = settings["points"] if options.images is None else options.images
    fractions = settings["missing"] if options.missing is None else options.missing
    for size, seed, run in itertools.product(sizes, seeds, options.runs):
        for missing in [0.0] if run == "clean" else fractions:
            yield Job(run, missing, size, seed, settings)


def scores_table(cells: list[dict[str, Any]]) -> str:
    """Every score of every row: mean (standard deviation over seeds), number of seeds."""
    cells = sorted(cells, key=lambda cell: (cell["size"], cell["missing"], cell["row"]))
    rows = {
        "images": lambda cell: str(cell["size"]),
        "missing": lambda cell: f"{cell['missing']:g}",
        "method": lambda cell: cell["row"],
    }

    def score(key: str) -> Any:
        return lambda own: mean_std([cell[key] for cell in own], ".3g")

    columns = [("seeds", lambda own: str(len(own))), *((SCORES[key], score(key)) for key in SCORES)]
    text = table(cells, rows, columns)
    floors = {cell["floor"]["real images"]: cell["floor"] for cell in cells}
    return text + "".join(f"\nfloor, as many real images: {floor}" for floor in floors.values())


def published_table(part: str) -> str:
    """Published numbers on this part's data, if there are any to be had."""
    found = yaml.safe_load((HERE / "config.yaml").read_text())["published"].get(part, [])
    rows = {key: (lambda row, key=key: str(row[key])) for key in ("missing", "method", "source")}
    if not found:
        return "\npublished on these data: none"
    return "\npublished, not ours:\n" + table(found, rows, [("FID-50k", lambda own: str(own[0]["fid"]))])


if __name__ == "__main__":
    main()
