"""What training, samplers, the E-step and calibration make a pretended accelerator wait for, as JSON: run by
`test_waits` in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from virtual_device import COPIES, DEVICE, SYNCS, virtual_device

from ambient_sci.data import MeasurementArrays
from ambient_sci.evaluation.calibration import held_out_rows, with_truth
from ambient_sci.evaluation.chi_squared import chi_squared
from ambient_sci.operators import MRI, Identity, Masking, RowMaskedOperator, normalise_maps
from ambient_sci.priors import NetworkConfig, NetworkPrior
from ambient_sci.sampling import POSTERIOR_SAMPLERS, generate, reconstruct
from ambient_sci.training import EMConfig, JointConfig, StagedConfig, TrainConfig, fit, trainer
from ambient_sci.training.em import Laps
from ambient_sci.training.run_folder import RunFolder

torch.set_num_threads(1)
SHAPE = (2, 8, 8)
LEVELS = (4, 8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operators() -> dict[str, RowMaskedOperator]:
    mask = (torch.rand(3, 1, 8, 8, generator=rng(1)) < 0.6).float()
    maps = normalise_maps(torch.randn(1, 4, 8, 8, dtype=torch.complex64, generator=rng(2)))
    return {"identity": Identity(SHAPE), "masking": Masking(mask, SHAPE), "coils": MRI(mask, maps)}


def prior() -> NetworkPrior:
    network = NetworkConfig(kind="mlp", channels=(16,))
    return NetworkPrior(SHAPE, 0.5, network=network, sigma_min=0.05).eval()


def counted(job: Callable[[], Any]) -> dict[str, Any]:
    """What one job waited for and carried over, by line; or how it failed. Its own result: the report of a
    run.
    """
    SYNCS.clear()
    COPIES.clear()
    try:
        report = job()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    waits = {f"{name} {line}": n for (name, line), n in SYNCS.items()}
    return {"waits": waits, "copies": dict(COPIES), "report": report if isinstance(report, dict) else {}}


def sampling() -> dict[str, Callable[[], Any]]:
    """Every sampler, with few and many levels; and images of a prior."""
    model, jobs = prior().to(DEVICE), {}
    for kind, operator in operators().items():
        physics = operator.to(DEVICE)
        y = physics.A(torch.randn(3, *SHAPE, generator=rng(3)).to(DEVICE))
        for form, sigma in (("number", 0.05), ("entry", torch.full(y.shape, 0.05, device=DEVICE))):
            for name, sampler in POSTERIOR_SAMPLERS.items():
                if sampler.conditioning == "unconditional":
                    for steps in LEVELS:
                        options = {"sampler": name, "steps": steps, "samples": 2, "generator": rng()}
                        options |= {"particles": 8} if name == "smc" else {}
                        jobs[f"{name} {kind} {form} {steps}"] = (
                            lambda physics=physics, y=y, s=sigma, o=options: (
                                reconstruct(model, physics, y, s, **o).report
                            )
                        )
    for name in ("multistep", "heun", "ancestral"):
        for steps in LEVELS:
            jobs[f"generate {name} {steps}"] = lambda name=name, steps=steps: generate(
                model, 3, steps=steps, sampler=name, generator=rng()
            )
    return jobs


def other(folder: Path) -> dict[str, Callable[[], Any]]:
    """An E-step and a score of EM, and the calibration of samples that lie on the device."""
    operator = operators()["masking"]
    y = operator.A(torch.randn(3, *SHAPE, generator=rng(3)))
    em = EMConfig(sampler_steps=4, sampler_batch=3, held_out=3, held_out_draws=2)
    accelerator: Any = SimpleNamespace(
        device=DEVICE, is_main_process=True, num_processes=1, process_index=0, wait_for_everyone=lambda: None
    )
    run = RunFolder(folder)
    laps = Laps(
        MeasurementArrays(operator, y, 0.05),
        TrainConfig(em=em),
        run,
        accelerator,
        SimpleNamespace(enabled=False),
    )
    model = prior().to(DEVICE)
    samples, physics = (
        torch.randn(6, 3, *SHAPE, generator=rng(4)).to(DEVICE),
        operators()["masking"].to(DEVICE),
    )
    return {
        "E-step": lambda: laps.e_step(1, model)[1],
        "held-out score": lambda: laps.held_out_score(model),
        "with_truth": lambda: with_truth(samples, samples[0] * 0.9),
        "held_out_rows": lambda: held_out_rows(samples, physics, y.to(DEVICE), 0.5),
        "chi_squared": lambda: chi_squared(samples, physics, y.to(DEVICE), 0.5),
    }


def training() -> dict[str, Callable[[], Any]]:
    """Every stage, with few and many steps and no line of the log in between."""
    network = NetworkConfig(channels=(8, 8), norm_groups=4, head_channels=8)
    settings: dict[str, Any] = {"batch_size": 4, "log_interval": 10**6, "network": network}
    x = 3 * torch.nn.functional.avg_pool2d(torch.randn(24, 2, 12, 12, generator=rng(5)), 5, 1)
    noisy = x + 0.2 * torch.randn(x.shape, generator=rng(6))
    mask = (torch.rand(24, 1, 8, 8, generator=rng(7)) < 0.6).float()
    mri = MRI(mask, operators()["coils"].coil_maps)  # type: ignore[attr-defined]
    by_entry = torch.full(x.shape, 0.2)
    data: dict[str, Any] = {
        "identity": (Identity(SHAPE), noisy, 0.2),
        "by entry": (Identity(SHAPE), noisy, by_entry),
        "masking": (Masking(mask, SHAPE), x * mask, 0.0),
        "k-space": (mri, mri.A(x), 0.0),
    }
    symmetries = ("flip-horizontal", "flip-vertical", "gain")
    options: dict[str, dict[str, Any]] = {name: {} for name in data}
    options |= {"identity, symmetries": {"augmentations": (*symmetries, "transpose", "phase")}}
    options |= {"k-space, symmetries": {"augmentations": ("phase", "gain")}}
    jobs: dict[str, Callable[[], Any]] = {}
    for steps in (4, 24):
        for name, own in options.items():
            config = TrainConfig(max_steps=steps, **settings, **own)
            measured = data[name.split(",")[0]]
            jobs[f"train {name} {steps}"] = lambda d=measured, c=config: fit(d, c, progress=False)
        for name, stage in {
            "staged": StagedConfig(max_steps=steps),
            "staged, replay": StagedConfig(max_steps=steps, replay=True),
            "staged, margin": StagedConfig(max_steps=steps, margin=1.2, shrinkage=0.3, warm_start=1),
        }.items():
            config = TrainConfig(max_steps=3, consistency=stage, **settings)
            jobs[f"train {name} {steps}"] = lambda c=config: fit(data["identity"], c, progress=False)
        config = TrainConfig(max_steps=3, consistency=StagedConfig(max_steps=steps), **settings)
        jobs[f"train staged k-space {steps}"] = lambda c=config: fit(
            (mri, mri.A(x) + 0.1 * mri.mask, 0.1), c, progress=False
        )
        config = TrainConfig(max_steps=steps, consistency=JointConfig(), **settings)
        jobs[f"train joint {steps}"] = lambda c=config: fit(data["identity"], c, progress=False)
    return jobs


if __name__ == "__main__":
    place = SimpleNamespace(
        device=DEVICE, is_main_process=True, num_processes=1, process_index=0, wait_for_everyone=lambda: None
    )
    trainer.make_accelerator = lambda _: place  # type: ignore[assignment, return-value]
    with virtual_device():
        everything = {**training(), **sampling(), **other(Path(sys.argv[1]))}
        print(json.dumps({name: counted(job) for name, job in everything.items()}))
