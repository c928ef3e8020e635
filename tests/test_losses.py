r"""The losses as a user calls them: special cases that must hold exactly, batches that must not couple, input that is refused."""

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
    operator_zoo,
    random_mask,
    seeded,
    z_score,
)
from torch import Tensor

from ambient_sci import losses
from ambient_sci.errors import ConditioningError, IdentifiabilityError, InputError
from ambient_sci.losses import kept_weight
from ambient_sci.noise import ChainNoise, draw_noise
from ambient_sci.operators import (
    MRI,
    Identity,
    Independent,
    Masking,
    RowMaskedOperator,
    Unknown,
    make_design,
)
from ambient_sci.priors import ConditionalMean, KeptRows, Prior

SHAPE = (2, 4, 3)


@pytest.fixture
def prior():
    return mixture_prior(SHAPE)


# -- special cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["inverse-variance", "unbiased", "unit"])
def test_noise_free_complete_data_give_the_denoising_loss(prior, weighting):
    x0, sigma = normal(5, *SHAPE), torch.tensor([0.01, 0.1, 0.5, 2.0, 50.0], dtype=F64)
    expected = losses.denoising(prior, x0, sigma, generator=seeded(1))
    found = losses.ambient(prior, Identity(SHAPE), x0, 0.0, sigma, generator=seeded(1), weighting=weighting)
    assert expected.shape == (5,)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_denoising_loss_by_hand(prior):
    """lambda(sigma) = 1/sigma^2 + 1/d^2, mean over a sample's entries."""
    x0, sigma = normal(3, *SHAPE), 0.5
    error = prior(x0 + sigma * draw_noise(x0, seeded(1)), sigma) - x0
    expected = (1 / sigma**2 + 1 / prior.data_std**2) * error.square().flatten(1).mean(1)
    assert torch.allclose(losses.denoising(prior, x0, sigma, generator=seeded(1)), expected, rtol=1e-12)


@pytest.mark.parametrize("keep", [1.0, 0.6])
@pytest.mark.parametrize("name", operator_zoo())
def test_ambient_loss_by_hand(name, keep):
    """lambda / n [ (1/c) |c A_B h + (1-c) y~ - y|^2 + sum_H w_i (A_H h - y)_i^2 ], row by row, on one split and one noise."""
    operator = operator_zoo()[name]
    prior = ConditionalMean(mixture_prior(operator.img_size), operator)
    sigma_y, sigma = torch.tensor([0.0, 0.3, 0.5], dtype=F64), torch.tensor([0.4, 0.35, 2.0], dtype=F64)
    y = normal(3, *operator.measurement_size, seed=1) * operator.mask
    step = ambient_step(prior, operator, y, sigma_y, sigma, keep=keep, generator=seeded(2), c_min=1e-3)

    rows = operator.with_mask(operator.mask.expand(3, *operator.mask.shape[1:]))
    generator = seeded(2)
    split = rows.split(keep=keep, generator=generator)
    noise = draw_noise(y, generator)
    for i in range(3):
        n, t = float(sigma_y[i]), float(sigma[i])
        c = 1 - n**2 / t**2
        full, kept, weight = (
            m[i % len(m)].expand(y.shape[1:]) for m in (rows.mask, split.kept.mask, split.weights)
        )
        y_t = y[i] + (t**2 - n**2) ** 0.5 * noise[i]
        one = split.kept[i]
        h = ConditionalMean(prior.prior, one)(one.A_adjoint(y_t[None]), t, KeptRows(one))
        prediction = operator[i].transform(h)[0]
        on_kept = kept * (c * prediction + (1 - c) * y_t - y[i]).square() / c
        on_held = (full - kept) * weight * (prediction - y[i]).square()
        d, f = prior.data_std, float(kept.mean())
        scale = 1 / (d**2 * (1 - f * d**2 / (d**2 + t**2)))
        assert abs(float(step.loss[i] - scale * (on_kept + on_held).sum() / h.numel())) < 1e-10
        assert torch.allclose(step.denoised[i], h[0], atol=1e-10)
        assert torch.equal(step.y_t[i] * kept, y_t * kept)
    if keep == 1:
        assert torch.equal(step.kept.mask, operator.mask)


