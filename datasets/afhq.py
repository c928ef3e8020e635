"""Animal Faces-HQ (v1 and v2) as published, as image files with labels.

    python datasets/afhq.py afhq_v2.zip --out data/afhq64
    python datasets/afhq.py afhqv2-64x64.zip --out data/afhq64 --held-out 500

SOURCE is the zip or folder of the StarGAN v2 project (Choi et al. 2020: ``train/`` and ``test/`` or ``val/``,
each with ``cat``, ``dog`` and ``wild``), or a zip of EDM's dataset tool, which mixes the parts. Pictures of
512 pixels are resized to ``--size`` by Pillow's Lanczos filter, as that tool does.

Writes ``train.h5`` and ``test.h5`` as published; with ``--together`` all for training, as EDM does. From a
zip without parts: ``--held-out`` pictures (default: 500) drawn by ``--seed`` are ``held_out.h5``. Labels are
0 cat, 1 dog, 2 wild. 8 bits, values in [-1, 1].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ambient_sci.data.picture_sets import hold_out, missing, open_set, run_script, subset, write_parts
from ambient_sci.errors import InputError

STEPS = (
    "1. `git clone https://github.com/clovaai/stargan-v2 && cd stargan-v2 && bash download.sh "
    "afhq-v2-dataset` (6.5 GB); 2. `python datasets/afhq.py stargan-v2/data/afhq --out data/afhq64`"
)
CLASSES = ("cat", "dog", "wild")
TEST = ("test", "val")


def labels_of(names: list[str]) -> np.ndarray:
    """Class of each picture by its folder.

    Raises:
        InputError: other folders than cat, dog and wild.
    """
    folders = [Path(name).parent.name for name in names]
    other = sorted(set(folders) - set(CLASSES))
    if other:
        raise InputError(
            f"AFHQ: expected pictures in folders {', '.join(CLASSES)}, got {', '.join(other[:3])}"
        )
    return np.asarray([CLASSES.index(folder) for folder in folders])


def main() -> None:
    """Write the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--together", action="store_true", help="both parts for training, as EDM does")
    parser.add_argument("--images", type=int, help="training images (default: all)")
    parser.add_argument("--held-out", type=int, help="of a zip without parts (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    if not arguments.source.exists():
        raise missing(arguments.source, "AFHQ", STEPS)
    source = open_set(arguments.source)
    test = np.asarray([not set(Path(name).parts[:-1]).isdisjoint(TEST) for name in source.names])
    if source.labels is None:
        source.labels = labels_of(source.names)
        if not test.any() and not arguments.together:
            raise InputError(
                f"{arguments.source}: expected folders train and test (or val), found no second one"
            )
        if arguments.held_out is not None:
            raise InputError("--held-out: expected none, AFHQ has a test part of its own")
        held, said, second = (
            (np.zeros(len(source), bool), "both parts together", "")
            if arguments.together
            else (test, "parts as published", "test")
        )
    else:
        count = 500 if arguments.held_out is None else arguments.held_out
        held, second = hold_out(len(source), count, arguments.seed), "held_out"
        said = f"{count} held out with seed {arguments.seed}"
    train = subset(np.flatnonzero(~held), arguments.images, arguments.seed)
    if arguments.images is not None:
        said += f", {arguments.images} training images drawn with seed {arguments.seed}"
    parts = {arguments.out / "train.h5": train}
    if held.any():
        parts[arguments.out / f"{second}.h5"] = np.flatnonzero(held)
    history = f"AFHQ: {arguments.source.name}, {said}"
    write_parts(
        source, parts, size=arguments.size, history=history, channels=3, overwrite=arguments.overwrite
    )
    for file, rows in parts.items():
        print(f"{file}: {len(rows)} images of {arguments.size} px")


if __name__ == "__main__":
    run_script(main)
