r"""The operator-aware Tweedie loss is minimised by E[x_0 | y~, B], for every operator, and not without the Tweedie correction. [14]

The loss of one sample is quadratic in h. Along h + e d, with a direction d(z, B) of what the network sees, the derivative at e = 0 is
therefore exactly (L(+1) - L(-1)) / 2 with the same noise, and its expectation is zero at the conditional mean for *every* d. Per operator,
the mean over N independent samples must lie within 4.5 standard errors (false alarm 7e-6 a test, by the normal approximation);
without the correction it must lie more than 10 away.
"""

from __future__ import annotations

import pytest
import torch
from closed_forms import (
    F64,
    ambient_step,
    coil_maps,
    gaussian_prior,
    mixture_prior,
    normal,
    seeded,
    uncorrected,
    z_score,
)
from torch import Tensor

from ambient_sci import losses
from ambient_sci.operators import MRI, Identity, Masking, RowMaskedOperator, design_from_dict, make_design
from ambient_sci.priors import ConditionalMean, KeptRows, Prior

LEVELS = {"sigma_y": (0.2, 0.5), "sigma": (0.5, 1.2)}


class Shifted(Prior):
    """h + e d with d = z - h - 1/4: what is left of the input, so that a bias towards the data shows at first order."""

    def __init__(self, exact: Prior, step: float) -> None:
        super().__init__()
        self.exact, self.step = exact, step
        self.shape, self.data_std, self.takes = exact.shape, exact.data_std, exact.takes

    def forward(self, x: Tensor, sigma, given=None) -> Tensor:  # type: ignore[override]
        h = self.exact(x, sigma, given)
        return h + self.step * (x - h - 0.25)


class Once(Prior):
    """Computes the exact mean once: with the same split and noise, every variant of the loss asks for the same one."""

    def __init__(self, exact: Prior) -> None:
        super().__init__()
        self.exact, self.known = exact, None
        self.shape, self.data_std, self.takes = exact.shape, exact.data_std, exact.takes

    def forward(self, x: Tensor, sigma, given=None) -> Tensor:  # type: ignore[override]
        if self.known is None:
            self.known = x, self.exact(x, sigma, given)
        assert torch.equal(x, self.known[0])
        return self.known[1]


def derivative(
    exact: Prior, operator: RowMaskedOperator, y, sigma_y, sigma, loss=losses.ambient, **options
) -> Tensor:
    """d/de of each sample's loss at h."""
    up, down = (
        loss(Shifted(exact, step), operator, y, sigma_y, sigma, generator=seeded(11), c_min=1e-6, **options)
        for step in (1.0, -1.0)
    )
    return (up - down) / 2


def uniform(num: int, low: float, high: float, seed: int) -> Tensor:
    return low + (high - low) * torch.rand(num, generator=seeded(seed), dtype=F64)


