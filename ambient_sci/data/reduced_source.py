"""Images of a source after a `Reduction`: patches, crops and the like, read lazily, each with its origin."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.geometry import zooming
from ambient_sci.data.image_source import ImageSource
from ambient_sci.data.origins import Origin, origins_of, record
from ambient_sci.data.readers.guard import listed, one_line, say
from ambient_sci.data.reductions import Plan, Reduction
from ambient_sci.errors import InputError

#: Reduced images that are kept while their patches are read.
_KEPT = 2


def reduced(source: ImageSource, reduction: Reduction) -> ImageSource:
    """The images that a source becomes, with notes on what was done and dropped.

    Every patch is of the subject whose image it comes from; the images of a source whose subjects are unknown
    are a subject each.

    Args:
        source: images, of one size or (where ``source.shape_of`` says so) of several.
        reduction: what is done.

    Raises:
        InputError: images that do not fit the reduction, of which nothing is left, or whose results differ in
            shape.
    """
    if not reduction:
        return source
    plans = _plans(source, reduction)
    rows = [(k, p) for k, plan in enumerate(plans) if plan is not None for p in range(len(plan.corners))]
    first = next(p for p in plans if p is not None)
    found = replace(source, image_shape=first.shape, shape_of=None)
    subjects = _subjects(source, reduction)
    found.subjects = [subjects[k] for k, _ in rows]
    found.read = _Reader(source, reduction, rows)
    factors = np.array([1.0 if plan is None else plan.factor for plan in plans])
    image = np.array([k for k, _ in rows])
    found.noise_factor = factors[image] if len(set(factors)) > 1 else float(factors[0])
    if isinstance(source.scale, np.ndarray):
        found.scale = source.scale[image]
    if isinstance(source.noise_std, np.ndarray):
        found.noise_std = source.noise_std[image]
    if source.noise_group is not None:
        found.noise_group = source.noise_group[image]
    if source.labels is not None:
        found.labels = source.labels[image]
    found.eight_bits = None
    found.geometry = _geometry(source, reduction, plans, rows)
    _say(found, plans, len(rows))
    return found


def _plans(source: ImageSource, reduction: Reduction) -> list[Plan | None]:
    made: dict[tuple[int, ...], Plan | None] = {}
    plans = []
    for k in range(len(source)):
        shape = source.image_shape if source.shape_of is None else source.shape_of(k)
        if shape not in made:
            made[shape] = reduction.plan(shape, _name(source, k))
        plans.append(made[shape])
    small = [k for k, p in enumerate(plans) if p is None]
    if len(small) == len(plans):
        raise InputError(
            f"{source.origin}: patch: expected at most {min(source.image_shape[1:])} pixels, got "
            f"{reduction.patch}"
        )
    if small:
        say(
            source.notes,
            source.origin,
            f"{len(small)} of {len(plans)} images are smaller than a patch and are left out: "
            f"{listed([_name(source, k) for k in small])}",
        )
    shapes = {p.shape: k for k, p in reversed(list(enumerate(plans))) if p is not None}
    if len(shapes) > 1:
        (a, i), (b, j) = list(shapes.items())[:2]
        raise InputError(
            f"{source.origin}: mixed images, {_name(source, i)} becomes {a} and {_name(source, j)} {b} "
            "(channels, "
            "height, width); --crop H W or --patch makes sizes equal, --grey channels"
        )
    return plans


def _name(source: ImageSource, row: int) -> str:
    return source.names[row] if source.names else f"{source.origin}: image {row}"


def _subjects(source: ImageSource, reduction: Reduction) -> list[str]:
    """The subject of each image. Patches of one image are of one subject: parts of a split share no image."""
    if reduction.patch is None or len(source) == 1 or len(set(source.subjects)) > 1:
        return source.subjects
    known = "image" if source.subjects[0] == "unknown" else source.subjects[0]
    return [one_line(f"{known} {k}", 200) for k in range(len(source))]


class _Reader:
    """Reads rows of the reduced images; picklable as long as the source is."""

    def __init__(self, source: ImageSource, reduction: Reduction, rows: list[tuple[int, int]]) -> None:
        self.source, self.reduction, self.rows = source, reduction, rows
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, rows: np.ndarray) -> Tensor:
        cut = [self.reduction.cut(self._image(k), p) for k, p in (self.rows[int(r)] for r in rows)]
        return torch.from_numpy(np.stack(cut))

    def _image(self, number: int) -> np.ndarray:
        if number not in self._kept:
            image = self.source.read(np.array([number]))[0].numpy()
            self._kept[number] = self.reduction.reduced(image)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[number]


def _geometry(
    source: ImageSource, reduction: Reduction, plans: list[Plan | None], rows: list[tuple[int, int]]
) -> dict[str, Any]:
    """Affines follow crops and zooms; patches are no volumes any more, but say where they are from."""
    before = origins_of(source.geometry) or _of_volumes(source)
    kept = {k: v for k, v in source.geometry.items() if k not in ("volumes", "pictures")}
    if reduction.patch is None and source.geometry.get("volumes"):
        plan = plans[0]
        assert plan is not None
        kept["volumes"] = [_volume(v, plan) for v in source.geometry["volumes"]]
        return kept
    if not before:
        before = [Origin(source.origin, k, 0, 0, *source.image_shape[1:]) for k in range(len(source))]
    origins = []
    for k, p in rows:
        plan, from_ = plans[k], before[k]
        assert plan is not None
        y, x = plan.corners[p]
        origins.append(from_._replace(y=from_.y + y, x=from_.x + x))
    facts = {k: v for k, v in source.geometry.get("pictures", {}).items() if k in ("stacks", "dtype")}
    files = source.geometry.get("pictures", {}).get("files") or list(dict.fromkeys(o.file for o in before))
    zoom = next(p.zoom for p in plans if p is not None)
    facts |= {"zoom": zoom, "patch": reduction.patch, "stride": reduction.stride or reduction.patch}
    return kept | {"pictures": record(files, origins, **{k: v for k, v in facts.items() if v is not None})}


def _of_volumes(source: ImageSource) -> list[Origin]:
    height, width = source.image_shape[1:]
    volumes = source.geometry.get("volumes") or []
    found = [Origin(str(v["name"]), int(k), 0, 0, height, width) for v in volumes for k in v["slices"]]
    return found if len(found) == len(source) else []


def _volume(volume: dict[str, Any], plan: Plan) -> dict[str, Any]:
    axes = [a for a in range(3) if a != int(volume["axis"])]
    affine, shape = np.asarray(volume["affine"], dtype=np.float64), list(volume["shape"])
    for axis, corner, size in zip(axes, plan.corners[0], plan.shape[1:], strict=True):
        affine, shape[axis] = affine @ zooming(axis, corner, plan.zoom), size
    return {**volume, "affine": affine.tolist(), "shape": shape}


def _say(found: ImageSource, plans: list[Plan | None], count: int) -> None:
    steps = [s for plan in plans if plan is not None for s in plan.steps]
    found.notes += list(dict.fromkeys(steps))
    kept = [p for p in plans if p is not None]
    if any(p.corners != [(0, 0)] and len(p.corners) > 1 for p in kept) or len(kept) != count:
        found.notes.append(f"{count} patches of {len(kept)} images")
    dropped = float(np.mean([p.dropped for p in kept]))
    if dropped > 0:
        say(
            found.notes,
            found.origin,
            f"{100 * dropped:.2g} % of the pixels are in no image (borders and crops)",
        )
