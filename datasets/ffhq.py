"""Flickr-Faces-HQ as published, as image files.

    python datasets/ffhq.py images1024x1024 --out data/ffhq64
    python datasets/ffhq.py ffhq-64x64.zip --out data/ffhq64 --held-out 0      # all for training, as EDM does

SOURCE is the folder ``images1024x1024`` or ``thumbnails128x128`` of the FFHQ project (Karras et al. 2019,
https://github.com/NVlabs/ffhq-dataset), a zip of it, or a zip of EDM's dataset tool. Pictures are resized to
``--size`` pixels by Pillow's Lanczos filter, as that tool does; thumbnails have been resized once before and
give slightly other images.

Writes ``train.h5`` and ``held_out.h5``: 8 bits, values in [-1, 1]. ``--held-out`` pictures (default: 10,000),
drawn by ``--seed``, are kept apart: nothing is published about such a division, FFHQ's own (60,000 and 10,000
by number) is taken with ``--as-published``. ``--images N`` takes N training images, drawn by the seed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from ambient_sci.data.picture_sets import hold_out, missing, open_set, run_script, subset, write_parts
from ambient_sci.errors import InputError

STEPS = (
    "1. `git clone https://github.com/NVlabs/ffhq-dataset && cd ffhq-dataset && python download_ffhq.py "
    "--images` (90 GB; --thumbs: 2 GB, 128 px); 2. `python datasets/ffhq.py ffhq-dataset/images1024x1024 "
    "--out data/ffhq64`"
)
VALIDATION = 60_000  # pictures from this number on are FFHQ's validation part


def published(names: list[str]) -> np.ndarray:
    """Which pictures are of FFHQ's validation part, by their number (bool).

    Raises:
        InputError: names without a number.
    """
    numbers = [re.search(r"(\d+)\.\w+$", name) for name in names]
    if not all(numbers):
        raise InputError("--as-published: expected pictures named by number, like 00000.png, got others")
    return np.asarray([int(n.group(1)) >= VALIDATION for n in numbers if n])


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, help="training images (default: all)")
    parser.add_argument("--held-out", type=int, default=10_000, help="pictures kept apart (default: 10000)")
    parser.add_argument("--as-published", action="store_true", help="keep FFHQ's validation part apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    if not arguments.source.exists():
        raise missing(arguments.source, "FFHQ", STEPS)
    source = open_set(arguments.source, expected=("LICENSE.txt", "ffhq-dataset-v2.json"))
    source.labels = None  # folders of a thousand pictures each, no classes
    if arguments.as_published:
        held, said = published(source.names), "validation part as published"
    else:
        held = hold_out(len(source), arguments.held_out, arguments.seed)
        said = f"{int(held.sum())} held out with seed {arguments.seed}"
    train = subset(np.flatnonzero(~held), arguments.images, arguments.seed)
    parts = {arguments.out / "train.h5": train, arguments.out / "held_out.h5": np.flatnonzero(held)}
    parts = {path: rows for path, rows in parts.items() if len(rows) or path.name == "train.h5"}
    if arguments.images is not None:
        said += f", {arguments.images} training images drawn with seed {arguments.seed}"
    history = f"FFHQ: {arguments.source.name}, {said}"
    write_parts(
        source, parts, size=arguments.size, history=history, channels=3, overwrite=arguments.overwrite
    )
    for file, rows in parts.items():
        print(f"{file}: {len(rows)} images of {arguments.size} px")


if __name__ == "__main__":
    run_script(main)
