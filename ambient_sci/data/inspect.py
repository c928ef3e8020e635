"""What is in a file: a description in words and a contact sheet, for measurements and for images."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.files import IMAGE_FORMAT, MeasurementFile, ReferenceFile
from ambient_sci.data.hdf5_file import format_of
from ambient_sci.data.origins import origins_of
from ambient_sci.data.sheets import COLUMNS, LINES, Panel, check_sheet, draw, picture, spread_rows

#: Masks and images looked at for the statistics of a description; a large file is sampled regularly.
SAMPLED = 256


def open_any(path: str | os.PathLike[str]) -> MeasurementFile | ReferenceFile:
    """A measurement file or a file of images, whichever it is. InputError for anything else."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            kind = format_of(file)
    except OSError:
        kind = None  # MeasurementFile finds the words for what is wrong
    return ReferenceFile(path) if kind == IMAGE_FORMAT else MeasurementFile(path)


def describe(path: str | os.PathLike[str]) -> str:
    """Text about a file: operator, shapes, noise, masks, subjects, what the masks identify, scale, history.

    Raises: InputError when the file is not valid.
    """
    file = open_any(path)
    with file:
        lines = _describe_measurements(file) if isinstance(file, MeasurementFile) else _describe_images(file)
        lines += _describe_common(file)
    width = max(len(name) for name, _ in lines)
    return "\n".join([f"{file.path}", *(f"  {name:<{width}}  {value}" for name, value in lines)])


def _describe_measurements(file: MeasurementFile) -> list[tuple[str, str]]:
    shape = " x ".join(map(str, file.measurement_shape))
    lines = [
        ("kind", "measurements"),
        ("operator", file.operator_name + (f", {file.coils} coils" if file.coils else "")),
        ("samples", f"{len(file)}, each {shape} float32 ({file.nbytes / 1e6:.1f} MB in memory)"),
        (
            "image shape",
            " x ".join(map(str, file.image_shape)) + (" (complex)" if file.image_shape[0] == 2 else ""),
        ),
        ("noise level", _noise(file)),
    ]
    rows = np.unique(np.linspace(0, len(file) - 1, min(len(file), SAMPLED)).astype(int))
    mask = file.mask(rows)
    lines.append(("masks", _masks(file, mask)))
    if float(mask.mean()) < 1:
        lines.append(("design", f"{_design(file)} ({file.design_status})"))
        lines.append(("identifiability", _identifiability(file, rows)))
    return lines


def _noise(file: MeasurementFile) -> str:
    low, high = float(file.noise_std.min()), float(file.noise_std.max())
    text = (f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}") + " per real channel"
    error = file.attributes.get("noise_std_error")
    if error is not None:
        text += f", estimated with a standard error of {float(error):.2g}"
    if file.attributes.get("magnitude"):
        text += ". These are magnitude images: where the signal is weak, their noise is Rician, not Gaussian"
    return text


def _masks(file: MeasurementFile, mask: Tensor) -> str:
    rate = float(mask.mean())
    if rate == 1:
        return "everything is measured"
    kind = "one for all samples" if file.shared_mask else "one a sample"
    fraction = f"{100 * rate:.1f} % measured (acceleration {1 / rate:.2f})"
    always = mask.flatten(2).mean((0, 1)).eq(1).float().mean() if not file.shared_mask else torch.zeros(())
    extra = f", {100 * float(always):.1f} % measured in every sample" if float(always) > 0 else ""
    return f"{kind}, {fraction}{extra}"


def _design(file: MeasurementFile) -> str:
    if file.design_dict is None:
        return "not stated"
    skip = {"name", "status", "image_shape", "masks", "probabilities"}
    shown = {k: v for k, v in file.design_dict.items() if k not in skip}
    short = [
        f"{k} {v if not isinstance(v, list) or len(v) <= 4 else f'[{len(v)} values]'}"
        for k, v in shown.items()
    ]
    return ", ".join([str(file.design_dict.get("name")), *short])


def _identifiability(file: MeasurementFile, rows: np.ndarray) -> str:
    from ambient_sci.operators import identifiability

    return identifiability(file.operator(rows)).text


