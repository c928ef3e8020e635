r"""The operator-aware Tweedie loss: supervise E[x_0 | y~, B] with nothing but a noisy, incomplete measurement
y.

    y  = A x_0 + sigma_y n                   what was measured
    y~ = y_B + sqrt(sigma^2 - sigma_y^2) z   what the network sees: kept rows B, noise added, sigma >= sigma_y
    h  = D(A_B^H y~, sigma, B)

    kept rows:       E[y_B | y~]  = c A_B h + (1 - c) y~,    c = 1 - sigma_y^2 / sigma^2     (Tweedie, twice)
    held-out rows:   E[y_H | y~]  = A_H h                                     (their noise is independent)

    loss = lambda(sigma) / n  [ omega(c) ||c A_B h + (1 - c) y~ - y_B||^2  +  sum_H w_i (A_H h - y_H)_i^2 ]

n is the number of entries of an image, w_i = 1 / P(A_i = 1 | B) the inverse probability that a row outside B
was measured. With omega = c^-2 and T^H T = I this is an unbiased estimate of lambda E||h - x_0||^2 / n, up to
a constant that does not depend on h. The default omega = 1/c weights each kept row by the inverse variance of
its target and has the same minimiser.

lambda is the inverse of the error that the best scaling leaves (`Prior.loss_weight`). Where it is one number
for all rows and most are missing, it does not grow as sigma falls, and nearly nothing teaches the network to
denoise what it is shown. Where T is square and the same for every sample (masks, one coil without a map),
rows can be weighed apart without moving the minimiser: kept rows by 1/sigma^2 + 1/d^2, held-out rows by
1/d^2. This is done for networks whose preconditioning tells the two apart (``Prior.separates_rows``). With
coil maps, which vary and which the network is not shown, it would not be exact, and lambda stays one number.

Levels may differ from sample to sample, and from entry to entry of y: c, omega and lambda then do, inside the
sum. A total level sigma that differs by entry needs T = I, since the network then sees noise of these very
levels.

Special cases, exactly: B = A = I is the ambient denoising score matching of Daras et al., "Consistent
Diffusion Meets Tweedie" (2024); sigma_y = 0 is "Ambient Diffusion" (Daras et al. 2023); both together are
plain denoising score matching. With sigma_y = sigma_n where sigma >= sigma_n and 0 elsewhere, it is clean
images below sigma_n and noisy ones above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.noise import draw_noise, expand
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.operators.split import Split
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.priors.given import KeptRows
from ambient_sci.tweedie import contraction

Weighting = Literal["inverse-variance", "unbiased", "unit"]


def kept_weight(c: Tensor, weighting: Weighting, c_min: float) -> Tensor:
    """omega(c) on kept rows: "inverse-variance" 1/c, "unbiased" 1/c^2, "unit" 1; c clamped from below at
    ``c_min``.

    Towards sigma = sigma_y the target carries less and less information and both inverse powers grow without
    bound.
    """
    clamped = c.clamp(min=c_min)
    if weighting == "inverse-variance":
        return 1 / clamped
    if weighting == "unbiased":
        return 1 / clamped**2
    if weighting == "unit":
        return torch.ones_like(c)
    raise InputError(f"weighting: expected inverse-variance, unbiased or unit, got {weighting!r}")


@dataclass(frozen=True)
class AmbientStep:
    """What one evaluation of the loss computed; the consistency loss reuses it.

    Attributes:
        loss: (B,).
        y_t: y~, measurement space (values outside ``kept`` have no meaning).
        denoised: h, (B, C, H, W), with its graph.
        kept: operator of the kept rows B.
    """

    loss: Tensor
    y_t: Tensor
    denoised: Tensor
    kept: RowMaskedOperator


def denoise_measurement(
    prior: Prior, kept: RowMaskedOperator, y_t: Tensor, sigma: float | Tensor, given: Any = None
) -> Tensor:
    """h = D(A_B^H y~, sigma, B): the one place where a prior meets a measurement.

    Args:
        prior: mask-conditional where rows are missing from B.
        kept: B.
        y_t: y~, (B, ...) in measurement space.
        sigma: its noise level.
        given: what the denoiser is told besides, if it takes anything.

    Raises:
        ConditioningError: an unconditional prior, and rows missing from B or A^H A != I; or a
            mask-conditional one and something else given.
    """
    x = kept.A_adjoint(y_t)
    if prior.takes is KeptRows:
        if given is not None:
            raise ConditioningError(
                "expected a mask-conditional prior to be given its kept rows alone, got "
                f"{type(given).__name__}"
            )
        return prior(x, sigma, KeptRows(kept))
    if not kept.complete:
        raise ConditioningError(
            "expected a mask-conditional prior for incomplete measurements (rows missing or held out), got "
            "an unconditional "
            "one: E[x0 | kept rows] depends on which rows were kept"
        )
    if not kept.isometry:
        raise ConditioningError(
            f"expected an operator with A^H A = I for an unconditional prior, got a {kept.name} operator of "
            "another scale: "
            "its combined image is not x0 plus white noise. Normalise the coil maps (normalise_maps) over "
            "the whole image"
        )
    return prior(x, sigma) if given is None else prior(x, sigma, given)


def weighted_error(
    prior: Prior,
    split: Split,
    denoised: Tensor,
    level: Tensor,
    on_kept: Tensor,
    on_held_out: Tensor | None = None,
) -> Tensor:
    """lambda / n [sum_B e_i + sum_H w_i e_i] of squared errors e of rows, (B,): how rows are weighed,
    whatever their errors.

    Args:
        prior: says lambda, and whether it tells kept and missing rows apart.
        split: B, H and w.
        denoised: h, for the number n of its entries.
        level: sigma as it broadcasts over a measurement.
        on_kept: e of kept rows, measurement space; values elsewhere are ignored.
        on_held_out: e of held-out rows; needed where rows are held out.
    """
    operator = split.operator
    # Coil maps, a further axis of a measurement, may differ by sample even where they are square (one coil's
    # phase).
    one_transform = operator.square and operator.measurement_size == operator.img_size
    apart = split.holds_out and prior.separates_rows and one_transform
    weight = prior.loss_weight(level, 1.0 if apart else expand(split.kept.kept_fraction.to(level), on_kept))
    if on_held_out is not None:
        if apart:  # weight is that of kept rows; the others' is 1 / d^2
            on_held_out = on_held_out / (weight * prior.data_std**2)
        squared = torch.where(split.kept.mask > 0, on_kept, on_held_out) * split.weights
    else:
        squared = on_kept if operator.name == "identity" else on_kept * split.weights
    if weight.numel() > len(squared):  # levels of entries
        return (weight * squared).flatten(1).sum(1) / denoised[0].numel()
    return weight.flatten() * squared.flatten(1).sum(1) / denoised[0].numel()


def ambient_step(
    prior: Prior,
    split: Split,
    y: Tensor,
    sigma_y: float | Tensor,
    sigma: float | Tensor,
    *,
    given: Any = None,
    generator: torch.Generator | None = None,
    weighting: Weighting = "inverse-variance",
    c_min: float = 0.05,
) -> AmbientStep:
    """`ambient` for rows that are divided already, with what it computed on the way. Nothing is checked here.

    Args:
        prior: see `ambient`.
        split: which rows the network is shown and which it is scored on, see `RowMaskedOperator.split`.
        y: measurements.
        sigma_y, sigma: levels, float, (B,) or of the shape of ``y``, with 0 <= sigma_y <= sigma and sigma >
            0.
        given: what the denoiser is told besides, see `denoise_measurement`.
        generator: source of the noise.
        weighting, c_min: see `kept_weight`.
    """
    own, level = expand(sigma_y, y), expand(sigma, y)
    y_t = y + (level**2 - own**2).clamp(min=0).sqrt() * draw_noise(y, generator)
    shown = level if level.numel() > len(y) else level.flatten().expand(len(y))
    h = denoise_measurement(prior, split.kept, y_t, shown, given)
    predicted, c = split.operator.transform(h), 1 - (own / level) ** 2
    on_kept = kept_weight(c, weighting, c_min) * (c * predicted + (1 - c) * y_t - y).square()
    on_held_out = (predicted - y).square() if split.holds_out else None
    return AmbientStep(weighted_error(prior, split, h, level, on_kept, on_held_out), y_t, h, split.kept)


def ambient(
    prior: Prior,
    operator: RowMaskedOperator,
    y: Tensor,
    sigma_y: float | Tensor,
    sigma: float | Tensor,
    *,
    keep: float = 1.0,
    given: Any = None,
    generator: torch.Generator | None = None,
    weighting: Weighting = "inverse-variance",
    c_min: float = 0.05,
) -> Tensor:
    """Operator-aware Tweedie loss of each sample, (B,): one code path for noise, masking and MRI (equations
    above).

    Draws the split, then calls `ambient_step`.

    Args:
        prior: unconditional if every row is measured and kept, mask-conditional otherwise.
        operator: A, one mask per sample or one for all. If it knows its mask design, held-out weights are
            exact.
        y: measurements.
        sigma_y: their noise level per real channel, float, (B,) or of the shape of ``y``; 0 is allowed.
        sigma: total noise level of the kept rows after noise is added, float or (B,), at least sigma_y; of
            the shape of ``y`` for identity and masking operators, and a prior that takes such levels.
        keep: fraction of the measured rows to keep, in (0, 1]; 1 for identity noise. Below 1 *every* row must
            be held out at times.
        given: what the denoiser is told besides its input and level, if it takes anything.
        generator: source of the split and of the noise.
        weighting: omega(c), see `kept_weight`.
        c_min: lower clamp of c in omega.

    Raises:
        InputError: sigma < sigma_y, keep outside (0, 1], shapes that do not fit.
        ConditioningError: an unconditional prior and incomplete rows, or coil maps that are not normalised.
        IdentifiabilityError: keep < 1 and a design that leaves rows unsupervised.
    """
    operator._check_measurement(y)
    contraction(sigma, sigma_y, y)
    if expand(sigma, y).numel() > len(y) and operator.name not in ("identity", "masking"):
        raise InputError(
            f"noise levels: expected one sigma per sample for a {operator.name} operator, got one per entry: "
            "its transform would mix them"
        )
    if keep < 1 and operator.design is not None:
        operator.design.check_trainable(keep)
    split = operator.split(keep=keep, generator=generator, num=len(y))
    options: Any = {"given": given, "generator": generator, "weighting": weighting, "c_min": c_min}
    return ambient_step(prior, split, y, sigma_y, sigma, **options).loss


def denoising(
    prior: Prior,
    x0: Tensor,
    sigma: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Plain denoising score matching on clean images, lambda(sigma) ||D(x_0 + sigma z, sigma) - x_0||^2 / n,
    (B,).

    Args:
        prior: an unconditional prior.
        x0: clean images, (B, C, H, W).
        sigma: noise level, float, (B,) or, for a prior that takes such levels, of the shape of ``x0``.
        generator: source of the noise.

    Raises:
        ConditioningError: a mask-conditional prior.
    """
    require_unconditional(prior, "the denoising loss")
    level = expand(sigma, x0)
    squared = (prior(x0 + level * draw_noise(x0, generator), sigma) - x0).square()
    return (prior.loss_weight(level) * squared).flatten(1).mean(1)
