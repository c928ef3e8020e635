r"""Priors: exact ones against dense algebra, the network's preconditioning, storage bit for bit, use by deepinv."""

from __future__ import annotations

import math

import deepinv
import pytest
import torch
from closed_forms import (
    F64,
    MLP,
    PRIORS,
    UNET,
    dense,
    gaussian_prior,
    mixture_prior,
    network,
    normal,
    operator_zoo,
    random_mask,
    seeded,
)
from closed_forms import NETWORK_SHAPE as SHAPE
from torch import Tensor

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.losses import estimate
from ambient_sci.noise import prediction_from_sample, vp_to_ve
from ambient_sci.operators import MRI, Masking
from ambient_sci.priors import (
    ConditionalMean,
    DeepinvPrior,
    GaussianMixturePrior,
    GaussianPrior,
    KeptRows,
    Labels,
    NetworkConfig,
    NetworkPrior,
    StagedPrior,
    VPPrior,
    load_prior,
)

# -- exact priors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", operator_zoo())
def test_gaussian_posterior(name):
    """(Sigma^-1 + A^T A / sigma^2)^-1, information form, measured rows only; what y holds off the mask does not matter."""
    operator = operator_zoo()[name]
    prior = gaussian_prior(operator.img_size)
    y, sigma_y = normal(3, *operator.measurement_size), torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    mean, cov = prior.posterior(operator, y, sigma_y)
    for i in range(3):
        a, measured = dense(operator, i), operator[i].mask.expand(1, *operator.measurement_size).flatten() > 0
        precision = torch.linalg.inv(prior.cov) + a.T @ a / sigma_y[i] ** 2
        shift = torch.linalg.solve(
            precision, a.T @ (y[i].flatten()[measured] - a @ prior.mean.flatten()) / sigma_y[i] ** 2
        )
        assert torch.allclose(mean[i].flatten(), prior.mean.flatten() + shift, atol=1e-9)
        assert torch.allclose(cov[i], torch.linalg.inv(precision), atol=1e-9)


@pytest.mark.parametrize("name", operator_zoo())
def test_mixture_posterior(name):
    """Weights by the evidence of each component under torch's own Gaussian, means and covariances per component."""
    operator = operator_zoo()[name]
    prior = mixture_prior(operator.img_size)
    y = normal(3, *operator.measurement_size)
    weights, means, covs = prior.posterior(operator, y, 0.4)
    for i in range(3):
        a, measured = dense(operator, i), operator[i].mask.expand(1, *operator.measurement_size).flatten() > 0
        evidence = []
        for k, (mu, std) in enumerate(zip(prior.means.flatten(1), prior.std, strict=True)):
            cov = std**2 * a @ a.T + 0.16 * torch.eye(len(a), dtype=F64)
            evidence.append(
                torch.distributions.MultivariateNormal(a @ mu, cov).log_prob(y[i].flatten()[measured])
            )
            expected = torch.linalg.inv(torch.eye(len(mu), dtype=F64) / std**2 + a.T @ a / 0.16)
            assert torch.allclose(covs[i, k], expected, atol=1e-10)
            rhs = mu / std**2 + a.T @ y[i].flatten()[measured] / 0.16
            assert torch.allclose(means[i, k], expected @ rhs, atol=1e-10)
        assert torch.allclose(
            weights[i], (prior.weights.log() + torch.stack(evidence)).softmax(0), atol=1e-10
        )


@pytest.mark.parametrize("name", operator_zoo())
@pytest.mark.parametrize("kind", PRIORS)
def test_conditional_mean_is_the_posterior_mean(kind, name):
    """h(A_B^H y~, sigma, B) for every operator, coils included: what the network sees is sufficient once maps are known."""
    operator = operator_zoo()[name]
    prior = PRIORS[kind](operator.img_size)
    y, sigma = normal(3, *operator.measurement_size), torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    posterior = prior.posterior(operator, y, sigma)
    expected = (
        posterior[0]
        if kind == "gaussian"
        else torch.einsum("bk,bkn->bn", *posterior[:2]).reshape(3, *prior.shape)
    )
    exact = ConditionalMean(prior, operator.with_mask(torch.ones_like(operator.mask)))
    assert exact.conditioning == "mask-conditional"
    assert torch.allclose(exact(operator.A_adjoint(y), sigma, KeptRows(operator)), expected, atol=1e-9)
    x = normal(3, *operator.img_size)
    assert torch.allclose(exact(x, sigma), prior(x, sigma), atol=1e-9)  # no mask: everything is seen


