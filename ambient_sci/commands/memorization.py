"""Commands that tell whether a prior has memorised its training images: memorization score, attack, error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ambient_sci.commands.common import (
    DeviceOption,
    OverwriteOption,
    RunArgument,
    SeedOption,
    check_outputs,
    find_device,
    require,
)

OutFolder = Annotated[
    Path, arg(metavar="OUT", help="Folder for report.json, the values behind it, and figures.")
]
TrainOption = Annotated[Path, arg(metavar="T.h5", help="Images that the prior was trained on.")]
HeldOutOption = Annotated[
    Path,
    arg(metavar="H.h5", help="Real images of the same source that it was not trained on: the yardstick."),
]
FeaturesOption = Annotated[
    str,
    arg(
        metavar="NAME",
        help="What similarity is measured on: efficientnet-lite0, pixels, or inception:FILE, dinov2:FILE, "
        "sscd:FILE with a file of published weights.",
    ),
]
RangeOption = Annotated[
    tuple[float, float] | None,
    arg(
        metavar="LOW HIGH",
        help="Values of black and white, for features of networks.",
        help_behavior_hint="(default: 0 1, -1 1 or 0 255, by the training images; the report says which)",
    ),
]
BatchOption = Annotated[
    int, arg(metavar="B", help="Images at a time, >= 1: changes speed and memory, not the result.")
]


@dataclass(kw_only=True)
class MemorizationScoreCommand:
    """Similarity of generated images to their nearest training images, and of held-out real ones to theirs.

    Counts above 0.9, 0.95 and 0.99, the calibrated ratio to the nearest neighbours, pairs to look at, and the
    probability that a generated image is nearer to the training set than a held-out one (0.5 without memory).
    An interrupted run goes on where it was.
    """

    samples: Annotated[Path, Positional, arg(metavar="S.h5", help="Images made by generate.")]
    train: TrainOption
    held_out: HeldOutOption
    out: OutFolder
    features: FeaturesOption = "efficientnet-lite0"
    nearest: Annotated[
        int,
        arg(
            metavar="K",
            help="Neighbours of the calibrated ratio, >= 2; no more than there are training images.",
        ),
    ] = 50
    value_range: RangeOption = None
    cache: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Where features are kept, to be used again and to resume from.",
            help_behavior_hint="(default: OUT/features)",
        ),
    ] = None
    batch_size: BatchOption = 64
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Measure, write, and print the summary."""
        from ambient_sci.evaluation.memorization import memorization_score
        from ambient_sci.evaluation.memorization_report import score_text, write_score

        require(self.nearest >= 2, "--nearest", "at least 2", self.nearest)
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        _check(self, "similarities.safetensors", "similarity.png", "pairs.png")
        found = memorization_score(
            self.samples,
            self.train,
            self.held_out,
            extractor=self.features,
            k=self.nearest,
            value_range=self.value_range,
            cache=self.cache or self.out / "features",
            batch_size=self.batch_size,
            device=find_device(self.device),
            seed=self.seed,
            progress=True,
        )
        _say(score_text(found.report), write_score(self.out, found, self.samples, self.train, self.held_out))

    def started(self) -> bool:
        """Whether there are features to go on from."""
        return (self.cache or self.out / "features").is_dir()


