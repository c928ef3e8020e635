r"""How far the data room goes: a million samples, large k-space, files of gigabytes, images a second.

    python recipes/benchmarks/data_scale.py open operator memory speed checksums --folder FOLDER

- open: a file of a million samples, each with a subject, a mask, a scale and a noise level of its own:
  seconds and memory of opening it, in a process of its own.
- operator: milliseconds (CPU time, one thread) for the operator of 16 x 4 x 384 x 320, by constructor, from a
  file, by index.
- memory: peak memory of a training process on a file of 4 GB and on one of 100 MB.
- speed: images a second from uint8 files of 64 and 256 pixels with 0, 1 and 2 workers, batches of 64 and 16.
- checksums: CPU time to open a file and to read half of it at random, with its checksums, with those of
  earlier versions (sums), and with every value looked at instead (a foreign file), over the time with
  neither; in turns.

Files are written to FOLDER (default: a temporary one) and removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ambient_sci.data import MeasurementFile, MeasurementLoader, MeasurementWriter, write_measurements
from ambient_sci.data.checksums import row_checksums
from ambient_sci.operators import MRI, normalise_maps

KINDS_TIMED = ("checksums", "sums", "values")
PARTS = ("open", "operator", "memory", "speed", "checksums")

# What runs in a process of its own, so that its memory is that of the task: VmHWM is the peak, VmRSS what is
# held now.
_STATUS = """
def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1]) / 1e3
"""
_OPEN = """
import json, sys, time
from ambient_sci.data import MeasurementFile
before, start = memory("VmRSS"), time.perf_counter()
file = MeasurementFile(sys.argv[1])
seconds, held = time.perf_counter() - start, memory("VmRSS") - before
start = time.perf_counter()
subjects = len(set(file.subjects))
names = time.perf_counter() - start
print(json.dumps([seconds, held, len(file), subjects, names, memory("VmRSS") - before]))
"""
_TRAIN = """
import json, sys, torch
import ambient_sci as asci
from ambient_sci.priors.config import NetworkConfig
from ambient_sci.training import TrainConfig
torch.set_num_threads(1)
network = NetworkConfig(channels=(8, 16), norm_groups=4, head_channels=8)
start = memory("VmRSS")
plain = {"augmentations": (), "centre": False}
asci.fit(sys.argv[1], TrainConfig(batch_size=8, max_steps=20, network=network, **plain))
print(json.dumps([start, memory("VmHWM")]))
"""


def in_own_process(code: str, path: Path) -> list[float]:
    """What ``code`` prints last, as JSON, when it is run on a file."""
    run = subprocess.run(
        [sys.executable, "-c", _STATUS + code, str(path)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def cpu_milliseconds(call: Callable[[], object], rounds: int = 9) -> float:
    """Median CPU time of a call."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


def images_file(path: Path, size: int, num: int, dtype: str) -> Path:
    """Complete images of three channels with noise of level 0.1 (none for uint8), written in blocks."""
    generator = np.random.default_rng(0)
    level = 0.0 if dtype == "uint8" else 0.1
    with MeasurementWriter(path, operator="identity", image_shape=(3, size, size), dtype=dtype) as writer:
        for start in range(0, num, 256):
            shape = (min(256, num - start), 3, size, size)
            if dtype == "uint8":
                block = generator.integers(0, 256, shape, dtype=np.uint8)
            else:
                block = generator.standard_normal(shape, dtype=np.float32)
            writer.append(block, noise_std=level)
    return path


