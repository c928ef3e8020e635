"""Measurements as users have them, and deepinv's operators as ours: A and A^H agree, and a prior is learned from them."""

from __future__ import annotations

from dataclasses import replace

import deepinv
import numpy as np
import pytest
import torch
from torch import Tensor

from ambient_sci.data import MeasurementArrays
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, Identity, Independent, Masking, birdcage_maps
from ambient_sci.operators.foreign import Linear, from_deepinv
from ambient_sci.priors import GaussianPrior, NetworkConfig
from ambient_sci.training import EMConfig, TrainConfig, em_report, fit, fit_em
from ambient_sci.training.given_data import open_measurements

NOISE = deepinv.physics.GaussianNoise(0.25)
MLP = NetworkConfig(kind="mlp", channels=(16,))
QUICK = TrainConfig(max_steps=2, batch_size=4, network=MLP, device="cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lines(count: int, size: int) -> Tensor:
    """Masks (count, 1, size, size) of columns, the middle ones always measured."""
    mask = (torch.rand(count, 1, 1, size, generator=rng(3)) < 0.6).float()
    mask[..., size // 2 - 1 : size // 2 + 1] = 1
    return mask.expand(-1, -1, size, -1).contiguous()


def physics(name: str, size: int = 6, count: int = 5):
    p = deepinv.physics
    maps = torch.as_tensor(birdcage_maps(3, size, size))
    pixels = (torch.rand(count, 2, size, size, generator=rng(2)) < 0.6).float()
    return {
        "denoising": lambda: p.Denoising(NOISE),
        "inpainting": lambda: p.Inpainting((2, size, size), mask=pixels[0], noise_model=NOISE),
        "inpainting, a mask each": lambda: p.Inpainting((2, size, size), mask=pixels, noise_model=NOISE),
        "mri": lambda: p.MRI(mask=lines(1, size), noise_model=NOISE),
        "mri, a mask each": lambda: p.MRI(mask=lines(count, size), noise_model=NOISE),
        "coils": lambda: p.MultiCoilMRI(mask=lines(1, size), coil_maps=maps, noise_model=NOISE),
        "coils, maps each": lambda: p.MultiCoilMRI(
            mask=lines(count, size), coil_maps=maps * torch.exp(1j * torch.rand(count, 1, 1, 1, generator=rng(1))), noise_model=NOISE
        ),
    }[name]()  # fmt: skip


NAMES = [
    "denoising",
    "inpainting",
    "inpainting, a mask each",
    "mri",
    "mri, a mask each",
    "coils",
    "coils, maps each",
]
KINDS = {"denoising": Identity, "inpainting": Masking, "mri": MRI, "coils": MRI}


@pytest.mark.parametrize("size", [6, 5])
@pytest.mark.parametrize("name", NAMES)
def test_converted_operators_are_theirs_forward_and_back(name, size):
    theirs = physics(name, size)
    x = torch.randn(5, 2, size, size, generator=rng())
    y = theirs.A(x)
    ours = from_deepinv(theirs, y)
    assert type(ours) is KINDS[name.split(",")[0]] and ours.img_size == (2, size, size)
    w = torch.randn(y.shape, generator=rng(1))
    assert torch.allclose(ours.A(x), y, atol=1e-5)
    assert torch.allclose(ours.A_adjoint(w), theirs.A_adjoint(w), atol=1e-5)
    assert float((ours.A(x) * w).sum()) == pytest.approx(
        float((x * ours.A_adjoint(w)).sum()), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("name", ["denoising", "mri", "coils"])
def test_a_prior_is_learned_from_deepinvs_operators_and_their_own_noise(name):
    theirs = physics(name)
    y = theirs(torch.randn(12, 2, 6, 6, generator=rng()))
    if name != "denoising":
        theirs = type(theirs)(
            **{
                "mask": torch.ones(6, 6),
                "noise_model": NOISE,
                **({"coil_maps": theirs.coil_maps} if name == "coils" else {}),
            }
        )
        y = theirs(torch.randn(12, 2, 6, 6, generator=rng()))
    prior = fit((theirs, y), QUICK, progress=False)
    assert prior.conditioning == "unconditional" and prior.sigma_min == pytest.approx(0.25)
    again = fit((from_deepinv(theirs, y), y, 0.25), QUICK, progress=False)
    assert all(map(torch.equal, prior.state_dict().values(), again.state_dict().values()))


def test_forms_of_the_same_measurements():
    """A triple, NumPy, `MeasurementArrays`, pairs of batches, pairs of single ones, a generator: the same data."""
    mask = (torch.rand(6, 1, 4, 4, generator=rng()) < 0.7).float()
    mask[:, :, 0, 0] = 1
    y = torch.randn(6, 2, 4, 4, generator=rng(1)) * mask
    operator = Masking(mask, img_size=(2, 4, 4))
    levels = torch.linspace(0.1, 0.2, 6)
    forms = [
        (operator, y, levels),
        (operator, y.numpy(), levels.numpy()),
        MeasurementArrays(operator, y, levels),
        [(operator[:4], y[:4], levels[:4]), (operator[4:], y[4:], levels[4:])],
        [(operator[k], y[k], float(levels[k])) for k in range(6)],
        ((operator[k], y[k], levels[k : k + 1]) for k in range(6)),
        [
            (deepinv.physics.Inpainting((2, 4, 4), mask=mask[k].expand(2, 4, 4), noise_model=deepinv.physics.GaussianNoise(float(levels[k]))), y[k])
            for k in range(6)
        ],
    ]  # fmt: skip
    for form in forms:
        data = open_measurements(form)
        assert len(data) == 6 and tuple(data.image_shape) == (2, 4, 4)
        assert torch.equal(data.measurements(), y) and torch.allclose(data.noise_std, levels)
        assert torch.equal(data.operator().mask.expand(6, 2, 4, 4), mask.expand(6, 2, 4, 4))


def test_pairs_of_scans_with_their_own_coil_maps():
    maps = torch.as_tensor(birdcage_maps(3, 6, 6))
    scans = []
    for k in range(4):
        mri = deepinv.physics.MultiCoilMRI(
            mask=lines(4, 6)[k : k + 1], coil_maps=maps * np.exp(1j * k), noise_model=NOISE
        )
        scans.append((mri, mri.A(torch.randn(1, 2, 6, 6, generator=rng(k)))))
    data = open_measurements(scans)
    assert data.operator_name == "mri" and len(data) == 4
    for k, (mri, y) in enumerate(scans):
        assert torch.allclose(
            data.operator([k]).A_adjoint(data.measurements([k])), mri.A_adjoint(y), atol=1e-5
        )
    entries = [(mri, y, torch.full_like(y, 0.1 * (k + 1))) for k, (mri, y) in enumerate(scans)]
    assert torch.allclose(open_measurements(entries).noise_std, torch.tensor([0.1, 0.2, 0.3, 0.4]))


BLUR = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.0]])[None, None]


