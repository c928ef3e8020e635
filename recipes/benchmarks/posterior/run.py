"""Posterior samplers on one learned prior and one operator, in one run: ours, deepinv's and azula's.

    python -m recipes.benchmarks.posterior.run runs/quickstart
    # a folder that `make quickstart` made
    python -m recipes.benchmarks.posterior.run runs/quickstart --methods ours-mmps deepinv-moment-matching-20

Every method draws the same number of samples of the same slices (one of each person, or --slices). Seconds
are wall time of the sampler alone, network evaluations are counted per chain (forward passes and
vector-Jacobian products apart). Peers run as their authors provide them: their own solver, their default
guards and clips, the noise levels that the prior has learned where they can be told. One JSON file a method,
so that an interrupted run goes on; --overwrite measures anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ambient_sci as asci
from ambient_sci.data import MeasurementFile, ReferenceFile
from ambient_sci.evaluation import psnr
from ambient_sci.evaluation.calibration import with_truth
from ambient_sci.operators import MRI
from ambient_sci.priors import Prior
from recipes.counted import Counted
from recipes.grid import Cell, Grid, table

HIGHEST = 10.0


class Problem:
    """The slices, and the chains (samples x slices, sample-major) that peers work on."""

    def __init__(self, folder: Path, slices: list[int] | None, samples: int) -> None:
        with MeasurementFile(folder / "test.h5") as scans, ReferenceFile(folder / "test_clean.h5") as clean:
            subjects = list(scans.subjects)
            rows = slices or [subjects.index(s) + subjects.count(s) // 2 for s in dict.fromkeys(subjects)]
            self.operator, self.y, self.truth = (
                scans.operator(rows),
                scans.measurements(rows),
                clean.images(rows),
            )
            self.sigma_y = float(scans.sigma(rows)[0])
        self.samples, self.rows = samples, rows
        self.index = torch.arange(samples * len(rows)) % len(rows)
        self.chains_y = self.y[self.index]

    def chains_operator(self) -> MRI:
        """Our operator with deepinv's noise model, one mask a chain."""
        return MRI(self.operator.mask[self.index], noise_std=self.sigma_y)

    def deepinv_operator(self, chains: slice = slice(None)) -> Any:
        """deepinv's own MRI, for methods that need its singular value decomposition."""
        from deepinv.physics import MRI as DeepinvMRI
        from deepinv.physics import GaussianNoise

        mask = self.operator.mask[self.index[chains]].expand(-1, 2, -1, -1)
        return DeepinvMRI(
            mask=mask, img_size=tuple(self.truth.shape[1:]), noise_model=GaussianNoise(self.sigma_y)
        )


def ours(problem: Problem, prior: Prior, sampler: str = "mmps", **options: Any) -> Tensor:
    result = asci.reconstruct(
        prior,
        problem.operator,
        problem.y,
        problem.sigma_y,
        samples=problem.samples,
        sampler=sampler,
        sigma_max=HIGHEST,
        generator=torch.Generator().manual_seed(0),
        # Samples are compared; what makes a better mean of them is in mean_of_means.
        **({"antithetic": False} if sampler == "mmps" else {}),
        **options,
    )
    return result.samples.flatten(0, 1)


def deepinv_moment_matching(problem: Problem, prior: Prior, steps: int) -> Tensor:
    from deepinv.sampling import HeunSolver, PosteriorDiffusion, VarianceExplodingDiffusion
    from deepinv.sampling.noisy_datafidelity import MomentMatchingDataFidelity

    sde = VarianceExplodingDiffusion(sigma_min=prior.sigma_min, sigma_max=HIGHEST, alpha=0.0)
    solver = HeunSolver(timesteps=torch.linspace(1, 0, steps, dtype=torch.float64))
    model = PosteriorDiffusion(
        data_fidelity=MomentMatchingDataFidelity(),
        denoiser=prior,
        sde=sde,
        solver=solver,
        minus_one_one=False,
    )
    operator = problem.chains_operator()
    x = model(problem.chains_y, operator, x_init=tuple(problem.truth[problem.index].shape), seed=0)
    # Its own last denoising is for stochastic solvers. The state is still at sigma_min: it gets the posterior
    # mean there.
    score = model.score(problem.chains_y, operator, x, torch.zeros((), dtype=torch.float64))
    return (x + prior.sigma_min**2 * score).float()


def deepinv_dps(problem: Problem, prior: Prior, steps: int, guidance: str) -> Tensor:
    from deepinv.sampling import DPS

    rng = torch.Generator().manual_seed(0)
    model = DPS(prior, num_steps=steps, guidance=guidance, minus_one_one=False, rng=rng)
    with torch.enable_grad():
        shape = tuple(problem.truth[problem.index].shape)
        return model(problem.chains_y, problem.chains_operator(), x_init=shape, seed=0).detach().float()


def deepinv_diffpir(problem: Problem, prior: Prior) -> Tensor:
    from deepinv.optim.data_fidelity import L2
    from deepinv.sampling import DiffPIR

    model = DiffPIR(prior, L2(), sigma=problem.sigma_y)
    return model(problem.chains_y, problem.deepinv_operator(), seed=1).detach().float()


