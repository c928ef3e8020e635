"""Slices of real heads that ship with the library (sources and licences: ``assets/README.md``)."""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np
import torch
from torch import Tensor

from ambient_sci.errors import InputError


def brains(which: str = "train") -> tuple[Tensor, list[str]]:
    """T1-weighted magnitude slices, 64 x 64 px, and the person each shows.

    ``"train"``: Colin27, one person, axial, coronal and sagittal slices with more than 15 % foreground.
    ``"test"``: three other people (two patients with tumours, axial, and one sagittal slice). Real anatomy:
    coil maps, phase, noise and undersampling of any scan made of them are simulated.

    Returns: images (N, 1, 64, 64) float32, the 99.9th percentile of each person's volume = 1 (a few pixels
    exceed it); subjects, a list of N names. Slices are in RAS axes, upright with ``np.rot90``.

    Raises: InputError for another name.
    """
    if which not in ("train", "test"):
        raise InputError(f"brains: expected 'train' or 'test', got {which!r}")
    with (
        as_file(files("ambient_sci.data") / "assets" / "brains64.npz") as path,
        np.load(path, allow_pickle=False) as data,
    ):
        stored, steps = data[f"{which}_images"], data[f"{which}_steps"]
        subjects = [str(s) for s in data[f"{which}_subjects"]]
    images = stored.astype(np.float32) * steps.astype(np.float32)[:, None, None]
    return torch.from_numpy(images[:, None]), subjects
