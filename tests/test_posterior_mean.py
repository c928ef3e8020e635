"""The posterior mean is a mean: conditional means, the law of total variance, a control from opposite noise."""

from __future__ import annotations

import pytest
import torch
from posterior_problems import GaussianProblem, gaussian_problem
from test_posterior import physics_of, real_prior
from torch import Tensor

from ambient_sci.data import MeasurementFile, write_measurements
from ambient_sci.noise import ChainNoise
from ambient_sci.sampling import (
    MMPS,
    POSTERIOR_SAMPLERS,
    Reconstruction,
    ResultFile,
    ResultWriter,
    reconstruct,
    reconstruct_to_file,
)
from ambient_sci.sampling.moments import Moments
from ambient_sci.sampling.notes import BIAS_NOTED
from ambient_sci.sampling.problem import Draws

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


# -- the estimators ----------------------------------------------------------------------------------------


def moments_of(samples: Tensor, means: Tensor | None = None, controls: Tensor | None = None) -> Moments:
    found = Moments()
    for k in range(len(samples)):
        found.add(*(None if x is None else x[k] for x in (samples, means, controls)))
    return found


@pytest.mark.parametrize("num", [2, 4])
def test_the_variance_is_unbiased_however_few_samples_there_are(num):
    """x = m + e, Var m = 1, Var e = 0.5: on average 1.5 at any number of samples; the sample variance of m
    alone, or a wrong denominator, would be off by a third at the least."""
    means = 3 + normal(num, 400, 1, 16, 16, seed=1)
    samples = means + 0.5**0.5 * normal(num, 400, 1, 16, 16, seed=2)
    found = moments_of(samples, means)
    assert torch.allclose(found.std().square().mean(), torch.tensor(1.5).double(), rtol=0.02)
    assert torch.allclose(found.mean(), means.mean(0))
    # It varies less than the sample variance of the draws: 2 (1 + .25) against 2 (1.5)^2 at two samples.
    assert found.std().square().var() < 0.85 * samples.var(0).var()


def test_without_conditional_means_they_are_the_usual_ones():
    samples = 2 + normal(5, 3, 2, 4, 4, seed=1)
    found = moments_of(samples)
    assert torch.allclose(found.mean(), samples.mean(0)) and torch.allclose(found.std(), samples.std(0))
    one = moments_of(samples[:1], samples[:1] + 1)
    assert torch.equal(one.std(), torch.zeros(3, 2, 4, 4, dtype=F64))
    assert torch.allclose(one.mean(), samples[0] + 1)


def test_a_control_takes_off_what_it_shares_with_the_means():
    """m = mu + z + w, c = 2 z: all of z goes, w stays, and the expectation too; a control that has nothing to
    do with m does no harm."""
    num, shape = 4, (200, 1, 12, 12)
    z, w = normal(num, *shape, seed=1), 0.3 * normal(num, *shape, seed=2)
    means = 5 + z + w
    plain, controlled = moments_of(means, means).mean(), moments_of(means, means, 2 * z).mean()
    assert torch.allclose((plain - 5).square().mean() * num, torch.tensor(1.09).double(), rtol=0.03)
    assert torch.allclose((controlled - 5).square().mean() * num, torch.tensor(0.09).double(), rtol=0.1)
    assert abs(float((controlled - 5).mean())) < 4 * 0.3 / (num * controlled.numel()) ** 0.5
    foreign = moments_of(means, means, normal(num, *shape, seed=3)).mean()
    assert (foreign - 5).square().mean() < 1.03 * (plain - 5).square().mean()
    assert torch.equal(moments_of(means, means, -z).mean(), plain)  # no negative weights


# -- MMPS --------------------------------------------------------------------------------------------------


class Opposite(ChainNoise):
    """The same streams with the other sign."""

    def draw(self, like: Tensor) -> Tensor:
        return -super().draw(like)


@pytest.mark.parametrize("products", [1, 2, 5])
def test_the_mean_is_that_of_the_draws_however_early_a_solve_ends(products):
    """Draws from opposite noise have the conditional mean in the middle, to rounding."""
    problem = gaussian_problem("masking", batch=3)
    level = torch.full((3,), 0.5, dtype=F64)
    x = normal(3, 2, 8, 8, seed=1)
    denoiser = MMPS(problem.prior, problem.operator, problem.y, 0.1, max_iterations=products)
    seeds = [4, 5, 6]
    mean, one = denoiser.mean_and_draw(x, level, ChainNoise(seeds))
    same, other = denoiser.mean_and_draw(x, level, Opposite(seeds))
    assert torch.equal(mean, same) and torch.allclose(mean, denoiser(x, level), atol=1e-12)
    assert torch.allclose((one + other) / 2, mean, atol=1e-10)
    assert (one - mean).abs().mean() > 0.05


