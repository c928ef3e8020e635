"""Unconditional samplers, linear solvers and result files."""

from __future__ import annotations

import math
import typing

import h5py
import numpy as np
import pytest
import torch

from ambient_sci.commands.model import Generate, Reconstruct
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.noise import ChainNoise, ancestral_step, karras_grid
from ambient_sci.operators import Masking
from ambient_sci.priors import ConditionalMean, GaussianPrior
from ambient_sci.sampling import (
    SAMPLERS,
    Reconstruction,
    ResultFile,
    ResultWriter,
    ancestral,
    conjugate_gradient,
    generate,
    heun,
    level_grid,
    minimal_residual,
)

SHAPE = (1, 3, 3)
N = 9


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(seed: int = 0) -> GaussianPrior:
    """A prior of N entries with correlated covariance, eigenvalues from 0.01 to 1."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64))[0]
    cov = (q * torch.logspace(-2, 0, N, dtype=torch.float64)) @ q.T
    return GaussianPrior(torch.randn(SHAPE, generator=g, dtype=torch.float64), (cov + cov.T) / 2)


def flow(prior, sampler, sigmas) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact mean and covariance of a deterministic sampler on a Gaussian prior: it is affine in its start."""
    start = torch.cat([torch.zeros(1, N), torch.eye(N)]).double() * float(sigmas[0])
    out = sampler(prior, start.reshape(-1, *SHAPE), sigmas).flatten(1)
    gain = (out[1:] - out[0]).T
    return out[0], gain @ gain.T


# -- unconditional samplers --------------------------------------------------------------------------------------------------


def test_heun_draws_the_gaussian_it_is_given():
    prior = gaussian()
    mean, cov = flow(prior, heun, karras_grid(80, 1e-3, 200.0))
    assert torch.allclose(mean, prior.mean.flatten(), atol=0.01)
    assert torch.allclose(cov, prior.cov, atol=0.015)


