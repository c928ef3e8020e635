r"""Consistency: exact at Gaussian priors, unbiased as an estimator, and false for what is often put in its place. [6, 8, 9, 17, 20]

Statistical tests average independent samples; |z| < 4.5 is a false alarm rate of 7e-6 each (normal approximation).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_forms import (
    F64,
    ambient_step,
    coil_maps,
    gaussian_prior,
    mixture_prior,
    normal,
    random_mask,
    seeded,
    z_score,
)
from torch import Tensor

from ambient_sci import losses
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.losses import squared_expectation_gap
from ambient_sci.noise import ancestral_step, karras_grid
from ambient_sci.operators import MRI, Masking
from ambient_sci.priors import ConditionalMean, GaussianMixturePrior, KeptRows, Prior

SHAPE = (1, 2, 3)


class Distorted(Prior):
    """D plus a step into a direction that does not depend on the state, at levels below ``below``."""

    def __init__(self, exact: Prior, direction: Tensor, below: float) -> None:
        super().__init__()
        self.exact, self.direction, self.below = exact, direction, below
        self.shape, self.data_std, self.takes = exact.shape, exact.data_std, exact.takes

    def forward(self, x: Tensor, sigma, given=None) -> Tensor:  # type: ignore[override]
        low = (torch.as_tensor(sigma) < self.below).to(x).reshape(-1, *[1] * (x.ndim - 1))
        return self.exact(x, sigma, given) + low * self.direction


# -- the kernel --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.05, 0.4, 0.79])
def test_gaussian_residual_is_zero_at_any_gap(s):
    """[8] D is affine, so E[D(x_s)] is D at the mean of the kernel, and that is D(x_t) exactly."""
    prior, t, x_t = gaussian_prior(SHAPE), 0.8, normal(5, *SHAPE, seed=1)
    d_t = prior(x_t, t)
    mean = ancestral_step(x_t, d_t, t, s, noise=torch.zeros_like(x_t))
    assert (prior(mean, s) - d_t).abs().max() < 1e-12


@pytest.mark.parametrize(
    "mutant", ["probability flow", "standard deviations for variances", "levels swapped"]
)
def test_other_kernels_violate_it(mutant):
    """[8] the probability-flow ODE in place of the reverse SDE, and a kernel with s/t where s^2/t^2 belongs."""
    prior, t, s = gaussian_prior(SHAPE), 0.8, 0.3
    x_t = normal(5, *SHAPE, seed=1)
    d_t, centre = prior(x_t, t), (x_t - prior.mean).flatten(1)
    if (
        mutant == "probability flow"
    ):  # closed form: each mode is scaled by the ratio of marginal standard deviations
        gain = ((prior.values + s**2) / (prior.values + t**2)).sqrt()
        mean = prior.mean + ((centre @ prior.vectors) * gain @ prior.vectors.T).reshape(x_t.shape)
    else:
        ratio = s / t if mutant == "standard deviations for variances" else 1 - (s / t) ** 2
        mean = d_t + ratio * (x_t - d_t)
    assert (prior(mean, s) - d_t).abs().max() > 1e-2


def mixture_residual(prior: GaussianMixturePrior, x_t: Tensor, t: float, s: float, exact: bool) -> Tensor:
    """|E[D(x_s)] - D(x_t)| in one dimension by Gauss-Hermite quadrature, under the exact reverse kernel or the ancestral step."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    z, w = torch.tensor(nodes), torch.tensor(weights) / np.sqrt(2 * np.pi)

    def expectation(mean: Tensor, std: Tensor) -> Tensor:
        points = mean[:, None] + std[:, None] * z
        return (prior(points.reshape(-1, 1), s).reshape(points.shape) * w).sum(1)

    ratio = torch.tensor((s / t) ** 2, dtype=F64)
    noise = s * (1 - ratio).sqrt()
    if not exact:
        mean = ancestral_step(x_t, prior(x_t, t), t, s, noise=torch.zeros_like(x_t))[:, 0]
        return (expectation(mean, noise.expand_as(mean)) - prior(x_t, t)[:, 0]).abs()
    # q(x_s | x_t, component): mean and variance of x_0 given x_t push through the same step.
    r, total = prior.responsibilities(x_t, t), torch.zeros(len(x_t), dtype=F64)
    for k, (mu, std) in enumerate(zip(prior.means[:, 0], prior.std, strict=True)):
        gain = std**2 / (std**2 + t**2)
        x0 = mu + gain * (x_t[:, 0] - mu)
        spread = (noise**2 + (1 - ratio) ** 2 * gain * t**2).sqrt()
        total += r[:, k] * expectation(x0 + ratio * (x_t[:, 0] - x0), spread.expand_as(x0))
    return (total - prior(x_t, t)[:, 0]).abs()


