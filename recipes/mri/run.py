"""The Ambient MRI study: priors from noisy and undersampled scans, reconstruction at several accelerations. One command, one table.

    python recipes/mri/run.py --profile two-core [--out runs/mri] [--train em-R4 noisy ...] [--test 4] [--cells 'em-*'] [--table-only]

Every prior is a run folder, every cell a JSON file; what is there is not made again, and what was interrupted continues. Started
twice, the command shares the work: each process takes the next prior (with its cells) that no other has in hand.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import priors as training  # noqa: E402
from ablations import ARMS, run_ablation  # noqa: E402
from cells import Cell, all_cells, chosen, run_cell  # noqa: E402
from profiles import load_profile  # noqa: E402
from report import write_report  # noqa: E402
from scans import Scans, locked  # noqa: E402

from ambient_sci.errors import InputError  # noqa: E402
from ambient_sci.whole_files import write_json  # noqa: E402

#: A piece of work of one process: a name, files that are its result, and what makes those that are missing.
Job = tuple[str, list[Path], Callable[[], None]]


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, then the table and the figures. Returns the exit status."""
    options = parse(arguments)
    try:
        profile = load_profile(options.profile)
        out = options.out / options.profile
        (out / "cells").mkdir(parents=True, exist_ok=True)
        if not options.table_only:
            work(jobs(options, profile, out), out)
        print(write_report(out, profile))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="two-core", help="a profile of config.yaml")
    parser.add_argument(
        "--cells", nargs="+", metavar="PATTERN", help="only cells with such names, e.g. 'em-*--R4'"
    )
    parser.add_argument(
        "--train", nargs="+", metavar="PATTERN", help="only these priors ('classic': classic methods)"
    )
    parser.add_argument(
        "--test", nargs="+", type=float, metavar="R", help="only these accelerations of test scans"
    )
    parser.add_argument(
        "--ablations", choices=["yes", "no", "only"], default="yes", help="ablations of the k-space loss"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("runs/mri"))
    parser.add_argument(
        "--table-only", action="store_true", help="table and figures of what there is; run nothing"
    )
    return parser.parse_args(arguments)


def jobs(options: argparse.Namespace, profile: dict[str, Any], out: Path) -> list[Job]:
    """What there is to do, longest first among the priors, as far as the filters let pass."""
    found: list[Job] = []
    if options.ablations != "only":
        scans = Scans(profile["scans"], out / "scans")
        cells = chosen(all_cells(profile), options.cells, options.train, options.test)
        if not cells:
            raise InputError("--cells, --train, --test: expected filters that let some cell pass, got none")
        for name in dict.fromkeys(c.prior for c in cells):
            own = [c for c in cells if c.prior == name]
            paths = [out / "cells" / f"{c.name}.json" for c in own]
            found.append(
                (name or "classic", paths, _cells_job(name, own, profile, scans, out, options.device))
            )
        found.sort(key=lambda job: -profile["priors"].get(job[0], {}).get("order", 0))
    filtered = options.cells or options.train or options.test
    if profile.get("ablation") and (
        options.ablations == "only" or (options.ablations == "yes" and not filtered)
    ):
        (out / "ablations").mkdir(exist_ok=True)
        for seed in profile["ablation"]["seeds"]:
            for arm in ARMS:
                path = out / "ablations" / f"{arm}-s{seed}.json"
                found.append(
                    (
                        f"ablation-{arm}-s{seed}",
                        [path],
                        _ablation_job(arm, seed, profile, path, options.device),
                    )
                )
    return found


def _cells_job(
    name: str | None, cells: list[Cell], profile: dict[str, Any], scans: Scans, out: Path, device: str
) -> Callable[[], None]:
    def job() -> None:
        prior = None if name is None else training.train(name, profile, scans, out / "priors", device)
        for cell in cells:
            path = out / "cells" / f"{cell.name}.json"
            if path.exists():
                continue
            say(cell.name)
            begun = time.monotonic()
            found = run_cell(cell, prior, profile, scans.test(cell.acceleration), out / "cells", device)
            write_json(path, {**found, "machine": machine(), "seconds": round(time.monotonic() - begun, 1)})

    return job


def _ablation_job(
    arm: str, seed: int, profile: dict[str, Any], path: Path, device: str
) -> Callable[[], None]:
    def job() -> None:
        begun = time.monotonic()
        found = run_ablation(arm, seed, profile, path.parent, device)
        write_json(path, {**found, "machine": machine(), "seconds": round(time.monotonic() - begun, 1)})

    return job


def work(todo: list[Job], out: Path) -> None:
    """Every job that is not done, except while another process has it in hand; at the end, wait for those."""
    for wait in (False, True):
        for name, job in missing(todo):
            with locked(out / f".{name}.lock", wait=wait) as held:
                if held and name in dict(missing(todo)):
                    say(name)
                    job()


def missing(todo: list[Job]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Jobs of which some result is not there."""
    yield from ((name, job) for name, paths, job in todo if not all(p.exists() for p in paths))


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def machine() -> str:
    """Where a number was measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    raise SystemExit(main())
