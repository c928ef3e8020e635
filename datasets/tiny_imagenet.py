"""Tiny ImageNet as published, as image files with labels.

    python datasets/tiny_imagenet.py tiny-imagenet-200.zip --out data/tiny_imagenet

SOURCE is the zip of Stanford's CS231n or a folder of it: 200 classes, 64 x 64 pixels. Writes ``train100k.h5``
(500 of each class) and ``val10k.h5`` (labels from ``val_annotations.txt``); the test part has no labels and
is left out. Labels are numbers of the WordNet names in their order (``wnids.txt``, sorted); these are the
files' subjects. Grey pictures are put on three channels, and counted in the history. 8 bits, values in [-1,
1]. ``--images N`` takes N training images, drawn by ``--seed``; ``--size`` makes them smaller. The archive's
MD5 is checked; --unverified takes another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ambient_sci.data.picture_sets import (
    PictureSource,
    class_numbers,
    missing,
    open_set,
    read_text,
    run_script,
    subset,
    verified,
    write_parts,
)
from ambient_sci.errors import InputError

MD5 = {"90528d7ca1a48142e341f4ef8d21d0de": "tiny-imagenet-200.zip"}
STEPS = (
    "1. download http://cs231n.stanford.edu/tiny-imagenet-200.zip (248 MB, MD5 "
    "90528d7ca1a48142e341f4ef8d21d0de); 2. `python datasets/tiny_imagenet.py tiny-imagenet-200.zip --out "
    "data/tiny_imagenet`"
)
PARTS = {"train": "train100k", "val": "val10k"}


def classes(source: PictureSource) -> tuple[np.ndarray, list[str]]:
    """Part of each picture ("train", "val", "test", "" for none) and its WordNet name.

    Raises:
        InputError: a picture of the validation part without a line in val_annotations.txt.
    """
    text = read_text(source.path, "val_annotations.txt")
    if text is None:
        raise InputError(f"{source.path}: expected tiny-imagenet-200, found no val_annotations.txt in it")
    annotated = {line.split("\t")[0]: line.split("\t")[1] for line in text.splitlines() if "\t" in line}
    parts, names = [], []
    for name in source.names:
        folders = Path(name).parts[:-1]
        part = next((p for p in ("train", "val", "test") if p in folders), "")
        if part == "val" and Path(name).name not in annotated:
            raise InputError(f"{source.path}: expected a line of val_annotations.txt for {name}, found none")
        known = {"train": folders[folders.index("train") + 1] if part == "train" else ""}
        names.append(annotated[Path(name).name] if part == "val" else known.get(part, ""))
        parts.append(part)
    return np.asarray(parts), names


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, help="default: as they are, 64")
    parser.add_argument("--images", type=int, help="training images (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unverified", action="store_true", help="take an archive with another checksum")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    path = arguments.source
    if not path.exists():
        raise missing(path, "Tiny ImageNet", STEPS)
    said = path.name if path.is_dir() else verified(path, MD5, arguments.unverified)
    boxes = read_text(path, "wnids.txt")
    source = open_set(path, expected=("wnids.txt", "words.txt", "val_annotations.txt", "*_boxes.txt"))
    parts, names = classes(source)
    wanted = sorted((boxes or "").split())
    if not wanted or not set(names) - {""} <= set(wanted):
        raise InputError(f"{path}: expected classes as in wnids.txt, got others, or no wnids.txt")
    known = class_numbers([*wanted, *(name for name in names if name)])
    numbers = dict(zip([*wanted, *(name for name in names if name)], known.tolist(), strict=True))
    source.labels = np.asarray([numbers.get(name, 0) for name in names])
    rows = {part: np.flatnonzero(parts == part) for part in PARTS}
    rows["train"] = subset(rows["train"], arguments.images, arguments.seed)
    if arguments.images is not None:
        said += f", {arguments.images} training images drawn with seed {arguments.seed}"
    files = {
        "train": PARTS["train"] if arguments.images is None else f"train{arguments.images}",
        "val": PARTS["val"],
    }
    written = {arguments.out / f"{files[part]}.h5": some for part, some in rows.items()}
    write_parts(
        source,
        written,
        size=arguments.size,
        history=f"Tiny ImageNet: {said}; the test part, without labels, is left out",
        channels=3,
        subjects=names,
        overwrite=arguments.overwrite,
    )
    for file, some in written.items():
        print(f"{file}: {len(some)} images")


if __name__ == "__main__":
    run_script(main)
