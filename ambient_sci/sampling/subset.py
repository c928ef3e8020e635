"""Results of some samples of a measurement file: which they are, what is known of them, and where their
partners are in other files of the same samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ambient_sci.data.exporters import select_geometry
from ambient_sci.errors import InputError
from ambient_sci.sampling.result import made_from

#: subjects, scale, geometry and source, as in `Reconstruction`
About = dict[str, Any]


def parse_indices(text: str) -> list[int]:
    """The numbers of a list like "0:8,12": a number, or FIRST:END or FIRST:END:STEP, END excluded.

    Raises:
        InputError: another text.
    """
    chosen: list[int] = []
    for part in text.split(","):
        part = part.strip()
        if re.fullmatch(r"\d+", part):
            chosen.append(int(part))
        elif re.fullmatch(r"\d+:\d+(:[1-9]\d*)?", part):
            chosen += range(*map(int, part.split(":")))
        else:
            raise InputError(f"indices: expected numbers and ranges like 0:8,12, got {text!r}")
    if not chosen:
        raise InputError(f"indices: expected at least one sample, got none in {text!r}")
    return sorted(set(chosen))


def evenly(num: int, count: int) -> list[int] | None:
    """``num`` of ``count`` samples, the middles of as many equal parts; None: all."""
    return None if num >= count else [(2 * k + 1) * count // (2 * num) for k in range(num)]


def check_indices(indices: Sequence[int] | None, count: int) -> Sequence[int]:
    """Which of ``count`` samples, in ascending order; None: all of them.

    Raises:
        InputError: none, one that does not exist, or one twice.
    """
    if indices is None:
        return range(count)
    if isinstance(indices, range) and indices.step == 1 and 0 <= indices.start < indices.stop <= count:
        return indices
    chosen = sorted(int(i) for i in indices)
    if not chosen or chosen[0] < 0 or chosen[-1] >= count or len(set(chosen)) < len(chosen):
        raise InputError(
            f"indices: expected different samples from 0 to {count - 1}, got {list(indices)[:8]}"
            f"{' ...' if len(indices) > 8 else ''}"
        )
    whole = range(chosen[0], chosen[-1] + 1)
    return whole if len(whole) == len(chosen) else chosen


def about(measurements: Any, chosen: Sequence[int]) -> About:
    """What a result says of the samples ``chosen`` of a measurement file; which they are, where not all."""
    scale = np.asarray(measurements.scale)
    source = made_from(measurements)
    if len(chosen) < len(measurements):
        source["indices"] = list(chosen)
    return {
        "subjects": [measurements.subjects[i] for i in chosen] if measurements.subjects else [],
        "scale": float(scale) if scale.ndim == 0 else scale[list(chosen)],
        "geometry": select_geometry(measurements.geometry, chosen),
        "source": source,
    }


def partners(source: Mapping[str, Any], images: int, count: int) -> list[int] | None:
    """The rows of another file of ``count`` samples that belong to a result of ``images``.

    Returns:
        those that the result was made of, where it is of some of as many; None: all of them, in order.
    """
    chosen = source.get("indices")
    if count == images or not isinstance(chosen, list) or len(chosen) != images:
        return None
    return chosen if count == source.get("samples") else None
