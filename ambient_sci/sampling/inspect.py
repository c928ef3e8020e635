"""What is in a result: a description in words and a contact sheet, as `ambient_sci.data.inspect` has them for
measurements and images."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from ambient_sci.data.hdf5_file import format_of
from ambient_sci.data.inspect import check_sheet, draw_sheet, picture
from ambient_sci.sampling.result import FORMAT, ResultFile

UNRECORDED = "not recorded: that a measurement file is the one it was made from cannot be checked"


def is_result(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a result; whoever reads it complains about anything else."""
    try:
        with h5py.File(path, "r") as file:
            return format_of(file) == FORMAT
    except (OSError, RuntimeError, ValueError, KeyError):
        return False


def describe_result(path: str | os.PathLike[str]) -> str:
    """Text about a result: images, samples, how and from what it was made, subjects, scale, place.

    Raises:
        InputError: the file is not valid.
    """
    with ResultFile(path) as file:
        lines = _lines(file)
    width = max(len(name) for name, _ in lines)
    text = "\n".join([f"{path}", *(f"  {name:<{width}}  {value}" for name, value in lines)])
    # Names come from files of others: nothing in them may steer a terminal.
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _lines(file: ResultFile) -> list[tuple[str, str]]:
    samples, num, *shape = file.shape
    report, source, scale = file.report, file.source, np.asarray(file.scale)
    volumes = file.geometry.get("volumes") or []
    placed = sum(bool(v.get("positioned", True)) for v in volumes)
    counts = Counter(file.subjects)
    named = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:8])
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    settings = [f"{key} {report[key]:.4g}" for key in ("steps", "sigma_min", "sigma_max") if key in report]
    size = " x ".join(map(str, shape))
    return [
        ("kind", "result: posterior mean, standard deviation and samples"),
        ("images", f"{num}, each {size}; {samples} sample{'s' * (samples != 1)} of each"),
        ("sampler", ", ".join([str(report.get("sampler", "not recorded")), *settings])),
        ("made from", f"{source.get('name')} ({source.get('samples')} samples)" if source else UNRECORDED),
        ("subjects", f"{len(counts)}: {named}{more}" if counts else "not recorded"),
        ("scale", f"{float(scale.min()):.6g} to {float(scale.max()):.6g} (original = stored x scale)"),
        (
            "geometry",
            f"{len(volumes)} volumes, {placed} of them at a known position"
            if volumes
            else "not recorded: export stacks the slices of a person, 1 mm apart",
        ),
        *(("note", str(note)) for note in report.get("notes", [])),
    ]


def result_sheet(
    path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    *,
    columns: int = 8,
    overwrite: bool = False,
) -> Path:
    """A picture of up to ``columns`` images: mean, standard deviation, first sample.

    Raises:
        InputError: the file is not valid, or the picture exists.
    """
    out = check_sheet(out_png, overwrite)
    with ResultFile(path) as file:
        rows = np.unique(np.linspace(0, len(file) - 1, min(len(file), columns)).astype(int))
        panels = {"mean": picture(file.mean(rows)), "std": picture(file.std(rows))}
        if file.shape[0] > 1:
            panels["sample"] = picture(file.samples(rows)[0])
        else:
            del panels["std"]
        titles = [f"{r}: {file.subjects[r]}" if file.subjects else f"{r}" for r in rows]
        turn = file.geometry.get("orientation") == "RAS"
    draw_sheet(panels, titles, turn, Path(path).name, out)
    return out
