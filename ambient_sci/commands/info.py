"""The command that says what is here: versions, devices, what ships with the package, and what a file is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(kw_only=True)
class Info:
    """Versions, devices, packaged priors, samplers and installed extras; or what a file or folder is."""

    path: Annotated[
        Path | None,
        Positional,
        arg(
            metavar="PATH",
            help="A file or folder of the package: measurements, images, a result, a run, a prior, or "
            "pretrained:NAME.",
            help_behavior_hint="(default: none)",
        ),
    ] = None

    def run(self) -> None:
        """Print it."""
        from ambient_sci.installed import report, what_is

        lines = what_is(self.path) if self.path is not None else report()
        width = max(len(name) for name, _ in lines) + 2
        for name, value in lines:
            print(f"{name:<{width}}{value}")
