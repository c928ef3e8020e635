"""Which state of a run is kept: that whose images score best, rather than the last one.

    fit(measurements, config, out, selection=Selection(ProximalScore(file), every=500))

Every so many steps images are drawn from the averaged weights and scored; the run's prior is the best so far.
Scores are in the log, the best weights in the checkpoint, so that a run goes on as if it had not been
interrupted. A score that needs no clean images is `ambient_sci.evaluation.ProximalScore`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.priors import Prior
from ambient_sci.sampling import generate


@dataclass(frozen=True)
class Selection:
    """How states of a run are judged.

    Attributes:
        score: images (n, C, H, W) on the CPU to a number; lower is better.
        every: training steps from one judgement to the next; the end of a run is judged as well. Laps of
            expectation maximisation are judged each.
        num: images drawn.
        seed: of their noise, the same at every judgement.
        options: of `generate` (``steps``, ``sampler``, ``sigma_min``, ...).
    """

    score: Callable[[Tensor], float]
    every: int = 1000
    num: int = 1000
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1 or self.num < 2:
            raise InputError(f"selection: expected every >= 1 and num >= 2, got {self.every} and {self.num}")

    def __call__(self, prior: Prior) -> float:
        """The score of images drawn from ``prior``.

        Raises:
            InputError: a score that is not finite; `generate`'s.
        """
        images = generate(prior, self.num, generator=torch.Generator().manual_seed(self.seed), **self.options)
        score = float(self.score(images.cpu()))
        if not math.isfinite(score):
            raise InputError(f"selection: expected a finite score, got {score}")
        return score
