r"""The stage that learns a prior from noisy, possibly incomplete measurements: the Ambient stage.

Step s: a batch with its levels and split (`ambient_sci.training.batches`), the operator-aware Tweedie loss.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.errors import InputError
from ambient_sci.priors import NetworkPrior, Prior, require_mask_conditional, require_unconditional
from ambient_sci.priors.base import description_of
from ambient_sci.priors.padding import described, multiple_of
from ambient_sci.randomness import seeded
from ambient_sci.training.batches import INITIAL_WEIGHTS, Batches, Drawn
from ambient_sci.training.config import LossConfig, TrainConfig
from ambient_sci.training.loop import OneModule
from ambient_sci.training.players import copy_sharing, trainable_names
from ambient_sci.training.source import Source


def initial_prior(batches: Batches) -> NetworkPrior:
    """The network of the run with random weights: unconditional for complete data, mask-conditional for
    incomplete ones.
    """
    source, config = batches.source, batches.config
    prior = NetworkPrior(
        source.image_shape,
        data_std=source.data_std,
        data_mean=source.data_mean if config.centre else 0.0,
        conditioning="unconditional" if source.complete else "mask-conditional",
        network=config.network,
        sigma_min=_lowest_level(batches),
        sigma_max=batches.levels.sigma_max,
        mask_channels=source.design.unit_shape[0] if source.design else 1,
        about={"data": batches.reason, "subjects": len(set(source.measurements.subjects))},
        generator=seeded(config.seed, INITIAL_WEIGHTS),
    )
    if said := padding_of(prior):
        prior.config.about["padding"] = said
    return prior


def padding_of(prior: Prior) -> str:
    """What is padded inside the network of ``prior``, in words; empty where nothing is."""
    return described(prior.shape, multiple_of(getattr(prior, "network", None)))


def _lowest_level(batches: Batches) -> float:
    """The level above which a network learns what it answers: the noise of the data, unless consistency goes
    below.
    """
    consistency, levels = batches.config.consistency, batches.config.levels
    if consistency is not None and consistency.mode == "joint":
        return consistency.sigma_min * (batches.source.data_std if levels.relative else 1.0)
    return max(float(batches.noise_std.min()), batches.levels.floor)


def started_from(initial: Prior, source: Source, saved: bool) -> Prior:
    """A copy of ``initial`` to be trained on ``source``: what is frozen in it is shared, what is trained is
    not.

    Args:
        initial: any prior that can answer for these data. Its levels stay what they are: below the noise of
            the data it goes on answering as what it had learned before, moved by what it learns above.
        source: the data.
        saved: whether the run is written to a folder.

    Raises:
        InputError: another shape or kind than the data need, nothing to train, or a prior that cannot be
            saved.
    """
    check_start(initial, source, saved)
    trainable = trainable_names(initial)
    if not trainable:
        raise InputError(
            f"initial prior: expected parameters that require a gradient, got none in {initial!r}"
        )
    return copy_sharing(initial, trainable)  # type: ignore[return-value]


def check_start(initial: Prior, source: Source, saved: bool) -> None:
    """Whether a run on ``source`` can begin with ``initial``.

    Raises:
        InputError: another shape or kind than the data need, or a prior that cannot be saved where the run
        is.
    """
    if tuple(initial.shape) != source.image_shape:
        raise InputError(
            f"initial prior: expected images {source.image_shape}, got a prior of {tuple(initial.shape)}"
        )
    (require_unconditional if source.complete else require_mask_conditional)(
        initial, "training on these data"
    )
    if saved:
        description_of(initial)


def ambient_of(
    prior: Prior, drawn: Drawn, settings: LossConfig, sigma: Tensor | None = None
) -> losses.AmbientStep:
    """The operator-aware Tweedie loss of ``prior`` on a batch, at its own levels or at ``sigma``."""
    return losses.ambient_step(
        prior,
        drawn.split,
        drawn.y,
        drawn.sigma_y,
        drawn.sigma if sigma is None else sigma,
        given=drawn.given if prior.takes is type(drawn.given) else None,
        generator=drawn.generator,
        weighting=settings.weighting,
        c_min=settings.c_min,
    )


class AmbientStage(OneModule):
    """Trains a prior on measurements; unconditional where they are complete, mask-conditional where not.

    Args:
        source: the data, see `open_source`.
        config: the run.
        accelerator: device, and this process's share of each batch.
        initial: the prior to start from, which is trained in place; default: one with random weights.
        batches: what is drawn from the data; default: `Batches` of them.

    Raises:
        InputError: see `Batches` and `initial_prior`.
    """

    name = "ambient"

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        accelerator: Accelerator,
        initial: Prior | None = None,
        batches: Batches | None = None,
    ) -> None:
        self.source, self.config = source, config
        self.batches = batches or Batches(source, config, accelerator)
        self.module: nn.Module = initial or initial_prior(self.batches)

    @property
    def reason(self) -> str:
        """What this stage does and why, in words."""
        return self.batches.reason

    def indices(self, step: int, part: int = 0) -> list[int]:
        """The samples of a part of the batch."""
        return self.batches.indices(step, part)

    def loss(self, step: int, part: int = 0) -> Tensor:
        """The Ambient loss of a part of the batch."""
        return ambient_of(self.module, self.batches.draw(step, part), self.config.loss).loss  # type: ignore[arg-type]
