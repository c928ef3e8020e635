r"""Reconstruction quality: PSNR, SSIM, NRMSE of magnitude images, and the table over people.

    magnitude     |x| = sqrt(Re^2 + Im^2) of complex images (two channels); real images are scored as they are
    PSNR(a, b)    10 log10( peak^2 / mean (a - b)^2 )            decibels
    NRMSE(a, b)   sqrt( mean (a - b)^2 / mean b^2 )              b is the reference
    SSIM(a, b)    Wang et al. 2004: Gaussian window of standard deviation 1.5 (11 x 11 pixels), K = (.01, .03)

``peak`` (also SSIM's data range) is the 99.9th percentile of the reference magnitude over the whole *volume*,
all slices of one person: a slice with little tissue is not graded on a scale of its own. Scores are averaged
over the slices of a person, then over people, and the spread is the standard deviation over people: slices of
one head are not independent repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError

PEAK_QUANTILE = 0.999
SSIM_WINDOW = 11
METRICS = ("psnr", "ssim", "nrmse")
_TITLES = {"psnr": "PSNR / dB", "ssim": "SSIM", "nrmse": "NRMSE"}
_DIGITS = {"psnr": 2, "ssim": 3, "nrmse": 3}


def magnitude(x: Tensor) -> Tensor:
    """|x|: complex images (B, 2, H, W) to (B, 1, H, W); real images (B, 1, H, W) by absolute value.

    Raises:
        InputError: neither one nor two channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 2):
        raise InputError(f"magnitude: expected images (B, 1, H, W) or (B, 2, H, W), got {tuple(x.shape)}")
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)


def graded(x: Tensor) -> Tensor:
    """What is scored and shown: the magnitude of a complex image (two channels), a real one as it is."""
    if x.ndim != 4:
        raise InputError(f"metric: expected images (B, C, H, W), got {tuple(x.shape)}")
    return magnitude(x) if x.shape[1] == 2 else x


def volume_peak(reference: Tensor) -> float:
    """The 99.9th percentile of the magnitude over all slices given."""
    values = graded(reference).abs().flatten().double().sort().values
    position = PEAK_QUANTILE * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return float(torch.lerp(values[low], values[high], position - low))


