"""Posterior samplers against exact posteriors: the exact ones must meet them, the others must miss them by
the amount that is documented.

Statistical tests draw S = 256 samples of each of B = 2 images with 128 unknowns. The squared error of the
sample mean, over its floor tr C / S, is a weighted mean of 256 chi-squares; with these spectra some 100 of
them count, so the ratio of roots has a standard error of 0.07 around at most 1 and passes 1.15 with two of
them to spare. A variance ratio averaged over K >= 100 coordinates has standard error <= 0.009.
"""

from __future__ import annotations

import math

import pytest
import torch
from posterior_problems import gaussian_problem

from ambient_sci.errors import InputError
from ambient_sci.operators import Identity, Masking
from ambient_sci.priors import ConditionalMean, GaussianMixturePrior, GaussianPrior
from ambient_sci.sampling import DPS, MMPS, POSTERIOR_SAMPLERS, Likelihood, PiGDM, gaussian_draw, reconstruct
from ambient_sci.sampling.smc import effective_size, resample

SAMPLES = 256


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(scores: dict[str, float], mean: float = 1.15, low: float = 0.95, high: float = 1.05) -> None:
    """The bars of an exact sampler."""
    assert scores["mean"] < mean, scores
    assert low < scores["observed"] < high, scores
    assert low < scores["unobserved"] < high, scores


def sampled(problem, sampler: str, **settings):
    """Scores of SAMPLES samples, and the report."""
    result = reconstruct(
        problem.prior,
        problem.operator,
        problem.y,
        problem.sigma_y,
        samples=SAMPLES,
        sampler=sampler,
        batch_size=2 * SAMPLES,
        generator=generator(),
        **settings,
    )
    return problem.scores(result.samples), result.report


# -- moment matching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_mmps_is_exact_on_gaussian_priors(kind):
    scores, report = sampled(
        gaussian_problem(kind), "mmps", steps=30, max_iterations=30, tolerance=1e-4, sigma_max=50.0
    )
    check(scores)
    assert report["solves_stopped_by_guard"] == 0 and report["solves_above_tolerance"] == 0
    assert report["network_evaluations"] == 30 + 10  # ten for the mean, from opposite noise


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_mmps_at_its_default_settings(kind):
    """Fourteen evaluations and five products a solve: within the same bars on the mean, within eight per cent
    on the spread.
    """
    scores, report = sampled(gaussian_problem(kind), "mmps")
    check(scores, low=0.92, high=1.08)
    assert report["network_evaluations"] == 14 + 10 and report["jacobian_products"] <= 14 * 5 + 10


@pytest.mark.parametrize("kind", ["mri", "masking"])
@pytest.mark.parametrize("sigma_min", [0.1, 0.3])
def test_a_final_draw_restores_what_stopping_early_leaves_out(kind, sigma_min):
    problem = gaussian_problem(kind)
    settings = {"sigma_min": sigma_min, "steps": 20, "max_iterations": 30, "tolerance": 1e-4}
    drawn, report = sampled(problem, "mmps", final="draw", **settings)
    check(drawn)
    assert sampled(problem, "mmps", **settings)[1]["final"] == report["final"] == "draw"
    means, _ = sampled(problem, "mmps", final="mean", **settings)
    assert means["observed"] < 0.6


def test_the_mean_and_the_draw_of_one_state_agree():
    """At one state, draws have the mean and the covariance of p(x_0 | x_t, y), which Gaussian algebra gives."""
    problem = gaussian_problem("mri", batch=1)
    n, sigma, num = 128, 0.4, 4000
    x = (
        problem.prior.sample(1, generator(1))
        + sigma * torch.randn(1, 2, 8, 8, generator=generator(2)).double()
    )
    both = torch.linalg.inv(torch.linalg.inv(problem.cov[0]) + torch.eye(n) / sigma**2)
    mean = both @ (torch.linalg.solve(problem.cov[0], problem.mean.flatten()) + x.flatten() / sigma**2)
    denoiser = MMPS(
        problem.prior,
        problem.operator[0],
        problem.y.expand(num, -1, -1, -1),
        0.1,
        tolerance=1e-6,
        max_iterations=60,
        root_iterations=12,
    )
    level = torch.full((num,), sigma, dtype=torch.float64)
    states = x.expand(num, -1, -1, -1)
    draws = denoiser.draw(states, level, generator(3)).flatten(1)
    # Mean: chi-square of 128 degrees of freedom over its mean, standard deviation 1 / 8. Variances: standard
    # error 2.2 %.
    white = (draws.mean(0) - mean) @ torch.linalg.solve(both, draws.mean(0) - mean) * num / n
    assert white < 1.5
    assert torch.allclose(draws.var(0), both.diagonal(), rtol=0.1)


