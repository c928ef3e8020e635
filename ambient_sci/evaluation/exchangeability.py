r"""What calibrated samples have in common with the truth: they are exchangeable with it.

If x_1 .. x_S are draws from the true posterior p(x | y), then truth x_0 and samples are S+1 independent draws
from one distribution, whatever that distribution is. So any score t(j) that casts x_j as "the truth" and the
others as "the samples" has the same law for every j, and what the truth scored can be compared with what the
samples score in its place. No distribution is assumed, the number of samples may be small, and the entries of
an image may depend on each other in any way:

    T = mean_n t_n(0),    E T = mean_n mean_j t_n(j),    var T = N^-2 sum_n var_j t_n(j)

n = 1 .. N counts measurements. Given the values, T is a sum of N independent uniform picks; its p-value is
found by making the picks at random. The one thing assumed is that the N posteriors are independent: slices of
one person share what makes that person unusual, so there p-values are optimistic.

Scores of one entry with values v_0 .. v_S:

    CRPS (fair)     mean_{i != j} |v_i - v_j|  -  1/2 mean_{i != k, both != j} |v_i - v_k|          Ferro 2014
    energy          (v_j - mean_i v_i)^2
    inside (a, b)   share of [r/(S+1), (r+1)/(S+1)] that is in (a, b), r the rank of v_j

Energy compares the error with the variance. The expectation of the last is b - a exactly: it is coverage
without the usual bias of sample quantiles; ties share their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DRAWS = 4000  # random picks behind a p-value: none is below 1 / 4001
RANK_DRAWS = 1000  # the same for the rank tests, whose statistic costs more


@dataclass(frozen=True)
class Scores:
    """Scores averaged over the entries of each measurement; row 0 is the truth in its own place.

    ``crps``, ``energy``: (S+1, N). ``inside``: (K, S+1, N), one for each interval. ``error``: mean squared
    error of the sample mean, (N,). ``variance``: unbiased sample variance, (N,). All on the CPU: they are
    few, and asked one by one.
    """

    crps: Tensor
    energy: Tensor
    inside: Tensor
    error: Tensor
    variance: Tensor


def score(
    samples: Tensor, truth: Tensor, intervals: Sequence[tuple[float, float]], mask: Tensor | None = None
) -> Scores:
    """Score truth and samples in each other's place, one measurement at a time.

    Args:
        samples: (S, N, ...), S >= 2. truth: (N, ...).
        intervals: (a, b) in [0, 1] for ``inside``.
        mask: 0/1, (1|N, ...) broadcastable to ``truth``: entries to score.
    """
    parts: list[tuple[Tensor, ...]] = []
    for n in range(truth.shape[0]):
        values = torch.cat([truth[n][None], samples[:, n]]).flatten(1).T.double()
        if mask is not None:
            row = mask[n if mask.shape[0] > 1 else 0]
            values = values[row.expand(truth.shape[1:]).flatten() > 0]
        values = values.contiguous()
        count = values.shape[1]
        pool = Pool(values)
        low, high = pool.ranks(values)
        distance = pool.distances(values, low).mean(0) / (count - 1)
        pairs = distance.sum() * (count - 1) / 2
        others = (pairs - distance * (count - 1)) / max((count - 1) * (count - 2), 1)
        rest = values[:, 1:]
        parts.append(
            (
                distance - others,
                (values - values.mean(1, keepdim=True)).square().mean(0),
                _inside(low, high, intervals),
                (values[:, 0] - rest.mean(1)).square().mean(),
                rest.var(1).mean(),
            )
        )
    crps, energy, inside, error, variance = (torch.stack(p, -1).cpu() for p in zip(*parts, strict=True))
    return Scores(crps, energy, inside, error, variance)


def _inside(low: Tensor, high: Tensor, intervals: Sequence[tuple[float, float]]) -> Tensor:
    """Share of ranks / (S+1) in each interval, averaged over entries: (D, S+1) to (K, S+1)."""
    entries, count = low.shape
    # Histogram of ranks of each candidate. A tie spreads over its ranks: + 1/width where it begins, - 1/width
    # where it ends.
    width = (high - low).double().reciprocal().flatten()
    row = torch.arange(count, device=low.device) * (count + 1)
    size = count * (count + 1)
    change = torch.bincount((low + row).flatten(), width, size) - torch.bincount(
        (high + row).flatten(), width, size
    )
    histogram = change.reshape(count, count + 1).cumsum(1)[:, :-1] / entries
    edges = torch.arange(count + 1, dtype=torch.float64, device=low.device)
    weights = torch.stack([_overlap(edges[:-1], edges[1:], a * count, b * count) for a, b in intervals])
    return weights @ histogram.T


class Pool:
    """Values (D, n), sorted once along the second axis, to be asked for ranks and summed distances."""

    def __init__(self, values: Tensor) -> None:
        self.sorted = values.sort(1).values
        self.count = values.shape[1]
        self.sums = torch.nn.functional.pad(self.sorted.cumsum(1), (1, 0))

    def ranks(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """How many values are below, and how many not above, each of ``queries`` (D, Q)."""
        return torch.searchsorted(self.sorted, queries), torch.searchsorted(self.sorted, queries, right=True)

    def distances(self, queries: Tensor, below: Tensor | None = None) -> Tensor:
        """sum_i |v_i - q| for each of ``queries`` (D, Q); ``below``: their lower ranks, if known."""
        index = torch.searchsorted(self.sorted, queries) if below is None else below
        return queries * (2 * index - self.count) + self.sums[:, -1:] - 2 * self.sums.gather(1, index)


def _overlap(low: Tensor, high: Tensor, a: float, b: float) -> Tensor:
    """Share of [low, high] that lies in [a, b]."""
    return (high.clamp(max=b) - low.clamp(min=a)).clamp(min=0) / (high - low)


def exchange_test(values: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Compare the truth's score with the samples' in its place.

    Args:
        values: (S+1, N), row 0 the truth.
        generator: for the random picks.

    Returns:
        ``observed`` (mean over N), ``expected`` under calibration, ``z``, two-sided ``p``.
    """
    candidates, items = values.shape
    expected = values.mean()
    spread = float(values.var(0, correction=0).sum().sqrt() / items)
    observed = values[0].mean()
    if spread <= 1e-12 * max(float(expected.abs()), 1e-300):
        return {"observed": float(observed), "expected": float(expected), "z": 0.0, "p": 1.0}
    picks = torch.randint(candidates, (DRAWS, items), generator=generator)
    null = values.T[torch.arange(items), picks].mean(1)
    # A hair of slack: picks that are the observed one in another order of summation count as equal to it.
    extreme = (null - expected).abs() >= (observed - expected).abs() * (1 - 1e-9)
    return {
        "observed": float(observed),
        "expected": float(expected),
        "z": float(observed - expected) / spread,
        "p": (1 + int(extreme.sum())) / (DRAWS + 1),
    }


