r"""A one-step generator from a prior and the measurements it was learned from: distillation.

Three networks with the weights of the prior to begin with: the *teacher*, which is frozen; the *fake*, which
learns what the generator makes; the *generator* G(z) = D(sigma_init z, sigma_init). Each step has two turns:

    fake         x_g = G(z);  y = A x_g + sigma_y n: the generator's images, measured as the data were (the
                 operators and noise of the batch); the operator-aware Ambient loss on y, as for the prior
    generator    x_g = G(z);  the distillation loss (`ambient_sci.losses.distillation_loss`) at x_g + sigma n,
                 or A_B x_g + sigma n where the prior is mask-conditional

Levels are uniform on the Karras grid from sigma_max down to the lowest that the teacher has learned. What the
teacher says below the noise of the data decides what comes out: an Ambient prior has learned nothing there
and teaches nothing there; a staged prior has. Its fake is a pair as well: above sigma_n it learns from noisy
measurements of the generator's images, by the Ambient loss; below it by plain denoising of these images,
which, unlike the data, are at hand without noise.

Source: Zhang et al., "Restoration Score Distillation" (2025). Theirs asks the teacher below the noise of the
data, where it was not trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.errors import InputError
from ambient_sci.losses.distillation_loss import distillation, karras_levels
from ambient_sci.noise import draw_noise, expand
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.priors import OneStepPrior, Prior, StagedPrior
from ambient_sci.priors.given import KeptRows
from ambient_sci.priors.modes import evaluating
from ambient_sci.randomness import seeded
from ambient_sci.training.batches import Batches, Drawn
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.players import copy_sharing
from ambient_sci.training.stage_configs import DistillConfig
from ambient_sci.training.walks import evaluate, moved

# Streams of randomness, beside those of the batches and of consistency.
_LEVELS, _IMAGES = 20, 21


class DistillationStage:
    """Turns a prior into a one-step generator.

    Args:
        batches: of the measurements that the prior was learned from: their operators, noise and labels are
            what the generator's images are measured by; their values are not looked at.
        teacher: the prior; copied.
        config: the run, with ``distillation``.

    Raises:
        InputError: levels that the teacher does not have.
    """

    name = "distillation"

    def __init__(self, batches: Batches, teacher: Prior, config: TrainConfig) -> None:
        assert isinstance(config.distillation, DistillConfig)
        self.batches, self.config, self.settings = batches, config, config.distillation
        unit = teacher.data_std if config.levels.relative else 1.0
        self.sigma_min, self.sigma_max = _levels(teacher, self.settings, unit)
        sigma_init = self.settings.sigma_init * unit
        if not self.sigma_min < sigma_init <= (teacher.sigma_max or sigma_init):
            raise InputError(
                "distillation.sigma_init: expected a level that the prior has learned, "
                f"{self.sigma_min:.3g} to {teacher.sigma_max:.3g}, got {sigma_init:.3g}"
            )
        self.teacher: Any = _copied(teacher).eval().requires_grad_(False)
        self.fake: Any = _copied(teacher).requires_grad_(True)
        self.generator = OneStepPrior(
            _copied(_answering(teacher, sigma_init)).requires_grad_(True), sigma_init
        )
        own: dict[str, Any] = {"learning_rate": self.settings.learning_rate, "betas": self.settings.betas}
        rate = self.settings.generator_learning_rate
        self.overrides = {
            "fake": own,
            "generator": own if rate is None else {**own, "learning_rate": rate},
        }

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Generator and fake."""
        return {"generator": self.generator, "fake": self.fake}

    @property
    def module(self) -> nn.Module:
        """The generator, which the run is about."""
        return self.generator

    @property
    def reason(self) -> str:
        """What this stage does, in words."""
        return (
            f"distillation of a {type(self.teacher).__name__} into a generator that is called once, at level "
            f"{self.generator.sigma:.4g}; compared with it at levels {self.sigma_min:.4g} to "
            f"{self.sigma_max:.4g}"
        )

    def indices(self, step: int, part: int = 0) -> list[int]:
        """The samples whose operators, noise and labels a part of the batch takes."""
        return self.batches.indices(step, part)

    def turns(self, step: int, part: int = 0) -> Iterator[tuple[str, Tensor]]:
        """First the fake, then the generator."""
        drawn, key = self.batches.draw(step, part), (step, self.batches.share(part))
        uniform = seeded(self.config.seed, _LEVELS, *key)
        noise = seeded(self.config.seed, _IMAGES, *key, device=drawn.generator.device)
        yield "fake", self.fake_loss(drawn, uniform, noise)
        yield "generator", self.generator_loss(drawn, uniform, noise)

    # -- the two losses --------------------------------------------------------------------------------------

    def fake_loss(self, drawn: Drawn, uniform: torch.Generator, noise: torch.Generator) -> Tensor:
        """The Ambient loss of the fake on the generator's images, measured like the samples of ``drawn``,
        (B,); below the level where a staged prior divides, their denoising loss."""
        with torch.no_grad(), evaluating(self.generator):
            images = self._draw(drawn, noise)
        least = drawn.sigma_y_host.clamp(min=self.sigma_min)
        if isinstance(self.fake, StagedPrior):
            t = self._draw_levels(len(images), self.sigma_min, uniform)
            high = t >= torch.clamp(least, min=self.fake.sigma_n)
        else:
            t = self._draw_levels(len(images), least, uniform)
            high = torch.ones(len(images), dtype=torch.bool)
        measured = drawn.operator.A(images)
        measured = measured + expand(drawn.sigma_y, measured) * draw_noise(measured, noise)
        again = drawn._replace(y=measured, sigma=moved(t, images), sigma_host=t, generator=noise)
        loss = images.new_zeros(len(images))
        for rows, loss_of in ((high, self._noisy), (~high, self._clean)):
            index = rows.nonzero()[:, 0]
            if len(index) == len(images):
                return loss_of(again, images)
            if len(index):
                there = index.to(images.device, non_blocking=True)
                loss = loss.index_copy(0, there, loss_of(again.rows(index), images[there]).to(loss))
        return loss

    def _noisy(self, again: Drawn, images: Tensor) -> Tensor:
        fake = self.fake.anchor if isinstance(self.fake, StagedPrior) else self.fake
        given = again.given if fake.takes is type(again.given) else None
        settings: Any = {"weighting": self.config.loss.weighting, "c_min": self.config.loss.c_min}
        return losses.ambient_step(
            fake,
            again.split,
            again.y,
            again.sigma_y,
            again.sigma,
            given=given,
            generator=again.generator,
            **settings,
        ).loss

    def _clean(self, again: Drawn, images: Tensor) -> Tensor:
        below, kept, given = self.fake.below, self._kept(again), self._given(again)
        clean = images if kept is None else kept.A(images)
        x = clean + expand(again.sigma, clean) * draw_noise(clean, again.generator)
        error = evaluate(below, kept, x, again.sigma, given) - images
        fraction = 1.0 if kept is None else kept.kept_fraction.to(error)
        return below.loss_weight(again.sigma, fraction) * error.square().flatten(1).mean(1)

    def generator_loss(self, drawn: Drawn, uniform: torch.Generator, noise: torch.Generator) -> Tensor:
        """The distillation loss of the generator, (B,)."""
        images, kept, given = self._draw(drawn, noise), self._kept(drawn), self._given(drawn)
        t = self._draw_levels(len(images), self.sigma_min, uniform)
        x = images if kept is None else kept.A(images)
        x = x + expand(moved(t, x), x) * draw_noise(x, noise)
        with evaluating(self.fake), _frozen(self.fake):
            fake = by_level(self.fake, kept, x, t, given)
        return distillation(images, by_level(self.teacher, kept, x, t, given), fake, self.settings.alpha)

    def _draw(self, drawn: Drawn, noise: torch.Generator) -> Tensor:
        z = torch.empty(len(drawn.y), *self.generator.shape, device=drawn.y.device)
        given = drawn.given if self.generator.takes is type(drawn.given) else None
        return self.generator.draw(draw_noise(z, noise), given)

    def _draw_levels(self, num: int, low: float | Tensor, uniform: torch.Generator) -> Tensor:
        return karras_levels(torch.rand(num, generator=uniform), low, self.sigma_max)

    def _kept(self, drawn: Drawn) -> RowMaskedOperator | None:
        return drawn.split.kept if self.teacher.takes is KeptRows else None

    def _given(self, drawn: Drawn) -> Any:
        return drawn.given if self.teacher.takes is type(drawn.given) and drawn.given is not None else None

    def prior(self, averages: dict[str, nn.Module]) -> Prior:
        """The generator with averaged weights."""
        return averages["generator"].eval()  # type: ignore[return-value]


