"""What the stages beyond the first are told, as plain dataclasses. Free of torch; part of `TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ambient_sci.known_settings import refuses_unknown_settings
from ambient_sci.training.settings import ANY, check_types, parse_dataclass, require

_DETACH = (
    False,
    "without gradient through D_s nothing is anchored: ambient_sci.losses.consistency has no such switch",
)


@dataclass(frozen=True)
class _PairsConfig:
    """Pairs of levels below the noise of the data; see `ambient_sci.training.below_noise`.

    A pair (t, s) starts at a noisy image of the data, at level sigma_n, and walks down k steps of the reverse
    process, t <- max(t exp(-stride u), sigma_min); then s = t exp(-gap u'), with u and u' uniform on (0, 1).

    Attributes:
        draws: m >= 2 draws of x_s for each pair, in one batched call.
        antithetic: they come as pairs of opposite noise (m >= 4, even): what of D is linear in the noise then
            adds none to the loss, at no cost. The closer the levels, the more it is worth.
        substeps: steps in which x_s is reached from t, so that a larger ``gap``, which sees what errors add
            up to, does not bias mixtures. Each beyond the first costs m evaluations without gradient.
        walk: smallest and largest k; k is drawn once a batch. Reaching far below sigma_n takes about
            2 ln(sigma_n / sigma_min) steps, and each costs an evaluation without gradient.
        stride, gap: see above.
        sigma_n: the level below which consistency is asked for, in the units of ``levels``; default: the
            lowest noise in the data. To be given where some of the data are clean.
        sigma_min: lowest level of a walk, in the units of ``levels``.
        weight: factor of the loss beside an Ambient loss.
    """

    draws: int = 4
    antithetic: bool = False
    substeps: int = 1
    walk: tuple[int, int] = (0, 3)
    stride: float = 1.0
    gap: float = 0.5
    sigma_n: float | None = None
    sigma_min: float = 0.01
    weight: float = 1.0

    def __post_init__(self) -> None:
        name = "consistency."
        check_types(self, name)
        for key in ("stride", "gap", "sigma_min", "weight"):
            require(getattr(self, key) > 0, name + key, "a value > 0", getattr(self, key))
        require(self.sigma_n is None or self.sigma_n > 0, name + "sigma_n", "a value > 0", self.sigma_n)
        require(self.draws >= 2, name + "draws", "at least 2 (one draw gives a biased loss)", self.draws)
        require(self.substeps >= 1, name + "substeps", "at least 1", self.substeps)
        paired = not self.antithetic or (self.draws >= 4 and self.draws % 2 == 0)
        require(paired, name + "draws", "an even number, 4 or more, with antithetic", self.draws)
        require(0 <= self.walk[0] <= self.walk[1], name + "walk", "0 <= smallest <= largest", self.walk)


@refuses_unknown_settings
@dataclass(frozen=True)
class StagedConfig(_PairsConfig):
    """Staged consistency: what the Ambient loss has learned is frozen, and a copy of it trained for the
    levels below.

    Attributes:
        draws, antithetic, substeps, walk, stride, gap, sigma_n, sigma_min: how pairs of levels arise.
        mode: names this configuration in a file.
        max_steps, max_minutes: length of the second stage.
        learning_rate: of the second stage.
        ema_decay: of its weight average.
        replay: instead of walking anew, keep a batch of chains: the state at s is where the next step starts,
            at no evaluation at all, and a chain that has reached sigma_min starts again from the data.
        margin: without sigma_n, it is ``margin`` times the lowest noise in the data. The Ambient loss teaches
            kept rows nothing at the noise level of the data itself: what the anchor answers there is
            extrapolated, from a little above. With 1.15, say, the anchor is asked where it has learned, and
            noise is added to the data to get there. Each step then also takes an Ambient loss on the copy,
            between the noise of the data and sigma_n (one evaluation), beside which ``weight`` counts.
        shrinkage: factor, beside the consistency loss, of the denoising loss on the anchor's estimates at
            sigma_n, towards the law of truncated sampling. It biases (detail is lost where images are finer
            than the noise) and calms (noise that the network would rather leave in). Two evaluations a step.
        warm_start: first steps of the second stage, with that loss alone, with factor 1 whatever
            ``shrinkage`` is. They are among its ``max_steps`` and share its learning rate.
        weight: factor of the loss for data with less noise than sigma_n.
    """

    mode: Literal["staged"] = "staged"
    max_steps: int | None = 5_000
    max_minutes: float | None = None
    learning_rate: float = 5e-4
    ema_decay: float = 0.999
    replay: bool = False
    margin: float = 1.0
    shrinkage: float = 0.0
    warm_start: int = 0

    RETIRED: ClassVar[dict[str, tuple[Any, str]]] = {
        "kick_in": (0, "staged consistency has no other loss to wait for; mode joint has"),
        "ramp": (0, "staged consistency has no other loss to wait for; mode joint has"),
        "detach_target": _DETACH,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "consistency."
        for key in ("max_steps", "max_minutes"):
            value = getattr(self, key)
            require(value is None or value > 0, name + key, "a value > 0", value)
        limited = self.max_steps is not None or self.max_minutes is not None
        require(limited, name + "max_steps", "a limit in steps or minutes", None)
        require(self.learning_rate > 0, name + "learning_rate", "a value > 0", self.learning_rate)
        require(0 <= self.ema_decay < 1, name + "ema_decay", "a value in [0, 1)", self.ema_decay)
        require(self.margin >= 1, name + "margin", "a value of at least 1", self.margin)
        both = (self.margin, self.sigma_n)
        require(self.margin == 1 or self.sigma_n is None, name + "margin", "1 where sigma_n is given", both)
        require(self.shrinkage >= 0, name + "shrinkage", "a value >= 0", self.shrinkage)
        # Ended by the clock, a stage could be a warm start and nothing else.
        limited = self.warm_start == 0 or (
            self.max_minutes is None and self.max_steps is not None and self.warm_start < self.max_steps
        )
        require(
            self.warm_start >= 0 and limited,
            name + "warm_start",
            "0 <= warm_start < max_steps, and no max_minutes with it",
            (self.warm_start, self.max_steps),
        )


@refuses_unknown_settings
@dataclass(frozen=True)
class JointConfig(_PairsConfig):
    """Joint consistency, as published: the loss is added to the Ambient loss on one network.

    Attributes:
        draws, antithetic, substeps, walk, stride, gap, sigma_n, sigma_min: how pairs of levels arise.
        mode: names this configuration in a file.
        weight: factor of the loss beside the Ambient loss.
        kick_in: first step at which it counts.
        ramp: steps from there until it counts in full.
    """

    mode: Literal["joint"] = "joint"
    kick_in: int = 0
    ramp: int = 0

    RETIRED: ClassVar[dict[str, tuple[Any, str]]] = {
        "max_steps": (ANY, ""),
        "max_minutes": (ANY, ""),
        "learning_rate": (ANY, ""),
        "ema_decay": (ANY, ""),
        "replay": (False, "mode staged has it"),
        "margin": (1.0, "mode staged has it"),
        "shrinkage": (0.0, "mode staged has it"),
        "warm_start": (0, "mode staged has it"),
        "detach_target": _DETACH,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("kick_in", "ramp"):
            require(getattr(self, key) >= 0, f"consistency.{key}", "a value >= 0", getattr(self, key))


def ConsistencyConfig(mode: str = "staged", **settings: Any) -> StagedConfig | JointConfig:  # noqa: N802
    """A `StagedConfig` or a `JointConfig`, by ``mode``, as a table of settings in a file becomes one.

    Raises:
        InputError: another mode, or settings that this one does not have.
    """
    kinds: dict[str, type[StagedConfig] | type[JointConfig]] = {"staged": StagedConfig, "joint": JointConfig}
    require(mode in kinds, "consistency.mode", "'staged' or 'joint'", mode)
    return parse_dataclass(kinds[mode], {"mode": mode, **settings}, "consistency")


@refuses_unknown_settings
@dataclass(frozen=True)
class EMConfig:
    """Expectation maximisation; see `ambient_sci.training.em`.

    Attributes:
        laps: most laps; a lap draws images from the posterior of every measurement and trains on them.
        steps: training steps of each lap; learning rate, batch size and the rest are those of `TrainConfig`.
        first_steps: training steps of the first lap, which starts from new weights where lap 0 has left none
            to go on from; default: ``steps``.
        start: where the first draws come from. "gaussian": posterior draws under a Gaussian fitted to the
            measurements, for any linear operator. "ambient": a network trained on the measurements by the
            operator-aware Ambient loss; its estimates E[x_0 | y] where rows are missing, posterior draws
            under it where none are. Much nearer to the data's law when that is far from Gaussian and every
            row is measured with positive probability. Augmentations that are not exact for incomplete
            measurements are left out of its training, and its estimates are computed in single precision.
        start_steps: training steps of that network; default: ``first_steps``.
        m_step: "network" trains the network on the draws; "gaussian" takes their mean and covariance.
        initial_samples: measurements that the initial Gaussian is fitted to, at most.
        initial_iterations: iterations of that fit, at most.
        sampler_steps: noise levels of the posterior sampler (MMPS).
        integrator: "heun", "ancestral", or "multistep": second order like "heun" at half its evaluations.
        max_iterations, tolerance: of the sampler's linear solves.
        sampler_precision: of the network in the E-step; "bf16" under autocast, "auto" where the processor
            multiplies bfloat16 natively.
        sampler_batch: measurements at a time in the E-step.
        patience: laps without a better held-out score after which EM stops; the best lap's prior is kept.
        improvement: relative decrease of the score that counts as better.
        held_out: measurements that the score is computed on.
        held_out_keep: fraction of their rows that are shown; the others are predicted.
        held_out_draws: posterior samples of each.
    """

    laps: int = 6
    steps: int = 2_000
    first_steps: int | None = None
    start: Literal["gaussian", "ambient"] = "gaussian"
    start_steps: int | None = None
    m_step: Literal["network", "gaussian"] = "network"
    initial_samples: int = 2_000
    initial_iterations: int = 50
    sampler_steps: int = 18
    integrator: Literal["heun", "ancestral", "multistep"] = "heun"
    max_iterations: int = 5
    tolerance: float = 1e-2
    sampler_precision: Literal["fp32", "bf16", "auto"] = "fp32"
    sampler_batch: int = 64
    patience: int = 2
    improvement: float = 1e-3
    held_out: int = 64
    held_out_keep: float = 0.8
    held_out_draws: int = 8

    def __post_init__(self) -> None:
        name = "em."
        check_types(self, name)
        for key, least in {
            "laps": 0,
            "steps": 1,
            "initial_samples": 2,
            "initial_iterations": 1,
            "sampler_steps": 2,
            "max_iterations": 1,
            "sampler_batch": 1,
            "patience": 1,
            "held_out": 1,
            "held_out_draws": 2,
        }.items():
            require(getattr(self, key) >= least, name + key, f"at least {least}", getattr(self, key))
        require(
            self.first_steps is None or self.first_steps >= 1,
            name + "first_steps",
            "at least 1",
            self.first_steps,
        )
        require(
            self.start_steps is None or (self.start_steps >= 1 and self.start == "ambient"),
            name + "start_steps",
            "at least 1, and start: ambient with it",
            f"{self.start_steps} with start: {self.start}",
        )
        require(self.tolerance > 0, name + "tolerance", "a value > 0", self.tolerance)
        require(0 <= self.improvement < 1, name + "improvement", "a value in [0, 1)", self.improvement)
        require(0 < self.held_out_keep < 1, name + "held_out_keep", "a value in (0, 1)", self.held_out_keep)


@dataclass(frozen=True)
class DistillConfig:
    """Distillation of a prior into a one-step generator; see `ambient_sci.training.distillation`.

    Levels are in the units of ``levels`` (by default standard deviations of the data).

    Attributes:
        sigma_init: the level that the generator is called at.
        alpha: of the loss. At most 1 it always pushes the right way.
        sigma_min: lowest level at which generator and prior are compared; default: the lowest that the prior
            has learned. Below that it is asked what it was never taught, which decides what comes out.
        floor: lowest level, where the prior has learned all.
        sigma_max: highest level of the comparison.
        learning_rate: of the fake, and of the generator unless ``generator_learning_rate`` says otherwise.
        generator_learning_rate: of the generator.
        betas: of both optimisers.
    """

    sigma_init: float = 5.0
    alpha: float = 1.0
    sigma_min: float | None = None
    floor: float = 4e-3
    sigma_max: float = 48.0
    learning_rate: float = 2e-4
    generator_learning_rate: float | None = None
    betas: tuple[float, float] = (0.0, 0.999)

    def __post_init__(self) -> None:
        name = "distillation."
        check_types(self, name)
        for key in ("sigma_init", "floor", "sigma_max", "learning_rate"):
            require(getattr(self, key) > 0, name + key, "a value > 0", getattr(self, key))
        for key in ("sigma_min", "generator_learning_rate"):
            value = getattr(self, key)
            require(value is None or value > 0, name + key, "a value > 0", value)
        require(self.alpha >= 0, name + "alpha", "a value >= 0", self.alpha)
        require(all(0 <= beta < 1 for beta in self.betas), name + "betas", "two values in [0, 1)", self.betas)
