"""Every sampler on every measurement shape and every form of noise level, on Gaussian priors in float64.

What is exact is compared with dense algebra, without sampling; what is not, with what the same sampler makes
of the same problem said in another way (a level as a number, per image or per entry; an entry not measured,
or measured with noise that hides it).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import deepinv
import pytest
import torch
from closed_forms import F64, coil_maps, gaussian_prior, network, normal, random_mask, seeded
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, Identity, Masking
from ambient_sci.priors import ConditionalMean, DeepinvPrior, GaussianPrior, NetworkPrior
from ambient_sci.sampling import (
    DPS,
    MMPS,
    POSTERIOR_SAMPLERS,
    Likelihood,
    generate,
    generate_fixed_mask,
    reconstruct,
)
from ambient_sci.sampling.unconditional import state_like

BATCH = 2
SAMPLERS = [n for n, s in POSTERIOR_SAMPLERS.items() if s.conditioning == "unconditional"]
QUICK = {"smc": {"particles": 16}, "pnp-dm": {"inner_steps": 2}}
KINDS = ["identity", "masking", "masking, 3 channels", "mri", "mri, 4 coils", "foreign"]
LEVELS = ["none", "number", "image", "entry"]


@cache
def problem(kind: str) -> tuple[GaussianPrior, Any, Tensor, Tensor]:
    """Prior, operator, clean measurements A x of BATCH images, and A as a matrix for each image (BATCH, rows,
    columns).
    """
    channels = {"masking": 1, "masking, 3 channels": 3, "foreign": 1}.get(kind, 2)
    shape = (channels, 6, 6)
    prior = gaussian_prior(shape, seed=1)
    mask = random_mask(BATCH, 1, 6, 6)
    operator: Any = {
        "identity": lambda: Identity(shape),
        "masking": lambda: Masking(mask, shape),
        "masking, 3 channels": lambda: Masking(mask, shape),
        "mri": lambda: MRI(mask),
        "mri, 4 coils": lambda: MRI(mask, coil_maps(4, 6, 6)),
        "foreign": lambda: deepinv.physics.Blur(
            filter=torch.ones(1, 1, 3, 3, dtype=F64) / 9, padding="valid"
        ),
    }[kind]()
    operator = operator.to(F64)
    y = operator.A(prior.sample(BATCH, seeded(2)))
    basis = torch.eye(prior.mean.numel(), dtype=F64).reshape(-1, *shape)
    columns = [operator.A(e.expand(BATCH, *shape)).flatten(1) for e in basis]
    return prior, operator, y, torch.stack(columns, 2)


def noise_levels(form: str, y: Tensor) -> Any:
    levels = {
        "none": 0.0,
        "number": 0.2,
        "image": torch.tensor([0.1, 0.4], dtype=F64),
        "entry": 0.05 + 0.5 * torch.rand(y.shape, generator=seeded(3), dtype=F64),
    }
    return levels[form]


def every_entry(sigma: Any, y: Tensor) -> Tensor:
    sigma = torch.as_tensor(sigma, dtype=F64)
    return (sigma if sigma.shape == y.shape else sigma.reshape(-1, *[1] * (y.ndim - 1))).expand(y.shape)


def noisy(kind: str, sigma: Any) -> Tensor:
    _, operator, y, _ = problem(kind)
    noise = every_entry(sigma, y) * normal(*y.shape, seed=4)
    return y + noise * getattr(operator, "mask", 1.0)


def exact(a: Tensor, y: Tensor, noise: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x ~ N(mean, cov) given the rows of y = a x + noise n that a has (one image,
    flat).
    """
    rows = a.abs().sum(1) > 1e-12
    a, y, noise = a[rows], y[rows], noise[rows]
    cross = cov @ a.T
    gain = cross @ torch.linalg.pinv(a @ cross + torch.diag(noise**2), hermitian=True, rtol=1e-12)
    return mean + gain @ (y - a @ mean), cov - gain @ cross.T