def by_level(prior: Prior, kept: RowMaskedOperator | None, x: Tensor, t: Tensor, given: Any = None) -> Tensor:
    """D(x, t) at levels ``t`` on the CPU, so that a staged prior divides a batch without looking at the
    device."""
    if not isinstance(prior, StagedPrior):
        return evaluate(prior, kept, x, t, given)
    high, out = t >= prior.sigma_n * (1 - 1e-6), None
    for part, rows in ((prior.anchor, high), (prior.below, ~high)):
        index = rows.nonzero()[:, 0]
        if len(index) == 0:
            continue
        there = index.to(x.device, non_blocking=True)
        some = kept if kept is None or kept.batch_size == 1 else kept[there]
        answer = evaluate(part, some, x[there], t[index], None if given is None else given[there])
        if len(index) == len(x):
            return answer
        if out is None:
            out = answer.new_zeros(len(x), *answer.shape[1:])
        out = out.index_copy(0, there, answer)
    assert out is not None
    return out


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """``module`` without gradients of its parameters inside: those of its input alone."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad = False
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad = True


def _copied(prior: Prior) -> Any:
    """A copy with every parameter its own."""
    return copy_sharing(prior, [name for name, _ in prior.named_parameters()])


def _answering(prior: Prior, sigma: float) -> Prior:
    """What a staged prior answers with at level ``sigma``."""
    if not isinstance(prior, StagedPrior):
        return prior
    return _answering(prior.anchor if sigma >= prior.sigma_n else prior.below, sigma)


def _levels(teacher: Prior, settings: DistillConfig, unit: float) -> tuple[float, float]:
    """Lowest and highest level of the comparison, absolute.

    Raises:
        InputError: nothing between them.
    """
    low = max(teacher.sigma_min, settings.floor * unit)
    if settings.sigma_min is not None:
        low = settings.sigma_min * unit
    high = min(settings.sigma_max * unit, teacher.sigma_max or float("inf"))
    if not 0 < low < high:
        raise InputError(
            f"distillation: expected levels from low to high, got {low:.3g} to {high:.3g} (the prior's are "
            f"{teacher.sigma_min:.3g} to {teacher.sigma_max})"
        )
    return low, high
