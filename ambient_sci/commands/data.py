"""Commands that make and show measurement files: simulate, import, inspect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ambient_sci.commands.common import (
    CpuDeviceOption,
    OverwriteOption,
    SeedOption,
    UnusedSeedOption,
    check_outputs,
    require,
)

Plane = Literal["axial", "coronal", "sagittal"]
NewFile = Annotated[Path, arg(metavar="M.h5", help="Measurement file to write.")]
Size = Annotated[
    int | None,
    arg(
        metavar="PIXELS",
        help="Resize images to squares of this many pixels (zero-padded, anti-aliased), >= 1.",
        help_behavior_hint="(default: leave their size)",
    ),
]
PlaneOption = Annotated[Plane, arg(help="Which slices of a volume are taken.")]
MinForeground = Annotated[
    float,
    arg(
        metavar="FRACTION",
        help="Take slices of a volume with more foreground than this fraction of their pixels, 0 to 1.",
    ),
]


@dataclass(kw_only=True)
class Simulate:
    """Noisy, incomplete measurements from clean images: y = M (T x + sigma n), drawn once and stored.

    The clean images go to a file of their own, for evaluation only; training never sees it.
    """

    images: Annotated[
        str,
        Positional,
        arg(
            metavar="IMAGES",
            help="Clean images: .npy, .npz, .nii, .nii.gz, a picture, a folder or zip of pictures, a "
            "folder of volumes, a "
            "reference file .h5, or brains:train / brains:test (slices that ship with the package).",
        ),
    ]
    operator: Annotated[
        Literal["mri", "masking", "identity"],
        arg(help="What measures: coils and Fourier transform, missing pixels, or noise alone."),
    ]
    noise_std: Annotated[
        float,
        arg(
            metavar="SIGMA",
            help="Standard deviation of the noise, >= 0, per real channel, in the units of the images "
            "(pictures and volumes "
            "have peak 1); a complex value has sqrt(2) times that.",
        ),
    ]
    out: NewFile
    reference: Annotated[Path, arg(metavar="REF.h5", help="File of clean images to write.")]
    acceleration: Annotated[
        float | None,
        arg(
            metavar="R",
            help="MRI: measure one k-space line in R, >= 1.",
            help_behavior_hint="(default: 1, fully sampled)",
        ),
    ] = None
    coils: Annotated[
        int,
        arg(
            metavar="N", help="MRI: simulated receive coils, >= 1; 1 is a single coil of uniform sensitivity."
        ),
    ] = 1
    vary_coils: Annotated[
        bool, FlagCreatePairsOff, arg(help="MRI: turn the coil array by a random angle for every image.")
    ] = False
    phase: Annotated[
        Literal["smooth", "none"] | None,
        arg(
            metavar="{smooth,none}",
            help="Phase that magnitude images get: a smooth random one, or none.",
            help_behavior_hint="(default: smooth for MRI, else none)",
        ),
    ] = None
    keep: Annotated[
        float | None,
        arg(
            metavar="P",
            help="Masking (or a bernoulli design): probability that a pixel is measured, > 0 and <= 1.",
            help_behavior_hint="(needed by bernoulli designs)",
        ),
    ] = None
    design: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="How masks are drawn. Masking: bernoulli, bernoulli-entries (each channel by itself), "
            "box. MRI: lines-uniform, "
            "lines-variable, lines-bernoulli, equispaced, poisson, bernoulli.",
            help_behavior_hint="(default: bernoulli for masking, lines-uniform for MRI)",
        ),
    ] = None
    acs: Annotated[
        int | None,
        arg(
            metavar="LINES",
            help="MRI: calibration lines at the centre of k-space, always measured, >= 0.",
            help_behavior_hint="(default: by the design)",
        ),
    ] = None
    box: Annotated[
        tuple[int, int] | None,
        arg(
            metavar="H W",
            help="Design box: height and width of the missing box, pixels.",
            help_behavior_hint="(needed by the design box)",
        ),
    ] = None
    shared_mask: Annotated[
        bool, FlagCreatePairsOff, arg(help="One mask for all images instead of one for each.")
    ] = False
    size: Size = None
    plane: PlaneOption = "axial"
    min_foreground: MinForeground = 0.0
    seed: SeedOption = 0
    device: CpuDeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Simulate, write both files and say so."""
        from ambient_sci.data import simulate

        check_outputs(self.out, self.reference, overwrite=self.overwrite, inputs=(Path(self.images),))
        check_fraction(self.min_foreground)
        simulate(
            self.images,
            self.operator,
            self.out,
            self.reference,
            noise_std=self.noise_std,
            acceleration=self.acceleration,
            coils=self.coils,
            phase=self.phase,
            keep=self.keep,
            design=self.design,
            acs=self.acs,
            box=self.box,
            shared_mask=self.shared_mask,
            vary_coils=self.vary_coils,
            size=self.size,
            plane=self.plane,
            min_foreground=self.min_foreground,
            seed=self.seed,
            overwrite=self.overwrite,
        )
        print(f"measurements: {self.out}")
        print(f"clean images: {self.reference} (for evaluation only; training has no use for it)")


