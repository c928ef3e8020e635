r"""Closed forms of the conditional means, in float64 to 1e-10, on Gaussian and mixture priors.

The right-hand sides never use the identity under test: E[x_tn | x_t] comes from the prior of x_tn (the clean prior with sigma_n^2 added
to its covariance) denoised over the noise that was added to *it*, E[y | y~] from the joint covariance of y and y~. "Mutants" are
the mistakes that have been made in such code; each must be visibly wrong.
"""

from __future__ import annotations

import pytest
import torch
from closed_forms import F64, PRIORS, coil_maps, dense, gaussian_prior, normal, operator_zoo
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import vp_alpha, vp_to_ve
from ambient_sci.operators import MRI
from ambient_sci.priors import GaussianMixturePrior, GaussianPrior
from ambient_sci.priors.analytic import operator_matrix
from ambient_sci.tweedie import clean_mean, contraction, measurement_mean, noisy_mean

SHAPE = (2, 2, 3)
SIGMA_N = torch.tensor([0.0, 0.3, 0.5, 0.9], dtype=F64)
SIGMA_T = torch.tensor([0.4, 0.35, 1.5, 4.0], dtype=F64)
VP_N = torch.tensor([0.0, 0.2, 0.5, 0.7], dtype=F64)
VP_T = torch.tensor([0.3, 0.25, 0.8, 0.99], dtype=F64)


def exact(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).abs().max() < tolerance)


def noisy_prior(prior: GaussianPrior | GaussianMixturePrior, scale: float, sigma: float):
    """The prior of scale x_0 + sigma z."""
    if isinstance(prior, GaussianPrior):
        return GaussianPrior(
            scale * prior.mean, scale**2 * prior.cov + sigma**2 * torch.eye(len(prior.cov), dtype=F64)
        )
    return GaussianMixturePrior(
        scale * prior.means, (scale**2 * prior.std**2 + sigma**2).sqrt(), prior.weights
    )


def noisy_mean_reference(prior, x_t: Tensor, sigma_n: float, sigma_t: float, process: str = "ve") -> Tensor:
    """E[x_tn | x_t] with x_tn as the clean image of a denoising problem of its own."""
    if process == "ve":
        return noisy_prior(prior, 1.0, sigma_n)(x_t, (sigma_t**2 - sigma_n**2) ** 0.5)
    alpha_n, alpha_t = (1 - sigma_n**2) ** 0.5, (1 - sigma_t**2) ** 0.5
    a = alpha_t / alpha_n  # x_t = a x_tn + b eta
    b = (sigma_t**2 - a**2 * sigma_n**2) ** 0.5
    return noisy_prior(prior, alpha_n, sigma_n)(x_t / a, b / a)


def each(function, *columns: Tensor) -> Tensor:
    """``function`` of one sample at a time, so that references need no batched levels."""
    return torch.cat(
        [function(*(c[i : i + 1] if c.ndim > 1 else float(c[i]) for c in columns)) for i in range(4)]
    )


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param](SHAPE)


@pytest.fixture
def x_t(prior) -> Tensor:
    return prior.sample(4, torch.Generator().manual_seed(3)) + normal(4, *SHAPE, seed=4)


def test_double_tweedie_and_its_inverse(prior, x_t):
    """[2, 3] per-sample levels, sigma_n = 0 among them."""
    expected = each(lambda x, n, t: noisy_mean_reference(prior, x, n, t), x_t, SIGMA_N, SIGMA_T)
    x0 = prior(x_t, SIGMA_T)
    found = noisy_mean(x0, x_t, SIGMA_T, SIGMA_N)
    assert exact(found, expected)
    assert exact(clean_mean(expected, x_t, SIGMA_T, SIGMA_N), x0)
    assert torch.equal(found[0], x0[0])  # nothing to correct without noise in the data


def test_double_tweedie_of_the_variance_preserving_process(prior, x_t):
    """[4] and that it is [2] after rescaling: x_t / alpha_t at sigma_t / alpha_t."""
    expected = each(lambda x, n, t: noisy_mean_reference(prior, x, n, t, "vp"), x_t, VP_N, VP_T)
    x0 = prior(*vp_to_ve(x_t, VP_T))
    assert exact(noisy_mean(x0, x_t, VP_T, VP_N, process="vp"), expected)
    assert exact(clean_mean(expected, x_t, VP_T, VP_N, process="vp"), x0)

    alpha_n, alpha_t = (vp_alpha(v)[:, None, None, None] for v in (VP_N, VP_T))
    ve = noisy_mean(x0, x_t / alpha_t, VP_T / vp_alpha(VP_T), VP_N / vp_alpha(VP_N))
    assert exact(alpha_n * ve, expected)