def deepinv_ddrm(problem: Problem, prior: Prior) -> Tensor:
    from deepinv.sampling import DDRM

    sigmas = torch.logspace(0, 1, 100).flip(0).log10()  # 1 ... 0
    levels = (prior.sigma_min * (HIGHEST / prior.sigma_min) ** sigmas).numpy()
    model = DDRM(prior, sigmas=levels)
    # It takes one mask at a time.
    parts = [
        model(problem.chains_y[k : k + 1], problem.deepinv_operator(slice(k, k + 1)), seed=k + 1)
        for k in range(len(problem.index))
    ]
    return torch.cat(parts).detach().float()


def azula_mmps(problem: Problem, prior: Prior, steps: int) -> Tensor:
    from azula.denoise import Denoiser, DiracPosterior
    from azula.guidance.mmps import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import VESchedule
    from azula.sample import DDIMSampler

    class Wrapped(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VESchedule(prior.sigma_min, HIGHEST)

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
            return DiracPosterior(mean=prior(x_t, self.schedule(t)[1].expand(len(x_t)).to(x_t)))

    operator = problem.chains_operator()
    y = problem.chains_y
    denoiser = MMPSDenoiser(
        Wrapped(), y, operator.A, IsotropicCovariance(problem.sigma_y**2), solver="gmres", iterations=3
    )
    sampler = DDIMSampler(denoiser, eta=0.0, steps=steps, silent=True)
    start = (
        torch.randn(problem.truth[problem.index].shape, generator=torch.Generator().manual_seed(0)) * HIGHEST
    )
    x = sampler(start)
    return denoiser(x, torch.zeros(())).mean.detach()  # the state is still at sigma_min


METHODS: dict[str, Callable[[Problem, Prior], Tensor]] = {
    "ours-mmps": ours,
    "ours-mmps-bf16": lambda p, m: ours(p, m, precision="auto"),
    "ours-mmps-28": lambda p, m: ours(p, m, steps=28),
    "ours-mmps-mean": lambda p, m: ours(p, m, final="mean"),
    "ours-pigdm": lambda p, m: ours(p, m, "pigdm"),
    "deepinv-moment-matching-10": lambda p, m: deepinv_moment_matching(p, m, 10),
    "deepinv-moment-matching-20": lambda p, m: deepinv_moment_matching(p, m, 20),
    "deepinv-moment-matching-40": lambda p, m: deepinv_moment_matching(p, m, 40),
    "azula-mmps-32": lambda p, m: azula_mmps(p, m, 32),
    "deepinv-ddrm-100": deepinv_ddrm,
    "deepinv-diffpir-100": deepinv_diffpir,
    "deepinv-dps-1000": lambda p, m: deepinv_dps(p, m, 1000, "norm"),
    "deepinv-dps-1000-annealed": lambda p, m: deepinv_dps(p, m, 1000, "annealed"),
}


def measure(name: str, problem: Problem, prior: Prior) -> dict[str, Any]:
    """Run one method and score it."""
    counted = Counted(prior)
    start, busy = time.perf_counter(), time.process_time()
    x = METHODS[name](problem, counted)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    samples = x.detach().unflatten(0, (problem.samples, len(problem.rows)))
    chains = problem.samples * len(problem.rows)
    scores = with_truth(samples, problem.truth)
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "forward_per_chain": counted.forwards / chains,
        "vjp_per_chain": counted.backwards / chains,
        "psnr": float(psnr(samples.mean(0), problem.truth, 1.0).mean()),
        "crps": scores["crps"]["observed"],
        "coverage_80": scores["coverage"]["80"]["observed"],
        "coverage_80_expected": scores["coverage"]["80"]["expected"],
        "std_over_error": scores["std_over_error"]["ratio"],
        "finite": bool(torch.isfinite(samples).all()),
    }


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line a method."""

    def number(key: str, form: str) -> Callable[[list[dict[str, Any]]], str]:
        return lambda own: format(own[0][key], form)

    columns = [
        ("seconds", number("seconds", ".1f")),
        ("CPU seconds", number("cpu_seconds", ".1f")),
        ("forward / chain", number("forward_per_chain", ".0f")),
        ("VJP / chain", number("vjp_per_chain", ".0f")),
        ("PSNR of the mean", number("psnr", ".2f")),
        ("CRPS", number("crps", ".5f")),
        ("80 % intervals cover", lambda own: f"{100 * own[0]['coverage_80']:.1f} %"),
        ("std / error", number("std_over_error", ".2f")),
    ]
    return table(results, {"method": lambda result: result["method"]}, columns)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("folder", type=Path, help="folder of a quickstart: run/, test.h5, test_clean.h5")
    found.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    found.add_argument("--samples", type=int, default=8, help="posterior samples of each slice")
    found.add_argument(
        "--slices", type=int, nargs="+", help="rows of test.h5; default: the middle one of each person"
    )
    found.add_argument(
        "--out", type=Path, default=Path("runs/benchmark-posterior"), help="folder for one JSON a method"
    )
    found.add_argument("--overwrite", action="store_true", help="measure anew what is there")
    return found.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print the table."""
    options = parse(arguments)
    prior = asci.load_prior(options.folder / "run")
    # Nobody needs gradients of weights; without this the peers would compute them.
    prior.requires_grad_(False)
    problem = Problem(options.folder, options.slices, options.samples)
    common = {"samples": options.samples, "slices": problem.rows, "threads": torch.get_num_threads()}
    cells = [Cell(name, {"method": name, **common}) for name in options.methods]
    grid = Grid(options.out, redo=options.overwrite)
    grid.run(cells, lambda cell: measure(cell.name, problem, prior))
    print("\n" + results_table(grid.read(cells)))


if __name__ == "__main__":
    main()
