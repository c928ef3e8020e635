"""Commands that hand results on, that judge them, and that show the whole: export, evaluate, quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ambient_sci.commands.common import (
    CpuDeviceOption,
    DeviceOption,
    OverwriteOption,
    SeedOption,
    UnusedSeedOption,
    find_device,
    folder_of,
    require,
)


@dataclass(kw_only=True)
class Evaluate:
    """Scores, calibration and figures of a result, or distances of generated images from real ones.

    A result with --reference: PSNR, SSIM, NRMSE over people, and error bars against the truth. A result with
    --calibration: error bars without any truth, from the scans themselves. Images with --reference: distances
    between the two distributions.
    """

    file: Annotated[
        Path,
        Positional,
        arg(metavar="FILE.h5", help="Result (made by reconstruct) or images (made by generate)."),
    ]
    reference: Annotated[
        Path | None,
        arg(
            metavar="REF.h5",
            help="Clean images: of the same scans in the same order for a result, any of the same kind "
            "for generated ones.",
            help_behavior_hint="(this or --calibration is needed)",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        arg(
            metavar="M.h5",
            help="Measurement file that the result was made from.",
            help_behavior_hint="(this or --reference is needed)",
        ),
    ] = None
    prior: Annotated[
        Path | None,
        arg(
            metavar="RUN",
            help="With --calibration: run that made the result. Scans are sampled again from a part of "
            "their rows, and the "
            "others are predicted; without it only the rows that were used are tested.",
            help_behavior_hint="(default: none)",
        ),
    ] = None
    held_out_images: Annotated[
        int | None,
        arg(
            metavar="N",
            help="With --prior: scans that are sampled again, >= 1.",
            help_behavior_hint="(default: 16)",
        ),
    ] = None
    keep: Annotated[
        float | None,
        arg(
            metavar="P",
            help="With --prior: fraction of the rows to sample from, > 0 and < 1.",
            help_behavior_hint="(default: 0.8)",
        ),
    ] = None
    peak: Annotated[
        float | None,
        arg(
            metavar="VALUE",
            help="A result with --reference: full scale of PSNR and SSIM, > 0, in the units of the data.",
            help_behavior_hint="(default: the 99.9th percentile over each person's clean images)",
        ),
    ] = None
    out: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Folder for report.json and figures.",
            help_behavior_hint="(default: FILE_evaluation beside the file)",
        ),
    ] = None
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Evaluate, write, and print the summary."""
        from ambient_sci.evaluation.report import evaluate
        from ambient_sci.priors import load_prior

        options = self._options()
        out = self.out or self.file.parent / f"{self.file.stem}_evaluation"
        require(not out.is_file(), f"{out}", "a folder for the report, or nothing", "a file")
        report = evaluate(
            self.file,
            out,
            reference=self.reference,
            calibration=self.calibration,
            prior=None if self.prior is None else load_prior(self.prior, find_device(self.device)),
            seed=self.seed,
            overwrite=self.overwrite,
            **options,
        )
        print(report["text"])
        print(f"report: {out / 'report.json'}")
        for figure in report["figures"]:
            print(f"figure: {figure}")

    def _options(self) -> dict[str, float]:
        """The options that were given, checked; what would do nothing is refused."""
        given = {
            k: getattr(self, k) for k in ("held_out_images", "keep", "peak") if getattr(self, k) is not None
        }
        require(
            self.prior is None or self.calibration is not None,
            "--prior",
            "--calibration M.h5 with it",
            "none",
        )
        for name in ("held_out_images", "keep"):
            option = "--" + name.replace("_", "-")
            require(name not in given or self.prior is not None, option, "--prior RUN with it", "none")
        require(
            "peak" not in given or self.reference is not None, "--peak", "--reference REF.h5 with it", "none"
        )
        require(given.get("peak", 1) > 0, "--peak", "a number > 0", self.peak)
        require(given.get("held_out_images", 1) >= 1, "--held-out-images", "at least 1", self.held_out_images)
        require(0 < given.get("keep", 0.5) < 1, "--keep", "a fraction > 0 and < 1", self.keep)
        return given


@dataclass(kw_only=True)
class Export:
    """A result as NIfTI volumes, in the units and at the place of the images that were imported.

    Slices go back to their places under the volume's affine, multiplied by the scale that the import divided
    out; complex images become magnitudes. Voxel order is that of the import (RAS for NIfTI and DICOM).
    """

    file: Annotated[Path, Positional, arg(metavar="R.h5", help="Result (made by reconstruct).")]
    out: Annotated[
        Path,
        arg(
            metavar="PATH",
            help="FILE.nii.gz for a result of one volume; a folder for several, one NAME_WHAT.nii.gz each.",
        ),
    ]
    what: Annotated[
        Literal["mean", "std", "samples"],
        arg(
            help="Magnitude of the posterior mean; standard deviation of the magnitude over the "
            "samples; or all samples, along a "
            "fourth axis."
        ),
    ] = "mean"
    seed: UnusedSeedOption = 0
    device: CpuDeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Write the volumes and name them."""
        from ambient_sci.sampling.export import export_nifti
        from ambient_sci.sampling.result import ResultFile

        with ResultFile(self.file) as result:
            placed = bool(result.geometry.get("volumes"))
        with folder_of(self.out):
            paths = export_nifti(self.file, self.out, what=self.what, overwrite=self.overwrite)
        for path in paths:
            print(f"{self.what}: {path}")
        if not placed:
            print(
                "note: the measurements came without geometry; voxels are 1 mm and slices stacked by person"
            )


@dataclass(kw_only=True)
class Quickstart:
    """The main job on real anatomy: a prior from noisy scans, error bars for undersampled ones of others.

    Slices of real heads that ship with the package; phase, noise and undersampling are simulated. Minutes on
    two cores.
    """

    out: Annotated[
        Path, arg(metavar="FOLDER", help="Folder to work in: scans, prior, result, table and figure.")
    ]
    pretrained: Annotated[
        bool,
        FlagCreatePairsOff,
        arg(
            help="Train nothing: take the prior that ships with the package, learned from noisy scans alone."
        ),
    ] = False
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
        require(
            not (self.resume and self.pretrained),
            "--pretrained",
            "no --resume (there is no training)",
            "both",
        )
        run(
            self.out,
            seed=self.seed,
            overwrite=self.overwrite,
            resume=self.resume,
            pretrained=self.pretrained,
            device=self.device,
        )

    def started(self) -> bool:
        """Whether there is a training to resume."""
        return (self.out / "run" / "config.json").exists()