@dataclass(kw_only=True)
class MemorizationAttackCommand:
    """Noise or mask training images and let the prior sample them back: does the very image return?

    Two attacks: noise up to a level, and lower rows that are hidden and inpainted by MMPS; the MMSE estimates
    beside. With --held-out the same is done to images that the prior never saw, without which the
    similarities prove nothing.
    """

    run_folder: RunArgument
    train: Annotated[
        Path, Positional, arg(metavar="T.h5", help="Images that the prior was trained on, or may have been.")
    ]
    out: OutFolder
    held_out: Annotated[
        Path | None,
        arg(
            metavar="H.h5",
            help="Real images of the same source that it was not trained on, attacked in the same way.",
            help_behavior_hint="(default: none; then nothing can be concluded)",
        ),
    ] = None
    features: FeaturesOption = "efficientnet-lite0"
    sigma: Annotated[
        float | None,
        arg(
            metavar="SIGMA",
            help="Noise level of the first attack, > 0, per real channel, in the units of the data.",
            help_behavior_hint="(default: 4 data standard deviations, sqrt(n) / 6 for n < 576 values)",
        ),
    ] = None
    hidden: Annotated[
        float,
        arg(metavar="P", help="Share of the rows that the second attack hides, the lower ones, > 0 and < 1."),
    ] = 0.5
    num: Annotated[int, arg(metavar="N", help="Images of each kind, drawn by the seed, >= 1.")] = 32
    samples: Annotated[int, arg(metavar="S", help="Draws for each image, >= 1.")] = 4
    steps: Annotated[int, arg(metavar="K", help="Noise levels of the first attack's sampler, >= 2.")] = 40
    value_range: RangeOption = None
    batch_size: BatchOption = 32
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Attack, write, and print the summary."""
        from ambient_sci.evaluation.memorization_attack import memorization_attack
        from ambient_sci.evaluation.memorization_report import attack_text, write_attack
        from ambient_sci.priors import load_prior

        require(0 < self.hidden < 1, "--hidden", "a share > 0 and < 1", self.hidden)
        for name, least in (("num", 1), ("samples", 1), ("steps", 2), ("batch_size", 1)):
            value = getattr(self, name)
            require(value >= least, "--" + name.replace("_", "-"), f"at least {least}", value)
        _check(self, "similarities.safetensors", "similarity.png", "noise.png", "inpaint.png")
        device = find_device(self.device)
        found = memorization_attack(
            load_prior(self.run_folder, device),
            self.train,
            self.held_out,
            extractor=self.features,
            level=self.sigma,
            hidden=self.hidden,
            num=self.num,
            samples=self.samples,
            steps=self.steps,
            value_range=self.value_range,
            batch_size=self.batch_size,
            device=device,
            seed=self.seed,
            progress=True,
        )
        _say(attack_text(found.report), write_attack(self.out, found))


@dataclass(kw_only=True)
class MemorizationErrorCommand:
    """Denoising error on held-out images over that on training images: above 1, the prior has memorised.

    Level by level, with bootstrap intervals; and one number for all levels (0.5 without memory).
    """

    run_folder: RunArgument
    train: TrainOption
    held_out: HeldOutOption
    out: OutFolder
    levels: Annotated[int, arg(metavar="K", help="Noise levels, in equal ratios, >= 2.")] = 12
    sigma_min: Annotated[
        float | None,
        arg(
            metavar="SIGMA",
            help="Lowest noise level, > 0, per real channel, in the units of the data.",
            help_behavior_hint="(default: the prior's, at least 0.02 data standard deviations)",
        ),
    ] = None
    sigma_max: Annotated[
        float | None,
        arg(
            metavar="SIGMA",
            help="Highest noise level.",
            help_behavior_hint="(default: the prior's, at most 20 data standard deviations)",
        ),
    ] = None
    num: Annotated[int, arg(metavar="N", help="Images of each kind, drawn by the seed, >= 2.")] = 256
    draws: Annotated[int, arg(metavar="R", help="Noises for each image and level, >= 1.")] = 4
    batch_size: BatchOption = 64
    seed: SeedOption = 0
    device: DeviceOption = "auto"
    overwrite: OverwriteOption = False

    def run(self) -> None:
        """Measure, write, and print the summary."""
        from ambient_sci.evaluation.memorization_error import memorization_error
        from ambient_sci.evaluation.memorization_report import error_text, write_error
        from ambient_sci.priors import load_prior

        for name, least in (("levels", 2), ("num", 2), ("draws", 1), ("batch_size", 1)):
            value = getattr(self, name)
            require(value >= least, "--" + name.replace("_", "-"), f"at least {least}", value)
        _check(self, "errors.safetensors", "error.png")
        found = memorization_error(
            load_prior(self.run_folder, find_device(self.device)),
            self.train,
            self.held_out,
            levels=self.levels,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            num=self.num,
            draws=self.draws,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=True,
        )
        _say(error_text(found.report), write_error(self.out, found))


def _check(command: Any, *names: str) -> None:
    """Refuse outputs that exist before any work."""
    for name in ("report.json", *names):
        check_outputs(command.out / name, overwrite=command.overwrite)


def _say(text: str, written: list[Path]) -> None:
    print(text)
    for path in written:
        print(
            f"{'figure' if path.suffix == '.png' else 'report' if path.suffix == '.json' else 'values'}: "
            f"{path}"
        )
