"""Pack a trained prior of this recipe, with its card, as one that ships with the library.

    python -m recipes.mri.ship --prior noisy --name brain64 [--profile two-core] [--runs runs/mri]
    [--out ambient_sci/priors/assets]

The card's numbers are read from the cells of the table; the prior and these cells must be there.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ambient_sci.data import MeasurementFile
from ambient_sci.errors import InputError
from ambient_sci.priors import NetworkPrior, load_prior
from ambient_sci.whole_files import write_text
from recipes.mri.priors import accelerations
from recipes.mri.profiles import load_profile
from recipes.mri.report import with_error
from recipes.mri.scans import Scans

#: Most bytes of a prior in the package.
LARGEST = 8_000_000


def main(arguments: list[str] | None = None) -> int:
    """Write the folder and, beside it, the card. Returns the exit status."""
    options = parse(arguments)
    try:
        profile = load_profile(options.profile)
        if options.prior not in profile["priors"]:
            raise InputError(
                f"--prior: expected one of {', '.join(profile['priors'])}, got {options.prior!r}"
            )
        entry, out = profile["priors"][options.prior], options.out / options.name
        if entry["kind"] not in ("noisy", "em"):
            raise InputError(
                "--prior: expected an unconditional prior from measurements alone, got one of kind "
                f"{entry['kind']}"
            )
        folder = options.runs / options.profile
        prior = packed(load_prior(folder / "priors" / options.prior), entry, profile)
        card = CARD.format(name=options.name, **facts(options.prior, entry, profile, prior, folder))
        size = sum(4 * t.numel() for t in prior.state_dict().values())
        if size > LARGEST:
            raise InputError(f"{options.prior}: expected at most {LARGEST} bytes of weights, got {size}")
        prior.save(out)
        write_text(options.out / f"{options.name}.md", card)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {size} bytes of weights")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="noisy")
    parser.add_argument("--name", default="brain64")
    parser.add_argument("--profile", default="two-core")
    parser.add_argument("--runs", type=Path, default=Path("runs/mri"))
    parser.add_argument("--out", type=Path, default=Path("ambient_sci/priors/assets"))
    return parser.parse_args(arguments)


def packed(prior: Any, entry: dict[str, Any], profile: dict[str, Any]) -> NetworkPrior:
    """``prior`` with a short description of what it was trained on."""
    if not isinstance(prior, NetworkPrior):
        raise InputError(f"--prior: expected a network, got {type(prior).__name__}")
    scans = profile["scans"]
    about = {
        "data": "Colin27, one person; real anatomy, simulated acquisition",
        "operator": "mri",
        "coils": scans["coils"],
        "noise_std": scans["noise_std"],
        "acceleration": accelerations(entry),
        "intensity": "99.9th percentile of the volume's magnitude = 1",
        "axes": "RAS; axial, coronal and sagittal slices",
        "licence": "Apache-2.0 (weights); see ambient_sci/data/assets/README.md for the images",
    }
    found = copy.deepcopy(prior)
    found.config = replace(found.config, about=about)
    return found


def training_scans(entry: dict[str, Any], profile: dict[str, Any], folder: Path) -> Path:
    """The measurements that the prior was trained on."""
    slices = profile["em"].get("slices") if entry["kind"] == "em" else None
    return Scans(profile["scans"], folder / "scans").training(accelerations(entry)[0], slices=slices)


def facts(
    name: str, entry: dict[str, Any], profile: dict[str, Any], prior: NetworkPrior, folder: Path
) -> dict[str, Any]:
    """What the card says in numbers, read from configuration and cells."""
    scans, training = profile["scans"], json.loads((folder / "priors" / f"{name}.json").read_text())
    rows = []
    for r in profile["test"]:
        cells = {
            key: folder / "cells" / f"{prior_name}--{method}--R{r:g}.json"
            for key, prior_name, method in (
                ("this prior", name, "mmps"),
                ("total variation", "classic", "tv"),
            )
        }
        if missing := [str(p) for p in cells.values() if not p.exists()]:
            raise InputError(f"the card needs the cells {', '.join(missing)}, which are not there")
        found = {k: json.loads(p.read_text()) for k, p in cells.items()}
        own = found["this prior"]
        rows.append(
            f"| {r:g} | {with_error(own['scores']['psnr'], 2)} | "
            f"{with_error(found['total variation']['scores']['psnr'], 2)} "
            f"| {with_error(own['scores']['ssim'], 3)} | {own['std_over_error']['mean']:.2f} "
            f"| {100 * own['held_out']['coverage']['80']['observed']:.0f} |"
        )
    with MeasurementFile(training_scans(entry, profile, folder)) as file:
        slices, people = len(file), ", ".join(dict.fromkeys(file.subjects))
    what = "fully sampled" if entry["kind"] == "noisy" else f"R = {entry['R']} undersampled"
    return {
        "what": what,
        "method": "Ambient loss" if entry["kind"] == "noisy" else "expectation maximisation",
        "seconds": training["seconds"],
        "parameters": sum(p.numel() for p in prior.parameters()),
        "noise": scans["noise_std"],
        "coils": scans["coils"],
        "lowest": prior.sigma_min,
        "rows": "\n".join(rows),
        "samples": profile["mmps"]["samples"],
        "slices": slices,
        "people": people,
        "tested": sum(own["slices"].values()),
        "machine": own["machine"],
        "profile": f"recipes/mri, prior `{name}`, seed {scans['seed']}",
    }


CARD = """# {name}: a prior of 64 x 64 px brain slices

An unconditional diffusion prior, `load_prior("pretrained:{name}")`, {parameters} parameters. It never saw a
clean image.

| | |
|---|---|
| learned from | {what} noisy MR scans of **one person** ({people}): {slices} axial, coronal and sagittal T1-weighted slices; real anatomy, simulated acquisition ({coils} coils, random smooth phase, sigma_y = {noise} per real channel) |
| images | complex, two channels; the 99.9th percentile of a volume's magnitude is 1; RAS axes |
| trained by | {profile}: {method}, {seconds:.0f} s (machine: {machine}) |
| noise levels | from {lowest:.3g} up: what is weaker was never seen; samplers stop there |
| licence | Apache-2.0. The images: `ambient_sci/data/assets/README.md` |

Judged on {tested} slices of **three other people**, two of them after contrast agent, {samples} posterior
samples (MMPS) of {coils}-coil scans with the same noise; mean and standard error over people:

| R | PSNR / dB | total variation, weight chosen with the truth | SSIM | std / error | 80 % intervals cover held-out rows, % |
|---|---|---|---|---|---|
{rows}

Limits. One person, one contrast, 64 px, simulated noise: a prior for trying things out, for tests and for
teaching. It is not for diagnosis, not for other contrasts or resolutions, and where anatomy differs from
Colin27's (lesions, contrast agent) its error bars are too narrow, by the factor in the column std / error.
"""


if __name__ == "__main__":
    raise SystemExit(main())
