"""Classic reconstructions, by name, as results like those of the samplers."""

from __future__ import annotations

from typing import Any

from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.baselines import METHODS, least_risk, zero_filled
from ambient_sci.errors import InputError
from ambient_sci.sampling.result import Reconstruction

#: Settings of the solvers.
OPTIONS = ("weight", "tolerance", "max_iterations")


def reconstruct_classically(
    operator: LinearPhysics,
    y: Tensor,
    sigma_y: Tensor,
    name: str,
    levels: dict[str, Any],
    options: dict[str, Any],
) -> Reconstruction:
    """A classic reconstruction: a point estimate, one "sample" whose standard deviation says nothing.

    Args:
        operator: A.
        y: measurements, (B, ...).
        sigma_y: their noise levels, (B,).
        name: "zero-filled", "tv", or for MRI "sense" and "l1-wavelet".
        levels: settings of noise levels, which must all be None: there are none here.
        options: ``weight`` of the penalty in units of the image, one or one for each image, by default the
            one of least estimated risk for each image (`ambient_sci.baselines.least_risk`); ``tolerance`` and
            ``max_iterations`` of the solver.

    Returns:
        the image as ``mean`` and single sample; the report says which weight was taken and whether the solver
        converged.

    Raises:
        InputError: unknown options, settings without a meaning, or an operator that the method is not for.
    """
    if name in METHODS and sigma_y.ndim > 1:
        raise InputError(f"{name}: expected one noise level for each image, got levels that differ by entry")
    known = OPTIONS if name in METHODS else ()
    if unknown := [k for k in options if k not in known]:
        raise InputError(
            f"{name}: expected options among {', '.join(known) or 'none'}, got {', '.join(unknown)}"
        )
    if given := [k for k, value in levels.items() if value is not None]:
        raise InputError(
            f"{name}: {', '.join(given)} has no meaning here, a classic reconstruction has no noise levels"
        )
    report: dict[str, Any] = {"sampler": name, "samples": 1}
    if name not in METHODS:
        return Reconstruction.from_samples(zero_filled(operator, y)[None], report)
    settings = dict(options)
    weight = settings.pop("weight", None)
    if weight is None:
        found = least_risk(name, operator, y, sigma_y, **settings)
    else:
        found = METHODS[name](operator, y, weight, **settings)
    report |= {
        "weight_from": "least estimated risk" if weight is None else "the caller",
        **found.summary(),
    }
    if not found.converged:
        worst = max(found.primal_residual, found.dual_residual)
        report["notes"] = [
            f"{name} was stopped after {found.iterations} steps at a relative residual of {worst:.2g}"
        ]
    return Reconstruction.from_samples(found.image[None], report)
