r"""Can these masks determine a prior at all?

With a square transform, masks reveal only the joint law of rows that are measured together: a Gaussian prior
is identified exactly if every *pair* of rows is measured together with positive probability; entry (i, j) of
its covariance is then known from the fraction of scans in which both were measured. With several coils the
transform is tall, and even one fixed mask can identify everything. In both cases the measured second moments
are Sigma -> {A_m Sigma A_m^H}, a linear map, injective exactly if

    G: Sigma -> mean over m of  A_m^H A_m Sigma A_m^H A_m

(self-adjoint, positive semi-definite) has no zero eigenvalue. The smallest one, relative to the largest, is
reported.

Lines decouple the readout positions, so that G is small. Masks of single points with several coils do not,
and G is too large for its eigenvalues. There the pairs of rows decide, as for one coil. That is sufficient:
T^H T = I, so the covariance of T x gives that of x = T^H T x. It is not necessary, because coils also see the
rows around the measured ones: a verdict "not identified" is then left open, and the report says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.operators.make_design import guess_layout


@dataclass(frozen=True)
class IdentifiabilityReport:
    """What a set of masks can determine.

    Attributes:
        identified: whether the covariance of a Gaussian prior is determined.
        conditioning: smallest over largest eigenvalue of G; its inverse amplifies the noise of the worst
            direction.
        never_measured: number of units (pixels, lines) that no mask measures.
        never_together: fraction of pairs of units that no mask measures together.
        units: number of units.   masks: number of different masks.   coils: receiver coils.
        text: the verdict in words.
        necessary: whether the criterion is necessary as well as sufficient; if not, ``identified`` = False
            means "not shown to be".
    """

    identified: bool
    conditioning: float
    never_measured: int
    never_together: float
    units: int
    masks: int
    coils: int
    text: str
    necessary: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def identifiability(
    operator: RowMaskedOperator, *, max_units: int = 2048, threshold: float = 1e-3
) -> IdentifiabilityReport:
    """Report on the masks of an operator that holds one per scan (its batch is the data set, or a sample of
    it).

    Args:
        operator: masks of all scans; coil maps of the first are used.
        max_units: above this many units, a regular subset of that size is looked at.
        threshold: conditioning below which the prior counts as not identified.
    """
    mask = operator.network_mask.cpu()
    layout = guess_layout(mask) if operator.name == "mri" else "pixels"
    plane = {"columns": mask[:, :, 0], "rows": mask[..., 0]}.get(layout, mask)
    units, counts = torch.unique(plane.flatten(1), dim=0, return_counts=True)
    units, share = units.double(), counts.double() / counts.sum()
    frequency = plane.flatten(1).double().mean(0)
    if units.shape[1] > max_units:
        units = units[:, torch.linspace(0, units.shape[1] - 1, max_units).long()]
    together = (units.T * share) @ units
    coils = getattr(operator, "coils", 1)
    if coils > 1 and layout in ("columns", "rows"):
        conditioning = _multi_coil_conditioning(operator, units, share, layout)
    else:
        conditioning = float(together.min() / together.max())
    found = {
        "conditioning": conditioning,
        "never_measured": int((frequency == 0).sum()),
        "never_together": float((together == 0).double().mean()),
        "units": int(frequency.numel()),
        "masks": int(units.shape[0]),
        "coils": coils,
        "necessary": coils == 1 or layout in ("columns", "rows"),
    }
    identified = conditioning > threshold
    return IdentifiabilityReport(identified=identified, text=_verdict(identified, found, layout), **found)


def _multi_coil_conditioning(
    operator: RowMaskedOperator, units: Tensor, share: Tensor, layout: str, max_masks: int = 64
) -> float:
    """Extreme eigenvalues of G for one readout position: fully sampled readouts decouple, so lines of the
    image are separate problems.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    maps = operator.coil_maps[0].cpu().numpy()
    line = maps[:, maps.shape[1] // 2] if layout == "columns" else maps[:, :, maps.shape[2] // 2]
    inside = np.abs(line).sum(0) > 0  # outside the support of the maps there is nothing to identify
    n = line.shape[1]
    centred = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(np.eye(n), axes=0), axis=0, norm="ortho"), axes=0)
    encode = np.concatenate([centred * s for s in line])[:, inside]
    normals = []
    commonest = share.argsort(descending=True)[:max_masks]
    for m in units[commonest].numpy():
        rows = encode[np.tile(m > 0, len(line))]
        normals.append(rows.conj().T @ rows)
    p = np.stack(normals)
    size = p.shape[1] ** 2
    weight = (share[commonest] / share[commonest].sum()).numpy()

    def apply(v: np.ndarray) -> np.ndarray:
        return np.tensordot(weight, p @ v.reshape(p.shape[1], -1) @ p, 1).ravel()

    start = np.random.default_rng(0).standard_normal(size).astype(complex)
    g = LinearOperator((size, size), matvec=apply, dtype=complex)
    high = float(eigsh(g, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)[0])
    # The smallest eigenvalue as the largest of (high - G): Lanczos finds outer eigenvalues quickly, inner
    # ones hardly.
    flipped = LinearOperator((size, size), matvec=lambda v: 1.01 * high * v - apply(v), dtype=complex)
    gap = float(eigsh(flipped, k=1, which="LA", v0=start, tol=1e-5, return_eigenvectors=False)[0])
    return max(1.01 * high - gap, 0.0) / high


def _verdict(identified: bool, found: dict[str, Any], layout: str) -> str:
    if found["never_together"] == 0 and found["never_measured"] == 0 and found["conditioning"] >= 0.999:
        return "everything is measured in every scan: the prior is identified"
    open_ = not identified and not found["necessary"]
    no = "is not shown to be identified" if open_ else "is NOT identified"
    head = f"a Gaussian prior {'is identified' if identified else no}"
    parts = [f"{head} (conditioning {found['conditioning']:.2g})"]
    if found["never_measured"]:
        parts.append(f"{found['never_measured']} of {found['units']} {layout} are never measured")
    if found["never_together"] and not found["never_measured"]:
        parts.append(
            f"{100 * found['never_together']:.1f} % of pairs of {layout} are never measured together"
        )
    if open_:
        parts.append(
            f"what {found['coils']} coils resolve beyond that is not looked at for masks of single points"
        )
    if identified and found["coils"] > 1 and found["never_together"]:
        parts.append(f"{found['coils']} coils resolve what the masks leave out")
    return "; ".join(parts)
