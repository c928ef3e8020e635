"""How much of a difference between two rows of the digits' table is the luck of the draw?

    python -m recipes.exactness.spread [--rows "ambient truncated" staged staged@0.04] [--repeats 3]
    [--out runs/exactness]

Draws further sets of samples from the priors of the staged cells that are there and scores each: mean and
standard deviation over sets for each row, and of the difference between every row and the first one, whose
sets start from the same noise. "staged@0.04" stops at level .04.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ambient_sci import load_prior
from recipes.exactness.methods import draw, shown_and_level
from recipes.exactness.parts import load_settings
from recipes.grid import mean_std
from recipes.small_images import Scores


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=["ambient truncated", "staged"])
    parser.add_argument("--levels", nargs="+", type=float, help="only these noise levels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", default="two-core", choices=["two-core", "gpu"])
    parser.add_argument("--out", type=Path, default=Path("runs/exactness"))
    arguments = parser.parse_args()
    folder = arguments.out / arguments.profile / "digits"
    settings, score = load_settings(arguments.profile, "digits"), Scores(folder)
    for path in sorted(folder.glob("staged-*.json")):
        cell = json.loads(path.read_text())
        if arguments.levels is not None and cell["level"] not in arguments.levels:
            continue
        prior = load_prior(path.with_suffix(""))
        found: dict[str, list[float]] = {row: [] for row in arguments.rows}
        for repeat in range(1, arguments.repeats + 1):
            for row, scores in found.items():
                shown, low = shown_and_level(row, prior, cell["level"], settings)
                samples, _ = draw(shown, settings["samples"], low, settings, 100 * repeat + cell["seed"])
                scores.append(score(samples)["frechet"])
        for row, scores in found.items():
            print(f"{path.stem}: {row}: Frechet {mean_std(scores)}", flush=True)
        for row in arguments.rows[1:]:
            gaps = [b - a for a, b in zip(found[arguments.rows[0]], found[row], strict=True)]
            print(f"{path.stem}: {row} - {arguments.rows[0]}: {mean_std(gaps)}", flush=True)


if __name__ == "__main__":
    main()