def test_mixture_is_consistent_under_the_exact_kernel_and_approximately_under_the_step():
    """[8] an exact denoiser is a martingale; the ancestral step is its kernel up to a bias that vanishes with the gap."""
    prior = GaussianMixturePrior(torch.tensor([[-1.0], [0.4], [1.5]], dtype=F64), 0.3)
    x_t = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    assert mixture_residual(prior, x_t, 0.8, 0.4, exact=True).max() < 1e-8
    bias = [float(mixture_residual(prior, x_t, 0.8, s, exact=False).max()) for s in (0.4, 0.6, 0.7, 0.75)]
    assert bias[0] > 0.02
    assert all(later < 0.6 * earlier for earlier, later in zip(bias, bias[1:], strict=False))


# -- the estimator -----------------------------------------------------------------------------------------------------------


def test_estimator_is_unbiased_and_the_squared_mean_is_not():
    """[9] E = (target - mean)^2; leaving the variance out adds var / m, and m = 2 is the two-sample product."""
    target, mean, std = 0.7, 0.4, 1.3
    for m in (2, 3, 8):
        draws = mean + std * normal(m, 200_000, seed=m)
        found = squared_expectation_gap(torch.full((200_000,), target, dtype=F64), draws)
        assert abs(z_score(found - (target - mean) ** 2)) < 4.5
        squared_mean = (target - draws.mean(0)).square()
        assert abs(z_score(squared_mean - (target - mean) ** 2 - std**2 / m)) < 4.5
        assert z_score(squared_mean - (target - mean) ** 2) > 50
    a, b = normal(2, 50, seed=1)
    assert (
        squared_expectation_gap(torch.ones(50), torch.stack([a, b])) - (1 - a) * (1 - b)
    ).abs().max() < 1e-12


@pytest.mark.parametrize("draws", [2, 4])
def test_loss_of_a_gaussian_prior_is_zero_on_average(draws):
    num, prior = 4_000, gaussian_prior(SHAPE)
    t, s = torch.linspace(0.3, 1.2, num, dtype=F64), torch.linspace(0.1, 0.9, num, dtype=F64)
    x_t = prior.sample(num, seeded(1)) + t.reshape(-1, 1, 1, 1) * normal(num, *SHAPE, seed=2)
    found = losses.consistency(prior, x_t, t, s, draws=draws, generator=seeded(3))
    assert found.shape == (num,)
    assert abs(z_score(found)) < 4.5


def test_antithetic_draws_leave_the_mean_and_take_the_noise_that_is_linear():
    """Opposite noise cancels in an affine D: the loss is 0 in every sample at the exact Gaussian denoiser, and lambda |e|^2 / n at one
    that is off by e. Independent draws have this only on average: their spread is some hundred times the value."""
    num, t, s = 50, 0.9, 0.4
    exact, direction = gaussian_prior(SHAPE), 0.2 * normal(*SHAPE, seed=4)
    wrong, x_t = Distorted(exact, direction, below=0.6), normal(num, *SHAPE, seed=2)
    options = {"draws": 4, "generator": seeded(3)}
    assert losses.consistency(exact, x_t, t, s, antithetic=True, **options).abs().max() < 1e-12
    expected = direction.square().mean() * (1 / s**2 + 1 / exact.data_std**2)
    found = losses.consistency(wrong, x_t, t, s, antithetic=True, **options)
    assert torch.allclose(found, expected.expand(num), rtol=1e-10)
    assert losses.consistency(exact, x_t, t, s, **options).std() > 0.1 * expected


def test_antithetic_draws_of_a_mixture_estimate_the_same_at_less_noise():
    """One state many times: both estimates agree on the mean (|z| < 4.5), and close levels leave the antithetic one a small part of
    the spread."""
    num, prior = 20_000, mixture_prior(SHAPE)
    x_t, t, s = normal(1, *SHAPE, seed=2).expand(num, *SHAPE), 0.8, 0.7
    plain, paired = (
        losses.consistency(prior, x_t, t, s, antithetic=a, generator=seeded(3)) for a in (False, True)
    )
    spread = (plain.var() + paired.var()).div(num).sqrt()
    assert abs(float((plain.mean() - paired.mean()) / spread)) < 4.5
    assert paired.std() < 0.2 * plain.std()