def opening(folder: Path) -> None:
    """A million samples."""
    path, total, block = folder / "million.h5", 1_000_000, 20_000
    generator = np.random.default_rng(0)
    start = time.perf_counter()
    with MeasurementWriter(path, operator="masking", image_shape=(1, 4, 4), dtype="float16") as writer:
        for first in range(0, total, block):
            mask = (generator.random((block, 1, 4, 4)) < 0.7).astype(np.uint8)
            mask[:, 0, 0, 0] = 1
            writer.append(
                generator.standard_normal((block, 1, 4, 4)) * mask,
                mask=mask,
                noise_std=generator.random(block),
                scale=1 + generator.random(block),
                subjects=[f"subject-{k:07d}" for k in range(first, first + block)],
            )
    print(f"open: written in {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
    seconds, held, num, subjects, names, after = in_own_process(_OPEN, path)
    print(f"open: {num:.0f} samples in {seconds:.2f} s, {held:.0f} MB")
    print(f"open: names of {subjects:.0f} subjects in {names:.2f} s more, {after:.0f} MB in all")
    path.unlink()


def operators(folder: Path) -> None:
    """The operator of 16 x 4 x 384 x 320."""
    generator = torch.Generator().manual_seed(0)
    maps = normalise_maps(torch.randn(16, 4, 384, 320, dtype=torch.complex64, generator=generator))
    mask = (torch.rand(16, 1, 1, 320, generator=generator) < 0.3).float().expand(-1, -1, 384, -1).contiguous()
    mask[..., 160] = 1
    operator = MRI(mask, maps)
    y = operator.A(torch.randn(16, 2, 384, 320, generator=generator))
    path = write_measurements(
        folder / "kspace.h5",
        measurements=y, mask=mask, noise_std=0.1, operator="mri", image_shape=(2, 384, 320),
        coil_maps=maps, overwrite=True,
    )  # fmt: skip
    file, rows = MeasurementFile(path), list(range(16))
    masks, complex_maps = file.mask(), file.coil_maps()
    timed = {
        "MRI(mask, maps), every value checked": lambda: MRI(mask, maps),
        "of checked parts": lambda: MRI._trusted(masks, complex_maps),
        "file.operator(rows), read from the cache of the disk": lambda: file.operator(rows),
        "operator[rows]": lambda: operator[rows],
        "operator[:]": lambda: operator[:],
        "for comparison: A^H y": lambda: operator.A_adjoint(y),
    }
    for name, call in timed.items():
        print(f"operator: {name}: {cpu_milliseconds(call):.1f} ms")
    path.unlink()


def peaks(folder: Path) -> None:
    """Peak memory of training, from 4 GB and from 100 MB."""
    found = {}
    for name, num in (("100 MB", 2_035), ("4 GB", 81_400)):
        path = images_file(folder / "train.h5", 64, num, "float32")
        start, found[name] = in_own_process(_TRAIN, path)
        print(
            f"memory: file of {path.stat().st_size / 1e6:.0f} MB: peak {found[name]:.0f} MB ({start:.0f} at "
            "its start)"
        )
        path.unlink()
    print(f"memory: 4 GB over 100 MB: {found['4 GB'] - found['100 MB']:+.0f} MB")


def speeds(folder: Path) -> None:
    """Images a second, read at random and made float32."""
    for size, num, batch_size in ((64, 30_000, 64), (256, 2_000, 16)):
        path = images_file(folder / "images.h5", size, num, "uint8")
        for workers in (0, 1, 2):
            loader = MeasurementLoader(MeasurementFile(path), batch_size, seed=0, workers=workers)
            for step in range(8):  # the readers start, and the disk's cache fills
                loader.batch(step)
            steps, start = 200 if size == 64 else 100, time.perf_counter()
            for step in range(8, 8 + steps):
                loader.batch(step)
            rate = steps * batch_size / (time.perf_counter() - start)
            loader.close()
            print(f"speed: {size} px, {workers} workers: {rate:.0f} images/s")
        path.unlink()


def checksums(folder: Path) -> None:
    """Opening a file and reading half of it at random, with checksums and without."""
    for size, num, dtype in ((64, 4_000, "float32"), (64, 8_000, "uint8"), (256, 500, "float32")):
        path = images_file(folder / "images.h5", size, num, dtype)
        batches = np.random.default_rng(1).permutation(num)[: num // 2].reshape(-1, 10)

        with MeasurementFile(path) as file:
            sums = np.concatenate(
                [row_checksums(file._read("measurements", rows), "checksums") for rows in batches]
            )
        older = np.zeros(num, np.uint64)
        older[batches.flatten()] = sums

        def read(
            kind: str, path: Path = path, batches: np.ndarray = batches, older: np.ndarray = older
        ) -> float:
            start = time.process_time()
            file = MeasurementFile(path)
            if kind == "sums":
                file._checksums, file._checksum_kind = {"measurements": older}, "checksums"
            elif kind != "checksums":
                file._checksums.clear()
            file._verified = kind != "values"
            for rows in batches:
                file.measurements(rows)
            return time.process_time() - start

        rounds = [{kind: read(kind) for kind in ("neither", *KINDS_TIMED)} for _ in range(9)]
        for kind in KINDS_TIMED:
            ratios = [r[kind] / r["neither"] for r in rounds]
            print(
                f"checksums: {size} px {dtype}: {kind} {np.median(ratios):.2f} ({min(ratios):.2f} to "
                f"{max(ratios):.2f})"
            )
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = dict(zip(PARTS, (opening, operators, peaks, speeds, checksums), strict=True))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(f"{os.cpu_count()} cores, torch {torch.__version__}")
        for part in arguments.parts or PARTS:
            run[part](Path(folder))


if __name__ == "__main__":
    main()
