r"""Stages that learn what lies below the noise of the data, by consistency [Daras et al. 2024].

A denoiser that is exact at sigma_n and a martingale of its own reverse process below it is exact below it (`ambient_sci.losses`).
Errors at sigma_n are amplified on the way down, so it must be accurate there first. Hence *staged* consistency:

    stage 1   the Ambient loss alone, at the levels above the noise of the data; its weight average is frozen: the anchor
    stage 2   a copy of the anchor, trained at sigma < sigma_n only:

        x = a noisy image of the data, t = sigma_n
        k times, without gradient:   x <- reverse step of the hybrid from t to t' = max(t e^(-stride u), sigma_min),   t <- t'
        s = t e^(-gap u')
        loss of the pair (t, s):     unbiased (D_t - E D_s)^2 from m draws of x_s,   weight 1/s^2 + 1/data_std^2

where the hybrid is the anchor at and above sigma_n and the copy below it, and gradients go through D_s and, below sigma_n, through
D_t. Nothing but the state at sigma_n comes from the data; the result is a `StagedPrior`. Data with more noise than sigma_n are first walked down
to it, data with less get noise added, and also train the copy directly, by the Ambient loss between their level and sigma_n.

Pairs that lie wholly below sigma_n leave freedom: D(x, sigma) = x satisfies them all, and only pairs that start at sigma_n rule it out. What networks made of that
in our experiments was to leave noise in, more of it than the anchor's own error explains. *Shrinkage* takes the other side: it adds the denoising loss on the anchor's
estimates,

    x^ = D(x, sigma_n),     sigma = sigma_n (sigma_min / sigma_n)^u,     weight  lambda(sigma) |D(x^ + sigma z, sigma) - x^|^2,

whose law (that of truncated sampling) lacks detail and has hardly any noise. A *warm start* begins with this loss alone.

*Joint* consistency, as published, adds the loss to the Ambient loss on one network from the start. With k = 0 the pair begins where the Ambient
loss has just evaluated the network and shares D_t; with k > 0 it begins as above.

Incomplete measurements are walked in their kept rows, with a mask-conditional network.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.errors import InputError
from ambient_sci.noise import ancestral_step, draw_noise, expand
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.priors import Prior, StagedPrior
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.source import Source
from ambient_sci.training.stage_configs import ConsistencyConfig
from ambient_sci.training.stages import AmbientStage, Drawn, seeded

# Streams of randomness, beside those of the Ambient stage.
_DEPTH, _GAPS, _CHAINS = 10, 11, 12


def evaluate(prior: Prior, kept: RowMaskedOperator | None, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma), or h = E[x_0 | y~, B] where ``x`` is y~ on the rows of ``kept``."""
    return prior(x, sigma) if kept is None else losses.estimate(prior, kept, x, sigma)


def reverse_step(
    prior: Prior, kept: RowMaskedOperator | None, x: Tensor, t: Tensor, s: Tensor, generator: torch.Generator
) -> Tensor:
    """One step of the reverse process from level t to s, of images or of the kept rows."""
    denoised = evaluate(prior, kept, x, t)
    centre = denoised if kept is None else kept.A(denoised)
    return ancestral_step(x, centre, t, s, generator=generator)