def blurred(num: int, sigma: float, size: int = 4):
    """Gaussian images of neighbours correlated by 0.7 under a circular blur, and their law."""
    index = torch.arange(size, dtype=torch.float64)
    one = 0.7 ** (index[:, None] - index).abs()
    truth = GaussianPrior(torch.full((1, size, size), 0.5), torch.kron(one, one).float())
    theirs = deepinv.physics.Blur(BLUR, padding="circular", noise_model=deepinv.physics.GaussianNoise(sigma))
    clean = theirs.A(truth.sample(num, rng()))
    return theirs, clean + sigma * torch.randn(clean.shape, generator=rng(1)), truth


def test_em_on_a_blur_reaches_the_covariance_of_maximum_likelihood():
    """y ~ N(A mu, A Sigma A^H + sigma^2 I): with A invertible and more samples than unknowns the likelihood of y is
    largest at Sigma = A^-1 (cov y - sigma^2 I) A^-H, mu = A^-1 mean y, wherever that is positive definite."""
    theirs, y, truth = blurred(1500, 0.1)
    em = EMConfig(
        laps=0, initial_samples=1500, initial_iterations=1500, held_out=16, held_out_draws=2, sampler_steps=4
    )
    prior = fit_em((theirs, y), TrainConfig(em=em, device="cpu", network=MLP), progress=False)
    basis = torch.eye(16).reshape(16, 1, 4, 4)
    matrix = theirs.A(basis).flatten(1).T.double()
    rest = y.double().flatten(1)
    cov = (rest - rest.mean(0)).T @ (rest - rest.mean(0)) / len(y) - 0.01 * torch.eye(16)
    best = torch.linalg.solve(matrix, torch.linalg.solve(matrix, cov).T)
    assert float(torch.linalg.eigvalsh(best)[0]) > 0
    error = float((prior.cov - best).norm() / best.norm())
    assert error < 5e-3, error
    assert torch.allclose(prior.mean.flatten().double(), torch.linalg.solve(matrix, rest.mean(0)), atol=2e-3)
    assert float((prior.cov - truth.cov).norm() / truth.cov.norm()) < 0.15