def test_heun_is_second_order():
    prior = gaussian()
    exact = flow(prior, heun, karras_grid(1600, 0.05, 50.0))[1]
    errors = [(flow(prior, heun, karras_grid(n, 0.05, 50.0))[1] - exact).norm() for n in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


def test_truncated_sampling_has_the_known_covariance():
    """Stopped at sigma_n the covariance is Sigma (Sigma + sigma_n^2)^-1 Sigma, not Sigma."""
    prior, sigma_n = gaussian(), 0.3
    cov = flow(prior, heun, karras_grid(150, sigma_n, 300.0))[1]
    truncated = prior.cov @ torch.linalg.solve(prior.cov + sigma_n**2 * torch.eye(N), prior.cov)
    assert torch.allclose(cov, truncated, atol=2e-3)
    assert (cov - prior.cov).norm() > 0.1 * prior.cov.norm()


def test_ancestral_draws_the_gaussian_it_is_given():
    """5,000 draws: the standard error of a variance is 2 % of it, the steps cost up to 3 %; four standard
    errors are allowed.
    """
    prior = gaussian(1)
    g = torch.Generator().manual_seed(0)
    start = 20.0 * torch.randn(5_000, *SHAPE, generator=g, dtype=torch.float64)
    out = ancestral(prior, start, karras_grid(300, 5e-3, 20.0), g).flatten(1)
    rotated = (out - prior.mean.flatten()) @ prior.vectors
    ratio = rotated.square().mean(0) / prior.values
    assert torch.allclose(ratio, torch.full_like(ratio, 0.98), atol=0.09)
    assert rotated.mean(0).abs().max() < 0.06


def test_generate_does_not_depend_on_the_batch_size():
    prior = gaussian()
    images = [
        generate(
            prior, 7, steps=10, batch_size=b, sampler="ancestral", generator=torch.Generator().manual_seed(3)
        )
        for b in (1, 3, 64)
    ]
    assert torch.allclose(images[0], images[1]) and torch.allclose(images[0], images[2])
    assert not torch.allclose(images[0][0], images[0][1])


def test_generate_refuses_what_it_cannot_do():
    prior = gaussian()
    conditional = ConditionalMean(prior, Masking(torch.ones(1, 1, 3, 3)))
    with pytest.raises(ConditioningError, match="unconditional"):
        generate(conditional, 2)
    with pytest.raises(InputError, match="sampler"):
        generate(prior, 2, sampler="euler")
    with pytest.raises(InputError, match="num"):
        generate(prior, 0)
    with pytest.raises(InputError, match="sigma_min"):
        generate(prior, 1, sigma_min=2.0, sigma_max=1.0)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_one_step_is_one_evaluation_at_the_highest_level(sampler):
    """G(z) = D(sigma_max z, sigma_max): what a one-step generator is asked, whatever the sampler's name."""
    prior = gaussian()
    images = generate(prior, 5, steps=1, sampler=sampler, sigma_max=3.0, generator=rng(1))
    seeds = torch.randint(2**62, (5,), generator=rng(1)).tolist()
    z = ChainNoise(seeds).draw(torch.empty(5, *SHAPE, dtype=torch.float64))
    assert torch.allclose(images, prior(3.0 * z, 3.0))
    with pytest.raises(InputError, match="sigma_min"):
        generate(prior, 1, steps=1, sigma_min=0.1)
    with pytest.raises(InputError, match="sigma_max"):
        generate(prior, 1, steps=1, sigma_max=float("inf"))
    with pytest.raises(InputError, match="steps"):
        generate(prior, 1, steps=0)


@pytest.mark.parametrize("rho", [1.0, 7.0, math.inf])
def test_grids_end_where_they_are_told(rho):
    """Exactly: a level rounded to below sigma_min is one that the prior has not learned."""
    for k in range(200):
        low, high = 10 ** (-4 + 0.0137 * k), 10 ** (1 + 0.0171 * k)
        grid = level_grid(9, low, high, rho)
        assert float(grid[0]) == high and float(grid[-1]) == low and bool((grid.diff() < 0).all())
    ratios = level_grid(9, 0.01, 10.0)[1:] / level_grid(9, 0.01, 10.0)[:-1]
    assert torch.allclose(ratios, ratios[:1])


def test_the_command_line_knows_every_sampler():
    hints = typing.get_type_hints(Generate, include_extras=True)
    assert typing.get_args(typing.get_args(hints["sampler"])[0]) == tuple(SAMPLERS)
    hints = typing.get_type_hints(Reconstruct, include_extras=True)
    assert set(typing.get_args(typing.get_args(typing.get_args(hints["integrator"])[0])[0])) == set(SAMPLERS)


def test_ancestral_steps_by_numbers_and_by_levels_agree():
    x, clean = (torch.randn(4, *SHAPE, generator=rng(k), dtype=torch.float64) for k in (1, 2))
    levels = torch.full((4,), 0.7, dtype=torch.float64)
    number = ancestral_step(x, clean, 0.7, 0.3, generator=rng())
    assert torch.allclose(number, ancestral_step(x, clean, levels, 0.3, generator=rng()), atol=1e-12)


def test_chain_noise_is_a_stream_per_chain():
    a, b = ChainNoise([5, 6, 7]), ChainNoise([6])
    like = torch.zeros(3, 4)
    first, second = a.draw(like), a.draw(like)
    assert torch.equal(b.draw(like[:1]), first[1:2]) and torch.equal(b.draw(like[:1]), second[1:2])


# -- guarded solves ----------------------------------------------------------------------------------------------------------


def systems(batch: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, n, n, generator=g, dtype=torch.float64)
    return root @ root.mT / n + 0.1 * torch.eye(n), torch.randn(batch, n, generator=g, dtype=torch.float64)


def product(matrix: torch.Tensor):
    return lambda u: torch.einsum("bij,bj->bi", matrix, u)


def residuals(apply, r: torch.Tensor, **settings: float):
    """`minimal_residual`, which also carries a linear map of the solution along: here 2 u."""
    solution = minimal_residual(lambda u: (apply(u), 2 * u), r, **settings)
    if solution.image is not None:
        assert torch.allclose(solution.image, 2 * solution.u)
    return solution


SOLVERS = pytest.mark.parametrize("solve", [conjugate_gradient, residuals], ids=["cg", "residual"])


@SOLVERS
def test_symmetric_positive_definite_systems_are_solved(solve):
    matrix, r = systems(6, 12)
    solution = solve(product(matrix), r, tolerance=1e-10, max_iterations=40)
    assert torch.allclose(solution.u, torch.linalg.solve(matrix, r), atol=1e-8)
    assert solution.residual.max() < 1e-10 and not solution.stopped.any()


@SOLVERS
def test_the_residual_reported_is_the_true_one(solve):
    matrix, r = systems(6, 12)
    for iterations in (1, 3, 6):
        solution = solve(product(matrix), r, tolerance=1e-10, max_iterations=iterations)
        true = (product(matrix)(solution.u) - r).norm(dim=1) / r.norm(dim=1)
        assert torch.allclose(solution.residual, true, rtol=1e-6)
        assert solution.iterations == iterations


@SOLVERS
def test_samples_of_a_solve_do_not_couple(solve):
    """Very different systems in one batch end where each would end alone."""
    matrix, r = systems(5, 10)
    matrix[1] *= 1e4
    matrix[2] = torch.eye(10)
    r[3] *= 1e-5
    together = solve(product(matrix), r, tolerance=1e-6, max_iterations=30)
    for i in range(5):
        alone = solve(product(matrix[i : i + 1]), r[i : i + 1], tolerance=1e-6, max_iterations=30)
        assert torch.allclose(together.u[i], alone.u[0], rtol=1e-9, atol=1e-14)


def hard_systems(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight systems that conjugate gradients are not made for."""
    g = torch.Generator().manual_seed(1)
    matrix, r = systems(8, 10)
    if kind == "non-symmetric":
        matrix = matrix + 0.7 * torch.randn(8, 10, 10, generator=g, dtype=torch.float64)
    elif kind == "indefinite":
        matrix = matrix - 1.0 * torch.eye(10)
    elif kind == "singular":
        matrix = torch.zeros_like(matrix)
    elif kind == "rotation":
        matrix = torch.linalg.qr(torch.randn(8, 10, 10, generator=g, dtype=torch.float64))[0]
    return matrix, r


@SOLVERS
@pytest.mark.parametrize("kind", ["non-symmetric", "indefinite", "singular", "nan", "infinite", "rotation"])
def test_solves_survive_systems_they_are_not_made_for(solve, kind):
    """Never NaN, never worse than the zero they start from, and the residual reported is the true one."""
    matrix, r = hard_systems(kind)
    broken = {"nan": float("nan"), "infinite": float("inf")}.get(kind)

    def apply(u: torch.Tensor) -> torch.Tensor:
        out = product(matrix)(u)
        return out if broken is None else out.index_fill(0, torch.tensor([0, 3]), broken)

    solution = solve(apply, r, tolerance=1e-8, max_iterations=25)
    assert torch.isfinite(solution.u).all() and torch.isfinite(solution.residual).all()
    assert (solution.residual <= 1 + 1e-12).all()
    sound = torch.ones(8, dtype=torch.bool)
    if broken is not None:
        sound[[0, 3]] = False
        assert solution.stopped[~sound].all() and not solution.stopped[sound].any()
        assert (solution.u[~sound] == 0).all()
    true = (product(matrix)(solution.u) - r).norm(dim=1) / r.norm(dim=1)
    assert torch.allclose(solution.residual[sound], true[sound], rtol=1e-6)


@pytest.mark.parametrize("kind", ["non-symmetric", "indefinite"])
def test_minimal_residuals_only_fall(kind):
    """Iteration by iteration, and below those of conjugate gradients; a residual solve of full length is a
    solution.
    """
    matrix, r = hard_systems(kind)
    apply = product(matrix)
    runs = [residuals(apply, r, tolerance=1e-12, max_iterations=k) for k in range(1, 12)]
    for before, after in zip(runs[:-1], runs[1:], strict=True):
        assert (after.residual <= before.residual * (1 + 1e-9)).all()
    assert (runs[4].residual <= conjugate_gradient(apply, r, max_iterations=5).residual + 1e-9).all()
    assert runs[-1].residual.median() < 1e-6


@SOLVERS
def test_a_zero_right_hand_side_is_a_solution(solve):
    matrix, r = systems(3, 6)
    r[1] = 0
    solution = solve(product(matrix), r, tolerance=1e-8, max_iterations=20)
    assert (solution.u[1] == 0).all() and solution.residual[1] == 0 and not solution.stopped[1]


@SOLVERS
def test_right_hand_sides_that_are_not_finite_are_no_solution(solve):
    """Reported as such, left at zero, and of no effect on their neighbours."""
    matrix, r = systems(3, 6)
    alone = solve(product(matrix), r, tolerance=1e-8, max_iterations=20)
    r = r.clone()
    r[1, 2] = float("nan")
    solution = solve(product(matrix), r, tolerance=1e-8, max_iterations=20)
    assert solution.stopped.tolist() == [False, True, False] and solution.residual[1] == float("inf")
    assert (solution.u[1] == 0).all()
    assert torch.allclose(solution.u[::2], alone.u[::2]) and (solution.residual[::2] < 1e-8).all()


def test_a_side_product_that_is_not_finite_stops_its_system():
    factor = torch.tensor([[float("inf")], [2.0]])
    solution = minimal_residual(lambda u: (2 * u, factor * u), torch.ones(2, 3))
    assert solution.stopped.tolist() == [True, False]
    assert solution.image is not None
    assert torch.allclose(solution.image, torch.tensor([[0.0], [1.0]]).expand(2, 3), atol=1e-6)


# -- result files ------------------------------------------------------------------------------------------------------------


def samples(seed: int = 0) -> torch.Tensor:
    return 3 + torch.randn(6, 4, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_a_result_streams_to_the_same_mean_and_std(tmp_path):
    x = samples()
    with ResultWriter(tmp_path / "r.h5", x.shape, ["a", "a", "b", "b"], 2.5) as writer:
        for images in (slice(0, 3), slice(3, 4)):
            for part in (x[:1, images], x[1:4, images], x[4:, images]):
                writer.add(images, part)
        writer.report.update(steps=3)
    with ResultFile(tmp_path / "r.h5") as f:
        assert (
            len(f) == 4 and f.subjects == ["a", "a", "b", "b"] and f.scale == 2.5 and f.report["steps"] == 3
        )
        assert torch.equal(f.samples([1, 2]), x[:, 1:3])
        assert torch.allclose(f.mean(slice(None)), x.mean(0), atol=1e-6)
        assert torch.allclose(f.std(slice(None)), x.std(0), rtol=1e-5)
    loaded = Reconstruction.load(tmp_path / "r.h5")
    assert torch.equal(loaded.samples, x) and loaded.scale == 2.5


def test_a_result_saves_and_loads(tmp_path):
    result = Reconstruction.from_samples(samples(), {"sampler": "mmps"})
    result.save(tmp_path / "r.h5")
    loaded = Reconstruction.load(tmp_path / "r.h5")
    assert torch.allclose(loaded.std, result.std, rtol=1e-5) and loaded.report == result.report
    with pytest.raises(InputError, match="exists"):
        result.save(tmp_path / "r.h5")
    result.save(tmp_path / "r.h5", overwrite=True)


def test_a_broken_run_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), ResultWriter(tmp_path / "r.h5", (2, 1, 1, 3, 3)) as writer:
        writer.add(slice(0, 1), torch.zeros(1, 1, 1, 3, 3))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_results_are_named(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(InputError, match="nothing"):
        ResultFile(tmp_path / "missing.h5")
    with pytest.raises(InputError, match="truncated"):
        ResultFile(tmp_path / "text.h5")
    with pytest.raises(InputError, match="expected a result file"):
        ResultFile(tmp_path / "other.h5")
    with pytest.raises(InputError, match="folder"):
        ResultWriter(tmp_path / "no" / "r.h5", (1, 1, 1, 2, 2))


@pytest.mark.parametrize("scale", [2.5, np.array([2.0, 3.0, 4.0])])
def test_scale_survives_the_file(tmp_path, scale):
    """Volumes imported together have a scale each; a result carries them as the measurements did."""
    samples = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    result = Reconstruction.from_samples(samples, {})
    result.scale = scale
    result.save(tmp_path / "R.h5")
    assert np.array_equal(Reconstruction.load(tmp_path / "R.h5").scale, scale)


def test_a_result_says_in_one_line_what_it_is():
    samples = torch.stack([torch.zeros(8, 1, 4, 4), torch.full((8, 1, 4, 4), 0.2)])
    result = Reconstruction.from_samples(samples, {"sampler": "mmps"})
    assert repr(result) == "Reconstruction(8 images 1 x 4 x 4, 2 samples, mmps, mean std 0.141)"
