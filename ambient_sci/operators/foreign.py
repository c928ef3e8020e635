r"""Operators of deepinv as operators of this library.

`Denoising`, `Inpainting`, `MRI` and `MultiCoilMRI` are `Identity`, `Masking` and `MRI` in other words, and
become those. Any other ``LinearPhysics`` becomes a `Linear`, y = M (A x + sigma_y n), whose transform T is
the physics' A and whose mask measures every row: enough for whatever asks only for A, A^H and rows to hold
out, as expectation maximisation does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepinv import physics as theirs
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.operators.elementary import Identity, Masking
from ambient_sci.operators.mri import MRI

#: What a physics raises for shapes that it does not take.
FOREIGN_ERRORS = (RuntimeError, ValueError, IndexError, AssertionError, TypeError)
CONVERTED = ("Denoising", "Inpainting", "MRI", "MultiCoilMRI")


class Linear(RowMaskedOperator):
    """A = M T with T = A of any deepinv ``LinearPhysics`` that treats the samples of a batch alike.

    Args:
        physics: A and A_adjoint. They run in the type of the physics' own tensors.
        img_size: (C, H, W) of one image.
        measurement_size: shape of one measurement.
    """

    name = "linear"

    def __init__(
        self, physics: LinearPhysics, img_size: tuple[int, ...], measurement_size: tuple[int, ...]
    ) -> None:
        ones = torch.ones(1, *[1] * len(measurement_size))
        super().__init__(ones, tuple(img_size), tuple(measurement_size), isometry=False)
        self.physics = physics
        self.noise_model = physics.noise_model

    def _in_own_type(self, function: Any, x: Tensor) -> Tensor:
        tensors = [*self.physics.parameters(), *self.physics.buffers()]
        own = next((t.dtype for t in tensors if t.is_floating_point() or t.is_complex()), x.dtype)
        return function(x.to(own.to_real())).to(x.dtype)

    def transform(self, x: Tensor) -> Tensor:
        """The physics' A."""
        return self._in_own_type(self.physics.A, x)

    def transform_adjoint(self, z: Tensor) -> Tensor:
        """The physics' adjoint."""
        return self._in_own_type(self.physics.A_adjoint, z)

    def response(self) -> list[Any]:
        """What tells this operator from another of its class: its name, and the size of its answer to a fixed
        random image."""
        probe = torch.randn(1, *self.img_size, generator=torch.Generator().manual_seed(0)).to(
            self.mask.device
        )
        answer = float(self.transform(probe).double().norm())
        return [type(self.physics).__name__, float(f"{answer:.4g}")]

    def _as_network_mask(self, mask: Tensor) -> Tensor:
        """(B, m, H, W), whatever the shape of a measurement: rows are what masks are about."""
        size = self.measurement_size
        shape = size if len(size) == 3 else (1, 1, math.prod(size))
        return mask.expand(-1, *size).reshape(len(mask), *shape)

    def _rows_from_network_mask(self, mask: Tensor) -> Tensor:
        return mask.reshape(len(mask), *self.measurement_size)

    def __repr__(self) -> str:
        sizes = (" x ".join(map(str, size)) for size in (self.img_size, self.measurement_size))
        return f"Linear({type(self.physics).__name__}, {' to '.join(sizes)})"


def from_deepinv(physics: LinearPhysics, y: Tensor) -> RowMaskedOperator:
    """The operator of this library that a physics of deepinv is, for measurements ``y`` (B, ...).

    Raises:
        InputError: a mask that is not 0/1 or differs between real and imaginary part, volumes, or parameters
            for another number of samples.
    """
    if isinstance(physics, RowMaskedOperator):
        return physics
    kind = type(physics)
    if kind is theirs.Denoising:
        operator: RowMaskedOperator = Identity(tuple(y.shape[1:]))
    elif kind is theirs.Inpainting:
        mask = _mask_of(physics, 4)
        operator = Masking(mask, img_size=tuple(y.shape[1:]))
    elif kind in (theirs.MRI, theirs.MultiCoilMRI):
        if physics.three_d:
            raise InputError(f"{kind.__name__}: expected images (2, H, W), got volumes (three_d)")
        maps = physics.coil_maps if kind is theirs.MultiCoilMRI else None
        operator = MRI(_mask_of(physics, 4), maps)
    else:
        return _linear(physics, y)
    operator.noise_model = physics.noise_model
    _check_same(physics, operator, y)
    return operator


def _mask_of(physics: LinearPhysics, ndim: int) -> Tensor:
    mask = physics.mask
    name = type(physics).__name__
    if not isinstance(mask, Tensor) or mask.ndim != ndim:
        raise InputError(f"{name}: expected a mask (1 or B, C, H, W), got {getattr(mask, 'shape', mask)}")
    return mask.detach()


def _check_same(physics: LinearPhysics, operator: RowMaskedOperator, y: Tensor) -> None:
    """Theirs and ours on one random image and measurement: another convention would be noticed here."""
    generator = torch.Generator().manual_seed(0)
    count = max(operator.batch_size, 1)
    x = torch.randn(count, *operator.img_size, generator=generator).to(y.device)
    w = torch.randn(count, *y.shape[1:], generator=generator).to(y.device)
    with torch.no_grad():
        try:
            pairs = [(physics.A(x), operator.A(x)), (physics.A_adjoint(w), operator.A_adjoint(w))]
        except InputError:
            raise
        except FOREIGN_ERRORS as error:
            raise InputError(
                f"{type(physics).__name__}: expected an operator for measurements {tuple(y.shape)}, got "
                f"{str(error).splitlines()[0]}"
            ) from None
    for a, b in pairs:
        if a.shape != b.shape or not bool((a - b).norm() <= 1e-4 * b.norm()):
            raise InputError(
                f"{type(physics).__name__}: expected deepinv's definition of it, got one that differs from "
                f"{operator!r}"
            )


def _linear(physics: LinearPhysics, y: Tensor) -> Linear:
    name = type(physics).__name__
    some = y[:2]
    try:
        with torch.no_grad():
            image = physics.A_adjoint(some)
            alone = physics.A_adjoint(some[-1:])
    except FOREIGN_ERRORS as error:
        raise InputError(
            f"{name}: expected one operator for all samples of {tuple(y.shape)}, got "
            f"{str(error).splitlines()[0]}"
        ) from None
    if image.ndim != 4 or not torch.allclose(
        image[-1:], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())
    ):
        raise InputError(
            f"{name}: expected images (B, C, H, W) and one operator for all samples, got "
            f"{tuple(image.shape)} or parameters that differ between samples"
        )
    return Linear(physics, tuple(image.shape[1:]), tuple(y.shape[1:]))
