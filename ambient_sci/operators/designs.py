r"""Mask designs: how the rows of a measurement were chosen, and what follows for learning from them.

A design draws a mask A over *units*: groups of rows that are always measured together (a pixel in all its
channels, a k-space line in all coils). Training thins A further to B, the rows a network sees, and scores it
on the rest. The loss is an unbiased squared error of the whole image if a held-out unit is weighted by 1 /
P(A_i = 1 | B): the more surely a unit outside B was measured at all, the less each time counts. So every
design here knows that probability exactly, or refuses to be trained on and names the rows:

    Independent     units drawn independently (Bernoulli):  P = p (1 - q) / (1 - p q), kept with probability q
    FixedBudget     exactly m units, probability of a set proportional to the product of its weights
                    (conditional Poisson sampling;
                    weights 1: the uniform design).  Closed form by elementary symmetric polynomials.
    RandomBox       one missing box; B misses a second, disjoint one. By Bayes'
                    rule over "which box is the real one".
    Enumerated      finitely many masks, e.g. equispaced lines by their offset. By Bayes'
                    rule over the masks that contain B.
    PoissonDisc     sampled points keep each other at a distance, so B excludes its own neighbourhoods:
                    refused.

Sources: Millard & Chiew (2023) for independent rows; Chen, Dempster & Liu (1994) for conditional Poisson
sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.operators.inclusion import inclusion, suffix_polynomials

Layout = Literal["pixels", "entries", "columns", "rows"]


def uniform(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


class MaskDesign(ABC):
    """How masks are drawn. Masks are (num, m, H, W), m = C for "entries" and 1 otherwise (all channels and
    coils together).

    Args:
        image_shape: (C, H, W).
        layout: what is drawn as one: "pixels", "entries" (each channel of each pixel by itself), "columns"
            (k-space lines along the last-but-one axis, phase encoding along the last) or "rows".
        status: "given" by the acquisition, "estimated" from the masks of a data set, or "unknown".
    """

    name: ClassVar[str]
    _registry: ClassVar[dict[str, type[MaskDesign]]] = {}

    def __init__(self, image_shape: Sequence[int], layout: Layout, status: str = "given") -> None:
        if layout not in ("pixels", "entries", "columns", "rows"):
            raise InputError(f"mask design: expected layout pixels, entries, columns or rows, got {layout!r}")
        self.image_shape = tuple(int(n) for n in image_shape)
        self.layout: Layout = layout
        self.status = status
        self._unsupervised: dict[float, list[int]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        MaskDesign._registry[cls.name] = cls

    # -- units -----------------------------------------------------------------------------------------------

    @property
    def unit_shape(self) -> tuple[int, int, int]:
        """Shape (m, h, w) over which units are laid out; axes of size 1 are shared by all rows along them."""
        c, h, w = self.image_shape
        return {"pixels": (1, h, w), "entries": (c, h, w), "columns": (1, 1, w), "rows": (1, h, 1)}[
            self.layout
        ]

    @property
    def num_units(self) -> int:
        c, h, w = self.unit_shape
        return c * h * w

    def to_units(self, mask: Tensor) -> Tensor:
        """Mask (n, m, H, W) to units (n, U). Rows of one unit agree, so the first stands for all."""
        m, h, w = self.unit_shape
        return mask[:, :m, :h, :w].flatten(1)

    def to_mask(self, units: Tensor) -> Tensor:
        """Units (n, U) to a mask or a map of weights (n, m, H, W)."""
        _, height, width = self.image_shape
        m, _, _ = self.unit_shape
        return units.reshape(-1, *self.unit_shape).expand(-1, m, height, width)

    # -- what a design must know -----------------------------------------------------------------------------

    @abstractmethod
    def draw(self, num: int, generator: torch.Generator | None) -> Tensor:
        """``num`` masks over units, (num, U), float 0/1."""

    @abstractmethod
    def thin_units(self, units: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
        """Kept units B of the measured units A, (n, U)."""

    @abstractmethod
    def probability_units(self, units: Tensor, kept: Tensor, keep: float) -> Tensor:
        """P(A_i = 1 | B) for every unit, (n, U), float64; 1 on B."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What `design_from_dict` needs besides shape, layout and status; JSON types only."""

    @abstractmethod
    def possible_units(self, units: Tensor) -> Tensor:
        """Which masks over units (n, U) the design draws with positive probability, (n,) bool."""

    def check_drawn(self, mask: Tensor, numbers: Sequence[int] | None = None) -> None:
        """Raise unless the design can have drawn every mask: weights would be wrong without a word.

        Asked once, when the masks of a data set are surveyed; losses and splits of surveyed data do not ask
        again.

        Args:
            mask: (n, m, H, W).
            numbers: of the samples, for the message; default 0, 1, ...

        Raises:
            InputError: masks of another shape, rows of one unit not measured together, or a mask of
                probability 0.
        """
        units = self._checked_units(mask)
        wrong = ~self.possible_units(units.double())
        if bool(wrong.any()):
            k = int(wrong.nonzero()[0, 0])
            sample = k if numbers is None else int(numbers[k])
            raise InputError(
                f"mask design {self.name!r} ({self.status}): it cannot have drawn the mask of sample "
                f"{sample} "
                f"({int(units[k].sum())} of {self.num_units} {self.layout} measured), so the weights of "
                "held-out rows would be wrong; state the design that drew the masks, or none"
            )

    def check_trainable(self, keep: float) -> None:
        """Raise unless P(A_i = 1 | B) > 0 for every unit and every B.

        Raises:
            IdentifiabilityError: names the units that are never supervised.
        """
        if keep not in self._unsupervised:  # a loss asks at every step
            self._unsupervised[keep] = self.unsupervised(keep)
        never = self._unsupervised[keep]
        if never:
            raise IdentifiabilityError(
                f"mask design {self.name!r} cannot be trained on: {len(never)} of {self.num_units} "
                f"{self.layout} are never measured "
                f"outside the kept ones (P(measured | kept) = 0): {_ranges(never)}. Use a randomised design, "
                "or EM on the measurements"
            )

    @abstractmethod
    def unsupervised(self, keep: float) -> list[int]:
        """Units that have P(A_i = 1 | B) = 0 for some B of positive probability."""

    # -- what callers use ------------------------------------------------------------------------------------

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """``num`` masks, (num, m, H, W), float32; none is empty (an empty draw is drawn again)."""
        units = self.draw(num, generator)
        for _ in range(100):
            empty = ~units.any(1)
            if not bool(empty.any()):
                return self.to_mask(units.float()).contiguous()
            units[empty] = self.draw(int(empty.sum()), generator)
        raise InputError(
            f"mask design {self.name!r}: expected masks that measure something, drew 100 empty ones"
        )

    def _checked_units(self, mask: Tensor) -> Tensor:
        """Units of masks (n, m, H, W), on the CPU, once they are known to be measured as one."""
        units = self.to_units(mask).cpu()
        fits = units.shape[1] == self.num_units and mask.shape[2:] == self.image_shape[1:]
        if not fits or bool((self.to_mask(units) != mask.cpu()).any()):
            wanted = f"(n, {self.unit_shape[0]}, {self.image_shape[1]}, {self.image_shape[2]})"
            got = f"{tuple(mask.shape)}{' that do not' if fits else ''}"
            raise InputError(
                f"mask design {self.name!r}: expected masks {wanted} that measure {self.layout} as one, "
                f"got {got}"
            )
        return units

    def thin(self, mask: Tensor, keep: float, *, generator: torch.Generator | None = None) -> Tensor:
        """Kept rows B of the measured rows ``mask`` (n, m, H, W).

        Raises:
            InputError: masks of another shape, or rows of one unit that were not measured together.
        """
        self._checked_units(mask)
        return self._thin(mask, keep, generator)

    def _thin(self, mask: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
        """`thin` of masks that were checked before."""
        units = self.to_units(mask).cpu()
        return self.to_mask(self.thin_units(units, keep, generator).to(mask)).to(mask)

    def _split(
        self, mask: Tensor, keep: float, generator: torch.Generator | None, *, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Kept rows of masks that were checked before, and P(A_i = 1 | B), (n, m, H, W) as ``like``.

        Drawn where ``mask`` lies, the CPU at best; what moves to the device of ``like`` is units, not rows.
        """
        units = self.to_units(mask).cpu()
        kept = self.thin_units(units, keep, generator).to(mask.dtype)
        probability = self.probability_units(units.double(), kept.double(), keep)
        kept_rows, rows = (self.to_mask(u.to(like, non_blocking=True)) for u in (kept, probability))
        return kept_rows, rows

    def probability(self, mask: Tensor, kept: Tensor, keep: float) -> Tensor:
        """P(A_i = 1 | B) for every row, (n, m, H, W). ``mask`` is A: all designs but `RandomBox` ignore
        it.
        """
        units, kept_units = (self.to_units(m).double().cpu() for m in (mask, kept))
        return self.to_mask(self.probability_units(units, kept_units, keep).to(mask)).to(mask)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description; `design_from_dict` reads it back."""
        return {
            "name": self.name,
            "image_shape": list(self.image_shape),
            "layout": self.layout,
            "status": self.status,
            **self.parameters(),
        }

    def __repr__(self) -> str:
        shown = (f"{k}={_short(v)}" for k, v in self.to_dict().items() if k != "name")
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _ranges(indices: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5", at most eight runs."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    shown = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs[:8])
    return shown + (f" and {len(runs) - 8} more runs" if len(runs) > 8 else "")


def _vector(value: float | Sequence[float] | Tensor, num: int, what: str) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64)
    if vector.ndim > 1 or (vector.ndim == 1 and vector.shape[0] != num):
        raise InputError(
            f"{what}: expected one value or one per unit ({num}), got shape {tuple(vector.shape)}"
        )
    return vector.expand(num).clone()


class Independent(MaskDesign):
    """Units measured independently with probability p_i; thinned independently, each kept with probability q.

    P(A_i = 1 | B) = p_i (1 - q) / (1 - p_i q) for i outside B. p_i = 1 (always measured) is allowed and gives
    1. A mask that measures nothing is drawn again; that tells something only if B is empty, where A != 0
    divides by 1 - prod_j (1 - P_j).

    Args:
        probability: p_i in (0, 1], one value or one per unit; 0 only for units that are never measured.
    """

    name = "independent"

    def __init__(
        self,
        image_shape: Sequence[int],
        layout: Layout,
        probability: float | Sequence[float] | Tensor,
        status: str = "given",
    ) -> None:
        super().__init__(image_shape, layout, status)
        self.p = _vector(probability, self.num_units, "sampling probability")
        if not bool(((self.p >= 0) & (self.p <= 1)).all()):
            raise InputError("sampling probability: expected values in [0, 1]")

    def draw(self, num: int, generator: torch.Generator | None) -> Tensor:
        return (uniform((num, self.num_units), generator) < self.p).double()

    def thin_units(self, units: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
        return units * (uniform(units.shape, generator) < keep)

    def probability_units(self, units: Tensor, kept: Tensor, keep: float) -> Tensor:
        outside = self.p * (1 - keep) / (1 - self.p * keep)
        something = -torch.expm1(torch.log1p(-outside).sum())  # P(A != 0 | B = 0)
        outside = torch.where(kept.any(1, keepdim=True), outside, outside / something)
        return torch.where(kept > 0, 1.0, outside)

    def possible_units(self, units: Tensor) -> Tensor:
        return torch.where(units > 0, self.p > 0, self.p < 1).all(1)

    def unsupervised(self, keep: float) -> list[int]:
        return (self.p == 0).nonzero().flatten().tolist() if keep < 1 else list(range(self.num_units))

    def parameters(self) -> dict[str, Any]:
        constant = bool((self.p == self.p[0]).all())
        return {"probability": float(self.p[0]) if constant else self.p.tolist()}


class FixedBudget(MaskDesign):
    r"""Exactly ``budget`` units besides those in ``always``, P(A) proportional to the product of the weights
    of its units.

    Thinning keeps a fixed number k of the budgeted units, uniformly, and each ``always`` unit with
    probability q. As P(B | A) is then the same for every A that contains B, what is held out is again such a
    design, of budget - k units outside B, and

        P(A_i = 1 | B) = w_i e_{r-1}(w without i) / e_r(w),        r = budget - k,  w: the weights outside B,

    with e_r the elementary symmetric polynomials. For weights 1 it is r / (number of units outside B). Units
    in ``always`` have probability 1 and *are* held out at times: kept always, they would be unsupervised
    exactly where the network is used.

    Args:
        budget: number of units to measure besides ``always``.
        weights: positive odds, one value or one per unit; larger is sampled more often.
        always: indices of units that are always measured (the auto-calibration lines).
    """

    name = "fixed-budget"

    def __init__(
        self,
        image_shape: Sequence[int],
        layout: Layout,
        budget: int,
        weights: float | Sequence[float] | Tensor = 1.0,
        always: Sequence[int] = (),
        status: str = "given",
    ) -> None:
        super().__init__(image_shape, layout, status)
        self.budget = int(budget)
        self.weights = _vector(weights, self.num_units, "sampling weights")
        self.always = torch.zeros(self.num_units, dtype=torch.bool)
        self.always[list(always)] = True
        free = int((~self.always).sum())
        if not 0 <= self.budget <= free:
            raise InputError(
                f"mask design: expected a budget between 0 and {free} free units, got {self.budget}"
            )
        if not bool((self.weights > 0).all()):
            raise InputError("sampling weights: expected positive values")

    def draw(self, num: int, generator: torch.Generator | None) -> Tensor:
        """Sequential sampling, exact: unit i is taken with the conditional probability that the table of e_r
        gives.
        """
        free = (~self.always).nonzero().flatten()
        w = self.weights[free]
        table = suffix_polynomials(w[None], self.budget)[0]
        units = self.always.double().repeat(num, 1)
        left = torch.full((num,), self.budget)
        u = uniform((num, len(free)), generator)
        for i in range(len(free)):
            with_i = w[i].log() + table[i + 1, (left - 1).clamp(min=0)]
            take = (left > 0) & (u[:, i].log() < with_i - table[i, left])
            units[take, free[i]] = 1.0
            left = left - take.long()
        return units

    def _kept_budget(self, keep: float) -> int:
        """Budgeted units to keep: at least one is held out, else nothing would supervise the rest."""
        return min(round(keep * self.budget), max(self.budget - 1, 0))

    def thin_units(self, units: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
        k = self._kept_budget(keep)
        priority = uniform(units.shape, generator)
        free = units.bool() & ~self.always
        # The k free units of highest priority; the others, and unmeasured units, sort below.
        chosen = torch.where(free, priority, -1.0).topk(k, dim=1).indices if k else None
        kept = torch.zeros_like(units)
        if chosen is not None:
            kept.scatter_(1, chosen, 1.0)
            kept = kept * free
        return torch.where(self.always, units * (priority < keep), kept)

    def probability_units(self, units: Tensor, kept: Tensor, keep: float) -> Tensor:
        rest = self.budget - self._kept_budget(keep)
        outside = (kept == 0) & ~self.always
        w = torch.where(outside, self.weights, 0.0)
        p = inclusion(w, rest)
        return torch.where(outside, p, 1.0)

    def possible_units(self, units: Tensor) -> Tensor:
        return units[:, self.always].all(1) & (units[:, ~self.always].sum(1) == self.budget)

    def unsupervised(self, keep: float) -> list[int]:
        if keep == 1 or self.budget == 0:
            return (~self.always).nonzero().flatten().tolist()
        return []

    def parameters(self) -> dict[str, Any]:
        constant = bool((self.weights == self.weights[0]).all())
        return {
            "budget": self.budget,
            "weights": float(self.weights[0]) if constant else self.weights.tolist(),
            "always": self.always.nonzero().flatten().tolist(),
        }