@pytest.mark.parametrize("kind", PRIORS)
def test_samples_have_the_moments_of_the_prior(kind):
    """20,000 draws: mean and variance of random projections within 4.5 standard errors (false alarm 7e-6 each)."""
    prior = PRIORS[kind]((1, 2, 3))
    x, directions = prior.sample(20_000, seeded(1)).flatten(1), normal(6, 4, seed=2)
    if kind == "gaussian":
        mean, cov = prior.mean.flatten(), prior.cov
    else:
        flat = prior.means.flatten(1)
        mean = prior.weights @ flat
        cov = (prior.weights @ prior.std**2) * torch.eye(6) + (flat - mean).T * prior.weights @ (flat - mean)
    assert prior.data_std == pytest.approx(math.sqrt(float(torch.trace(cov)) / 6))
    projected = (x - mean) @ directions
    variance = (directions * (cov.to(F64) @ directions)).sum(0)
    assert bool((projected.mean(0).abs() < 4.5 * (variance / 20_000).sqrt()).all())
    spread = projected.square()
    assert bool(((spread.mean(0) - variance).abs() < 4.5 * spread.std(0) / 20_000**0.5).all())


def test_exact_priors_take_levels_in_any_form():
    for prior in (gaussian_prior((1, 2, 3)), mixture_prior((1, 2, 3))):
        x = normal(2, 1, 2, 3)
        expected = prior(x, 0.5)
        for sigma in (torch.tensor(0.5), torch.full((2,), 0.5), torch.full((2, 1, 1, 1), 0.5)):
            assert torch.allclose(prior(x, sigma), expected)
        assert torch.allclose(prior(x, 0.0), x)
        # Computed in the type of the prior, answered in the type of the image, as networks do.
        assert prior(x.float(), 0.5).dtype == torch.float32 and prior.float()(x, 0.5).dtype == F64
        assert torch.allclose(prior(x, 0.5), expected, atol=1e-5)
        prior.double()
        assert torch.allclose(prior(x, torch.tensor([0.5, 3.0]))[1], prior(x[1:], 3.0)[0])
        with pytest.raises(ConditioningError, match="mask"):
            prior(x, 0.5, torch.ones(1, 1, 2, 3))


def test_degenerate_gaussian():
    """A direction of no variance is denoised to its mean at any level, and left alone at level 0."""
    prior = GaussianPrior(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0]))
    assert torch.allclose(prior(torch.tensor([[3.0, 9.0]]), 2.0), torch.tensor([[2.0, 2.0]]))
    assert torch.equal(prior(torch.tensor([[3.0, 9.0]]), 0.0), torch.tensor([[3.0, 9.0]]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianPrior(torch.zeros(3), torch.eye(4)), "covariance \\(3, 3\\)"),
        (lambda: GaussianPrior(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: GaussianPrior(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "eigenvalue -1"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 3), 0.0), "2 positive weights"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 3), 1.0, torch.ones(3)), "2 positive weights"),
        (lambda: NetworkPrior((2, 8), 1.0, network=UNET), "images \\(C, H, W\\)"),
        (lambda: NetworkPrior(SHAPE, 0.0, network=UNET), "positive data_std"),
        (lambda: NetworkPrior(SHAPE, 1.0, "conditional", UNET), "unconditional or mask-conditional"),
        (lambda: NetworkConfig(channels=(10, 20)), "divisible by norm_groups"),
        (lambda: NetworkConfig(kind="transformer"), "expected kind unet, mlp, ncsnpp"),
        (lambda: NetworkConfig(attention=(True,)), "attention for each of 3 levels"),
        (lambda: StagedPrior(gaussian_prior((1, 2, 2)), gaussian_prior((1, 2, 3)), 0.3), "one shape"),
        (lambda: StagedPrior(network(), network("mask-conditional"), 0.3), "one conditioning"),
    ],
)
def test_impossible_priors(build, message):
    with pytest.raises(InputError, match=message):
        build()


# -- the network -------------------------------------------------------------------------------------------------------------


