r"""Times of published VP networks as functions of the VE noise level: continuous ones, and those rounded to a
step.

    continuous   sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1,  time = (steps - 1) t   [Song et al. 2021]
    cosine       u_{j-1}^2 = (u_j^2 + 1) / max(a_{j-1} / a_j, c1) - 1,  u_steps = 0,
                 a_j = sin(pi j / (2 steps (c2 + 1)))^2,
                 time = steps - 1 - j of the nearest u_j                        [Nichol & Dhariwal 2021]

both in the form that Karras et al. (2022, table 1) give them. A schedule's name is its ``kind``, under which
a prior's description has it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import VPSchedule


@dataclass(frozen=True)
class ContinuousSchedule:
    """The continuous times of a VP SDE.

    Attributes:
        kind: names it in a file.
        beta_d, beta_min: growth and start of the noise rate.
        steps: the network's time at t = 1 is steps - 1.
    """

    kind: Literal["continuous"] = "continuous"
    beta_d: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (self.beta_d > 0 and self.beta_min >= 0 and self.steps >= 2):
            raise InputError("continuous schedule: expected beta_d > 0, beta_min >= 0 and at least 2 steps")

    def time(self, sigma: Tensor) -> Tensor:
        """Time of VE levels (B,), in their type."""
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        return (self.steps - 1) * (root - self.beta_min) / self.beta_d


@dataclass(frozen=True)
class CosineSchedule:
    """The times of an improved DDPM, whole numbers: the level asked for is answered at the nearest one.

    Attributes:
        kind: names it in a file.
        c1, c2: bounds of the step and of the schedule's start.
        steps: number of times.
    """

    kind: Literal["cosine"] = "cosine"
    c1: float = 0.001
    c2: float = 0.008
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (self.c1 > 0 and self.c2 > 0 and 2 <= self.steps <= 1_000_000):
            raise InputError("cosine schedule: expected c1 > 0, c2 > 0 and 2 to 1,000,000 steps")

    def levels(self) -> Tensor:
        """u_0 .. u_steps, (steps + 1,) float32, decreasing."""

        def signal(j: int) -> float:
            return math.sin(0.5 * math.pi * j / self.steps / (self.c2 + 1)) ** 2

        u = [0.0]
        for j in range(self.steps, 0, -1):
            u.append(math.sqrt(max((u[-1] ** 2 + 1) / max(signal(j - 1) / signal(j), self.c1) - 1, 0.0)))
        return torch.tensor(u[::-1], dtype=torch.float32)

    def time(self, sigma: Tensor) -> Tensor:
        """Time of VE levels (B,), in their type."""
        u = self.levels().to(sigma.device)
        nearest = (sigma.to(torch.float32)[:, None] - u).abs().argmin(1)
        return (self.steps - 1 - nearest).to(sigma.dtype)


Schedule = VPSchedule | ContinuousSchedule | CosineSchedule
_KINDS: dict[str, type[Schedule]] = {
    "scaled-linear": VPSchedule,
    "linear": VPSchedule,
    "continuous": ContinuousSchedule,
    "cosine": CosineSchedule,
}


def schedule_to_dict(schedule: Schedule) -> dict[str, Any]:
    """JSON-able."""
    return asdict(schedule)


def schedule_from_dict(values: dict[str, Any]) -> Schedule:
    """Inverse of `schedule_to_dict`.

    Raises:
        InputError: an unknown kind, or settings that it does not have.
    """
    kind = values.get("kind", "scaled-linear")
    if kind not in _KINDS:
        raise InputError(f"VP schedule: expected {', '.join(_KINDS)}, got {kind!r}")
    try:
        return _KINDS[kind](**values)
    except TypeError as error:
        raise InputError(f"VP schedule {kind}: {error}") from None
