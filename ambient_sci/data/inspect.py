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
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output, whole_file

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
    text = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    error = file.attributes.get("noise_std_error")
    if error is not None:
        text += f" (estimated, standard error {float(error):.2g})"
    if file.attributes.get("magnitude"):
        text += "; magnitude images: the noise is Rician, not Gaussian, where the signal is weak"
    return text + " per real channel"


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
    history = file.history.splitlines() or ["not recorded"]
    return lines + [("history" if k == 0 else "", line) for k, line in enumerate(history)]


def check_sheet(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """The path of a picture to be made.

    Raises:
        InputError: another suffix than those of pictures, or a file that exists.
    """
    out = check_output(path, overwrite)
    if out.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise InputError(f"{out}: expected a picture name ending in .png, .pdf, .svg or .jpg")
    return out


def contact_sheet(
    path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    *,
    columns: int = 8,
    overwrite: bool = False,
) -> Path:
    """A picture of up to ``columns`` samples: adjoint images A^H y (magnitude), and their masks if anything
    is missing.

    Raises: InputError when the file is not valid or the picture exists.
    """
    out = check_sheet(out_png, overwrite)
    with open_any(path) as file:
        rows = np.unique(np.linspace(0, len(file) - 1, min(len(file), columns)).astype(int))
        panels = _panels(file, rows)
        titles = [f"{r}: {file.subjects[r]}" for r in rows]
        turn = file.orientation == "RAS"
    draw_sheet(panels, titles, turn, f"{Path(path).name}", out)
    return out


def _panels(file: MeasurementFile | ReferenceFile, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the sheet: name to pictures (n, H, W) or (n, H, W, 3)."""
    if isinstance(file, ReferenceFile):
        return {"image": picture(file.images(rows))}
    operator, y = file.operator(rows), file.measurements(rows)
    panels = {"adjoint": picture(operator.A_adjoint(y))}
    mask = file.mask(rows)
    if float(mask.min()) == 0:
        mask = mask.flatten(1, -3).amax(1) if mask.ndim == 5 else mask.mean(1)
        panels["mask"] = mask.expand(len(rows), *mask.shape[1:]).numpy()
    return panels


def picture(images: Tensor) -> np.ndarray:
    """(B, C, H, W) for display: the magnitude of complex images, colours last for three channels, else the
    channels' mean."""
    if images.shape[1] == 2:
        return images.square().sum(1).sqrt().numpy()
    if images.shape[1] == 3:
        return images.clamp(0, 1).movedim(1, -1).numpy()
    return images.mean(1).numpy()


def draw_sheet(panels: dict[str, np.ndarray], titles: list[str], turn: bool, heading: str, out: Path) -> None:
    """A sheet of pictures as the file ``out``: one row a panel, one column a title; upright with ``turn``."""
    from matplotlib.figure import Figure

    count = len(titles)
    figure = Figure(figsize=(1.6 * count + 0.5, 1.75 * len(panels) + 0.6), layout="constrained")
    axes: Any = figure.subplots(len(panels), count, squeeze=False)
    for row, (name, pictures) in enumerate(panels.items()):
        top = 1.0 if name == "mask" or pictures.ndim == 4 else float(np.percentile(pictures, 99.9)) or 1.0
        low = 0.0 if float(pictures.min()) >= 0 else float(np.percentile(pictures, 0.1))
        for column in range(count):
            axis = axes[row, column]
            # RAS slices have their first axis to the right and their second upwards; masks turn with them.
            shown = np.rot90(pictures[column]) if turn else pictures[column]
            axis.imshow(shown, cmap="gray", vmin=low, vmax=top, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(titles[column], fontsize=7)
        axes[row, 0].set_ylabel(name, fontsize=8)
    figure.suptitle(heading, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as part:
        figure.savefig(part, dpi=110, format=out.suffix[1:].lower())