def test_the_lanczos_root_is_a_root():
    """N(0, V) with few distinct eigenvalues is drawn exactly; a Jacobian that is not symmetric gives
    something finite.
    """
    q = torch.linalg.qr(torch.randn(20, 20, generator=generator(), dtype=torch.float64))[0]
    root = (q * torch.tensor([0.0, 1.0, 2.0, 3.0]).double().repeat(5)) @ q.T
    z = torch.randn(6, 20, generator=generator(1), dtype=torch.float64)
    z[2] = 0
    drawn = gaussian_draw(lambda v: v @ (root @ root), z, iterations=5)
    assert torch.allclose(drawn, z @ root, atol=1e-8)
    skew = torch.randn(20, 20, generator=generator(2), dtype=torch.float64)
    assert torch.isfinite(gaussian_draw(lambda v: v @ skew, z, iterations=5)).all()
    broken = gaussian_draw(lambda v: v * float("nan"), z, iterations=3)
    assert (broken == 0).all()


# -- DAPS and sequential Monte Carlo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_daps_is_exact_on_gaussian_priors(kind):
    scores, report = sampled(gaussian_problem(kind), "daps", sigma_max=10.0)
    check(scores)
    assert report["jacobian_products"] == 0


def mixture(kind: str, seed: int):
    """A mixture of four Gaussians and measurements that leave several of them possible."""
    g = generator(seed)
    means = 0.2 * torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64)
    prior = GaussianMixturePrior(
        means, torch.tensor([0.15, 0.2, 0.25, 0.3]).double(), torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    )
    if kind == "mri":
        from ambient_sci.operators import MRI

        operator = MRI(torch.tensor([0.0, 1.0, 0.0]).double().expand(3, 3))
    else:
        operator = Masking((torch.rand(1, 1, 3, 3, generator=g) < 0.2).double(), img_size=(2, 3, 3))
    clean = operator.A(prior.sample(4, g))
    y = clean + 0.1 * operator.mask * torch.randn(clean.shape, generator=g, dtype=torch.float64)
    return prior, operator, y


