r"""Inclusion probabilities of conditional Poisson sampling, by elementary symmetric polynomials.

A set of r units is drawn with a probability in proportion to the product of its weights. With e_r the
elementary symmetric polynomials,

    P(i in the set) = w_i e_{r-1}(w without i) / e_r(w).

Source: Chen, Dempster & Liu, "Weighted finite population sampling to maximize entropy" (1994).
"""

from __future__ import annotations

import torch
from torch import Tensor


def suffix_polynomials(weights: Tensor, degree: int) -> Tensor:
    """log e_r(w_i, ..., w_{n-1}) for every suffix i = 0..n and r = 0..degree: (batch, n + 1, degree + 1).

    In logarithms: with hundreds of units the polynomials overflow float64. Zero weights drop out as -inf.
    """
    batch, n = weights.shape
    log_w = weights.log()
    table = torch.full((batch, n + 1, degree + 1), -torch.inf, dtype=torch.float64)
    table[:, :, 0] = 0.0
    for i in range(n - 1, -1, -1):
        table[:, i, 1:] = torch.logaddexp(table[:, i + 1, 1:], log_w[:, i, None] + table[:, i + 1, :-1])
    return table


def inclusion(weights: Tensor, size: int) -> Tensor:
    """Inclusion probabilities of conditional Poisson sampling, (batch, n): w_i e_{size-1}(w without i) /
    e_size(w).

    From prefix and suffix tables, e(w without i) is their convolution: no subtraction, so no cancellation.
    """
    n = weights.shape[1]
    if size == 0:
        return torch.zeros_like(weights)
    positive = weights > 0
    same = torch.where(positive, weights, weights.amax(1, keepdim=True)).std(1, unbiased=False).amax() == 0
    if bool(same):
        return torch.where(positive, size / positive.double().sum(1, keepdim=True), 0.0)
    # One table for both directions: prefix[:, i] holds the polynomials of the first i weights.
    both = suffix_polynomials(torch.cat([weights, weights.flip(1)]), size)
    suffix, prefix = both[: len(weights)], both[len(weights) :].flip(1)
    without = torch.logsumexp(prefix[:, :n, :size] + suffix[:, 1:, :size].flip(2), dim=2)
    return torch.where(positive, (weights.log() + without - suffix[:, :1, size]).exp(), 0.0)