@torch.no_grad()
def walk(
    prior: Prior,
    kept: RowMaskedOperator | None,
    x: Tensor,
    t: Tensor,
    *,
    steps: int,
    stride: float,
    sigma_min: float,
    uniform: torch.Generator,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """``steps`` reverse steps t -> max(t exp(-stride u), sigma_min), u uniform for each sample; state and level where they end."""
    for _ in range(steps):
        s = torch.maximum(_shrunk(t, stride, uniform), torch.full_like(t, sigma_min)).minimum(t)
        x, t = reverse_step(prior, kept, x, t, s, generator), s
    return x, t


@torch.no_grad()
def descend(
    prior: Prior,
    kept: RowMaskedOperator | None,
    x: Tensor,
    t: Tensor,
    goal: float,
    generator: torch.Generator,
) -> Tensor:
    """States at levels t >= goal, walked down to ``goal`` by reverse steps of a factor e^(-1/4) at most; none where t = goal."""
    ratio = float((t / goal).max())
    steps = math.ceil(4 * math.log(ratio)) if ratio > 1 + 1e-6 else 0
    for left in range(steps, 0, -1):
        s = t * (goal / t) ** (1 / left)
        x, t = reverse_step(prior, kept, x, t, s, generator), s
    return x


def _shrunk(t: Tensor, stride: float, uniform: torch.Generator) -> Tensor:
    """t exp(-stride u), u in (0, 1] drawn on the CPU; less than t, whatever u rounds to."""
    u = 1 - torch.rand(len(t), generator=uniform)
    return t * torch.exp(-stride * u).clamp(max=1 - 1e-6).to(t)


class ConsistencyStage:
    """Stage 2 of staged consistency.

    Args:
        data: stage 1, for its batches.
        anchor: what it has learned.
        config: the run.

    Raises:
        InputError: no level to be consistent below, or chains to be kept of incomplete measurements.
    """

    name = "consistency"

    def __init__(self, data: AmbientStage, anchor: nn.Module, config: TrainConfig) -> None:
        assert config.consistency is not None
        self.data, self.settings, self.seed = data, config.consistency, config.seed
        self.sigma_n, self.sigma_min = consistency_levels(data, self.settings)
        self.anchor = copy.deepcopy(anchor).eval().requires_grad_(False)
        self.module: nn.Module = copy.deepcopy(anchor).requires_grad_(True)
        self.hybrid = StagedPrior(self.anchor, self.module, self.sigma_n)  # type: ignore[arg-type]
        self.chains: tuple[Tensor, Tensor] | None = None
        if self.settings.replay and not data.source.complete:
            raise InputError(
                "consistency.replay: expected complete data (chains of kept rows need their masks), got incomplete"
            )

    @property
    def reason(self) -> str:
        """What this stage does, in words."""
        return f"then consistency below noise level {self.sigma_n:.4g}, with what was learned above it frozen: a staged prior"

    def indices(self, step: int) -> list[int]:
        return self.data.indices(step)

    def loss(self, step: int) -> Tensor:
        drawn, settings = self.data.draw(step), self.settings
        uniform = seeded(self.seed, _GAPS, step, self.data.rank)
        noise = seeded(self.seed, _CHAINS, step, self.data.rank, device=drawn.noise.device)
        kept, x, t = self._start(drawn, noise)
        if step < settings.warm_start:
            return self._denoising_of_estimates(kept, x, t, uniform, noise)
        shrinking: Tensor | float = 0.0
        if settings.shrinkage > 0:
            shrinking = settings.shrinkage * self._denoising_of_estimates(kept, x, t, uniform, noise)
        if settings.replay:
            x, t = self._continued(x, t)
        else:
            depth = draw_depth(settings, self.seed, step)
            x, t = walk(
                self.hybrid,
                kept,
                x,
                t,
                steps=depth,
                stride=settings.stride,
                sigma_min=self.sigma_min,
                uniform=uniform,
                generator=noise,
            )
        s = _shrunk(t, settings.gap, uniform)
        denoised = evaluate(self.hybrid, kept, x, t)
        loss = losses.consistency(
            self.hybrid,
            x,
            t,
            s,
            draws=settings.draws,
            denoised=denoised,
            operator=kept,
            generator=noise,
            detach_target=settings.detach_target,
        )
        if settings.replay:
            self.chains = (ancestral_step(x, denoised.detach(), t, s, generator=noise), s)
        return self._with_quiet_data(loss + shrinking, drawn, uniform)

    def _start(self, drawn: Drawn, noise: torch.Generator) -> tuple[RowMaskedOperator | None, Tensor, Tensor]:
        """Kept rows (None: images), states and levels (B,): the data, brought to level sigma_n."""
        kept, y, level = None, drawn.y, drawn.sigma_y.to(drawn.y)
        if not self.data.source.complete:
            rows = drawn.operator.mask.expand(len(y), *drawn.operator.mask.shape[1:])
            kept = drawn.operator.with_mask(rows, design=drawn.operator.design)
            kept = kept.split(keep=self.data.keep, generator=drawn.noise).kept
        goal = torch.full_like(level, self.sigma_n)
        missing = (goal**2 - level**2).clamp(min=0).sqrt()
        if bool((missing > 0).any()):
            y = y + expand(missing, y) * draw_noise(y, noise)
        return kept, descend(self.hybrid, kept, y, torch.maximum(level, goal), self.sigma_n, noise), goal

    def _denoising_of_estimates(
        self,
        kept: RowMaskedOperator | None,
        x: Tensor,
        t: Tensor,
        uniform: torch.Generator,
        noise: torch.Generator,
    ) -> Tensor:
        """Denoising loss (B,) of the copy on the anchor's estimates from states ``x`` at level sigma_n, below that level."""
        with torch.no_grad():
            estimates = evaluate(self.anchor, kept, x, t)  # type: ignore[arg-type]
        sigma = t * (self.sigma_min / t) ** torch.rand(len(t), generator=uniform).to(t)
        clean = estimates if kept is None else kept.A(estimates)
        noisy = clean + expand(sigma, clean) * draw_noise(clean, noise)
        below: Prior = self.module  # type: ignore[assignment]
        error = evaluate(below, kept, noisy, sigma) - estimates
        # Missing rows leave an error that no sigma makes small.
        fraction = 1.0 if kept is None else kept.kept_fraction.to(error)
        return below.loss_weight(sigma, fraction) * error.square().flatten(1).mean(1)

    def _continued(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The chains of the last step; ``x`` at level ``t`` where there are none or they have reached the bottom."""
        if self.chains is None:
            return x, t
        states, levels = self.chains
        again = levels <= self.sigma_min
        restart = again.reshape(-1, *([1] * (x.ndim - 1)))
        return torch.where(restart, x, states), torch.where(again, t, levels)

    def _with_quiet_data(self, loss: Tensor, drawn: Drawn, uniform: torch.Generator) -> Tensor:
        """``loss``, and for data with less noise than sigma_n the Ambient loss at a level in between."""
        quiet = (drawn.sigma_y < self.sigma_n * (1 - 1e-6)).nonzero()[:, 0]
        if len(quiet) == 0:
            return loss
        operator = drawn.operator if drawn.operator.batch_size == 1 else drawn.operator[quiet]
        some = Drawn(operator, drawn.y[quiet], drawn.sigma_y[quiet], drawn.sigma[quiet], drawn.noise)
        low = some.sigma_y.clamp(min=self.data.levels.floor).to(loss)
        level = low * (self.sigma_n / low) ** torch.rand(len(low), generator=uniform).to(loss)
        direct = self.data.ambient_step(self.module, some, level).loss  # type: ignore[arg-type]
        return (self.settings.weight * loss).index_add(0, quiet, direct.to(loss))

    def prior(self, average: nn.Module) -> Prior:
        below: Any = average
        below.config = dataclasses.replace(below.config, sigma_min=self.sigma_min)
        below.sigma_min = self.sigma_min
        return StagedPrior(self.anchor, below, self.sigma_n).eval()  # type: ignore[arg-type]

    # -- chains, for the checkpoint ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The chains that are walked on from step to step."""
        return {} if self.chains is None else {"states": self.chains[0], "levels": self.chains[1]}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        if tensors:
            self.chains = (tensors["states"].to(self.data.device), tensors["levels"].to(self.data.device))


class JointStage(AmbientStage):
    """The Ambient stage with the consistency loss added, on one network."""

    name = "joint"

    def __init__(self, source: Source, config: TrainConfig, accelerator: Accelerator) -> None:
        assert config.consistency is not None
        super().__init__(source, config, accelerator)
        self.settings = config.consistency
        self.sigma_n, self.sigma_min = consistency_levels(self, self.settings)

    @property
    def reason(self) -> str:
        """What this stage does, in words."""
        return f"{self.source.reason}; with consistency below noise level {self.sigma_n:.4g} on the same network, from step {self.settings.kick_in}"

    def weight(self, step: int) -> float:
        """Factor of the consistency loss at ``step``: 0 before ``kick_in``, then a linear ramp."""
        settings = self.settings
        return settings.weight * min(max((step - settings.kick_in + 1) / max(settings.ramp, 1), 0.0), 1.0)

    def loss(self, step: int) -> Tensor:
        drawn, settings, weight = self.draw(step), self.settings, self.weight(step)
        prior: Prior = self.module  # type: ignore[assignment]
        ambient = self.ambient_step(prior, drawn)
        if weight == 0:
            return ambient.loss
        uniform = seeded(self.config.seed, _GAPS, step, self.rank)
        noise = seeded(self.config.seed, _CHAINS, step, self.rank, device=drawn.noise.device)
        kept = None if self.source.complete else ambient.kept
        depth = draw_depth(settings, self.config.seed, step)
        if depth == 0:
            x, t, denoised = ambient.y_t, drawn.sigma.to(drawn.y), ambient.denoised
        else:
            start = drawn.sigma_y.to(drawn.y).clamp(min=self.sigma_min)
            x, t = walk(
                prior,
                kept,
                drawn.y,
                start,
                steps=depth,
                stride=settings.stride,
                sigma_min=self.sigma_min,
                uniform=uniform,
                generator=noise,
            )
            denoised = None
        s = _shrunk(t, settings.gap, uniform)
        loss = losses.consistency(
            prior,
            x,
            t,
            s,
            draws=settings.draws,
            denoised=denoised,
            operator=kept,
            generator=noise,
            detach_target=settings.detach_target,
        )
        return ambient.loss + weight * loss


def draw_depth(settings: ConsistencyConfig, seed: int, step: int) -> int:
    """Number of walk steps of this step's batch, the same in every process."""
    least, most = settings.walk
    return least + int(torch.randint(most - least + 1, (), generator=seeded(seed, _DEPTH, step)))


def consistency_levels(data: AmbientStage, settings: ConsistencyConfig) -> tuple[float, float]:
    """Absolute levels (sigma_n, sigma_min) between which consistency is learned.

    Raises:
        InputError: there is no noise in some of the data and no level is given, or nothing is left between the two.
    """
    unit = data.source.data_std if data.config.levels.relative else 1.0
    lowest = float(data.noise_std.min())
    if settings.sigma_n is None and lowest == 0:
        raise InputError("consistency.sigma_n: expected a level where some of the data are clean, got none")
    sigma_n = lowest * settings.margin if settings.sigma_n is None else settings.sigma_n * unit
    sigma_min = settings.sigma_min * unit
    if not sigma_min < sigma_n < data.levels.sigma_max:
        raise InputError(
            f"consistency.sigma_min: expected sigma_min < sigma_n (margin included) < levels.sigma_max, got {sigma_min:.3g}, {sigma_n:.3g} and "
            f"{data.levels.sigma_max:.3g}"
        )
    return sigma_n, sigma_min


def second_stage_config(config: TrainConfig) -> TrainConfig:
    """The settings of stage 2 for the training loop."""
    settings = config.consistency
    assert settings is not None
    return dataclasses.replace(
        config,
        max_steps=settings.max_steps,
        max_minutes=settings.max_minutes,
        learning_rate=settings.learning_rate,
        ema_decay=settings.ema_decay,
    )