def run(sampler: str, prior, operator, y: Tensor, sigma: Any, **settings: Any) -> Tensor:
    options = {"samples": 2, "steps": 6, "sigma_max": 10.0, "generator": seeded(5), **QUICK.get(sampler, {})}
    return reconstruct(prior, operator, y, sigma, sampler=sampler, **{**options, **settings}).samples


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_every_measurement(sampler, kind, form):
    """Finite, of the right shape, not blind to the data, and the same for chains that are worked off alone."""
    prior, operator, clean, _ = problem(kind)
    sigma = noise_levels(form, clean)
    y = noisy(kind, sigma)
    samples = run(sampler, prior, operator, y, sigma)
    assert samples.shape == (2, BATCH, *prior.shape) and samples.dtype == F64
    assert torch.isfinite(samples).all()
    assert not torch.allclose(samples, run(sampler, prior, operator, y + 1, sigma), atol=1e-3)
    if kind != "foreign" or sampler != "smc":  # a foreign operator with one set of parameters is never cut
        alone = run(sampler, prior, operator, y, sigma, batch_size=1)
        # A blur without noise is all but singular: solves that end at a residual of 1e-4 amplify how sums are
        # rounded.
        assert torch.allclose(samples, alone, atol=1e-4 if (kind, form) == ("foreign", "none") else 1e-7)


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.3, 30.0])
def test_mmps_is_the_exact_posterior_denoiser(kind, form, sigma):
    """E[x_0 | x_t, y] by dense algebra, x_t being one more measurement. At sigma = 30 it is the posterior
    mean E[x_0 | y] to a per cent.
    """
    prior, operator, clean, matrices = problem(kind)
    noise = noise_levels(form, clean)
    y = noisy(kind, noise)
    x = sigma * normal(BATCH, *prior.shape, seed=6)
    denoiser = MMPS(prior, operator, y, noise, tolerance=1e-12, max_iterations=300)
    found = denoiser(x, torch.full((BATCH,), sigma, dtype=F64)).flatten(1)
    eye = torch.eye(x[0].numel(), dtype=F64)
    for a, data, levels, state, out in zip(
        matrices, y.flatten(1), every_entry(noise, y).flatten(1), x.flatten(1), found, strict=True
    ):
        both = torch.cat([levels, torch.full((len(eye),), sigma, dtype=F64)])
        mean, _ = exact(torch.cat([a, eye]), torch.cat([data, state]), both, prior.mean.flatten(), prior.cov)
        change = (prior(state.reshape(1, *prior.shape), sigma).flatten() - mean).norm()
        assert (out - mean).norm() < 1e-5 * change


