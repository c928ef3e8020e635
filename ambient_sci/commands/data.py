"""Commands that make and show measurement files: simulate, import, inspect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ambient_sci.commands.common import (
    OverwriteOption,
    SeedOption,
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
NoiseUnits = Annotated[
    Literal["scaled", "original"],
    arg(
        help="Units of --noise-std: those of the stored data (pictures reach from 0 to 1), or the original "
        "ones (grey levels, scanner units)."
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
    noise_units: NoiseUnits = "scaled"
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
            noise_units=self.noise_units,
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

    Images: npy, npz, pictures and TIFF stacks (file, folder or zip), NIfTI and what else nibabel reads,
    DICOM. Raw scans: fastMRI and ISMRMRD HDF5, BART cfl/hdr, npz with kspace, npy with --kind kspace; one
    file, or a folder of one kind. Images can be made smaller or cut up, in this order: --grey, --crop, --bin
    or --size, --patch; noise stays white in all of these, and its level follows.
    """

    source: Annotated[str, Positional, arg(metavar="SOURCE", help="File or folder to import.")]
    out: NewFile
    noise_std: Annotated[
        float | None,
        arg(
            metavar="SIGMA",
            help="Standard deviation of the noise, >= 0, per real channel, in the pixels as they come "
            "(before --bin, --size and --grey).",
            help_behavior_hint="(default: estimated, and its standard error recorded)",
        ),
    ] = None
    noise_units: NoiseUnits = "scaled"
    subject: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="Subject ID for all samples.",
            help_behavior_hint="(default: from folder or file names)",
        ),
    ] = None
    kind: Annotated[
        Literal["images", "kspace"] | None,
        arg(
            metavar="{images,kspace}",
            help="What the complex numbers of a .npy file are: images, or k-space (slices, coils, height, "
            "width) with its centre in the middle.",
            help_behavior_hint="(default: images, unless they look like k-space)",
        ),
    ] = None
    mask: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="With --kind kspace: .npy of 0/1, what was measured.",
            help_behavior_hint="(default: what is not 0)",
        ),
    ] = None
    channel: Annotated[
        str | None,
        arg(
            metavar="{K,together,each}",
            help="TIFF with several channels (axis C): import channel K, from 0 on; all of them together, as "
            "images of so many channels; or each as images of their own, with their own noise level.",
            help_behavior_hint="(needed where there are several)",
        ),
    ] = None
    grey: Annotated[bool, FlagCreatePairsOff, arg(help="Colours to grey (BT.601).")] = False
    crop: Annotated[
        tuple[int, int] | None,
        arg(
            metavar="H W",
            help="Keep the middle of each image, this high and wide, pixels.",
            help_behavior_hint="(default: whole images)",
        ),
    ] = None
    bin: Annotated[
        int | None,
        arg(
            metavar="K",
            help="Average blocks of K x K pixels, >= 2: the noise level is divided by K.",
            help_behavior_hint="(default: leave pixels as they are)",
        ),
    ] = None
    size: Annotated[
        int | None,
        arg(
            metavar="PIXELS",
            help="Reduce square images to this many pixels: averages of blocks where that divides, "
            "else the lowest frequencies. With --noise-std 0 (clean images): resize with padding and "
            "anti-aliasing.",
            help_behavior_hint="(default: leave their size)",
        ),
    ] = None
    patch: Annotated[
        int | None,
        arg(
            metavar="PIXELS",
            help="Cut images into squares of this many pixels; sizes may differ then.",
            help_behavior_hint="(default: whole images)",
        ),
    ] = None
    stride: Annotated[
        int | None,
        arg(
            metavar="PIXELS",
            help="With --patch: from one patch to the next.",
            help_behavior_hint="(default: the patch size, no overlap)",
        ),
    ] = None
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
            "kind",
            "mask",
            "grey",
            "crop",
            "bin",
            "size",
            "patch",
            "stride",
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
            channel=self._channel(),
            **{name: getattr(self, name) for name in options},
        )
        print(describe(self.out))

    def _channel(self) -> int | str | None:
        if self.channel is None or self.channel in ("together", "each"):
            return self.channel
        require(self.channel.isdigit(), "--channel", "a number >= 0, together or each", self.channel)
        return int(self.channel)


def check_fraction(min_foreground: float) -> None:
    """Raises InputError for a fraction that no slice, or every one, exceeds."""
    require(0 <= min_foreground < 1, "--min-foreground", "a fraction >= 0 and < 1", min_foreground)


@dataclass(kw_only=True)
class Inspect:
    """What is in a file or a run: shapes, noise, masks, subjects, how it was made; and a contact sheet.

    Measurement files, images (references, generated ones), results of reconstruct, run folders and saved
    priors (these in words alone).
    """

    file: Annotated[
        Path,
        Positional,
        arg(
            metavar="PATH",
            help="Measurements, images or a result (.h5), or the folder of a run or a saved prior.",
        ),
    ]
    out: Annotated[
        Path | None,
        arg(
            metavar="PICTURE",
            help="Contact sheet to write (.png, .pdf, .svg or .jpg).",
            help_behavior_hint="(default: PATH.png beside the file; one that exists is left alone)",
        ),
    ] = None
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Print the description, write the contact sheet."""
        from ambient_sci.training.describe import describe_prior, is_prior

        if self.file.is_dir() and is_prior(self.file):
            require(self.out is None, "--out", "none for a run or a prior, which has no picture", self.out)
            print(describe_prior(self.file))
            return
        describe, contact_sheet = self._ways()
        if self.out is not None:
            check_outputs(self.out, overwrite=self.overwrite, inputs=(self.file,))
        description = describe(self.file)
        sheet = self.out or self.file.with_suffix(".png")
        kept = self.out is None and sheet.exists() and not self.overwrite
        if not kept:
            contact_sheet(self.file, sheet, overwrite=self.overwrite)
        print(description)
        print(f"contact sheet: {sheet}" + (" exists already (--overwrite draws it anew)" if kept else ""))

    def _ways(self) -> tuple[Callable[..., str], Callable[..., Path]]:
        """How to describe and to draw this kind of file."""
        from ambient_sci.data import contact_sheet, describe
        from ambient_sci.sampling.describe import describe_result, is_result, result_sheet

        return (describe_result, result_sheet) if is_result(self.file) else (describe, contact_sheet)
