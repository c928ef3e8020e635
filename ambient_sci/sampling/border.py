"""From what a user has to what the samplers trust: a prior or its name, a device, a seed or a generator,
arrays, one measurement or a batch, an operator with its noise, a measurement file.

Nothing that is handed in is changed: what has to be on another device is copied there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from deepinv.physics import GaussianNoise, LinearPhysics, ZeroNoise
from torch import Tensor, nn

from ambient_sci.data import MeasurementArrays, MeasurementFile, MeasurementFiles
from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator, copied
from ambient_sci.priors.base import Prior
from ambient_sci.priors.storage import load_prior

PriorLike = Prior | str | os.PathLike[str]
Array = Tensor | np.ndarray


# -- priors, devices, randomness -----------------------------------------------------------------------------


def as_device(device: str | torch.device | None) -> torch.device | None:
    """A device by name; "auto" is CUDA where there is one and else the CPU, None stays None.

    Raises:
        InputError: no such device.
    """
    if device is None or isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: expected auto, cpu, cuda or a torch.device, got {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: expected a machine with CUDA for {device!r}, got one without")
    return found


def as_prior(prior: Any, what: str, device: str | torch.device | None = None) -> Prior:
    """A prior, from itself or from where it lies, on ``device`` (None: where it is, a file on the CPU).

    Args:
        prior: a `Prior`; the folder of one or of a training run; "pretrained:NAME".
        what: who asks, for the message.
        device: see `as_device`. A prior that is elsewhere is copied, not moved.

    Raises:
        InputError: something else, or no prior there.
    """
    target = as_device(device)
    if isinstance(prior, (str, os.PathLike)):
        return load_prior(os.fspath(prior), target or "cpu")
    if not callable(prior) or not hasattr(prior, "shape") or isinstance(prior, (Tensor, np.ndarray)):
        hint = ""
        if isinstance(prior, nn.Module):
            hint = "; a network becomes one by priors.DeepinvPrior(network, shape, data_std)"
        raise InputError(
            f"{what}: expected a prior, the folder of one or pretrained:NAME, got {type(prior).__name__}"
            f"{hint}"
        )
    found: Any = prior  # a prior, or what is called like one
    if target is None or device_of(found) in (None, target) or not isinstance(found, nn.Module):
        return found
    moved_prior: Any = copied(found).to(target)
    return moved_prior


def device_of(module: Any) -> torch.device | None:
    """Where the tensors of a module are; None without any."""
    if not isinstance(module, nn.Module):
        return None
    return next((t.device for group in (module.parameters(), module.buffers()) for t in group), None)


def as_generator(generator: Any, seed: Any, what: str) -> torch.Generator | None:
    """A generator, from itself or from a seed; None where neither is given.

    Raises:
        InputError: both, or what is neither a generator nor a whole number from 0 to 2^63 - 1.
    """
    if generator is not None and not hasattr(generator, "get_state"):
        hint = f"; for a seed give seed={generator}" if isinstance(generator, int) else ""
        raise InputError(
            f"{what}: expected generator to be a torch.Generator, got {type(generator).__name__}{hint}"
        )
    if seed is None:
        return generator
    if generator is not None:
        raise InputError(f"{what}: expected a seed or a generator, got both")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise InputError(f"{what}: expected seed to be a whole number from 0 to 2^63 - 1, got {seed!r}")
    return torch.Generator().manual_seed(int(seed))


# -- measurements --------------------------------------------------------------------------------------------


def as_real(array: Any, name: str) -> Tensor:
    """A tensor, from itself or from a NumPy array, in its own type.

    Raises:
        InputError: complex, whole or no numbers.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fciub":
            raise InputError(f"{name}: expected real numbers, got an array of {array.dtype}")
        native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
        array = torch.as_tensor(np.ascontiguousarray(native))
    if not isinstance(array, Tensor):
        raise InputError(f"{name}: expected a tensor or a NumPy array, got {type(array).__name__}")
    if array.is_complex():
        raise InputError(
            f"{name}: expected one real floating-point tensor, complex numbers as two channels (B, 2, ...), "
            f"got {array.dtype} {tuple(array.shape)}; torch.view_as_real(y).movedim(-1, 1) makes them"
        )
    if not array.is_floating_point():
        raise InputError(
            f"{name}: expected one real floating-point tensor, got {array.dtype}; give y.float() and the "
            "noise level in the same units"
        )
    return array


def noise_of(operator: Any, sigma_y: Any) -> Any:
    """The noise level of the measurements: what was given, or that of the operator's noise model.

    Raises:
        InputError: neither, or noise that is not white Gaussian.
    """
    if sigma_y is not None:
        return sigma_y
    model = getattr(operator, "noise_model", None)
    if isinstance(model, GaussianNoise):
        return model.sigma
    if model is None or isinstance(model, ZeroNoise):
        raise InputError(
            "sigma_y: expected the noise level of the measurements, got None and an operator without a noise "
            "model (0 for exact measurements)"
        )
    raise InputError(
        f"sigma_y: expected an operator with GaussianNoise, or a level, got {type(model).__name__}: the "
        "samplers are for white Gaussian noise; a level that approximates it can be given as sigma_y"
    )