@pytest.mark.parametrize("form", ["number", "image", "entry"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_isotropic_gaussian_given_every_measurement(kind, form):
    """Mean and evidence of x ~ N(m, r^2 I) by dense algebra; the spread of draws by their law, E |x - mean|^2
    = tr C, to five standard errors.
    """
    prior, operator, clean, matrices = problem(kind)
    noise, r = noise_levels(form, clean), 0.7
    y = noisy(kind, noise)
    m = normal(BATCH, *prior.shape, seed=7)
    likelihood = Likelihood(operator, y, noise, tolerance=1e-12, max_iterations=500)
    mean, evidence = likelihood.mean(m, r).flatten(1), likelihood.log_evidence(m, r)
    errors = torch.stack([likelihood.draw(m, r, seeded(8 + k)).flatten(1) - mean for k in range(200)])
    for b in range(BATCH):
        a, levels = matrices[b], every_entry(noise, y)[b].flatten()
        expected, cov = exact(
            a, y[b].flatten(), levels, m[b].flatten(), r**2 * torch.eye(a.shape[1], dtype=F64)
        )
        assert torch.allclose(mean[b], expected, atol=1e-7)
        rows = a.abs().sum(1) > 1e-12
        system = r**2 * a[rows] @ a[rows].T + torch.diag(levels[rows] ** 2)
        residual = (y[b].flatten() - a @ m[b].flatten())[rows]
        assert evidence[b] == pytest.approx(float(-0.5 * residual @ torch.linalg.solve(system, residual)))
        trace, spread = cov.trace(), (2 * cov.square().sum() / 200).sqrt()
        assert (errors[:, b].square().sum(1).mean() - trace).abs() < 5 * spread


@pytest.mark.parametrize("kind", ["masking", "mri, 4 coils", "foreign"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_level_is_the_same_in_every_form(sampler, kind):
    prior, operator, y, _ = problem(kind)
    forms = [0.2, torch.full((BATCH,), 0.2, dtype=F64), torch.full_like(y, 0.2)]
    number, image, entry = (run(sampler, prior, operator, noisy(kind, 0.2), s) for s in forms)
    assert torch.allclose(number, image, atol=1e-9) and torch.allclose(number, entry, atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_entry_under_much_noise_is_as_good_as_missing(sampler):
    """Identity with noise of 1e6 on some entries, and a mask without them: one posterior, and so one sample
    from the same streams.
    """
    shape = (2, 6, 6)
    prior, mask = gaussian_prior(shape, seed=1), random_mask(BATCH, 2, 6, 6)
    y = prior.sample(BATCH, seeded(2)) + 0.2 * normal(BATCH, *shape)
    hidden = torch.where(mask > 0, 0.2, 1e6)
    accurate = {"tolerance": 1e-10, "max_iterations": 100} if sampler == "mmps" else {}
    found = run(sampler, prior, Identity(shape).to(F64), y, hidden, **accurate)
    expected = run(sampler, prior, Masking(mask, shape).to(F64), y, 0.2, **accurate)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["masking", "mri, 4 coils", "foreign"])
def test_default_solves_suit_noise_that_differs_by_entry(kind):
    """Levels from 0.1 to 1 in one image, five products a solve: within 3 % of what the measurement changes.
    With rows that are not balanced it is 7 to 32 %.
    """
    prior, operator, clean, matrices = problem(kind)
    noise = 10 ** -torch.rand(clean.shape, generator=seeded(3), dtype=F64)
    y, x, sigma = noisy(kind, noise), 0.3 * normal(BATCH, *prior.shape, seed=6), 0.3
    found = MMPS(prior, operator, y, noise)(x, torch.full((BATCH,), sigma, dtype=F64)).flatten(1)
    eye = torch.eye(x[0].numel(), dtype=F64)
    for b in range(BATCH):
        both = torch.cat([noise[b].flatten(), torch.full((len(eye),), sigma, dtype=F64)])
        data = torch.cat([y[b].flatten(), x[b].flatten()])
        mean, _ = exact(torch.cat([matrices[b], eye]), data, both, prior.mean.flatten(), prior.cov)
        assert (found[b] - mean).norm() < 0.03 * (prior(x[b : b + 1], sigma).flatten() - mean).norm()


def test_levels_of_chains_are_those_of_their_images():
    """An entry-wise level reaches the right chain whatever the chunk: three images of very different noise,
    alone and together.
    """
    shape = (1, 6, 6)
    prior, operator = gaussian_prior(shape, seed=1), Identity(shape).to(F64)
    y = prior.sample(3, seeded(2))
    sigma = torch.rand(3, *shape, generator=seeded(3), dtype=F64) * torch.tensor([0.01, 1.0, 100.0]).reshape(
        3, 1, 1, 1
    )
    whole = run("daps", prior, operator, y, sigma, samples=5)
    for size in (1, 2, 4):
        assert torch.allclose(
            whole, run("daps", prior, operator, y, sigma, samples=5, batch_size=size), atol=1e-9
        )
    misfit = (whole - y).square().mean((0, 2, 3, 4)).sqrt()
    assert misfit[0] < 0.02 and misfit[0] < 0.1 * misfit[2]


def test_dps_meets_its_equation_entry_by_entry():
    """m = D + J^T A^H kappa (y - A D), kappa_i = sigma_t^2 / sigma_i^2 without a limit, J by dense algebra."""
    prior, operator, clean, matrices = problem("masking")
    noise = noise_levels("entry", clean)
    y, x, sigma = noisy("masking", noise), normal(BATCH, *prior.shape, seed=6), 0.3
    found = DPS(prior, operator, y, noise)(x, torch.full((BATCH,), sigma, dtype=F64)).flatten(1)
    jacobian = prior.cov @ torch.linalg.inv(prior.cov + sigma**2 * torch.eye(len(prior.cov)))
    for b in range(BATCH):
        mean = prior(x[b : b + 1], sigma).flatten()
        pull = (y[b].flatten() - matrices[b] @ mean) * sigma**2 / noise[b].flatten() ** 2
        assert torch.allclose(found[b], mean + jacobian.T @ (matrices[b].T @ pull), atol=1e-9)


# -- the border --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (torch.full((BATCH, 1, 6, 5), 0.1), "one per entry"),
        (torch.full((BATCH, 1, 6, 6), -0.1), "sigma_y"),
        (torch.full((BATCH, 1, 6, 6), float("nan")), "sigma_y"),
        (0.1 + 0.1j, "real"),
        ([0.1, 0.1, 0.1], "one per image"),
    ],
)
def test_levels_that_do_not_fit_are_named(sigma, message):
    prior, operator, y, _ = problem("masking")
    with pytest.raises(InputError, match=message) as caught:
        reconstruct(prior, operator, y, sigma)
    assert "\n" not in str(caught.value)


def test_a_mask_conditional_estimate_takes_one_level_an_image():
    prior, operator, y, _ = problem("masking")
    with pytest.raises(InputError, match="one noise level for each image"):
        reconstruct(
            ConditionalMean(prior, operator), operator, y, torch.full_like(y, 0.1), sampler="one-step"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"root_iterations": 0}, "root_iterations"),
        ({"rho": 0.0}, "rho"),
    ],
)
def test_numbers_that_would_do_nothing_are_named(settings, message):
    prior, operator, y, _ = problem("masking")
    with pytest.raises(InputError, match=message):
        reconstruct(prior, operator, y, 0.1, **settings)


