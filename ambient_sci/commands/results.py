"""Commands that hand results on, that judge them, and that show the whole: export, evaluate, quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ambient_sci.commands.common import (
    DeviceOption,
    OverwriteOption,
    SeedOption,
    find_device,
    folder_of,
    require,
)

#: Files of an export that are named one by one.
MOST_NAMED = 16


@dataclass(kw_only=True)
class Evaluate:
    """Scores, calibration and figures of a result, or distances of generated images from real ones.

    A result with --reference: PSNR, SSIM, NRMSE over people, and error bars against the truth. A result with
    --calibration: error bars without any truth, from the measurements themselves. Images with --reference:
    distances between the two distributions.
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
            help="Clean images: of the same measurements and order for a result, any of the same kind "
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
            help="With --prior: images that are sampled again, >= 1.",
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
    """Export a result in original units: as PNG, TIFF, numpy array, or NIfTI with its geometry.

    The suffix of --out decides: .png (one picture), .tif (a stack, with axes and resolution of the file that
    was imported), .npy, .nii or .nii.gz. Without a suffix it is a folder, of one file for each picture or
    volume. Complex images become magnitudes, except in .npy.
    """

    file: Annotated[Path, Positional, arg(metavar="R.h5", help="Result (made by reconstruct).")]
    out: Annotated[
        Path,
        arg(metavar="PATH", help="FILE.png, FILE.tif, FILE.npy, FILE.nii or FILE.nii.gz; or a folder."),
    ]
    what: Annotated[
        Literal["mean", "std", "samples", "error", "all"],
        arg(
            help="Posterior mean; standard deviation over the samples; the samples; distance of the mean "
            "from --reference; or all of these, in files of their own (FILE_mean.tif, ...)."
        ),
    ] = "mean"
    reference: Annotated[
        Path | None,
        arg(
            metavar="REF.h5",
            help="Clean images, for --what error.",
            help_behavior_hint="(default: none)",
        ),
    ] = None
    format: Annotated[
        Literal["png", "tif", "npy", "nii", "nii.gz"] | None,
        arg(
            metavar="{png,tif,npy,nii,nii.gz}",
            help="Of the files in a folder.",
            help_behavior_hint="(default: volumes NIfTI, 8-bit pictures PNG, others TIFF)",
        ),
    ] = None
    bits: Annotated[
        Literal[8, 16, 32] | None,
        arg(
            metavar="{8,16,32}",
            help="Of PNG and TIFF; 32 is floating point. Fewer than needed: grey levels are spread over a "
            "window, which is printed.",
            help_behavior_hint="(default: as the pictures came; std and error 32 in TIFF)",
        ),
    ] = None
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Write the files and name them."""
        from ambient_sci.sampling.export import export

        with folder_of(self.out):
            exported = export(
                self.file,
                self.out,
                what=self.what,
                format=self.format,
                reference=self.reference,
                bits=self.bits,
                overwrite=self.overwrite,
            )
        for what, path in exported.files[:MOST_NAMED]:
            print(f"{what}: {path}")
        if len(exported.files) > MOST_NAMED:
            print(f"and {len(exported.files) - MOST_NAMED} more files")
        for note in exported.notes:
            print(f"note: {note}")


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