MUTANTS = {
    "sign": lambda c, x0, x: c * x0 - (1 - c) * x,
    "no correction": lambda c, x0, x: x0,
    "levels swapped": lambda c, x0, x: (1 - 1 / (1 - c)) * x0 + 1 / (1 - c) * x,
    "standard deviations for variances": lambda c, x0, x: (1 - (1 - c).sqrt()) * x0 + (1 - c).sqrt() * x,
    "factor missing": lambda c, x0, x: x0 + (1 - c) * x,
    "weights swapped": lambda c, x0, x: (1 - c) * x0 + c * x,
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("process", ["ve", "vp"])
def test_mistakes_would_be_seen(prior, x_t, mutant, process):
    """Wrong signs, missing factors and swapped levels leave the expected values by far more than the tolerance."""
    n, t = (SIGMA_N, SIGMA_T) if process == "ve" else (VP_N, VP_T)
    expected = each(lambda x, n, t: noisy_mean_reference(prior, x, n, t, process), x_t, n, t)
    x0 = prior(x_t, t) if process == "ve" else prior(*vp_to_ve(x_t, t))
    wrong = MUTANTS[mutant](contraction(t, n, x_t), x0, x_t)
    assert (wrong - expected)[1:].flatten(1).abs().amax(1).min() > 1e-3


def test_gaussian_means_by_dense_algebra():
    """[5] E[x_0 | x_t] and E[x_tn | x_t], VE and VP, from explicit inverses."""
    prior, eye = gaussian_prior(SHAPE), torch.eye(12, dtype=F64)
    x, t, n = normal(1, *SHAPE, seed=9), 0.8, 0.5
    mean, cov = prior.mean.flatten(), prior.cov
    shift = torch.linalg.inv(cov + t**2 * eye) @ (x.flatten() - mean)
    assert exact(prior(x, t).flatten(), mean + cov @ shift)
    assert exact(noisy_mean(prior(x, t), x, t, n).flatten(), mean + (cov + n**2 * eye) @ shift)

    alpha = (1 - t**2) ** 0.5
    inverse = torch.linalg.inv(alpha**2 * cov + t**2 * eye)
    expected = mean + alpha * cov @ inverse @ (x.flatten() - alpha * mean)
    assert exact(prior(*vp_to_ve(x, t)).flatten(), expected)


@pytest.mark.parametrize("name", PRIORS)
def test_tweedie_formula(name):
    """[1] D = x + sigma^2 grad log p_t, the gradient by automatic differentiation of the density."""
    prior, t = PRIORS[name]((5,)), 0.7
    x = normal(3, 5, seed=2).requires_grad_()
    if name == "gaussian":
        law = torch.distributions.MultivariateNormal(prior.mean, prior.cov + t**2 * torch.eye(5, dtype=F64))
        log_p = law.log_prob(x)
    else:
        parts = [
            torch.distributions.MultivariateNormal(m, (s**2 + t**2) * torch.eye(5, dtype=F64)).log_prob(x)
            for m, s in zip(prior.means, prior.std, strict=True)
        ]
        log_p = (torch.stack(parts) + prior.weights.log()[:, None]).logsumexp(0)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    assert exact(prior(x, t), x + t**2 * score)


def test_finite_data():
    """[7] the denoiser of a finite noisy data set, in the closed form of its paper."""
    data, x, n, t = normal(6, *SHAPE, seed=1), normal(4, *SHAPE, seed=2), 0.5, 0.9
    distance = (x[:, None] - data[None]).flatten(2).square().sum(2)
    w = (-distance / (2 * (t**2 - n**2))).softmax(1)
    weighted = torch.einsum("bi,i...->b...", w, data)
    expected = (t**2 * weighted - n**2 * x) / (t**2 - n**2)
    assert exact(clean_mean(weighted, x, t, n), expected)


# -- operators ---------------------------------------------------------------------------------------------------------------


def measurement_reference(prior, operator, kept, y_t, sigma_t: Tensor, sigma_y: Tensor) -> Tensor:
    """E[y | y~, B] sample by sample from the joint law of y and y~: dense matrices, measured rows only."""
    out = torch.zeros_like(y_t)
    for i in range(y_t.shape[0]):
        a = dense(operator, i)
        full = operator[i].mask.expand(1, *operator.measurement_size).flatten() > 0
        b = kept[i].expand(operator.measurement_size).flatten()[full] > 0
        seen = y_t[i].flatten()[full][b]
        rows = torch.eye(len(a), dtype=F64)

        def gaussian(mean, cov, a=a, b=b, seen=seen, rows=rows, n=float(sigma_y[i]), t=float(sigma_t[i])):
            joint = a @ cov @ a.T
            law = torch.distributions.MultivariateNormal((a @ mean)[b], joint[b][:, b] + t**2 * rows[b][:, b])
            # y and y~ share the noise of the measurement on kept rows, and nothing else.
            cross = joint[:, b] + n**2 * rows[:, b]
            shift = torch.linalg.solve(law.covariance_matrix, seen - law.mean)
            return a @ mean + cross @ shift, law.log_prob(seen)

        if isinstance(prior, GaussianPrior):
            value = gaussian(prior.mean.flatten(), prior.cov)[0]
        else:
            parts = [
                gaussian(m.flatten(), s**2 * torch.eye(m.numel(), dtype=F64))
                for m, s in zip(prior.means, prior.std, strict=True)
            ]
            weights = (prior.weights.log() + torch.stack([e for _, e in parts])).softmax(0)
            value = sum(w * v for w, (v, _) in zip(weights, parts, strict=True))
        out[i].view(-1)[full] = value
    return out


def conditional_mean(prior, operator, y_t, sigma_t) -> Tensor:
    posterior = prior.posterior(operator, y_t, sigma_t)
    if isinstance(prior, GaussianPrior):
        return posterior[0]
    return torch.einsum("bk,bkn->bn", posterior[0], posterior[1]).reshape(-1, *prior.shape)


@pytest.mark.parametrize("operator_name", operator_zoo())
@pytest.mark.parametrize("name", PRIORS)
def test_kept_and_held_out_rows(name, operator_name):
    """[12] on kept and [13] on held-out rows; rows outside A are zero, y~ outside B is ignored, also where it is not finite."""
    operator = operator_zoo()[operator_name]
    batch = 3
    prior = PRIORS[name](operator.img_size)
    sigma_y = torch.tensor([0.0, 0.3, 0.6], dtype=F64)
    sigma_t = torch.tensor([0.5, 0.4, 0.6], dtype=F64)  # the last adds nothing: E[y_B | y~] is y~ itself
    split = operator.split(keep=0.6, generator=torch.Generator().manual_seed(1))
    kept = split.kept.mask.expand(batch, *operator.measurement_size)
    y_t = normal(batch, *operator.measurement_size, seed=7)
    h = conditional_mean(prior, split.kept, y_t * kept, sigma_t)

    poisoned = torch.where(kept > 0, y_t, torch.nan)
    found = measurement_mean(operator, split.kept.mask, h, poisoned, sigma_t, sigma_y)
    expected = measurement_reference(prior, operator, kept, y_t, sigma_t, sigma_y)
    assert exact(found, expected)
    assert exact(found[2] * kept[2], y_t[2] * kept[2])
    uncorrected = measurement_mean(operator, split.kept.mask, h, y_t, sigma_t, 0.0)
    assert (uncorrected - expected)[1].abs().max() > 1e-3  # without the correction kept rows are biased


def test_complete_coils_reduce_to_white_noise():
    """[19] A^H A = I and Cov(A^H n) = sigma^2 I, so double Tweedie may be applied to the combined image or to k-space alike."""
    operator = MRI(torch.ones(4, 3), coil_maps(4, 4, 3)).to(F64)
    a = operator_matrix(operator, (2, 4, 3))[0]
    assert exact(a.T @ a, torch.eye(24, dtype=F64))

    prior, t, n = PRIORS["mixture"]((2, 4, 3)), 0.9, 0.4
    y_t = operator.A(prior.sample(3, torch.Generator().manual_seed(0)))
    y_t = y_t + t * normal(*y_t.shape, seed=1)
    x_t = operator.A_adjoint(y_t)
    h = prior(x_t, t)
    in_kspace = measurement_mean(operator, operator.mask, h, y_t, t, n)
    assert exact(operator.A_adjoint(in_kspace), noisy_mean(h, x_t, t, n))
    assert exact(h, conditional_mean(prior, operator, y_t, t))


# -- borders -----------------------------------------------------------------------------------------------------------------


def test_levels_out_of_order_are_refused():
    x = normal(2, *SHAPE)
    with pytest.raises(InputError, match="sigma_n <= sigma_t"):
        noisy_mean(x, x, 0.2, 0.3)
    with pytest.raises(InputError, match="sigma_t > sigma_n"):
        clean_mean(x, x, 0.3, 0.3)
    with pytest.raises(InputError, match="sigma_t > 0"):
        noisy_mean(x, x, 0.0, 0.0)
    with pytest.raises(InputError, match="sigma_n < 1"):
        noisy_mean(x, x, 1.5, 1.2, process="vp")
    with pytest.raises(InputError, match="'ve' or 'vp'"):
        noisy_mean(x, x, 0.3, 0.2, process="edm")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one per sample"):
        noisy_mean(x, x, torch.full((3,), 0.3), 0.2)


def test_measurements_of_another_shape_are_refused():
    operator = operator_zoo()["mri"]
    h = normal(3, 2, 4, 3)
    with pytest.raises(InputError, match="mri: expected measurements"):
        measurement_mean(operator, operator.mask, h, normal(3, 2, 4, 4), 0.3, 0.2)
    with pytest.raises(InputError, match="mri: expected images"):
        measurement_mean(operator, operator.mask, h[:, :1], normal(3, 2, 4, 3), 0.3, 0.2)