def test_single_coil_kspace_and_image_space_losses_are_one(prior, monkeypatch):
    """A unitary transform of data and noise changes nothing: complete MRI scans train as noisy images do."""
    operator = MRI(torch.ones(SHAPE[1:])).to(F64)
    x, z = normal(2, 3, *SHAPE)
    monkeypatch.setattr("ambient_sci.losses.tweedie_loss.draw_noise", lambda like, generator: noise)
    noise = z
    expected = losses.ambient(prior, Identity(SHAPE), x, 0.3, 0.8)
    noise = operator.A(z)
    assert torch.allclose(losses.ambient(prior, operator, operator.A(x), 0.3, 0.8), expected, rtol=1e-11)


# -- batches -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", operator_zoo())
def test_loss_of_a_batch_is_the_losses_of_its_samples(name):
    operator = operator_zoo()[name]
    prior = mixture_prior(operator.img_size)
    sigma_y, sigma = torch.tensor([0.0, 0.3, 0.5], dtype=F64), torch.tensor([0.4, 0.35, 2.0], dtype=F64)
    y = normal(3, *operator.measurement_size, seed=1)

    def loss(i: slice) -> Tensor:
        exact = prior if operator.complete else ConditionalMean(prior, operator[i])
        streams = ChainNoise([5, 6, 7][i])  # each sample has noise of its own, whatever it is batched with
        return losses.ambient(exact, operator[i], y[i], sigma_y[i], sigma[i], generator=streams)

    together = loss(slice(0, 3))
    for i in range(3):
        assert torch.allclose(loss(slice(i, i + 1))[0], together[i], rtol=1e-11)


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_a_wild_sample_leaves_the_others_alone(keep):
    operator = operator_zoo()["mri"]
    prior = ConditionalMean(mixture_prior(operator.img_size), operator)
    y = normal(3, *operator.measurement_size)
    wild = y.clone()
    wild[2] *= 1e4
    a, b = (losses.ambient(prior, operator, v, 0.3, 0.8, keep=keep, generator=seeded(1)) for v in (y, wild))
    assert torch.allclose(a[:2], b[:2], rtol=1e-12) and bool(b[2] > 10 * a[2])


@pytest.mark.parametrize("operator", [Identity(SHAPE), MRI(torch.ones(SHAPE[1:])), Masking(random_mask(1, *SHAPE[1:]), SHAPE)])  # fmt: skip
def test_one_mask_for_all_is_split_for_each(operator):
    """The rows a network sees differ from sample to sample, pixel by pixel, also where the data share one mask."""
    operator = operator.to(F64)
    prior = ConditionalMean(mixture_prior(SHAPE), operator)
    step = ambient_step(prior, operator, normal(16, *SHAPE), 0.3, 0.8, keep=0.5, generator=seeded(1))
    kept = step.kept.network_mask
    assert kept.shape == (16, 1, 4, 3)
    assert len(torch.unique(kept.flatten(1), dim=0)) > 5
    assert 0.2 < float(kept.sum() / (16 * operator.network_mask.sum())) < 0.8
    assert bool((kept <= operator.network_mask).all())


def test_levels_of_each_sample(prior):
    """A clean and a noisy image in one batch: the clean one has the denoising loss, and the form of the levels does not matter."""
    y, sigma = normal(2, *SHAPE), 0.8
    mixed = losses.ambient(
        prior, Identity(SHAPE), y, torch.tensor([0.0, 0.5], dtype=F64), sigma, generator=seeded(1)
    )
    assert torch.allclose(mixed[0], losses.denoising(prior, y, sigma, generator=seeded(1))[0], rtol=1e-12)
    assert torch.allclose(
        mixed[1], losses.ambient(prior, Identity(SHAPE), y, 0.5, sigma, generator=seeded(1))[1], rtol=1e-12
    )
    for level in (
        torch.tensor(sigma),
        torch.full((2,), sigma, dtype=F64),
        torch.full((2, 1, 1, 1), sigma, dtype=F64),
    ):
        found = losses.ambient(prior, Identity(SHAPE), y, 0.3, level, generator=seeded(1))
        assert found.shape == (2,)
        assert torch.allclose(found, losses.ambient(prior, Identity(SHAPE), y, 0.3, sigma, generator=seeded(1)), rtol=1e-6)  # fmt: skip


