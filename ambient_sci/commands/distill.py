"""Command distill: a one-step generator from a prior and its measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import FlagCreatePairsOff, arg

from ambient_sci.commands.common import Device, MeasurementsArgument, RunArgument, require

if TYPE_CHECKING:
    from ambient_sci.training import Selection, TrainConfig


@dataclass(kw_only=True)
class Distill:
    """A generator that draws an image in one call, made of a prior and the measurements it was learned from.

    Most is to be had from a prior that has learned what lies below the noise of its data (settings with
    "consistency", mode "staged"). Ctrl-C finishes the step at hand and saves; --resume goes on.
    """

    shared: ClassVar[bool] = True
    run_folder: RunArgument
    measurements: MeasurementsArgument
    out: Annotated[
        Path,
        arg(
            metavar="GEN", help="Run folder to write; GEN/prior is the generator, which generate draws from."
        ),
    ]
    config: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help='Settings as JSON or YAML, as for train, with "distillation" for what is special here.',
            help_behavior_hint="(default: the defaults; with --resume, those of the run)",
        ),
    ] = None
    max_steps: Annotated[int | None, arg(metavar="N", help="Stop after this many steps in all, >= 1.")] = None
    max_minutes: Annotated[
        float | None, arg(metavar="T", help="Stop after this many minutes of training in all, > 0.")
    ] = None
    select_every: Annotated[
        int | None,
        arg(
            metavar="N",
            help="Keep the state whose images, measured like the data, are most like them; judged every N "
            "steps. Needs no clean images.",
            help_behavior_hint="(default: keep the last state)",
        ),
    ] = None
    select_num: Annotated[int, arg(metavar="N", help="Images to judge by, >= 2.")] = 2000
    seed: Annotated[int | None, arg(metavar="N", help="Seed of everything drawn, an integer >= 0.")] = None
    device: Annotated[
        Device | None,
        arg(metavar="{auto,cpu,cuda}", help="Where to compute; auto is CUDA where there is one."),
    ] = None
    resume: Annotated[
        bool, FlagCreatePairsOff, arg(help="Continue the run in GEN from its last checkpoint.")
    ] = False
    overwrite: Annotated[bool, FlagCreatePairsOff, arg(help="Replace an earlier run in GEN.")] = False

    def run(self) -> None:
        """Distil, and say what came out."""
        from ambient_sci.priors import load_prior
        from ambient_sci.training import distill

        require(not (self.resume and self.overwrite), "--resume", "either --resume or --overwrite", "both")
        prior = load_prior(self.run_folder)
        generator = distill(
            prior,
            self.measurements,
            self._config(),
            self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            selection=self._selection(),
        )
        print(
            f"generator: {self.out / 'prior'}, one call at level {generator.sigma_max:.4g}; "
            f"draw images with: ambient-sci generate {self.out} --num 16 --out samples.h5"
        )

    def started(self) -> bool:
        """Whether there is a run to resume."""
        return (self.out / "config.json").exists()

    def _selection(self) -> Selection | None:
        """How states are judged, if they are."""
        if self.select_every is None:
            return None
        from ambient_sci.data import MeasurementFile
        from ambient_sci.evaluation import ProximalScore
        from ambient_sci.training import Selection

        require(self.select_every >= 1, "--select-every", "at least 1 step", self.select_every)
        score = ProximalScore(MeasurementFile(self.measurements), num=self.select_num)
        return Selection(score, every=self.select_every, num=len(score))

    def _config(self) -> TrainConfig:
        """The configuration's file (or that of the run to resume), with the options of the command line in
        front."""
        from ambient_sci.training import DistillConfig, RunFolder, TrainConfig

        if self.config is not None:
            config = TrainConfig.load(self.config)
        else:
            config = RunFolder(self.out).config if self.resume else TrainConfig()
        if config.distillation is None:
            config = replace(config, distillation=DistillConfig())
        given = {k: getattr(self, k) for k in ("max_steps", "max_minutes", "seed", "device")}
        return replace(config, **{k: v for k, v in given.items() if v is not None})