def rank_test(
    values: Tensor,
    edges: Sequence[float],
    statistic: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
) -> dict[str, Any]:
    """Are the truth's ranks uniform? For scalar summaries of whole images.

    Args:
        values: (S+1, N, F): F summaries of truth (row 0) and samples.
        edges: of the bins of the normalised rank, from 0 to 1.
        statistic: (frequencies (..., bins, F), bin probabilities (bins, 1)) -> (...), large when not uniform.
        generator: for the random picks.

    Returns:
        ``edges``, ``frequencies`` (averaged over summaries), ``p``.
    """
    values = values.cpu()
    candidates, items, _ = values.shape
    low = (values[:, None] > values[None]).sum(1)
    high = (values[:, None] >= values[None]).sum(1)
    bins = list(zip(edges[:-1], edges[1:], strict=True))
    shares = torch.stack(
        [_overlap(low, high, a * candidates, b * candidates) for a, b in bins], 2
    )  # (S+1, N, bins, F)
    expected = torch.tensor([b - a for a, b in bins], dtype=torch.float64)[:, None]
    shares = shares.double()
    observed = shares[0].mean(0)
    reached = statistic(observed, expected)
    extreme = 0
    block = max(1, min(RANK_DRAWS, int(1e7 // max(shares[0].numel(), 1))))
    for start in range(0, RANK_DRAWS, block):
        picks = torch.randint(candidates, (min(block, RANK_DRAWS - start), items), generator=generator)
        null = shares[picks, torch.arange(items)].mean(1)
        extreme += int((statistic(null, expected) >= reached * (1 - 1e-9)).sum())
    return {
        "edges": list(edges),
        "frequencies": observed.mean(1).tolist(),
        "p": (1 + extreme) / (RANK_DRAWS + 1),
    }


def pearson(frequencies: Tensor, expected: Tensor) -> Tensor:
    """Pearson's chi-squared statistic, summed over summaries (up to the number of measurements)."""
    return ((frequencies - expected).square() / expected).sum((-2, -1))


def largest_gap(frequencies: Tensor, expected: Tensor) -> Tensor:
    """Largest distance of the cumulated frequencies from uniform, over all summaries."""
    return (frequencies - expected).cumsum(-2).abs().amax((-2, -1))


def power(
    signal: Tensor, noise: Tensor | None, factors: Sequence[float], level: float, mask: Tensor | None = None
) -> dict[str, float] | None:
    """Probability that the CRPS test notices true deviations ``factor`` times the samples' own.

    Found from the samples alone: each in turn is cast as a truth whose deviation from the mean is scaled, and
    scored against the others. ``noise``: what was added to ``signal`` (both (S, N, ...)) in a prediction; it
    is not scaled. None below four samples.
    """
    if signal.shape[0] < 4:
        return None
    moments: dict[float, list[Tensor]] = {f: [] for f in (1.0, *factors)}
    for n in range(signal.shape[1]):
        clean = signal[:, n].flatten(1).T.double()
        added = torch.zeros_like(clean) if noise is None else noise[:, n].flatten(1).T.double()
        if mask is not None:
            row = mask[n if mask.shape[0] > 1 else 0].expand(signal.shape[2:]).flatten() > 0
            clean, added = clean[row], added[row]
        values, centre = (clean + added).contiguous(), clean.mean(1, keepdim=True)
        pool = Pool(values)
        for f in moments:
            cast = (centre + f * (clean - centre) + added).contiguous()
            t = ((pool.distances(cast) - (cast - values).abs()) / (values.shape[1] - 1)).mean(0)
            moments[f].append(torch.stack([t.mean(), t.var(correction=0)]))
    sums = {f: torch.stack(ms).sum(0).tolist() for f, ms in moments.items()}
    means = {f: mean / signal.shape[1] for f, (mean, _) in sums.items()}
    stds = {f: math.sqrt(variance) / signal.shape[1] for f, (_, variance) in sums.items()}
    return {f"{f:g}": _two_sided(means[f] - means[1.0], stds[f], stds[1.0], level) for f in factors}


def _two_sided(shift: float, std: float, null_std: float, level: float) -> float:
    """P(|shift + std z| > critical null_std), z normal."""
    from scipy.stats import norm

    critical = float(norm.isf(level / 2)) * null_std
    if std == 0:
        return float(abs(shift) > critical)
    return float(norm.sf((critical - shift) / std) + norm.cdf((-critical - shift) / std))
