"""The Ambient MRI study: priors from noisy and undersampled scans, reconstruction at several accelerations.
One command, one table.

    python -m recipes.mri.run --profile two-core [--out runs/mri] [--train em-R4 noisy ...] [--test 4]
    [--cells 'em-*'] [--table-only]

Every prior is a run folder, every cell a JSON file; what is there is not made again, and what was interrupted
continues. Started twice, the command shares the work: each process takes the next prior (with its cells) that
no other has in hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ambient_sci.errors import InputError
from recipes.grid import Cell, Grid, parser
from recipes.mri import priors
from recipes.mri.ablations import ablation_cells, run_ablation
from recipes.mri.cells import all_cells, chosen, run_cell
from recipes.mri.profiles import load_profile
from recipes.mri.report import write_report
from recipes.mri.scans import Scans


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, then the table and the figures. Returns the exit status."""
    options = parse(arguments)
    try:
        profile = load_profile(options.profile)
        out = options.out / options.profile
        out.mkdir(parents=True, exist_ok=True)
        if not options.table_only:
            if options.ablations != "only":
                run_cells(options, profile, out)
            filtered = options.cells or options.train or options.test
            if (
                profile.get("ablation")
                and options.ablations != "no"
                and (options.ablations == "only" or not filtered)
            ):
                run_ablations(options, profile, out / "ablations")
        print(write_report(out, profile))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = parser(__doc__, "runs/mri")
    found.add_argument("--profile", default="two-core", help="a profile of config.yaml")
    found.add_argument(
        "--cells", nargs="+", metavar="PATTERN", help="only cells with such names, e.g. 'em-*--R4'"
    )
    found.add_argument(
        "--train", nargs="+", metavar="PATTERN", help="only these priors ('classic': classic methods)"
    )
    found.add_argument(
        "--test", nargs="+", type=float, metavar="R", help="only these accelerations of test scans"
    )
    found.add_argument(
        "--ablations", choices=["yes", "no", "only"], default="yes", help="ablations of the k-space loss"
    )
    return found.parse_args(arguments)


def run_cells(options: argparse.Namespace, profile: dict[str, Any], out: Path) -> None:
    """The cells of the table that the filters let pass, each prior trained when its first cell is made."""
    scans, grid = Scans(profile["scans"], out / "scans"), Grid(out / "cells")
    cells = chosen(all_cells(profile), options.cells, options.train, options.test)
    if not cells:
        raise InputError("--cells, --train, --test: expected filters that let some cell pass, got none")
    trained: dict[str, Any] = {}

    def work(cell: Cell) -> dict[str, Any]:
        name, rate = cell.settings["prior"], cell.settings["R_test"]
        if name is not None and name not in trained:
            trained.clear()  # one prior in memory at a time
            trained[name] = priors.train(name, profile, scans, out / "priors", options.device)
        return run_cell(cell, trained.get(name), profile, scans.test(rate), grid.out)

    grid.run(cells, work)


def run_ablations(options: argparse.Namespace, profile: dict[str, Any], folder: Path) -> None:
    """The ablations of the profile."""

    def work(cell: Cell) -> dict[str, Any]:
        return run_ablation(cell.settings["arm"], cell.settings["seed"], profile, folder, options.device)

    Grid(folder).run(ablation_cells(profile), work)


if __name__ == "__main__":
    raise SystemExit(main())
