"""Is the clean distribution recovered from noisy data alone? One command, one table.

    python -m recipes.exactness.run --part ring [--profile two-core|gpu] [--seeds 0 1 2] [--levels 0.1]
    [--runs clean staged …] [--out runs/exactness]

Every cell (part, run, noise, size, seed) is written to its own JSON file when it is done; a cell that is
there is not run again, and one that was interrupted continues from its checkpoint. The table at the end is
over all cells there are.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.exactness.costs import training_evaluations
from recipes.exactness.parts import MODULES, Job, Part, load_part, load_settings
from recipes.grid import Cell, Grid, mean_std, parser, table


def main(arguments: list[str] | None = None) -> None:
    """Run the cells asked for that are missing, then print the table."""
    options = parse(arguments)
    settings = load_settings(options.profile, options.part)
    part, out = load_part(options.part), options.out / options.profile / options.part
    print(make(part, settings, options, out, {"part": options.part, "profile": options.profile}))


def make(
    part: Part, settings: dict[str, Any], options: argparse.Namespace, out: Path, common: dict[str, Any]
) -> str:
    """Run the cells asked for that are missing in ``out``; the table of those that are there.

    Args:
        part: what a cell is.
        settings: of the part.
        options: the command line, see `add_choices`.
        out: folder of the cells.
        common: what the file of every cell says.

    Raises:
        InputError: a cell that is there was made with other settings.
    """
    grid = Grid(out)
    jobs = {job_name(job): job for job in chosen(part, settings, options)}
    cells = [
        Cell(name, {**common, **of_job(job), "settings": told(job.run, settings)})
        for name, job in jobs.items()
    ]
    if not options.table_only:
        grid.run(cells, lambda cell: part.run(jobs[cell.name], grid.out / cell.name, options.device))
    shown = [
        cell for cell in grid.read() if cell["seed"] in (options.seeds or part.seeds(settings, cell["level"]))
    ]
    return scores_table(shown, settings)


def of_job(job: Job) -> dict[str, Any]:
    """What tells a cell from the others."""
    return {"run": job.run, "level": job.level, "size": job.size, "seed": job.seed}


def told(run: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run depends on, for its file: cells of other settings are not taken for its own."""
    choices = ("seeds", "chosen_on", "points", "curve", "sigma_n", "relative", "missing")
    stages = {"consistency": ("staged", "joint"), "joint": ("joint",), "em": ("em",)}
    return {
        key: value for key, value in settings.items() if key not in choices and run in stages.get(key, (run,))
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = parser(__doc__, "runs/exactness")
    found.add_argument("--part", required=True, choices=list(MODULES))
    found.add_argument("--profile", default="two-core", choices=["two-core", "gpu"])
    add_choices(found)
    found.add_argument(
        "--curve", action="store_true", help="staged consistency for further sizes of the data, too"
    )
    return found.parse_args(arguments)


def add_choices(found: argparse.ArgumentParser) -> None:
    """--runs, --levels and --seeds: which cells."""
    found.add_argument("--runs", nargs="+", help="only these runs (default: all of the part)")
    found.add_argument(
        "--levels", nargs="+", type=float, help="only these noise levels or fractions missing; 0: clean"
    )
    found.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help="default: those that are reported; settings were chosen on others",
    )


def job_name(job: Job) -> str:
    """Names the file of a cell."""
    return f"{job.run}-{job.level:g}-n{job.size}-s{job.seed}"


def chosen(part: Part, settings: dict[str, Any], options: argparse.Namespace) -> Iterator[Job]:
    """The cells that the options ask for. Clean data has no level: its run is trained once, at level 0."""
    sizes = settings["points"] + (settings["curve"] if getattr(options, "curve", False) else [])
    levels = [0.0, *part.levels(settings)]
    for level, size, run in itertools.product(levels, sizes, options.runs or part.RUNS):
        wanted = options.levels is None or level in options.levels
        curve = size not in settings["points"]
        if wanted and (run == "clean") == (level == 0) and (run == "staged" or not curve):
            for seed in options.seeds or part.seeds(settings, level):
                yield Job(run, level, size, seed, settings)


def scores_table(cells: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Every score of every row: mean (standard deviation over seeds), number of seeds."""
    found = []
    for cell in cells:
        for row, scores in cell["rows"].items():
            cost = training_evaluations(row, cell["size"], settings)
            numbers = {k: v for k, v in scores.items() if isinstance(v, (int, float))}
            found.append((cell["level"], cell["size"], row, {**numbers, "training_evaluations": cost}))
    found.sort(key=lambda entry: entry[:3])

    def score(key: str) -> Any:
        def text(own: list[Any]) -> str:
            values = [scores[key] for *_, scores in own if key in scores]
            return mean_std(values) if values else ""

        return key, text

    keys = sorted({key for *_, scores in found for key in scores})
    rows = {
        "level": lambda entry: f"{entry[0]:g}",
        "data": lambda entry: str(entry[1]),
        "method": lambda entry: entry[2],
    }
    text = table(found, rows, [("seeds", lambda own: str(len(own))), *map(score, keys)])
    floors = [cell["floor"] for cell in cells if "floor" in cell]
    return f"{text}\n\nfloor, what as many draws of the truth score: {floors[0]}" if floors else text


if __name__ == "__main__":
    main()
