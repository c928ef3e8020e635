"""Pictures as a source of images: are they alike, where is each from, and are they clipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.clipping import Ends
from ambient_sci.data.image_source import ImageSource
from ambient_sci.data.images import resize
from ambient_sci.data.origins import Origin, record
from ambient_sci.data.readers.pictures import Picture, PictureSet, open_pictures
from ambient_sci.data.subjects import subjects_of
from ambient_sci.errors import InputError


def from_pictures(path: Path, size: int | None, channel: int | str | None, mixed: bool) -> ImageSource:
    """Pictures of a folder, a zip or a single file. Their subjects: see ``subjects.py``."""
    pictures = open_pictures(path, channel)
    names = pictures.names
    first = pictures.read(0)
    subjects = subjects_of(names)
    if len(set(subjects)) < len(set(names)):
        pictures.notes.append("subjects by folder (or BIDS name)")
    shape = first.values.shape if size is None else (len(first.values), size, size)
    ends = Ends(first.largest)
    found = ImageSource(
        (shape[0], shape[1], shape[2]),
        subjects,
        lambda rows: _read_pictures(pictures, rows, size, mixed, ends),
        str(path),
        first.largest,
        notes=pictures.notes,
        names=pictures.labels,
        shape_of=pictures.shape if mixed else None,
        ends=ends,
        noise_group=np.array([e.group for e in pictures.entries]),
    )
    if size is None:
        found.geometry = {"pictures": _origins(pictures, first.values, first.largest, mixed)}
    else:
        found.notes.append(
            f"resized to {size} pixels where their size was another; the noise is no longer white"
        )
    return found


def _origins(pictures: PictureSet, first: np.ndarray, largest: float, mixed: bool) -> dict[str, Any]:
    shapes = [pictures.shape(k)[1:] if mixed else first.shape[1:] for k in range(len(pictures))]
    entries = zip(pictures.entries, shapes, strict=True)
    files = list(dict.fromkeys(pictures.names))
    facts: dict[str, Any] = {"dtype": {255: "uint8", 65535: "uint16"}.get(int(largest), str(first.dtype))}
    if pictures.about:
        stacks = [pictures.about.get(name, {}) for name in files]
        facts["stacks"] = stacks if any(s != stacks[0] for s in stacks) else stacks[:1]
    return record(files, [Origin(e.name, e.page, 0, 0, *s) for e, s in entries], **facts)


def _read_pictures(
    pictures: PictureSet, rows: np.ndarray, size: int | None, mixed: bool, ends: Ends
) -> Tensor:
    first, images = pictures.read(0), []
    for row in rows:
        one = pictures.read(int(row))
        ends.look(int(row), one.values)
        _check_alike(pictures, int(row), first, one, size is not None, mixed)
        lossy = "compressed with loss (JPEG, WebP): the noise is not white"
        if one.lossy and lossy not in pictures.notes:
            pictures.notes.append(lossy)
        picture = one.values.astype(np.float32) / np.float32(one.largest)
        images.append(picture if size is None else resize(picture[None], size)[0])
    return torch.from_numpy(np.stack(images))


def _check_alike(
    pictures: PictureSet, row: int, first: Picture, one: Picture, resized: bool, mixed: bool
) -> None:
    """InputError for a picture that cannot stand in one file with the first, and what would help."""
    a, b = pictures.labels[0], pictures.labels[row]
    if one.largest != first.largest:
        raise InputError(
            f"{pictures.path}: mixed pictures, {a} has values up to {first.largest:g} and {b} up to "
            f"{one.largest:g}; "
            "import each kind by itself"
        )
    if mixed:
        return
    if len(one.values) != len(first.values):
        raise InputError(
            f"{pictures.path}: mixed pictures, {a} has {len(first.values)} channels and {b} "
            f"{len(one.values)}; sort "
            "them, or make all of them grey (import --grey)"
        )
    if not resized and one.values.shape != first.values.shape:
        sizes = [" x ".join(map(str, p.values.shape[1:])) for p in (first, one)]
        raise InputError(
            f"{pictures.path}: mixed pictures, {a} is {sizes[0]} and {b} {sizes[1]} pixels; sort them, or "
            "import "
            "with --patch or --crop (clean ones: --size)"
        )