@dataclass
class Request:
    """Measurements as the samplers take them, and what a result should say of them.

    Attributes:
        operator: A, on the device that computes.
        y: (B, ...), there too.
        sigma_y: noise levels, there too where they are a tensor.
        about: subjects, scale, geometry and source of the `Reconstruction`, where they are known.
    """

    operator: Any
    y: Tensor
    sigma_y: Any
    about: dict[str, Any] = field(default_factory=dict)


def as_request(
    prior: Any, operator: Any, y: Any, sigma_y: Any, indices: Sequence[int] | None, what: str
) -> Request:
    """Operator, measurements and noise levels, from themselves or from measurements with all of them.

    Args:
        prior: tells one measurement of a foreign operator from a batch, by the shape of its images.
        operator: A; or, with nothing for ``y`` and ``sigma_y``, a measurement file, the path of one, or
            `MeasurementArrays`.
        y: (B, ...), or one measurement without the batch.
        sigma_y: levels; None: those of the operator's noise model.
        indices: which samples, of a file.
        what: who asks, for the messages.

    Raises:
        InputError: what is missing or not of its kind.
    """
    if isinstance(operator, (str, os.PathLike)):
        with MeasurementFile(operator) as file:
            return _from_file(file, y, sigma_y, indices, what)
    if isinstance(operator, (MeasurementFile, MeasurementFiles, MeasurementArrays)):
        return _from_file(operator, y, sigma_y, indices, what)
    if not isinstance(operator, LinearPhysics):
        raise InputError(
            f"{what}: expected a linear operator (deepinv LinearPhysics) or a measurement file, got "
            f"{type(operator).__name__}: these samplers are for linear measurements only"
        )
    if indices is not None:
        raise InputError(f"{what}: expected indices only with a measurement file, got an operator with them")
    if y is None:
        raise InputError(f"{what}: expected measurements y beside the operator, got None")
    y, sigma_y = as_real(y, "measurements"), noise_of(operator, sigma_y)
    if isinstance(sigma_y, np.ndarray):
        sigma_y = torch.as_tensor(sigma_y)
    if _unbatched(prior, operator, y):
        if isinstance(sigma_y, Tensor) and sigma_y.shape == y.shape and y.ndim > 1:
            sigma_y = sigma_y[None]
        y = y[None]
    return Request(operator, y, sigma_y)


def _from_file(
    file: MeasurementFile | MeasurementFiles | MeasurementArrays,
    y: Any,
    sigma_y: Any,
    indices: Sequence[int] | None,
    what: str,
) -> Request:
    if y is not None or sigma_y is not None:
        raise InputError(f"{what}: expected no y and sigma_y beside a measurement file, which has both")
    from ambient_sci.sampling.subset import about, check_indices

    chosen = check_indices(indices, len(file))
    rows = None if indices is None else list(chosen)
    known = about(file, chosen) if isinstance(file, MeasurementFile) else {"subjects": list(file.subjects)}
    return Request(file.operator(rows), file.measurements(rows), file.sigma(rows), known)


def _unbatched(prior: Any, operator: LinearPhysics, y: Tensor) -> bool:
    """Whether ``y`` is one measurement without a batch."""
    if isinstance(operator, RowMaskedOperator):
        return y.ndim == len(operator.measurement_size)
    if prior is None or y.ndim == 0:
        return False
    if _fits(operator, y, prior.shape):
        return False
    if _fits(operator, y[None], prior.shape):
        return True
    loose = (*prior.shape[:1], *[None] * (len(prior.shape) - 1))  # images of another size
    return not _fits(operator, y, loose) and _fits(operator, y[None], loose)


def _fits(operator: LinearPhysics, y: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether ``operator`` takes ``y`` for a batch of measurements of images of this shape; None: any
    size."""
    try:
        with torch.no_grad():
            image = operator.A_adjoint(y.to(device_of(operator) or y.device))
            same = image.ndim == 1 + len(shape) and len(image) == len(y)
            sizes = zip(image.shape[1:], shape, strict=True)
            return same and all(m in (None, n) for n, m in sizes) and operator.A(image).shape == y.shape
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError):
        return False


def moved(request: Request, device: torch.device) -> Request:
    """The same on another device, as copies."""
    operator = request.operator
    if device_of(operator) not in (None, device):
        if isinstance(operator, RowMaskedOperator):
            operator = operator.on_device(device)
        else:
            operator = copied(operator).to(device)
    sigma_y = request.sigma_y
    sigma_y = sigma_y.to(device) if isinstance(sigma_y, Tensor) else sigma_y
    return Request(operator, request.y.to(device), sigma_y, request.about)