class Constant(torch.nn.Module):
    """Stands in for the network: remembers its inputs, answers 1."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.x, self.sigma = x, sigma
        return torch.ones(len(x), *SHAPE, dtype=x.dtype)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_preconditioning(fraction):
    """c_skip, c_in, c_out by their definition, and what they are for: unit input power, unit target power."""
    d, sigma = 0.7, torch.tensor([0.01, 0.5, 30.0])
    prior = network("mask-conditional" if fraction < 1 else "unconditional")
    prior.network = Constant()
    mask = torch.ones(1, 1, 8, 8)
    mask[:, :, : int(8 * (1 - fraction))] = 0
    x = normal(3, *SHAPE).float()
    rows = KeptRows(Masking(mask, SHAPE))
    out = prior(x, sigma, rows) if fraction < 1 else prior(x, sigma)
    s = sigma.reshape(-1, 1, 1, 1)
    skip = d**2 / (d**2 + s**2)
    scale = torch.where(mask > 0, d * (1 - skip).sqrt(), d)  # missing rows: all of the prior's variance
    assert torch.allclose(out, skip * x + scale, atol=1e-4)
    assert torch.allclose(prior.network.x[:, :2], x / (fraction * (d**2 + s**2)).sqrt(), rtol=1e-5)
    assert torch.equal(prior.network.sigma, sigma)
    if fraction < 1:
        assert torch.equal(prior.network.x[:, 2:], mask.expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    "operator", [MRI(random_mask(2, 8, 8).float()), Masking(random_mask(2, 1, 8, 8).float(), SHAPE)]
)
def test_what_was_measured_almost_without_noise_is_kept_whatever_the_network_says(operator):
    """A_B h -> y as sigma -> 0, while missing rows are the network's: no scalar c_out does both."""
    prior = network("mask-conditional")
    prior.network = Constant()
    x = normal(2, *SHAPE).float()
    h = estimate(prior, operator, operator.A(x), 1e-4)
    assert torch.allclose(operator.A(h), operator.A(x), atol=1e-3)
    rest = torch.full_like(x, prior.data_std)
    assert torch.allclose(h - operator.A_adjoint_A(h), rest - operator.A_adjoint_A(rest), atol=1e-3)


def test_output_scale_keeps_its_precision_near_clean_data():
    """c_out -> sigma for complete data; as d sqrt(1 - c_skip) it would vanish in single precision."""
    prior = network("mask-conditional")
    prior.network = Constant()
    out = prior(torch.zeros(1, *SHAPE), 1e-5, KeptRows(Masking(torch.ones(1, 1, 8, 8), SHAPE)))
    assert torch.allclose(out, torch.full_like(out, 1e-5), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "config", [UNET, MLP, NetworkConfig(channels=(8, 8), norm_groups=4, head_channels=8, patch=2)]
)
def test_a_new_network_predicts_the_best_scaling(config):
    """The last layer starts at zero: D = c_skip x, in the type of x."""
    prior, x = NetworkPrior(SHAPE, 0.7, network=config), normal(2, *SHAPE)
    with torch.no_grad():
        out = prior(x, torch.tensor([0.3, 2.0]))
    skip = 0.49 / (0.49 + torch.tensor([0.3, 2.0], dtype=F64).square())
    assert out.dtype == F64 and torch.allclose(out, skip.reshape(-1, 1, 1, 1) * x, atol=1e-5)


