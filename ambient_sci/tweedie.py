r"""Exact relations between the three conditional means of a noisy measurement: Tweedie's formula, twice.

Data come with noise sigma_n already in them, x_tn = x_0 + sigma_n n, and are noised further to x_t. With the
score of p_t eliminated between the two Tweedie formulas

    E[x_0  | x_t] = x_t + sigma_t^2               grad log p_t(x_t)
    E[x_tn | x_t] = x_t + (sigma_t^2 - sigma_n^2) grad log p_t(x_t)

what can be *supervised* from noisy data (the mean of x_tn) and what is *wanted* (the mean of x_0) determine
each other:

    E[x_tn | x_t] = c E[x_0 | x_t] + (1 - c) x_t,        c = 1 - sigma_n^2 / sigma_t^2.           (VE)

For the variance-preserving process, alpha = sqrt(1 - sigma^2),

    E[x_tn | x_t] = (s_t^2 - s_n^2)/(s_t^2 alpha_n) E[x_0 | x_t] + s_n^2 alpha_t/(s_t^2 alpha_n) x_t.   (VP)

For rows of a linear operator the relation holds row by row on the rows that carry the extra noise, and rows
held out need no correction at all (`measurement_mean`).

Sources: Daras et al., "Consistent Diffusion Meets Tweedie" (2024); the row-wise form generalises it to y = A
x_0 + sigma_y n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import Process, expand, vp_alpha

if TYPE_CHECKING:
    from ambient_sci.operators.base import RowMaskedOperator


def contraction(sigma_t: float | Tensor, sigma_n: float | Tensor, like: Tensor) -> Tensor:
    """c = 1 - sigma_n^2 / sigma_t^2 in [0, 1], broadcast over ``like``; exactly 1 where sigma_n = 0.

    Levels that are equal but for rounding (one part in a million: one of them may have come in a shorter
    type) count as equal, c = 0.

    Raises:
        InputError: a level sigma_t below sigma_n (or not positive), where no such mean exists.
    """
    t, n = expand(sigma_t, like), expand(sigma_n, like)
    if not bool(((t >= n * (1 - 1e-6)) & (t > 0) & (n >= 0)).all()):
        raise InputError(
            f"noise levels: expected 0 <= sigma_n <= sigma_t and sigma_t > 0, "
            f"got sigma_n = {n.flatten().tolist()[:4]}, sigma_t = {t.flatten().tolist()[:4]}"
        )
    return (1 - (n / t) ** 2).clamp(min=0)


def _coefficients(
    x_t: Tensor, sigma_t: float | Tensor, sigma_n: float | Tensor, process: Process
) -> tuple[Tensor, Tensor]:
    """(a, b) of E[x_tn | x_t] = a E[x_0 | x_t] + b x_t."""
    c = contraction(sigma_t, sigma_n, x_t)
    if process == "ve":
        return c, 1 - c
    if process == "vp":
        t, n = expand(sigma_t, x_t), expand(sigma_n, x_t)
        if bool((n >= 1).any()) or bool((t > 1).any()):
            raise InputError("VP noise scales: expected sigma_n < 1 and sigma_t <= 1")
        alpha_t, alpha_n = vp_alpha(t), vp_alpha(n)
        return c / alpha_n, (1 - c) * alpha_t / alpha_n
    raise InputError(f"process: expected 've' or 'vp', got {process!r}")


def noisy_mean(
    x0_mean: Tensor,
    x_t: Tensor,
    sigma_t: float | Tensor,
    sigma_n: float | Tensor,
    process: Process = "ve",
) -> Tensor:
    """E[x_tn | x_t] from E[x_0 | x_t]: what a denoiser of clean images predicts for the noisy image in the
    data set.

    Args:
        x0_mean: E[x_0 | x_t], (B, ...).
        x_t: the state, (B, ...).
        sigma_t: its noise level, float or (B,). For "vp" the noise *scale* in (0, 1].
        sigma_n: noise level of the data, float or (B,), at most sigma_t; 0 gives x0_mean itself.

    Raises:
        InputError: sigma_n > sigma_t, or an unknown process.
    """
    a, b = _coefficients(x_t, sigma_t, sigma_n, process)
    return a * x0_mean + b * x_t


def clean_mean(
    xtn_mean: Tensor,
    x_t: Tensor,
    sigma_t: float | Tensor,
    sigma_n: float | Tensor,
    process: Process = "ve",
) -> Tensor:
    """E[x_0 | x_t] from E[x_tn | x_t], the inverse of `noisy_mean`; undefined at sigma_t = sigma_n.

    Raises:
        InputError: sigma_t <= sigma_n somewhere: there E[x_tn | x_t] = x_t says nothing about x_0.
    """
    a, b = _coefficients(x_t, sigma_t, sigma_n, process)
    if bool((a <= 0).any()):
        raise InputError(
            "noise levels: expected sigma_t > sigma_n, got equal levels (the mean of x_tn is x_t there)"
        )
    return (xtn_mean - b * x_t) / a


def measurement_mean(
    operator: RowMaskedOperator,
    kept: Tensor,
    x0_mean: Tensor,
    y_t: Tensor,
    sigma_t: float | Tensor,
    sigma_y: float | Tensor,
) -> Tensor:
    """E[y | y~, B] on all rows of A, for y = A x_0 + sigma_y n and y~ = y_B + sqrt(sigma_t^2 - sigma_y^2) n~
    on kept rows B.

        kept rows:      c A_B h + (1 - c) y~        c = 1 - sigma_y^2 / sigma_t^2
        held-out rows:  A h                         (their noise is independent of y~)

    Args:
        operator: A, a row-masked operator.
        kept: 0/1 in measurement space (broadcastable); rows outside the operator's own mask are ignored.
        x0_mean: h = E[x_0 | y~, B], (B, C, H, W).
        y_t: y~, measurement space; values outside ``kept`` are ignored.
        sigma_t: total noise level of the kept rows, float or (B,), at least sigma_y.
        sigma_y: noise level of the measurements, float or (B,).

    Returns:
        measurement space, zero outside the operator's mask.

    Raises:
        InputError: images or measurements that do not fit the operator, or sigma_t < sigma_y.
    """
    operator._check_measurement(y_t)
    predicted = operator.A(x0_mean)
    c = contraction(sigma_t, sigma_y, predicted)
    on = torch.as_tensor(kept, device=predicted.device).to(torch.bool) & operator.mask.to(torch.bool)
    return torch.where(on, c * predicted + (1 - c) * y_t, predicted)
