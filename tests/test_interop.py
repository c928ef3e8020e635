"""Our priors in deepinv's and azula's algorithms, and their denoisers in ours."""

from __future__ import annotations

import deepinv
import pytest
import torch
from posterior_problems import gaussian_problem, stationary_prior

from ambient_sci.operators import MRI, Masking
from ambient_sci.priors import DeepinvPrior
from ambient_sci.sampling import MMPS, reconstruct

SIGMA_Y = 0.1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def single(kind: str):
    """One Gaussian problem, its operator with deepinv's noise model, in single precision, and a state of 4 chains at level .7."""
    problem = gaussian_problem(kind, batch=1)
    mask = problem.operator.mask
    operator = (
        MRI(mask, noise_std=SIGMA_Y)
        if kind == "mri"
        else Masking(mask, img_size=(2, 8, 8), noise_std=SIGMA_Y)
    )
    x = problem.prior.sample(4, generator(1)) + 0.7 * torch.randn(4, 2, 8, 8, generator=generator(2)).double()
    return problem, operator, problem.prior.float(), problem.y.float().expand(4, -1, -1, -1), x.float()


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_mmps_agrees_with_azula(kind):
    from azula.denoise import Denoiser, DiracPosterior
    from azula.guidance.mmps import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import VESchedule

    _, operator, prior, y, x = single(kind)
    schedule = VESchedule(0.01, 10.0)
    shape = (2, 8, 8)

    class Wrapped(Denoiser):
        """azula's solvers take vectors, (B, D): every dimension but the last is one of the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t: torch.Tensor, t: torch.Tensor, **kwargs: object) -> DiracPosterior:
            mean = prior(x_t.unflatten(1, shape), self.schedule(t)[1].expand(len(x_t)))
            return DiracPosterior(mean=mean.flatten(1))

    theirs = MMPSDenoiser(
        Wrapped(),
        y.flatten(1),
        lambda v: operator.A(v.unflatten(1, shape)).flatten(1),
        IsotropicCovariance(SIGMA_Y**2),
        solver="cg",
        iterations=40,
    )
    ours = MMPS(prior, operator, y, SIGMA_Y, tolerance=1e-6, max_iterations=40)
    for t in (torch.tensor(0.3), torch.tensor(0.8)):
        level = schedule(t)[1].expand(4)
        expected = theirs(x.flatten(1), t).mean.unflatten(1, shape)
        assert (expected - prior(x, level)).abs().max() > 0.02
        assert torch.allclose(ours(x, level), expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["mri", "masking"])
def test_mmps_agrees_with_deepinv(kind):
    from deepinv.sampling.noisy_datafidelity import MomentMatchingDataFidelity

    _, operator, prior, y, x = single(kind)
    ours = MMPS(prior, operator, y, SIGMA_Y, tolerance=1e-6, max_iterations=40)
    for sigma in (0.2, 2.0):
        fidelity = MomentMatchingDataFidelity(prior, cg_max_iter=40, cg_tol=1e-7)
        gradient = fidelity.grad(x, y, operator, sigma)
        level = torch.full((4,), sigma)
        assert torch.allclose(ours(x, level), prior(x, level) - sigma**2 * gradient, atol=2e-3)


def test_our_prior_in_deepinv_posterior_diffusion():
    """deepinv's moment matching, with our prior and our operator, ends near the exact posterior mean."""
    from deepinv.sampling import HeunSolver, PosteriorDiffusion, VarianceExplodingDiffusion
    from deepinv.sampling.noisy_datafidelity import MomentMatchingDataFidelity

    problem, operator, prior, _, _ = single("mri")
    chains = 48
    model = PosteriorDiffusion(
        data_fidelity=MomentMatchingDataFidelity(cg_max_iter=20),
        denoiser=prior,
        sde=VarianceExplodingDiffusion(sigma_min=0.01, sigma_max=20.0, alpha=0.0),
        solver=HeunSolver(timesteps=torch.linspace(1, 0, 25, dtype=torch.float64)),
        minus_one_one=False,
    )
    y = problem.y.float().expand(chains, -1, -1, -1)
    x = model(y, operator, x_init=(chains, 2, 8, 8), seed=0).double()
    error = (x.mean(0) - problem.mean[0]).square().sum() * chains / problem.cov[0].trace()
    assert error.sqrt() < 1.4  # one at the Monte-Carlo floor
    assert 0.8 < x.var(0).sum() / problem.cov[0].trace() < 1.3


def test_our_prior_in_plug_and_play():
    """Proximal gradient steps with our denoiser find the maximum a posteriori image, which for a Gaussian prior is the posterior mean."""
    problem = gaussian_problem("mri", batch=1, sigma_y=0.5)
    solver = deepinv.optim.optim_builder(
        iteration="PGD",
        prior=deepinv.optim.PnP(denoiser=problem.prior),
        data_fidelity=deepinv.optim.L2(),
        params_algo={
            "stepsize": 1.0,
            "g_param": 0.5,
        },  # D is the proximal operator of sigma^2 g, so sigma is sigma_y
        max_iter=400,
    )
    assert torch.allclose(solver(problem.y, problem.operator), problem.mean, atol=1e-3)


def test_a_deepinv_denoiser_as_a_prior():
    """Whatever deepinv calls a denoiser: an untrained network (finite, reported), and one that is a Gaussian in disguise (exact)."""
    problem = gaussian_problem("masking", batch=2)
    disguised = DeepinvPrior(problem.prior, (2, 8, 8), data_std=1.0)
    plain, wrapped = (
        reconstruct(p, problem.operator, problem.y, 0.1, samples=2, steps=6, generator=generator()).samples
        for p in (problem.prior, disguised)
    )
    assert torch.allclose(plain, wrapped, atol=1e-6)

    network = deepinv.models.DRUNet(in_channels=2, out_channels=2, nc=(4, 4, 4, 4), nb=1, pretrained=None)
    prior = DeepinvPrior(network, (2, 8, 8), data_std=1.0)
    result = reconstruct(
        prior,
        problem.operator,
        problem.y.float(),
        0.1,
        samples=2,
        steps=6,
        sigma_max=5.0,
        generator=generator(),
    )
    assert torch.isfinite(result.samples).all() and result.report["solves"] == 4 * 6


def test_our_operators_in_deepinv_least_squares():
    prior = stationary_prior(8)
    operator = gaussian_problem("mri", batch=1).operator
    x = prior.sample(1, generator())
    # Relative to an inner product with noise from the global generator, which may be near zero: double precision leaves room for that.
    assert operator.adjointness_test(x).abs() < 1e-8
    assert torch.allclose(operator.A_dagger(operator.A(x)), operator.A_adjoint_A(x), atol=1e-6)
