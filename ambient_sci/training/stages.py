r"""The stage that learns a prior from noisy, possibly incomplete measurements: the Ambient stage.

Step s, all of it a function of (seed, s):

    samples (y, A, sigma_y)  ->  symmetries  ->  sigma ~ level distribution above sigma_y  ->  operator-aware Tweedie loss.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.data import MeasurementLoader
from ambient_sci.errors import InputError
from ambient_sci.noise import Concentrated, LogNormal, LogUniform
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.priors import NetworkPrior, Prior
from ambient_sci.training.augment import augment, check_augmentations
from ambient_sci.training.config import LevelConfig, TrainConfig
from ambient_sci.training.source import Source, default_keep

# Streams of randomness of one run: numbers that keep the draws for different purposes apart.
INITIAL_WEIGHTS, LEVELS, NOISE = 0, 1, 2


def seeded(seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a function of (seed, key): the same on every machine, unrelated for different keys."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def level_distribution(config: LevelConfig, data_std: float) -> LogNormal | Concentrated | LogUniform:
    """The distribution of training levels that ``config`` asks for, in absolute units."""
    unit = data_std if config.relative else 1.0
    high, low = config.sigma_max * unit, config.floor * unit
    if config.kind == "log-normal":
        return LogNormal(mean=config.mean + float(np.log(unit)), std=config.std, sigma_max=high, floor=low)
    if config.kind == "concentrated":
        return Concentrated(sigma_max=high, power=config.power, floor=low)
    return LogUniform(sigma_max=high, floor=low)


class Drawn(NamedTuple):
    """A batch of measurements, noise levels (B,) to train it at, and where the noise of its loss comes from."""

    operator: RowMaskedOperator
    y: Tensor
    sigma_y: Tensor
    sigma: Tensor
    noise: torch.Generator


class AmbientStage:
    """Trains a `NetworkPrior` on measurements; unconditional where they are complete, mask-conditional where not.

    Args:
        source: the data, see `open_source`.
        config: the run.
        accelerator: device, and this process's share of each batch.
        initial: the prior to start from; default: one with random weights.

    Raises:
        InputError: a size that the network cannot divide, an augmentation that is not exact for these data, levels that end
            below the noise of the data, a batch that the processes cannot share evenly.
    """

    name = "ambient"

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        accelerator: Accelerator,
        initial: NetworkPrior | None = None,
    ) -> None:
        self.source, self.config = source, config
        self.device, self.rank = accelerator.device, accelerator.process_index
        if config.batch_size % accelerator.num_processes:
            raise InputError(
                f"batch_size: expected a multiple of the {accelerator.num_processes} processes, got {config.batch_size}"
            )
        self.noise_std = (
            source.noise_std if config.loss.kind == "ambient" else torch.zeros(len(source.measurements))
        )
        check_augmentations(
            config.augmentations, source.image_shape, source.measurements.operator_name, source.design
        )
        self.levels = level_distribution(config.levels, source.data_std)
        if not float(self.noise_std.max()) < self.levels.sigma_max:
            raise InputError(
                f"levels.sigma_max: expected a level above the noise of the data ({float(self.noise_std.max()):g}), "
                f"got {self.levels.sigma_max:g}"
            )
        self.keep = config.loss.keep or default_keep(source.complete)
        self.module: nn.Module = initial or self._initial_prior()
        self.loader = MeasurementLoader(
            source.measurements,
            config.batch_size // accelerator.num_processes,
            config.seed,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            device=self.device,
        )

    def _initial_prior(self) -> NetworkPrior:
        source, config = self.source, self.config
        conditional = not source.complete
        return NetworkPrior(
            source.image_shape,
            data_std=source.data_std,
            conditioning="mask-conditional" if conditional else "unconditional",
            network=config.network,
            sigma_min=self._lowest_level(),
            sigma_max=self.levels.sigma_max,
            mask_channels=source.design.unit_shape[0] if source.design else 1,
            about={"data": source.reason, "subjects": len(set(source.measurements.subjects))},
            generator=seeded(config.seed, INITIAL_WEIGHTS),
        )

    def _lowest_level(self) -> float:
        """The level above which the network learns what it answers: the noise of the data, unless consistency goes below."""
        consistency, unit = (
            self.config.consistency,
            self.source.data_std if self.config.levels.relative else 1.0,
        )
        if consistency is not None and consistency.mode == "joint":
            return consistency.sigma_min * unit
        return max(float(self.noise_std.min()), self.levels.floor)

    @property
    def reason(self) -> str:
        """What this stage does and why, in words."""
        return self.source.reason

    def indices(self, step: int) -> list[int]:
        return self.loader.indices(step).tolist()

    def draw(self, step: int) -> Drawn:
        """The batch of a step with the noise levels and the randomness of its loss, a function of (seed, step)."""
        config, key = self.config, (step, self.rank)
        raw = self.loader.batch(step)
        draw = seeded(config.seed, LEVELS, *key)
        noise_std = self.noise_std[raw.indices]
        # Levels are drawn where they are cheap to look at, and moved without waiting.
        sigma = self.levels.sample(len(noise_std), minimum=noise_std, generator=draw).to(
            self.device, non_blocking=True
        )
        operator, y, sigma_y = self.source.ready(raw.operator, raw.y, raw.sigma_y, draw)
        operator, y, sigma_y = augment(operator, y, config.augmentations, draw, sigma_y)
        # Splits of masks are drawn on the CPU; without them noise is drawn where it is needed.
        noise = seeded(config.seed, NOISE, *key, device=self.device if self.source.complete else "cpu")
        return Drawn(operator, y, sigma_y, sigma, noise)

    def ambient_step(self, prior: Prior, drawn: Drawn, sigma: Tensor | None = None) -> losses.AmbientStep:
        """The operator-aware Tweedie loss of ``prior`` on a batch, at its own levels or at ``sigma``."""
        settings = self.config.loss
        return losses.ambient_step(
            prior,
            drawn.operator,
            drawn.y,
            drawn.sigma_y,
            drawn.sigma if sigma is None else sigma,
            keep=self.keep,
            generator=drawn.noise,
            weighting=settings.weighting,
            c_min=settings.c_min,
            tweedie=settings.tweedie,
            held_out_weights=settings.held_out_weights,
            hold_out_calibration=settings.hold_out_calibration,
        )

    def loss(self, step: int) -> Tensor:
        drawn = self.draw(step)
        if self.config.loss.kind == "denoising":
            return losses.denoising(self.module, drawn.y, drawn.sigma, generator=drawn.noise)
        return self.ambient_step(self.module, drawn).loss

    def prior(self, average: nn.Module) -> Prior:
        return average  # type: ignore[return-value]  # a NetworkPrior: a copy of ``module``
