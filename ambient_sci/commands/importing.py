"""The command that makes priors of published checkpoints: import-prior."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ambient_sci.commands.common import (
    OverwriteOption,
    require,
)


@dataclass(kw_only=True)
class ImportPrior:
    """A prior from a published checkpoint: EDM's networks and baselines, Ambient Diffusion's.

    Reads .pkl network snapshots, .pt files and .safetensors without running anything in them. The prior
    answers what the published network answers, for images in [-1, 1]; networks that are shown a mask become
    mask-conditional priors.
    """

    file: Annotated[
        Path, Positional, arg(metavar="FILE", help="Checkpoint: .pkl, .pt, .pth or .safetensors.")
    ]
    out: Annotated[Path, arg(metavar="PRIOR", help="Folder of the prior to write.")]
    preconditioning: Annotated[
        Literal["edm", "vp", "ve", "iddpm", "ambient"] | None,
        arg(
            metavar="{edm,vp,ve,iddpm,ambient}",
            help="What surrounds the network, where the file holds tensors alone; ambient: EDM's, with a "
            "mask among the inputs.",
            help_behavior_hint="(default: what the file says)",
        ),
    ] = None
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Read, write, and say what it is."""
        from ambient_sci.priors import import_prior
        from ambient_sci.priors.given import class_count

        require(not self.out.is_file(), "--out", "a folder for the prior", f"the file {self.out}")
        require(
            self.overwrite or not self.out.exists() or not any(self.out.iterdir()),
            "--out",
            "a new folder, or --overwrite",
            f"{self.out}, which exists",
        )
        prior = import_prior(self.file, self.preconditioning)
        prior.save(self.out)
        print(f"prior: {self.out}, {prior!r}")
        classes = class_count(prior)
        if classes:
            print(
                f"note: told one of {classes} classes (generate --classes), which it was not trained to do "
                "without"
            )
