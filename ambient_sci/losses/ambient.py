r"""The operator-aware Tweedie loss: supervise E[x_0 | y~, B] with nothing but a noisy, incomplete measurement y.

    y  = A x_0 + sigma_y n                   what was measured
    y~ = y_B + sqrt(sigma^2 - sigma_y^2) z   what the network sees: kept rows B with noise added, level sigma >= sigma_y
    h  = D(A_B^H y~, sigma, B)

    kept rows:       E[y_B | y~]  = c A_B h + (1 - c) y~,    c = 1 - sigma_y^2 / sigma^2     (Tweedie, twice)
    held-out rows:   E[y_H | y~]  = A_H h                                                    (their noise is independent)

    loss = lambda(sigma) / n  [ omega(c) ||c A_B h + (1 - c) y~ - y_B||^2  +  sum_H w_i (A_H h - y_H)_i^2 ]

n is the number of entries of an image, w_i = 1 / P(A_i = 1 | B) the inverse probability that a row outside B was measured. With
omega = c^-2 and T^H T = I this is an unbiased estimate of lambda E||h - x_0||^2 / n, up to a constant that does not depend on h. The
default omega = 1/c weights each kept row by the inverse variance of its target and has the same minimiser.

lambda is the inverse of the error that the best scaling leaves (`Prior.loss_weight`). Where it is one number for all rows and most are missing, it does
not grow as sigma falls, and nearly nothing teaches the network to denoise what it is shown. Where T is square and the same for every sample
(masks, one coil without a map), rows can be weighed apart without moving the minimiser: kept rows by 1/sigma^2 + 1/d^2, held-out rows by 1/d^2. This is done
for networks whose preconditioning tells the two apart (``Prior.separates_rows``). With coil maps, which vary and which the network is not shown, it would
not be exact, and lambda stays one number.

Special cases, exactly: B = A = I is the ambient denoising score matching of Daras et al., "Consistent Diffusion Meets Tweedie"
(2024); sigma_y = 0 is "Ambient Diffusion" (Daras et al. 2023); both together are plain denoising score matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.noise import draw_noise, expand
from ambient_sci.operators.base import RowMaskedOperator, Split
from ambient_sci.operators.designs import FixedBudget, Independent
from ambient_sci.priors.base import Prior, require_unconditional
from ambient_sci.priors.given import KeptRows
from ambient_sci.tweedie import contraction

Weighting = Literal["inverse-variance", "unbiased", "unit"]
HeldOutWeights = Literal["exact", "unit"]


def kept_weight(c: Tensor, weighting: Weighting, c_min: float) -> Tensor:
    """omega(c) on kept rows: "inverse-variance" 1/c, "unbiased" 1/c^2, "unit" 1; c clamped from below at ``c_min``.

    Towards sigma = sigma_y the target carries less and less information and both inverse powers grow without bound.
    """
    clamped = c.clamp(min=c_min)
    if weighting == "inverse-variance":
        return 1 / clamped
    if weighting == "unbiased":
        return 1 / clamped**2
    if weighting == "unit":
        return torch.ones_like(c)
    raise InputError(f"weighting: expected inverse-variance, unbiased or unit, got {weighting!r}")


def calibration_rows(operator: RowMaskedOperator) -> Tensor:
    """1 on the rows that every mask of the operator's design measures (calibration lines), 0 elsewhere; broadcasts to its mask.

    Raises:
        InputError: no design, or one that does not measure anything for certain.
    """
    design = operator.design
    always = None
    if isinstance(design, FixedBudget):
        always = design.always
    elif isinstance(design, Independent):
        always = design.p == 1
    if design is None or always is None or not bool(always.any()):
        name = None if design is None else design.name
        raise InputError(
            f"hold_out_calibration=False: expected a mask design with rows that are always measured, got {name!r}"
        )
    return operator._rows_from_network_mask(design.to_mask(always[None].to(operator.mask)))


def keep_calibration(operator: RowMaskedOperator, split: Split) -> Split:
    """``split`` with the calibration rows moved to the kept ones; the other rows' weights do not depend on them."""
    always = calibration_rows(operator)
    kept, held = split.kept, split.held_out
    return Split(
        kept.with_mask(kept.mask + held.mask * always, design=kept.design),
        held.with_mask(held.mask * (1 - always), design=held.design),
        split.weights,
    )


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


def estimate(prior: Prior, kept: RowMaskedOperator, y_t: Tensor, sigma: float | Tensor) -> Tensor:
    """h = D(A_B^H y~, sigma, B): the one place where a prior meets a measurement.

    Raises:
        ConditioningError: an unconditional prior, and rows missing from B or A^H A != I.
    """
    x = kept.A_adjoint(y_t)
    if prior.takes is KeptRows:
        return prior(x, sigma, KeptRows(kept))
    if not kept.complete:
        raise ConditioningError(
            "expected a mask-conditional prior for incomplete measurements (rows missing or held out), got an unconditional one: "
            "E[x0 | kept rows] depends on which rows were kept"
        )
    if not kept.isometry:
        raise ConditioningError(
            f"expected an operator with A^H A = I for an unconditional prior, got a {kept.name} operator of another scale: its combined "
            "image is not x0 plus white noise. Normalise the coil maps (normalise_maps) over the whole image"
        )
    return prior(x, sigma)


