r"""Stages that learn what lies below the noise of the data, by consistency [Daras et al. 2024].

A denoiser that is exact at sigma_n and a martingale of its own reverse process below it is exact below it
(`ambient_sci.losses`). Errors at sigma_n are amplified on the way down, so it must be accurate there first.
Hence *staged* consistency:

    stage 1   the Ambient loss alone, at the levels above the noise of the data; its weight average is frozen:
              the anchor
    stage 2   a copy of the anchor, trained at sigma < sigma_n only:

        x = a noisy image of the data, t = sigma_n
        k times, without gradient:
            x <- reverse step of the hybrid from t to t' = max(t e^(-stride u), sigma_min),   t <- t'
        s = t e^(-gap u')
        loss of the pair (t, s):     unbiased (D_t - E D_s)^2 from m draws of x_s,
                                     weight 1/s^2 + 1/data_std^2

where the hybrid is the anchor at and above sigma_n and the copy below it, and gradients go through D_s and,
below sigma_n, through D_t. Nothing but the state at sigma_n comes from the data; the result is a
`StagedPrior`. Data with more noise than sigma_n are first walked down to it, data with less get noise added,
and also train the copy directly, by the Ambient loss between their level and sigma_n.

Pairs that lie wholly below sigma_n leave freedom: D(x, sigma) = x satisfies them all, and only pairs that
start at sigma_n rule it out. What networks made of that in our experiments was to leave noise in, more of it
than the anchor's own error explains. *Shrinkage* takes the other side: it adds the denoising loss on the
anchor's estimates,

    x^ = D(x, sigma_n),     sigma = sigma_n (sigma_min / sigma_n)^u,
    weight  lambda(sigma) |D(x^ + sigma z, sigma) - x^|^2,

whose law (that of truncated sampling) lacks detail and has hardly any noise. A *warm start* begins with this
loss alone.

*Joint* consistency, as published, adds the loss to the Ambient loss on one network from the start. With k = 0
the pair begins where the Ambient loss has just evaluated the network and shares D_t; with k > 0 it begins as
above.

Incomplete measurements are walked in their kept rows, with a mask-conditional network. Levels of walks are
drawn and kept on the host, where they decide which network answers. Whatever is taken as it is (walks, the
anchor) is computed in evaluation mode: dropout is for what is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.errors import InputError
from ambient_sci.noise import ancestral_step, draw_noise, expand
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.priors import Prior, StagedPrior
from ambient_sci.priors.modes import evaluating
from ambient_sci.randomness import seeded
from ambient_sci.training.batches import Batches, Drawn
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.loop import OneModule
from ambient_sci.training.players import copy_sharing, trainable_names
from ambient_sci.training.source import Source
from ambient_sci.training.stage_configs import JointConfig, StagedConfig
from ambient_sci.training.stages import AmbientStage, ambient_of
from ambient_sci.training.walks import descend, evaluate, moved, shrunk, walk

# Streams of randomness, beside those of the batches.
_DEPTH, _GAPS, _CHAINS = 10, 11, 12


class ConsistencyStage(OneModule):
    """Stage 2 of staged consistency.

    Args:
        batches: those of stage 1.
        anchor: what it has learned; frozen. A module that is still trained is copied.
        config: the run.
        trainable: names of the anchor's parameters that the copy trains; the others it shares. Default: those
            that require a gradient, all if none does.

    Raises:
        InputError: no level to be consistent below, or chains to be kept of incomplete measurements.
    """

    name = "consistency"

    def __init__(
        self,
        batches: Batches,
        anchor: nn.Module,
        config: TrainConfig,
        trainable: Iterable[str] | None = None,
    ) -> None:
        assert isinstance(config.consistency, StagedConfig)
        self.batches, self.settings, self.config = batches, config.consistency, config
        self.sigma_n, self.sigma_min = staged_levels(batches, self.settings)
        learned = trainable_names(anchor)
        everything = [name for name, _ in anchor.named_parameters()]
        names = set(trainable if trainable is not None else learned or everything)
        frozen = copy_sharing(anchor, learned) if learned else anchor
        self.anchor: Any = frozen.eval().requires_grad_(False)
        self.module: nn.Module = copy_sharing(self.anchor, names)
        for name, p in self.module.named_parameters():
            p.requires_grad_(name in names)
        self.chains: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def reason(self) -> str:
        """What this stage does, in words."""
        return staged_reason(self.sigma_n)

    def indices(self, step: int, part: int = 0) -> list[int]:
        """The samples of a part of the batch."""
        return self.batches.indices(step, part)

    def loss(self, step: int, part: int = 0) -> Tensor:
        """The loss of the pairs of a part of the batch, and what the settings add to it."""
        drawn, settings, key = self.batches.draw(step, part), self.settings, (step, self.batches.share(part))
        uniform = seeded(self.config.seed, _GAPS, *key)
        noise = seeded(self.config.seed, _CHAINS, *key, device=drawn.generator.device)
        kept, x, t = self._start(drawn, noise)
        if step < settings.warm_start:
            return self._denoising_of_estimates(drawn, kept, x, t, uniform, noise)
        shrinking: Tensor | float = 0.0
        if settings.shrinkage > 0:
            shrinking = settings.shrinkage * self._denoising_of_estimates(drawn, kept, x, t, uniform, noise)
        if settings.replay:
            x, t = self._continued(part, x, t)
        else:
            steps = {"steps": draw_depth(settings.walk, self.config.seed, step), "stride": settings.stride}
            with evaluating(self.module):
                answer = partial(self._hybrid, kept, drawn.given)
                x, t = walk(
                    answer, kept, x, t, **steps, sigma_min=self.sigma_min, uniform=uniform, generator=noise
                )  # type: ignore[arg-type]
        s = shrunk(t, settings.gap, uniform)
        denoised = self._hybrid(kept, drawn.given, x, t)
        there = moved(t, x), moved(s, x)
        options: Any = {"operator": kept, "given": drawn.given, "generator": noise, **draws_of(settings)}
        loss = losses.consistency_step(self.module, x, *there, denoised, **options)  # type: ignore[arg-type]
        if settings.replay:
            self.chains[part] = (ancestral_step(x, denoised.detach(), *there, generator=noise), s)
        return self._with_quiet_data(loss + shrinking, drawn, uniform)

    def _hybrid(self, kept: RowMaskedOperator | None, given: Any, x: Tensor, t: Tensor) -> Tensor:
        """D at levels ``t`` (on the CPU): the anchor's where they are sigma_n, the copy's below."""
        high = t >= self.sigma_n * (1 - 1e-6)
        sides = ((self.anchor, high), (self.module, ~high))
        for prior, part in sides:
            if bool(part.all()):
                return evaluate(prior, kept, x, t, given)
        out = torch.empty_like(x)
        for prior, part in sides:
            rows = part.nonzero()[:, 0]
            there = rows.to(x.device, non_blocking=True)
            told = None if given is None else given[there]
            # Kept rows of a batch are all at one side: they are not continued.
            out = out.index_copy(0, there, evaluate(prior, None, x[there], t[rows], told))
        return out

    def _start(self, drawn: Drawn, noise: torch.Generator) -> tuple[RowMaskedOperator | None, Tensor, Tensor]:
        """Kept rows (None: images), states and levels (B,) on the CPU: the data, brought to level sigma_n."""
        kept = None if self.batches.source.complete else drawn.split.kept
        y, level = drawn.y, drawn.sigma_y_host
        goal = torch.full_like(level, self.sigma_n)
        missing = (goal**2 - level**2).clamp(min=0).sqrt()
        if bool((missing > 0).any()):
            y = y + expand(moved(missing, y), y) * draw_noise(y, noise)
        answer = partial(evaluate, self.anchor, kept, given=drawn.given)
        return kept, descend(answer, kept, y, torch.maximum(level, goal), self.sigma_n, noise), goal

    def _denoising_of_estimates(
        self,
        drawn: Drawn,
        kept: RowMaskedOperator | None,
        x: Tensor,
        t: Tensor,
        uniform: torch.Generator,
        noise: torch.Generator,
    ) -> Tensor:
        """Denoising loss (B,) of the copy on the anchor's estimates from states ``x`` at level sigma_n, below
        that level.
        """
        with torch.no_grad():
            estimates = evaluate(self.anchor, kept, x, t, drawn.given)
        sigma = moved(t * (self.sigma_min / t) ** torch.rand(len(t), generator=uniform).to(t), x)
        clean = estimates if kept is None else kept.A(estimates)
        noisy = clean + expand(sigma, clean) * draw_noise(clean, noise)
        below: Prior = self.module  # type: ignore[assignment]
        error = evaluate(below, kept, noisy, sigma, drawn.given) - estimates
        # Missing rows leave an error that no sigma makes small.
        fraction = 1.0 if kept is None else kept.kept_fraction.to(error)
        return below.loss_weight(sigma, fraction) * error.square().flatten(1).mean(1)

    def _continued(self, part: int, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The chains of the last step; ``x`` at level ``t`` where there are none or they have reached the
        bottom.
        """
        if part not in self.chains:
            return x, t
        states, levels = self.chains[part]
        again = levels <= self.sigma_min
        restart = again.to(x.device, non_blocking=True).reshape(-1, *([1] * (x.ndim - 1)))
        return torch.where(restart, x, states), torch.where(again, t, levels)

    def _with_quiet_data(self, loss: Tensor, drawn: Drawn, uniform: torch.Generator) -> Tensor:
        """``loss``, and for data with less noise than sigma_n the Ambient loss at a level in between."""
        quiet = (drawn.sigma_y_host < self.sigma_n * (1 - 1e-6)).nonzero()[:, 0]
        if len(quiet) == 0:
            return loss
        some = drawn if len(quiet) == len(drawn.y) else drawn.rows(quiet)
        low = some.sigma_y_host.clamp(min=self.batches.levels.floor)
        level = low * (self.sigma_n / low) ** torch.rand(len(low), generator=uniform).to(low)
        direct = ambient_of(self.module, some, self.config.loss, moved(level, drawn.y)).loss  # type: ignore[arg-type]
        there = quiet.to(loss.device, non_blocking=True)
        return (self.settings.weight * loss).index_add(0, there, direct.to(loss))

    def prior(self, averages: dict[str, nn.Module]) -> Prior:
        """The anchor above sigma_n, the averaged copy below."""
        below: Any = averages["prior"]
        below.sigma_min = self.sigma_min
        return StagedPrior(self.anchor, below, self.sigma_n).eval()

    # -- chains, for the checkpoint
    # ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The chains that are walked on from step to step, part after part."""
        if not self.chains:
            return {}
        states, levels = zip(*(self.chains[part] for part in sorted(self.chains)), strict=True)
        return {"states": torch.cat(states), "levels": torch.cat(levels)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        if tensors:
            parts = self.config.micro_batches
            states, levels = (tensors[key].chunk(parts) for key in ("states", "levels"))
            pairs = zip(states, levels, strict=True)
            self.chains = {part: (x.to(self.batches.device), t.cpu()) for part, (x, t) in enumerate(pairs)}


class JointStage(AmbientStage):
    """The Ambient stage with the consistency loss added, on one network."""

    name = "joint"

    def __init__(
        self, source: Source, config: TrainConfig, accelerator: Accelerator, initial: Prior | None = None
    ) -> None:
        assert isinstance(config.consistency, JointConfig)
        super().__init__(source, config, accelerator, initial)
        self.settings = config.consistency
        self.sigma_n, self.sigma_min = consistency_levels(self.batches, self.settings, 1.0)

    @property
    def reason(self) -> str:
        """What this stage does, in words."""
        return (
            f"{self.source.reason}; with consistency below noise level {self.sigma_n:.4g} on the same "
            "network, "
            f"from step {self.settings.kick_in}"
        )

    def weight(self, step: int) -> float:
        """Factor of the consistency loss at ``step``: 0 before ``kick_in``, then a linear ramp."""
        settings = self.settings
        return settings.weight * min(max((step - settings.kick_in + 1) / max(settings.ramp, 1), 0.0), 1.0)

    def loss(self, step: int, part: int = 0) -> Tensor:
        """The Ambient loss of a part of the batch, and that of pairs of levels from ``kick_in`` on."""
        drawn, settings, weight = self.batches.draw(step, part), self.settings, self.weight(step)
        prior: Prior = self.module  # type: ignore[assignment]
        ambient = ambient_of(prior, drawn, self.config.loss)
        if weight == 0:
            return ambient.loss
        key = (step, self.batches.share(part))
        uniform = seeded(self.config.seed, _GAPS, *key)
        noise = seeded(self.config.seed, _CHAINS, *key, device=drawn.generator.device)
        kept = None if self.source.complete else ambient.kept
        depth = draw_depth(settings.walk, self.config.seed, step)
        x, t, denoised = ambient.y_t, drawn.sigma_host, ambient.denoised
        if depth > 0:
            answer = partial(evaluate, prior, kept, given=drawn.given)
            start = drawn.sigma_y_host.clamp(min=self.sigma_min)
            steps: Any = {"steps": depth, "stride": settings.stride, "sigma_min": self.sigma_min}
            with evaluating(self.module):
                x, t = walk(answer, kept, drawn.y, start, **steps, uniform=uniform, generator=noise)
            denoised = answer(x, t)
        s = shrunk(t, settings.gap, uniform)
        options: Any = {"operator": kept, "given": drawn.given, "generator": noise, **draws_of(settings)}
        pairs = losses.consistency_step(prior, x, moved(t, x), moved(s, x), denoised, **options)
        return ambient.loss + weight * pairs


def draws_of(settings: StagedConfig | JointConfig) -> dict[str, Any]:
    """How a pair is drawn, as arguments of the loss."""
    names = ("draws", "antithetic", "substeps")
    return {name: getattr(settings, name) for name in names}


def draw_depth(walk: tuple[int, int], seed: int, step: int) -> int:
    """Number of walk steps of this step's batch, the same in every share."""
    least, most = walk
    return least + int(torch.randint(most - least + 1, (), generator=seeded(seed, _DEPTH, step)))


def consistency_levels(
    batches: Batches, settings: StagedConfig | JointConfig, margin: float
) -> tuple[float, float]:
    """Absolute levels (sigma_n, sigma_min) between which consistency is learned.

    Raises:
        InputError: there is no noise in some of the data and no level is given, or nothing is left between
            the two.
    """
    if batches.source.measurements.noise_by_entry:
        raise InputError(
            "consistency: expected one noise level for each sample, got one for each entry: there is no one "
            "level "
            "below which nothing is known"
        )
    unit = batches.source.data_std if batches.config.levels.relative else 1.0
    lowest = float(batches.noise_std.min())
    if settings.sigma_n is None and lowest == 0:
        raise InputError("consistency.sigma_n: expected a level where some of the data are clean, got none")
    sigma_n = lowest * margin if settings.sigma_n is None else settings.sigma_n * unit
    sigma_min = settings.sigma_min * unit
    if not sigma_min < sigma_n < batches.levels.sigma_max:
        raise InputError(
            "consistency.sigma_min: expected sigma_min < sigma_n (margin included) < levels.sigma_max, got "
            f"{sigma_min:.3g}, {sigma_n:.3g} and {batches.levels.sigma_max:.3g}"
        )
    return sigma_n, sigma_min


def staged_levels(batches: Batches, settings: StagedConfig) -> tuple[float, float]:
    """`consistency_levels` of stage 2, which is refused here if it cannot be.

    Raises:
        InputError: see `consistency_levels`; or chains to be kept of incomplete measurements.
    """
    if settings.replay and not batches.source.complete:
        raise InputError(
            "consistency.replay: expected complete data (chains of kept rows need their masks), got "
            "incomplete"
        )
    return consistency_levels(batches, settings, settings.margin)


def staged_reason(sigma_n: float) -> str:
    """What stage 2 does, in words."""
    return (
        f"then consistency below noise level {sigma_n:.4g}, with what was learned above it frozen: a "
        "staged prior"
    )


def second_stage_config(config: TrainConfig) -> TrainConfig:
    """The settings of stage 2 for the training loop."""
    settings = config.consistency
    assert isinstance(settings, StagedConfig)
    return dataclasses.replace(
        config,
        max_steps=settings.max_steps,
        max_minutes=settings.max_minutes,
        learning_rate=settings.learning_rate,
        ema_decay=settings.ema_decay,
        ema_half_life_images=None,
    )
