"""What a TIFF says besides its pixels: channels, axes and resolution, in ImageJ's and OME's words."""

from __future__ import annotations

import math
import re
from typing import Any


def about_of(file: Any) -> dict[str, Any]:
    """Axes, shape and type of a TIFF, and resolution, unit and spacing where it says so."""
    series = file.series[0]
    about: dict[str, Any] = {"axes": series.axes, "shape": list(series.shape), "dtype": str(series.dtype)}
    page = file.pages[0]
    ratios = [tag(page, code, None) for code in (282, 283)]
    unit = {2: "inch", 3: "cm"}.get(int(tag(page, 296, 1)), "")
    meta = file.imagej_metadata or {}
    unit, spacing = str(meta.get("unit", unit)), meta.get("spacing")
    if unit and all(isinstance(r, tuple) and len(r) == 2 and r[0] > 0 and r[1] > 0 for r in ratios):
        about |= {"resolution": [r[0] / r[1] for r in ratios], "unit": unit}
    if isinstance(spacing, (int, float)) and math.isfinite(spacing):
        about["spacing"] = float(spacing)
    return about | ome_sizes(file)


def tag(page: Any, code: int, default: Any) -> Any:
    """The value of a tag of a page, or a default."""
    found = page.tags.get(code) if hasattr(page, "tags") else None
    return default if found is None else found.value


def channel_names(file: Any) -> list[str]:
    """What an ImageJ or OME file calls its channels, if it does."""
    labels = (file.imagej_metadata or {}).get("Labels")
    if file.is_ome:
        channels = re.findall(r"<(?:\w+:)?Channel\b[^>]*>", file.ome_metadata or "")
        found = [re.search(r'\bName="([^"]*)"', c) for c in channels]
        return [f.group(1) for f in found if f] if all(found) else []
    return [str(x) for x in labels] if isinstance(labels, list) and len(labels) < 9 else []


def pixels(file: Any) -> str:
    """The element of an OME file that says how large its images are."""
    found = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", file.ome_metadata or "")
    return found.group(0) if found else ""


def ome_sizes(file: Any) -> dict[str, Any]:
    """Pixel sizes of an OME file, as resolution (pixels per unit), unit, and the spacing of depths."""
    if not file.is_ome:
        return {}
    said = dict(re.findall(r'\b(PhysicalSize\w+)="([^"]*)"', pixels(file)))
    try:
        sizes = [float(said[f"PhysicalSize{a}"]) for a in "XY" if f"PhysicalSize{a}" in said]
        depth = float(said["PhysicalSizeZ"]) if "PhysicalSizeZ" in said else None
    except ValueError:
        return {}
    unit = said.get("PhysicalSizeXUnit", "um").replace("\u00b5", "u").replace("\u03bc", "u")
    found: dict[str, Any] = {}
    if len(sizes) == 2 and min(sizes) > 0:
        found |= {"resolution": [1 / s for s in sizes], "unit": unit}
    return found | ({"spacing": depth} if depth is not None else {})
