r"""What a training run is told, as plain dataclasses that need no torch; JSON and YAML round trip.

A run is a pure function of its configuration and its data: step s draws its batch, noise levels, noise, masks
and augmentations from (seed, s), and the learning rate is

    lr(s) = learning_rate * min(1, (s + 1) / warmup_steps) * (r + (1 - r) (1 + cos(pi p)) / 2),
    r = final_ratio

with p = s / max_steps. Where ``max_minutes`` limits the run, p = elapsed training time / max_minutes (the
larger of the two where both limits are set), and elapsed time differs from run to run: step-limited runs are
reproducible bit for bit on a CPU, time-limited runs are not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ambient_sci.errors import InputError
from ambient_sci.known_settings import refuses_unknown_settings
from ambient_sci.priors.config import NetworkConfig
from ambient_sci.priors.presets import PRESETS
from ambient_sci.training.settings import check_types, parse_dataclass, require
from ambient_sci.training.stage_configs import DistillConfig, EMConfig, JointConfig, StagedConfig
from ambient_sci.whole_files import write_text

AUGMENTATIONS = ("flip-horizontal", "flip-vertical", "transpose", "phase", "gain")
DEFAULT_STEPS = 20_000
#: Value of a setting that is chosen when the run begins, see `ambient_sci.training.auto`.
AUTO: Any = "auto"
LARGEST_BATCH = 2**20


@refuses_unknown_settings
@dataclass(frozen=True)
class LevelConfig:
    """Which noise levels are trained, between the noise that the data already has and ``sigma_max``.

    Attributes:
        kind: "log-normal" (Karras et al. 2022), "log-uniform", or "concentrated" (dense just above the noise
            of the data).
        sigma_max: highest level.
        floor: lowest level, where the data has less noise than that.
        mean, std: of log sigma, for "log-normal".
        power: sigma = sigma_n (sigma_max / sigma_n)^(u^power), u uniform, for "concentrated".
        relative: levels are in units of the data's standard deviation (estimated from the noisy data), so
            that one configuration serves data of any scale. False: levels are absolute.
    """

    kind: Literal["log-normal", "log-uniform", "concentrated"] = "log-normal"
    sigma_max: float = 80.0
    floor: float = 4e-3
    mean: float = 0.0
    std: float = 1.2
    power: float = 2.0
    relative: bool = True

    def __post_init__(self) -> None:
        check_types(self, "levels.")
        require(self.floor > 0, "levels.floor", "a value > 0", self.floor)
        require(
            self.sigma_max > self.floor,
            "levels.sigma_max",
            f"a value above floor {self.floor:g}",
            self.sigma_max,
        )
        require(self.std > 0, "levels.std", "a value > 0", self.std)
        require(self.power > 0, "levels.power", "a value > 0", self.power)


@refuses_unknown_settings
@dataclass(frozen=True)
class LossConfig:
    """The operator-aware Tweedie loss, which is plain denoising where the data are clean.

    Attributes:
        weighting: omega(c) of the kept rows, c = 1 - sigma_y^2 / sigma^2: "inverse-variance" 1/c, "unbiased"
            1/c^2, "unit" 1.
        c_min: clamp of c in that weight, which is unbounded at sigma = sigma_y.
        keep: fraction of the measured rows that the network is shown; the others are held out and predicted.
            None: 1 for complete data, 0.75 for incomplete data.
    """

    weighting: Literal["inverse-variance", "unbiased", "unit"] = "inverse-variance"
    c_min: float = 0.05
    keep: float | None = None

    RETIRED: ClassVar[dict[str, tuple[Any, str]]] = {
        "kind": ("ambient", "the noisy-as-clean baseline declares its data clean, see recipes/exactness"),
        "tweedie": (True, "the loss without it is an ablation of recipes/mri"),
        "held_out_weights": ("exact", "unit weights are an ablation of recipes/mri"),
        "hold_out_calibration": (True, "keeping calibration lines is an ablation of recipes/mri"),
    }

    def __post_init__(self) -> None:
        check_types(self, "loss.")
        require(0 < self.c_min <= 1, "loss.c_min", "a value in (0, 1]", self.c_min)
        require(self.keep is None or 0 < self.keep <= 1, "loss.keep", "a value in (0, 1]", self.keep)


_PLAIN: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "ema_decay": 0.999,
    "augmentations": (),
    "network": NetworkConfig(),
    "centre": False,
    "levels": LevelConfig(),
}


@refuses_unknown_settings
@dataclass(frozen=True)
class FrozenNoiseConfig:
    """At levels from ``sigma_n`` up, train on one noisy copy of each image that stays the same for the whole
    run, and on the image itself below: a model that memorises less ("Does Generation Require Memorization?",
    Algorithm 1). See `ambient_sci.training.frozen_noise`.

    Attributes:
        sigma_n: noise of the copy, in the units of ``levels``; 0 is plain denoising. Published as useful: 0.8
            to 8 data standard deviations (0.4 to 4 for images in [-1, 1] of standard deviation 0.5).
        seed: of the noise, apart from the run's: a second run that goes on from this one on the same images
            must not show it a second noise of them.
    """

    sigma_n: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "frozen_noise.")
        require(self.sigma_n >= 0, "frozen_noise.sigma_n", "a value >= 0", self.sigma_n)
        require(0 <= self.seed < 2**63, "frozen_noise.seed", "an integer >= 0 and below 2^63", self.seed)


@refuses_unknown_settings
@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Settings that are "auto" are chosen when the run begins, from the data, the limit and, where time limits
    the run, the speed of this machine; ``config.json`` of the run has the numbers, so that a resumed or
    repeated run chooses nothing. See `ambient_sci.training.auto` for the rules.

    Attributes:
        seed: decides the initial weights and everything drawn during the run.
        max_steps, max_minutes: the run ends at whichever comes first; neither means 20,000 steps.
        batch_size: samples a step, over all processes together; "auto": 16, or the next number that the
            processes can share.
        micro_batches: parts that each process takes its share of a batch in, one after the other: less
            memory, the same gradient to rounding. P processes with m parts train like one process with P m
            parts.
        learning_rate, schedule, warmup_steps, final_ratio: see the module's equation; "constant" has no
            cosine. "auto" learning rates suit the width of the network, "auto" warm-ups the length of the
            run.
        betas, weight_decay: of AdamW.
        ema_decay: the saved prior is the exponential moving average of the weights, with decay
            min(ema_decay, (1 + s) / (10 + s)) at step s: the start of the run is forgotten quickly. "auto"
            is 0.9999, with which the average spans about the last ninth of the run, however long it is.
        ema_half_life_images: in place of ema_decay, the decay 2^(-batch_size / half life): images after which
            a weight counts half, whatever the batch. None: ema_decay.
        gradient_clip: largest norm of the gradient.
        precision: "bf16" runs the network under autocast; weights, losses and averages stay in fp32.
        augmentations: drawn per batch ("phase" per sample) from those that keep white noise white and move
            the mask along; see ambient_sci.training.augment. They state symmetries that the images must
            have. "auto": those that are exact for the data, see `ambient_sci.training.auto`; (): none.
        drop_labels: probability that a sample's class label or prompt is withheld from a network that takes
            it, so that it also learns the images of all classes together, which guidance needs.
        checkpoint_minutes: time between checkpoints; 0 writes one every step.
        log_interval: steps between lines of log.jsonl.
        device: "auto" is CUDA where there is one.
        network: a `NetworkConfig`, or the name of one: "small", "medium", "large" (see
            `ambient_sci.priors.presets`), or "auto".
        centre: the network works around the mean of the images, see `ambient_sci.priors.network`; "auto" is
            true. Complex images have a mean of 0.
        levels: a `LevelConfig`, or "auto": log-normal, where it helps most for the noise of the data.
        loss: see there.
        frozen_noise: learn high levels from one noisy copy of each image; None: from whatever the data are.
        consistency: learn what lies below the noise of the data, too: `StagedConfig` or `JointConfig`
            (``mode`` in a file says which); None: do not.
        em: learn an unconditional prior from incomplete (or any) measurements by expectation maximisation;
            max_steps and max_minutes must then be left out, ``em.steps`` counts for every lap.
        distillation: make a one-step generator of a prior that is there, see `distill`; learning rate and
            betas are those of `DistillConfig`.
        init_from: a prior to go on from instead of random weights: the folder of one or of a run, or
            "pretrained:NAME". Images must be of its shape and scale; ``network`` is not used.
    """

    seed: int = 0
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = AUTO
    micro_batches: int = 1
    learning_rate: float = AUTO
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = AUTO
    final_ratio: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ema_decay: float = AUTO
    ema_half_life_images: float | None = None
    gradient_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    augmentations: tuple[str, ...] = AUTO
    drop_labels: float = 0.1
    checkpoint_minutes: float = 2.0
    log_interval: int = 20
    device: Literal["auto", "cpu", "cuda"] = "auto"
    network: NetworkConfig = AUTO
    centre: bool = AUTO
    levels: LevelConfig = AUTO
    loss: LossConfig = field(default_factory=LossConfig)
    frozen_noise: FrozenNoiseConfig | None = None
    consistency: StagedConfig | JointConfig | None = None
    em: EMConfig | None = None
    distillation: DistillConfig | None = None
    init_from: str | None = None

    #: Settings that may be left to be chosen, with the words that leave them.
    OPEN: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(("batch_size", "learning_rate", "warmup_steps", "ema_decay"), ("auto",)),
        **dict.fromkeys(("augmentations", "centre", "levels"), ("auto",)),
        "network": ("auto", *PRESETS),
    }

    def __post_init__(self) -> None:
        check_types(self, "")
        require(0 <= self.seed < 2**63, "seed", "an integer >= 0 and below 2^63", self.seed)
        for key in ("max_steps", "max_minutes", "ema_half_life_images"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "a value > 0", value)
        for key in ("batch_size", "micro_batches", "learning_rate", "gradient_clip", "log_interval"):
            value = getattr(self, key)
            require(self.is_open(key) or value > 0, key, "a value > 0", value)
        for key in ("batch_size", "micro_batches"):
            value = getattr(self, key)
            require(self.is_open(key) or value <= LARGEST_BATCH, key, f"at most {LARGEST_BATCH}", value)
        for key in ("warmup_steps", "weight_decay", "checkpoint_minutes"):
            value = getattr(self, key)
            require(self.is_open(key) or value >= 0, key, "a value >= 0", value)
        require(0 <= self.drop_labels <= 1, "drop_labels", "a value in [0, 1]", self.drop_labels)
        require(0 <= self.final_ratio <= 1, "final_ratio", "a value in [0, 1]", self.final_ratio)
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "two values in [0, 1)", self.betas)
        decay = self.ema_decay
        require(self.is_open("ema_decay") or 0 <= decay < 1, "ema_decay", "a value in [0, 1)", decay)
        self._check_stages()
        for name in () if self.is_open("augmentations") else self.augmentations:
            require(
                name in AUGMENTATIONS,
                "augmentations",
                f"names among {', '.join(AUGMENTATIONS)} (other rotations and changes of size interpolate, "
                "which colours the noise)",
                name,
            )

    def _check_stages(self) -> None:
        if self.distillation is not None:
            both = self.em is not None or self.consistency is not None
            require(not both, "distillation", "no em and no consistency beside it", "both")
        if self.frozen_noise is not None:
            other = [name for name in ("consistency", "em") if getattr(self, name) is not None]
            require(not other, "frozen_noise", f"no {' or '.join(other)} beside it", "both")
            high = (LevelConfig() if self.is_open("levels") else self.levels).sigma_max
            level = self.frozen_noise.sigma_n
            require(level < high, "frozen_noise.sigma_n", f"a level below levels.sigma_max {high:g}", level)
        if self.em is not None:
            limits = (self.max_steps, self.max_minutes)
            require(limits == (None, None), "em", "no max_steps and max_minutes beside em.steps", limits)
            require(
                self.init_from is None, "em", "no init_from beside it (laps start from one another)", "both"
            )
            require(self.consistency is None, "em", "no consistency stage beside it", "both")
            require(
                self.loss == LossConfig(), "em", "no loss settings beside it (its M-steps denoise)", self.loss
            )

    # -- what is still to be chosen --------------------------------------------------------------------------

    def is_open(self, key: str) -> bool:
        """Whether a setting is still to be chosen."""
        return key in self.OPEN and isinstance(getattr(self, key), str)

    @property
    def open_settings(self) -> list[str]:
        """Names of the settings that are still to be chosen."""
        return [key for key in self.OPEN if self.is_open(key)]

    def explicit(self, **chosen: Any) -> TrainConfig:
        """This configuration with nothing left to choose.

        Args:
            chosen: values of settings that are open; those that are not keep theirs. What is open and not
                among them takes a plain value: 16 samples a step, learning rate 0.001 after 50 steps, decay
                0.999, no augmentations, images as they are, levels and a U-Net of the defaults of
                `LevelConfig` and `NetworkConfig`. Stages that are run by themselves, not by `fit`, do so.
        """
        plain = {**_PLAIN, **chosen}
        found = {key: plain[key] for key in self.open_settings}
        named = found.get("network") is _PLAIN["network"] and self.network != "auto"
        require(not named, "network", "a NetworkConfig (ambient_sci.priors.preset makes it)", self.network)
        return dataclasses.replace(self, **found) if found else self

    # -- what a step is told ---------------------------------------------------------------------------------

    @property
    def step_limit(self) -> int | None:
        """Last step of the run, None where only time limits it."""
        return DEFAULT_STEPS if self.max_steps is None and self.max_minutes is None else self.max_steps

    def progress(self, step: int, seconds: float) -> float:
        """Part of the run that is over, in [0, 1]: by steps, by training time, whichever is further."""
        by_step = step / self.step_limit if self.step_limit else 0.0
        by_time = seconds / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def learning_rate_at(self, step: int, progress: float) -> float:
        """Learning rate of ``step`` (counted from 0) when ``progress`` of the run is over."""
        own = self.explicit()
        rate = own.learning_rate * min(1.0, (step + 1) / max(own.warmup_steps, 1))
        if self.schedule == "constant":
            return rate
        return rate * (self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

    def ema_decay_at(self, step: int) -> float:
        """Decay of the weight average after ``step`` (counted from 0)."""
        own = self.explicit()
        decay = own.ema_decay
        if own.ema_half_life_images is not None:
            decay = 0.5 ** (own.batch_size / own.ema_half_life_images)
        return min(decay, (1 + step) / (10 + step))

    # -- files -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; keys that are left out take their defaults.

        Raises:
            InputError: an unknown key, a value of the wrong type or out of range; the message names the key.
        """
        return parse_dataclass(TrainConfig, values, "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON (or YAML, by the suffix .yaml or .yml), whole or not at all."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        else:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_text(path, text)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> TrainConfig:
        """Read what `save` wrote, or what a person wrote in the same form.

        Raises:
            InputError: no such file, not JSON or YAML, or not a configuration; the message names file and
                key.
        """
        path = Path(path)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"configuration {path}: expected a readable JSON or YAML file, got {error}"
            ) from None
        import yaml

        try:
            values = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            first = str(error).splitlines()[0]
            raise InputError(
                f"configuration {path}: expected JSON or YAML, got a file that is neither ({first})"
            ) from None
        try:
            return TrainConfig.from_dict(values if values is not None else {})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """Dotted names of the settings in which two configurations differ."""

    def walk(a: dict[str, Any], b: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for key in sorted(a.keys() | b.keys()):
            left, right = a.get(key), b.get(key)
            if isinstance(left, dict) and isinstance(right, dict):
                found += walk(left, right, f"{prefix}{key}.")
            elif left != right:
                found.append(f"{prefix}{key}")
        return found

    return walk(ours.to_dict(), theirs.to_dict(), "")
