"""CelebA and CelebA-HQ as published, as image files.

    python datasets/celeba.py img_align_celeba.zip --out data/celeba64 --partition list_eval_partition.txt
    python datasets/celeba.py celeba_hq_256 --out data/celebahq64 --crop 0 --held-out 2000

SOURCE is ``img_align_celeba.zip`` (Liu et al. 2015, 202,599 pictures of 178 x 218 pixels) or a folder of it;
or a folder or zip of CelebA-HQ (Karras et al. 2018, 30,000 squares). Of the aligned pictures the centre
square of 140 pixels is taken (``--crop``; as Song et al. 2021 do), of others (``--crop 0``) the largest; both
are resized to ``--size`` pixels by Pillow's Lanczos filter, as in EDM's dataset tool.

Writes ``train.h5`` and ``test.h5`` (and ``val.h5``) by the published ``list_eval_partition.txt``, where
nobody is in two parts; without it ``train.h5`` and ``held_out.h5``: ``--held-out`` pictures (default: 10 %)
drawn by ``--seed``. With ``--identities identity_CelebA.txt`` people are the files' subjects, and drawn
whole; without it a person can be on both sides, and the history says so. 8 bits, values in [-1, 1].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ambient_sci.data.picture_sets import (
    PictureSource,
    hold_out,
    missing,
    open_set,
    run_script,
    subset,
    verified,
    write_parts,
)
from ambient_sci.data.readers.guard import listed
from ambient_sci.errors import InputError

MD5 = {"00d2c5bc6d35e252742224ab0c1e8fcb": "img_align_celeba.zip"}
STEPS = (
    "1. from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html take img_align_celeba.zip (1.4 GB) and "
    "list_eval_partition.txt (identity_CelebA.txt is optional); 2. `python datasets/celeba.py "
    "img_align_celeba.zip --partition list_eval_partition.txt --out data/celeba64`"
)
PARTS = ("train", "val", "test")
ALIGNED_CROP = 140
LISTS = ("list_eval_partition.txt", "identity_CelebA.txt", "list_attr_celeba.txt")


def table(path: Path, names: list[str]) -> list[int]:
    """The number that a list of CelebA's gives each picture.

    Raises:
        InputError: no such list, lines that are not "name number", or pictures that it does not name.
    """
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        numbers = {name: int(number) for name, number in rows}
    except (OSError, UnicodeDecodeError, ValueError):
        raise InputError(f"{path}: expected lines like '000001.jpg 0', got another file or none") from None
    absent = [name for name in names if Path(name).name not in numbers]
    if absent:
        raise InputError(f"{path}: expected a line for every picture, found none for {listed(absent)}")
    return [numbers[Path(name).name] for name in names]


def divide(
    source: PictureSource, arguments: argparse.Namespace
) -> tuple[dict[str, np.ndarray], list[str], str]:
    """Rows of each part, whom each picture shows, and what to say of both."""
    people = None
    if arguments.identities is not None:
        people = [f"person{number}" for number in table(arguments.identities, source.names)]
    if arguments.partition is not None:
        numbers = np.asarray(table(arguments.partition, source.names))
        if not set(numbers.tolist()) <= {0, 1, 2}:
            raise InputError(f"{arguments.partition}: expected parts 0, 1 and 2, got others")
        rows = {part: np.flatnonzero(numbers == k) for k, part in enumerate(PARTS)}
        return {k: v for k, v in rows.items() if len(v)}, people or source.names, "parts as published"
    count = round(0.1 * len(source)) if arguments.held_out is None else arguments.held_out
    held = hold_out(len(source), count, arguments.seed, people)
    said = f"{int(held.sum())} held out with seed {arguments.seed}, "
    said += "by person" if people else "by picture (a person can be on both sides)"
    rows = {"train": np.flatnonzero(~held), "held_out": np.flatnonzero(held)}
    return {k: v for k, v in rows.items() if len(v) or k == "train"}, people or source.names, said


def main() -> None:
    """Write the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--crop", type=int, default=ALIGNED_CROP, help="centre square; 0: the largest")
    parser.add_argument("--partition", type=Path, help="list_eval_partition.txt")
    parser.add_argument("--identities", type=Path, help="identity_CelebA.txt")
    parser.add_argument("--images", type=int, help="training images (default: all)")
    parser.add_argument("--held-out", type=int, help="without --partition (default: 10 %%)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unverified", action="store_true", help="take an archive with another checksum")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    path = arguments.source
    if not path.exists():
        raise missing(path, "CelebA", STEPS)
    if arguments.partition is not None and arguments.held_out is not None:
        raise InputError("--held-out: expected none with --partition, which says who is in which part")
    aligned = path.name == MD5["00d2c5bc6d35e252742224ab0c1e8fcb"]
    said = verified(path, MD5, arguments.unverified) if aligned else path.name
    source = open_set(path, expected=LISTS)
    source.labels = None
    rows, subjects, how = divide(source, arguments)
    rows["train"] = subset(rows["train"], arguments.images, arguments.seed)
    if arguments.images is not None:
        how += f", {arguments.images} training images drawn with seed {arguments.seed}"
    parts = {arguments.out / f"{name}.h5": some for name, some in rows.items()}
    write_parts(
        source,
        parts,
        size=arguments.size,
        crop=arguments.crop or None,
        history=f"CelebA: {said}, {how}",
        channels=3,
        subjects=subjects,
        overwrite=arguments.overwrite,
    )
    for file, some in parts.items():
        print(f"{file}: {len(some)} images of {arguments.size} px")


if __name__ == "__main__":
    run_script(main)