def test_clean_below_a_level_and_frozen_noise_above_it_is_one_call(prior):
    """Algorithm 1 of ambient training against memorisation: denoising of x_0 below sigma_n, the Ambient loss of x_0 + sigma_n n
    above it, sample by sample, because sigma_y is one a sample."""
    x0, frozen, sigma_n = normal(6, *SHAPE), normal(6, *SHAPE, seed=1), 0.4
    sigma = torch.tensor([0.05, 0.3, 0.399, 0.4, 0.7, 3.0], dtype=F64)
    noisy = sigma >= sigma_n
    sigma_y = sigma_n * noisy.to(F64)
    y = x0 + sigma_y.reshape(-1, 1, 1, 1) * frozen
    found = losses.ambient(prior, Identity(SHAPE), y, sigma_y, sigma, generator=seeded(2))
    below = losses.denoising(prior, x0, sigma, generator=seeded(2))
    above = losses.ambient(prior, Identity(SHAPE), x0 + sigma_n * frozen, sigma_n, sigma.clamp(min=sigma_n), generator=seeded(2))  # fmt: skip
    assert torch.allclose(found, torch.where(noisy, above, below), rtol=1e-12, atol=0)
    assert not torch.allclose(above, below, rtol=1e-2)


# -- noise that differs by entry -----------------------------------------------------------------------------------------------


class DiagonalNoise(Prior):
    """E[x_0 | x_0 + noise] of a Gaussian under noise of a level for each entry, sigma (B, ...)."""

    conditioning = "unconditional"

    def __init__(self, gaussian, step: float = 0.0) -> None:
        super().__init__()
        self.gaussian, self.step = gaussian, step
        self.shape, self.data_std = gaussian.shape, gaussian.data_std

    def forward(self, x, sigma, mask=None):  # type: ignore[override]
        level = torch.as_tensor(sigma, dtype=F64)
        level = level.reshape(-1, 1, 1, 1).expand_as(x) if level.ndim < 2 else level
        cov, rest = self.gaussian.cov, (x - self.gaussian.mean).flatten(1)
        gain = torch.linalg.solve(cov + torch.diag_embed(level.flatten(1) ** 2), rest[..., None])
        h = self.gaussian.mean + (cov @ gain)[..., 0].reshape(x.shape)
        return h + self.step * (x - h - 0.25)


@pytest.mark.parametrize("total", ["one level a sample", "a level for each entry"])
@pytest.mark.parametrize("kind", ["identity", "masking"])
def test_noise_that_differs_by_entry(total, kind):
    """The derivative of the loss at the exact denoiser, along a direction, is 0 within 4.5 standard errors; with the levels of two
    halves of the image exchanged it is 10 away."""
    num, gaussian = 40_000, gaussian_prior((1, 2, 4))
    sigma_y = 0.7 * torch.rand(num, 1, 2, 4, generator=seeded(1), dtype=F64)
    sigma_y[..., :2] *= 0.2  # one half is nearly clean
    sigma = torch.full((num,), 0.9, dtype=F64)
    if total == "a level for each entry":
        sigma = (sigma_y**2 + 0.3**2 + torch.rand(num, 1, 2, 4, generator=seeded(2), dtype=F64)).sqrt()
    operator = (
        Identity((1, 2, 4)).to(F64) if kind == "identity" else Masking(torch.ones(2, 4), (1, 2, 4)).to(F64)
    )
    y = gaussian.sample(num, seeded(3)) + sigma_y * normal(num, 1, 2, 4, seed=4)

    def slope(levels: Tensor, **options) -> float:
        up, down = (
            losses.ambient(DiagonalNoise(gaussian, step), operator, y, levels, sigma, generator=seeded(5), c_min=1e-6, **options)
            for step in (1.0, -1.0)
        )  # fmt: skip
        assert up.shape == (num,)
        return z_score((up - down) / 2)

    for weighting in ("inverse-variance", "unbiased", "unit"):
        assert abs(slope(sigma_y, weighting=weighting)) < 4.5
    swapped = torch.minimum(sigma_y.flip(-1), sigma if sigma.ndim > 1 else sigma.reshape(-1, 1, 1, 1))
    assert abs(slope(swapped)) > 10


