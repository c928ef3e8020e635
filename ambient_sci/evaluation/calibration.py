r"""Do the error bars hold? Calibration of posterior samples, with the truth and without it.

With the truth x_0 (`with_truth`): coverage of central intervals, CRPS, ranks of random projections
(simulation-based calibration, Talts et al. 2018), ranks of distances to random references (TARP, Lemos et al.
2023), and

    std / error = sqrt( (1 + 1/S) mean var / mean (x_0 - mean of samples)^2 )           1 when calibrated

var is the unbiased sample variance; 1 + 1/S because the mean of S samples is itself uncertain: with x_0, x_1
.. x_S independent draws of variance V, E (x_0 - xbar)^2 = V (1 + 1/S). Below 1: over-confident.

Without the truth (`held_out_rows`): samples from some rows of y predict the others, A x_s + sigma_y n_s,
which are exchangeable with what was measured there. This sees the prior, and needs nothing but measurements.
The other test without truth, of the residual on the rows that were used, is `chi_squared`.

p-values are those of `exchangeability`; several tests share one level by Bonferroni's rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation import exchangeability as exchange
from ambient_sci.evaluation.chi_squared import check_finite, check_level, noise_level

LEVELS = (0.5, 0.8, 0.95)
BINS = 10
POWER_FACTORS = (0.8, 1.25)


def with_truth(
    samples: Tensor,
    truth: Tensor,
    *,
    level: float = 0.05,
    coverage_levels: Sequence[float] = LEVELS,
    projections: int = 8,
    subjects: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Calibration of samples against the truth.

    Args:
        samples: (S, N, C, H, W) or any (S, N, ...), S >= 2; N independent measurements. Entries are compared
            as they are: a complex image by real and imaginary part.
        truth: (N, ...).
        level: probability that correct samples are called anything else, over all tests together.
        coverage_levels: probabilities of the central intervals.
        projections: random directions for the rank tests, and references for TARP.
        subjects: whose each measurement is; the interval of std / error is then over people.
        generator: for projections and p-values; default: a fixed seed.

    Returns:
        JSON-able: ``std_over_error`` (ratio, 95 % interval, p), ``crps``, ``coverage``, ``ranks``, ``sbc``,
        ``tarp``, ``power``, ``accepted`` and the ``verdict`` in words.

    Raises:
        InputError: shapes that do not match, fewer than two samples, or a level outside (0, 1).
    """
    _check(samples, truth, level, coverage_levels)
    generator = generator or torch.Generator().manual_seed(0)
    result = _scored(samples, truth, None, coverage_levels, subjects, generator)
    summaries = _projections(samples, truth, projections, generator)
    bins = max(2, min(BINS, len(truth) // 5, len(samples) + 1))
    edges = [k / bins for k in range(bins + 1)]
    result["sbc"] = exchange.rank_test(summaries, edges, exchange.pearson, generator)
    distances = _reference_distances(samples, truth, projections, generator)
    grid = [k / 20 for k in range(21)]
    result["tarp"] = exchange.rank_test(distances, grid, exchange.largest_gap, generator)
    p_values = _p_values(result)
    result["power"] = exchange.power(samples, None, POWER_FACTORS, level / len(p_values))
    return _concluded(result, p_values, level, "image")


def held_out_rows(
    samples: Tensor,
    held_out: Any,
    y: Tensor,
    sigma_y: float | Tensor,
    *,
    level: float = 0.05,
    coverage_levels: Sequence[float] = LEVELS,
    subjects: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Calibration of samples drawn from *some* rows of y, scored on the rows they have not seen.

    Args:
        samples: (S, N, C, H, W), posterior samples given the kept rows alone.
        held_out: operator of the held-out rows (``split.held_out``), with a 0/1 ``mask``.
        y: measurements, (N, ...); rows outside ``held_out.mask`` are not read.
        sigma_y: noise level per real channel, >= 0: float, (N,) or of the shape of y.
        level, coverage_levels, subjects, generator: as for `with_truth`.

    Returns:
        As `with_truth`, without ``sbc`` and ``tarp``; and ``signal_std_over_error``, the ratio with the noise
        variance taken off both sides (None where noise is all there is). ``power``: of noticing that the
        signal's true deviations are 0.8 or 1.25 times the samples'.

    Raises:
        InputError: shapes that do not match, nothing held out, or no noise level.
    """
    sigma = noise_level(sigma_y, y, positive=False)
    if samples.ndim < 2 or samples.shape[1] != len(y):
        raise InputError(f"calibration: expected samples (S, {len(y)}, ...), got {tuple(samples.shape)}")
    some = held_out.mask.flatten(1).any(1).expand(len(y))
    if not bool(some.any()):
        raise InputError("calibration: expected held-out rows, got none")
    if not bool(some.all()):  # measurements of which the split kept every row have nothing to say
        index = some.nonzero()[:, 0]
        held_out, samples, y = held_out[index], samples[:, index], y[index]
        sigma = sigma if len(sigma) == 1 else sigma[index]
        subjects = None if subjects is None else [str(subjects[int(i)]) for i in index]
    mask = held_out.mask
    generator = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        signal = torch.stack([held_out.A(x) for x in samples])
    noise = torch.randn(signal.shape, generator=generator, dtype=signal.dtype).to(signal.device) * sigma
    _check(signal, y, level, coverage_levels)
    result = _scored(signal + noise, y, mask, coverage_levels, subjects, generator)
    result["signal_std_over_error"] = _signal_ratio(result, _noise_variance(sigma, mask, y))
    p_values = _p_values(result)
    result["power"] = exchange.power(signal, noise, POWER_FACTORS, level / len(p_values), mask)
    return _concluded(result, p_values, level, "held-out row")


def hold_out(
    sample: Callable[[Any, Tensor], Tensor],
    operator: Any,
    y: Tensor,
    sigma_y: float | Tensor,
    *,
    keep: float = 0.8,
    generator: torch.Generator | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Split, sample from the kept rows, score the others: `held_out_rows` from measurements alone.

    Args:
        sample: (operator, y) -> samples (S, N, C, H, W), e.g. ``lambda A, y: reconstruct(prior, A, y,
            sigma_y).samples``.
        operator: a row-masked operator of this library. y, sigma_y: its measurements.
        keep: fraction of the measured rows to sample from.
        options: further arguments of `held_out_rows`.
    """
    generator = generator or torch.Generator().manual_seed(0)
    split = operator.split(keep=keep, generator=generator)
    samples = sample(split.kept, y * split.kept.mask)
    return held_out_rows(samples, split.held_out, y, sigma_y, generator=generator, **options)


def std_over_error(result: Any, truth: Tensor, subjects: Sequence[str]) -> dict[str, Any]:
    """Root mean square of the posterior standard deviation over that of the error, for tables that average
    over people.

    Of the samples alone: their mean errs by the posterior's variance times (1 + 1/S), so that is what their
    spread is compared with. By how much less ``result.mean`` errs is not known that well.

    Args:
        result: a `Reconstruction` of N images, 2 or more samples.
        truth: (N, C, H, W).
        subjects: who each image is of.

    Returns:
        JSON-able: ``mean`` over people, the ratio of each of ``people``, all images ``pooled``.
    """
    variance = result.samples.var(0) * (1 + 1 / len(result.samples))
    error = (result.samples.mean(0) - truth).square()

    def ratio(rows: list[int]) -> float:
        return float((variance[rows].mean() / error[rows].mean()).sqrt())

    people = {p: ratio([i for i, s in enumerate(subjects) if s == p]) for p in dict.fromkeys(subjects)}
    return {
        "mean": sum(people.values()) / len(people),
        "people": people,
        "pooled": ratio(list(range(len(subjects)))),
    }


# -- parts -------------------------------------------------------------------------------------------------


def _scored(
    samples: Tensor,
    truth: Tensor,
    mask: Tensor | None,
    levels: Sequence[float],
    subjects: Sequence[str] | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What `with_truth` and `held_out_rows` have in common."""
    intervals = [((1 - p) / 2, (1 + p) / 2) for p in levels] + [
        (k / BINS, (k + 1) / BINS) for k in range(BINS)
    ]
    scores = exchange.score(samples, truth, intervals, mask)
    inside = scores.inside[: len(levels)]
    bins = scores.inside[len(levels) :]
    energy = exchange.exchange_test(scores.energy, generator)
    return {
        "samples": len(samples),
        "measurements": len(truth),
        "std_over_error": {
            **_std_over_error(scores, len(samples), subjects),
            "z": energy["z"],
            "p": energy["p"],
        },
        "crps": exchange.exchange_test(scores.crps, generator),
        "coverage": {
            f"{100 * p:g}": exchange.exchange_test(c, generator) for p, c in zip(levels, inside, strict=True)
        },
        "ranks": {
            "frequencies": bins[:, 0].mean(1).tolist(),
            "std": (bins.var(1, correction=0).sum(1).sqrt() / len(truth)).tolist(),
        },
        "mean_squared_error": float(scores.error.mean()),
        "mean_variance": float(scores.variance.mean()),
    }


def _std_over_error(
    scores: exchange.Scores, samples: int, subjects: Sequence[str] | None
) -> dict[str, float | list[float] | None]:
    """The ratio and its 95 % interval: jackknife over people or measurements, on a logarithmic scale."""
    from scipy.stats import t

    def ratio(variance: Tensor, error: Tensor) -> float:
        if float(error.mean()) == 0:
            return math.inf if float(variance.mean()) > 0 else math.nan
        return math.sqrt((1 + 1 / samples) * float(variance.mean()) / float(error.mean()))

    whole = ratio(scores.variance, scores.error)
    names = list(range(len(scores.error))) if subjects is None else list(subjects)
    groups = list(dict.fromkeys(names))
    interval = None
    if len(groups) > 1 and 0 < whole < math.inf:
        keep = [torch.tensor([i for i, n in enumerate(names) if n != g]) for g in groups]
        logs = torch.tensor([math.log(ratio(scores.variance[k], scores.error[k])) for k in keep]).double()
        std = math.sqrt((len(groups) - 1) * float(logs.var(correction=0)))
        reach = float(t.isf(0.025, len(groups) - 1)) * std
        interval = [whole * math.exp(-reach), whole * math.exp(reach)]
    return {"ratio": whole, "interval_95": interval}


def _noise_variance(sigma: Tensor, mask: Tensor, y: Tensor) -> float:
    """sigma^2 averaged as scores are: over the entries of each measurement, then over measurements."""
    rows = mask.to(y).expand(y.shape).flatten(1)
    return float(((sigma.expand(y.shape).flatten(1).square() * rows).sum(1) / rows.sum(1)).mean())


def _signal_ratio(result: dict[str, Any], noise: float) -> float | None:
    """std / error without the noise variance on either side, where there is more than noise on both."""
    spread = result["mean_variance"] - noise
    error = result["mean_squared_error"] - noise * (1 + 1 / result["samples"])
    smallest = 0.05 * noise
    return math.sqrt((1 + 1 / result["samples"]) * spread / error) if min(spread, error) > smallest else None


def _projections(samples: Tensor, truth: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Norm and random projections of truth and samples, (S+1, N, 1 + count)."""
    values = torch.cat([truth[None], samples]).flatten(2).double()
    directions = torch.randn(values.shape[2], count, generator=generator, dtype=torch.float64)
    norms = torch.linalg.vector_norm(values, dim=2, keepdim=True)
    return torch.cat([norms, values @ directions.to(values.device)], 2)


def _reference_distances(samples: Tensor, truth: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Distances of truth and samples to random references, (S+1, N, count).

    References are drawn with the mean and standard deviation of truth and samples pooled, which favours
    neither.
    """
    values = torch.cat([truth[None], samples]).flatten(2).double()
    mean, std = values.mean((0, 1)), values.std((0, 1))
    z = torch.randn(count, len(mean), generator=generator, dtype=torch.float64).to(values.device)
    return torch.stack([torch.linalg.vector_norm(values - (mean + std * row), dim=2) for row in z], 2)


# -- conclusions -------------------------------------------------------------------------------------------


def _p_values(result: dict[str, Any]) -> dict[str, float]:
    tests = {"std over error": result["std_over_error"], "CRPS": result["crps"]}
    tests |= {f"{k} % coverage": v for k, v in result["coverage"].items()}
    tests |= {k.upper(): result[k] for k in ("sbc", "tarp") if k in result}
    return {k: v["p"] for k, v in tests.items()}


def _concluded(result: dict[str, Any], p_values: dict[str, float], level: float, what: str) -> dict[str, Any]:
    limit = level / len(p_values)
    failed = [k for k, p in p_values.items() if p < limit]
    reachable = (result["samples"] + 1.0) ** -result["measurements"]
    result.update(level=level, level_of_each_test=limit, failed=failed, accepted=not failed)
    result["verdict"] = _verdict(result, failed, level, what)
    if reachable > limit:
        result["verdict"] += (
            " (too few measurements and samples to reject anything at this level: no p-value below "
            f"{reachable:.2g} is possible)"
        )
    return result


def _verdict(result: dict[str, Any], failed: list[str], level: float, what: str) -> str:
    ratio, interval = (result["std_over_error"][k] for k in ("ratio", "interval_95"))
    said = f"std/error {ratio:.2f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")
    covered = ", ".join(
        f"{k} % intervals cover {100 * v['observed']:.0f} %" for k, v in result["coverage"].items()
    )
    detail = f"{said} per {what} entry; {covered}"
    if not failed:
        return f"calibrated as far as can be seen: no deviation at the {100 * level:g} % level; {detail}"
    named = f"{', '.join(failed)} rejected at the {100 * level:g} % level"
    return f"{finding(result, failed)} ({named}); {detail}"


def finding(result: dict[str, Any], failed: list[str]) -> str:
    """What the rejected tests say: the scale of the errors, how often intervals hold, or the shape alone."""
    ratio = result.get("signal_std_over_error") or result["std_over_error"]["ratio"]
    gaps = [v["z"] for k, v in result["coverage"].items() if f"{k} % coverage" in failed]
    wide, narrow = bool(gaps) and min(gaps) > 0, bool(gaps) and max(gaps) < 0
    if not {"std over error", "CRPS"} & set(failed):
        if wide or narrow:
            return (
                f"{'under' if wide else 'over'}-confident: intervals cover {'more' if wide else 'less'} "
                "than they say"
            )
        return "calibrated in scale, but not in shape"
    if not 0 < ratio < math.inf:
        return "not calibrated"
    factor = max(ratio, 1 / ratio)
    if factor < 1.05:
        return "calibrated in scale within 5 %, but not in shape"
    finding = f"{'over' if ratio < 1 else 'under'}-confident by {factor:.2g}x"
    if ratio < 1 and wide:
        finding += (
            ", unevenly: the largest errors exceed their error bars, most others are well inside theirs"
        )
    elif ratio > 1 and narrow:
        finding += ", unevenly: the largest error bars are too wide, most others are too narrow"
    return finding


# -- checks ------------------------------------------------------------------------------------------------


def _check(samples: Tensor, truth: Tensor, level: float, coverage_levels: Sequence[float]) -> None:
    if samples.shape[1:] != truth.shape or samples.ndim < 3:
        raise InputError(
            f"calibration: expected samples (S, N, ...) and truth (N, ...), got {tuple(samples.shape)} and "
            f"{tuple(truth.shape)}"
        )
    if len(samples) < 2:
        raise InputError("calibration: expected at least 2 samples of each measurement, got 1")
    check_finite(samples, "samples")
    check_finite(truth, "truth or measurements")
    check_level(level)
    if not all(0 < p < 1 for p in coverage_levels):
        raise InputError(f"calibration: expected coverage levels in (0, 1), got {list(coverage_levels)}")
