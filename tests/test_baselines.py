"""Classic reconstructions are sigpy's minimisers, slice by slice, and sweeps end inside."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

import ambient_sci as asci
from ambient_sci.baselines import BASELINES, l1_wavelet, linear_tv, sense, total_variation, zero_filled
from ambient_sci.errors import InputError
from ambient_sci.evaluation import sweep
from ambient_sci.evaluation.metrics import psnr
from ambient_sci.operators import MRI, Identity, Masking
from ambient_sci.operators.mri import to_complex
from ambient_sci.sampling import POINT_ESTIMATES

SIZE, SIGMA = 32, 0.05


def phantoms(num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Discs of different brightness under a smooth phase, (num, 2, SIZE, SIZE)."""
    rng = np.random.default_rng(3)
    axis = np.linspace(-1, 1, SIZE)
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    images = np.zeros((num, SIZE, SIZE), dtype=complex)
    for image in images:
        for _ in range(5):
            centre, radius = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.15, 0.45)
            image += rng.uniform(0.2, 0.5) * (
                (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
            )
        image *= np.exp(1j * (rng.normal() + rng.normal() * rows + rng.normal() * columns))
    return torch.from_numpy(np.stack([images.real, images.imag], 1)).to(dtype)


def line_masks(num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Half of the columns, centre kept, one mask a slice, (num, SIZE, SIZE)."""
    rng = np.random.default_rng(4)
    masks = np.zeros((num, SIZE, SIZE))
    for mask in masks:
        mask[:, rng.choice(SIZE, SIZE // 2, replace=False)] = 1
        mask[:, SIZE // 2 - 2 : SIZE // 2 + 2] = 1
    return torch.from_numpy(masks).to(dtype)


def coil_maps(num: int = 3) -> Tensor:
    from sigpy.mri import birdcage_maps

    maps = torch.from_numpy(birdcage_maps((num, SIZE, SIZE), dtype=np.complex128))
    return maps / maps.abs().square().sum(0).sqrt()


def problem(coils: int, num: int = 2, dtype: torch.dtype = torch.float64) -> tuple[MRI, Tensor, Tensor]:
    """Operator, noisy measurements, truth."""
    operator = MRI(line_masks(num), coil_maps(coils) if coils > 1 else None).to(dtype)
    x = phantoms(num, dtype)
    clean = operator.A(x)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return operator, (clean + SIGMA * noise) * operator.mask, x


def by_sigpy(app: str, operator: MRI, y: Tensor, index: int, weight: float, iterations: int) -> np.ndarray:
    """sigpy's own app on one slice."""
    import sigpy.mri.app as apps

    kspace = to_complex(y).numpy()[index]
    maps = operator.coil_maps
    if maps is None:
        kspace, sensitivities = kspace[None], np.ones((1, SIZE, SIZE), dtype=complex)
    else:
        sensitivities = maps[0].numpy()
    return getattr(apps, app)(kspace, sensitivities, weight, max_iter=iterations, show_pbar=False).run()


def objective(operator: MRI, y: Tensor, index: int, image: np.ndarray, weight: float) -> float:
    """1/2 ||A x - y||^2 + w ||W x||_1 of one slice, with this library's operator and sigpy's wavelet."""
    import sigpy as sp

    x = torch.view_as_real(torch.from_numpy(image)).movedim(-1, 0)[None]
    misfit = 0.5 * (operator[index].A(x) - y[index : index + 1]).square().sum()
    return float(misfit) + weight * float(np.abs(sp.linop.Wavelet(image.shape)(image)).sum())


@pytest.mark.parametrize("coils", [1, 3])
def test_total_variation_is_the_minimiser_sigpy_finds(coils):
    operator, y, x = problem(coils)
    solution = total_variation(operator, y, 0.02, tolerance=1e-6, max_iterations=3000)
    assert solution.converged
    theirs = by_sigpy("TotalVariationRecon", operator, y, 1, 0.02, 1200)
    assert np.abs(to_complex(solution.image)[1].numpy() - theirs).max() < 5e-4 * np.abs(theirs).max()
    default = total_variation(operator, y, 0.02)
    assert default.converged and default.iterations <= 300
    assert float((default.image - solution.image).norm() / solution.image.norm()) < 2e-3


@pytest.mark.parametrize("coils", [1, 3])
def test_l1_wavelet_has_the_lower_objective_and_sigpys_psnr(coils):
    operator, y, x = problem(coils)
    solution = l1_wavelet(operator, y, 0.03, tolerance=2e-5)
    assert solution.converged
    ours = to_complex(solution.image)[1].numpy()
    theirs = by_sigpy("L1WaveletRecon", operator, y, 1, 0.03, 600)
    low, high = (objective(operator, y, 1, image, 0.03) for image in (ours, theirs))
    assert low <= high * (1 + 1e-6) and high < low * 1.02
    image = torch.view_as_real(torch.from_numpy(theirs)).movedim(-1, 0)[None]
    assert abs(float(psnr(solution.image[1:2], x[1:2], 1.0)) - float(psnr(image, x[1:2], 1.0))) < 0.3


def test_l1_wavelet_meets_the_optimality_condition_of_the_exact_problem():
    """sigpy's primal-dual solver on ||W x||_1 itself agrees (its app takes an approximate proximal map)."""
    import sigpy as sp

    operator, y, _ = problem(1)
    solution = l1_wavelet(operator, y, 0.03, tolerance=1e-5, max_iterations=3000)
    mask = operator.mask[0, 0].numpy()
    encode = sp.linop.Multiply(mask.shape, mask) * sp.linop.FFT(mask.shape)
    transform = sp.linop.Wavelet(mask.shape)
    theirs = sp.app.LinearLeastSquares(
        encode,
        to_complex(y)[0].numpy(),
        G=transform,
        proxg=sp.prox.L1Reg(transform.oshape, 0.03),
        max_iter=2000,
        show_pbar=False,
    ).run()
    ours = to_complex(solution.image)[0].numpy()
    a, b = (objective(operator, y, 0, image, 0.03) for image in (ours, theirs))
    assert abs(a - b) < 1e-4 * b
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.parametrize("coils", [1, 3])
def test_sense_solves_the_normal_equations(coils):
    operator, y, _ = problem(coils)
    solution = sense(operator, y, 0.05, tolerance=1e-8)
    assert solution.converged
    left = operator.A_adjoint_A(solution.image) + 0.05 * solution.image
    torch.testing.assert_close(left, operator.A_adjoint(y), atol=1e-6, rtol=0)
    if coils == 1:  # T^H M T has eigenvalues 0 and 1, and A^H y lies in the range
        torch.testing.assert_close(solution.image, operator.A_adjoint(y) / 1.05, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solve", [total_variation, l1_wavelet])
def test_slices_of_a_batch_are_solved_as_if_alone(solve):
    operator, y, _ = problem(1)
    tight = {"tolerance": 1e-5, "max_iterations": 3000}
    together = solve(operator, y, 0.02, **tight).image
    alone = solve(operator[1], y[1:2], 0.02, **tight).image
    assert float((together[1:2] - alone).norm() / alone.norm()) < 2e-3


def test_solutions_scale_with_the_data():
    operator, y, _ = problem(1)
    once = total_variation(operator, y, 0.02, tolerance=1e-6)
    twice = total_variation(operator, 2 * y, 0.04, tolerance=1e-6)
    torch.testing.assert_close(twice.image, 2 * once.image, rtol=1e-6, atol=1e-8)


def test_single_precision_converges_and_keeps_its_type():
    operator, y, _ = problem(1, dtype=torch.float32)
    solution = total_variation(operator, y, 0.02)
    assert solution.image.dtype == torch.float32 and solution.converged


def test_one_mask_for_all_slices():
    operator, y, _ = problem(1)
    shared = MRI(operator.mask[:1, 0])
    assert total_variation(shared, y * shared.mask, 0.02).image.shape == y.shape


def test_a_solution_cut_short_says_so():
    operator, y, _ = problem(1)
    solution = total_variation(operator, y, 0.02, max_iterations=10)
    assert solution.iterations == 10 and not solution.converged
    assert max(solution.primal_residual, solution.dual_residual) > 1e-4


@pytest.mark.parametrize("method", ["tv", "l1-wavelet"])
@pytest.mark.parametrize("first", [(4e-4, 8e-4), (0.5, 1.0), None])
def test_sweeps_end_with_the_best_weight_inside_wherever_they_start(method, first):
    operator, y, x = problem(1)
    result = sweep(method, operator, y, x, first, peak=1.0)
    weights, scores = [r["weight"] for r in result.table], [r["psnr"] for r in result.table]
    assert weights == sorted(weights) and result.converged
    best = int(np.argmax(scores))
    assert result.interior and 0 < best < len(weights) - 1 and result.weight == weights[best]
    assert float(psnr(result.image, x, 1.0).mean()) == pytest.approx(scores[best])
    assert scores[best] > float(psnr(zero_filled(operator, y), x, 1.0).mean()) + 0.5


def test_a_sweep_that_may_not_be_extended_admits_its_edge():
    operator, y, x = problem(1)
    result = sweep("tv", operator, y, x, (1.0, 0.5), max_extensions=0)
    assert not result.interior


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda o, y, x: sweep("fista", o, y, x), "expected one of sense, l1-wavelet, tv, got 'fista'"),
        (lambda o, y, x: sweep("tv", o, y, x, [0.1]), "at least two positive weights"),
        (lambda o, y, x: sweep("tv", o, y, x, [0.1, -1.0]), "at least two positive weights"),
        (lambda o, y, x: total_variation(o, y, 0.0), "expected a positive weight, got 0.0"),
        (lambda o, y, x: total_variation(o, y[:, :1], 0.1), "expected measurements"),
        (
            lambda o, y, x: l1_wavelet(Masking(o.mask[:, 0]), x, 0.1),
            "expected an MRI operator, got 'masking'",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(InputError) as error:
        call(*problem(1))
    assert message in str(error.value) and "\n" not in str(error.value)


# -- by name, as a sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_a_sampler_without_a_prior(name):
    operator, y, x = problem(1)
    result = asci.reconstruct(None, operator, y, SIGMA, sampler=name)
    assert result.samples.shape == (1, *x.shape) and result.mean.dtype == y.dtype
    assert name in POINT_ESTIMATES and result.report["sampler"] == name and result.report["samples"] == 1
    assert float(psnr(result.mean, x, 1.0).mean()) > 15
    if name != "zero-filled":
        assert result.report["converged"] and len(result.report["weight"]) == 2
        json.dumps(result.report)


@pytest.mark.parametrize("case", ["mri", "denoising", "blur"])
def test_the_weight_of_least_estimated_risk_is_nearly_the_one_of_least_risk(case):
    """Of each image, whose noise levels differ by three, against a fine sweep of the true risk ||A (x_w -
    x)||^2."""
    import deepinv

    blur = deepinv.physics.BlurFFT((2, SIZE, SIZE), torch.full((1, 1, 3, 3), 1 / 9)).double()
    operator, _, x = problem(1)
    operator = {"mri": operator, "denoising": Identity((2, SIZE, SIZE)), "blur": blur}[case]
    sigma = torch.tensor([SIGMA, 3 * SIGMA], dtype=x.dtype)
    clean = operator.A(x)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    y = clean + sigma[:, None, None, None] * noise * (operator.mask if case == "mri" else 1.0)
    result = asci.reconstruct(None, operator, y, sigma, sampler="tv")

    def risk(image: Tensor) -> Tensor:
        return (operator.A(image) - clean).square().flatten(1).sum(1)

    chosen = torch.tensor(result.report["weight"])
    tried = torch.stack(
        [risk(total_variation(operator, y, chosen * 2 ** (k / 2)).image) for k in range(-6, 7)]
    )
    assert (risk(result.mean) <= 1.1 * tried.amin(0)).all()
    # The sweep tells weights apart: those eight times as large or small are far worse.
    assert (tried[[0, -1]] > 1.2 * tried.amin(0)).all() and chosen[1] > 1.5 * chosen[0]


def test_a_weight_for_each_image_is_that_image_alone():
    operator, y, _ = problem(1, 3)  # an odd number: sigpy's wavelet transform pads it
    weights = torch.tensor([0.01, 0.03, 0.02])
    for solve in (total_variation, l1_wavelet, sense):
        tight = {"tolerance": 1e-5, "max_iterations": 3000}
        together = solve(operator, y, weights, **tight)
        for k in range(3):
            alone = solve(operator[k], y[k : k + 1], float(weights[k]), **tight)
            assert float((together.image[k : k + 1] - alone.image).norm() / alone.image.norm()) < 2e-3
        assert together.weight == pytest.approx([0.01, 0.03, 0.02])


def test_options_without_a_meaning_are_refused():
    operator, y, _ = problem(1)
    with pytest.raises(InputError, match="tv: sigma_min has no meaning here"):
        asci.reconstruct(None, operator, y, SIGMA, sampler="tv", sigma_min=0.1)
    with pytest.raises(
        InputError, match="expected options among weight, tolerance, max_iterations, got final"
    ):
        asci.reconstruct(None, operator, y, SIGMA, sampler="tv", final="mean")
    with pytest.raises(InputError, match="zero-filled: expected options among none, got weight"):
        asci.reconstruct(None, operator, y, SIGMA, sampler="zero-filled", weight=1.0)
    with pytest.raises(InputError, match="expected finite values"):
        asci.reconstruct(None, operator, y * torch.nan, SIGMA, sampler="tv")
    cut = asci.reconstruct(None, operator, y, SIGMA, sampler="tv", weight=0.02, max_iterations=10)
    assert "stopped after 10 steps" in cut.report["notes"][0]


# -- total variation for any linear operator -----------------------------------------------------------------------------------


def colours(num: int = 2) -> Tensor:
    return torch.cat([phantoms(num), phantoms(num)[:, :1].flip(-1)], 1)


def test_total_variation_of_noisy_images_is_deepinvs_denoiser():
    """The same objective: not above what deepinv's solver reaches, and the same image."""
    from deepinv.models import TVDenoiser
    from deepinv.optim.prior import TVPrior

    x = colours()
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    solution = total_variation(Identity(tuple(x.shape[1:])), y, 0.08, tolerance=1e-6, max_iterations=3000)
    theirs = TVDenoiser(n_it_max=20_000, crit=1e-9)(y, 0.08)

    def value(image: Tensor) -> float:
        return float(0.5 * (image - y).square().sum() + 0.08 * TVPrior().fn(image).sum())

    assert solution.converged and solution.objective == pytest.approx(value(solution.image), rel=1e-10)
    assert value(solution.image) <= value(theirs) * (1 + 1e-7)
    assert float((solution.image - theirs).norm() / theirs.norm()) < 1e-4
    assert value(y) > 1.5 * value(theirs)  # the objective tells images apart


def test_total_variation_for_inpainting_and_blur_meets_the_optimality_condition():
    """Convex: at the minimiser no direction goes down. And it is closer to the truth than A^H y."""
    import deepinv

    x = colours()
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 1, SIZE, SIZE, generator=generator) < 0.6).double()
    blur = deepinv.physics.BlurFFT(tuple(x.shape[1:]), torch.full((1, 1, 3, 3), 1 / 9)).double()
    for operator in (Masking(mask, tuple(x.shape[1:])).double(), blur):
        clean = operator.A(x)
        kept = operator.mask if isinstance(operator, Masking) else 1.0
        y = clean + SIGMA * kept * torch.randn(clean.shape, generator=generator, dtype=x.dtype)
        weight = torch.tensor([0.02, 0.04])
        found = total_variation(operator, y, weight, tolerance=2e-5, max_iterations=2000)
        assert found.converged
        lowest = linear_tv.objective(operator, y, weight, found.image)
        for _ in range(20):
            step = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            for size in (1e-4, 1e-2):
                assert (linear_tv.objective(operator, y, weight, found.image + size * step) >= lowest).all()
            away = found.image + 0.01 * (x - found.image)
            assert (linear_tv.objective(operator, y, weight, away) >= lowest).all()
        result = asci.reconstruct(None, operator, y, SIGMA, sampler="tv")
        assert (result.mean - x).square().mean() < 0.65 * (operator.A_adjoint(y) - x).square().mean()


def test_linear_total_variation_treats_each_image_as_if_alone():
    x = phantoms(2)
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    y[1] *= 100
    operator = Identity((2, SIZE, SIZE))
    weights = torch.tensor([0.05, 5.0])
    together = total_variation(operator, y, weights, tolerance=1e-6)
    for k in range(2):
        alone = total_variation(operator, y[k : k + 1], float(weights[k]), tolerance=1e-6)
        assert float((together.image[k] - alone.image[0]).norm() / alone.image.norm()) < 1e-4
    start = total_variation(operator, y, weights, start=together, tolerance=1e-6)
    assert start.iterations <= 10 < together.iterations
