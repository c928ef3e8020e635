"""A prior that counts what a method asks of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ambient_sci.priors import Prior


class Counted(Prior):
    """``prior``, counting images through the network.

    Attributes:
        forwards: evaluations, in images.
        backwards: vector-Jacobian products, in images, counted by a hook on the output.
    """

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior, self.forwards, self.backwards = prior, 0, 0
        for name in ("shape", "data_std", "takes", "sigma_min", "sigma_max"):
            setattr(self, name, getattr(prior, name))

    def forward(self, x: Tensor, sigma: Any, *told: Any, **also: Any) -> Tensor:
        """The prior's answer."""
        self.forwards += len(x)
        out = self.prior(x, sigma, *told, **also)
        if out.requires_grad:
            out.register_hook(self._backward)
        return out

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