def error(problem: GaussianProblem, mean: Tensor) -> float:
    """Squared error of a posterior mean, in posterior variances."""
    exact = problem.cov.diagonal(dim1=1, dim2=2).mean()
    return float((mean - problem.mean.reshape(mean.shape)).square().mean() / exact)


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_four_samples_make_a_posterior_mean(kind):
    """Of draws it errs by V / 4; of conditional means by less; and with opposite noise by next to nothing, on
    Gaussian posteriors."""
    problem = gaussian_problem(kind, batch=12)
    settings = {"samples": 4, "sigma_min": 0.6, "tolerance": 1e-4, "max_iterations": 12}
    found, without = (
        reconstruct(
            problem.prior, problem.operator, problem.y, 0.1, antithetic=a, generator=generator(), **settings
        )
        for a in (True, False)
    )
    assert found.report["mean_of"] == "conditional means" and found.report["final"] == "draw"
    assert torch.equal(found.samples, without.samples)
    draws, conditional = error(problem, found.samples.mean(0)), error(problem, without.mean)
    assert 0.2 < draws < 0.32 and conditional < 0.85 * draws
    assert error(problem, found.mean) < 0.2 * conditional


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_std_is_the_posterior_standard_deviation_at_two_samples(kind):
    problem = gaussian_problem(kind, batch=24)
    result = reconstruct(
        problem.prior, problem.operator, problem.y, 0.1, samples=2, sigma_min=0.3, steps=20, tolerance=1e-4,
        max_iterations=12, generator=generator(1),
    )  # fmt: skip
    exact = problem.cov.diagonal(dim1=1, dim2=2).mean()
    assert torch.allclose(result.std.square().mean(), exact, rtol=0.06)


def test_a_mean_of_what_has_no_spread_left_is_told_from_draws():
    """Ending with means, samples are what is averaged."""
    problem = gaussian_problem("mri")
    result = reconstruct(
        problem.prior, problem.operator, problem.y, 0.1, samples=3, sigma_min=0.3, final="mean",
        antithetic=False, generator=generator(),
    )  # fmt: skip
    assert torch.allclose(result.mean, result.samples.mean(0))
    assert torch.allclose(result.std, result.samples.std(0))


# -- every sampler -----------------------------------------------------------------------------------------

SETTINGS = {
    "mmps": {"sigma_min": 0.2},
    "daps": {"steps": 30},
    "smc": {"steps": 40, "particles": 128},
    "pnp-dm": {"steps": 30, "sigma_min": 0.1, "coupling": 0.2},
    "pigdm": {"steps": 30},
    "dps": {"steps": 30},
}


@pytest.mark.parametrize("sampler", SETTINGS)
def test_mean_and_draws_of_every_sampler_agree(sampler):
    """Both estimate one mean: they differ by no more than their noise; SMC's, of the whole population, errs
    less than draws do."""
    problem = gaussian_problem("masking", batch=2, size=4)
    result = reconstruct(
        problem.prior, problem.operator, problem.y, 0.1, samples=64, sampler=sampler, generator=generator(2),
        **SETTINGS[sampler],
    )  # fmt: skip
    assert result.report["mean_of"] == "conditional means"
    between = (result.mean - result.samples.mean(0)).square().mean() * 64
    assert between < 1.5 * result.samples.var(0).mean()
    assert torch.allclose(result.std.square().mean(), result.samples.var(0).mean(), rtol=0.15)
    if sampler == "smc":
        assert error(problem, result.mean) < error(problem, result.samples.mean(0))


def test_a_sampler_of_ones_own_may_return_images_alone(monkeypatch):
    from dataclasses import replace

    own = replace(POSTERIOR_SAMPLERS["daps"], run=lambda problem: problem.like_images().normal_().mul_(0))
    monkeypatch.setitem(POSTERIOR_SAMPLERS, "own", own)
    problem = gaussian_problem("masking")
    result = reconstruct(problem.prior, problem.operator, problem.y, 0.1, sampler="own")
    assert result.report["mean_of"] == "draws" and (result.mean == 0).all()


# -- files -------------------------------------------------------------------------------------------------


