"""Commands around a prior: train, generate, reconstruct."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, arg

from ambient_sci.commands.common import (
    Device,
    DeviceOption,
    MeasurementsArgument,
    OverwriteOption,
    RunArgument,
    SeedOption,
    SigmaMinOption,
    check_outputs,
    find_device,
    folder_of,
    generator,
    main_process,
    require,
)
from ambient_sci.errors import InputError

if TYPE_CHECKING:
    from ambient_sci.data import MeasurementFile
    from ambient_sci.priors import Prior
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
        Path,
        arg(metavar="RUN", help="Run folder to write: prior/ (usable at any time), checkpoint/, log.jsonl."),
    ]
    config: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Settings as JSON or YAML, in the form of a run's config.json; what is left out takes "
            "its default.",
            help_behavior_hint="(default: the defaults; with --resume, those of the run)",
        ),
    ] = None
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
    resume: Annotated[
        bool, FlagCreatePairsOff, arg(help="Continue the run in RUN from its last checkpoint.")
    ] = False
    overwrite: Annotated[bool, FlagCreatePairsOff, arg(help="Replace an earlier run in RUN.")] = False

    def run(self) -> None:
        """Train and say what was learned."""
        from ambient_sci.training import fit

        require(not (self.resume and self.overwrite), "--resume", "either --resume or --overwrite", "both")
        prior = fit(self.measurements, self._config(), self.out, resume=self.resume, overwrite=self.overwrite)
        print(f"training: {_last_line(self.out / 'log.jsonl')}")
        print(
            f"prior: {self.out / 'prior'}, {prior.conditioning}, noise levels from {prior.sigma_min:.3g} up"
        )

    def started(self) -> bool:
        """Whether there is a run to resume."""
        return (self.out / "config.json").exists()

    def _config(self) -> TrainConfig:
        """The configuration's file (or that of the run to resume), with the options of the command line in
        front."""
        from ambient_sci.training import RunFolder, TrainConfig

        if self.config is not None:
            config = TrainConfig.load(self.config)
        else:
            config = RunFolder(self.out).config if self.resume else TrainConfig()
        given = {k: getattr(self, k) for k in ("max_steps", "max_minutes", "seed", "device")}
        return replace(config, **{k: v for k, v in given.items() if v is not None})


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


@dataclass(kw_only=True)
class Generate:
    """Images drawn from an unconditional prior, and a contact sheet of them (S.png beside S.h5)."""

    shared: ClassVar[bool] = True
    run_folder: RunArgument
    num: Annotated[int, arg(metavar="N", help="Number of images, >= 1.")]
    out: Annotated[Path, arg(metavar="S.h5", help="File of images to write (evaluate and inspect read it).")]
    steps: Annotated[
        int,
        arg(
            metavar="K",
            help="Noise levels of the sampler, >= 1; more is finer and slower. 1: one evaluation at the "
            "highest level, for one-step "
            "generators.",
        ),
    ] = 40
    sampler: Annotated[
        Literal["multistep", "heun", "ancestral"],
        arg(
            help="Probability flow, second order, with one (multistep) or two (heun) evaluations a "
            "level; or the reverse SDE, first order."
        ),
    ] = "heun"
    sigma_min: SigmaMinOption = None
    batch_size: Annotated[
        int, arg(metavar="B", help="Images at a time, >= 1: changes speed and memory, not the images.")
    ] = 64
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Draw, write, and say down to which noise level."""
        from ambient_sci.data import contact_sheet
        from ambient_sci.priors import load_prior
        from ambient_sci.sampling import generate_to_file
        from ambient_sci.sampling.unconditional import generation_grid

        check_outputs(self.out, overwrite=self.overwrite)
        sheet = self.out.with_suffix(".png")
        require(sheet != self.out, "--out", "a name like S.h5 (S.png will be the contact sheet)", self.out)
        check_outputs(sheet, overwrite=self.overwrite)
        require(self.num >= 1, "--num", "at least 1", self.num)
        require(self.steps >= 1, "--steps", "at least 1 noise level", self.steps)
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        prior = load_prior(self.run_folder, find_device(self.device))
        low = float(generation_grid(prior, self.steps, self.sigma_min, None, 7.0)[-1])
        with folder_of(self.out):
            generate_to_file(
                prior,
                self.num,
                self.out,
                steps=self.steps,
                sampler=self.sampler,
                sigma_min=self.sigma_min,
                batch_size=self.batch_size,
                history=f"generate {self.num} from {self.run_folder}: {self.sampler}, {self.steps} levels "
                f"down to {low:.4g}, "
                f"seed {self.seed}",
                overwrite=self.overwrite,
                generator=generator(self.seed),
                progress=True,
                stale=(sheet,),
            )
        if not main_process():
            return
        contact_sheet(self.out, sheet, overwrite=self.overwrite)
        print(f"images: {self.out}, contact sheet: {sheet}")
        if self.steps > 1 and prior.sigma_min > 0 and low >= prior.sigma_min:
            print(
                f"note: sampling stopped at noise level {low:.3g}, the lowest the prior has learned; detail "
                "weaker than that "
                "is averaged out"
            )


