"""The published baseline for masked data, and what is wrong with it."""

from __future__ import annotations

import pytest
import torch
from closed_forms import F64, random_mask, seeded

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.operators import Masking
from ambient_sci.priors import ConditionalMean, GaussianPrior
from ambient_sci.sampling import generate_fixed_mask

SHAPE = (1, 1, 3)
COV = torch.tensor([[1.0, 0.6, 0.3], [0.6, 1.0, 0.5], [0.3, 0.5, 1.0]], dtype=F64)


def draw(mask, num: int = 4000, **options) -> torch.Tensor:
    prior = GaussianPrior(torch.full(SHAPE, 2.0, dtype=F64), COV)
    operator = Masking(torch.as_tensor(mask, dtype=F64).reshape(-1, *SHAPE), img_size=SHAPE).to(F64)
    options = {"steps": 30, "batch_size": 1000, "generator": seeded(), **options}
    return generate_fixed_mask(ConditionalMean(prior, operator), operator, num, **options)


def test_one_missing_coordinate_leaves_a_rank_deficient_covariance():
    """Kept coordinates get their law (covariance to 4 standard errors, .023 each, and the sampler's 2 %); the missing one is a linear
    function of them, E[x_3 | x_1, x_2], and its own variance is lost."""
    x = draw([1, 1, 0]).flatten(1)
    cov = x.T.cov()
    assert torch.allclose(cov[:2, :2], COV[:2, :2], atol=0.11)
    values = torch.linalg.eigvalsh(cov)
    assert float(values[0]) < 1e-6 * float(values[1])
    gain = torch.linalg.solve(COV[:2, :2], COV[:2, 2])
    assert torch.allclose(x[:, 2] - 2, (x[:, :2] - 2) @ gain, atol=0.02)
    assert torch.allclose(x.mean(0), torch.full((3,), 2.0, dtype=F64), atol=0.1)


def test_nothing_missing_is_ordinary_sampling():
    assert torch.allclose(draw([1, 1, 1]).flatten(1).T.cov(), COV, atol=0.11)


def test_each_chain_has_its_mask_whatever_the_batch():
    mask = random_mask(3, *SHAPE, keep=0.5)
    assert torch.allclose(draw(mask, 7, batch_size=2), draw(mask, 7, batch_size=7), atol=1e-12)


def test_what_is_refused():
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=F64), COV)
    operator = Masking(torch.ones(1, *SHAPE), img_size=SHAPE)
    with pytest.raises(ConditioningError, match="mask-conditional"):
        generate_fixed_mask(prior, operator, 2)
    with pytest.raises(InputError, match="num"):
        draw([1, 1, 0], 0)
    with pytest.raises(InputError, match="sampler"):
        draw([1, 1, 0], 2, sampler="euler")