def test_levels_of_entries_by_hand():
    """lambda(sigma_i) omega(c_i) inside the sum over entries."""
    prior = DiagonalNoise(gaussian_prior((1, 2, 4)))
    y, sigma_y = normal(3, 1, 2, 4), 0.5 * torch.rand(3, 1, 2, 4, generator=seeded(1), dtype=F64)
    sigma = (sigma_y**2 + 0.1 + torch.rand(3, 1, 2, 4, generator=seeded(2), dtype=F64)).sqrt()
    found = losses.ambient(prior, Identity((1, 2, 4)), y, sigma_y, sigma, generator=seeded(3))
    y_t = y + (sigma**2 - sigma_y**2).sqrt() * draw_noise(y, seeded(3))
    c = 1 - sigma_y**2 / sigma**2
    error = (c * prior(y_t, sigma) + (1 - c) * y_t - y).square() / c.clamp(min=0.05)
    expected = ((1 / sigma**2 + 1 / prior.data_std**2) * error).flatten(1).mean(1)
    assert torch.allclose(found, expected, rtol=1e-10)
    same = losses.ambient(
        prior, Identity((1, 2, 4)), y, torch.full_like(y, 0.3), torch.full_like(y, 0.8), generator=seeded(3)
    )
    assert torch.allclose(same, losses.ambient(prior, Identity((1, 2, 4)), y, 0.3, 0.8, generator=seeded(3)))


def test_levels_of_entries_that_a_transform_would_mix(prior):
    with pytest.raises(InputError, match="one sigma per sample for a mri operator"):
        losses.ambient(
            prior, MRI(torch.ones(4, 3)).to(F64), normal(2, *SHAPE), 0.1, torch.full((2, *SHAPE), 0.8)
        )
    with pytest.raises(InputError, match="per entry"):
        losses.consistency(prior, normal(2, *SHAPE), torch.full((2, *SHAPE), 0.8), 0.3)


# -- what a denoiser is told besides -------------------------------------------------------------------------------------------


class Classes:
    """One number for each sample."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def repeat(self, times: int) -> Classes:
        return Classes(self.values.repeat(times))


class Told(Prior):
    """The Gaussian's denoiser, plus the number that it is told."""

    conditioning = "unconditional"

    def __init__(self) -> None:
        super().__init__()
        self.gaussian = gaussian_prior(SHAPE)
        self.shape, self.data_std = SHAPE, self.gaussian.data_std

    def forward(self, x, sigma, given=None):  # type: ignore[override]
        shift = 0.0 if given is None else given.values.reshape(-1, 1, 1, 1)
        return self.gaussian(x, sigma) + shift


def test_what_a_denoiser_is_told_goes_with_its_sample():
    prior, y, values = Told(), normal(3, *SHAPE), torch.tensor([0.0, 1.0, -2.0], dtype=F64)
    told = {"given": Classes(values), "generator": None}
    for loss, arguments in (
        (losses.ambient, (Identity(SHAPE), y, 0.3, 0.8)),
        (losses.consistency, (y, 0.8, 0.3)),
    ):
        found, plain = (
            loss(prior, *arguments, **{**told, "generator": seeded(1), **more})
            for more in ({}, {"given": None})
        )
        assert torch.allclose(found[0], plain[0]) and not torch.allclose(found[1:], plain[1:], rtol=1e-3)
        for i in range(3):  # every sample told the same
            one = Classes(torch.full((3,), float(values[i]), dtype=F64))
            alone = loss(prior, *arguments, given=one, generator=seeded(1))
            assert torch.allclose(found[i], alone[i])
    missing = ConditionalMean(gaussian_prior(SHAPE), Masking(random_mask(3, *SHAPE[1:]), SHAPE).to(F64))
    with pytest.raises(ConditioningError, match="got Classes"):
        losses.ambient(missing, missing.operator, y, 0.3, 0.8, given=Classes(values))