def test_no_images_are_named():
    prior, _, y, _ = problem("identity")
    with pytest.raises(InputError, match="at least one image"):
        reconstruct(prior, Identity(prior.shape), y[:0], 0.1)


def test_what_overflows_is_refused():
    """float32 has no square of 1e20: the solves fail, and the samples would be the prior's."""
    prior, operator, y, _ = problem("mri, 4 coils")
    with pytest.raises(InputError, match="overflowed|finite samples"):
        reconstruct(prior.float(), operator.float(), 1e20 * y.float(), 0.1, samples=1, steps=4)


class Diverged(GaussianPrior):
    """A prior of which one weight is not a number."""

    def forward(self, x, sigma, *given):
        return super().forward(x, sigma) * float("nan")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_that_are_no_numbers_are_refused(sampler):
    prior, operator, y, _ = problem("masking")
    with pytest.raises(InputError, match="finite samples"):
        run(sampler, Diverged(prior.mean, prior.cov), operator, y, 0.1)
    with pytest.raises(InputError, match="finite"):
        generate(Diverged(prior.mean, prior.cov), 1, steps=2)


# -- the type of a state -----------------------------------------------------------------------------------------------------


class Counter(torch.nn.Module):
    """A network whose first entry is an integer and whose weights are half precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("gain", torch.tensor(1.0, dtype=dtype))
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        self.seen.add(x.dtype)
        return (x / (1 + sigma.reshape(-1, 1, 1, 1).to(x) ** 2)) * self.gain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_are_float32_or_better_whatever_the_network_is(dtype):
    prior = DeepinvPrior(Counter(dtype), (1, 4, 4), 1.0)
    expected = torch.float64 if dtype == F64 else torch.float32
    assert state_like(prior).dtype == expected
    assert generate(prior, 2, steps=3, sigma_max=5.0, generator=seeded()).dtype == expected
    assert prior.denoiser.seen <= {dtype, expected}
    y = torch.randn(1, 1, 4, 4, generator=seeded()).to(dtype)
    operator = Identity((1, 4, 4))
    for sampler in SAMPLERS:
        assert run(sampler, prior, operator, y, 0.5, sigma_max=5.0).dtype == expected


def test_states_of_half_precision_networks_do_not_round():
    """Twenty levels of a bf16 network against the same weights in float32: the state would lose 0.4 % a
    level; the network's own rounding is what is left.
    """
    full = network()
    half = NetworkPrior.from_config(full.config)
    half.load_state_dict(full.state_dict())
    half = half.bfloat16()
    a, b = (generate(p, 4, steps=20, sampler="multistep", generator=seeded(1)) for p in (full, half))
    assert b.dtype == torch.float32 and (b - a).norm() < 0.02 * a.norm()


def test_fixed_masks_with_a_half_precision_network():
    prior = network("mask-conditional").bfloat16()
    operator = Masking(random_mask(2, 1, 8, 8).float(), img_size=(2, 8, 8))
    images = generate_fixed_mask(prior, operator, 3, steps=3, generator=seeded())
    assert images.dtype == torch.float32 and torch.isfinite(images).all()