def psnr(estimate: Tensor, reference: Tensor, peak: float | Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the magnitude in dB, one number a slice, (B,).

    Args:
        estimate, reference: (B, 1|2, H, W), complex images as two channels.
        peak: value that counts as full scale, > 0: a number or one a slice, (B,).

    Raises:
        InputError: shapes that differ, or a peak that is not positive.
    """
    a, b, scale = _compared(estimate, reference, peak)
    return 10 * torch.log10(scale**2 / (a - b).square().mean((1, 2, 3)))


def nrmse(estimate: Tensor, reference: Tensor) -> Tensor:
    """Root mean squared error of the magnitude over the root mean square of the reference, (B,).

    Infinite where the reference is zero.
    """
    a, b, _ = _compared(estimate, reference, 1.0)
    return ((a - b).square().mean((1, 2, 3)) / b.square().mean((1, 2, 3))).sqrt()


def ssim(estimate: Tensor, reference: Tensor, peak: float | Tensor) -> Tensor:
    """Structural similarity of the magnitude, (B,), by torchmetrics; arguments as for `psnr`.

    Edges are continued by reflection, and the average is over all pixels.

    Raises:
        InputError: as `psnr`, or images smaller than the 11-pixel window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b, scale = _compared(estimate, reference, peak)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise InputError(f"SSIM: expected images of at least 11 x 11 pixels, got {tuple(a.shape[-2:])}")
    # SSIM depends on values / data range alone, so a peak per slice is a scaling per slice.
    scale = scale.reshape(-1, 1, 1, 1)
    scores = structural_similarity_index_measure(
        a / scale, b / scale, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
    )
    return torch.as_tensor(scores).reshape(-1)


def reconstruction_table(
    estimates: Mapping[str, Tensor],
    reference: Tensor,
    subjects: Sequence[str] | None = None,
    peaks: Mapping[str, float] | float | None = None,
) -> dict[str, Any]:
    """Scores of several reconstructions: per person, and mean and standard deviation over people.

    Args:
        estimates: method name to images (N, 1|2, H, W).
        reference: the truth, (N, 1|2, H, W).
        subjects: whose slice each one is, N names; None: all of one person.
        peaks: full scale of each person, or of all; default: the 99.9th percentile over that person's slices
            in ``reference``. Pass it where only part of a volume is scored.

    Returns:
        JSON-able: ``{"people": [...], "slices": {person: n}, "peak": {person: value}, "methods": {name:
        {metric: {"mean": ..., "std": ... (None for one person), "people": {person: value}}}}}``. SSIM is left
        out of images smaller than its window.

    Raises:
        InputError: shapes, numbers of slices or names that do not match.
    """
    names = [str(s) for s in subjects] if subjects is not None else ["all"] * len(reference)
    if len(names) != len(reference):
        raise InputError(
            f"reconstruction table: expected {len(reference)} subjects, one a slice, got {len(names)}"
        )
    people = list(dict.fromkeys(names))
    rows = {p: torch.tensor([i for i, n in enumerate(names) if n == p]) for p in people}
    peak = {p: _peak_of(p, peaks, reference[rows[p]]) for p in people}
    per_slice = torch.tensor([peak[n] for n in names], dtype=torch.float64)

    methods: dict[str, Any] = {}
    for name, estimate in estimates.items():
        scores = {"psnr": psnr(estimate, reference, per_slice), "nrmse": nrmse(estimate, reference)}
        if min(reference.shape[-2:]) >= SSIM_WINDOW:
            scores["ssim"] = ssim(estimate, reference, per_slice)
        methods[name] = {
            m: _over_people({p: float(s[rows[p]].mean()) for p in people}) for m, s in scores.items()
        }
    return {"people": people, "slices": {p: len(rows[p]) for p in people}, "peak": peak, "methods": methods}


def format_table(table: Mapping[str, Any], metrics: Sequence[str] = METRICS) -> str:
    """The table of `reconstruction_table` as text, one line a method."""
    scored = set().union(*table["methods"].values())
    metrics = [m for m in metrics if m in scored]
    people, several = table["people"], len(table["people"]) > 1
    header = ["method"] + [_TITLES[m] for m in metrics]
    if several:
        header += [f"{p} ({table['slices'][p]})" for p in people]
    lines = [header]
    for name, scores in table["methods"].items():
        line = [name] + [_cell(scores[m], _DIGITS[m]) for m in metrics]
        if several:
            line += [f"{scores['psnr']['people'][p]:.2f}" for p in people]
        lines.append(line)
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    text = [
        "  ".join(
            c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    count = f"{len(people)} people" if several else "1 person"
    note = (
        "mean +- standard deviation over people; PSNR of each person on the right (slices)"
        if several
        else "no spread over people"
    )
    return "\n".join([*text, f"{sum(table['slices'].values())} slices of {count}; {note}."])


def _cell(score: Mapping[str, Any], digits: int) -> str:
    spread = "" if score["std"] is None else f" +- {score['std']:.{digits}f}"
    return f"{score['mean']:.{digits}f}{spread}"


def _over_people(values: dict[str, float]) -> dict[str, Any]:
    v = torch.tensor(list(values.values()), dtype=torch.float64)
    return {"mean": float(v.mean()), "std": float(v.std()) if len(v) > 1 else None, "people": values}


def _peak_of(person: str, peaks: Mapping[str, float] | float | None, images: Tensor) -> float:
    if peaks is None:
        return volume_peak(images)
    if isinstance(peaks, Mapping):
        if person not in peaks:
            raise InputError(
                f"reconstruction table: expected a peak for {person!r}, got peaks for {sorted(peaks)}"
            )
        return float(peaks[person])
    return float(peaks)


def _compared(estimate: Tensor, reference: Tensor, peak: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes in float64 and a positive peak, (B,) or (1,)."""
    a, b = graded(estimate).double(), graded(reference).double()
    if a.shape != b.shape:
        raise InputError(
            f"metric: expected an estimate like the reference {tuple(b.shape)}, got {tuple(a.shape)}"
        )
    scale = torch.as_tensor(peak, dtype=torch.float64, device=a.device).reshape(-1)
    if len(scale) not in (1, len(a)) or not bool((scale > 0).all()):
        raise InputError(
            f"metric: expected one positive peak, or one a slice ({len(a)}), got {scale.tolist()}"
        )
    return a, b, scale
