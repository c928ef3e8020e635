"""Row-masked linear operators, mask designs with their probabilities, splits, coil maps, noise levels."""

from __future__ import annotations

from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.operators.coils import birdcage_maps, normalise_maps
from ambient_sci.operators.designs import FixedBudget, Independent, MaskDesign
from ambient_sci.operators.elementary import Identity, Masking
from ambient_sci.operators.identifiability import IdentifiabilityReport, identifiability
from ambient_sci.operators.make_design import (
    DESIGN_NAMES,
    Unknown,
    design_from_dict,
    estimate_design,
    make_design,
)
from ambient_sci.operators.mri import MRI
from ambient_sci.operators.split import Split
from ambient_sci.operators.structured_designs import Enumerated, PoissonDisc, RandomBox

__all__ = [
    "DESIGN_NAMES",
    "MRI",
    "Enumerated",
    "FixedBudget",
    "IdentifiabilityReport",
    "Identity",
    "Independent",
    "MaskDesign",
    "Masking",
    "PoissonDisc",
    "RandomBox",
    "RowMaskedOperator",
    "Split",
    "Unknown",
    "birdcage_maps",
    "build_operator",
    "design_from_dict",
    "estimate_design",
    "identifiability",
    "make_design",
    "normalise_maps",
]


def build_operator(
    name: str,
    mask: Tensor | None,
    image_shape: tuple[int, ...],
    coil_maps: Tensor | None = None,
    design: MaskDesign | None = None,
) -> RowMaskedOperator:
    """An operator by name: "identity", "masking" or "mri".

    Raises:
        InputError: an unknown name, or a mask missing where one is needed.
    """
    if name == "identity":
        return Identity(image_shape)
    if name not in ("masking", "mri"):
        raise InputError(f"operator: expected identity, masking or mri, got {name!r}")
    if mask is None:
        raise InputError(f"operator {name}: expected a mask, got none")
    if name == "masking":
        return Masking(mask, img_size=image_shape, design=design)
    return MRI(mask, coil_maps=coil_maps, design=design)
