r"""Designs whose rows hang together in space: a missing box, finitely many masks, Poisson disc. See
`ambient_sci.operators.designs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators.designs import Layout, MaskDesign, uniform


class Enumerated(MaskDesign):
    """One of finitely many masks, drawn with given probabilities; units kept independently with probability
    q.

    P(A_i = 1 | B) is Bayes' rule over the masks that contain B, P(B | A) = q^|B| (1 - q)^(|A| - |B|).
    Equispaced lines are the case of R masks by offset: one kept line gives the offset away, all others have
    probability 0, and training is refused.

    Args:
        masks: (K, U) 0/1 over units.
        probabilities: (K,), default uniform.
    """

    name = "enumerated"

    def __init__(
        self,
        image_shape: Sequence[int],
        layout: Layout,
        masks: Sequence[Sequence[int]] | Tensor,
        probabilities: Sequence[float] | None = None,
        status: str = "given",
    ) -> None:
        super().__init__(image_shape, layout, status)
        self.masks = torch.as_tensor(masks, dtype=torch.float64)
        if self.masks.ndim != 2 or self.masks.shape[1] != self.num_units:
            raise InputError(
                f"mask design: expected masks (K, {self.num_units}), got {tuple(self.masks.shape)}"
            )
        p = [1.0] * len(self.masks) if probabilities is None else probabilities
        p = torch.as_tensor(p, dtype=torch.float64)
        if p.shape != (len(self.masks),) or not bool((p > 0).all()):
            raise InputError(
                f"mask design: expected {len(self.masks)} positive probabilities, got {tuple(p.shape)}"
            )
        if not bool(self.masks.any(1).all()):
            raise InputError("mask design: expected masks that measure something, got an empty one")
        self.probabilities = p / p.sum()

    @classmethod
    def equispaced(
        cls,
        image_shape: Sequence[int],
        layout: Layout,
        acceleration: int,
        always: Sequence[int] = (),
        **kwargs: Any,
    ) -> Enumerated:
        """Every R-th line from a random offset, besides the lines in ``always``."""
        n = {"columns": image_shape[2], "rows": image_shape[1]}.get(layout)
        if n is None:
            raise InputError(f"equispaced design: expected layout columns or rows, got {layout!r}")
        masks = (torch.arange(n)[None] % acceleration == torch.arange(acceleration)[:, None]).double()
        masks[:, list(always)] = 1.0
        return cls(image_shape, layout, masks, **kwargs)

    def draw(self, num: int, generator: torch.Generator | None) -> Tensor:
        index = torch.multinomial(self.probabilities, num, replacement=True, generator=generator)
        return self.masks[index].clone()

    def thin_units(self, units: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
        return units * (uniform(units.shape, generator) < keep)

    def probability_units(self, units: Tensor, kept: Tensor, keep: float) -> Tensor:
        contains = (kept[:, None] <= self.masks).all(2)
        # q^|B| is common to all masks, so only the number of units that would have been dropped matters.
        dropped = self.masks.sum(1) - kept.sum(1, keepdim=True)
        # Logarithms: with hundreds of units the powers underflow.
        log_weight = self.probabilities.log() + torch.xlogy(dropped, 1 - keep)
        weight = torch.where(contains, log_weight, -torch.inf).softmax(1)
        return torch.where(kept > 0, 1.0, weight @ self.masks)

    def possible_units(self, units: Tensor) -> Tensor:
        common = units @ self.masks.T
        return ((common == units.sum(1, keepdim=True)) & (common == self.masks.sum(1))).any(1)

    def unsupervised(self, keep: float) -> list[int]:
        # The largest B is the whole of a mask: what it excludes for sure is what no mask above it contains.
        certain = torch.stack([(self.masks >= m).all(1).double() @ self.masks for m in self.masks])
        return ((certain == 0) & (self.masks == 0)).any(0).nonzero().flatten().tolist()

    def parameters(self) -> dict[str, Any]:
        return {"masks": self.masks.int().tolist(), "probabilities": self.probabilities.tolist()}


class RandomBox(MaskDesign):
    """A box of size (h, w), uniformly placed, is missing; thinning removes a second box, uniformly among
    those disjoint from it.

    Seen from B, either of the two missing boxes may be the real one. A was box a with probability
    proportional to 1 / N(a), N(a) the number of boxes disjoint from a (the chance that b was then chosen as
    the second), so with boxes a, b missing from B

        P(pixels of a measured | B) = (1/N(b)) / (1/N(a) + 1/N(b)).

    Independent thinning would give the place of the box away: pixels inside it would have probability 0.

    Args:
        box: (h, w). At most a third of the image in one direction a second, disjoint box fits wherever the
            first one is; for larger boxes some places leave no room, and training is refused.
    """

    name = "random-box"

    def __init__(
        self, image_shape: Sequence[int], layout: Layout, box: Sequence[int], status: str = "given"
    ) -> None:
        super().__init__(image_shape, layout, status)
        if layout != "pixels":
            raise InputError(f"box design: expected layout pixels, got {layout!r}")
        _, height, width = self.image_shape
        self.box = (int(box[0]), int(box[1]))
        if not (0 < self.box[0] <= height and 0 < self.box[1] <= width):
            raise InputError(f"box design: expected a box within {height} x {width}, got {self.box}")

    @property
    def places(self) -> tuple[int, int]:
        """Number of vertical and horizontal positions."""
        return self.image_shape[1] - self.box[0] + 1, self.image_shape[2] - self.box[1] + 1

    def _missing(self, place: Tensor) -> Tensor:
        """Units missing, (n, U), with the box at flat position ``place`` (n,)."""
        _, height, width = self.image_shape
        top, left = (place // self.places[1])[:, None], (place % self.places[1])[:, None]
        rows, cols = torch.arange(height), torch.arange(width)
        inside = ((rows >= top) & (rows < top + self.box[0]))[:, :, None] & (
            (cols >= left) & (cols < left + self.box[1])
        )[:, None]
        return inside.flatten(1).double()

    def _disjoint(self, place: Tensor) -> Tensor:
        """(n, places): which positions are disjoint from the box at ``place``."""
        every = torch.arange(self.places[0] * self.places[1])
        apart = [
            (torch.div(place, step, rounding_mode="floor") % count)[:, None]
            - (torch.div(every, step, rounding_mode="floor") % count)
            for step, count in ((self.places[1], self.places[0]), (1, self.places[1]))
        ]
        return (apart[0].abs() >= self.box[0]) | (apart[1].abs() >= self.box[1])

    def _place(self, units: Tensor) -> Tensor:
        """Flat position of the one missing box: its first missing pixel."""
        first = (units == 0).double().argmax(1)
        width = self.image_shape[2]
        return first // width * self.places[1] + first % width

    def draw(self, num: int, generator: torch.Generator | None) -> Tensor:
        place = torch.randint(self.places[0] * self.places[1], (num,), generator=generator)
        return 1 - self._missing(place)

    def thin_units(self, units: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
        """``keep`` only says whether anything is held out: the second box has the size of the first, or it
        would be told apart.
        """
        free = self._disjoint(self._place(units))
        if not bool(free.any(1).all()):
            self.check_trainable(keep)
        second = torch.multinomial(free.double(), 1, generator=generator)[:, 0]
        return units * (1 - self._missing(second)).to(units)

    def probability_units(self, units: Tensor, kept: Tensor, keep: float) -> Tensor:
        real = self._place(units)
        held = units * (1 - kept)
        second = self._place(1 - held)
        n_real, n_second = (self._disjoint(p).sum(1, keepdim=True).double() for p in (real, second))
        # P(a was measured) = P(b is the real box) for a the real, b the second box, and the reverse.
        total = 1 / n_real + 1 / n_second
        p = torch.where(held > 0, 1 / n_real / total, 1 / n_second / total)
        return torch.where(kept > 0, 1.0, p)

    def possible_units(self, units: Tensor) -> Tensor:
        return (units == 1 - self._missing(self._place(units))).all(1)

    def unsupervised(self, keep: float) -> list[int]:
        # A place leaves room for a second box if there is room above, below, left or right of it. So the
        # places that leave none are a rectangle of places around the centre, and what they miss is a
        # rectangle of pixels.
        width = self.image_shape[2]
        spans = []
        for count, side in zip(self.places, self.box, strict=True):
            alone = range(max(count - side, 0), min(side, count))
            if not alone:
                return []
            spans.append(range(alone.start, alone.stop + side - 1))
        return [row * width + column for row in spans[0] for column in spans[1]]

    def parameters(self) -> dict[str, Any]:
        return {"box": list(self.box)}


class PoissonDisc(MaskDesign):
    """2-D variable-density Poisson-disc sampling (sigpy), for simulation and reconstruction; not for
    training.

    Samples keep a distance from each other, so a kept one excludes its neighbours: P(A_i = 1 | B) = 0 there.

    Args:
        acceleration: R, total points / sampled points.
        calibration: side (h, w) of the fully sampled centre.
    """

    name = "poisson-disc"

    def __init__(
        self,
        image_shape: Sequence[int],
        layout: Layout = "pixels",
        acceleration: float = 4.0,
        calibration: Sequence[int] = (8, 8),
        status: str = "given",
    ) -> None:
        super().__init__(image_shape, layout, status)
        if not acceleration > 1:
            raise InputError(f"poisson-disc design: expected an acceleration above 1, got {acceleration}")
        self.acceleration = float(acceleration)
        self.calibration = (int(calibration[0]), int(calibration[1]))

    def draw(self, num: int, generator: torch.Generator | None) -> Tensor:
        from sigpy.mri import poisson

        seeds = torch.randint(2**31 - 1, (num,), generator=generator).tolist()
        masks = [
            poisson(self.image_shape[1:], self.acceleration, calib=self.calibration, seed=s).real
            for s in seeds
        ]
        return torch.stack([torch.as_tensor(m != 0).double().flatten() for m in masks])

    def thin_units(self, units: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
        return units * (uniform(units.shape, generator) < keep)

    def probability_units(self, units: Tensor, kept: Tensor, keep: float) -> Tensor:
        self.check_trainable(keep)
        return torch.ones_like(units)  # only a mask that is calibration region throughout gets here

    def _outside(self) -> Tensor:
        """Units outside the fully sampled centre, (U,) bool."""
        _, height, width = self.image_shape
        plane = torch.ones(height, width, dtype=torch.bool)
        top, left = (height - self.calibration[0]) // 2, (width - self.calibration[1]) // 2
        plane[top : top + self.calibration[0], left : left + self.calibration[1]] = False
        return plane.flatten()

    def possible_units(self, units: Tensor) -> Tensor:
        """What is sure of a draw: the centre is measured, and sigpy meets the acceleration within 0.1."""
        acceleration = self.num_units / units.sum(1)
        return units[:, ~self._outside()].all(1) & ((acceleration - self.acceleration).abs() < 0.1)

    def unsupervised(self, keep: float) -> list[int]:
        return self._outside().nonzero().flatten().tolist()

    def parameters(self) -> dict[str, Any]:
        return {"acceleration": self.acceleration, "calibration": list(self.calibration)}