# -- weights -----------------------------------------------------------------------------------------------------------------


def test_weight_of_kept_rows():
    c = torch.tensor([0.0, 0.01, 0.5, 1.0], dtype=F64)
    assert torch.allclose(
        kept_weight(c, "inverse-variance", 0.05), torch.tensor([20.0, 20.0, 2.0, 1.0]).double()
    )
    assert torch.allclose(kept_weight(c, "unbiased", 0.1), torch.tensor([100.0, 100.0, 4.0, 1.0]).double())
    assert torch.equal(kept_weight(c, "unit", 0.1), torch.ones(4, dtype=F64))
    with pytest.raises(InputError, match="weighting"):
        kept_weight(c, "none", 0.1)  # type: ignore[arg-type]


class Preconditioned(ConditionalMean):
    """The exact conditional mean, and a correction u(B) in proportion to what the loss is differentiated by, as a prior that separates rows."""

    separates_rows = True

    def forward(self, x, sigma, given=None):  # type: ignore[override]
        h = super().forward(x, sigma, given)
        gram = given.gram
        self.directions = torch.stack([torch.ones_like(x), x, gram(torch.ones_like(x)), gram(x.abs())])
        self.step = torch.zeros(4, len(x), dtype=x.dtype, requires_grad=True)
        return h + torch.einsum("kb,kb...->b...", self.step, self.directions)


ONE_COIL = MRI(random_mask(3, 1, 4, 3), coil_maps(1, 4, 3, batch=3)).to(F64)  # a phase map for each scan


@pytest.mark.parametrize("name", [*operator_zoo(), "mri, one coil of each scan"])
def test_kept_and_held_out_rows_weighed_apart_by_hand(name):
    """(1/sigma^2 + 1/d^2) / c on kept rows and w_i / d^2 on held-out ones where T is one for all; one lambda where coil maps are involved."""
    operator = operator_zoo().get(name, ONE_COIL)
    prior = Preconditioned(mixture_prior(operator.img_size), operator)
    sigma_y, sigma = torch.tensor([0.0, 0.3, 0.5], dtype=F64), torch.tensor([0.01, 0.3, 2.0], dtype=F64)
    y = normal(3, *operator.measurement_size, seed=1) * operator.mask
    step = ambient_step(prior, operator, y, sigma_y, sigma, keep=0.6, generator=seeded(2), c_min=0.05)
    each = operator.with_mask(operator.mask.expand(3, *operator.mask.shape[1:]))
    split = each.split(keep=0.6, generator=seeded(2))
    n, t, d = sigma_y.double(), sigma.double(), prior.data_std
    fraction = split.kept.mask.flatten(1).mean(1)
    apart = "coil" not in name
    level = 1 / t**2 + 1 / d**2 if apart else 1 / (d**2 * (1 - fraction * d**2 / (d**2 + t**2)))
    other = torch.full_like(t, d**-2) if apart else level
    c = 1 - n**2 / t**2
    shape = (3, *[1] * (y.ndim - 1))
    predicted, c_ = operator.transform(step.denoised), c.reshape(shape)
    kept = (c_ * predicted + (1 - c_) * step.y_t - y).square() / c_.clamp(min=0.05) * split.kept.mask
    held = (predicted - y).square() * split.weights * (1 - split.kept.mask)
    expected = level * kept.flatten(1).sum(1) + other * held.flatten(1).sum(1)
    assert torch.allclose(step.loss, expected / step.denoised[0].numel(), rtol=1e-9)
    assert torch.isfinite(step.loss).all()  # also where sigma = sigma_y