def draw_mixture(weights, means, covs, num: int, g: torch.Generator) -> torch.Tensor:
    """Exact samples (num, B, n)."""
    images = []
    for w, m, c in zip(weights, means, covs, strict=True):
        k = torch.multinomial(w, num, replacement=True, generator=g)
        z = torch.randn(num, m.shape[1], generator=g, dtype=m.dtype)
        factor = torch.linalg.cholesky(c + 1e-10 * torch.eye(m.shape[1]))
        images.append(m[k] + torch.einsum("nij,nj->ni", factor[k], z))
    return torch.stack(images, 1)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of samples (n, B, d) against (k n, B, d), the mean over the B images of W2 averaged over 200
    directions.
    """
    directions = torch.randn(200, a.shape[-1], generator=generator(9), dtype=a.dtype)
    directions = directions / directions.norm(dim=1, keepdim=True)
    a, b = ((x @ directions.T).sort(0)[0] for x in (a.repeat_interleave(len(b) // len(a), 0), b))
    return (a - b).square().mean((0, 2)).sqrt().mean()


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_smc_is_exact_on_mixtures(kind):
    """Within 15 % of the distance at which exact samples of that number are; guidance without weights is not."""
    prior, operator, y = mixture(kind, seed=2 if kind == "mri" else 1)
    posterior, g = prior.posterior(operator, y, 0.1), generator(1)
    assert posterior[0].max(1).values.min() < 0.9  # more than one component is possible in some image
    reference = draw_mixture(*posterior, 4096, g)
    floor = torch.stack(
        [sliced_wasserstein(draw_mixture(*posterior, SAMPLES, g), reference) for _ in range(10)]
    )
    settings = {"samples": SAMPLES, "generator": generator(4), "sigma_max": 10.0, "batch_size": 1024}
    result = reconstruct(prior, operator, y, 0.1, sampler="smc", steps=150, particles=1024, **settings)
    assert sliced_wasserstein(result.samples.flatten(2), reference) < 1.15 * floor.mean()
    assert 50 < result.report["smallest_effective_sample_size"] <= 1024
    guided = reconstruct(prior, operator, y, 0.1, sampler="dps", steps=150, **settings)
    assert sliced_wasserstein(guided.samples.flatten(2), reference) > 1.3 * floor.mean()


def test_resampling_is_systematic_and_unbiased():
    weights = torch.log(torch.tensor([[0.1, 0.25], [0.2, 0.25], [0.3, 0.25], [0.4, 0.25]]).double())
    assert torch.allclose(effective_size(weights), torch.tensor([1 / 0.3, 4.0]).double())
    assert torch.allclose(effective_size(weights + 300), effective_size(weights))
    from ambient_sci.noise import ChainNoise

    counts = torch.zeros(4, 2)
    streams, trials = ChainNoise([1, 2]), 2000
    for _ in range(trials):
        kept, index = resample(weights, torch.tensor([True, False]), 4, streams)
        chosen = index.reshape(4, 2)
        assert (kept[:, 0] == 0).all() and torch.equal(kept[:, 1], weights[:, 1])
        assert torch.equal(chosen[:, 1], torch.tensor([1, 3, 5, 7]))  # not asked for: left alone
        number = torch.bincount(chosen[:, 0] // 2, minlength=4)
        expected = 4 * weights[:, 0].exp()
        assert (number >= expected.floor()).all() and (number <= expected.ceil()).all()
        counts[:, 0] += number
    # Standard error of a frequency at most 0.5 / sqrt(2000) = 0.011.
    assert torch.allclose(counts[:, 0] / trials, torch.tensor([0.4, 0.8, 1.2, 1.6]), atol=0.05)


# -- what is not exact, by how much ------------------------------------------------------------------------------------------


def scalar_prior(variance: float) -> GaussianPrior:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return GaussianPrior(0 * one, variance * one.flatten())


def reverse_sde(
    make, variance: float, noise: float, low: float = 1e-3, levels: int = 4000
) -> tuple[float, float]:
    """Variance and gain of ancestral sampling with a posterior denoiser of a scalar Gaussian, over the exact
    ones; no sampling.

    The denoiser is m = a x + b y with coefficients that are found by asking it; the recursion of mean and
    variance is then exact.
    """
    sigmas = torch.logspace(2, math.log10(low), levels, dtype=torch.float64)
    y = torch.ones(levels, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros_like(y)
    constant = make(scalar_prior(variance), Identity((1, 1, 1)), y, noise**0.5)(zero, sigmas).flatten()
    slope = make(scalar_prior(variance), Identity((1, 1, 1)), zero, noise**0.5)(y, sigmas).flatten()
    gain, spread = 0.0, float(sigmas[0]) ** 2
    for a, b, t, s in zip(slope[:-1], constant[:-1], sigmas[:-1], sigmas[1:], strict=True):
        share = float(s / t) ** 2
        step = share + (1 - share) * float(a)
        gain, spread = step * gain + (1 - share) * float(b), step**2 * spread + float(s) ** 2 * (1 - share)
    gain, spread = float(slope[-1]) * gain + float(constant[-1]), float(slope[-1]) ** 2 * spread
    exact = variance * noise / (variance + noise)
    return spread / exact, gain / (variance / (variance + noise))


@pytest.mark.parametrize(
    ("make", "variance", "noise", "expected"),
    [
        (MMPS, 0.25, 0.04, (1.00, 1.00)),
        (MMPS, 4.0, 1.0, (1.00, 1.00)),
        (DPS, 0.25, 0.04, (0.58, 1.16)),
        (DPS, 4.0, 1.0, (0.62, 1.23)),
        (PiGDM, 0.25, 0.04, (1.00, 1.00)),
        (lambda *a: PiGDM(*a, data_std=1.0), 0.25, 0.04, (1.11, 0.92)),
        (lambda *a: PiGDM(*a, data_std=1.0), 4.0, 1.0, (0.83, 1.14)),
    ],
    ids=["mmps", "mmps-wide", "dps", "dps-wide", "pigdm-own-variance", "pigdm", "pigdm-wide"],
)
def test_posterior_denoisers_deviate_as_documented(make, variance, noise, expected):
    """Ratios of variance and of gain to the exact ones, on scalar Gaussians, to one per cent."""
    assert reverse_sde(make, variance, noise) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("variance", "noise", "coupling", "expected"),
    [(0.25, 0.04, 0.1, (1.21, 0.97)), (4.0, 1.0, 0.1**0.5, (1.08, 0.98))],
)
def test_pnp_dm_adds_its_coupling_to_the_noise(variance, noise, coupling, expected):
    """rho samples the posterior of noise sigma_y^2 + rho^2; 1,500 draws, standard error of the variance 3.7
    %.
    """
    prior = scalar_prior(variance)
    y = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    result = reconstruct(
        prior,
        Identity((1, 1, 1)),
        y,
        noise**0.5,
        samples=1500,
        sampler="pnp-dm",
        batch_size=1500,
        steps=50,
        coupling=coupling,
        sigma_max=10.0,
        sigma_min=0.002,
        generator=generator(),
    )
    exact = variance * noise / (variance + noise)
    gain = float(result.mean) / (variance / (variance + noise))
    assert float(result.std) ** 2 / exact == pytest.approx(expected[0], rel=0.11)
    assert gain == pytest.approx(expected[1], abs=0.03)


@pytest.mark.parametrize("sampler", ["pigdm", "dps", "pnp-dm"])
def test_baselines_run_on_images_and_are_no_better_than_documented(sampler):
    """Spread on measured rows of masked Fourier data: DPS half of what is right, PiGDM ten per cent off,
    PnP-DM (sigma_y^2 + rho^2) / sigma_y^2.
    """
    settings = {"pigdm": {}, "dps": {"steps": 500}, "pnp-dm": {"steps": 40}}[sampler]
    scores, report = sampled(gaussian_problem("mri"), sampler, sigma_max=10.0, **settings)

    ranges = {"pigdm": (0.8, 0.97), "dps": (0.3, 0.65), "pnp-dm": (1.8, 2.2)}
    low, high = ranges[sampler]
    assert low < scores["observed"] < high, scores
    assert scores["mean"] < 1.6, scores


def test_dps_steps_stay_finite_where_the_definition_overshoots():
    """sigma_y = 0.001 against images of one: sigma^2 / sigma_y^2 reaches 10^8, and few steps must still not
    explode.
    """
    problem = gaussian_problem("mri", sigma_y=1e-3)
    result = reconstruct(
        problem.prior,
        problem.operator,
        problem.y,
        1e-3,
        samples=4,
        sampler="dps",
        steps=60,
        generator=generator(),
    )
    assert result.samples.abs().max() < 20


def test_a_dps_has_no_spread_beyond_the_measured_rows():
    """A mask-conditional prior knows nothing of x_t off the mask: the covariance of samples has at most as
    many directions as rows.
    """
    problem = gaussian_problem("masking", batch=1, size=4)
    prior = ConditionalMean(problem.prior, problem.operator)
    result = reconstruct(
        prior,
        problem.operator,
        problem.y,
        0.1,
        samples=200,
        sampler="a-dps",
        steps=60,
        sigma_max=10.0,
        step=0.1,
        batch_size=200,
        generator=generator(),
    )
    values = torch.linalg.svdvals(result.samples.flatten(1) - result.mean.flatten())
    rows = int(problem.operator.mask.sum()) * 2
    assert rows < 28 and (values > 1e-6 * values[0]).sum() <= rows
    # As an image it is good: closer to the posterior mean than the prior's mean is.
    assert (result.mean - problem.mean).norm() < 0.5 * (problem.prior.mean - problem.mean).norm()


# -- every sampler -----------------------------------------------------------------------------------------------------------

UNCONDITIONAL = [n for n, s in POSTERIOR_SAMPLERS.items() if s.conditioning == "unconditional"]
QUICK = {"mmps": {}, "daps": {"steps": 20}, "smc": {"steps": 20, "particles": 32}, "pnp-dm": {"steps": 10}}


@pytest.mark.parametrize("sampler", UNCONDITIONAL)
def test_chains_do_not_depend_on_the_batch(sampler):
    problem = gaussian_problem("mri", batch=2)
    settings = QUICK.get(sampler, {"steps": 20})
    one, many = (
        reconstruct(
            problem.prior,
            problem.operator,
            problem.y,
            0.1,
            samples=3,
            sampler=sampler,
            batch_size=size,
            generator=generator(3),
            **settings,
        ).samples
        for size in (1, 64)
    )
    assert torch.allclose(one, many, atol=1e-8)
    assert (one[0] - one[1]).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [s for s in UNCONDITIONAL if s != "dps"])
def test_noiseless_measurements(sampler):
    """sigma_y = 0: finite, and close to the data."""
    problem = gaussian_problem("masking", sigma_y=0.0)
    settings = {"steps": 60, **QUICK.get(sampler, {})}
    result = reconstruct(
        problem.prior,
        problem.operator,
        problem.y,
        0.0,
        samples=2,
        sampler=sampler,
        generator=generator(),
        **settings,
    )
    assert torch.isfinite(result.samples).all()
    for sample in result.samples:
        misfit = (problem.operator.A(sample) - problem.y).abs().max()
        assert misfit < (1.0 if sampler == "pnp-dm" else 0.1)


def test_dps_without_noise_follows_its_limit():
    problem = gaussian_problem("masking", sigma_y=0.0)
    result = reconstruct(
        problem.prior,
        problem.operator,
        problem.y,
        0.0,
        samples=2,
        sampler="dps",
        steps=60,
        generator=generator(),
    )
    assert torch.isfinite(result.samples).all()


def test_settings_out_of_range_are_named():
    problem = gaussian_problem("masking")
    cases = [
        ("smc", {"particles": 4, "samples": 8}, "particles"),
        ("smc", {"resample_below": 0.0}, "resample_below"),
        ("pnp-dm", {"coupling": -1.0}, "coupling"),
        ("pnp-dm", {"inner_steps": 0}, "inner_steps"),
        ("mmps", {"integrator": "euler"}, "integrator"),
        ("mmps", {"final": "median"}, "final"),
        ("mmps", {"precision": "fp8"}, "precision"),
        ("daps", {"root_iterations": 3}, "root_iterations"),
    ]
    for sampler, settings, message in cases:
        with pytest.raises(InputError, match=message):
            reconstruct(problem.prior, problem.operator, problem.y, 0.1, sampler=sampler, **settings)


def test_conditioning_an_isotropic_gaussian_by_dense_algebra():
    """With and without a closed form (coil maps of any scale): mean, draws and evidence of x ~ N(m, r^2 I)
    given y.
    """
    from ambient_sci.operators import MRI
    from ambient_sci.priors import operator_matrix

    g = generator(5)
    mask = (torch.rand(4, 4, generator=g) < 0.6).double()
    maps = torch.randn(2, 4, 4, dtype=torch.complex128, generator=g)
    for operator in (MRI(mask), MRI(mask, coil_maps=maps)):
        a = operator_matrix(operator, (2, 4, 4))[0]
        m, r, noise = torch.randn(1, 2, 4, 4, generator=g, dtype=torch.float64), 0.7, 0.3
        y = operator.A(torch.randn(1, 2, 4, 4, generator=g, dtype=torch.float64))
        rows = a.abs().sum(1) > 0
        a, data = a[rows], y.flatten()[rows]
        cov = r**2 * a @ a.T + noise**2 * torch.eye(len(a))
        gain = r**2 * a.T @ torch.linalg.inv(cov)
        mean = m.flatten() + gain @ (data - a @ m.flatten())
        likelihood = Likelihood(operator, y, noise, tolerance=1e-10)
        assert torch.allclose(likelihood.mean(m, r).flatten(), mean, atol=1e-6)
        evidence = -0.5 * (data - a @ m.flatten()) @ torch.linalg.solve(cov, data - a @ m.flatten())
        assert torch.allclose(likelihood.log_evidence(m, r), evidence, rtol=1e-6)
        many = Likelihood(operator, y.expand(4000, *y.shape[1:]), noise)
        draws = many.draw(m.expand(4000, -1, -1, -1), r, g).flatten(1)
        exact = r**2 * torch.eye(32) - gain @ a * r**2
        assert torch.allclose(draws.mean(0), mean, atol=0.06)  # standard error at most 0.011
        assert torch.allclose(draws.T.cov(), exact, atol=0.06)  # standard error at most 0.011
