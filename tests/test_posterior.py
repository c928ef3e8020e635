"""Posterior reconstruction at the border: any linear operator, batches, noise levels, errors."""

from __future__ import annotations

import deepinv
import pytest
import torch
from posterior_problems import gaussian_problem, stationary_prior

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.operators import MRI, Identity, Masking
from ambient_sci.priors import ConditionalMean, GaussianPrior
from ambient_sci.sampling import MMPS, reconstruct


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(physics, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A as a dense matrix (rows, columns)."""
    n = int(torch.tensor(shape).prod())
    basis = torch.eye(n, dtype=dtype).reshape(n, *shape)
    return torch.stack([physics.A(e[None]).flatten() for e in basis], 1).double()


def exact_denoiser(prior: GaussianPrior, a: torch.Tensor, y, sigma_y: float, x, sigma: float) -> torch.Tensor:
    """E[x_0 | x_t = x, y] of a Gaussian prior: x_t is one more measurement, with A = I."""
    n = len(a.T)
    stacked = torch.cat([a, torch.eye(n)])
    noise = torch.cat([torch.full((len(a),), sigma_y**2), torch.full((n,), sigma**2)]).double()
    gain = prior.cov @ stacked.T @ torch.linalg.inv(stacked @ prior.cov @ stacked.T + torch.diag(noise))
    data = torch.cat([y.flatten(1), x.flatten(1)], 1)
    mean = prior.mean.flatten()
    return (mean + (data - stacked @ mean) @ gain.T).reshape(x.shape)


def physics_of(kind: str, dtype: torch.dtype = torch.float64):
    """A deepinv physics for 8 x 8 images, and their number of channels."""
    physics = deepinv.physics
    if kind.startswith("blur"):
        padding = "valid" if kind == "blur-valid" else "circular"
        return physics.Blur(filter=torch.ones(1, 1, 3, 3, dtype=dtype) / 9, padding=padding), 1
    if kind == "downsampling":
        return physics.Downsampling(img_size=(1, 8, 8), factor=2, filter="gaussian", padding="circular"), 1
    if kind == "tomography":
        return physics.Tomography(angles=5, img_width=8, circle=False, normalize=True), 1
    if kind == "inpainting":
        mask = (torch.rand(1, 8, 8, generator=generator(1)) < 0.5).to(dtype)
        return physics.Inpainting(img_size=(1, 8, 8), mask=mask), 1
    lines = torch.zeros(1, 1, 8, 8, dtype=dtype)
    lines[..., [0, 3, 4, 5]] = 1
    if kind == "mri":
        return physics.MRI(mask=lines, img_size=(8, 8)), 2
    maps = torch.randn(1, 3, 8, 8, dtype=dtype.to_complex(), generator=generator(2))
    return physics.MultiCoilMRI(mask=lines, coil_maps=maps, img_size=(8, 8)), 2


def precision_of(kind: str) -> torch.dtype:
    """These two of deepinv's work in single precision only."""
    return torch.float32 if kind in ("downsampling", "tomography") else torch.float64


KINDS = ["blur", "blur-valid", "downsampling", "tomography", "inpainting", "mri", "multi-coil mri"]


def real_prior(channels: int) -> GaussianPrior:
    full = stationary_prior(8, std=0.5)
    n = 64 * channels
    return GaussianPrior(full.mean[:channels], full.cov[:n, :n])


# -- any linear physics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.2, 2.0])
def test_mmps_is_the_exact_posterior_denoiser_for_deepinv_physics(kind, sigma):
    dtype = precision_of(kind)
    physics, channels = physics_of(kind, dtype)
    prior = real_prior(channels)
    x = prior.sample(3, generator())
    x_t = x + sigma * torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    y = physics.A(x.to(dtype))
    y = y + 0.1 * torch.randn(y.shape, generator=generator(1), dtype=dtype) * (y != 0)
    exact = exact_denoiser(prior, matrix(physics, prior.shape, dtype), y.double(), 0.1, x_t, sigma)
    single = dtype == torch.float32
    denoiser = MMPS(
        prior.to(dtype),
        physics,
        y,
        0.1,
        tolerance=1e-6 if single else 1e-10,
        max_iterations=50 if single else 200,
    )
    level = torch.full((3,), sigma, dtype=dtype)
    # In units of what the measurement changes. Single precision, and a tomography adjoint that is the
    # transpose up to interpolation.
    change = (prior(x_t.to(dtype), level).double() - exact).norm()
    assert (denoiser(x_t.to(dtype), level).double() - exact).norm() < (0.03 if single else 1e-6) * change


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruct_takes_deepinv_physics(kind):
    """The mean of 8 samples comes closer to the truth than the prior's mean, and float32 stays float32."""
    physics, channels = physics_of(kind, torch.float32)
    prior = real_prior(channels).float()
    x = prior.sample(2, generator(5))
    y = physics.A(x)
    result = reconstruct(
        prior, physics, y, 0.05, samples=8, steps=10, generator=generator(6), max_iterations=20
    )
    assert result.samples.shape == (8, 2, *prior.shape) and result.samples.dtype == torch.float32
    assert torch.isfinite(result.samples).all()
    assert (result.mean - x).norm() < 0.9 * (prior.mean - x).norm()
    assert (physics.A(result.mean) - y).norm() < 0.5 * (physics.A(prior.mean.expand_as(x)) - y).norm()


def test_physics_with_a_parameter_for_each_image():
    """A deepinv physics that holds a batch of masks serves samples x images chains, whatever the batch size."""
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    mask[0, ..., ::2] = 1
    mask[1, ..., :3] = 1
    theirs = deepinv.physics.Inpainting(img_size=(1, 8, 8), mask=mask)
    ours = Masking(mask, img_size=(1, 8, 8))
    prior = real_prior(1)
    y = ours.A(prior.sample(2, generator()))
    results = [
        reconstruct(prior, op, y, 0.1, samples=5, steps=6, batch_size=b, generator=generator(1))
        for op, b in ((ours, 64), (theirs, 64), (theirs, 1), (theirs, 4))
    ]
    for other in results[1:]:
        assert torch.allclose(results[0].samples, other.samples, atol=1e-8)


# -- batches and noise levels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_samples_do_not_depend_on_the_batch_size(kind):
    problem = gaussian_problem(kind, batch=3)
    results = [
        reconstruct(
            problem.prior,
            problem.operator,
            problem.y,
            0.1,
            samples=4,
            steps=8,
            batch_size=b,
            generator=generator(2),
        ).samples
        for b in (1, 5, 64)
    ]
    for other in results[1:]:
        assert torch.allclose(results[0], other, atol=1e-9)
    assert (results[0][0] - results[0][1]).abs().max() > 0.01


def test_images_do_not_couple():
    """An image reconstructed among others is what it is alone, even beside one a thousand times brighter."""
    problem = gaussian_problem("mri", batch=2)
    y = problem.y.clone()
    y[1] *= 1000
    level = torch.full((1,), 1.0, dtype=torch.float64)
    x = torch.randn(2, 2, 8, 8, generator=generator(), dtype=torch.float64)
    together = MMPS(problem.prior, problem.operator, y, 0.1)(x, level.expand(2))
    alone = MMPS(problem.prior, problem.operator[0], y[:1], 0.1)(x[:1], level)
    assert torch.allclose(together[:1], alone, atol=1e-10)


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_noiseless_measurements_are_met_exactly(kind):
    problem = gaussian_problem(kind, sigma_y=0.0)
    result = reconstruct(
        problem.prior,
        problem.operator,
        problem.y,
        0.0,
        samples=3,
        steps=12,
        generator=generator(),
        max_iterations=60,
        tolerance=1e-8,
    )
    for sample in result.samples:
        assert (problem.operator.A(sample) - problem.y).abs().max() < 1e-4
    assert result.std.mean() > 0.05


def test_each_image_has_its_own_noise_level():
    problem = gaussian_problem("masking", batch=2)
    levels = torch.tensor([0.05, 0.5], dtype=torch.float64)
    both = reconstruct(
        problem.prior, problem.operator, problem.y, levels, samples=2, steps=8, generator=generator(4)
    )
    for i in range(2):
        same = reconstruct(
            problem.prior,
            problem.operator,
            problem.y,
            float(levels[i]),
            samples=2,
            steps=8,
            generator=generator(4),
        )
        assert torch.allclose(both.samples[:, i], same.samples[:, i], atol=1e-9)
    assert not torch.allclose(both.samples[:, 0], same.samples[:, 0], atol=1e-3)


def test_values_outside_the_mask_are_ignored():
    problem = gaussian_problem("mri")
    junk = problem.y + (1 - problem.operator.mask) * 100.0
    results = [
        reconstruct(problem.prior, problem.operator, y, 0.1, samples=2, steps=6, generator=generator())
        for y in (problem.y, junk)
    ]
    assert torch.allclose(results[0].samples, results[1].samples)


def test_identity_needs_no_mask():
    prior = real_prior(1)
    y = prior.sample(2, generator()) + 0.3 * torch.randn(
        2, 1, 8, 8, generator=generator(1), dtype=torch.float64
    )
    result = reconstruct(
        prior, Identity((1, 8, 8)), y, 0.3, samples=200, steps=20, generator=generator(2), max_iterations=30
    )
    exact, cov = prior.posterior(Identity((1, 8, 8)), y, 0.3)
    error = (result.mean - exact).square().sum() * 200 / cov.diagonal(dim1=1, dim2=2).sum()
    assert error.sqrt() < 1.3


# -- errors ------------------------------------------------------------------------------------------------------------------


class Squared(deepinv.physics.Physics):
    """A physics that is not linear."""

    def A(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return x**2


def test_bad_input_is_named():
    problem = gaussian_problem("masking")
    prior, operator, y = problem.prior, problem.operator, problem.y
    cases = [
        ((prior, Squared(), y, 0.1), {}, "linear"),
        ((prior, operator, y[:, :, :4], 0.1), {}, "measurements"),
        ((prior, operator, y, None), {}, "sigma_y"),
        ((prior, operator, y, -0.1), {}, "sigma_y"),
        ((prior, operator, y, torch.tensor([0.1, 0.1, 0.1])), {}, "sigma_y"),
        ((prior, operator, torch.full_like(y, float("nan")), 0.1), {}, "finite"),
        ((prior, operator, y.to(torch.int64), 0.1), {}, "floating"),
        ((real_prior(1), operator, y, 0.1), {}, "shape"),
        ((prior, operator, y, 0.1), {"sampler": "langevin"}, "sampler"),
        ((prior, operator, y, 0.1), {"samples": 0}, "samples"),
        ((prior, operator, y, 0.1), {"unknown_option": 3}, "unknown_option"),
        ((prior, operator, y, 0.1), {"steps": 1}, "steps"),
        ((prior, operator, y, 0.1), {"sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            reconstruct(*arguments, **settings)
        assert "\n" not in str(caught.value)


def test_a_foreign_physics_of_the_wrong_size_is_named():
    physics, _ = physics_of("downsampling", torch.float32)
    with pytest.raises(InputError, match="shape|fit"):
        reconstruct(real_prior(1), physics, torch.zeros(1, 1, 8, 8), 0.1)


def test_a_prior_of_the_wrong_kind_is_refused():
    problem = gaussian_problem("masking")
    conditional = ConditionalMean(problem.prior, problem.operator)
    with pytest.raises(ConditioningError, match="unconditional"):
        reconstruct(conditional, problem.operator, problem.y, 0.1)
    with pytest.raises(ConditioningError, match="mask-conditional"):
        reconstruct(problem.prior, problem.operator, problem.y, 0.1, sampler="one-step")


def test_unfinished_solves_are_reported_with_their_residual():
    problem = gaussian_problem("mri", sigma_y=0.01)
    settings = {"samples": 2, "steps": 6, "generator": generator()}
    starved = reconstruct(
        problem.prior, problem.operator, problem.y, 0.01, max_iterations=1, tolerance=1e-6, **settings
    )
    assert starved.report["solves_above_tolerance"] > 0
    assert starved.report["worst_relative_residual"] > 1e-6
    assert 0 < starved.report["worst_relative_residual"] <= 1
    fed = reconstruct(
        problem.prior, problem.operator, problem.y, 0.01, max_iterations=128, tolerance=1e-6, **settings
    )
    assert fed.report["solves_above_tolerance"] == 0 and "notes" not in fed.report


class Broken(GaussianPrior):
    """A prior whose Jacobian is anything but symmetric positive definite."""

    def forward(self, x, sigma, given=None):
        return super().forward(x, sigma) + 0.5 * torch.roll(x, 1, -1) - 0.8 * torch.sin(3 * x.flip(-2))


def test_a_jacobian_that_is_no_covariance_gives_no_nan():
    problem = gaussian_problem("mri")
    prior = Broken(problem.prior.mean, problem.prior.cov)
    result = reconstruct(prior, problem.operator, problem.y, 0.1, samples=4, steps=10, generator=generator())
    assert torch.isfinite(result.samples).all()
    assert result.report["solves_above_tolerance"] > 0 and result.report["worst_relative_residual"] <= 1


# -- mask-conditional priors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_one_step_is_the_posterior_mean(kind):
    problem = gaussian_problem(kind)
    conditional = ConditionalMean(problem.prior, problem.operator)
    result = reconstruct(conditional, problem.operator, problem.y, problem.sigma_y, sampler="one-step")
    assert torch.allclose(result.mean, problem.mean, atol=1e-8)
    assert result.samples.shape[0] == 1 and (result.std == 0).all()


def test_one_step_needs_an_operator_of_ours():
    problem = gaussian_problem("masking")
    physics, _ = physics_of("mri")
    with pytest.raises(InputError, match="operator"):
        reconstruct(
            ConditionalMean(problem.prior, problem.operator), physics, problem.y, 0.1, sampler="one-step"
        )


def test_multi_coil_measurements():
    """Sensitivities that vary over the image and over the batch; the exact posterior by dense algebra."""
    g = generator(3)
    maps = torch.randn(2, 3, 8, 8, dtype=torch.complex128, generator=g)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    lines = torch.zeros(8, 8, dtype=torch.float64)
    lines[:, ::3] = 1
    operator = MRI(lines, coil_maps=maps)
    prior = stationary_prior(8)
    y = operator.A(prior.sample(2, g))
    y = y + 0.1 * operator.mask * torch.randn(y.shape, generator=g, dtype=torch.float64)
    mean, cov = prior.posterior(operator, y, 0.1)
    result = reconstruct(
        prior,
        operator,
        y,
        0.1,
        samples=64,
        steps=20,
        generator=generator(4),
        max_iterations=30,
        tolerance=1e-4,
    )
    error = (result.mean - mean).square().sum() * 64 / cov.diagonal(dim1=1, dim2=2).sum()
    assert error.sqrt() < 1.25


@pytest.mark.parametrize("fault", ["adjoint", "sign", "square", "shape"])
def test_a_foreign_physics_is_looked_at_once(fault):
    """Its adjoint and its linearity; posteriors would come out wrong and no residual show it. What is right passes in single precision."""

    class Half(deepinv.physics.LinearPhysics):
        def A(self, x, **_):
            if fault == "square":
                return x[..., ::2] ** 2
            return x if fault == "shape" else 2 * x[..., ::2]

        def A_adjoint(self, y, **_):
            if fault == "adjoint":  # interpolation instead of zero filling
                return torch.nn.functional.interpolate(y, scale_factor=(1, 2), mode="nearest")
            x = torch.zeros(*y.shape[:-1], 2 * y.shape[-1], dtype=y.dtype)
            x[..., ::2] = -2 * y if fault == "sign" else 2 * y
            return x

    prior, y = GaussianPrior(torch.zeros(1, 8, 8), torch.eye(64)), torch.ones(2, 1, 8, 4)
    expected = {"square": "linear A", "shape": "the shape of the measurements"}.get(fault, "the adjoint of A")
    with pytest.raises(InputError, match=expected):
        reconstruct(prior, Half(), y, 0.1, samples=1, steps=2)
    fault = "none"
    reconstruct(prior, Half(), y, 0.1, samples=1, steps=2)
