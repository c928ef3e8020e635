"""A measurement's rows divided in two: what a network is shown and what it is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError

if TYPE_CHECKING:
    from ambient_sci.operators.base import RowMaskedOperator
    from ambient_sci.operators.designs import MaskDesign


@dataclass(frozen=True)
class Split:
    """A measurement's rows divided into ``kept`` (B) and ``held_out`` (A without B), over the same T.

    Attributes:
        operator: A, what was divided; one mask per sample where rows are held out.
        kept: B; A itself if nothing is held out.
        weights: measurement space, broadcastable: 1 on kept rows, 1 / P(A_i = 1 | B) on held-out rows, 0
            elsewhere: the inverse-probability weights that make the split loss an unbiased squared error of
            the whole image. They are 1 on held-out rows if the design of the mask is unknown.
    """

    operator: RowMaskedOperator
    kept: RowMaskedOperator
    weights: Tensor

    @property
    def holds_out(self) -> bool:
        """Whether any row may be held out; said without reading a mask."""
        return self.kept is not self.operator

    @cached_property
    def held_out(self) -> RowMaskedOperator:
        """A without B; made when it is first asked for."""
        if not self.holds_out:
            return self.operator.with_mask(torch.zeros_like(self.operator.mask))
        return self.operator.with_mask(self.operator.mask - self.kept.mask, design=self.kept.design)

    def __getitem__(self, index: Any) -> Split:
        """The split of some samples of the batch."""
        operator = self.operator[index]
        kept = self.kept[index] if self.holds_out else operator
        return Split(operator, kept, self.weights if len(self.weights) == 1 else self.weights[index])


def always_measured(design: MaskDesign) -> Tensor:
    """1 on the rows that every mask of ``design`` measures (calibration lines), 0 elsewhere, (1, m, H, W)."""
    from ambient_sci.operators.designs import FixedBudget, Independent

    always = None
    if isinstance(design, FixedBudget):
        always = design.always
    elif isinstance(design, Independent):
        always = design.p == 1
    if always is None or not bool(always.any()):
        raise InputError(
            "keep_calibration: expected a mask design with rows that are always measured, got "
            f"{design.name!r}"
        )
    return design.to_mask(always[None])
