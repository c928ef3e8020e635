"""Where pictures come from: file, page and place in it, so that results can be traced and written back.

A measurement file keeps this in its geometry under "pictures": the names of files, what is known of each
("stacks": axes, type, resolution; one entry where all are alike), and one column of whole numbers for each
fact about the images: "file" (into the names), "page", "y" and "x" (the upper left pixel in the page as
stored), "height" and "width" of the page. Columns are stored as arithmetic runs [first, step, count].
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


def select_origins(pictures: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The entry of some images."""
    columns = {name: unpack(pictures[name]) for name in COLUMNS}
    return {**pictures, **{name: pack([values[r] for r in rows]) for name, values in columns.items()}}


def stack_of(pictures: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What is known of a TIFF: axes, shape, dtype, and resolution, unit and spacing where it says so."""
    stacks = pictures.get("stacks") or [{}]
    return stacks[list(pictures["files"]).index(file)] if len(stacks) == len(pictures["files"]) else stacks[0]