def measured(operator: RowMaskedOperator, prior, num: int):
    """y of a prior's draws under per-sample noise levels, some of them 0, and the levels to train at (some equal to sigma_y)."""
    sigma_y, sigma = uniform(num, *LEVELS["sigma_y"], 1), uniform(num, *LEVELS["sigma"], 2)
    sigma_y[: num // 8] = 0.0
    sigma[-num // 16 :] = sigma_y[-num // 16 :]
    clean = operator.A(prior.sample(num, seeded(3)))
    noise = normal(*clean.shape, seed=4) * sigma_y.reshape(-1, *[1] * (clean.ndim - 1))
    return (clean + noise) * operator.mask, sigma_y, sigma


def masks(name: str, num: int, image_shape: tuple[int, int, int], **options):
    design = make_design(name, image_shape=image_shape, **options)
    return design, design.sample(num, seeded(0)).to(F64)


def masking(name: str, num: int, image_shape: tuple[int, int, int], **options) -> RowMaskedOperator:
    design, mask = masks(name, num, image_shape, **options)
    return Masking(mask, image_shape, design).to(F64)


def mri(name: str, num: int, size: tuple[int, int], maps: Tensor | None = None, **options):
    design, mask = masks(name, num, (2, *size), **options)
    return MRI(mask, maps, design).to(F64)


def varied_density(num: int) -> RowMaskedOperator:
    """Lines of a fixed budget with odds that differ by eight, calibration line included."""
    design = design_from_dict(
        {"name": "fixed-budget", "image_shape": [2, 2, 6], "layout": "columns", "budget": 3, "weights": [1, 2, 4, 1, 8, 1], "always": [3]}
    )  # fmt: skip
    return MRI(design.sample(num, seeded(0)), design=design).to(F64)


CASES = {
    "identity, all rows kept": (lambda n: Identity((1, 3, 3)).to(F64), 40_000, {"keep": 1.0}),
    "identity, rows held out": (lambda n: Identity((1, 3, 3)).to(F64), 10_000, {"keep": 0.7}),
    "bernoulli pixels": (lambda n: masking("bernoulli", n, (2, 2, 3), keep=0.7), 10_000, {"keep": 0.7}),
    "bernoulli entries": (lambda n: masking("bernoulli-entries", n, (2, 2, 3), keep=0.6), 10_000, {"keep": 0.5}),
    "pixels of unknown design": (lambda n: Masking((torch.rand(n, 1, 3, 3, generator=seeded(0)) < 0.7).index_fill(3, torch.tensor(0), True)).to(F64), 10_000, {"keep": 0.7}),
    "box": (lambda n: masking("box", n, (1, 4, 4), box=(1, 1)), 5_000, {"keep": 0.5}),
    "lines": (lambda n: mri("lines-uniform", n, (2, 6), acceleration=1.5, acs=1), 7_000, {"keep": 0.6}),
    "lines, all kept": (lambda n: mri("lines-uniform", n, (2, 6), acceleration=1.5, acs=1), 5_000, {"keep": 1.0}),
    "variable lines": (varied_density, 7_000, {"keep": 0.6}),
    "coils": (lambda n: mri("lines-bernoulli", n, (2, 5), coil_maps(3, 2, 5), acceleration=1.7, acs=1), 7_000, {"keep": 0.6}),
    "coils of each scan": (lambda n: mri("lines-uniform", n, (2, 5), coil_maps(2, 2, 5, batch=n), acceleration=1.7, acs=1), 9_000, {"keep": 0.6}),
    "coils, complete": (lambda n: MRI(torch.ones(2, 4), coil_maps(3, 2, 4)).to(F64), 10_000, {"keep": 1.0}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request):
    build, num, options = CASES[request.param]
    operator = build(num)
    shape = (
        operator.img_size
        if operator.img_size[0] != 1 or operator.name == "identity"
        else (1, *operator.img_size[1:])
    )
    prior = mixture_prior(shape)
    exact: Prior = prior if operator.complete and options["keep"] == 1 else ConditionalMean(prior, operator)
    return Once(exact), operator, *measured(operator, prior, num), options


@pytest.mark.parametrize("weighting", ["inverse-variance", "unbiased", "unit"])
def test_expected_gradient_is_zero_at_the_conditional_mean(case, weighting):
    exact, operator, y, sigma_y, sigma, options = case
    slope = derivative(exact, operator, y, sigma_y, sigma, weighting=weighting, **options)
    assert abs(z_score(slope)) < 4.5


def test_expected_gradient_is_not_zero_without_the_tweedie_correction(case):
    """Kept rows are fitted noise and all: the slope towards the data is negative, far from zero."""
    exact, operator, y, sigma_y, sigma, options = case
    slope = derivative(exact, operator, y, sigma_y, sigma, loss=uncorrected, **options)
    assert z_score(slope) < -10


def test_expected_gradient_is_not_zero_elsewhere(case):
    """The same statistic sees a shrinkage of h by a few per cent of its distance to the data."""
    exact, operator, y, sigma_y, sigma, options = case
    slope = derivative(Shifted(exact, 0.2), operator, y, sigma_y, sigma, **options)
    assert z_score(slope) > 10


def test_gaussian_prior_and_matrix_levels():
    """As above for a full covariance, one level for all."""
    operator = mri("lines-uniform", 4_000, (2, 6), acceleration=1.5, acs=1)
    prior = gaussian_prior((2, 2, 6))
    clean = operator.A(prior.sample(4_000, seeded(3)))
    y = (clean + 0.4 * normal(*clean.shape, seed=4)) * operator.mask
    exact = Once(ConditionalMean(prior, operator))
    assert abs(z_score(derivative(exact, operator, y, 0.4, 0.8, keep=0.6))) < 4.5
    assert z_score(derivative(exact, operator, y, 0.4, 0.8, keep=0.6, loss=uncorrected)) < -10
    # A wrong noise level of the data is a wrong correction.
    exact = Once(ConditionalMean(prior, operator))
    assert z_score(derivative(exact, operator, y, 0.6, 0.8, keep=1.0)) > 10
    exact = Once(ConditionalMean(prior, operator))
    assert z_score(derivative(exact, operator, y, 0.2, 0.8, keep=1.0)) < -10


class Rival(Prior):
    """Some function of (z, B), weighted as 1: neither exact nor linear, and not zero where nothing was kept."""

    takes = KeptRows
    data_std = 1.0

    def __init__(self, gain: float, offset: float) -> None:
        super().__init__()
        self.gain, self.offset = gain, offset

    def loss_weight(self, sigma: Tensor, fraction=1.0) -> Tensor:
        return torch.ones_like(sigma)

    def forward(self, x: Tensor, sigma, given=None) -> Tensor:  # type: ignore[override]
        mask = given.mask.expand(len(x), -1, -1, -1)
        return torch.tanh(
            self.gain * x * (1 + mask.flatten(1).mean(1).reshape(-1, 1, 1, 1))
        ) + self.offset * (mask - 0.5)


UNBIASED = {
    "independent": lambda n: masking("bernoulli", n, (1, 2, 3), keep=0.7),
    "entries": lambda n: masking("bernoulli-entries", n, (2, 2, 2), keep=0.7),
    "budget": lambda n: mri("lines-uniform", n, (1, 6), acceleration=1.5, acs=1),
    "variable density": varied_density,
    "box": lambda n: masking("box", n, (1, 3, 4), box=(1, 1)),
    "coils": lambda n: mri("lines-bernoulli", n, (1, 5), coil_maps(3, 1, 5), acceleration=1.7, acs=1),
    # What sees z and B, but not the maps of the scan: only exact weights teach it E[x_0 | z, B].
    "coils of each scan": lambda n: mri("lines-uniform", n, (1, 5), coil_maps(2, 1, 5, batch=n), acceleration=1.7, acs=1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNBIASED)
def test_exact_weights_make_the_loss_an_unbiased_squared_error(name):
    """[15] E[L(h1) - L(h2)] = E||h1 - x0||^2 - E||h2 - x0||^2, per entry, for wrong h; other weights miss it. 4.5 and 10 errors."""
    num = 40_000
    operator = UNBIASED[name](num)
    shape = operator.img_size
    x0 = mixture_prior(shape).sample(num, seeded(3))
    y = operator.A(x0)
    y = (y + 0.3 * normal(*y.shape, seed=4)) * operator.mask
    undesigned = operator.with_mask(operator.mask)  # held-out rows of an unknown design have weight 1
    found = {}
    for weights, weighting, op in (
        ("exact", "unbiased", operator),
        ("kept rows by inverse variance", "inverse-variance", operator),
        ("kept rows equally", "unit", operator),
        ("held-out rows equally", "unbiased", undesigned),
    ):
        a, b = (
            ambient_step(h, op, y, 0.3, 0.5, keep=0.6, generator=seeded(5), weighting=weighting, c_min=0.0)
            for h in (Rival(0.4, 0.0), Rival(0.9, 2.0))
        )
        truth = [(s.denoised - x0).square().flatten(1).mean(1) for s in (a, b)]
        found[weights] = z_score(a.loss - b.loss - (truth[0] - truth[1]))
    assert abs(found.pop("exact")) < 4.5
    assert all(abs(z) > 10 for z in found.values())
