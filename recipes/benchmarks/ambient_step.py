"""What operator awareness costs: an optimiser step of the ambient loss against one of plain denoising.

    python -m recipes.benchmarks.ambient_step [--size 64] [--batch 8] [--repeats 15] [--out FILE.json]

Same network, same run: both kinds of step are timed alternately and the median of the ratios of neighbours is
reported, so that a machine that slows down or is shared slows both. The plain step sees clean images at the
same levels; for mask-conditional networks, with a mask of ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ambient_sci.losses import ambient
from ambient_sci.noise import expand
from ambient_sci.operators import MRI, Identity, Masking, RowMaskedOperator, birdcage_maps, make_design
from ambient_sci.priors import KeptRows, NetworkConfig, NetworkPrior
from ambient_sci.whole_files import write_json

LIMITS = {"identity": 1.05, "masking": 1.05, "mri, 8 coils": 1.2}


def cases(
    size: int, batch: int, generator: torch.Generator
) -> dict[str, tuple[RowMaskedOperator, int, float]]:
    """Name to (operator, image channels, fraction of rows kept)."""
    dots = make_design("bernoulli", image_shape=(3, size, size), keep=0.5)
    lines = make_design("lines-variable", image_shape=(2, size, size), acceleration=4, acs=max(size // 16, 1))
    maps = birdcage_maps(8, size, size)
    return {
        "identity": (Identity((2, size, size)), 2, 1.0),
        "masking": (Masking(dots.sample(batch, generator), (3, size, size), dots), 3, 0.8),
        "mri, 8 coils": (MRI(lines.sample(batch, generator), maps, lines), 2, 0.75),
    }


def plain_denoising(prior: NetworkPrior, x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """lambda ||D(x0 + sigma z) - x0||^2, with a mask of ones where the network takes one."""
    noisy = x0 + expand(sigma, x0) * torch.randn(x0.shape, generator=generator)
    everything = Masking(torch.ones(1, 1, *x0.shape[2:]), img_size=tuple(x0.shape[1:]))
    given = KeptRows(everything) if prior.takes is KeptRows else None
    return prior.loss_weight(sigma) * (prior(noisy, sigma, given) - x0).square().flatten(1).mean(1)


def step_time(prior: NetworkPrior, optimiser: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    optimiser.zero_grad(set_to_none=True)
    loss().mean().backward()
    torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
    optimiser.step()
    return time.perf_counter() - start


def measure(
    operator: RowMaskedOperator, channels: int, keep: float, size: int, batch: int, repeats: int
) -> dict:
    """Median ratio of ambient to plain step times, and both medians in seconds."""
    generator = torch.Generator().manual_seed(0)
    kind = "unconditional" if keep == 1 else "mask-conditional"
    prior = NetworkPrior((channels, size, size), 0.3, kind, network=NetworkConfig(channels=(32, 64, 64)))
    optimiser = torch.optim.AdamW(prior.parameters(), 1e-4)
    x0 = 0.3 * torch.randn(batch, channels, size, size, generator=generator)
    y = operator.A(x0) + 0.05 * operator.mask * torch.randn(operator.A(x0).shape, generator=generator)
    sigma = torch.linspace(0.1, 1.0, batch)
    steps = (
        lambda: plain_denoising(prior, x0, sigma, generator),
        lambda: ambient(prior, operator, y, 0.05, sigma, keep=keep, generator=generator),
    )
    times: list[tuple[float, ...]] = []
    for _ in range(repeats + 2):
        times.append(tuple(step_time(prior, optimiser, s) for s in steps))
    times = times[2:]  # the first steps pay for allocations
    return {
        "ratio": statistics.median(b / a for a, b in times),
        "plain_seconds": statistics.median(a for a, _ in times),
        "ambient_seconds": statistics.median(b for _, b in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="image height and width in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs of steps")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    report = {"size": args.size, "batch": args.batch, "threads": torch.get_num_threads(), "cases": {}}
    for name, (operator, channels, keep) in cases(
        args.size, args.batch, torch.Generator().manual_seed(1)
    ).items():
        result = measure(operator, channels, keep, args.size, args.batch, args.repeats)
        report["cases"][name] = {**result, "limit": LIMITS[name]}
        print(
            f"{name:14s} ambient / plain = {result['ratio']:.3f} (limit {LIMITS[name]}), "
            f"{result['ambient_seconds']:.3f} s against {result['plain_seconds']:.3f} s"
        )
    if args.out:
        write_json(args.out, report)


if __name__ == "__main__":
    main()
