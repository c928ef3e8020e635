"""Commands that use a prior: generate, reconstruct."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from ambient_sci.commands.common import (
    DeviceOption,
    MeasurementsArgument,
    NoPictureOption,
    OverwriteOption,
    RunArgument,
    SeedOption,
    SigmaMinOption,
    TileOverlapOption,
    check_outputs,
    find_device,
    folder_of,
    generator,
    main_process,
    require,
    sheet_beside,
)
from ambient_sci.errors import InputError

if TYPE_CHECKING:
    from ambient_sci.data import MeasurementFile
    from ambient_sci.priors import Labels, Prior


@dataclass(kw_only=True)
class Generate:
    """Images drawn from an unconditional prior, and a contact sheet of them (S.png beside S.h5)."""

    shared: ClassVar[bool] = True
    run_folder: RunArgument
    num: Annotated[int, arg(metavar="N", help="Number of images, >= 1.")]
    out: Annotated[Path, arg(metavar="S.h5", help="File of images to write (evaluate and inspect read it).")]
    steps: Annotated[
        int | None,
        arg(
            metavar="K",
            help="Noise levels of the sampler, >= 1; more is finer and slower. A one-step generator has one.",
            help_behavior_hint="(default: 40; 1 for a one-step generator)",
        ),
    ] = None
    sampler: Annotated[
        Literal["multistep", "heun", "ancestral"],
        arg(
            help="Probability flow, second order, with one (multistep) or two (heun) evaluations a "
            "level; or the reverse SDE, first order."
        ),
    ] = "heun"
    sigma_min: SigmaMinOption = None
    size: Annotated[
        tuple[int, int] | None,
        arg(
            metavar="H W",
            help="Height and width of the images; larger ones than the prior's are drawn in overlapping "
            "tiles.",
            help_behavior_hint="(default: the prior's)",
        ),
    ] = None
    tile_overlap: TileOverlapOption = None
    classes: Annotated[
        tuple[int, ...] | None,
        arg(
            metavar="C [C ...]",
            help="Classes of the images, in turn, from 0; for priors that are told one.",
            help_behavior_hint="(default: none told)",
        ),
    ] = None
    batch_size: Annotated[
        int, arg(metavar="B", help="Images at a time, >= 1: changes speed and memory, not the images.")
    ] = 64
    no_picture: NoPictureOption = False
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Draw, write, and say down to which noise level."""
        from ambient_sci.data import contact_sheet
        from ambient_sci.priors import load_prior
        from ambient_sci.sampling import generate_to_file
        from ambient_sci.sampling.sizes import fitted
        from ambient_sci.sampling.unconditional import generation_grid

        check_outputs(self.out, overwrite=self.overwrite)
        sheet = sheet_beside(self.out, self.no_picture, self.overwrite)
        require(self.num >= 1, "--num", "at least 1", self.num)
        require(self.steps is None or self.steps >= 1, "--steps", "at least 1 noise level", self.steps)
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        require(self.size is None or min(self.size) >= 1, "--size", "two numbers of at least 1", self.size)
        prior = load_prior(self.run_folder, find_device(self.device))
        prior = fitted(prior, (prior.shape[0], *(self.size or prior.shape[1:])), self.tile_overlap)
        grid = generation_grid(prior, self.steps, self.sigma_min, None, 7.0)
        low = float(grid[-1])
        with folder_of(self.out):
            generate_to_file(
                prior,
                self.num,
                self.out,
                steps=self.steps,
                sampler=self.sampler,
                sigma_min=self.sigma_min,
                batch_size=self.batch_size,
                given=_in_turn(prior, self.classes, self.num),
                history=f"generate {self.num} from {self.run_folder}: {self.sampler}, {len(grid)} levels "
                f"down to {low:.4g}, "
                f"seed {self.seed}",
                overwrite=self.overwrite,
                generator=generator(self.seed),
                progress=True,
                stale=() if sheet is None else (sheet,),
            )
        if not main_process():
            return
        if sheet is not None:
            contact_sheet(self.out, sheet, overwrite=self.overwrite)
        print(f"images: {self.out}" + (f", contact sheet: {sheet}" if sheet else ""))
        if len(grid) > 1 and prior.sigma_min > 0 and low >= prior.sigma_min:
            print(
                f"note: sampling stopped at noise level {low:.3g}, the lowest the prior has learned; detail "
                "weaker than that "
                "is averaged out"
            )