def _describe_images(file: ReferenceFile) -> list[tuple[str, str]]:
    rows = np.unique(np.linspace(0, len(file) - 1, min(len(file), SAMPLED)).astype(int))
    images = file.images(rows)
    return [
        ("kind", "images (clean references or samples)"),
        ("samples", f"{len(file)}, each {' x '.join(map(str, file.image_shape))}"),
        (
            "range",
            f"{float(images.min()):.4g} to {float(images.max()):.4g}, "
            f"standard deviation {float(images.std()):.4g}",
        ),
    ]


def _describe_common(file: MeasurementFile | ReferenceFile) -> list[tuple[str, str]]:
    counts = Counter(file.subjects)
    named = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:8])
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    scale = np.asarray(file.scale)
    low, high = float(scale.min()), float(scale.max())
    lines = [
        ("subjects", f"{len(counts)}: {named}{more}"),
        (
            "scale",
            (f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}") + " (original = stored x scale)",
        ),
    ]
    if file.orientation:
        lines.append(("axes", file.orientation))
    pictures = file.geometry.get("pictures")
    if pictures:
        lines.append(("pictures", _pictures(pictures, file)))
    history = file.history.splitlines() or ["not recorded"]
    return lines + [("history" if k == 0 else "", line) for k, line in enumerate(history)]


def _pictures(pictures: dict[str, Any], file: MeasurementFile | ReferenceFile) -> str:
    """What the images are parts of."""
    pages = len({(o.file, o.page) for o in origins_of(file.geometry)})
    files = len(pictures["files"])
    text = f"{pages} from {files} file{'s' * (files != 1)}"
    if "patch" in pictures:
        text = f"patches of {pictures['patch']} pixels, every {pictures['stride']}, of {text}"
    return text + (f"; a pixel is {pictures['zoom']:g} of the file's" if pictures.get("zoom", 1) != 1 else "")


def contact_sheet(
    path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    *,
    columns: int | None = None,
    overwrite: bool = False,
) -> Path:
    """A picture of some samples: what was measured (A^H y of scans, as magnitude) and the masks if anything
    is missing; or the images of a file of images.

    Args:
        path: measurement file or file of images.
        out_png: picture to write.
        columns: most samples that are shown; default 8, of images alone 32.
        overwrite: replace a picture that exists.

    Raises:
        InputError: when the file is not valid or the picture exists.
    """
    out = check_sheet(out_png, overwrite)
    with open_any(path) as file:
        images = isinstance(file, ReferenceFile)
        rows = spread_rows(len(file), columns or (COLUMNS * LINES if images else COLUMNS))
        panels = _panels(file, rows)
        titles = [f"{r}: {file.subjects[r]}" for r in rows]
        turn = file.orientation == "RAS"
        heading = f"{Path(path).name}: {len(rows)} of {len(file)} {'images' if images else 'measurements'}"
    draw(panels, titles, heading, out, turn=turn)
    return out


def _panels(file: MeasurementFile | ReferenceFile, rows: np.ndarray) -> list[Panel]:
    """Rows of the sheet."""
    if isinstance(file, ReferenceFile):
        return [Panel("image", picture(file.images(rows)))]
    panels = [Panel(measured_name(file.operator_name), measured(file, rows))]
    mask = file.mask(rows)
    if float(mask.min()) == 0:
        mask = mask.flatten(1, -3).amax(1) if mask.ndim == 5 else mask.mean(1)
        panels.append(Panel("mask", mask.expand(len(rows), *mask.shape[1:]).numpy(), (0.0, 1.0)))
    return panels


def measured(file: MeasurementFile, rows: np.ndarray) -> np.ndarray:
    """Measurements as images to look at: themselves where they are images, else A^H y."""
    return picture(file.operator(rows).A_adjoint(file.measurements(rows)))


def measured_name(operator: str) -> str:
    """What `measured` shows: images that were measured as they are need no adjoint."""
    return "measured" if operator in ("identity", "masking") else "adjoint"