def ambient_step(
    prior: Prior,
    operator: RowMaskedOperator,
    y: Tensor,
    sigma_y: float | Tensor,
    sigma: float | Tensor,
    *,
    keep: float = 1.0,
    generator: torch.Generator | None = None,
    weighting: Weighting = "inverse-variance",
    c_min: float = 0.05,
    tweedie: bool = True,
    held_out_weights: HeldOutWeights = "exact",
    hold_out_calibration: bool = True,
) -> AmbientStep:
    """`ambient`, with what it computed on the way.

    ``tweedie=False`` leaves the correction out (c = 1 in the target): the baseline that treats noisy data as clean.
    """
    if held_out_weights not in ("exact", "unit"):
        raise InputError(f"held_out_weights: expected exact or unit, got {held_out_weights!r}")
    operator._check_measurement(y)
    if keep < 1:
        if operator.design is not None:
            operator.design.check_trainable(keep)
        # One mask for the whole batch is still split anew for each sample.
        rows = operator.mask.expand(y.shape[0], *operator.mask.shape[1:])
        operator = operator.with_mask(rows, design=operator.design)
    split = operator.split(keep=keep, generator=generator)
    if keep < 1 and not hold_out_calibration:
        split = keep_calibration(operator, split)
    added = (expand(sigma, y) ** 2 - expand(sigma_y, y) ** 2).clamp(min=0).sqrt()
    c = contraction(sigma, sigma_y, y)
    if not tweedie:
        c = torch.ones_like(c)
    y_t = y + added * draw_noise(y, generator)
    h = estimate(prior, split.kept, y_t, sigma)

    predicted = operator.transform(h)
    on_kept = kept_weight(c, weighting, c_min) * (c * predicted + (1 - c) * y_t - y).square()
    level = expand(sigma, h).flatten()
    # Coil maps, which are a measurement's axis more, may differ from sample to sample even where they are square (one coil's phase).
    one_transform = operator.square and operator.measurement_size == operator.img_size
    apart = keep < 1 and prior.separates_rows and one_transform
    weight = prior.loss_weight(level, 1.0 if apart else split.kept.kept_fraction.to(h))
    if keep < 1:
        # Both terms share the rows' weights: 1 on kept, 1 / P on held out, 0 where nothing was measured.
        rows = split.weights if held_out_weights == "exact" else operator.mask
        on_held_out = (predicted - y).square()
        if apart:  # weight is that of kept rows; the others' is 1 / d^2
            on_held_out = on_held_out / expand(weight * prior.data_std**2, y)
        squared = torch.where(split.kept.mask > 0, on_kept, on_held_out) * rows
    else:
        squared = on_kept if operator.name == "identity" else on_kept * operator.mask
    return AmbientStep(weight * squared.flatten(1).sum(1) / h[0].numel(), y_t, h, split.kept)


def ambient(
    prior: Prior,
    operator: RowMaskedOperator,
    y: Tensor,
    sigma_y: float | Tensor,
    sigma: float | Tensor,
    *,
    keep: float = 1.0,
    generator: torch.Generator | None = None,
    weighting: Weighting = "inverse-variance",
    c_min: float = 0.05,
    tweedie: bool = True,
    held_out_weights: HeldOutWeights = "exact",
    hold_out_calibration: bool = True,
) -> Tensor:
    """Operator-aware Tweedie loss of each sample, (B,): one code path for noise, masking and MRI (equations above).

    Args:
        prior: unconditional if every row is measured and kept, mask-conditional otherwise.
        operator: A, one mask per sample or one for all. If it knows its mask design, held-out weights are exact.
        y: measurements.
        sigma_y: their noise level per real channel, float or (B,); 0 is allowed.
        sigma: total noise level of the kept rows after noise is added, float or (B,), at least sigma_y.
        keep: fraction of the measured rows to keep, in (0, 1]; 1 for identity noise. Below 1 *every* row must be held out at times.
        generator: source of the split and of the noise.
        weighting: omega(c), see `kept_weight`.
        c_min: lower clamp of c in omega.
        tweedie: False drops the correction, for ablations: kept rows are then fitted noise and all.
        held_out_weights: "exact" w_i = 1 / P(A_i = 1 | B); "unit" w_i = 1, for ablations: rows that are measured rarely then count
            rarely. Where the network sees all that matters (one transform T) the minimiser is the same; where coil maps vary it is not.
        hold_out_calibration: False always keeps the rows that every mask measures, for ablations: at sigma = sigma_y, where estimates
            are made, nothing then supervises them.

    Raises:
        InputError: sigma < sigma_y, keep outside (0, 1], shapes that do not fit, calibration rows asked for and not there.
        ConditioningError: an unconditional prior and incomplete rows, or coil maps that are not normalised.
        IdentifiabilityError: keep < 1 and a design that leaves rows unsupervised.
    """
    return ambient_step(
        prior,
        operator,
        y,
        sigma_y,
        sigma,
        keep=keep,
        generator=generator,
        weighting=weighting,
        c_min=c_min,
        tweedie=tweedie,
        held_out_weights=held_out_weights,
        hold_out_calibration=hold_out_calibration,
    ).loss


def denoising(
    prior: Prior,
    x0: Tensor,
    sigma: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Plain denoising score matching on clean images, lambda(sigma) ||D(x_0 + sigma z, sigma) - x_0||^2 / n, (B,).

    Args:
        prior: an unconditional prior.
        x0: clean images, (B, C, H, W).
        sigma: noise level, float or (B,).
        generator: source of the noise.

    Raises:
        ConditioningError: a mask-conditional prior.
    """
    require_unconditional(prior, "the denoising loss")
    x_t = x0 + expand(sigma, x0) * draw_noise(x0, generator)
    squared = (prior(x_t, sigma) - x0).square().flatten(1).mean(1)
    return prior.loss_weight(expand(sigma, x0).flatten()) * squared
