"""What is in a result: a description in words, and a contact sheet of measurement, mean, spread and "
"samples."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.data.files import MeasurementFile
from ambient_sci.data.hdf5_file import format_of
from ambient_sci.data.inspect import measured, measured_name
from ambient_sci.data.sheets import Panel, check_sheet, draw, picture, spread_rows, window
from ambient_sci.data.survey import fingerprint
from ambient_sci.errors import InputError
from ambient_sci.sampling.result import FORMAT, ResultFile

#: Samples that a sheet shows.
SHOWN_SAMPLES = 3
UNRECORDED = "not recorded: that a measurement file is the one it was made from cannot be checked"
#: What a report says that is not a setting or a count.
_SKIPPED = ("sampler", "samples", "steps", "sigma_min", "sigma_max", "options", "notes")


def is_result(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a result."""
    try:
        with h5py.File(path, "r") as file:
            return format_of(file) == FORMAT
    except (OSError, RuntimeError, ValueError, KeyError):
        return False


def describe_result(path: str | os.PathLike[str]) -> str:
    """Text about a result: how many images and samples, what they were made from and how, values and notes.

    Raises:
        InputError: not a result file, or a damaged one.
    """
    with ResultFile(path) as file:
        lines = _lines(file)
    width = max(len(name) for name, _ in lines)
    text = "\n".join([f"{Path(path)}", *(f"  {name:<{width}}  {value}".rstrip() for name, value in lines)])
    # Names come from files of others: nothing in them may steer a terminal.
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _lines(file: ResultFile) -> list[tuple[str, str]]:
    samples, num, *shape = file.shape
    report, source = file.report, file.source
    size = " x ".join(map(str, shape)) + (" (complex)" if shape[0] == 2 else "")
    drawn = f"{samples} of each image" if samples > 1 else "1 of each image: no standard deviation"
    lines = [("kind", "result of a reconstruction"), ("images", f"{num}, each {size}"), ("samples", drawn)]
    if source:
        made = f"{source.get('name')} ({source.get('operator')}, {source.get('samples')} measurements)"
        if source.get("indices"):
            made += f", of which {num}"
        lines.append(("made from", made))
    else:
        lines.append(("made from", UNRECORDED))
    lines.append(("sampler", _sampler(report)))
    settings = {**report.get("options", {}), **{k: v for k, v in report.items() if k not in _SKIPPED}}
    if settings:
        lines.append(
            ("settings", ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in settings.items()))
        )
    rows = spread_rows(num, 64)
    mean = file.mean(rows)
    values = f"mean {float(mean.min()):.4g} to {float(mean.max()):.4g}"
    if samples > 1:
        values += f", standard deviation {float(file.std(rows).mean()):.3g} on average"
    lines.append(("values", values))
    if file.subjects:
        counts = Counter(file.subjects)
        named = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:8])
        more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
        lines.append(("subjects", f"{len(counts)}: {named}{more}"))
    scale = np.asarray(file.scale)
    low, high = float(scale.min()), float(scale.max())
    between = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    lines.append(("scale", f"{between} (original = stored x scale)"))
    volumes = file.geometry.get("volumes") or []
    if volumes:
        placed = sum(bool(v.get("positioned", True)) for v in volumes)
        lines.append(("geometry", f"{len(volumes)} volumes, {placed} of them at a known position"))
    return lines + [("note" if k == 0 else "", note) for k, note in enumerate(report.get("notes", []))]


def _sampler(report: dict[str, Any]) -> str:
    text = str(report.get("sampler", "not recorded"))
    if "steps" in report:
        text += f", {report['steps']} noise levels"
    if "sigma_min" in report and "sigma_max" in report:
        text += f" from {report['sigma_max']:.4g} down to {report['sigma_min']:.4g}"
    return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def result_sheet(
    path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    *,
    measurements: str | os.PathLike[str] | None = None,
    columns: int = 8,
    overwrite: bool = False,
) -> Path:
    """A picture of a result: what was measured, mean, standard deviation and three samples of up to eight
    images.

    All but the standard deviation share the window of the mean, from 0 to its 99.9th percentile; only the
    adjoint of scans, which is in no image's units, has its own.

    Args:
        path: result file.
        out_png: picture to write.
        measurements: the file it was made from; default: the file of that name beside the result, if it is
            that one. Without it the row is left out.
        columns: most images that are shown.
        overwrite: replace a picture that exists.

    Raises:
        InputError: not a result file, a picture that exists, or measurements that the result was not made
            from.
    """
    out = check_sheet(out_png, overwrite)
    with ResultFile(path) as file:
        samples, num = file.shape[:2]
        rows = spread_rows(num, columns)
        mean = picture(file.mean(rows))
        shared = window(mean)
        panels = _measured(file, rows, measurements, shared)
        panels.append(Panel("mean" if samples > 1 else "estimate", mean, shared))
        if samples > 1:
            std = file.std(rows)
            spread = std.square().sum(1).sqrt().numpy()
            panels.append(Panel("std", spread, (0.0, max(float(np.percentile(spread, 99.5)), 1e-12)), True))
            drawn = file.samples(rows)[:SHOWN_SAMPLES]
            panels += [Panel(f"sample {k + 1}", picture(x), shared) for k, x in enumerate(drawn)]
        titles = [f"{r}: {file.subjects[r]}" if file.subjects else str(r) for r in rows]
        turn = file.geometry.get("orientation") == "RAS"
    shown = f", {min(samples, SHOWN_SAMPLES)} of {samples} samples" if samples > 1 else ""
    draw(panels, titles, f"{Path(path).name}: {len(rows)} of {num} images{shown}", out, turn=turn)
    return out


def _measured(file: ResultFile, rows: np.ndarray, given: Any, shared: tuple[float, float]) -> list[Panel]:
    """The row of measurements; none where their file is not at hand."""
    beside = file.path.parent / str(file.source.get("name", ""))
    path = Path(given) if given is not None else beside
    if not file.source or (given is None and not path.is_file()):
        return []
    try:
        with MeasurementFile(path) as measurements:
            found = _own_rows(file, measurements, rows)
            if found is None and given is not None:
                raise InputError(
                    f"{path}: expected the measurements that {file.path} was made from, got others"
                )
            if found is None:
                return []
            name = measured_name(measurements.operator_name)
            return [Panel(name, measured(measurements, found), shared if name == "measured" else None)]
    except InputError:
        if given is not None:
            raise
        return []  # a file of that name, but not a readable one


def _own_rows(file: ResultFile, measurements: MeasurementFile, rows: np.ndarray) -> np.ndarray | None:
    """The measurements that images of a result were made from; None when they are of another file."""
    known = fingerprint(measurements)
    if any(file.source.get(k) != known[k] for k in ("content", "samples") if k in known):
        return None
    chosen = file.source.get("indices")
    if chosen is None:
        return rows if len(file) == len(measurements) else None
    return np.asarray(chosen)[rows] if len(chosen) == len(file) else None
