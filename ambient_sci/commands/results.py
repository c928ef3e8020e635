"""Commands that judge results and that show the whole: evaluate, quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from ambient_sci.commands.common import DeviceOption, SeedOption, require


@dataclass(kw_only=True)
class Quickstart:
    """The main job on real anatomy: noisy scans to a prior, and from it undersampled scans of other people to error bars.

    Slices of real heads that ship with the package; phase, noise and undersampling are simulated. Minutes on two cores.
    """

    out: Annotated[
        Path, arg(metavar="FOLDER", help="Folder to work in: scans, prior, result, table and figure.")
    ]
    resume: Annotated[bool, FlagCreatePairsOff, arg(help="Continue an interrupted quickstart.")] = False
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: Annotated[bool, FlagCreatePairsOff, arg(help="Start anew in a folder that is not empty.")] = (
        False
    )

    def run(self) -> None:
        """Run it."""
        from ambient_sci.quickstart import run

        require(not (self.resume and self.overwrite), "--resume", "either --resume or --overwrite", "both")
        run(self.out, seed=self.seed, overwrite=self.overwrite, resume=self.resume, device=self.device)