@pytest.mark.parametrize("antithetic", [False, True])
def test_substeps_take_the_bias_of_far_levels_away(antithetic):
    """An exact mixture denoiser from .8 to .3: one step violates its own kernel, eight small ones hardly do. Gaussians are exact in any
    number of steps."""
    num, t, s = 15_000, 0.8, 0.3
    prior = GaussianMixturePrior(torch.tensor([-1.0, 0.4, 1.5], dtype=F64).reshape(3, 1, 1, 1), 0.3)
    x_t = prior.sample(num, seeded(1)) + t * normal(num, 1, 1, 1, seed=2)
    one, eight = (
        losses.consistency(prior, x_t, t, s, draws=16, antithetic=antithetic, substeps=q, generator=seeded(3))
        for q in (1, 8)
    )
    assert z_score(one) > 10 and eight.mean() < 0.2 * one.mean()
    gaussian, x_t = gaussian_prior(SHAPE), normal(50, *SHAPE, seed=2)
    found = losses.consistency(gaussian, x_t, t, s, antithetic=antithetic, substeps=3, generator=seeded(3))
    assert found.abs().max() < 1e-12 if antithetic else abs(z_score(found)) < 4.5


def test_substeps_are_steps_of_equal_factors_with_the_denoiser_as_it_is():
    """By hand, with dropout off in between and the gradient through D_t, D_s and the first step alone."""

    class Scaled(Prior):
        shape, data_std = SHAPE, 1.0

        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))
            self.seen: list[tuple[float, bool, bool]] = []

        def forward(self, x: Tensor, sigma, given=None) -> Tensor:  # type: ignore[override]
            self.seen.append(
                (float(torch.as_tensor(sigma).flatten()[0]), self.training, torch.is_grad_enabled())
            )
            return self.gain * x

    prior, x_t, t, s = Scaled().train(), normal(3, *SHAPE, seed=1), 0.8, 0.1
    found = losses.consistency(prior, x_t, t, s, draws=4, substeps=3, generator=seeded(2))
    levels = [0.8, 0.4, 0.2, 0.1]
    assert [level for level, *_ in prior.seen] == pytest.approx(levels)
    assert [flags for _, *flags in prior.seen] == [[True, True], [False, False], [False, False], [True, True]]
    generator, x = seeded(2), x_t.repeat(4, 1, 1, 1)
    centre, d_t = (prior.gain * x_t).repeat(4, 1, 1, 1), prior.gain * x_t
    for a, b in zip(levels, levels[1:], strict=False):
        x = ancestral_step(x, centre, a, b, generator=generator)
        centre = (prior.gain * x).detach()
    expected = (1 / s**2 + 1) * squared_expectation_gap(d_t, (prior.gain * x).unflatten(0, (4, 3))).flatten(
        1
    ).mean(1)
    assert torch.allclose(found, expected, rtol=1e-10)
    slopes = [torch.autograd.grad(v.sum(), prior.gain)[0] for v in (found, expected)]
    assert torch.allclose(*slopes, rtol=1e-9)


def test_loss_of_a_wrong_denoiser_is_its_squared_violation():
    """D off by a vector e at levels below s' violates consistency by e across s': the loss is lambda(s) |e|^2 / n on average."""
    num, t, s = 4_000, 0.9, 0.4
    direction = 0.2 * normal(*SHAPE, seed=4)
    prior = Distorted(gaussian_prior(SHAPE), direction, below=0.6)
    x_t = normal(num, *SHAPE, seed=2)
    found = losses.consistency(prior, x_t, t, s, generator=seeded(3))
    expected = direction.square().mean() * (1 / s**2 + 1 / prior.data_std**2)
    assert abs(z_score(found - expected)) < 4.5
    assert z_score(found) > 10


