"""The command that trains a prior."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, arg

from ambient_sci.commands.common import (
    Device,
    MeasurementsArgument,
    find_device,
    main_process,
    require,
)

if TYPE_CHECKING:
    from ambient_sci.training import TrainConfig


@dataclass(kw_only=True)
class Train:
    """A diffusion prior from measurements alone.

    Complete data give an unconditional prior (for generate, and reconstruct with mmps); incomplete data a
    mask-conditional one (reconstruct with one-step), or by expectation maximisation (settings with "em") an
    unconditional one. SIGINT (Ctrl-C) and SIGTERM finish the step at hand, save, and exit; --resume goes on.
    """

    shared: ClassVar[bool] = True
    measurements: MeasurementsArgument
    out: Annotated[
        Path | None,
        arg(
            metavar="RUN",
            help="Run folder to write: prior/ (usable at any time), checkpoint/, log.jsonl.",
            help_behavior_hint="(required, except with --print-config)",
        ),
    ] = None
    config: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Settings as JSON or YAML, in the form that --print-config prints; what is left out is "
            "chosen for the data. Options of the command line win over the file.",
            help_behavior_hint="(default: none; with --resume, those of the run)",
        ),
    ] = None
    print_config: Annotated[
        bool,
        FlagCreatePairsOff,
        arg(help="Print all settings of this run as JSON, those that are chosen too, and train nothing."),
    ] = False
    max_steps: Annotated[
        int | None,
        arg(
            metavar="N",
            help="Stop after this many steps in all, >= 1.",
            help_behavior_hint="(default: the configuration's, else 20000 unless minutes are limited)",
        ),
    ] = None
    max_minutes: Annotated[
        float | None,
        arg(
            metavar="T",
            help="Stop after this many minutes of training in all, > 0; with --max-steps, at whichever "
            "comes first.",
            help_behavior_hint="(default: the configuration's, else none)",
        ),
    ] = None
    preset: Annotated[
        Literal["small", "medium", "large"] | None,
        arg(
            metavar="{small,medium,large}",
            help="Network by name: 0.7, 1.1 and 6 million parameters at 64 x 64. A step of medium takes 4 "
            "times as long as one of small, one of large 16 times; they learn more where there is time.",
            help_behavior_hint="(default: chosen by the images and the time there is)",
        ),
    ] = None
    channels: Annotated[
        tuple[int, ...] | None,
        arg(
            metavar="N ...",
            help="Network by its widths, in place of --preset: channels at full resolution, at half, at a "
            "quarter ..., multiples of 16. Images are padded to what can be halved for each after the first.",
            help_behavior_hint="(default: those of the preset)",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        arg(
            metavar="B",
            help="Images a step, >= 1, over all processes together.",
            help_behavior_hint="(default: chosen, 16)",
        ),
    ] = None
    lr: Annotated[
        float | None,
        arg(
            metavar="RATE",
            help="Learning rate at the start, > 0. Too high: the loss jumps or is not finite; too low: "
            "training is slow.",
            help_behavior_hint="(default: chosen for the network)",
        ),
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16", "auto"] | None,
        arg(
            metavar="{fp32,bf16,auto}",
            help="Of the network while it trains; auto is bf16 where the hardware multiplies it natively.",
            help_behavior_hint="(default: the configuration's, else fp32)",
        ),
    ] = None
    augmentations: Annotated[
        tuple[str, ...] | None,
        arg(
            metavar="NAME ...",
            help="Symmetries that the images have, to learn more from few: flip-horizontal, flip-vertical, "
            "transpose, phase (of complex images), gain (brightness); or none; or auto, those that the data "
            "do not contradict.",
            help_behavior_hint="(default: auto)",
        ),
    ] = None
    seed: Annotated[
        int | None,
        arg(
            metavar="N",
            help="Seed of initial weights, batches, noise and splits, an integer >= 0.",
            help_behavior_hint="(default: the configuration's, else 0)",
        ),
    ] = None
    device: Annotated[
        Device | None,
        arg(
            metavar="{auto,cpu,cuda}",
            help="Where to compute; auto is CUDA where there is one and else the CPU.",
            help_behavior_hint="(default: the configuration's, else auto)",
        ),
    ] = None
    init_from: Annotated[
        str | None,
        arg(
            metavar="PRIOR",
            help="Go on from this prior instead of random weights: a run folder, the folder of a prior, or "
            "pretrained:NAME, for images of its shape and scale.",
            help_behavior_hint="(default: the configuration's, else random weights)",
        ),
    ] = None
    resume: Annotated[
        bool, FlagCreatePairsOff, arg(help="Continue the run in RUN from its last checkpoint.")
    ] = False
    overwrite: Annotated[bool, FlagCreatePairsOff, arg(help="Replace an earlier run in RUN.")] = False

    def run(self) -> None:
        """Train and say what was learned."""
        from ambient_sci.training import fit

        require(not (self.resume and self.overwrite), "--resume", "either --resume or --overwrite", "both")
        if self.print_config:
            return self._print()
        out = self._folder()
        prior = fit(self.measurements, self._config(), out, resume=self.resume, overwrite=self.overwrite)
        print(f"training: {_last_line(out / 'log.jsonl')}")
        print(f"prior: {out / 'prior'}, {prior.conditioning}, noise levels from {prior.sigma_min:.3g} up")

    def started(self) -> bool:
        """Whether there is a run to resume."""
        return self.out is not None and (self.out / "config.json").exists()

    def _folder(self) -> Path:
        require(self.out is not None, "--out", "a run folder to write", "none")
        assert self.out is not None
        return self.out

    def _print(self) -> None:
        """The settings that this command would train with, with nothing left to choose."""
        from ambient_sci.training import explicit_config

        if not main_process():
            return
        config, because = explicit_config(self.measurements, self._config())
        if because:
            print(because, file=sys.stderr)
        print(json.dumps(config.to_dict(), indent=2))

    def _config(self) -> TrainConfig:
        """The configuration's file (or that of the run to resume), with the options of the command line in
        front."""
        from ambient_sci.training import RunFolder, TrainConfig

        if self.config is not None:
            config = TrainConfig.load(self.config)
        else:
            config = RunFolder(self._folder()).config if self.resume else TrainConfig()
        keys = ("max_steps", "max_minutes", "seed", "device", "batch_size", "init_from")
        given = {k: getattr(self, k) for k in keys} | {"learning_rate": self.lr}
        given |= {"network": self._network(), "precision": self._precision(config)}
        given["augmentations"] = self._augmentations()
        return replace(config, **{k: v for k, v in given.items() if v is not None})

    def _network(self) -> Any:
        from ambient_sci.priors.config import NetworkConfig

        both = f"--preset {self.preset} --channels"
        require(not (self.preset and self.channels), "--preset", "either --preset or --channels", both)
        require(self.channels != (), "--channels", "one width for each resolution", "none")
        return NetworkConfig(channels=self.channels) if self.channels else self.preset

    def _precision(self, config: TrainConfig) -> str | None:
        if self.precision != "auto":
            return self.precision
        from ambient_sci.precision import native_bfloat16

        return "bf16" if native_bfloat16(find_device(self.device or config.device)) else "fp32"

    def _augmentations(self) -> Any:
        """None: not given; "auto", or the names."""
        names = self.augmentations
        if names is None:
            return None
        alone = [name for name in ("none", "auto") if name in names]
        require(
            bool(names) and not (alone and len(names) > 1),
            "--augmentations",
            "names, or none, or auto",
            " ".join(names) or "nothing",
        )
        return "auto" if names == ("auto",) else () if alone else names


def _last_line(log: Path) -> str:
    """The end of the log in words."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if not lines:
        return "nothing left to do"
    try:
        last = json.loads(lines[-1])
        what = "held-out CRPS" if last["stage"] == "em" else "loss"
        return (
            f"stage {last['stage']}, {last['step']} steps in {last['seconds']:.0f} s, {what} "
            f"{last['loss']:.4g}"
        )
    except (ValueError, KeyError, TypeError):  # for people: nothing is computed from it
        return f"done; the last line of {log} is damaged"
