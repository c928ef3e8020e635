r"""Batches: everything random about a step, drawn in one place, a function of (seed, step, share).

    samples (y, A, sigma_y)  ->  symmetries  ->  sigma ~ level distribution above sigma_y  ->  split of A into
    B and H

What is to be looked at (levels, masks, symmetries) is drawn and kept on the host; what is large (the noise of
the loss) comes from a generator on the device. A loss that takes a `Drawn` never has to wait for the device.
Nothing is checked per step: data, design and levels are, when the batches are made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ambient_sci.data import MeasurementLoader
from ambient_sci.errors import InputError
from ambient_sci.noise import Concentrated, LogNormal, LogUniform
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.operators.split import Split
from ambient_sci.priors.given import Labels, Prompt
from ambient_sci.randomness import seeded
from ambient_sci.training.augment import (
    apply_symmetries,
    check_augmentations,
    draw_symmetries,
    mirrored,
    transformed_levels,
)
from ambient_sci.training.config import LevelConfig, TrainConfig
from ambient_sci.training.frozen_noise import Frozen, FrozenNoise
from ambient_sci.training.source import Source, default_keep

# Streams of randomness of one run: numbers that keep the draws for different purposes apart. 4 is the loop's.
INITIAL_WEIGHTS, LEVELS, NOISE, SPLIT = 0, 1, 2, 3


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
    """One part of a batch.

    Attributes:
        split: which rows a network is shown and which it is scored on; ``split.operator`` is A.
        y: measurements, on the device; the noisy images where the data are complete.
        sigma_y: noise of the measurements, (B,), or of their shape where it differs by entry; on the device.
        sigma: level to train at, (B,), on the device.
        generator: source of the noise of the loss, on the device.
        sigma_y_host: the largest noise of each sample, (B,), on the CPU, to look at.
        sigma_host: the level to train at, on the CPU.
        given: what a denoiser is told besides, one row a sample; None: nothing.
    """

    split: Split
    y: Tensor
    sigma_y: Tensor
    sigma: Tensor
    generator: torch.Generator
    sigma_y_host: Tensor
    sigma_host: Tensor
    given: Any = None

    @property
    def operator(self) -> RowMaskedOperator:
        """A, every measured row."""
        return self.split.operator

    def rows(self, index: Tensor) -> Drawn:
        """Some samples of the part; ``index`` on the CPU."""
        there = index.to(self.y.device, non_blocking=True)
        return self._replace(
            split=self.split[there],
            y=self.y[there],
            sigma_y=self.sigma_y[there],
            sigma=self.sigma[there],
            sigma_y_host=self.sigma_y_host[index],
            sigma_host=self.sigma_host[index],
            given=None if self.given is None else self.given[there],
        )


class Batches:
    """What a run draws from its data, step by step.

    Args:
        source: the data, see `open_source`.
        config: the run.
        accelerator: device, and this process's share of each batch.

    Attributes:
        levels: distribution of training levels.
        keep: fraction of the measured rows that a network is shown.
        noise_std: noise of every sample, (N,), on the CPU.

    Raises:
        InputError: an augmentation that is not exact for these data, levels that end below the noise of the
            data, a batch that the processes and their parts cannot share evenly.
    """

    def __init__(self, source: Source, config: TrainConfig, accelerator: Accelerator) -> None:
        config = config.explicit()
        self.source, self.config, self.device = source, config, accelerator.device
        self.shares = accelerator.num_processes * config.micro_batches
        self._first = accelerator.process_index * config.micro_batches
        if config.batch_size % self.shares:
            raise InputError(
                f"batch_size: expected a multiple of the {self.shares} shares ({accelerator.num_processes} "
                "processes x "
                f"{config.micro_batches} micro_batches), got {config.batch_size}"
            )
        design = source.design
        check_augmentations(
            config.augmentations, source.image_shape, source.measurements.operator_name, design
        )
        self.noise_std = source.noise_std
        if source.measurements.noise_by_entry and "phase" in config.augmentations:
            raise InputError(
                "augmentation phase: expected one noise level for each sample, got one for each entry: noise "
                "that "
                "differs between real and imaginary part does not stay white when they are mixed"
            )
        self.levels = level_distribution(config.levels, source.data_std)
        if not float(self.noise_std.max()) < self.levels.sigma_max:
            raise InputError(
                "levels.sigma_max: expected a level above the noise of the data "
                f"({float(self.noise_std.max()):g}), "
                f"got {self.levels.sigma_max:g}"
            )
        self.keep = config.loss.keep or default_keep(source.complete)
        # Masks are looked at when they are split: those batches come on the host and are moved after that.
        self._loaded_on = self.device if source.complete else torch.device("cpu")
        self._frozen = self._frozen_noise()
        self._loaders: list[MeasurementLoader] = []
        for part in range(config.micro_batches):
            self._loaders.append(
                MeasurementLoader(
                    self._loaders[0].data if self._loaders else source.measurements,
                    config.batch_size // self.shares,
                    config.seed,
                    rank=self.share(part),
                    num_processes=self.shares,
                    device=self._loaded_on,
                )
            )

    def _frozen_noise(self) -> FrozenNoise | None:
        """The noise that each sample keeps, where the run asks for it."""
        settings, data = self.config.frozen_noise, self.source.measurements
        if settings is None:
            return None
        unit = self.source.data_std if self.config.levels.relative else 1.0
        shape = tuple(data.measurements([0]).shape[1:])
        return FrozenNoise(settings.sigma_n * unit, settings.seed, len(data), shape, self._loaded_on)

    @property
    def reason(self) -> str:
        """What is trained on these data and why, in words."""
        if self._frozen is None or self._frozen.sigma_n == 0:
            return self.source.reason
        return (
            f"{self.source.reason}. At levels from {self._frozen.sigma_n:.4g} up, the Ambient loss on one "
            "noisy copy of each sample that stays the same (frozen_noise)"
        )

    def share(self, part: int) -> int:
        """Which of all shares of a batch the part ``part`` of this process is."""
        return self._first + part

    def indices(self, step: int, part: int = 0) -> list[int]:
        """The samples of a part."""
        return self._loaders[part].indices(step).tolist()

    def draw(self, step: int, part: int = 0) -> Drawn:
        """A part of the batch of a step, a function of (seed, step, share)."""
        config, key = self.config, (step, self.share(part))
        raw = self._loaders[part].batch(step)
        draw = seeded(config.seed, LEVELS, *key)
        largest = self.noise_std[raw.indices]
        sigma = self.levels.sample(len(largest), minimum=largest, generator=draw)
        # Before any symmetry: the noise of an image moves with it.
        y, sigma_y, largest = Frozen(raw.y, raw.sigma_y, largest)
        if self._frozen is not None:
            y, sigma_y, largest = self._frozen(raw.indices, y, sigma_y, largest, sigma)
        operator, y, _ = self.source.ready(raw.operator, y, sigma_y, draw)
        mask = operator.network_mask
        operator, y = operator.on_device(self.device), y.to(self.device, non_blocking=True)
        symmetries = draw_symmetries(config.augmentations, len(y), draw)
        operator, y, scaled = apply_symmetries(symmetries, operator, y, largest)
        own = scaled
        if sigma_y.ndim > 1:  # noise that differs by entry moves with the image
            own = transformed_levels(symmetries, operator, sigma_y.to(self.device, non_blocking=True))
        split = self.split(
            operator, len(y), seeded(config.seed, SPLIT, *key), mirrored(symmetries, operator, mask)
        )
        noise = seeded(config.seed, NOISE, *key, device=self.device)
        there = {"device": self.device, "non_blocking": True}
        given = self._given(raw.labels, raw.prompts, draw)
        return Drawn(split, y, own.to(**there), sigma.to(**there), noise, scaled, sigma, given)

    def _given(
        self, labels: Tensor | None, prompts: Prompt | None, generator: torch.Generator
    ) -> Labels | Prompt | None:
        """The prompts or labels of a part, some of them dropped, so that a network learns to do without;
        None: data without. Data that have both are told by their prompts."""
        if prompts is not None:
            dropped = torch.rand(len(prompts.tokens), generator=generator) < self.config.drop_labels
            return prompts.to(self.device).dropped(dropped.to(self.device))
        if labels is None:
            return None
        labels = labels.cpu().long()
        dropped = torch.rand(len(labels), generator=generator) < self.config.drop_labels
        return Labels(labels).dropped(dropped).to(self.device)

    def split(self, operator: RowMaskedOperator, num: int, generator: torch.Generator, mask: Tensor) -> Split:
        """Divide the rows of ``num`` measurements; ``mask`` is the operator's, on the CPU. The place to do it
        otherwise."""
        return operator.split(keep=self.keep, generator=generator, num=num, mask=mask)

    def close(self) -> None:
        """Stop reading ahead."""
        for loader in self._loaders:
            loader.close()
