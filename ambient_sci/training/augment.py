r"""Symmetries drawn during training, of image, mask and coil maps together.

Only those that leave white noise white and the mask design as it is. With P a symmetry of the image,

    y' = M' (T' P x + sigma_y n'),        n' white,

holds for reflections (P permutes pixels), for transposition, and for a global phase x -> exp(i theta) x of
complex images (circular noise does not change under it). For MRI a reflection is taken about the centre of
the transform, index j -> (2c - j) mod n with c = n // 2: then image, coil maps, mask and k-space are all
reflected by the same permutation, exactly and for every n.

A gain x -> a x is exact as well, if the noise level moves along: a y has noise a sigma_y, and every loss
takes sigma_y per sample. It makes a prior that does not depend on how bright the training scans happened to
be.

The weights of held-out rows depend on the design of the mask, so a reflection is allowed only if the design
is invariant under it: lines along the reflected axis, or probabilities that are themselves symmetric.
Rotations by other angles and changes of size interpolate, which colours the noise; they do not exist here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators import (
    MRI,
    FixedBudget,
    Identity,
    Independent,
    MaskDesign,
    Masking,
    RowMaskedOperator,
)

_AXES = {"flip-vertical": -2, "flip-horizontal": -1}
LOWEST_GAIN = 0.4


def reflect(t: Tensor, axis: int, about_centre: bool) -> Tensor:
    """Mirror image along ``axis``: j -> n - 1 - j, or j -> (2 (n // 2) - j) mod n about the centre of a
    centred transform."""
    flipped = t.flip(axis)
    return flipped.roll(1, axis) if about_centre and t.shape[axis] % 2 == 0 else flipped


def check_augmentations(
    names: Sequence[str], image_shape: tuple[int, ...], operator_name: str, design: MaskDesign | None
) -> None:
    """Raise InputError unless every augmentation is exact for these data; ``design`` is None for complete
    data."""
    for name in names:
        if name == "gain":
            continue  # exact for every linear operator
        if name == "phase":
            if image_shape[0] != 2:
                raise InputError(
                    f"augmentation phase: expected complex images (2 channels), got {image_shape[0]} channels"
                )
            if design is not None and design.unit_shape[0] != 1:
                raise InputError(
                    "augmentation phase: expected masks shared by real and imaginary part, got one for each "
                    "channel"
                )
        elif name == "transpose":
            if design is not None:
                raise InputError("augmentation transpose: expected complete data, got data with a mask")
            if image_shape[1] != image_shape[2]:
                raise InputError(
                    f"augmentation transpose: expected square images, got {image_shape[1]} x {image_shape[2]}"
                )
        elif design is not None and not _invariant(design, _AXES[name], operator_name == "mri"):
            raise InputError(
                f"augmentation {name}: expected a mask design that is the same when mirrored, got "
                f"{design!r}; "
                "its weights would be wrong"
            )


def exact_augmentations(
    names: Sequence[str], image_shape: tuple[int, ...], operator_name: str, design: MaskDesign | None
) -> tuple[str, ...]:
    """Those of ``names`` that `check_augmentations` lets pass."""

    def exact(name: str) -> bool:
        try:
            check_augmentations((name,), image_shape, operator_name, design)
        except InputError:
            return False
        return True

    return tuple(filter(exact, names))


def _invariant(design: MaskDesign, axis: int, about_centre: bool) -> bool:
    if design.unit_shape[axis] == 1:
        return True  # lines along this axis
    if isinstance(design, Independent):
        vectors = [design.p]
    elif isinstance(design, FixedBudget):
        vectors = [design.weights, design.always]
    else:
        return False
    shaped = [v.reshape(design.unit_shape) for v in vectors]
    return all(torch.equal(v, reflect(v, axis, about_centre)) for v in shaped)


#: Symmetries that were drawn: each by its name, with what it applies, one value a sample (on the CPU), where
# it has one.
Symmetries = list[tuple[str, Tensor | None]]


def draw_symmetries(names: Sequence[str], num: int, generator: torch.Generator) -> Symmetries:
    """Draw each symmetry of ``names``: reflections and transposition for the batch, phases and gains per
    sample.

    Args:
        names: checked by `check_augmentations`.
        num: samples of the batch.
        generator: on the CPU.
    """
    drawn: Symmetries = []
    for name in names:
        if name == "phase":
            drawn.append((name, 2 * math.pi * torch.rand(num, generator=generator)))
        elif name == "gain":
            drawn.append((name, LOWEST_GAIN ** torch.rand(num, generator=generator)))
        elif bool(torch.rand((), generator=generator) < 0.5):
            drawn.append((name, None))
    return drawn


def apply_symmetries(
    symmetries: Symmetries, operator: RowMaskedOperator, y: Tensor, sigma_y: Tensor
) -> tuple[RowMaskedOperator, Tensor, Tensor]:
    """The measurement that the transformed anatomy would have given.

    Args:
        symmetries: see `draw_symmetries`.
        operator: Identity, Masking or MRI.
        y: measurements (B, ...).
        sigma_y: their noise levels (B,), which a gain scales with the data; it is at most 1, so levels chosen
            above sigma_y stay above.

    Returns:
        operator, measurements and noise levels.
    """
    for name, value in symmetries:
        if name == "phase":
            assert value is not None
            y = rotate_phase(y, value)
        elif name == "gain":
            assert value is not None
            y = y * value.to(y, non_blocking=True).reshape(-1, *([1] * (y.ndim - 1)))
            sigma_y = sigma_y * value.to(sigma_y, non_blocking=True).reshape(-1, *([1] * (sigma_y.ndim - 1)))
        elif name == "transpose":
            y = y.transpose(-1, -2)
        else:
            operator, y = flip(operator, y, _AXES[name])
    return operator, y.contiguous() if symmetries else y, sigma_y


def transformed_levels(symmetries: Symmetries, operator: RowMaskedOperator, levels: Tensor) -> Tensor:
    """Noise levels of the shape of y (or one that broadcasts to it), moved and scaled as `apply_symmetries`
    does y."""
    for name, value in symmetries:
        if name == "gain":
            assert value is not None
            levels = levels * value.to(levels, non_blocking=True).reshape(-1, *([1] * (levels.ndim - 1)))
        elif name == "transpose":
            levels = levels.transpose(-1, -2)
        elif name in _AXES:
            levels = reflect(levels, _AXES[name], isinstance(operator, MRI))
    return levels


def mirrored(symmetries: Symmetries, operator: RowMaskedOperator, mask: Tensor) -> Tensor:
    """The mask (1|B, m, H, W) of the transformed measurements of ``operator``, from the one before."""
    for name, _ in symmetries:
        if name in _AXES:
            mask = reflect(mask, _AXES[name], isinstance(operator, MRI))
    return mask


def augment(
    operator: RowMaskedOperator,
    y: Tensor,
    names: Sequence[str],
    generator: torch.Generator,
    sigma_y: Tensor | None = None,
) -> tuple[RowMaskedOperator, Tensor, Tensor | None]:
    """Draw each symmetry of ``names`` and apply it: `draw_symmetries`, then `apply_symmetries`."""
    symmetries = draw_symmetries(names, len(y), generator)
    levels = torch.zeros(len(y)) if sigma_y is None else sigma_y
    operator, y, levels = apply_symmetries(symmetries, operator, y, levels)
    return operator, y, None if sigma_y is None else levels


def rotate_phase(y: Tensor, angle: Tensor) -> Tensor:
    """exp(i angle) y for complex data in two channels (B, 2, ...); ``angle`` (B,)."""
    angle = angle.to(y, non_blocking=True).reshape(-1, *([1] * (y.ndim - 2)))
    cos, sin = angle.cos(), angle.sin()
    re, im = y[:, 0], y[:, 1]
    return torch.stack([cos * re - sin * im, sin * re + cos * im], 1)


def flip(operator: RowMaskedOperator, y: Tensor, axis: int) -> tuple[RowMaskedOperator, Tensor]:
    """The measurement that the mirrored anatomy would have given: operator with mirrored mask and maps, and
    mirrored y."""
    if isinstance(operator, Identity):
        return operator, reflect(y, axis, False)
    if isinstance(operator, Masking):
        mask, host = (
            None if m is None else reflect(m, axis, False) for m in (operator.mask, operator._host_mask)
        )
        assert mask is not None
        return operator._with_rows(mask, operator.design, host), reflect(y, axis, False)
    if isinstance(operator, MRI):
        maps = operator.coil_maps
        mirrored = MRI._trusted(
            reflect(operator.mask, axis, True),
            None if maps is None else reflect(maps, axis, True),
            operator.design,
            isometry=operator.isometry,
            own=True,
        )
        mirrored._drawn_by = operator._drawn_by
        if operator._host_mask is not None:
            mirrored._host_mask = reflect(operator._host_mask, axis, True)
        return mirrored, reflect(y, axis, True)
    raise InputError(
        f"augmentation: expected an Identity, Masking or MRI operator, got {type(operator).__name__}"
    )