def conditional(name: str, num: int) -> tuple[ConditionalMean, Masking | MRI]:
    shape = (2, 2, 3)
    operator = {
        "masking": lambda: Masking(random_mask(num, 1, 2, 3), shape),
        "one mask": lambda: Masking(random_mask(1, 2, 2, 3), shape),
        "mri": lambda: MRI(random_mask(num, 1, 2, 3)),
        "coils": lambda: MRI(random_mask(num, 1, 2, 3), coil_maps(3, 2, 3)),
        "coils of each scan": lambda: MRI(random_mask(num, 1, 2, 3), coil_maps(2, 2, 3, batch=num)),
    }[name]().to(F64)
    # The exact mean is asked for ``draws`` copies of the batch at once.
    return ConditionalMean(gaussian_prior(shape), operator), operator


@pytest.mark.parametrize("name", ["masking", "one mask", "mri", "coils"])
def test_kept_rows_are_walked_and_the_whole_image_is_judged(name):
    """[20] zero on average at the exact conditional mean; an error that lies in held-out rows alone is seen in full."""
    num, t, s = 2_000, 0.8, 0.3
    exact, operator = conditional(name, num)
    y_t = operator.A(exact.prior.sample(num, seeded(1)))
    y_t = y_t + t * normal(*y_t.shape, seed=2)
    found = losses.consistency(exact, y_t, t, s, operator=operator, generator=seeded(3))
    assert abs(z_score(found)) < 4.5

    hidden = normal(num, *exact.shape, seed=5)
    hidden = hidden - operator.A_dagger(operator.A(hidden)) if operator.square else hidden

    class Blind(Distorted):
        def forward(self, x: Tensor, sigma, given=None) -> Tensor:
            self.direction = hidden.repeat(x.shape[0] // num, 1, 1, 1)
            return super().forward(x, sigma, given)

    wrong = Blind(exact, hidden, below=0.5)
    found = losses.consistency(wrong, y_t, t, s, operator=operator, generator=seeded(3))
    weight = wrong.loss_weight(torch.tensor(s, dtype=F64), operator.kept_fraction)
    expected = weight * hidden.square().flatten(1).mean(1)
    assert abs(z_score(found - expected)) < 4.5
    assert z_score(found) > 10


def test_missing_rows_are_weighed_by_what_can_be_known():
    """Kept fraction f at s = 0.01: the weight is 1 / (d^2 (1 - f)) to 1 %, thousands of times below that of complete data."""
    exact, operator = conditional("mri", 6)
    x_t = normal(6, 2, 2, 3, seed=2)
    wrong = Distorted(exact, torch.ones(exact.shape, dtype=F64), below=0.02)
    found, right = (
        losses.consistency(p, x_t, 0.03, 0.01, operator=operator, generator=seeded(1)) for p in (wrong, exact)
    )
    fraction, d = operator.mask.flatten(1).mean(1), exact.data_std
    assert bool((fraction < 0.95).all())
    # D_s is off by 1 in every entry: the gap grows by 1 plus a cross term, 2 (D_t - mean D_s) of order s.
    assert torch.allclose((found - right), 1 / (d**2 * (1 - fraction)), rtol=0.1)


def test_measurements_off_the_kept_rows_are_ignored():
    exact, operator = conditional("mri", 3)
    y_t = normal(3, 2, 2, 3, seed=2)
    noisy = y_t + 100 * (1 - operator.mask) * normal(3, 2, 2, 3, seed=3)
    found, expected = (
        losses.consistency(exact, y, 0.8, 0.3, operator=operator, generator=seeded(1)) for y in (y_t, noisy)
    )
    assert (found - expected).abs().max() < 1e-12  # fmt: skip


# -- batches, shared computations, borders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unconditional", "mri", "coils of each scan"])
def test_batched_draws_equal_separate_ones(name, monkeypatch):
    """One call for all draws of all samples gives what each draw of each sample gives by itself."""
    batch, m, t, s = 3, 4, torch.tensor([0.5, 0.8, 1.2], dtype=F64), torch.tensor([0.2, 0.7, 0.3], dtype=F64)
    exact, operator = (
        (gaussian_prior((2, 2, 3)), None) if name == "unconditional" else conditional(name, batch)
    )
    size = (2, 2, 2, 3) if name == "coils of each scan" else (2, 2, 3)
    x_t, noise = normal(batch, *size, seed=1), normal(m * batch, *size, seed=2)
    if operator is not None:  # the exact mean needs the maps of the sample it is asked about
        exact = Repeating(exact)
    monkeypatch.setattr("ambient_sci.noise.draw_noise", lambda like, generator: noise)
    found = losses.consistency(exact, x_t, t, s, draws=m, operator=operator)

    for i in range(batch):
        one = slice(i, i + 1)
        prior = (
            gaussian_prior((2, 2, 3)) if operator is None else ConditionalMean(exact.exact.prior, operator[i])
        )
        rows = None if operator is None else operator[i]

        def denoise(x, sigma, prior=prior, rows=rows):
            return prior(x, sigma) if rows is None else losses.estimate(prior, rows, x, sigma)

        d_t = denoise(x_t[one], t[one])
        centre = d_t if rows is None else rows.A(d_t)
        after = [
            denoise(
                ancestral_step(x_t[one], centre, t[one], s[one], noise=noise[j * batch + i][None]), s[one]
            )
            for j in range(m)
        ]
        gap = squared_expectation_gap(d_t, torch.stack(after)).mean()
        fraction = 1.0 if rows is None else float(rows.mask.mean())
        assert abs(float(found[i] - prior.loss_weight(s[i], fraction) * gap)) < 1e-12


class Repeating(Prior):
    """`ConditionalMean` for a batch that is repeated as a whole, maps and all."""

    takes = KeptRows

    def __init__(self, exact: ConditionalMean) -> None:
        super().__init__()
        self.exact, self.shape, self.data_std = exact, exact.shape, exact.data_std

    def forward(self, x: Tensor, sigma, given=None) -> Tensor:  # type: ignore[override]
        b = self.exact.operator.batch_size
        parts = [slice(i, i + b) for i in range(0, len(x), b)]
        return torch.cat([self.exact(x[p], sigma[p], given[p]) for p in parts])


def test_a_denoised_image_that_is_known_is_not_computed_again():
    """The same value with ``denoised`` given, one evaluation less; with an operator as well."""

    class Counting(Distorted):
        calls = 0

        def forward(self, x: Tensor, sigma, given=None) -> Tensor:
            Counting.calls += 1
            return super().forward(x, sigma, given)

    prior = Counting(gaussian_prior(SHAPE), torch.zeros(SHAPE, dtype=F64), below=0.5)
    x_t = normal(4, *SHAPE)
    known = prior(x_t, 0.8)
    Counting.calls = 0
    expected = losses.consistency(prior, x_t, 0.8, 0.3, generator=seeded(1))
    assert Counting.calls == 2
    assert torch.equal(
        losses.consistency(prior, x_t, 0.8, 0.3, denoised=known, generator=seeded(1)), expected
    )
    assert Counting.calls == 3

    exact, operator = conditional("mri", 4)
    step = ambient_step(exact, operator, normal(4, 2, 2, 3), 0.3, 0.8, keep=1.0, generator=seeded(2))
    found = losses.consistency(
        exact, step.y_t, 0.8, 0.4, denoised=step.denoised, operator=step.kept, generator=seeded(1)
    )
    again = losses.consistency(exact, step.y_t, 0.8, 0.4, operator=step.kept, generator=seeded(1))
    assert (found - again).abs().max() < 1e-12  # fmt: skip


def test_gradients_reach_both_sides():
    class Scaled(Prior):
        shape, data_std = SHAPE, 1.0

        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor([0.9, 0.6], dtype=F64))

        def forward(self, x: Tensor, sigma, given=None) -> Tensor:  # type: ignore[override]
            below = (torch.as_tensor(sigma) < 0.5).long()
            return self.gain[below].reshape(-1, 1, 1, 1) * x

    prior, x_t = Scaled(), normal(8, *SHAPE)
    loss = losses.consistency(prior, x_t, 0.8, 0.3, generator=seeded(1)).sum()
    gradient = torch.autograd.grad(loss, prior.gain)[0]
    assert bool((gradient != 0).all())