@pytest.mark.parametrize("name", ["masking of entries", "mri"])
def test_weighing_rows_apart_leaves_the_minimiser_where_it_was(name):
    """The derivative of the loss at the exact conditional mean is zero in expectation, along functions of (z, B) on all, and on kept rows."""
    num, shape = 6000, (2, 2, 2)
    truth = gaussian_prior(shape)
    channels = 2 if "entries" in name else 1
    design = Independent((channels, 2, 2), "entries" if channels == 2 else "pixels", 0.7)
    mask = design.sample(num, seeded(1)).to(F64)
    if channels == 2:
        operator = Masking(mask, shape, design=design).to(F64)
    else:
        operator = MRI(mask, design=design).to(F64)
    sigma_y = torch.where(torch.arange(num) % 2 == 0, 0.0, 0.2).to(F64)
    y = operator.transform(truth.sample(num, seeded(3)))
    level = sigma_y.reshape(-1, *[1] * (y.ndim - 1))
    y = (y + level * torch.randn(y.shape, generator=seeded(4), dtype=F64)) * operator.mask
    prior = Preconditioned(truth, operator)
    loss = losses.ambient(prior, operator, y, sigma_y, 0.3, keep=0.6, generator=seeded(5))
    slopes = torch.autograd.grad(loss.sum(), prior.step)[0]
    assert all(abs(z_score(s)) < 4.5 for s in slopes), [z_score(s) for s in slopes]


def test_level_weight_in_single_precision():
    """1/sigma^2 + 1/d^2 to 1e-5 however small sigma is against the data, and 1/(d^2 (1 - f)) where rows are missing."""
    prior = Prior()
    prior.data_std = 3000.0
    sigma = torch.tensor([1e-3, 0.1, 10.0, 1e4])
    exact = 1 / sigma.double() ** 2 + 1 / 3000.0**2
    assert torch.allclose(prior.loss_weight(sigma).double(), exact, rtol=1e-5, atol=0)
    assert float(prior.loss_weight(torch.tensor(1e-3), 0.75)) == pytest.approx(
        1 / (3000.0**2 * 0.25), rel=1e-5
    )


def lines(num: int = 12, coils: int = 2):
    """K-space lines of variable density with three calibration lines, maps that vary by scan, and a prior that knows them."""
    design = make_design("lines-variable", image_shape=(2, 4, 11), acceleration=1.6, acs=3)
    maps = coil_maps(coils, 4, 11, batch=num)
    operator = MRI(design.sample(num, seeded(1)), maps, design).to(F64)
    prior = ConditionalMean(mixture_prior((2, 4, 11)), operator)
    return prior, operator, normal(num, 2, coils, 4, 11, seed=2) * operator.mask


def test_calibration_lines_kept_always():
    """Every kept set then has the calibration lines, the other lines are split as before, and the calibration lines' weight is 1."""
    prior, operator, y = lines()
    always = operator.design.to_mask(operator.design.always[None].double())
    found = {}
    for hold_out in (True, False):
        step = ambient_step(
            prior, operator, y, 0.3, 0.8, keep=0.6, generator=seeded(3), keep_calibration=not hold_out
        )
        found[hold_out] = step.kept.network_mask
    assert bool(((found[True] * always) != always).any()) and bool(((found[False] * always) == always).all())
    assert torch.equal(found[True] * (1 - always), found[False] * (1 - always))
    assert bool((found[False] <= operator.network_mask).all())
    c = 1 - 0.3**2 / 0.8**2
    on_kept = (c * operator.transform(step.denoised) + (1 - c) * step.y_t - y).square() / c
    on_held = (operator.transform(step.denoised) - y).square()
    weights = operator.split(keep=0.6, generator=seeded(3)).weights
    squared = torch.where(found[False][:, :, None] > 0, on_kept, on_held) * weights
    expected = prior.loss_weight(torch.full((12,), 0.8, dtype=F64), step.kept.kept_fraction)
    expected = expected * squared.flatten(1).sum(1) / step.denoised[0].numel()
    assert torch.allclose(step.loss, expected, rtol=1e-9)


