r"""Noise processes and their adapters, training levels, level grids, the step between levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import F64, mixture_prior, normal, seeded
from scipy.stats import kstest, norm

from ambient_sci.errors import InputError
from ambient_sci.noise import (
    ChainNoise,
    Concentrated,
    LogNormal,
    LogUniform,
    ancestral_step,
    draw_noise,
    expand,
    karras_grid,
    prediction_from_sample,
    sample_from_prediction,
    ve_to_vp,
    vp_alpha,
    vp_to_ve,
)

# -- levels and noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "shape"),
    [
        (0.3, (1, 1, 1, 1)),
        (torch.tensor(0.3), (1, 1, 1, 1)),
        (torch.tensor([0.3]), (1, 1, 1, 1)),
        (torch.tensor([0.3, 0.4]), (2, 1, 1, 1)),
        (torch.tensor([0.3, 0.4]).reshape(2, 1, 1, 1), (2, 1, 1, 1)),
    ],
)
def test_levels_broadcast_over_samples_and_never_over_columns(level, shape):
    """Also where the width equals the batch, which plain broadcasting would take for it."""
    assert expand(level, torch.zeros(2, 3, 4, 2)).shape == shape
    assert expand(level, torch.zeros(2, 3, 4, 2, dtype=F64)).dtype == F64


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 3, 4, 2), (2, 1, 1, 2), (1, 3, 1, 1)])
def test_levels_that_differ_by_entry_pass(shape):
    """Noise of the shape of the image, of its channels, or of its columns: each entry gets its own."""
    level = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(expand(level, torch.zeros(2, 3, 4, 2, dtype=torch.float64)), level)


@pytest.mark.parametrize(
    "level", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(2, 1, 1, 3), torch.zeros(3, 3, 4, 2)]
)
def test_levels_of_another_batch_are_refused(level):
    with pytest.raises(InputError, match="one value or one per sample \\(2\\)"):
        expand(level, torch.zeros(2, 3, 4, 2))


def test_noise_is_decided_by_its_generator():
    like = torch.zeros(3, 2, 4, dtype=F64)
    a, b = (draw_noise(like, seeded(1)) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == F64 and a.shape == like.shape
    assert not torch.equal(a, draw_noise(like, seeded(2)))
    before = torch.get_rng_state()
    draw_noise(like, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_chains_have_streams_of_their_own():
    """A chain's noise does not depend on what it is batched with; successive draws differ."""
    like = torch.zeros(3, 4, 5)
    together = ChainNoise([7, 8, 9])
    first, second = draw_noise(like, together), draw_noise(like, together)
    alone = ChainNoise([8])
    assert torch.equal(draw_noise(like[:1], alone)[0], first[1])
    assert torch.equal(draw_noise(like[:1], alone)[0], second[1])
    assert not torch.equal(first, second)


# -- adapters ----------------------------------------------------------------------------------------------------------------


def test_processes_round_trip():
    x, sigma = normal(4, 2, 3, 3), torch.tensor([0.0, 0.3, 0.9, 0.999], dtype=F64)
    ve = vp_to_ve(x, sigma)
    assert torch.allclose(ve[1], sigma / (1 - sigma**2).sqrt())
    again = ve_to_vp(*ve)
    assert torch.allclose(again[0], x, atol=1e-12) and torch.allclose(again[1], sigma, atol=1e-12)
    assert torch.allclose(vp_alpha(again[1]) ** 2 + again[1] ** 2, torch.ones(4, dtype=F64))


def test_processes_have_one_posterior():
    """A VP state alpha x_0 + sigma z divided by alpha is x_0 + (sigma / alpha) z: simulated, not by the formula under test."""
    x0, z, sigma = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1), 0.6
    x, level = vp_to_ve(0.8 * x0 + sigma * z, sigma)
    assert torch.allclose(x, x0 + 0.75 * z) and float(level) == pytest.approx(0.75)


@pytest.mark.parametrize("sigma", [1.0, 1.5, -0.1])
def test_no_ve_state_at_pure_noise(sigma):
    with pytest.raises(InputError, match="0 <= sigma < 1"):
        vp_to_ve(normal(2, 1, 2, 2), sigma)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v"])
def test_predictions_round_trip(kind):
    x0, x, sigma = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1), torch.tensor([0.1, 0.6, 0.95], dtype=F64)
    prediction = prediction_from_sample(x0, x, sigma, kind)
    assert torch.allclose(sample_from_prediction(prediction, x, sigma, kind), x0, atol=1e-12)


def test_predictions_by_definition():
    """epsilon is the noise that was added; v = alpha epsilon - sigma x_0."""
    x0, z, sigma, alpha = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1), 0.6, 0.8
    x = alpha * x0 + sigma * z
    assert torch.allclose(prediction_from_sample(x0, x, sigma, "epsilon"), z)
    assert torch.allclose(prediction_from_sample(x0, x, sigma, "v"), alpha * z - sigma * x0)
    for convert in (prediction_from_sample, sample_from_prediction):
        with pytest.raises(InputError, match="'sample', 'epsilon' or 'v'"):
            convert(x0, x, sigma, "score")


# -- training levels ---------------------------------------------------------------------------------------------------------

LOW, HIGH = 0.05, 8.0
DISTRIBUTIONS = {
    "log-uniform": (LogUniform(HIGH), lambda s: np.log(s / LOW) / math.log(HIGH / LOW)),
    "log-normal": (
        LogNormal(-1.0, 1.1, HIGH),
        lambda s: (
            (norm.cdf((np.log(s) + 1) / 1.1) - norm.cdf((math.log(LOW) + 1) / 1.1))
            / (norm.cdf((math.log(HIGH) + 1) / 1.1) - norm.cdf((math.log(LOW) + 1) / 1.1))
        ),
    ),
    "concentrated": (Concentrated(HIGH, 2.0), lambda s: (np.log(s / LOW) / math.log(HIGH / LOW)) ** 0.5),
}