def test_impossible_requests():
    prior, x_t = gaussian_prior(SHAPE), normal(2, *SHAPE)
    with pytest.raises(InputError, match="at least 2 draws"):
        losses.consistency(prior, x_t, 0.8, 0.3, draws=1)
    for draws in (2, 5):
        with pytest.raises(InputError, match="4 antithetic draws"):
            losses.consistency(prior, x_t, 0.8, 0.3, draws=draws, antithetic=True)
    with pytest.raises(InputError, match="1 substep"):
        losses.consistency(prior, x_t, 0.8, 0.3, substeps=0)
    for t, s in ((0.3, 0.3), (0.3, 0.5), (0.3, 0.0)):
        with pytest.raises(InputError, match="0 < sigma_s < sigma_t"):
            losses.consistency(prior, x_t, t, s)
    exact, operator = conditional("mri", 2)
    with pytest.raises(ConditioningError, match="unconditional"):
        losses.consistency(exact, normal(2, 2, 2, 3), 0.8, 0.3)
    with pytest.raises(ConditioningError, match="mask-conditional"):
        losses.consistency(exact.prior, normal(2, 2, 2, 3), 0.8, 0.3, operator=operator)


# -- samplers that stop early, or that hold a mask fixed ---------------------------------------------------------------------


def sampled_covariance(denoise, levels: Tensor, dimension: int) -> Tensor:
    """Covariance of the ancestral sampler's result with an affine denoiser, propagated exactly: no samples.

    The state is W (x_T, z_1, z_2, ...) + const; W is found by pushing unit vectors through differences of the denoiser.
    """
    basis = torch.cat([torch.zeros(1, dimension, dtype=F64), torch.eye(dimension, dtype=F64)])
    cov = levels[0] ** 2 * torch.eye(dimension, dtype=F64)
    for t, s in zip(levels, levels[1:], strict=False):
        step = ancestral_step(basis, denoise(basis, t), t, s, noise=torch.zeros_like(basis))
        push = (step[1:] - step[:1]).T
        cov = push @ cov @ push.T + s**2 * (1 - (s / t) ** 2) * torch.eye(dimension, dtype=F64)
    last = denoise(basis, levels[-1])
    push = (last[1:] - last[:1]).T
    return push @ cov @ push.T


