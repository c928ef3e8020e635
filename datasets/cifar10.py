"""CIFAR-10 as published, as image files.

    python datasets/cifar10.py cifar-10-python.tar.gz --out data/cifar10

SOURCE is the archive of the Python version or of the binary version (Krizhevsky 2009), a folder with either
unpacked, or a zip of EDM's dataset tool (``dataset.json`` with labels). The batches of the Python version are
pickles: they are read by a reader that runs nothing (`ambient_sci.plain_pickle`).

Writes ``train50k.h5`` and ``test10k.h5`` as published, with labels 0 to 9; from a zip, which has no test
part, ``train50k.h5`` alone (``--held-out N`` divides it by ``--seed``). 3 x 32 x 32, 8 bits, values in [-1,
1]. ``--images N`` takes N training images, drawn by ``--seed``. The archive's MD5 is that on the authors'
page; --unverified takes another one.
"""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ambient_sci.data.picture_sets import (
    PictureSource,
    check_names,
    hold_out,
    missing,
    open_set,
    run_script,
    subset,
    verified,
    write_parts,
)
from ambient_sci.data.readers.guard import reading
from ambient_sci.errors import InputError
from ambient_sci.plain_pickle import Record, read_plain

MD5 = {
    "c58f30108f718f92721af3b95e74349a": "cifar-10-python.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530": "cifar-10-binary.tar.gz",
}
STEPS = (
    "1. download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (170 MB, MD5 "
    "c58f30108f718f92721af3b95e74349a); 2. run `python datasets/cifar10.py cifar-10-python.tar.gz --out "
    "data/cifar10`"
)
TRAIN = tuple(f"data_batch_{k}" for k in range(1, 6))
TEST = ("test_batch",)
EACH, PIXELS, CLASSES = 10_000, 3 * 32 * 32, 10
LARGEST = 64 << 20
#: What a pickled array of numpy refers to.
NUMPY = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")} | {
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
}


def load(source: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8, labels (N,), and which are of the training part (N,) bool.

    Raises:
        InputError: an archive or folder with other batches than CIFAR-10's.
    """
    read = _folder(source) if source.is_dir() else _archive(source)
    images, labels, train = [], [], []
    for batch in TRAIN + TEST:
        found, own = _batch(batch, read, source)
        images.append(found)
        labels.append(own)
        train.append(np.full(len(own), batch in TRAIN))
    return np.concatenate(images), np.concatenate(labels), np.concatenate(train)


def _archive(path: Path) -> Callable[[str], bytes | None]:
    """What reads a member of the archive by the end of its name."""
    members: dict[str, bytes] = {}
    wanted = {name + end for name in TRAIN + TEST for end in ("", ".bin")}
    with reading(path, "tar archive"), tarfile.open(path) as archive:
        for member in archive:
            check_names([member.name], path)
            name = Path(member.name).name
            if name in wanted and member.isfile():
                if member.size > LARGEST:
                    raise InputError(f"{path}: expected batches of at most {LARGEST >> 20} MB, got {name}")
                file = archive.extractfile(member)
                members[name] = b"" if file is None else file.read()
    return members.get


def _folder(path: Path) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        found = sorted(path.rglob(name))
        if found and found[0].stat().st_size > LARGEST:
            raise InputError(f"{found[0]}: expected a batch of at most {LARGEST >> 20} MB")
        return found[0].read_bytes() if found else None

    return read


def _batch(name: str, read: Callable[[str], bytes | None], source: Path) -> tuple[np.ndarray, np.ndarray]:
    label = f"{source}/{name}"
    binary, pickled = read(f"{name}.bin"), read(name)
    if binary is not None:
        if len(binary) == 0 or len(binary) % (PIXELS + 1):
            raise InputError(f"{label}: expected images of {PIXELS + 1} bytes, got {len(binary)} bytes")
        rows = np.frombuffer(binary, np.uint8).reshape(-1, PIXELS + 1)
        images, labels = rows[:, 1:], rows[:, 0].astype(np.int64)
    elif pickled is not None:
        images, labels = _pickled(pickled, label)
    else:
        raise InputError(f"{source}: expected CIFAR-10 (the archive or its folder), found no {name} in it")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise InputError(
            f"{label}: expected classes 0 to {CLASSES - 1}, got {labels.min()} to {labels.max()}"
        )
    return images.reshape(-1, 3, 32, 32), labels


def _pickled(raw: bytes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the Python version: a dictionary with an array of pixels and a list of labels."""
    found = read_plain(raw, NUMPY, what="batch of CIFAR-10", label=label)
    found = {_text(k): v for k, v in found.items()} if isinstance(found, dict) else {}
    labels, array = found.get("labels"), found.get("data")
    if not isinstance(labels, list) or not isinstance(array, Record) or not isinstance(array.state, tuple):
        raise InputError(
            f"{label}: expected a batch of CIFAR-10 with data and labels, got {sorted(found)[:5]}"
        )
    _, shape, dtype, fortran, values = array.state
    kind = dtype.args[0] if isinstance(dtype, Record) else None
    values = values.encode("latin-1") if isinstance(values, str) else values
    good = kind in ("u1", b"u1") and not fortran and len(labels) > 0 and shape == (len(labels), PIXELS)
    if not good or len(values) != len(labels) * PIXELS or not all(type(n) is int for n in labels):
        raise InputError(f"{label}: expected (N, {PIXELS}) bytes and N labels, got {shape} of {kind!r}")
    return np.frombuffer(values, np.uint8).reshape(shape), np.asarray(labels)


def _text(key: object) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


def main() -> None:
    """Write the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, help="training images (default: all)")
    parser.add_argument("--held-out", type=int, default=0, help="of a zip: images kept apart (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unverified", action="store_true", help="take an archive with another checksum")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    path = arguments.source
    if not path.exists():
        raise missing(path, "CIFAR-10", STEPS)
    if path.suffix == ".zip":
        source = open_set(path)
        held = hold_out(len(source), arguments.held_out, arguments.seed)
        said = f"{path.name}, divided with seed {arguments.seed}"
        rows = {"train50k.h5": np.flatnonzero(~held), "held_out.h5": np.flatnonzero(held)}
        rows = {name: some for name, some in rows.items() if len(some)}
    else:
        if arguments.held_out:
            raise InputError("--held-out: expected none but for a zip: CIFAR-10 has a test part of its own")
        said = f"folder {path.name}" if path.is_dir() else verified(path, MD5, arguments.unverified)
        images, labels, train = load(path)
        names = [f"{'train' if t else 'test'}{k:05d}" for k, t in enumerate(train)]
        source = PictureSource(path, names, lambda k: images[k], labels)
        rows = {"train50k.h5": np.flatnonzero(train), "test10k.h5": np.flatnonzero(~train)}
    rows["train50k.h5"] = subset(rows["train50k.h5"], arguments.images, arguments.seed)
    if arguments.images is not None:
        said += f", {arguments.images} training images drawn with seed {arguments.seed}"
        rows[f"train{arguments.images}.h5"] = rows.pop("train50k.h5")
    parts = {arguments.out / name: some for name, some in rows.items()}
    write_parts(source, parts, size=None, history=f"CIFAR-10: {said}", overwrite=arguments.overwrite)
    for file, some in parts.items():
        print(f"{file}: {len(some)} images")


if __name__ == "__main__":
    run_script(main)
