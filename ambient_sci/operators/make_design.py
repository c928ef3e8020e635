r"""Mask designs by name, from their JSON description, and from the masks of a data set whose design nobody
wrote down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.operators.designs import FixedBudget, Independent, Layout, MaskDesign
from ambient_sci.operators.structured_designs import Enumerated, PoissonDisc, RandomBox

DESIGN_NAMES = (
    "bernoulli",
    "bernoulli-entries",
    "box",
    "lines-uniform",
    "lines-variable",
    "lines-bernoulli",
    "equispaced",
    "poisson",
)


class Unknown(Independent):
    """A design nobody stated: rows are grouped as the masks suggest, kept independently, held-out weights are
    1.

    With weights 1 the split loss is no unbiased squared error, but for a single coil its minimiser is the
    same as long as every row is held out at times. Whether it is cannot be known, so training on it is
    refused: state a design or estimate one.
    """

    name = "unknown"

    def __init__(
        self, image_shape: Sequence[int], layout: Layout, probability: float = 0.5, status: str = "unknown"
    ) -> None:
        super().__init__(image_shape, layout, probability, status)

    def probability_units(self, units: Tensor, kept: Tensor, keep: float) -> Tensor:
        return torch.ones_like(kept)

    def possible_units(self, units: Tensor) -> Tensor:
        return torch.ones(len(units), dtype=torch.bool)  # nothing is claimed

    def check_trainable(self, keep: float) -> None:
        raise IdentifiabilityError(
            "the mask design is unknown, so the weights of held-out rows are too: state it, or estimate it "
            "from the masks of the "
            "whole data set (ambient_sci.operators.estimate_design)"
        )


def guess_layout(mask: Tensor) -> Layout:
    """How the rows of a mask (n, m, H, W) hang together: whole columns, whole rows, pixels, or each channel
    by itself.
    """
    if mask.shape[1] > 1 and bool((mask != mask[:, :1]).any()):
        return "entries"
    if bool((mask == mask[:, :, :1]).all()):
        return "columns"
    if bool((mask == mask[..., :1]).all()):
        return "rows"
    return "pixels"


def unknown_design(operator_name: str, mask: Tensor) -> Unknown:
    """The design of a mask of unknown origin. Only k-space masks are looked at for lines: images have
    none.
    """
    layout = guess_layout(mask)
    if operator_name != "mri" and layout in ("columns", "rows"):
        layout = "pixels"
    return Unknown(tuple(mask.shape[1:]), layout)


def estimate_design(masks: Tensor) -> MaskDesign:
    """An `Independent` design fitted to the masks (n, m, H, W) of a data set, marked "estimated".

    p_i = (times measured + 1/2) / (n + 1), except that units measured in every mask keep probability 1. Exact
    only if units were drawn independently; a fixed number of lines makes it an approximation.

    Raises:
        IdentifiabilityError: fewer than 8 different masks, too few to tell a probability from.
    """
    layout = guess_layout(masks)
    shape = (masks.shape[1], *masks.shape[2:])
    probe = Independent(shape, layout, 0.5)
    units = probe.to_units(masks)
    different = len(torch.unique(units, dim=0))
    if different < 8:
        raise IdentifiabilityError(
            f"mask design: expected at least 8 different masks to estimate it from, got {different}"
        )
    frequency = units.double().mean(0)
    n = masks.shape[0]
    p = torch.where(frequency == 1, 1.0, (frequency * n + 0.5) / (n + 1))
    return Independent(shape, layout, p, status="estimated")


def central_lines(num_lines: int, count: int) -> list[int]:
    """Indices of the ``count`` central lines, centred on zero frequency (index num_lines // 2)."""
    start = num_lines // 2 - count // 2
    return list(range(start, start + count))


def variable_density(num_lines: int, power: float = 2.0, floor: float = 0.05) -> Tensor:
    """Sampling odds (1 - r)^power + floor, r in [0, 1] the distance from zero frequency (Lustig et al.
    2007).
    """
    r = (torch.arange(num_lines, dtype=torch.float64) - num_lines // 2).abs() / max(num_lines // 2, 1)
    return (1 - r).clamp(min=0) ** power + floor


def make_design(
    name: str,
    *,
    image_shape: Sequence[int],
    acceleration: float | None = None,
    keep: float | None = None,
    acs: int | None = None,
    axis: Layout = "columns",
    box: Sequence[int] | None = None,
) -> MaskDesign:
    """A design by name.

    Args:
        name: one of `DESIGN_NAMES`. "bernoulli": pixels (all channels together); "bernoulli-entries": each
            channel by itself; "box": one missing box; "lines-uniform" and "lines-variable": a fixed number of
            k-space lines besides the calibration lines; "lines-bernoulli": lines drawn independently;
            "equispaced": every R-th line; "poisson": Poisson disc.
        image_shape: (C, H, W).
        acceleration: R > 1, total / measured, for the k-space designs; calibration lines count as measured.
        keep: probability that a pixel is measured, for the Bernoulli designs.
        acs: calibration lines; default 8 % of the lines, at least 4.
        axis: "columns" (phase encoding along the last axis) or "rows".
        box: size of the missing box; default a quarter of the image in each direction.

    Raises:
        InputError: an unknown name, a missing or impossible number.
    """
    if name not in DESIGN_NAMES:
        raise InputError(f"mask design: expected one of {', '.join(DESIGN_NAMES)}, got {name!r}")
    if name.startswith("bernoulli"):
        if keep is None or not 0 < keep < 1:
            raise InputError(f"mask design {name!r}: expected keep between 0 and 1, got {keep}")
        return Independent(image_shape, "pixels" if name == "bernoulli" else "entries", keep)
    _, height, width = image_shape
    if name == "box":
        return RandomBox(image_shape, "pixels", box or (max(height // 4, 1), max(width // 4, 1)))
    if acceleration is None or not acceleration > 1:
        raise InputError(f"mask design {name!r}: expected an acceleration above 1, got {acceleration}")
    if axis not in ("columns", "rows"):
        raise InputError(f"mask design {name!r}: expected axis columns or rows, got {axis!r}")
    lines = width if axis == "columns" else height
    if name == "poisson":
        side = acs if acs is not None else max(round(0.08 * lines), 4)
        return PoissonDisc(image_shape, "pixels", acceleration, (side, side))
    acs = max(round(0.08 * lines), 4) if acs is None else acs
    always = central_lines(lines, acs)
    budget = round(lines / acceleration) - acs
    if budget < 1:
        raise InputError(
            f"mask design {name!r}: expected room for lines besides the {acs} calibration lines; {lines} "
            f"lines at R = {acceleration:g} "
            f"leave {budget}"
        )
    if name == "equispaced":
        return Enumerated.equispaced(image_shape, axis, max(round((lines - acs) / budget), 2), always)
    if name == "lines-bernoulli":
        p = torch.full((lines,), budget / (lines - acs), dtype=torch.float64)
        p[always] = 1.0
        return Independent(image_shape, axis, p)
    weights = variable_density(lines) if name == "lines-variable" else 1.0
    return FixedBudget(image_shape, axis, budget, weights, always)


def design_from_dict(description: dict[str, Any]) -> MaskDesign:
    """Inverse of `MaskDesign.to_dict`.

    Raises:
        InputError: an unknown name or wrong parameters.
    """
    rest = dict(description)
    kind = MaskDesign._registry.get(rest.pop("name", None))
    if kind is None:
        raise InputError(
            f"mask design: expected one of {', '.join(sorted(MaskDesign._registry))}, got "
            f"{description.get('name')!r}"
        )
    try:
        return kind(**rest)
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"mask design {description['name']!r}: {str(error).splitlines()[0]}") from None