def test_stopping_at_the_noise_of_the_data_gives_the_truncated_covariance():
    """[6] Sigma (Sigma + sigma_n^2 I)^-1 Sigma exactly, by the denoiser alone and by a fine ancestral walk; less than Sigma."""
    prior, sigma_n = gaussian_prior((4,)), 0.6
    eye = torch.eye(4, dtype=F64)
    truncated = prior.cov @ torch.linalg.inv(prior.cov + sigma_n**2 * eye) @ prior.cov
    gain = prior(eye, sigma_n) - prior(0 * eye, sigma_n)
    assert (gain.T @ (prior.cov + sigma_n**2 * eye) @ gain - truncated).abs().max() < 1e-12
    walked = sampled_covariance(prior, karras_grid(2_000, sigma_n, 80.0), 4)
    assert (walked - truncated).abs().max() < 0.01 * truncated.abs().max()
    missing = torch.linalg.eigvalsh(prior.cov - truncated)
    assert missing.min() > 0 and missing.max() > 0.25  # under-dispersed in every direction
    full = sampled_covariance(prior, karras_grid(2_000, 1e-3, 80.0), 4)
    assert (full - prior.cov).abs().max() < 0.01 * prior.cov.abs().max()


def test_fixed_mask_sampling_is_rank_deficient():
    """[17] with one coordinate masked, h is a function of the others alone, and so is every sample."""
    prior = gaussian_prior((1, 1, 4))
    exact = ConditionalMean(prior, Masking(torch.ones(1, 1, 1, 4), (1, 1, 4)))
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64).reshape(1, 1, 1, 4)

    def fixed(x: Tensor, sigma) -> Tensor:
        return exact(x.reshape(-1, 1, 1, 4) * mask, float(sigma), KeptRows(Masking(mask, (1, 1, 4)))).flatten(
            1
        )

    values = torch.linalg.eigvalsh(sampled_covariance(fixed, karras_grid(60, 1e-2, 80.0), 4))
    assert values[0].abs() < 1e-12 * values[-1]
    assert values[1] > 0.05 and prior.values.min() > 0.05
    complete = sampled_covariance(
        lambda x, s: prior(x.reshape(-1, 1, 1, 4), s).flatten(1), karras_grid(60, 1e-2, 80.0), 4
    )
    assert torch.linalg.eigvalsh(complete)[0] > 0.05  # fmt: skip


def test_mixture_estimates_of_a_batch_do_not_mix():
    """A wild sample in the batch leaves the others' consistency loss as it was."""
    prior, x_t = mixture_prior(SHAPE), normal(3, *SHAPE)
    wild = x_t.clone()
    wild[2] *= 1e3
    a, b = (losses.consistency(prior, x, 0.8, 0.3, generator=seeded(1)) for x in (x_t, wild))
    assert (a - b)[:2].abs().max() < 1e-12 and (a - b)[2].abs() > 1e-5
