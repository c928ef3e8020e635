"""Published sets of pictures made into files of images: read from what their authors hand out, squared,
resized, divided, stored as uint8.

    source = open_set(path)                     # a folder or a zip of pictures, with labels where it has them
    write_parts(source, {train: rows, test: others}, size=64, history="...")

Pictures are cut to their centre square and resized with Lanczos's filter of Pillow, as EDM's and StyleGAN's
dataset tools do (Karras et al. 2022): numbers of such data compare with published ones. Values are 8 bits,
in [-1, 1] when they are read (value = stored x 2/255 - 1), the units in which published noise levels are
given. Pictures are read one at a time and written in blocks, so that the memory does not grow with their
number.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.data.image_writing import ImageWriter
from ambient_sci.data.readers.guard import listed, one_line, reading
from ambient_sci.data.readers.pictures import Picture, open_pictures
from ambient_sci.errors import InputError
from ambient_sci.progress import track
from ambient_sci.whole_files import check_output

BLOCK = 256
STEP, OFFSET = 2 / 255, -1.0
LABELS = "dataset.json"


@dataclass
class PictureSource:
    """N pictures, read one at a time by ``read(k) -> (C, H, W) uint8``.

    Attributes:
        path: where they come from.
        names: of the pictures, as the source has them.
        read: reads one.
        labels: class of each (N,), or None.
        notes: what was left out or guessed; it may grow while pictures are read.
    """

    path: Path
    names: list[str]
    read: Callable[[int], np.ndarray]
    labels: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, wanted: Callable[[str], bool]) -> np.ndarray:
        """Numbers of the pictures with such names."""
        return np.flatnonzero([wanted(name) for name in self.names])


def open_set(
    path: str | Path,
    *,
    expected: Sequence[str] = (),
    folders_are_classes: bool = False,
) -> PictureSource:
    """The pictures of a folder or a zip, in the order of their names.

    Labels are those of a ``dataset.json`` (EDM's and StyleGAN's), or, if asked for, the pictures' own
    folders, numbered by name.

    Args:
        path: the folder or zip.
        expected: names or patterns of further files that belong to the set.
        folders_are_classes: take the name of a picture's folder for its class.

    Raises:
        InputError: no such path, no pictures in it, a truncated or encrypted zip, names that lead out of it,
            or a ``dataset.json`` that does not fit.
    """
    path = Path(path)
    if path.suffix.lower() == ".zip" and path.is_file():
        check_names(zip_names(path), path)
    pictures = open_pictures(path, expected=(LABELS, *expected))
    found = PictureSource(
        path, pictures.names, lambda k: _eight_bits(pictures.read(k), k, pictures.names), None
    )
    found.notes = pictures.notes
    text = _text_of(path, LABELS)
    if text is not None:
        found.labels = _labels(text, found.names, path)
    if found.labels is None and folders_are_classes:
        found.labels = class_numbers([Path(name).parent.name for name in found.names])
    return found


def zip_names(path: Path) -> list[str]:
    """Names in a zip."""
    with reading(path, "zip file"), zipfile.ZipFile(path) as archive:
        return archive.namelist()


def check_names(names: Sequence[str], path: Path) -> None:
    """Raise InputError for an archive with a name that leads out of it ("../x", "/x", "C:x"). Nothing is ever
    unpacked here; whoever unpacks it elsewhere would be glad."""
    odd = [n for n in names if re.match(r"[/\\]|[A-Za-z]:", n) or ".." in re.split(r"[/\\]", n)]
    if odd:
        raise InputError(f"{path}: expected names that stay inside the archive, got {listed(odd)}; refused")


def read_text(path: Path, name: str) -> str | None:
    """A text file of this name (without folders) in a folder or zip, None where there is none; at most 64 MB.

    Raises:
        InputError: it is larger, or no text.
    """
    return _text_of(path, name)


def _text_of(path: Path, name: str, most: int = 64 << 20) -> str | None:
    if path.is_dir():
        found = sorted(path.rglob(name))
        if not found:
            return None
        size, data = found[0].stat().st_size, found[0].read_bytes
    elif path.suffix.lower() == ".zip":
        with reading(path, "zip file"), zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if Path(m.filename).name == name]
        if not members:
            return None
        size, data = members[0].file_size, lambda: _member(path, members[0])
    else:
        return None
    if size > most:
        raise InputError(f"{path}: expected {name} of at most {most >> 20} MB, got {size >> 20} MB")
    with reading(f"{path}/{name}", "text file"):
        return data().decode()


def _member(path: Path, member: zipfile.ZipInfo) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def _labels(text: str, names: list[str], path: Path) -> np.ndarray | None:
    """What dataset.json says; None where it says that there are no labels."""
    try:
        found = json.loads(text)["labels"]
        table = None if found is None else {str(name): int(label) for name, label in found}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(
            f'{path}: expected {LABELS} as {{"labels": [[name, class], ...]}}, got another'
        ) from None
    if table is None:
        return None
    missing = [name for name in names if name not in table]
    if missing:
        raise InputError(
            f"{path}: expected a class in {LABELS} for every picture, got none for {listed(missing)}"
        )
    return np.asarray([table[name] for name in names])


def class_numbers(names: Sequence[str]) -> np.ndarray:
    """Classes by name as numbers from 0, in the order of the names."""
    numbers = {name: k for k, name in enumerate(sorted(set(names)))}
    return np.asarray([numbers[name] for name in names])


def _eight_bits(picture: Picture, number: int, names: list[str]) -> np.ndarray:
    if picture.values.dtype != np.uint8 or len(picture.values) not in (1, 3):
        what = f"{picture.values.dtype} of {len(picture.values)} channels"
        raise InputError(f"{one_line(names[number])}: expected a grey or RGB picture of 8 bits, got {what}")
    return picture.values


# -- squares -----------------------------------------------------------------------------------------------


def squared(
    values: np.ndarray, size: int | None, crop: int | None = None, name: str = "picture"
) -> np.ndarray:
    """The centre square of a picture (C, H, W) uint8, resized by Lanczos's filter to ``size`` pixels.

    Args:
        values: the picture.
        size: of the result; None: as it is.
        crop: edge of the square; None: the shorter side.
        name: names the picture in errors.

    Raises:
        InputError: a picture smaller than ``crop`` or ``size``: nothing is padded or enlarged.
    """
    from PIL import Image

    height, width = values.shape[1:]
    edge = min(height, width) if crop is None else crop
    goal = edge if size is None else size
    if edge > min(height, width) or goal > edge:
        raise InputError(
            f"{one_line(name)}: expected at least {max(edge, goal)} x {max(edge, goal)} pixels, got "
            f"{height} x {width}"
        )
    top, left = (height - edge) // 2, (width - edge) // 2
    values = values[:, top : top + edge, left : left + edge]
    if goal == edge:
        return values
    planes = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
    picture = Image.fromarray(np.ascontiguousarray(planes)).resize((goal, goal), Image.Resampling.LANCZOS)
    resized = np.asarray(picture)
    return resized[None] if len(values) == 1 else np.moveaxis(resized, -1, 0)


# -- splits and files --------------------------------------------------------------------------------------


def hold_out(count: int, held_out: int, seed: int, groups: Sequence[str] | None = None) -> np.ndarray:
    """Which of ``count`` pictures are held out, drawn by a seed: bool (count,).

    Args:
        count: number of pictures.
        held_out: how many to hold out.
        seed: of the draw.
        groups: whom each picture shows. Whole groups are held out, until there are ``held_out`` pictures or
            the next group would exceed them: nobody is on both sides.

    Raises:
        InputError: not 0 <= held_out < count.
    """
    if not 0 <= held_out < count:
        raise InputError(f"--held-out: expected fewer than the {count} pictures there are, got {held_out}")
    generator = np.random.default_rng(seed)
    chosen = np.zeros(count, bool)
    if groups is None:
        chosen[generator.permutation(count)[:held_out]] = True
        return chosen
    _, which, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = generator.permutation(len(sizes))
    whole = order[np.cumsum(sizes[order]) <= held_out]
    return np.isin(which, whole)


def subset(rows: np.ndarray, number: int | None, seed: int) -> np.ndarray:
    """``number`` of ``rows``, drawn by a seed, in their order; all if None.

    Raises:
        InputError: more than there are.
    """
    if number is None:
        return rows
    if not 1 <= number <= len(rows):
        raise InputError(f"--images: expected 1 to {len(rows)}, as many as there are, got {number}")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:number])


def write_parts(
    source: PictureSource,
    parts: Mapping[Path, np.ndarray],
    *,
    size: int | None,
    history: str,
    crop: int | None = None,
    channels: int | None = None,
    subjects: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the files of a set, each whole or not at all.

    Args:
        source: the pictures.
        parts: file -> numbers of the pictures in it.
        size, crop: see `squared`.
        history: where the pictures are from and how they were divided; what is done here is added.
        channels: of the images; 3: grey pictures are put on three. None: as the first has.
        subjects: whom each picture of the source shows; default: its name.
        overwrite: replace files that exist.

    Raises:
        InputError: pictures that are damaged, too small, or of mixed sizes where none is asked for; a part
            without pictures.
    """
    for path, rows in parts.items():
        check_output(path, overwrite)
        if len(rows) == 0:
            raise InputError(f"{path}: expected pictures for it in {source.path}, got none")
    names = source.names if subjects is None else subjects
    done = "as they are" if size is None else f"resized by Pillow's Lanczos filter to {size} px"
    cut = "" if crop is None else f" of {crop} px"
    for path, rows in parts.items():
        text = f"{history}; centre square{cut}, {done}; {len(rows)} of {len(source)} pictures"
        with ImageWriter(
            path, history=text, overwrite=overwrite, dtype="uint8", step=STEP, offset=OFFSET
        ) as file:
            grey, shape = 0, None
            for start in track(range(0, len(rows), BLOCK), f"{path.name}: {len(rows)} pictures"):
                some = rows[start : start + BLOCK]
                block = [squared(source.read(int(k)), size, crop, source.names[k]) for k in some]
                grey += sum(len(image) == 1 for image in block)
                shape = shape or (channels or len(block[0]), *block[0].shape[1:])
                block = [_shaped(image, shape, source.names[k]) for image, k in zip(block, some, strict=True)]
                labels = None if source.labels is None else source.labels[some]
                file.append(np.stack(block), subjects=[names[k] for k in some], labels=labels)
            turned = [f"{grey} grey pictures on three channels"] if grey and shape and shape[0] == 3 else []
            file.history += "".join(f"; {note}" for note in [*source.notes, *turned])


