"""What samplers, the E-step and calibration make a pretended accelerator wait for, as JSON: run by
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
from ambient_sci.training import EMConfig, TrainConfig
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
    laps = Laps(MeasurementArrays(operator, y, 0.05), TrainConfig(em=em), run, accelerator, SimpleNamespace())
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


if __name__ == "__main__":
    with virtual_device():
        print(
            json.dumps(
                {name: counted(job) for name, job in {**sampling(), **other(Path(sys.argv[1]))}.items()}
            )
        )