def _check_sampling(steps: int, batch_size: int) -> None:
    require(steps >= 2, "--steps", "at least 2 noise levels", steps)
    require(batch_size >= 1, "--batch-size", "at least 1", batch_size)


SAMPLER_OPTIONS = ("precision", "integrator", "final", "max_iterations", "tolerance")


@dataclass(kw_only=True)
class Reconstruct:
    """Posterior mean, standard deviation and samples of every scan in a measurement file."""

    shared: ClassVar[bool] = True
    run_folder: RunArgument
    measurements: MeasurementsArgument
    out: Annotated[Path, arg(metavar="R.h5", help="Result file to write.")]
    sampler: Annotated[
        str,
        arg(
            metavar="NAME",
            help="For unconditional priors: mmps (moment matching), daps, smc (exact in the limit, a "
            "reference), pnp-dm, "
            "pigdm, dps. For mask-conditional ones: a-dps, one-step (a point estimate without error bars).",
        ),
    ] = "mmps"
    samples: Annotated[
        int | None,
        arg(
            metavar="S",
            help="Posterior samples of each scan, >= 2 for a standard deviation.",
            help_behavior_hint="(default: 8)",
        ),
    ] = None
    steps: Annotated[
        int | None,
        arg(
            metavar="K",
            help="Noise levels of the sampler, >= 2; more is finer and slower.",
            help_behavior_hint="(default: the sampler's; mmps 14)",
        ),
    ] = None
    sigma_min: SigmaMinOption = None
    batch_size: Annotated[
        int | None,
        arg(
            metavar="B",
            help="Samples at a time, >= 1: changes speed and memory, not the samples.",
            help_behavior_hint="(default: what fits into memory)",
        ),
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16", "auto"] | None,
        arg(
            metavar="{fp32,bf16,auto}",
            help="Of the network; auto is bf16 where the hardware multiplies it natively. Not for one-step.",
            help_behavior_hint="(default: fp32)",
        ),
    ] = None
    integrator: Annotated[
        Literal["multistep", "heun", "ancestral"] | None,
        arg(
            metavar="{multistep,heun,ancestral}",
            help="mmps, pigdm, dps: probability flow with one or two evaluations a level; or the "
            "reverse SDE, first order.",
            help_behavior_hint="(default: mmps multistep, else ancestral)",
        ),
    ] = None
    final: Annotated[
        Literal["auto", "mean", "draw"] | None,
        arg(
            metavar="{auto,mean,draw}",
            help="mmps: what to return at the lowest level: its mean, or a draw that restores the "
            "variance still open there; auto "
            "draws where the levels stop early.",
            help_behavior_hint="(default: auto)",
        ),
    ] = None
    max_iterations: Annotated[
        int | None,
        arg(
            metavar="N",
            help="mmps: products with the denoiser's Jacobian in one linear solve, >= 1.",
            help_behavior_hint="(default: 5)",
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        arg(
            metavar="T",
            help="mmps: relative residual at which a linear solve stops, > 0.",
            help_behavior_hint="(default: 0.01)",
        ),
    ] = None
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Reconstruct, write, and say how it went."""
        from ambient_sci.data import MeasurementFile
        from ambient_sci.priors import load_prior
        from ambient_sci.sampling import reconstruct_to_file
        from ambient_sci.sampling.reconstruct import POINT_ESTIMATES

        settings = self._settings()
        check_outputs(self.out, overwrite=self.overwrite, inputs=(self.measurements,))
        device = find_device(self.device)
        prior = load_prior(self.run_folder, device)
        with MeasurementFile(self.measurements) as file:
            _check_same_data(self.run_folder, prior, file)
            with folder_of(self.out):
                report = reconstruct_to_file(
                    prior,
                    file,
                    self.out,
                    sampler=self.sampler,
                    batch_size=self.batch_size,
                    overwrite=self.overwrite,
                    generator=generator(self.seed),
                    progress=True,
                    device=device,
                    **settings,
                )
            count = len(file)
        if not main_process():
            return
        each = (
            "a point estimate"
            if self.sampler in POINT_ESTIMATES
            else f"{report['samples']} samples, mean and standard deviation"
        )
        print(f"result: {self.out}, {count} scans, {each} of each")
        for note in report.get("notes", []):
            print(f"note: {note}")

    def _settings(self) -> dict[str, Any]:
        """The options that were given, checked; what a sampler has no use for is refused."""
        from ambient_sci.sampling import POSTERIOR_SAMPLERS
        from ambient_sci.sampling.reconstruct import POINT_ESTIMATES, sampler_options

        names = ("samples", "steps", "sigma_min", *SAMPLER_OPTIONS)
        given = {k: getattr(self, k) for k in names if getattr(self, k) is not None}
        require(
            self.sampler in POSTERIOR_SAMPLERS,
            "--sampler",
            f"one of {', '.join(POSTERIOR_SAMPLERS)}",
            self.sampler,
        )
        if self.sampler in POINT_ESTIMATES and given:
            options = ", ".join("--" + k.replace("_", "-") for k in given)
            raise InputError(
                f"--sampler {self.sampler}: a point estimate draws no samples; expected none of {options}"
            )
        known = sampler_options(self.sampler)
        foreign = [f"--{k.replace('_', '-')}" for k in SAMPLER_OPTIONS if k in given and k not in known]
        if foreign:
            raise InputError(
                f"--sampler {self.sampler}: expected none of its options to be {', '.join(foreign)}"
            )
        require(given.get("samples", 1) >= 1, "--samples", "at least 1", self.samples)
        _check_sampling(given.get("steps", 2), self.batch_size or 1)
        require(given.get("max_iterations", 1) >= 1, "--max-iterations", "at least 1", self.max_iterations)
        require(given.get("tolerance", 1) > 0, "--tolerance", "a number > 0", self.tolerance)
        return given


def _check_same_data(run: Path, prior: Prior, file: MeasurementFile) -> None:
    """Refuse images of another shape, and masks of another operator than a mask-conditional prior was trained
    on."""
    require(
        tuple(prior.shape) == tuple(file.image_shape),
        f"{run}",
        f"a prior for images {tuple(file.image_shape)}, as measured in {file.path}",
        f"one for {tuple(prior.shape)}",
    )
    if prior.conditioning == "unconditional":
        return
    for description in (run / "run.json", run.parent / "run.json"):
        if description.is_file():
            trained_on = _operator_of(description)
            require(
                trained_on == file.operator_name,
                f"{file.path}",
                f"measurements by {trained_on}, which the mask-conditional prior was trained on",
                file.operator_name,
            )
            return


def _operator_of(description: Path) -> str:
    try:
        return json.loads(description.read_text())["data"]["operator"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{description}: expected the description of a training run, got a damaged file"
        ) from None
