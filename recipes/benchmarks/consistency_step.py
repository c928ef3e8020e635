"""What a step of staged consistency costs, walk included, against a denoising step of the same network; all
in one run.

    python -m recipes.benchmarks.consistency_step [--size 64] [--batch 4] [--repeats 20] [--device cpu|cuda]
    [--out costs.json]

Steps are whole training steps (loss, backward pass, clipping, optimiser, weight average). The kinds of step
take turns, so that a busy machine slows all of them alike; a ratio is that of the medians. The walk draws k
from 0-3, as in the default configuration, and with replay it costs nothing; margin and shrinkage, as in the
digits of recipes/exactness, take three more evaluations. The published figures for the same quantity are 3.15
(m = 2) and 3.9 (m = 4); the limits here are 3.5 and 4.2.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ambient_sci.operators import Identity
from ambient_sci.priors import NetworkConfig
from ambient_sci.training import (
    AmbientStage,
    ConsistencyConfig,
    ConsistencyStage,
    TrainConfig,
    make_accelerator,
    open_source,
)
from ambient_sci.whole_files import write_json

KINDS: dict[str, dict[str, Any]] = {
    "walk": {},
    "replay": {"replay": True},
    "replay, margin, shrinkage": {"replay": True, "margin": 1.15, "shrinkage": 0.3},
}


def main() -> None:
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--repeats", type=int, default=20, help="steps of each kind; a multiple of 4 covers every k equally"
    )
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--network", choices=["unet", "mlp"], default="unet")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    steps = build(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-2, arguments.repeats):
        for name, step in steps.items():
            spent = timed(step, repeat, arguments.device)
            if repeat >= 0:  # the first two of each warm up
                seconds[name].append(spent)
    report(seconds, arguments)


def build(arguments: argparse.Namespace) -> dict:
    """A function (step number) -> None for each kind of step."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, arguments.size, arguments.size)
    x = 0.5 * torch.randn(32, *shape, generator=generator)
    network = NetworkConfig(kind=arguments.network, channels=tuple(arguments.channels))
    config = TrainConfig(batch_size=arguments.batch, network=network, device=arguments.device)
    accelerator = make_accelerator(arguments.device)
    y = x + 0.2 * torch.randn(x.shape, generator=generator)

    def data(config: TrainConfig, noise: float = 0.2) -> AmbientStage:
        return AmbientStage(open_source((Identity(shape), y, noise), config), config, accelerator)

    steps = {"denoising": trainer(data(config, noise=0.0)), "ambient": trainer(data(config))}
    for draws in (2, 4):
        for name, more in KINDS.items():
            settings = ConsistencyConfig(draws=draws, **more)
            both = TrainConfig(
                batch_size=arguments.batch, network=network, device=arguments.device, consistency=settings
            )
            first = data(both)
            stage = ConsistencyStage(first.batches, first.module, both)
            steps[f"m = {draws}, {name}"] = trainer(stage, walks=not settings.replay)
    return steps


def trainer(stage, walks: bool = False):
    """One training step of ``stage``, as the training loop takes it; walk lengths 0, 1, 2, 3 in turn."""
    module = stage.module.to(stage.batches.device)
    if not isinstance(stage, AmbientStage):
        stage.anchor.to(stage.batches.device)
    average = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)

    def step(number: int) -> None:
        if walks:
            k = number % 4
            stage.settings = ConsistencyConfig(draws=stage.settings.draws, walk=(k, k))
        optimizer.zero_grad(set_to_none=True)
        stage.loss(abs(number)).mean().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1e-3)

    return step


def timed(step, number: int, device: str) -> float:
    """Seconds of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step(number)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def centre(values: list[float]) -> float:
    """Mean over walk lengths of the median over repeats: steps differ in their walk, and a busy machine in a
    few of its steps."""
    return statistics.fmean(statistics.median(values[k::4]) for k in range(min(4, len(values))))


def report(seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    """The table, and a JSON file of it."""
    base = centre(seconds["denoising"])
    result = {name: {"seconds": centre(v), "ratio": centre(v) / base} for name, v in seconds.items()}
    print(
        f"{arguments.network} {tuple(arguments.channels)}, {arguments.size} px, batch {arguments.batch}, "
        f"{arguments.device}"
    )
    for name, row in result.items():
        print(f"{name:32s} {1e3 * row['seconds']:9.1f} ms   {row['ratio']:5.2f} x")
    if arguments.out:
        settings = {k: v for k, v in vars(arguments).items() if k != "out"}
        threads = torch.get_num_threads()
        write_json(arguments.out, {"settings": settings, "threads": threads, "steps": result})


if __name__ == "__main__":
    main()