def test_files_keep_mean_and_std(tmp_path):
    """Through parts of a run, samples in pieces, and saving again; samples alone could not give them back."""
    problem = gaussian_problem("masking", batch=3)
    prior = problem.prior.float()
    path = tmp_path / "m.h5"
    write_measurements(
        path, measurements=problem.y.float().numpy(), mask=problem.operator.mask.numpy(), noise_std=0.1,
        operator="masking", image_shape=(2, 8, 8),
    )  # fmt: skip
    settings = {"samples": 4, "sigma_min": 0.3, "steps": 6, "batch_size": 5}
    with MeasurementFile(path) as file:
        for k in (1, 2):
            reconstruct_to_file(
                prior, file, tmp_path / f"{k}.h5", images_at_once=k, generator=generator(), **settings
            )
        seeds = torch.randint(2**62, (3,), generator=generator()).tolist()
        alone = [
            reconstruct(
                prior, file.operator([i]), file.measurements([i]), 0.1, generator=generator(seeds[i]), **settings
            )
            for i in range(3)
        ]  # fmt: skip
    found = Reconstruction.load(tmp_path / "1.h5")
    for name, axis in (("mean", 0), ("std", 0), ("samples", 1)):
        expected = torch.cat([getattr(a, name) for a in alone], axis)
        assert torch.allclose(getattr(found, name), expected, atol=1e-5)
    assert found.report["mean_of"] == "conditional means"
    assert not torch.allclose(found.mean, found.samples.mean(0), atol=1e-2)
    found.save(tmp_path / "again.h5")
    again = Reconstruction.load(tmp_path / "again.h5")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.std, found.std)
    assert again.report == found.report


def test_a_result_of_before_says_nothing_of_its_mean(tmp_path):
    Reconstruction.from_samples(torch.ones(2, 1, 1, 3, 3), {"sampler": "mmps"}).save(tmp_path / "r.h5")
    assert "mean_of" not in Reconstruction.load(tmp_path / "r.h5").report


def test_a_writer_takes_draws_in_any_pieces(tmp_path):
    x, m, c = (normal(6, 4, 2, 5, 5, seed=s) for s in (1, 2, 3))
    with ResultWriter(tmp_path / "r.h5", x.shape) as writer:
        for images in (slice(0, 3), slice(3, 4)):
            for some in (slice(0, 1), slice(1, 4), slice(4, 6)):
                writer.add(images, Draws(*(t[some, images] for t in (x, m, c))))
        spread = writer.spread()
    whole = moments_of(x, m, c)
    with ResultFile(tmp_path / "r.h5") as f:
        assert torch.allclose(f.mean(slice(None)).double(), whole.mean(), atol=1e-6)
        assert torch.allclose(f.std(slice(None)).double(), whole.std(), rtol=1e-5)
    assert spread == pytest.approx(float(whole.std().square().mean().sqrt()))


# -- notes -------------------------------------------------------------------------------------------------


def test_solves_are_mentioned_where_their_bias_counts():
    """Two thirds of all solves of an isometry end above the tolerance, and it does not matter: the estimate
    says 0.02, the truth is smaller still. A blur with little noise is biased, and the note says what to do."""
    problem = gaussian_problem("mri", batch=3)
    fine = reconstruct(
        problem.prior, problem.operator, problem.y, 0.1, samples=4, sigma_min=0.05, generator=generator()
    )
    assert fine.report["solves_above_tolerance"] > 0.3 * fine.report["solves"]
    assert fine.report["bias_of_solves"] < 0.1
    assert all("solves" not in note for note in fine.report["notes"])

    physics, channels = physics_of("blur")
    prior = real_prior(channels)
    y = physics.A(prior.sample(2, generator(1)))
    y = y + 0.01 * torch.randn(y.shape, generator=generator(2), dtype=F64)
    settings = {"samples": 4, "generator": generator(3)}
    starved = reconstruct(prior, physics, y, 0.01, max_iterations=3, **settings)
    assert starved.report["bias_of_solves"] > BIAS_NOTED
    assert any("max_iterations=6 (--max-iterations)" in note for note in starved.report["notes"])
    fed = reconstruct(prior, physics, y, 0.01, max_iterations=40, tolerance=1e-3, **settings)
    assert fed.report["bias_of_solves"] < 0.1 and "notes" not in fed.report


@pytest.mark.parametrize("products", [3, 10])
def test_the_estimated_bias_is_about_the_true_one(products):
    """Within a factor of three, on a blur, in units of the exact posterior's spread."""
    physics, channels = physics_of("blur")
    prior = real_prior(channels)
    basis = torch.eye(64, dtype=F64).reshape(64, 1, 8, 8)
    a = physics.A(basis).flatten(1).T
    y = physics.A(prior.sample(3, generator(1)))
    y = y + 0.01 * torch.randn(y.shape, generator=generator(2), dtype=F64)
    gain = prior.cov @ a.T @ torch.linalg.inv(a @ prior.cov @ a.T + 1e-4 * torch.eye(64))
    mean = prior.mean.flatten() + (y.flatten(1) - a @ prior.mean.flatten()) @ gain.T
    std = (prior.cov - gain @ a @ prior.cov).diagonal().mean().sqrt()
    result = reconstruct(prior, physics, y, 0.01, samples=8, max_iterations=products, generator=generator(3))
    true = float((result.mean.flatten(1) - mean).square().mean().sqrt() / std)
    assert true / 3 < result.report["bias_of_solves"] < 3 * true
