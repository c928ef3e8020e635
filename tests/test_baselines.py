"""Classic reconstructions are sigpy's minimisers, slice by slice, and sweeps end inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation.baselines import l1_wavelet, sense, sweep, total_variation, zero_filled
from ambient_sci.evaluation.metrics import psnr
from ambient_sci.operators import MRI, Masking
from ambient_sci.operators.mri import to_complex

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
