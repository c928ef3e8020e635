"""Looking at images and results: `plot`, and small pictures of them in a notebook.

Ground floor: knows tensors and matplotlib, and results by their attributes. Complex images (two channels) are
shown as magnitudes, images of three channels in colour. One gray window serves all images of a figure,
standard deviation and error share one colour scale. Nothing global is touched: figures are matplotlib's, made
without pyplot, so that they show themselves where a notebook's cell ends with one, and write themselves by
``figure.savefig``.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ambient_sci.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

#: Columns on the colour scale of standard deviations instead of the gray window.
SPREAD = ("std", "|error|")
#: Rows of a figure, and images of a notebook's picture, at most.
ROWS, SMALL = 6, 4


def plot(
    what: Any,
    *,
    titles: Sequence[str] | None = None,
    rows: int = ROWS,
    indices: Sequence[int] | None = None,
    **options: Any,
) -> Figure:
    """A figure of images, or of a result.

    Args:
        what: a `Reconstruction` (see `Reconstruction.plot`, which takes the ``options``); or images (B, C, H,
            W) or (C, H, W), a tensor or a NumPy array; a list of such; or a mapping of titles to them, one
            column each.
        titles: of the columns, where ``what`` has none.
        rows: images shown at most, evenly spread.
        indices: which images to show instead.

    Returns:
        the figure; ``figure.savefig(path)`` writes it.

    Raises:
        InputError: no images, or columns of different numbers of images.
    """
    if hasattr(what, "plot") and hasattr(what, "mean") and not hasattr(what, "storage"):
        return what.plot(rows=rows, indices=indices, **options)
    if options:
        raise InputError(f"plot: expected {', '.join(options)} only with a reconstruction, got images")
    if isinstance(what, Mapping):
        columns = {str(name): as_batch(images, str(name)) for name, images in what.items()}
    else:
        given = list(what) if isinstance(what, (list, tuple)) else [what]
        names = list(titles or ([""] if len(given) == 1 else [str(k) for k in range(len(given))]))
        if len(names) != len(given):
            raise InputError(f"plot: expected a title for each of {len(given)} columns, got {len(names)}")
        columns = {
            name: as_batch(images, name or "images") for name, images in zip(names, given, strict=True)
        }
    if len(columns) == 1 and titles is None and not isinstance(what, Mapping):
        return grid(next(iter(columns.values())), rows, indices)
    return table(columns, rows=rows, indices=indices)


def plot_result(
    result: Any,
    *,
    truth: Any = None,
    measured: Any = None,
    samples: int = 2,
    rows: int = ROWS,
    indices: Sequence[int] | None = None,
) -> Figure:
    """What `Reconstruction.plot` shows; see there."""
    mean = as_batch(result.mean, "mean")
    columns: dict[str, Any] = {}
    for name, images in (("truth", truth), ("measured", measured)):
        if images is not None:
            columns[name] = as_batch(images, name)
            if len(columns[name]) != len(mean):
                raise InputError(f"plot: expected {len(mean)} images as {name}, got {len(columns[name])}")
    columns["mean"] = mean
    several = len(result.samples) > 1
    if several:
        columns["std"] = spread(result.std)
        for k in range(min(samples, len(result.samples))):
            columns[f"sample {k + 1}"] = as_batch(result.samples[k], "samples")
    if truth is not None:
        here, there = tuple(mean.shape[-2:]), tuple(columns["truth"].shape[-2:])
        if here != there:
            raise InputError(f"plot: expected a truth of {here} pixels, got {there}")
        same = columns["truth"].shape == mean.shape
        difference = mean - columns["truth"] if same else gray(mean) - gray(columns["truth"])
        columns["|error|"] = difference.square().sum(1, keepdim=True).sqrt()
    subjects = list(result.subjects) or None
    return table(columns, rows=rows, indices=indices, labels=subjects)


# -- figures -------------------------------------------------------------------------------------------------


def table(
    columns: Mapping[str, Tensor],
    *,
    rows: int = ROWS,
    indices: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """One row an image, one column a name; columns named as in `SPREAD` on one colour scale of their own."""
    counts = {name: len(images) for name, images in columns.items()}
    if not counts or len(set(counts.values())) > 1 or not min(counts.values()):
        raise InputError(f"plot: expected columns of equally many images, got {counts or 'none'}")
    chosen = _chosen(next(iter(counts.values())), rows, indices)
    shown = {name: images[chosen] for name, images in columns.items()}
    plain = [gray(images) for name, images in shown.items() if name not in SPREAD]
    low, high = window(plain)
    top = max([_upper(images) for name, images in shown.items() if name in SPREAD] or [1.0])
    figure = new_figure(1.75 * len(columns) + 0.5, 1.75 * len(chosen) + 0.35)
    cells = figure.subplots(len(chosen), len(columns), squeeze=False)
    drawn = None
    for column, (name, images) in enumerate(shown.items()):
        for row, axes in enumerate(cells[:, column]):
            spread = name in SPREAD
            scale = (0.0, top) if spread else (low, high)
            picture = _show(axes, images[row], *scale, "magma" if spread else "gray")
            drawn = picture if spread else drawn
            if row == 0 and name:
                axes.set_title(name, fontsize=10)
            if column == 0 and labels is not None:
                axes.set_ylabel(str(labels[chosen[row]]), fontsize=8)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=cells, fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=8)
    return figure


def grid(images: Tensor, count: int = ROWS, indices: Sequence[int] | None = None) -> Figure:
    """Images side by side."""
    chosen = _chosen(len(images), max(4 * count, 1), indices)
    low, high = window([gray(images[chosen])])
    width = min(len(chosen), 6)
    height = -(-len(chosen) // width)
    figure = new_figure(1.75 * width + 0.1, 1.75 * height + 0.1)
    for place, axes in enumerate(figure.subplots(height, width, squeeze=False).flat):
        if place < len(chosen):
            _show(axes, images[chosen[place]], low, high, "gray")
        else:
            axes.set_axis_off()
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, that no window or list of pyplot knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _show(axes: Any, image: Tensor, low: float, high: float, colours: str) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if image.shape[0] == 3:
        scaled = ((image - low) / max(high - low, 1e-12)).clamp(0, 1)
        return axes.imshow(scaled.movedim(0, -1).numpy(), interpolation="nearest")
    return axes.imshow(
        gray(image[None])[0, 0].numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest"
    )


# -- images --------------------------------------------------------------------------------------------------


def as_batch(images: Any, name: str) -> Tensor:
    """Images (B, C, H, W) on the CPU in float32, from a tensor or an array of them or of one.

    Raises:
        InputError: another shape, or values that are not finite.
    """
    import torch

    found = torch.as_tensor(images).detach().cpu()
    found = torch.view_as_real(found).movedim(-1, -3) if found.is_complex() else found
    if found.ndim == 2:
        found = found[None]
    found = (found[None] if found.ndim == 3 else found).float()
    if found.ndim != 4 or found.numel() == 0:
        raise InputError(f"plot: expected {name} (B, C, H, W), got {tuple(found.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"plot: expected finite {name}, got NaN or infinity")
    return found


def spread(std: Any) -> Tensor:
    """Standard deviation of the channels together, (B, 1, H, W): sqrt of the sum of their squares."""
    return as_batch(std, "std").square().sum(1, keepdim=True).sqrt()


def gray(images: Tensor) -> Tensor:
    """(B, 1, H, W): magnitude of two channels, mean of others."""
    if images.shape[1] == 2:
        return images.square().sum(1, keepdim=True).sqrt()
    return images.mean(1, keepdim=True)


def window(images: Sequence[Tensor]) -> tuple[float, float]:
    """Black and white of a figure: from 0 (from the lowest thousandth where values are negative) to the
    99.5th percentile of the first column, so that noise in the others does not darken it."""
    if not images:
        return 0.0, 1.0
    first = images[0].flatten().sort().values
    low = min(float(first[int(0.001 * (len(first) - 1))]), 0.0)
    return low, max(float(first[int(0.995 * (len(first) - 1))]), low + 1e-12)


def _upper(images: Tensor) -> float:
    values = images.flatten().sort().values
    return max(float(values[int(0.995 * (len(values) - 1))]), 1e-12)


def _chosen(count: int, rows: int, indices: Sequence[int] | None) -> list[int]:
    if indices is None:
        if rows < 1:
            raise InputError(f"plot: expected at least 1 row, got {rows}")
        shown = min(count, rows)
        return sorted({round(k * (count - 1) / max(shown - 1, 1)) for k in range(shown)})
    chosen = [int(i) for i in indices]
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise InputError(f"plot: expected indices from 0 to {count - 1}, got {chosen[:8]}")
    return chosen


# -- notebooks -----------------------------------------------------------------------------------------------


def html_of(text: str, columns: Mapping[str, Tensor] | None = None) -> str:
    """A line of text, and a small picture of a few images under it."""
    line = f"<code>{html.escape(text)}</code>"
    if not columns:
        return line
    figure = table(columns, rows=SMALL)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=60)
    picture = base64.b64encode(written.getvalue()).decode()
    return f'{line}<br><img alt="{html.escape(text)}" src="data:image/png;base64,{picture}">'
