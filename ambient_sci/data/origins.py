"""Where pictures come from: file, page and place in it, so that results can be traced and written back.

A measurement file keeps this in its geometry under "pictures": the names of files, what is known of each
("stacks": axes, type, resolution), and one column of whole numbers for each fact about the images: "file"
(into the names), "page", "y" and "x" (the upper left pixel in the page as stored), "height" and "width" of
the page. Columns are stored as arithmetic runs [first, step, count].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

COLUMNS = ("file", "page", "y", "x", "height", "width")


class Origin(NamedTuple):
    """Where one image comes from: file, page, its upper left pixel there, and the size of the page."""

    file: str
    page: int
    y: int
    x: int
    height: int
    width: int


def pack(values: Sequence[int]) -> list[list[int]]:
    """Arithmetic runs [first, step, count] of whole numbers."""
    runs: list[list[int]] = []
    for value in map(int, values):
        last = runs[-1] if runs else None
        if last and last[2] == 1:
            last[1], last[2] = value - last[0], 2
        elif last and value == last[0] + last[1] * last[2]:
            last[2] += 1
        else:
            runs.append([value, 0, 1])
    return runs


def unpack(runs: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of `pack`."""
    return [int(first + step * k) for first, step, count in runs for k in range(count)]


def record(files: Sequence[str], origins: Sequence[Origin], **facts: Any) -> dict[str, Any]:
    """The entry "pictures" of a geometry; ``facts`` go in as they are."""
    number = {name: k for k, name in enumerate(files)}
    columns = {name: [getattr(o, name) for o in origins] for name in COLUMNS[1:]}
    columns["file"] = [number[o.file] for o in origins]
    return {"files": list(files), **facts, **{name: pack(columns[name]) for name in COLUMNS}}


def origins_of(geometry: Mapping[str, Any]) -> list[Origin]:
    """Where each image of a file comes from; empty where that was not recorded."""
    found = geometry.get("pictures")
    if not found:
        return []
    columns = [unpack(found[name]) for name in COLUMNS]
    return [Origin(str(found["files"][f]), *rest) for f, *rest in zip(*columns, strict=True)]


def select_origins(pictures: Mapping[str, Any], rows: range) -> dict[str, Any]:
    """The entry of some images, a range."""
    return {k: pack(unpack(v)[rows.start : rows.stop]) if k in COLUMNS else v for k, v in pictures.items()}
