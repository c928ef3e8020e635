"""The border of `reconstruct`: what a caller gave is checked here, once, and named if it is wrong."""

from __future__ import annotations

import inspect
import math
from numbers import Integral
from typing import Any

import numpy as np
import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.baselines import BASELINES
from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.priors.base import Prior
from ambient_sci.sampling.problem import PosteriorSampler
from ambient_sci.sampling.samplers import POSTERIOR_SAMPLERS

COUNTS = frozenset({"max_iterations", "root_iterations", "particles", "inner_steps"})
POSITIVE = frozenset({"tolerance", "data_std", "coupling", "resample_below"})


def check_sampler(
    name: str, samples: int, batch_size: int | None, options: dict[str, Any]
) -> PosteriorSampler:
    """The sampler of this name, if the numbers make sense and it has these options."""
    if name not in POSTERIOR_SAMPLERS:
        raise InputError(
            f"sampler: expected one of {', '.join(POSTERIOR_SAMPLERS)}, got {name!r}; a classic "
            f"reconstruction: {', '.join(BASELINES)}"
        )
    for what, value in (("samples", samples), ("batch_size", batch_size)):
        if not (what == "batch_size" and value is None) and not (isinstance(value, Integral) and value >= 1):
            raise InputError(f"{name}: expected {what} to be an integer >= 1, got {value!r}")
    known = sampler_options(name)
    unknown = [k for k in options if k not in known]
    if unknown:
        raise InputError(
            f"sampler {name}: expected options among {', '.join(known) or 'none'}, got {', '.join(unknown)}"
        )
    for option, value in options.items():
        if option in COUNTS and not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name}: expected {option} to be an integer >= 1, got {value}")
        if option in POSITIVE and value is not None and not 0 < value < math.inf:
            raise InputError(f"{name}: expected {option} to be a number > 0, got {value}")
    return POSTERIOR_SAMPLERS[name]


def sampler_options(name: str) -> list[str]:
    """Names of the settings that a sampler takes: the keyword arguments of its function and of its posterior
    denoiser.
    """
    sampler = POSTERIOR_SAMPLERS[name]
    functions = [sampler.run, *([sampler.denoiser] if sampler.denoiser is not None else [])]
    return [
        p.name
        for function in functions
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]


def check_measurements(
    prior: Prior | None, operator: Any, y: Any, sigma_y: Any, name: str
) -> tuple[Tensor, Tensor]:
    """Measurements, in float32 or better, and their noise levels, if measurements, operator and prior fit
    each other."""
    if not isinstance(operator, LinearPhysics):
        raise InputError(
            f"{name}: expected a linear operator (deepinv LinearPhysics), got {type(operator).__name__}: "
            "these samplers are for linear measurements only"
        )
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise InputError(f"measurements: expected one real floating-point tensor, got {type(y).__name__}")
    if y.ndim < 1 or len(y) == 0:
        raise InputError(f"measurements: expected (B, ...) of at least one image, got {tuple(y.shape)}")
    if not bool(torch.isfinite(y).all()):
        raise InputError("measurements: expected finite values, got NaN or infinity")
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    levels = check_noise(sigma_y, y)
    try:
        shape = tuple(operator.A_adjoint(y).shape)
    except InputError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"measurements {tuple(y.shape)} do not fit the operator {type(operator).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if not isinstance(operator, RowMaskedOperator):
        check_linear(operator, y, shape)
    if prior is not None and shape[1:] != tuple(prior.shape):
        raise InputError(
            f"operator: expected images of the prior's shape {tuple(prior.shape)}, got {shape[1:]}"
        )
    return y, levels


def check_linear(operator: LinearPhysics, y: Tensor, shape: tuple[int, ...]) -> None:
    """One look at a foreign physics, with random images: is A linear, and is its A_adjoint the adjoint of A?

        A(2 u - v) = 2 A u - A v,        <A u, w> = <u, A^H w>

    Every sampler here relies on both; with an adjoint that is only nearly one, posteriors come out wrong and
    no residual shows it.

    Raises:
        InputError: either does not hold to a thousandth.
    """
    name = type(operator).__name__
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(y) for _ in range(2))
    w = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    with torch.no_grad():
        image, other, both = operator.A(u), operator.A(v), operator.A(2 * u - v)
        back = operator.A_adjoint(w)
    if image.shape != y.shape:
        raise InputError(
            f"operator {name}: expected A of images {shape} to have the shape of the measurements "
            f"{tuple(y.shape)}, "
            f"got {tuple(image.shape)}"
        )
    size = float(image.norm() + other.norm()) or 1.0
    if not float((both - 2 * image + other).norm()) < 1e-3 * size:
        raise InputError(
            f"operator {name}: expected a linear A, got one with A(2 u - v) other than 2 A u - A v"
        )
    ahead, behind = float((image * w).sum(dtype=torch.float64)), float((u * back).sum(dtype=torch.float64))
    scale = float(image.norm() * w.norm() + u.norm() * back.norm()) or 1.0
    # Inner products of random vectors are some 1 / sqrt(n) of the product of their norms.
    if not abs(ahead - behind) < 1e-3 * scale / max(y.numel(), u.numel()) ** 0.5:
        raise InputError(
            f"operator {name}: expected A_adjoint to be the adjoint of A, got <A u, w> = {ahead:.5g} and <u, "
            f"A_adjoint w> = {behind:.5g}"
        )


def check_noise(sigma_y: Any, y: Tensor) -> Tensor:
    """Noise levels of ``y``, (B,) or of its shape, in its type and on its device.

    Raises:
        InputError: no level, or not one value, one per image or one per entry, finite and >= 0.
    """
    if sigma_y is None:
        raise InputError("sigma_y: expected the noise level of the measurements, got None")
    try:
        levels = sigma_y if isinstance(sigma_y, Tensor) else torch.from_numpy(np.array(sigma_y))
    except (TypeError, ValueError):
        raise InputError(f"sigma_y: expected numbers, got {type(sigma_y).__name__}") from None
    fits = levels.shape == y.shape or levels.numel() in (1, len(y))
    if levels.is_complex() or not fits or not bool((torch.isfinite(levels) & (levels >= 0)).all()):
        raise InputError(
            f"sigma_y: expected real values >= 0, one, one per image ({len(y)}) or one per entry "
            f"{tuple(y.shape)}, got "
            f"{levels.flatten()[:4].tolist()}{' ...' if levels.numel() > 4 else ''} of shape "
            f"{tuple(levels.shape)}"
        )
    levels = levels.to(y)
    return levels.flatten().expand(len(y)).contiguous() if levels.numel() in (1, len(y)) else levels


def check_numbers(x: Tensor, report: dict[str, Any], name: str) -> None:
    """Raise InputError for samples that are no numbers, or that came about without the measurements because
    these overflowed.
    """
    if not bool(torch.isfinite(x).all()):
        raise InputError(
            f"{name}: expected finite samples, got NaN or infinity: the prior's weights are damaged or "
            "diverged, "
            "or the levels overflow"
        )
    if report.get("worst_relative_residual") == math.inf:
        raise InputError(
            f"{name}: expected measurements and a denoiser whose squares are finite in {x.dtype}, got a "
            "solve that "
            "overflowed; scale the data"
        )