def test_calibration_lines_cannot_be_kept_where_there_are_none():
    for design in (None, make_design("lines-variable", image_shape=SHAPE, acceleration=1.5, acs=0)):
        rows = random_mask(2, *SHAPE[1:]) if design is None else design.sample(2, seeded(0))
        with pytest.raises(InputError, match="always measured, got"):
            MRI(rows, design=design).split(keep=0.5, generator=seeded(0), keep_calibration=True)


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_unconditional_priors_need_complete_rows(prior):
    """Rows missing from A, rows held out of it, and maps of another scale each say what is wrong."""
    y = normal(2, *SHAPE)
    missing = Masking(random_mask(2, *SHAPE[1:]), SHAPE).to(F64)
    with pytest.raises(ConditioningError, match="mask-conditional prior"):
        losses.ambient(prior, missing, y, 0.3, 0.8)
    with pytest.raises(ConditioningError, match="mask-conditional prior"):
        losses.ambient(prior, Identity(SHAPE), y, 0.3, 0.8, keep=0.5, generator=seeded(0))
    loud = MRI(torch.ones(SHAPE[1:]), 2 * coil_maps(3, *SHAPE[1:])).to(F64)
    with pytest.raises(ConditioningError, match="Normalise the coil maps"):
        losses.ambient(prior, loud, normal(2, 2, 3, *SHAPE[1:]), 0.3, 0.8)
    with pytest.raises(ConditioningError, match="unconditional"):
        losses.denoising(ConditionalMean(prior, missing), y, 0.3)


def test_levels_below_the_noise_of_the_data(prior):
    y = normal(2, *SHAPE)
    with pytest.raises(InputError, match="sigma_n <= sigma_t"):
        losses.ambient(prior, Identity(SHAPE), y, 0.5, 0.4)
    with pytest.raises(InputError, match="sigma_n <= sigma_t"):
        losses.ambient(prior, Identity(SHAPE), y, torch.tensor([0.1, 0.5]), 0.4)
    assert losses.ambient(prior, Identity(SHAPE), y, 0.4, 0.4).isfinite().all()


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5])
def test_keep_out_of_range(prior, keep):
    with pytest.raises(InputError, match="keep in"):
        losses.ambient(prior, Identity(SHAPE), normal(2, *SHAPE), 0.3, 0.8, keep=keep)


def test_measurements_that_do_not_fit(prior):
    for operator, y in (
        (Identity(SHAPE), normal(2, 2, 4, 4)),
        (MRI(torch.ones(3, 4, 3)), normal(2, *SHAPE)),
        (MRI(torch.ones(4, 3), coil_maps(3, 4, 3)), normal(2, *SHAPE)),
    ):
        for keep in (1.0, 0.5):
            with pytest.raises(InputError, match=f"{operator.name}: expected measurements"):
                losses.ambient(prior, operator, y, 0.3, 0.8, keep=keep)
    with pytest.raises(InputError, match="one per sample"):
        losses.ambient(prior, Identity(SHAPE), normal(2, *SHAPE), 0.3, torch.full((3,), 0.8))


@pytest.mark.parametrize("name", ["equispaced", "poisson", "unknown"])
def test_designs_that_cannot_be_trained_on(name):
    shape = (2, 16, 16)
    if name == "unknown":
        design = Unknown(shape, "columns")
    else:
        design = make_design(name, image_shape=shape, acceleration=2, acs=4)
    operator: RowMaskedOperator = MRI(torch.ones(2, 1, 16, 16), design=design)
    prior = ConditionalMean(mixture_prior(shape), operator)
    y = torch.zeros(2, 2, 16, 16)
    with pytest.raises(IdentifiabilityError):
        losses.ambient(prior, operator, y, 0.3, 0.8, keep=0.5, generator=seeded(0))