@pytest.mark.parametrize("kind", ["blur", "downsampling"])
def test_laps_for_any_linear_operator(kind, tmp_path):
    """Eight laps of draws and Gaussian M-steps from a start of one iteration approach the truth, resumed or not."""
    theirs, y, truth = blurred(1000, 0.8)
    if kind == "downsampling":
        theirs = deepinv.physics.Downsampling(img_size=(1, 4, 4), factor=2, filter=None, noise_model=NOISE)
        y = theirs.A(truth.sample(1000, rng())) + 0.25 * torch.randn(1000, 1, 2, 2, generator=rng(1))
    em = EMConfig(
        m_step="gaussian", laps=5, initial_iterations=1, sampler_batch=1000, sampler_steps=16, patience=8, max_iterations=8,
        held_out=200,
    )  # fmt: skip
    settings = TrainConfig(em=em, device="cpu", network=MLP)
    start = fit_em((theirs, y), replace(settings, em=replace(em, laps=0)), progress=False)
    prior = fit_em((theirs, y), settings, tmp_path / "run", progress=False)
    scores = [lap["crps"] for lap in em_report(tmp_path / "run")]
    assert len(scores) == 6
    matrix = theirs.A(torch.eye(16).reshape(16, 1, 4, 4)).flatten(1).T
    measured = [matrix @ p.cov @ matrix.T for p in (start, prior, truth)]
    errors = [float((cov - measured[2]).norm() / measured[2].norm()) for cov in measured[:2]]
    assert errors[1] < 0.2 and errors[1] < 0.7 * errors[0], errors
    other = deepinv.physics.Blur(BLUR * 2, padding="circular") if kind == "blur" else theirs
    if kind == "blur":
        with pytest.raises(InputError, match="physics"):
            fit_em((other, y, 0.8), settings, tmp_path / "run", resume=True, progress=False)


class Broken(deepinv.physics.LinearPhysics):
    """An adjoint that is not one."""

    def A(self, x, **kwargs):
        return x.roll(1, -1)

    def A_adjoint(self, y, **kwargs):
        return y.roll(1, -1)


Y = torch.randn(6, 1, 4, 4, generator=rng(4))


@pytest.mark.parametrize(
    ("measurements", "fragments"),
    [
        (3, ["a path or (operator, y, sigma_y)", "int"]),
        ((1, 2), ["2 values"]),
        (Y, ["Tensor"]),
        ([], ["empty list"]),
        ([Y], ["measurements", "(operator, y)", "Tensor"]),
        ((Identity((1, 4, 4)), Y), ["noise level", "got None"]),
        ((Identity((1, 4, 4)), Y.to(torch.complex64), 0.1), ["complex numbers as two channels"]),
        ((deepinv.physics.Denoising(deepinv.physics.PoissonNoise()), Y), ["PoissonNoise"]),
        ((torch.nn.Linear(1, 1), Y, 0.1), ["LinearPhysics", "Linear"]),
        ((deepinv.physics.Blur(BLUR, padding="circular"), Y, 0.1), ["Blur", "config.em", "Denoising"]),
        ((deepinv.physics.Inpainting((1, 4, 4), mask=torch.full((1, 4, 4), 0.5)), Y, 0.1), ["0 and 1"]),
        ((deepinv.physics.MRI(img_size=(4, 4)), Y, 0.1), ["mri: expected measurements (B, 2, 4, 4)"]),
        (
            [(Identity((1, 4, 4)), Y, 0.1), (Masking(torch.ones(4, 4)), Y, 0.1)],
            ["operators of one kind", "Identity", "Masking"],
        ),
        (
            [(Identity((1, 4, 4)), Y, 0.1), (Identity((1, 2, 2)), Y[..., :2, :2], 0.1)],
            ["one shape", "(1, 2, 2)"],
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_one_line(measurements, fragments):
    with pytest.raises(InputError) as error:
        fit(measurements, QUICK, progress=False)
    said = str(error.value)
    assert "\n" not in said
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize(
    ("measurements", "fragments"),
    [
        ((Broken(), Y, 0.1), ["Broken", "adjoint"]),
        ((deepinv.physics.Blur(torch.rand(6, 1, 3, 3), padding="circular"), Y, 0.1), ["Blur", "all samples"]),
        (
            [(deepinv.physics.Blur(BLUR, padding="circular"), Y, 0.1), (deepinv.physics.Blur(BLUR, padding="circular"), Y, 0.1)],
            ["one Blur", "several"],
        ),
    ],
)  # fmt: skip
def test_what_em_cannot_use(measurements, fragments):
    with pytest.raises(InputError) as error:
        fit_em(measurements, QUICK.__class__(network=MLP, device="cpu", em=EMConfig(laps=0)), progress=False)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_linear_operators_split_and_move_like_ours():
    theirs = deepinv.physics.Downsampling(img_size=(1, 4, 4), factor=2, filter=None)
    y = theirs.A(Y)
    operator = from_deepinv(theirs, y)
    assert isinstance(operator, Linear) and "Downsampling, 1 x 4 x 4 to 1 x 2 x 2" in repr(operator)
    split = operator.for_samples(6).split(keep=0.5, generator=rng())
    both = split.kept.mask + split.held_out.mask
    assert both.shape == (6, 1, 2, 2) and bool((both == 1).all()) and 0 < float(split.kept.mask.mean()) < 1
    assert torch.allclose(operator[torch.tensor([1, 3])].A(Y[[1, 3]]), y[[1, 3]])
    assert operator.double().A(Y.double()).dtype == torch.float64


def test_designs_of_ours_are_kept():
    design = Independent((1, 4, 4), "pixels", 0.5)
    masks = design.sample(4, rng())
    parts = [
        (Masking(masks[k : k + 1], img_size=(1, 4, 4), design=design), Y[k : k + 1] * masks[k], 0.1)
        for k in range(4)
    ]
    assert open_measurements(parts).design is design
