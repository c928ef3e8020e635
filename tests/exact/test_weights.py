r"""P(A_i = 1 | B) of every mask design, by enumerating all masks A and all splits B of few units: Bayes' rule, nothing else.

The law of A and the law of B given A are written down here once more, from the definition of each design, and the designs' own
draws are held against them. All to 1e-12. [15, 16]
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from closed_forms import F64, normal, seeded
from scipy.stats import chi2
from torch import Tensor

from ambient_sci.operators import Enumerated, FixedBudget, Independent, MaskDesign, RandomBox

KEEP = 0.4  # not a half, which would hide kept and held out trading places


def subsets(units: list[int]):
    return (set(c) for r in range(len(units) + 1) for c in itertools.combinations(units, r))


def vector(members, size: int) -> Tensor:
    v = torch.zeros(size, dtype=F64)
    v[list(members)] = 1.0
    return v


def independent_law(p: list[float]):
    n = len(p)
    law = {
        frozenset(s): math.prod(p[i] if i in s else 1 - p[i] for i in range(n))
        for s in subsets(list(range(n)))
    }
    return {s: p for s, p in law.items() if s and p}, bernoulli_split


def bernoulli_split(a: frozenset[int]):
    return {frozenset(b): KEEP ** len(b) * (1 - KEEP) ** (len(a) - len(b)) for b in subsets(sorted(a))}


def budget_law(weights: list[float], budget: int, always: list[int]):
    free = [i for i in range(len(weights)) if i not in always]
    law = {
        frozenset([*c, *always]): math.prod(weights[i] for i in c)
        for c in itertools.combinations(free, budget)
    }
    kept_budget = min(round(KEEP * budget), budget - 1)

    def split(a: frozenset[int]):
        chosen = list(itertools.combinations(sorted(a - set(always)), kept_budget))
        return {
            frozenset([*c, *s]): KEEP ** len(s) * (1 - KEEP) ** (len(always) - len(s)) / len(chosen)
            for c in chosen
            for s in subsets(always)
        }

    return law, split


def box_law(height: int, width: int, box: tuple[int, int]):
    every = frozenset(range(height * width))
    boxes = [
        frozenset((top + r) * width + left + c for r in range(box[0]) for c in range(box[1]))
        for top in range(height - box[0] + 1)
        for left in range(width - box[1] + 1)
    ]

    def split(a: frozenset[int]):
        second = [b for b in boxes if not b & (every - a)]
        return {a - b: 1 / len(second) for b in second}

    return {every - b: 1.0 for b in boxes}, split


def enumerated_law(masks: list[list[int]], probabilities: list[float]):
    sets = [frozenset(i for i, m in enumerate(row) if m) for row in masks]
    return dict(zip(sets, probabilities, strict=True)), bernoulli_split


MASKS, CHANCES = [[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]], [0.1, 0.2, 0.3, 0.4]
ODDS = [5.0, 0.4, 1.0, 2.5, 0.7, 1.5]
PROBLEMS = {
    "independent": (Independent((1, 1, 4), "pixels", [0.9, 0.5, 0.3, 0.7]), independent_law([0.9, 0.5, 0.3, 0.7])),
    "independent, always": (Independent((2, 1, 2), "entries", [1.0, 0.5, 0.3, 0.7]), independent_law([1.0, 0.5, 0.3, 0.7])),
    "budget": (FixedBudget((2, 3, 5), "columns", 3), budget_law([1.0] * 5, 3, [])),
    "budget, always": (FixedBudget((2, 6, 3), "rows", 2, 1.0, [2, 3]), budget_law([1.0] * 6, 2, [2, 3])),
    "variable density": (FixedBudget((2, 3, 6), "columns", 3, ODDS), budget_law(ODDS, 3, [])),
    "variable density, always": (FixedBudget((2, 2, 6), "columns", 2, ODDS, [3]), budget_law(ODDS, 2, [3])),
    "one line": (FixedBudget((2, 2, 4), "columns", 1, [1.0, 2.0, 3.0, 4.0]), budget_law([1.0, 2.0, 3.0, 4.0], 1, [])),
    "box": (RandomBox((1, 3, 5), "pixels", (2, 2)), box_law(3, 5, (2, 2))),
    "enumerated": (Enumerated((1, 1, 5), "pixels", MASKS, CHANCES), enumerated_law(MASKS, CHANCES)),
}  # fmt: skip


@pytest.fixture(params=PROBLEMS)
def problem(request) -> tuple[MaskDesign, dict, dict]:
    """Design, P(A), and P(A, B) as {(A, B): probability}."""
    design, (law, split) = PROBLEMS[request.param]
    total = sum(law.values())
    law = {a: p / total for a, p in law.items()}
    return design, law, {(a, b): p * q for a, p in law.items() for b, q in split(a).items() if p * q > 0}


def batch(design: MaskDesign, joint) -> tuple[Tensor, Tensor, Tensor]:
    """All A and B as rows, and their probabilities."""
    n = design.num_units
    a = torch.stack([vector(a, n) for a, _ in joint])
    b = torch.stack([vector(b, n) for _, b in joint])
    return a, b, torch.tensor(list(joint.values()), dtype=F64)


def test_probability_is_bayes_rule(problem):
    design, _, joint = problem
    a, b, p = batch(design, joint)
    same = (b[:, None] == b[None]).all(2).double()
    expected = (same * p) @ a / (same @ p)[:, None]
    assert (design.probability_units(a, b, KEEP) - expected).abs().max() < 1e-12
    design.check_trainable(KEEP)
    assert expected.min() > 0


def test_draws_follow_the_stated_law(problem):
    """Chi-square of 20,000 draws of (A, B), each, false alarm rate 1e-5."""
    design, law, joint = problem
    generator = seeded(1)
    a = design.to_units(design.sample(20_000, generator)).double()
    b = design.thin_units(a, KEEP, generator)
    assert bool((b <= a).all())
    code = 2.0 ** torch.arange(design.num_units, dtype=F64)
    for observed, expected in (
        (a @ code, {float(vector(s, len(code)) @ code): p for s, p in law.items()}),
        (
            a @ code * 2 ** len(code) + b @ code,
            {
                float(vector(s, len(code)) @ code * 2 ** len(code) + vector(t, len(code)) @ code): p
                for (s, t), p in joint.items()
            },
        ),
    ):
        counts = torch.tensor([(observed == key).sum() for key in expected], dtype=F64)
        assert counts.sum() == 20_000  # nothing outside the support
        mean = 20_000 * torch.tensor(list(expected.values()), dtype=F64)
        statistic = float(((counts - mean).square() / mean).sum())
        assert statistic < chi2.isf(1e-5, len(mean) - 1)


def weighted_error(design: MaskDesign, joint, estimate, weights) -> tuple[float, float]:
    """E[weighted loss on the rows of A] and E||h - x_0||^2, exactly, for an estimate h(B) of fixed clean units x_0."""
    a, b, p = batch(design, joint)
    gap = (estimate(b) - normal(design.num_units, seed=5)).square()
    return float(p @ (a * weights(a, b) * gap).sum(1)), float(p @ gap.sum(1))


def any_estimate(b: Tensor) -> Tensor:
    """A wrong, nonlinear function of which rows were kept."""
    return torch.tanh(b @ normal(b.shape[1], b.shape[1], seed=6) + b.sum(1, keepdim=True) - 2)


def test_inverse_probability_weights_are_unbiased(problem):
    """[15] E[sum_A w_i (h - x_0)_i^2] = E||h - x_0||^2 for any h of B; with unit weights it is not."""
    design, _, joint = problem
    found, expected = weighted_error(
        design, joint, any_estimate, lambda a, b: 1 / design.probability_units(a, b, KEEP)
    )
    assert abs(found - expected) < 1e-10
    plain, _ = weighted_error(design, joint, any_estimate, lambda a, b: torch.ones_like(a))
    assert abs(plain - expected) > 1e-2


def test_ensure_weights_are_biased_for_estimates_that_know_the_mask(problem):
    """[16] GSURE/ENSURE weights 1 / E[A_i] are unbiased if h ignores the mask, and only then."""
    design, law, joint = problem
    inclusion = sum(p * vector(a, design.num_units) for a, p in law.items())

    def fixed(b: Tensor) -> Tensor:
        return normal(b.shape[1], seed=7).expand_as(b)

    found, expected = weighted_error(design, joint, fixed, lambda a, b: 1 / inclusion.expand_as(a))
    assert abs(found - expected) < 1e-10
    found, expected = weighted_error(design, joint, any_estimate, lambda a, b: 1 / inclusion.expand_as(a))
    # With one budgeted line B is always empty, and every estimate ignores it.
    assert abs(found - expected) > 1e-2 or len({b for _, b in joint}) == 1


def test_independent_formula_is_wrong_for_a_fixed_budget():
    """[15] K_i = (1 - p_i) / (1 - p_i q) with the inclusion probabilities of a fixed-budget design is off by tenths."""
    keep = 2 / 3  # two of three budgeted lines
    design, (law, _) = PROBLEMS["variable density"]
    total = sum(law.values())
    inclusion = sum(p / total * vector(a, 6) for a, p in law.items())
    k = (1 - inclusion) / (1 - inclusion * keep)
    kept = torch.zeros(1, 6, dtype=F64)
    kept[0, [1, 4]] = 1.0  # two rare lines: one more is to be measured among the likely ones
    exact = design.probability_units(kept, kept, keep)[0]
    assert (exact - (1 - k))[kept[0] == 0].abs().max() > 0.1
    assert torch.isclose(exact[kept[0] == 0].sum(), torch.tensor(1.0, dtype=F64))  # exactly one is held out
    assert not torch.isclose((1 - k)[kept[0] == 0].sum(), torch.tensor(1.0, dtype=F64), atol=0.1)


def test_large_budgets_keep_their_precision():
    """320 lines with odds over four decades: probabilities sum to the number of lines held out, none outside [0, 1]."""
    odds = torch.logspace(-2, 2, 320, dtype=F64)[torch.randperm(320, generator=seeded(0))]
    design = FixedBudget((2, 4, 320), "columns", 80, odds, always=range(150, 170))
    a = design.to_units(design.sample(8, seeded(1))).double()
    assert torch.equal(a.sum(1), torch.full((8,), 100.0, dtype=F64))
    b = design.thin_units(a, 0.7, seeded(2))
    p = design.probability_units(a, b, 0.7)
    free = (b == 0) & ~design.always
    assert ((p * free).sum(1) - (80 - 56)).abs().max() < 1e-9
    assert p.min() > 0 and p.max() <= 1
