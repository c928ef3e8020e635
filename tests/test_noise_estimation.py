"""Noise level estimates against known levels; whitening against known covariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ambient_sci.data import brains
from ambient_sci.data.noise_estimation import (
    WHITENED_SIGMA,
    estimate_kspace_noise,
    estimate_noise,
    kspace_corners,
    noise_covariance,
    whiten,
    whitening_matrix,
)
from ambient_sci.errors import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def complex_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard deviation 1 per real channel."""
    return torch.view_as_complex(torch.randn(*shape, 2, generator=generator(seed), dtype=torch.float64))


def smooth_image(size: int = 48) -> torch.Tensor:
    v = torch.linspace(-1, 1, size)
    return torch.exp(-(v[:, None] ** 2 + v[None] ** 2))[None, None]


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_smooth_images_within_four_standard_errors(sigma: float, seed: int):
    # |z| > 4 has probability 6e-5 for each of the six cases; the standard error is itself known to about 20
    # %.
    images = smooth_image().expand(20, -1, -1, -1)
    found = estimate_noise(images + sigma * torch.randn(images.shape, generator=generator(seed)))
    assert abs(found.sigma - sigma) < 4 * found.standard_error
    assert found.standard_error < 0.02 * sigma


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.05, 0.08), (0.1, 0.04), (0.3, 0.01)])
def test_real_heads_are_estimated_from_above_within_the_stated_tolerance(sigma: float, tolerance: float):
    images = brains("train")[0][::4]
    found = estimate_noise(images + sigma * torch.randn(images.shape, generator=generator()))
    assert sigma * 0.99 < found.sigma < sigma * (1 + tolerance)


def test_standard_error_is_the_spread_over_repetitions():
    estimates = [estimate_noise(torch.randn(32, 1, 24, 24, generator=generator(s))) for s in range(60)]
    spread = np.std([e.sigma for e in estimates])
    claimed = np.mean([e.standard_error for e in estimates])
    # The relative error of a standard deviation from 60 draws is 9 %; 35 % is four of those.
    assert claimed == pytest.approx(spread, rel=0.35)


def test_complex_images_give_the_level_per_real_channel():
    images = smooth_image().expand(16, 2, -1, -1) + 0.1 * torch.randn(16, 2, 48, 48, generator=generator())
    assert estimate_noise(images).sigma == pytest.approx(0.1, rel=0.03)


def test_padding_and_noise_free_images_do_not_count():
    image = smooth_image(32) + 0.1 * torch.randn(30, 1, 32, 32, generator=generator())
    padded = torch.nn.functional.pad(image, (64, 64, 64, 64))
    assert estimate_noise(padded).sigma == pytest.approx(0.1, rel=0.05)
    assert estimate_noise(torch.full((1, 1, 32, 32), 0.7)) == (0.0, 0.0)


@pytest.mark.parametrize("images", [torch.ones(1, 1, 3, 8), torch.full((1, 1, 8, 8), math.nan)])
def test_images_that_hold_no_estimate_are_refused(images: torch.Tensor):
    with pytest.raises(InputError, match="noise level"):
        estimate_noise(images)


def test_kspace_corners_give_the_level_of_measured_samples():
    # Signal only in the centre, noise everywhere; a mask drops every other column.
    kspace = 0.2 * complex_noise(4, 3, 48, 48)
    kspace[..., 20:28, 20:28] += 50
    mask = torch.zeros(1, 48, 48)
    mask[..., ::2] = 1
    found = estimate_kspace_noise(kspace * mask[:, None], mask)
    assert abs(found.sigma - 0.2) < 4 * found.standard_error < 0.05
    assert estimate_kspace_noise(kspace * mask[:, None]).sigma == found.sigma  # zeros count as not measured


def test_kspace_without_measured_corners_is_refused():
    mask = torch.zeros(1, 16, 16)
    mask[..., 6:10] = 1
    with pytest.raises(InputError, match="corners"):
        kspace_corners(complex_noise(1, 2, 16, 16), mask)


def test_whitened_noise_has_unit_complex_variance_and_no_correlation():
    mixing = complex_noise(4, 4, seed=3) + 3 * torch.eye(4)
    noise_scan = mixing @ complex_noise(4, 20000, seed=1)
    matrix = whitening_matrix(noise_covariance(noise_scan))
    fresh = (mixing @ complex_noise(4, 64 * 64, seed=2)).reshape(1, 4, 64, 64)
    white = whiten(fresh, matrix)
    covariance = noise_covariance(white[0])
    # Entries of a covariance from n = 4096 samples have standard error 1/64; 5 of them.
    assert torch.allclose(covariance, torch.eye(4, dtype=covariance.dtype), atol=5 / 64)
    assert float(torch.view_as_real(white).std()) == pytest.approx(WHITENED_SIGMA, rel=0.03)


def test_whitening_does_not_depend_on_how_long_the_noise_scan_is():
    # Left out, the 1/n of the covariance would shrink whitened noise by the square root of ten.
    short, long = complex_noise(2, 2000, seed=1), complex_noise(2, 20000, seed=2)
    scales = [float(whitening_matrix(noise_covariance(n)).diagonal().real.mean()) for n in (short, long)]
    assert scales[0] == pytest.approx(scales[1], rel=0.05) == pytest.approx(WHITENED_SIGMA, rel=0.05)


def test_bad_noise_scans_are_refused():
    with pytest.raises(InputError, match="at least 16 samples for 4 coils"):
        noise_covariance(complex_noise(4, 12))
    dead = complex_noise(3, 200)
    dead[1] = dead[0]
    with pytest.raises(InputError, match="positive definite"):
        whitening_matrix(noise_covariance(dead))