def _in_turn(prior: Prior, classes: tuple[int, ...] | None, num: int) -> Labels | None:
    """The classes of ``num`` images, in turn; what the prior has no use for is refused."""
    import torch

    from ambient_sci.priors.given import Labels, class_count

    if classes is None:
        return None
    known = class_count(prior)
    expected = f"classes from 0 to {known - 1}" if known else "none: this prior is told no class"
    require(bool(classes) and all(0 <= c < known for c in classes), "--classes", expected, classes)
    return Labels(torch.tensor(classes)[torch.arange(num) % len(classes)])


def _check_sampling(steps: int, batch_size: int) -> None:
    require(steps >= 2, "--steps", "at least 2 noise levels", steps)
    require(batch_size >= 1, "--batch-size", "at least 1", batch_size)


SAMPLER_OPTIONS = ("precision", "integrator", "final", "max_iterations", "tolerance")


@dataclass(kw_only=True)
class Reconstruct:
    """Mean, standard deviation and samples of the posterior of each measurement, and a picture of some.

    R.h5 holds what was computed, R.png beside it shows it.
    """

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
            help="Posterior samples of each image, >= 2 for a standard deviation.",
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
            help="mmps: what a sample is at the lowest level: the mean there, or a draw that restores the "
            "variance still open; auto "
            "draws where the levels stop early. The posterior mean averages means in any case.",
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
    indices: Annotated[
        str | None,
        arg(
            metavar="LIST",
            help="Only these samples of the file, counted from 0: numbers and ranges FIRST:END without END, "
            "like 0:8,12. The result remembers which, and evaluate compares them with theirs.",
            help_behavior_hint="(default: all)",
        ),
    ] = None
    tile_overlap: TileOverlapOption = None
    num: Annotated[
        int | None,
        arg(
            metavar="N",
            help="Only N samples, >= 1, evenly spread over the file: to try a prior.",
            help_behavior_hint="(default: all)",
        ),
    ] = None
    no_picture: NoPictureOption = False
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Reconstruct, write, and say how it went."""
        from ambient_sci.data import MeasurementFile
        from ambient_sci.priors import load_prior
        from ambient_sci.sampling import reconstruct_to_file
        from ambient_sci.sampling.describe import result_sheet
        from ambient_sci.sampling.samplers import POINT_ESTIMATES

        settings = self._settings()
        check_outputs(self.out, overwrite=self.overwrite, inputs=(self.measurements,))
        sheet = sheet_beside(self.out, self.no_picture, self.overwrite, (self.measurements,))
        device = find_device(self.device)
        prior = load_prior(self.run_folder, device)
        with MeasurementFile(self.measurements) as file:
            _check_same_data(self.run_folder, prior, file)
            indices = self._chosen(len(file))
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
                    indices=indices,
                    tile_overlap=self.tile_overlap,
                    **settings,
                )
            count = len(file) if indices is None else len(indices)
            of = "" if count == len(file) else f" of {len(file)}"
        if not main_process():
            return
        each = (
            "a point estimate"
            if self.sampler in POINT_ESTIMATES
            else f"{report['samples']} samples, mean and standard deviation"
        )
        print(f"result: {self.out}, {count}{of} images, {each} of each")
        if sheet is not None:
            result_sheet(self.out, sheet, measurements=self.measurements, overwrite=self.overwrite)
            print(f"picture: {sheet}")
        for note in report.get("notes", []):
            print(f"note: {note}")

    def _chosen(self, count: int) -> list[int] | None:
        """The samples that --indices or --num ask for; None: all."""
        from ambient_sci.sampling.subset import check_indices, evenly, parse_indices

        require(self.indices is None or self.num is None, "--num", "--indices or --num", "both")
        if self.num is not None:
            require(self.num >= 1, "--num", "at least 1", self.num)
            return evenly(self.num, count)
        return None if self.indices is None else list(check_indices(parse_indices(self.indices), count))

    def _settings(self) -> dict[str, Any]:
        """The options that were given, checked; what a sampler has no use for is refused."""
        from ambient_sci.sampling import POSTERIOR_SAMPLERS
        from ambient_sci.sampling.checks import sampler_options
        from ambient_sci.sampling.samplers import POINT_ESTIMATES

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
    """Refuse images of other channels, and masks of another operator than a mask-conditional prior was
    trained on."""
    require(
        prior.shape[0] == file.image_shape[0],
        f"{run}",
        f"a prior for images {tuple(file.image_shape)}, as measured in {file.path}, or of another size",
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
