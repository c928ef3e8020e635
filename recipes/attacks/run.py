"""Do training images come back from what is left of them? One command, table and figures.

    python -m recipes.attacks.run --part digits [--seeds 1] [--memorization runs/memorization]
    python -m recipes.attacks.run --part digits --prior NAME=RUN … --train T.h5 --held-out H.h5

The first takes the priors that recipes/memorization has trained; the second any unconditional ones. Each is
attacked by noise up to a level and by hiding the lower half (`ambient_sci.evaluation.memorization_attack`);
its plain samples are compared with their nearest training images. Held-out images are attacked in the same
way, and are compared in the same way.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.errors import InputError
from ambient_sci.evaluation import memorization_attack, memorization_score
from ambient_sci.evaluation.memorization_report import write_attack
from ambient_sci.priors import load_prior
from ambient_sci.sampling import generate
from recipes.attacks.report import write_report
from recipes.grid import Cell, Grid, fill, parser
from recipes.memorization import run as memorization
from recipes.memorization.cells import Job, jobs

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """A prior to be attacked.

    Attributes:
        name: of the prior.
        run: its run folder, or the prior itself.
        train: suspected images.
        held_out: images that it was not trained on.
        values: what black and white are; None: by the images.
    """

    name: str
    run: Path
    train: Tensor
    held_out: Tensor
    values: tuple[float, float] | None


def main(arguments: list[str] | None = None) -> None:
    """Attack the priors that have not been, then table and figures."""
    options = parse(arguments)
    settings = load_settings(options.profile, options.part)
    grid = Grid(options.out / options.profile / options.part)
    found = {target.name: target for target in targets(options, settings)}
    told = {key: value for key, value in settings.items() if key != "runs"}
    cells = [Cell(name, {"prior": name, "settings": told}) for name in found]
    if not options.table_only:
        grid.run(cells, lambda cell: work(found[cell.name], settings, grid.out, options.device))
    text = write_report(grid, list(found))
    print(text)
    if options.readme:
        fill(HERE / "README.md", f"{options.profile} {options.part}", text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = parser(__doc__, "runs/attacks")
    found.add_argument("--part", required=True, help="digits, faces; with --profile full: ffhq")
    found.add_argument("--profile", default="two-core", choices=["two-core", "full"])
    found.add_argument("--memorization", type=Path, default=Path("runs/memorization"))
    found.add_argument("--seeds", nargs="+", type=int, help="of the runs of recipes/memorization")
    found.add_argument("--prior", nargs="+", metavar="NAME=RUN", default=[], help="other priors instead")
    found.add_argument("--train", type=Path, help="what they were trained on")
    found.add_argument("--held-out", type=Path, help="what they were not trained on")
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


def targets(options: argparse.Namespace, settings: dict[str, Any]) -> list[Target]:
    """The priors to be attacked.

    Raises:
        InputError: none there.
    """
    if options.prior:
        return _given(options)
    asked = settings["runs"]
    trained = memorization.load_settings(options.profile, asked["part"])
    folder = options.memorization / options.profile / asked["part"]
    found = [
        _trained(job, folder)
        for job in jobs(trained, [asked["images"]], asked["sigma_n"], options.seeds)
        if job.last and (folder / f"{job.cell().name}.json").exists()
    ]
    if not found:
        raise InputError(
            f"{folder}: expected finished cells of recipes/memorization, found none; run "
            f"`python -m recipes.memorization.run --part {asked['part']} --images {asked['images']} --levels "
            f"{' '.join(f'{level:g}' for level in asked['sigma_n'])}` first"
        )
    return found


def _trained(job: Job, folder: Path) -> Target:
    data = job.data()
    name = ("DSM" if job.sigma_n == 0 else f"sigma_n-{job.sigma_n:g}") + f"-s{job.seed}"
    return Target(name, folder / job.run, data.train, data.held_out, (-1.0, 1.0))


def _given(options: argparse.Namespace) -> list[Target]:
    pairs = [text.partition("=") for text in options.prior]
    if not all(name and equals and path for name, equals, path in pairs) or not (
        options.train and options.held_out
    ):
        raise InputError("--prior: expected NAME=RUN with --train T.h5 and --held-out H.h5, got less")
    with ReferenceFile(options.train) as train, ReferenceFile(options.held_out) as held_out:
        images = train.images(slice(None)), held_out.images(slice(None))
    return [Target(name, Path(path), *images, None) for name, _, path in pairs]


def work(target: Target, settings: dict[str, Any], out: Path, device: str) -> dict[str, Any]:
    """Both attacks and plain sampling of a prior; values and figures go to a folder of its name."""
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    prior = load_prior(target.run, place)
    options: dict[str, Any] = {
        "extractor": settings["features"],
        "value_range": target.values,
        "batch_size": settings["batch_size"],
        "device": place,
    }
    told = {key: settings[key] for key in ("level", "hidden", "num", "samples", "steps")}
    attack = memorization_attack(prior, target.train, target.held_out, **told, **options)
    drawn = generate(
        prior,
        settings["plain"],
        steps=settings["plain_steps"],
        batch_size=settings["batch_size"],
        generator=torch.Generator().manual_seed(5000),
    )
    plain = memorization_score(drawn.cpu(), target.train, target.held_out, **options)
    write_attack(out / target.name, attack)
    near = plain.neighbours
    assert near.held_out is not None
    values = {"samples": near.similarity[:, 0], "held_out": near.held_out.similarity[:, 0]}
    save_file({key: v.contiguous() for key, v in values.items()}, out / target.name / "plain.safetensors")
    return {"attack": attack.report, "samples": plain.report}


if __name__ == "__main__":
    main()
