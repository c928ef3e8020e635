"""The command that judges a prior by the published protocol: evaluate-prior."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from ambient_sci.commands.common import (
    DeviceOption,
    OverwriteOption,
    RunArgument,
    SigmaMinOption,
    find_device,
    main_process,
    require,
)


@dataclass(kw_only=True)
class EvaluatePrior:
    """Distance of a prior's images from real ones by the published protocol: 50,000 images, three seeds.

    Draws, computes features and compares with a reference whose statistics are kept; all of it goes on where
    it was interrupted, and processes of one torchrun share it. With inception features the distance is FID.
    """

    shared: ClassVar[bool] = True
    run_folder: RunArgument
    reference: Annotated[
        Path,
        arg(
            metavar="REF",
            help="Real images (.h5), or published statistics of Inception features (.npz with mu and sigma).",
        ),
    ]
    out: Annotated[Path, arg(metavar="OUT", help="Folder for images, features and report.json.")]
    features: Annotated[
        str,
        arg(
            metavar="NAME",
            help="Features that are compared: inception:FILE (FID), efficientnet-lite0, pixels, dinov2:FILE, "
            "sscd:FILE.",
        ),
    ] = "efficientnet-lite0"
    num: Annotated[int, arg(metavar="N", help="Images of each seed, >= 20.")] = 50_000
    seeds: Annotated[tuple[int, ...], arg(metavar="S [S ...]", help="Seeds of the draws, integers >= 0.")] = (
        0,
        1,
        2,
    )
    steps: Annotated[
        int,
        arg(metavar="K", help="Noise levels of the sampler, >= 1; EDM takes 18 for CIFAR-10, 40 at 64 px."),
    ] = 40
    sampler: Annotated[
        Literal["multistep", "heun", "ancestral"], arg(help="As for generate; EDM takes heun.")
    ] = "heun"
    sigma_min: SigmaMinOption = None
    sigma_max: Annotated[
        float | None,
        arg(
            metavar="SIGMA",
            help="Noise level at which sampling starts, > 0, in the units of the data.",
            help_behavior_hint="(default: the highest level the prior has learned)",
        ),
    ] = None
    reference_count: Annotated[
        int | None,
        arg(
            metavar="N",
            help="With statistics (.npz): number of images they are of, which the file does not say.",
            help_behavior_hint="(needed with .npz)",
        ),
    ] = None
    value_range: Annotated[
        tuple[float, float] | None,
        arg(
            metavar="LOW HIGH",
            help="Values of black and white.",
            help_behavior_hint="(default: 0 1, -1 1 or 0 255, by the reference; the report says which)",
        ),
    ] = None
    cache: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Where features and statistics are kept, to be used again for other priors.",
            help_behavior_hint="(default: OUT/features)",
        ),
    ] = None
    batch_size: Annotated[
        int, arg(metavar="B", help="Images at a time, >= 1: changes speed and memory, not the result.")
    ] = 64
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Draw, compare, write, and print the summary."""
        from ambient_sci.evaluation.protocol import Protocol, protocol_text, run_protocol
        from ambient_sci.priors import load_prior

        require(self.steps >= 1, "--steps", "at least 1 noise level", self.steps)
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        require(all(0 <= s < 2**63 for s in self.seeds), "--seeds", "integers >= 0", self.seeds)
        require(not self.out.is_file(), "--out", "a folder", f"the file {self.out}")
        device = find_device(self.device)
        names = ("num", "seeds", "steps", "sampler", "sigma_min", "sigma_max", "batch_size")
        report = run_protocol(
            load_prior(self.run_folder, device),
            self.reference,
            self.out,
            protocol=Protocol(**{name: getattr(self, name) for name in names}),
            extractor=self.features,
            reference_count=self.reference_count,
            value_range=self.value_range,
            cache=self.cache,
            device=device,
            overwrite=self.overwrite,
            progress=True,
        )
        if main_process():
            print(protocol_text(report))
            print(f"report: {self.out / 'report.json'}")
