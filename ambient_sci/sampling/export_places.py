"""Where images of a result go back to: names of files, axes and resolution of the stacks they came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ambient_sci.data.exporters import safe_names
from ambient_sci.data.origins import Origin, stack_of
from ambient_sci.data.picture_writing import Stack
from ambient_sci.data.subjects import stem
from ambient_sci.sampling.result import ResultFile


def names_of(file: ResultFile, origins: Sequence[Origin]) -> list[str]:
    """A name for each image, from its file and page; images without any are numbered."""
    if not origins:
        known = file.subjects if len(set(file.subjects)) == len(file) else None
        return safe_names(known or [f"{k:04d}" for k in range(len(file))])
    pages: dict[str, set[int]] = {}
    for origin in origins:
        pages.setdefault(origin.file, set()).add(origin.page)
    patches = "patch" in file.geometry.get("pictures", {})
    names = [
        stem(o.file)
        + (f"_page{o.page:04d}" if len(pages[o.file]) > 1 else "")
        + (f"_y{o.y}_x{o.x}" if patches else "")
        for o in origins
    ]
    return safe_names(names)


def stack_of_rows(file: ResultFile, origins: Sequence[Origin], rows: Sequence[int]) -> Stack:
    """The axes of the file that images came from, where all of its pages are there; else one axis T."""
    if not origins:
        return Stack("T", (len(rows),))
    pictures: dict[str, Any] = file.geometry.get("pictures", {})
    patches = "patch" in pictures
    labels = [_label(origins[r], patches) for r in rows]
    files = list(dict.fromkeys(origins[r].file for r in rows))
    known = [stack_of(pictures, name) for name in files]
    scales = [(k.get("resolution"), k.get("unit"), k.get("spacing")) for k in known]
    about: dict[str, Any] = {}
    if scales[0][0] and all(s == scales[0] for s in scales):
        zoom = float(pictures.get("zoom", 1))
        x, y = (float(r) / zoom for r in scales[0][0])
        about = {"resolution": (x, y), "unit": str(scales[0][1] or ""), "spacing": scales[0][2]}
    pages = [origins[r].page for r in rows]
    counting = [(a, n) for a, n in zip(known[0].get("axes", ""), known[0].get("shape", []), strict=False)]
    counting = [(a, int(n)) for a, n in counting if a not in "YXS"]
    for kept in (counting, [c for c in counting if c[0] != "C"]):
        axes, shape = "".join(a for a, _ in kept), tuple(n for _, n in kept)
        whole = pages == list(range(math.prod(shape)))
        if len(files) == 1 and axes and whole and set(axes) <= set("TZC") and not patches:
            return Stack(axes, shape, **about)
    return Stack("T", (len(rows),), **about, labels=labels)


def _label(origin: Origin, patches: bool) -> str:
    place = f" y {origin.y} x {origin.x}" if patches else ""
    return f"{origin.file} page {origin.page}{place}"