@pytest.fixture(params=DISTRIBUTIONS)
def levels(request):
    return DISTRIBUTIONS[request.param]


def test_levels_follow_their_distribution(levels):
    """Kolmogorov-Smirnov against the stated distribution function, 20,000 draws, false alarm rate 1e-6."""
    distribution, cdf = levels
    sigma = distribution.sample(20_000, minimum=LOW, generator=seeded(3))
    assert sigma.shape == (20_000,) and bool(((sigma >= LOW) & (sigma <= HIGH)).all())
    assert kstest(cdf(sigma.numpy()), "uniform").pvalue > 1e-6


def test_levels_start_at_the_noise_of_each_sample(levels):
    distribution, _ = levels
    minimum = torch.linspace(0, 7.9, 5_000)
    sigma = distribution.sample(5_000, minimum=minimum, generator=seeded(1))
    assert bool((sigma >= minimum).all()) and bool((sigma >= distribution.floor).all())
    assert bool((sigma <= HIGH).all()) and sigma.dtype == torch.float32
    assert torch.equal(sigma, distribution.sample(5_000, minimum=minimum, generator=seeded(1)))
    assert not torch.equal(sigma, distribution.sample(5_000, minimum=minimum, generator=seeded(2)))


@pytest.mark.parametrize("minimum", [0.7, torch.full((200_000,), 0.7, dtype=F64)])
def test_levels_are_not_rounded_below_the_noise_of_the_data(levels, minimum):
    """.7 in single precision is less than .7: such a level would be refused by the loss once in some ten thousand draws."""
    sigma = levels[0].sample(200_000, minimum=minimum, generator=seeded(1))
    assert sigma.dtype == F64 and bool((sigma >= 0.7).all())


def test_concentrated_levels_stay_near_the_data():
    sigma = Concentrated(10.0).sample(4_000, minimum=0.3, generator=seeded(0))
    plain = LogUniform(10.0).sample(4_000, minimum=0.3, generator=seeded(0))
    assert float((sigma < 0.6).float().mean()) > 1.8 * float((plain < 0.6).float().mean())


def test_levels_need_room_above_the_data(levels):
    for minimum in (HIGH, HIGH + 1, torch.tensor([0.1, 9.0])):
        with pytest.raises(InputError, match="sigma_max above the noise of the data"):
            levels[0].sample(2, minimum=minimum)
    with pytest.raises(InputError, match="one per sample \\(2\\)"):
        levels[0].sample(2, minimum=torch.zeros(3))


# -- grids and steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "low", "high", "rho"), [(2, 0.1, 1.0, 7.0), (18, 0.002, 80.0, 7.0), (40, 0.3, 10.0, 3.0)]
)
def test_karras_grid(steps, low, high, rho):
    """Ends met exactly, strictly decreasing, evenly spaced in sigma^(1/rho)."""
    grid = karras_grid(steps, low, high, rho)
    assert grid.shape == (steps,) and grid.dtype == F64
    assert float(grid[0]) == high and float(grid[-1]) == low
    assert bool((grid.diff() < 0).all())
    spacing = (grid ** (1 / rho)).diff()
    assert torch.allclose(spacing, spacing[0].expand_as(spacing), rtol=1e-8)


@pytest.mark.parametrize(
    ("steps", "low", "high"), [(1, 0.1, 1.0), (5, 0.0, 1.0), (5, -0.1, 1.0), (5, 1.0, 1.0), (5, 2.0, 1.0)]
)
def test_impossible_grids(steps, low, high):
    with pytest.raises(InputError, match="steps >= 2 and 0 < sigma_min < sigma_max"):
        karras_grid(steps, low, high)


def test_ancestral_step_is_the_exact_conditional():
    """Mean and variance of x_s given x_t and x_0 by conditioning the joint Gaussian of (x_s, x_t), x_t = x_s + N(0, t^2 - s^2)."""
    x0, x_t, t, s = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1), 0.9, 0.4
    gain = s**2 / (s**2 + (t**2 - s**2))
    mean, variance = x0 + gain * (x_t - x0), s**2 - gain * s**2
    noise = normal(3, 1, 2, 2, seed=2)
    found = ancestral_step(x_t, x0, t, s, noise=noise)
    assert torch.allclose(found, mean + variance**0.5 * noise, atol=1e-12)
    assert torch.allclose(
        ancestral_step(x_t, x0, t, s, generator=seeded(5)), mean + variance**0.5 * draw_noise(x_t, seeded(5))
    )


def test_ancestral_step_at_its_ends_and_for_each_sample():
    prior, x = mixture_prior((1, 2, 2)), normal(3, 1, 2, 2)
    d, t = prior(x, 0.8), 0.8
    assert torch.allclose(ancestral_step(x, d, t, t, generator=seeded(0)), x)
    assert torch.equal(ancestral_step(x, d, t, 0.0, generator=seeded(0)), d)
    s = torch.tensor([0.1, 0.4, 0.8], dtype=F64)
    noise = normal(3, 1, 2, 2, seed=2)
    together = ancestral_step(x, d, torch.full((3,), t, dtype=F64), s, noise=noise)
    for i in range(3):
        assert torch.allclose(together[i], ancestral_step(x, d, t, float(s[i]), noise=noise)[i])
