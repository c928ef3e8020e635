"""Measurements in the forms that users have them in: a file, files, arrays with an operator, pairs of a
physics and what it measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.data import MeasurementArrays, MeasurementFile, MeasurementFiles
from ambient_sci.data.loader import CACHE_BYTES
from ambient_sci.data.survey import Measurements
from ambient_sci.errors import InputError
from ambient_sci.noise import expand
from ambient_sci.operators import MRI, Identity, Masking, RowMaskedOperator
from ambient_sci.operators.foreign import Linear, from_deepinv
from ambient_sci.sampling.border import as_real, noise_of
from ambient_sci.sampling.checks import check_linear

EXPECTED = "a path or (operator, y, sigma_y), a list of paths or of (operator, y), or MeasurementArrays"


def open_measurements(measurements: Any) -> Measurements:
    """What a user calls measurements, opened; in memory where it is small.

    Args:
        measurements: a measurement file; a list of files; (operator, y, sigma_y), or (operator, y) where the
            operator's noise model says the level; a list of such pairs or triples, each of one measurement or
            of several; `MeasurementArrays`, `MeasurementFile` or `MeasurementFiles`.

    Raises:
        InputError: anything else.
    """
    if isinstance(measurements, MeasurementArrays):
        return measurements
    if isinstance(measurements, (str, os.PathLike)):
        measurements = MeasurementFile(measurements)
    elif _are_paths(measurements):
        measurements = (
            MeasurementFile(measurements[0]) if len(measurements) == 1 else MeasurementFiles(measurements)
        )
    if isinstance(measurements, (MeasurementFile, MeasurementFiles)):
        return MeasurementArrays.read(measurements) if measurements.nbytes < CACHE_BYTES else measurements
    if isinstance(measurements, tuple) and measurements and isinstance(measurements[0], torch.nn.Module):
        return _arrays([measurements])
    if isinstance(measurements, Iterable) and not isinstance(measurements, (tuple, Tensor, dict, bytes)):
        return _arrays(list(measurements))
    got = f"{len(measurements)} values" if isinstance(measurements, tuple) else type(measurements).__name__
    raise InputError(f"measurements: expected {EXPECTED}, got {got}")


def _are_paths(measurements: Any) -> bool:
    return (
        isinstance(measurements, list)
        and bool(measurements)
        and all(isinstance(one, (str, os.PathLike)) for one in measurements)
    )


def _arrays(parts: Sequence[Any]) -> MeasurementArrays:
    """One data set from the measurements of one operator, or of several of a kind."""
    checked = [_part(part, f" {k}" if len(parts) > 1 else "") for k, part in enumerate(parts)]
    if not checked:
        raise InputError(f"measurements: expected {EXPECTED}, got an empty list")
    if len(checked) == 1:
        operator, y, sigma = checked[0]
    else:
        operator, y, sigma = _joined(checked)
    data = MeasurementArrays(operator, y, sigma)
    if operator.name == "masking":  # a mask of one channel serves any number: the data say how many there are
        data.image_shape = tuple(y.shape[1:])
    return data


def _part(part: Any, number: str) -> tuple[RowMaskedOperator, Tensor, Any]:
    """Operator, measurements (n, ...) and noise level of one pair or triple."""
    if not isinstance(part, (tuple, list)) or len(part) not in (2, 3):
        got = f"{len(part)} values" if isinstance(part, (tuple, list)) else type(part).__name__
        raise InputError(f"measurements{number}: expected (operator, y) or (operator, y, sigma_y), got {got}")
    physics, y, sigma = part[0], part[1], part[2] if len(part) == 3 else None
    if not isinstance(physics, LinearPhysics):
        raise InputError(
            f"measurements{number}: expected an Identity, Masking or MRI operator, or a deepinv "
            f"LinearPhysics, got {type(physics).__name__}"
        )
    y = as_real(y, f"measurements{number}").detach().float()
    sigma = noise_of(physics, sigma)
    if _is_one(physics, y):
        y = y[None]
    if y.ndim < 2 or len(y) == 0:
        raise InputError(f"measurements{number}: expected (N, ...) of at least one, got {tuple(y.shape)}")
    operator = from_deepinv(physics, y)
    if isinstance(operator, Linear):
        check_linear(physics, y[:1], (1, *operator.img_size))
    return operator, y, sigma


def _is_one(physics: LinearPhysics, y: Tensor) -> bool:
    """One measurement without a batch; of a foreign physics, where only one axis too few can be one."""
    if isinstance(physics, RowMaskedOperator):
        return y.ndim == len(physics.measurement_size)
    size = getattr(physics, "mask", None)
    if hasattr(physics, "coil_maps"):
        return y.ndim == 4
    return y.ndim == 3 or (y.ndim == 2 and isinstance(size, Tensor))


def _joined(parts: list[tuple[RowMaskedOperator, Tensor, Any]]) -> tuple[RowMaskedOperator, Tensor, Any]:
    """Several operators of one kind as one, with a mask and maps for each sample."""
    first = parts[0][0]
    sizes = {(type(o), tuple(y.shape[1:])) for o, y, _ in parts}
    if len(sizes) > 1:
        said = ", ".join(sorted(f"{kind.__name__} {size}" for kind, size in sizes)[:3])
        raise InputError(
            f"measurements: expected operators of one kind and measurements of one shape, got {said}"
        )
    y = torch.cat([part for _, part, _ in parts])
    sigma = _joined_levels([(y, sigma) for _, y, sigma in parts])
    if isinstance(first, Identity):
        return first, y, sigma
    if isinstance(first, Linear):
        if any(o.physics is not first.physics for o, _, _ in parts if isinstance(o, Linear)):
            raise InputError(
                f"measurements: expected one {type(first.physics).__name__} for all measurements, got several"
            )
        return first, y, sigma
    masks = torch.cat([o.mask.expand(len(p), *o.mask.shape[1:]) for o, p, _ in parts])
    designs = {id(o.design): o.design for o, _, _ in parts}
    design = first.design if len(designs) == 1 else None
    if isinstance(first, MRI):
        maps = [(o.coil_maps, len(p)) for o, p, _ in parts if isinstance(o, MRI)]
        all_maps = [m.expand(count, *m.shape[1:]) for m, count in maps if m is not None]
        return MRI(masks, torch.cat(all_maps) if all_maps else None, design=design), y, sigma
    return Masking(masks, img_size=tuple(y.shape[1:]), design=design), y, sigma


def _joined_levels(parts: list[tuple[Tensor, Any]]) -> Tensor:
    """Noise levels of all measurements, (N,), or of the shape of y where some differ by entry."""
    levels = [(torch.as_tensor(sigma).to(y), y) for y, sigma in parts]
    if any(level.ndim > 1 for level, _ in levels):
        return torch.cat([expand(level, y).expand_as(y) for level, y in levels])
    return torch.cat([level.flatten().expand(len(y)) for level, y in levels])
