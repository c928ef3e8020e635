r"""Steps of the reverse process that training takes without a gradient: walks to where pairs of levels
start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ambient_sci import losses
from ambient_sci.noise import ancestral_step
from ambient_sci.operators import RowMaskedOperator
from ambient_sci.priors import Prior

#: (states, levels (B,) on the CPU) to D of them.
Answer = Callable[[Tensor, Tensor], Tensor]


def evaluate(
    prior: Prior, kept: RowMaskedOperator | None, x: Tensor, sigma: Tensor, given: Any = None
) -> Tensor:
    """D(x, sigma), or h = E[x_0 | y~, B] where ``x`` is y~ on the rows of ``kept``; ``sigma`` (B,) on any
    device.
    """
    level = sigma.to(x.device, x.dtype, non_blocking=True)
    if kept is not None:
        return losses.denoise_measurement(prior, kept, x, level, given)
    return prior(x, level) if given is None else prior(x, level, given)


def reverse_step(
    answer: Answer,
    kept: RowMaskedOperator | None,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """One step of the reverse process from level t to s, of images or of the kept rows."""
    denoised = answer(x, t)
    centre = denoised if kept is None else kept.A(denoised)
    return ancestral_step(x, centre, moved(t, x), moved(s, x), generator=generator)


@torch.no_grad()
def walk(
    answer: Answer,
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
    """``steps`` reverse steps t -> max(t exp(-stride u), sigma_min), u uniform for each sample.

    Args:
        answer: D of states and levels.
        kept: kept rows; None: images.
        x, t: states, and their levels on the CPU, at least ``sigma_min``.
        steps, stride, sigma_min: of the walk.
        uniform: source of u, on the CPU.
        generator: source of noise.

    Returns:
        state and level (on the CPU) where they end.
    """
    for _ in range(steps):
        s = shrunk(t, stride, uniform).clamp(min=sigma_min)
        x, t = reverse_step(answer, kept, x, t, s, generator), s
    return x, t


@torch.no_grad()
def descend(
    answer: Answer,
    kept: RowMaskedOperator | None,
    x: Tensor,
    t: Tensor,
    goal: float,
    generator: torch.Generator,
) -> Tensor:
    """States at levels t >= goal (on the CPU), walked down to ``goal`` by reverse steps of a factor e^(-1/4)
    at most.

    None where t = goal.
    """
    ratio = float((t / goal).max())
    steps = math.ceil(4 * math.log(ratio)) if ratio > 1 + 1e-6 else 0
    for left in range(steps, 0, -1):
        s = t * (goal / t) ** (1 / left)
        x, t = reverse_step(answer, kept, x, t, s, generator), s
    return x


def moved(level: Tensor, x: Tensor) -> Tensor:
    """A level of the host where ``x`` is, without waiting."""
    return level.to(x.device, x.dtype, non_blocking=True)


def shrunk(t: Tensor, stride: float, uniform: torch.Generator) -> Tensor:
    """t exp(-stride u), u in (0, 1] drawn on the CPU; less than t, whatever u rounds to."""
    u = 1 - torch.rand(len(t), generator=uniform)
    return t * torch.exp(-stride * u).clamp(max=1 - 1e-6).to(t)
