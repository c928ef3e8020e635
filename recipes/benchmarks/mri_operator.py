"""Multi-coil MRI, forward and adjoint: ours, deepinv's and sigpy's against the bare FFTs, in one run.

    python -m recipes.benchmarks.mri_operator [--sizes 128 256 320] [--batches 1 4 16] [--coils 8]
    [--threads 1] [--out FOLDER]

One call is y = A x and then A^H y for the whole batch: float32 images, one mask of lines an image, coil maps
shared. sigpy's `Sense` takes one image at a time, so it is called once an image, on numpy arrays of the same
numbers. The bare FFTs are one forward and one inverse orthonormal transform of all coil images, without
shifts, maps or mask: what no operator can save. The contenders take turns, in an order that turns as well,
and what counts is CPU seconds of the process (with several threads, elapsed seconds), so that a busy machine
slows all of them alike. A ratio is that of the medians; its spread is the range from the first to the third
quartile of the ratios of neighbours. Before anything is timed, all operators must agree.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ambient_sci.operators import MRI, birdcage_maps, make_design
from ambient_sci.whole_files import write_json, write_text

LIMITS = {"deepinv": 0.4, "sigpy": 0.25}
BASELINES = ("deepinv", "sigpy", "FFTs")
Call = Callable[[], object]


def contenders(size: int, batch: int, coils: int) -> dict[str, Call]:
    """Name to a call of forward and adjoint on the same image, maps and masks."""
    from deepinv.physics import MultiCoilMRI
    from sigpy.mri.linop import Sense

    generator = torch.Generator().manual_seed(size + batch)
    lines = make_design("lines-uniform", image_shape=(2, size, size), acceleration=4, acs=size // 16)
    mask = lines.sample(batch, generator).expand(batch, 1, size, size).contiguous()
    maps = birdcage_maps(coils, size, size)
    x = torch.randn(batch, 2, size, size, generator=generator)

    ours = MRI(mask, maps)
    theirs = MultiCoilMRI(mask=mask.expand(-1, 2, -1, -1).contiguous(), coil_maps=maps[None])
    plane = torch.complex(x[:, 0], x[:, 1])
    images, masks = plane.numpy(), mask[:, 0].numpy()
    linops = [Sense(maps.numpy(), weights=m) for m in masks]
    adjoints = [linop.H for linop in linops]
    coil_images = (maps * plane[:, None]).contiguous()

    def by_sigpy() -> list[np.ndarray]:
        return [adjoint(linop(image)) for linop, adjoint, image in zip(linops, adjoints, images, strict=True)]

    calls: dict[str, Call] = {
        "ours": lambda: ours.A_adjoint(ours.A(x)),
        "ours, A^H A in one": lambda: ours.A_adjoint_A(x),
        "deepinv": lambda: theirs.A_adjoint(theirs.A(x)),
        "sigpy": by_sigpy,
        "FFTs": lambda: torch.fft.ifft2(torch.fft.fft2(coil_images, norm="ortho"), norm="ortho"),
    }
    expected = theirs.A_adjoint(theirs.A(x))
    found = {name: torch.as_tensor(calls[name]()) for name in ("ours", "ours, A^H A in one")}
    stacked = torch.as_tensor(np.stack(by_sigpy()))
    found["sigpy"] = torch.stack((stacked.real, stacked.imag), 1)
    for name, value in found.items():
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return calls


def measure(calls: dict[str, Call], seconds: float, least: int) -> dict[str, list[float]]:
    """Seconds of each call, round after round, until ``seconds`` are spent, but at least ``least`` rounds."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = time.perf_counter()
    rounds = -2  # the first two warm up
    while rounds < least or time.perf_counter() - begun < seconds:
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            calls[name]()
            if rounds >= 0:
                spent[name].append(clock() - start)
        rounds += 1
    return spent


def summarise(spent: dict[str, list[float]]) -> dict:
    """Minimum and median seconds of each contender, and the ratios of ours to the others with their
    quartiles."""
    seconds = {n: {"minimum": min(v), "median": statistics.median(v)} for n, v in spent.items()}
    ratios = {}
    for name in BASELINES:
        neighbours = [a / b for a, b in zip(spent["ours"], spent[name], strict=True)]
        low, _, high = statistics.quantiles(neighbours, n=4)
        ratios[name] = {
            "of medians": seconds["ours"]["median"] / seconds[name]["median"],
            "of minima": seconds["ours"]["minimum"] / seconds[name]["minimum"],
            "quartiles": [low, high],
        }
    return {"rounds": len(spent["ours"]), "seconds": seconds, "ours_relative_to": ratios}


def row(case: dict) -> str:
    """One line of the table."""
    cells = [f"{case['size']}", f"{case['batch']}"]
    cells += [f"{1e3 * case['seconds'][name]['median']:.1f}" for name in case["seconds"]]
    for name in BASELINES:
        ratio = case["ours_relative_to"][name]
        cells.append(f"{ratio['of medians']:.2f} ({ratio['quartiles'][0]:.2f}–{ratio['quartiles'][1]:.2f})")
    return "| " + " | ".join(cells) + " |"


def table(report: dict) -> str:
    """The report as markdown."""
    names = list(report["cases"][0]["seconds"])
    head = ["px", "batch", *(f"{n}, ms" for n in names), *(f"ours / {n}" for n in BASELINES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *map(row, report["cases"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time every size and batch, print the table, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 320], help="image sides, pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="images a call")
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; 0 for all cores")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each size and batch")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each size and batch, at least")
    parser.add_argument("--out", type=Path, help="folder for mri_operator.json and mri_operator.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "versions": {n: version(n) for n in ("torch", "deepinv", "sigpy", "numpy")},
        "coils": arguments.coils,
        "limits": LIMITS,
        "cases": [],
    }
    for size in arguments.sizes:
        for batch in arguments.batches:
            with torch.no_grad():
                calls = contenders(size, batch, arguments.coils)
                spent = measure(calls, arguments.seconds, arguments.rounds)
            report["cases"].append({"size": size, "batch": batch, **summarise(spent)})
            print(row(report["cases"][-1]), flush=True)
    print("\n" + table(report))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "mri_operator.json", report)
        write_text(arguments.out / "mri_operator.md", table(report))


if __name__ == "__main__":
    main()
