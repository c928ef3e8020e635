"""Posterior samplers against exact posteriors.

Statistical tests draw S = 256 samples of each of B images with 128 unknowns. The squared error of the sample mean, over its floor tr C / S, is
then a weighted mean of 128 B chi-squares: with an effective number of about 60 B terms the ratio asserted below 1.15 has a standard error of
at most .06 / sqrt(B / 2). A variance ratio averaged over K coordinates has standard error sqrt(2 / (S K)) <= .015.
"""

from __future__ import annotations

import pytest
import torch
from posterior_problems import gaussian_problem

from ambient_sci.sampling import reconstruct

SAMPLES = 256


def check(scores: dict[str, float], mean: float = 1.15, low: float = 0.95, high: float = 1.05) -> None:
    """The bars of an exact sampler."""
    assert scores["mean"] < mean, scores
    assert low < scores["observed"] < high, scores
    assert low < scores["unobserved"] < high, scores


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_mmps_is_exact_on_gaussian_priors(kind):
    problem = gaussian_problem(kind)
    result = reconstruct(
        problem.prior,
        problem.operator,
        problem.y,
        problem.sigma_y,
        samples=SAMPLES,
        steps=40,
        max_iterations=30,
        tolerance=1e-4,
        generator=torch.Generator().manual_seed(0),
    )
    check(problem.scores(result.samples))
    assert result.report["solves_stopped_by_guard"] == 0
