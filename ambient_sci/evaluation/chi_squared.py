r"""Is what is left over noise? The chi-squared test of posterior samples, which needs no truth.

With the right prior, sampler and noise level one posterior sample x_s per y has

    y - A x_s ~ N(0, sigma_y^2 I),      ||y - A x_s||^2 / sigma_y^2 ~ chi^2_m,      m real rows measured

because truth and x_s are exchangeable given y. What the test can see is limited. A noise level that is really
k sigma_y shows only along directions the prior determines: for a Gaussian prior with gain g = s^2 / (s^2 +
sigma_y^2), s^2 the prior variance of a row,

    var (y - A x_s) = sigma_y^2 (1 + (1 - g)^2 (k^2 - 1))

which is sigma_y^2, whatever k, where s^2 >> sigma_y^2: there the sample follows the noise. The power is
therefore stated with the result, g being estimated from the samples themselves, whose variance in measurement
space is g sigma_y^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator


def chi_squared(
    samples: Tensor,
    operator: Any,
    y: Tensor,
    sigma_y: float | Tensor,
    *,
    level: float = 0.05,
    alternatives: Sequence[float] = (0.77, 1.3),
) -> dict[str, Any]:
    """Is y - A x_s noise? One posterior sample per measurement against chi^2, with the power of the test.

    Args:
        samples: (S, N, C, H, W) posterior samples given *all* of y. The test uses the first of each
            measurement, the power all of them.
        operator: A; with a 0/1 ``mask`` the rows measured are counted by it, else all of y counts.
        y: (N, ...). sigma_y: noise level per real channel, > 0 where measured: float, (N,) or of the shape of
            y.
        level: probability of rejecting correct samples.
        alternatives: true noise level over sigma_y, for which the power is stated.

    Returns:
        JSON-able: ``statistic``, ``degrees`` m, ``ratio`` = sqrt(statistic / m), two-sided ``p``,
        ``accepted``,
        ``verdict``, and for each alternative the ``power``: ``determined``, if the prior determined
            everything (an
        upper bound, from the degrees of freedom alone), and ``estimated``, with the gains that the samples
        show (None below three samples).

    Raises:
        InputError: shapes that do not match, or a noise level that is not positive.
    """
    from scipy.stats import chi2

    mask = getattr(operator, "mask", None)
    rows = torch.ones_like(y) if mask is None else mask.to(y).expand(y.shape)
    sigma = noise_level(sigma_y, y, positive=True, rows=rows)
    if samples.ndim < 2 or samples.shape[1] != len(y):
        raise InputError(f"calibration: expected samples (S, {len(y)}, ...), got {tuple(samples.shape)}")
    check_level(level)
    check_finite(samples, "samples")
    statistic, resolved = _sums(samples, operator, y, sigma, rows)
    degrees = int(rows.sum())
    share = None if math.isnan(resolved) else min(max(1 + resolved / degrees, 0.0), 1.0)
    p = min(1.0, 2 * min(float(chi2.sf(statistic, degrees)), float(chi2.cdf(statistic, degrees))))
    power = {
        f"{k:g}": {
            "determined": _power(1.0, k, degrees, level),
            "estimated": None if share is None else _power(share, k, degrees, level),
        }
        for k in alternatives
    }
    ratio = math.sqrt(statistic / degrees)
    return {
        "measurements": len(y),
        "statistic": statistic,
        "degrees": degrees,
        "ratio": ratio,
        "p": p,
        "level": level,
        "power": power,
        "accepted": p >= level,
        "verdict": _verdict(ratio, p, level, power),
    }


def _sums(samples: Tensor, operator: Any, y: Tensor, sigma: Tensor, rows: Tensor) -> tuple[float, float]:
    """The statistic, and the sum of `resolution` over the measurements (NaN below three samples)."""
    zero = torch.zeros((), dtype=torch.float64, device=y.device)
    sums = [zero, zero]
    for n, seen in enumerate(_in_measurement_space(operator, samples)):
        if seen.shape[1:] != y.shape[1:]:
            expected = (len(y), *seen.shape[1:])
            raise InputError(
                f"calibration: expected measurements {expected} for these samples, got {tuple(y.shape)}"
            )
        level_n = sigma[n if len(sigma) > 1 else 0]
        misfit = (((y[n] - seen[0]) * rows[n] / level_n).double() ** 2).sum()
        sums = [
            sums[0] + misfit,
            sums[1] + (resolution(seen / level_n * rows[n]) if len(samples) > 2 else math.nan),
        ]
    statistic, resolved = torch.stack(sums).tolist()
    return statistic, resolved


def _in_measurement_space(operator: Any, samples: Tensor) -> Iterator[Tensor]:
    """A x_s of one measurement after the other, each (S, ...)."""
    with torch.no_grad():
        if isinstance(operator, RowMaskedOperator):
            operator._check_image(samples[0])
            for n in range(samples.shape[1]):
                yield (operator[n] if operator.batch_size > 1 else operator).A(samples[:, n])
        else:
            yield from torch.stack([operator.A(x) for x in samples], 1)


def resolution(seen: Tensor) -> Tensor:
    """tr G^2 - 2 tr G, where G is the covariance of ``seen`` = A x_s / sigma_y, (S, ...).

    With nu = S - 1 and a sample covariance C of Gaussian samples, nu^2 / ((nu - 1)(nu + 2)) (tr C^2 - (tr
    C)^2 / nu) is an unbiased estimate of tr G^2, and tr C^2 is the squared norm of the S x S matrix of inner
    products.
    """
    nu = len(seen) - 1
    deviations = (seen - seen.mean(0)).flatten(1).double()
    products = deviations @ deviations.T / nu
    trace = products.trace()
    return nu**2 / ((nu - 1) * (nu + 2)) * (products.square().sum() - trace**2 / nu) - 2 * trace


def _power(resolved: float, k: float, degrees: int, level: float) -> float:
    """P(reject) when the noise is really k sigma_y.

    The statistic is then sum_i v_i chi^2_1, v_i = 1 + r_i (k^2 - 1) with r_i in [0, 1] of mean ``resolved``;
    approximated by a scaled chi^2 of the same mean and of the largest variance those r_i allow.
    """
    from scipy.stats import chi2

    gap = k**2 - 1
    mean = 1 + resolved * gap
    square = 1 + 2 * resolved * gap + resolved * gap**2
    scale, shape = square / mean, degrees * mean**2 / square
    low, high = float(chi2.ppf(level / 2, degrees)), float(chi2.isf(level / 2, degrees))
    return float(chi2.sf(high / scale, shape) + chi2.cdf(low / scale, shape))


def _verdict(ratio: float, p: float, level: float, power: dict[str, Any]) -> str:
    stated = "; ".join(
        f"power against noise {k}x: "
        + (f"{v['estimated']:.2f}" if v["estimated"] is not None else f"at most {v['determined']:.2f}")
        for k, v in power.items()
    )
    weak = all((v["estimated"] if v["estimated"] is not None else 1.0) < 0.5 for v in power.values())
    if p < level:
        side = "larger" if ratio > 1 else "smaller"
        return (
            f"residuals {side} than the noise by {max(ratio, 1 / ratio):.3g}x (p = {p:.2g}): rejected; "
            f"{stated}"
        )
    if weak:
        return f"residuals like noise (p = {p:.2g}), but the test has little power here; {stated}"
    return f"residuals like noise (p = {p:.2g}); {stated}"


def check_level(level: float) -> None:
    """Raise InputError unless 0 < level < 1."""
    if not 0 < level < 1:
        raise InputError(f"calibration: expected a level in (0, 1), got {level}")


def check_finite(values: Tensor, what: str) -> None:
    """Raise InputError unless all ``values`` are numbers: the scores of others would be, too, and look like a
    result.
    """
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"calibration: expected finite {what}, got NaN or infinity")


def noise_level(
    sigma_y: float | Tensor | None, y: Tensor, *, positive: bool, rows: Tensor | None = None
) -> Tensor:
    """Noise level as (1|N, 1, ...), or of the shape of y where it differs by entry.

    Args:
        sigma_y: float, (N,) or of the shape of y.
        y: measurements, (N, ...).
        positive: refuse zero.
        rows: 0/1 of the shape of y, what was measured; levels elsewhere do not matter, and come back as 1
            where they differ by entry.

    Raises:
        InputError: no level, one of another shape, or one that is out of range.
    """
    sigma = torch.as_tensor(math.nan if sigma_y is None else sigma_y, dtype=y.dtype, device=y.device)
    by_entry = sigma.shape == y.shape and sigma.numel() != len(y)
    if by_entry and rows is not None:
        sigma = torch.where(rows > 0, sigma, 1.0)
    good = torch.isfinite(sigma) & (sigma > 0 if positive else sigma >= 0)
    if not (by_entry or sigma.numel() in (1, len(y))) or not bool(good.all()):
        got = (
            sigma_y
            if sigma.numel() == 1
            else f"{sigma.flatten()[:4].tolist()} ... of shape {tuple(sigma.shape)}"
        )
        raise InputError(
            f"calibration: expected a {'positive ' if positive else ''}noise level, one a measurement "
            f"({len(y)}) or one an entry "
            f"{tuple(y.shape)}, got {got}"
        )
    return sigma if by_entry else sigma.reshape(-1, *[1] * (y.ndim - 1))