@dataclass(kw_only=True)
class Import:
    """A measurement file from data that others wrote: images with noise in them, or raw MR scans.

    Images: npy, npz, pictures (folder or zip), NIfTI and what else nibabel reads, DICOM. Raw scans: fastMRI
    and ISMRMRD HDF5, BART cfl/hdr, npz with kspace; one file, or a folder of one kind.
    """

    source: Annotated[str, Positional, arg(metavar="SOURCE", help="File or folder to import.")]
    out: NewFile
    noise_std: Annotated[
        float | None,
        arg(
            metavar="SIGMA",
            help="Standard deviation of the noise, >= 0, per real channel.",
            help_behavior_hint="(default: estimated, and its standard error recorded)",
        ),
    ] = None
    noise_units: Annotated[
        Literal["scaled", "original"],
        arg(
            help="Units of --noise-std: those of the stored, scaled data, or the original ones (grey "
            "levels, scanner units)."
        ),
    ] = "scaled"
    subject: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="Person that all samples are of.",
            help_behavior_hint="(default: from folder or file names)",
        ),
    ] = None
    size: Size = None
    plane: PlaneOption = "axial"
    min_foreground: MinForeground = 0.0
    noise_scan: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Raw scans: noise readouts (.npy, coils first, or BART) that whiten the coils.",
            help_behavior_hint="(default: the scan's own, else the edges of k-space)",
        ),
    ] = None
    coil_maps: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Raw scans: coil maps (.npy, complex (slices, coils, H, W), or BART).",
            help_behavior_hint="(default: ESPIRiT)",
        ),
    ] = None
    compress: Annotated[
        int | None,
        arg(
            metavar="N",
            help="Raw scans: compress the coils to this many virtual ones, >= 1.",
            help_behavior_hint="(default: keep all)",
        ),
    ] = None
    keep_oversampling: Annotated[
        bool, FlagCreatePairsOff, arg(help="Raw scans: do not crop the readout to its field of view.")
    ] = False
    keep_padding: Annotated[
        bool,
        FlagCreatePairsOff,
        arg(help="Raw scans: do not cut off the lines of zeros around a fully sampled k-space."),
    ] = False
    seed: UnusedSeedOption = 0
    device: CpuDeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Import and describe what came of it."""
        from ambient_sci.data import describe, import_source

        check_outputs(self.out, overwrite=self.overwrite, inputs=(Path(self.source),))
        check_fraction(self.min_foreground)
        options = (
            "noise_std",
            "noise_units",
            "subject",
            "size",
            "plane",
            "min_foreground",
            "noise_scan",
            "coil_maps",
            "compress",
        )
        import_source(
            self.source,
            self.out,
            overwrite=self.overwrite,
            remove_oversampling=not self.keep_oversampling,
            keep_padding=self.keep_padding,
            **{name: getattr(self, name) for name in options},
        )
        print(describe(self.out))


def check_fraction(min_foreground: float) -> None:
    """Raises InputError for a fraction that no slice, or every one, exceeds."""
    require(0 <= min_foreground < 1, "--min-foreground", "a fraction >= 0 and < 1", min_foreground)


@dataclass(kw_only=True)
class Inspect:
    """What is in a file: operator, shapes, noise, masks, what they identify, people; and a picture."""

    file: Annotated[
        Path,
        Positional,
        arg(
            metavar="FILE.h5",
            help="Measurement file, a file of images (references, generated samples), or a result.",
        ),
    ]
    out: Annotated[
        Path | None,
        arg(
            metavar="PICTURE",
            help="Contact sheet to write (.png, .pdf, .svg or .jpg).",
            help_behavior_hint="(default: FILE.png beside the file; one that exists is left alone)",
        ),
    ] = None
    seed: UnusedSeedOption = 0
    device: CpuDeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Print the description, write the contact sheet."""
        from ambient_sci.data import contact_sheet, describe
        from ambient_sci.sampling.inspect import describe_result, is_result, result_sheet

        result = is_result(self.file)
        if self.out is not None:
            check_outputs(self.out, overwrite=self.overwrite, inputs=(self.file,))
        description = describe_result(self.file) if result else describe(self.file)
        sheet = self.out or self.file.with_suffix(".png")
        kept = self.out is None and sheet.exists() and not self.overwrite
        if not kept:
            draw = result_sheet if result else contact_sheet
            draw(self.file, sheet, overwrite=self.overwrite)
        print(description)
        print(f"contact sheet: {sheet}" + (" exists already (--overwrite draws it anew)" if kept else ""))
