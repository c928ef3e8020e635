"""Is the clean distribution recovered from noisy data alone? One command, one table.

    python recipes/exactness/run.py --part ring [--profile two-core|gpu] [--seeds 0 1 2] [--levels .1] [--runs clean staged …] [--out runs/exactness]

Every cell (part, run, noise, size, seed) is written to its own JSON file when it is done; a cell that is there is not run again, and one
that was interrupted continues from its checkpoint. The table at the end is over all cells there are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from ambient_sci.whole_files import write_json

HERE = Path(__file__).parent
MODULES = {
    "ring": "toy_part",
    "mixture": "toy_part",
    "digits": "digits_part",
    "masked": "masked_part",
    "masked-mixture": "masked_part",
}


def main() -> None:
    """Run the cells asked for that are missing, then print the table."""
    arguments = parse()
    settings = yaml.safe_load((HERE / "config.yaml").read_text())[arguments.profile][arguments.part]
    out = arguments.out / arguments.profile / arguments.part
    out.mkdir(parents=True, exist_ok=True)
    part = load_part(arguments.part)
    sizes = settings["points"] + (settings["curve"] if arguments.curve else [])
    runs = arguments.runs or part.RUNS
    seeds = settings["seeds"] if arguments.seeds is None else arguments.seeds
    for level, size, seed, run in cells(part, settings, sizes, seeds, runs):
        if arguments.levels is not None and level not in arguments.levels:
            continue
        name = f"{run}-{level:g}-n{size}-s{seed}"
        if arguments.table_only or (out / f"{name}.json").exists():
            continue
        print(f"{arguments.part}: {name}", flush=True)
        begun = time.monotonic()
        cell = part.run(run, level, size, seed, settings, out / name, arguments.device)
        cell |= {"part": arguments.part, "run": run, "level": level, "size": size, "seed": seed}
        cell |= {
            "profile": arguments.profile,
            "machine": machine(),
            "seconds": round(time.monotonic() - begun, 1),
        }
        write_json(out / f"{name}.json", cell)
    print(table(out, settings))


def cells(
    part: Any, settings: dict[str, Any], sizes: list[int], seeds: list[int], runs: list[str]
) -> Iterator[tuple[float, int, int, str]]:
    """(level, size, seed, run) of every cell. Clean data has no level: its run is trained once, at level 0."""
    levels = part.levels(settings)
    for level, size, seed, run in itertools.product([0.0, *levels], sizes, seeds, runs):
        curve = size not in settings["points"]
        if (run == "clean") == (level == 0) and (run == "staged" or not curve):
            yield level, size, seed, run


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", required=True, choices=list(MODULES))
    parser.add_argument("--profile", default="two-core", choices=["two-core", "gpu"])
    parser.add_argument("--runs", nargs="+", help="only these runs (default: all of the part)")
    parser.add_argument(
        "--levels", nargs="+", type=float, help="only these noise levels or fractions missing; 0: clean"
    )
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument(
        "--curve", action="store_true", help="staged consistency for further sizes of the data, too"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("runs/exactness"))
    parser.add_argument(
        "--table-only", action="store_true", help="print the table of what there is; run nothing"
    )
    return parser.parse_args()


def load_part(name: str) -> Any:
    """The module of a part."""
    import importlib
    import sys

    sys.path.insert(0, str(HERE))
    return importlib.import_module(MODULES[name]).Part(name)


def training_evaluations(row: str, size: int, settings: dict[str, Any]) -> float:
    """Network evaluations, in images, that training for a row of the table takes at most.

    A forward pass is one, with or without gradient, and so is a Jacobian product in an E-step of EM.
    """
    batch, steps = settings["batch_size"], settings["steps"]
    consistency, em = settings["consistency"], settings.get("em", {})
    if row == "joint":
        consistency = {**consistency, **settings["joint"]}
    walked = 0 if consistency.get("replay") else sum(consistency["walk"]) / 2
    pair = 1 + consistency["draws"] + walked
    if row == "staged":
        # Data below a margin also give an Ambient loss; shrinkage takes an estimate and denoises it.
        denoising, warm = 2, consistency.get("warm_start", 0)
        each = pair + (consistency.get("margin", 1) > 1) + denoising * (consistency.get("shrinkage", 0) > 0)
        return batch * (steps + warm * denoising + (consistency["max_steps"] - warm) * each)
    if row == "joint":
        # The pair shares D_t where its walk has no steps, one time in (walk lengths).
        lengths = consistency["walk"][1] - consistency["walk"][0] + 1
        return batch * (steps + (steps - settings["joint"]["kick_in"]) * (pair - 1 / lengths))
    if row == "em":
        levels = em.get("sampler_steps", 18)
        calls = levels if em.get("integrator") == "multistep" else 2 * levels - 1
        # From the Ambient network the first lap takes estimates, one evaluation each.
        ambient = em.get("start") == "ambient"
        each = calls * (1 + em.get("max_iterations", 5))
        draws = size * (em["laps"] * each if not ambient else 1 + (em["laps"] - 1) * each)
        begun = em.get("start_steps", em["first_steps"]) if ambient else 0
        return draws + batch * (begun + em["first_steps"] + (em["laps"] - 1) * em["steps"])
    return batch * steps


def machine() -> str:
    """Where a number was measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads"


def table(folder: Path, settings: dict[str, Any]) -> str:
    """Every score of every row: mean (standard deviation over seeds), number of seeds."""
    found: dict[tuple, dict[str, list[float]]] = {}
    for path in sorted(folder.glob("*.json")):
        cell = read(path)
        for row, scores in cell["rows"].items():
            scores = {**scores, "training_evaluations": training_evaluations(row, cell["size"], settings)}
            values = found.setdefault((cell["level"], cell["size"], row), {})
            for key, value in scores.items():
                if isinstance(value, (int, float)):
                    values.setdefault(key, []).append(value)
    floors = [cell["floor"] for cell in map(read, sorted(folder.glob("*.json"))) if "floor" in cell]
    columns = sorted({key for scores in found.values() for key in scores})
    lines = [
        "| level | data | method | seeds | " + " | ".join(columns) + " |",
        "|" + "---|" * (4 + len(columns)),
    ]
    for (level, size, row), scores in sorted(found.items()):
        texts = [summary(scores[key]) if key in scores else "" for key in columns]
        seeds = max(len(v) for v in scores.values())
        lines.append(f"| {level:g} | {size} | {row} | {seeds} | " + " | ".join(texts) + " |")
    if floors:
        lines += ["", f"floor, what as many draws of the truth score: {floors[0]}"]
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """A cell."""
    return json.loads(path.read_text())


def summary(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several values."""
    mean = statistics.fmean(values)
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} ± {statistics.stdev(values):.2g}"


if __name__ == "__main__":
    main()