def _shaped(image: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A picture of the shape of the others; grey ones on three channels where the others have three."""
    if len(image) == 1:
        image = np.broadcast_to(image, (shape[0], *image.shape[1:]))
    if image.shape != shape:
        raise InputError(
            f"pictures of mixed sizes: expected {shape} as of the first, got {image.shape} of "
            f"{one_line(name)}; give --size"
        )
    return image


# -- archives that are known -------------------------------------------------------------------------------


def verified(path: Path, md5: Mapping[str, str], unverified: bool) -> str:
    """What to say of an archive: that it is the published one, or, if asked for, that it is another.

    Args:
        path: the archive.
        md5: names of published archives, by their MD5 (what their authors publish).
        unverified: take any.

    Raises:
        InputError: another file than the published ones.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with reading(path, "file"), path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    found = digest.hexdigest()
    if found in md5:
        return f"{md5[found]} as published (MD5 {found})"
    if unverified:
        return f"{path.name}, not a published archive (MD5 {found})"
    expected = " or ".join(f"{name} (MD5 {value})" for value, name in md5.items())
    raise InputError(
        f"{path}: expected {expected}, got another file (MD5 {found}); --unverified takes it all the same"
    )


def missing(path: Path, what: str, steps: str) -> InputError:
    """The error for data that are not there: what is wanted, and how to get it."""
    return InputError(f"{path}: expected {what}, found nothing there. To get it: {steps}")


def run_script(main: Callable[..., Any]) -> None:
    """Run a script's ``main``; wrong input ends in one line and exit status 2."""
    import sys

    try:
        main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