@pytest.mark.parametrize("config", [UNET, MLP])
def test_seeds_decide_the_weights_and_nothing_else_moves(config):
    before = torch.get_rng_state()
    a, b, c = (NetworkPrior(SHAPE, 0.7, network=config, generator=seeded(s)).state_dict() for s in (1, 1, 2))
    d, e = (NetworkPrior(SHAPE, 0.7, network=config).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) and torch.equal(d[k], e[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("config", [UNET, MLP])
def test_samples_of_a_batch_and_their_levels_do_not_mix(config):
    prior, x, sigma = network(config=config), normal(3, *SHAPE).float(), torch.tensor([0.02, 0.5, 9.0])
    with torch.no_grad():
        together = prior(x, sigma)
        for i in range(3):
            assert torch.allclose(prior(x[i : i + 1], float(sigma[i])), together[i], atol=1e-5)
    assert (prior(x, 0.5) - prior(x, 0.6)).abs().max() > 1e-4  # the level reaches the network


def test_masks_reach_the_network():
    """One mask for all equals the same mask for each; another mask, another answer; wrong kinds are refused."""
    prior, x, mask = network("mask-conditional"), normal(3, *SHAPE).float(), random_mask(1, 1, 8, 8).float()

    def rows(mask: Tensor) -> KeptRows:
        return KeptRows(Masking(mask, SHAPE))

    with torch.no_grad():
        one = prior(x, 0.3, rows(mask))
        assert torch.allclose(one, prior(x, 0.3, rows(mask.expand(3, -1, -1, -1))), atol=1e-6)
        assert (one - prior(x, 0.3, rows(torch.ones_like(mask)))).abs().max() > 1e-3
    with pytest.raises(ConditioningError, match="expected the kept rows"):
        prior(x, 0.3)
    with pytest.raises(ConditioningError, match="expected given = KeptRows, got Tensor"):
        prior(x, 0.3, mask)
    for given in (mask, rows(mask)):
        with pytest.raises(ConditioningError, match="a mask needs a mask-conditional prior"):
            network()(x, 0.3, given)
    with pytest.raises(ConditioningError, match="expected given = nothing, got Labels"):
        network()(x, 0.3, Labels(torch.zeros(3, dtype=torch.long)))
    with pytest.raises(InputError, match="expected a mask \\(1 or B, 1, H, W\\), got \\(3, 2, 8, 8\\)"):
        prior(x, 0.3, rows(torch.ones(3, 2, 8, 8)))


def test_settings_of_a_prior_are_what_is_saved(tmp_path):
    """What a person sets is what comes back: there is one copy of it."""
    prior = network()
    prior.sigma_min, prior.data_std, prior.sigma_max = 0.5, 2.0, 9.0
    assert (prior.config.sigma_min, prior.config.data_std, prior.config.sigma_max) == (0.5, 2.0, 9.0)
    prior.save(tmp_path / "p")
    again = load_prior(tmp_path / "p")
    assert (again.sigma_min, again.data_std, again.sigma_max) == (0.5, 2.0, 9.0)
    with pytest.raises(InputError, match="positive data_std"):
        prior.data_std = -1.0


def test_a_denoiser_takes_one_level_a_sample():
    x = normal(2, *SHAPE).float()
    for prior in (network(), gaussian_prior(SHAPE)):
        with pytest.raises(InputError, match="one value or one per sample"):
            prior(x, torch.full(x.shape, 0.5))


# -- priors made of others ---------------------------------------------------------------------------------------------------


def test_staged_prior_answers_by_level():
    """anchor at sigma_n and above, below under it; a mixed batch, with masks, is what its samples are alone."""
    anchor, below = gaussian_prior((1, 2, 3), 1), gaussian_prior((1, 2, 3), 7)
    prior, x = StagedPrior(anchor, below, 0.3), normal(4, 1, 2, 3)
    sigma = torch.tensor([0.3, 0.29, 5.0, 0.01], dtype=F64)
    found = prior(x, sigma)
    assert torch.allclose(found[[0, 2]], anchor(x, sigma)[[0, 2]], atol=1e-12)
    assert torch.allclose(found[[1, 3]], below(x, sigma)[[1, 3]], atol=1e-12)
    assert torch.equal(prior(x, 0.3), anchor(x, 0.3)) and torch.equal(prior(x, 0.1), below(x, 0.1))
    assert prior.sigma_min == 0 and prior.conditioning == "unconditional"

    operator = MRI(random_mask(4, 1, 2, 3)).to(F64)
    parts = [ConditionalMean(gaussian_prior((2, 2, 3), s), MRI(torch.ones(2, 3)).to(F64)) for s in (1, 7)]
    staged, z = StagedPrior(*parts, 0.3), normal(4, 2, 2, 3)
    assert staged.conditioning == "mask-conditional"
    found = staged(z, sigma, KeptRows(operator))
    for i in range(4):
        part = parts[0 if sigma[i] >= 0.3 else 1]
        expected = part(z[i : i + 1], sigma[i : i + 1], KeptRows(operator[i]))
        assert torch.allclose(found[i], expected[0], atol=1e-12)


def test_a_mixed_batch_of_staged_networks_meets_the_operators_of_its_samples():
    """Kept rows are cut where the batch is: on both sides of sigma_n each sample's answer is that under its own mask."""
    operator, sigma = MRI(random_mask(4, 8, 8).float()), torch.tensor([0.3, 0.29, 5.0, 0.01])
    parts = [network("mask-conditional", seed=s) for s in (1, 2)]
    staged, y = StagedPrior(*parts, 0.3), operator.A(normal(4, *SHAPE).float())
    assert staged.separates_rows
    with torch.no_grad():
        found = estimate(staged, operator, y, sigma)
        for i in range(4):
            prior = parts[0 if sigma[i] >= 0.3 else 1]
            expected = estimate(prior, operator[i], y[i : i + 1], sigma[i : i + 1])
            assert torch.allclose(found[i], expected[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
def test_variance_preserving_networks_are_priors(kind):
    """A network that predicts exactly, wrapped, is the exact denoiser; ``time`` translates its noise scale."""
    exact, x, sigma = (
        gaussian_prior((1, 2, 3)),
        normal(3, 1, 2, 3),
        torch.tensor([0.05, 0.6, 20.0], dtype=F64),
    )

    def predict(state: Tensor, time: Tensor) -> Tensor:
        scale = time / 1000
        return prediction_from_sample(exact(*vp_to_ve(state, scale)), state, scale, kind)

    prior = VPPrior(predict, exact.shape, exact.data_std, kind, time=lambda scale: 1000 * scale)
    assert torch.allclose(prior(x, sigma), exact(x, sigma), atol=1e-9)
    with pytest.raises(ConditioningError):
        prior(x, sigma, torch.ones(1, 1, 2, 3))


def test_deepinv_denoisers_are_priors():
    """Levels arrive one per sample, and double-precision samplers are served by single-precision networks."""
    model = deepinv.models.DRUNet(
        in_channels=2, out_channels=2, nc=(4, 8, 8, 8), nb=1, pretrained=None
    ).eval()
    prior, x = DeepinvPrior(model, SHAPE, 0.5), normal(2, *SHAPE)
    with torch.no_grad():
        out = prior(x, torch.tensor([0.1, 0.5]))
        assert out.dtype == F64 and out.shape == x.shape
        for i, sigma in enumerate((0.1, 0.5)):
            assert torch.allclose(out[i], model(x[i : i + 1].float(), sigma)[0].double(), atol=1e-5)
    with pytest.raises(ConditioningError):
        prior(x, 0.1, torch.ones(1, 1, 8, 8))


def test_our_priors_are_deepinv_denoisers():
    """Plug-and-play gradient steps x <- D(x - A^H (A x - y), sigma), by deepinv and by hand."""
    operator = MRI(random_mask(3, 1, 4, 3)).to(F64)
    prior = gaussian_prior((2, 4, 3))
    y = operator.A(prior.sample(3, seeded(1)))
    assert isinstance(prior, deepinv.models.Denoiser)
    model = deepinv.optim.PGD(
        data_fidelity=deepinv.optim.L2(), prior=deepinv.optim.PnP(prior), stepsize=0.8, sigma_denoiser=0.3, max_iter=5
    )  # fmt: skip
    x = operator.A_adjoint(y)
    found = model(y, operator)
    for _ in range(5):
        x = prior(x - 0.8 * operator.A_adjoint(operator.A(x) - y), 0.3)
    assert torch.allclose(found, x, atol=1e-6)


def test_our_priors_drive_deepinvs_diffusion_samplers():
    """deepinv's posterior diffusion with moment matching runs on our prior and operator and ends near the exact posterior mean."""
    operator, prior = MRI(random_mask(1, 1, 2, 2, keep=0.7)).to(F64), gaussian_prior((2, 2, 2))
    y = operator.A(prior.sample(1, seeded(1))) + 0.1 * normal(1, 2, 2, 2) * operator.mask
    operator.noise_model = deepinv.physics.GaussianNoise(0.1).to(F64)
    model = deepinv.sampling.PosteriorDiffusion(
        data_fidelity=deepinv.sampling.MomentMatchingDataFidelity(denoiser=prior, cg_max_iter=8),
        denoiser=prior,
        sde=deepinv.sampling.VarianceExplodingDiffusion(sigma_max=20, sigma_min=0.01, alpha=0.0),
        solver=deepinv.sampling.EulerSolver(timesteps=torch.linspace(1, 0.001, 60), rng=torch.Generator()),
        minus_one_one=False,
    )
    samples = model(y.expand(64, -1, -1, -1), operator, seed=1, x_init=(64, 2, 2, 2))
    mean, cov = prior.posterior(operator, y, 0.1)
    error = (samples.mean(0) - mean[0]).flatten() / (cov[0].diagonal() / 64).sqrt()
    assert float(error.square().mean().sqrt()) < 4


def test_a_prior_says_in_one_line_what_it_is():
    """Not two hundred lines of layers: kind, image, levels, size."""
    assert repr(gaussian_prior((1, 2, 3))) == "GaussianPrior(unconditional, 1 x 2 x 3)"
    said = repr(network("mask-conditional", sigma_min=0.05, sigma_max=12.0))
    assert (
        said.startswith("NetworkPrior(mask-conditional, 2 x 8 x 8, sigma 0.05 to 12, ")
        and "M parameters" in said
    )
