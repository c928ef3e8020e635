"""Where the slices of an ISMRMRD file lie: volumes by index, affines by ``position`` and directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ambient_sci.data.geometry import LPS_TO_RAS, places
from ambient_sci.data.raw import Part
from ambient_sci.data.readers.guard import say
from ambient_sci.data.readers.ismrmrd_header import Encoding
from ambient_sci.errors import InputError

#: Indices that make volumes of their own.
VOLUMES = ("contrast", "phase", "repetition", "set")
DIRECTIONS = ("read_dir", "phase_dir", "slice_dir")


def parts_of(
    heads: np.ndarray,
    slices: np.ndarray,
    number: np.ndarray,
    encoding: Encoding,
    path: Path,
    notes: list[str],
) -> list[Part]:
    """The volumes of the sorted slices, their affines over (readout, phase, slice) of the encoded matrix."""
    first = np.array([np.flatnonzero(number == s)[0] for s in range(len(slices))])
    positions = heads["position"][first].astype(np.float64)
    directions = np.stack([heads[name][first] for name in DIRECTIONS], axis=2).astype(np.float64)
    _check_slices(heads, number, first, path)
    varying = [n for n in range(len(VOLUMES)) if len(np.unique(slices[:, n])) > 1]
    parts: list[Part] = []
    for key in np.unique(slices[:, :-1], axis=0):
        rows = np.flatnonzero((slices[:, :-1] == key).all(axis=1))
        name = "".join(f"_{VOLUMES[n]}{key[n]}" for n in varying)
        parts += _volume_parts(rows, positions, directions, encoding, name, path, notes)
    if varying:
        notes.append(f"volumes by {', '.join(VOLUMES[n] for n in varying)}")
    return parts


def _check_slices(heads: np.ndarray, number: np.ndarray, first: np.ndarray, path: Path) -> None:
    """Every line of a slice lies in the same plane."""
    for name in ("position", *DIRECTIONS):
        difference = np.abs(heads[name] - heads[name][first][number]).max()
        if not difference <= (1e-2 if name == "position" else 1e-3):
            raise InputError(
                f"{path}: lines of one slice differ in {name} by {difference:.4g}; the slice has no one place"
            )


def _volume_parts(
    rows: np.ndarray,
    positions: np.ndarray,
    directions: np.ndarray,
    encoding: Encoding,
    name: str,
    path: Path,
    notes: list[str],
) -> list[Part]:
    """One volume, or one a slice when the slices are no stack (3-D slabs, fans, uneven gaps)."""
    axes = directions[rows]
    first = int(rows[0])
    numbers = np.arange(len(rows))
    if not axes.any():
        notes.append("no directions stated: positions unknown")
        affine = np.diag([*encoding.voxel, 1.0])
        return [Part(first, numbers, len(rows), affine, False, name)]
    gram = axes[0].T @ axes[0]
    if np.abs(gram - np.eye(3)).max() > 1e-2:
        raise InputError(f"{path}: read_dir, phase_dir and slice_dir are not orthonormal")
    slabs = encoding.encoded[2] > 1
    if not slabs and np.abs(axes - axes[0]).max() < 1e-4:
        try:
            found = places(positions[rows], axes[0][:, 2], encoding.voxel[2])
        except InputError as error:
            say(notes, path, f"{error}: each slice is a volume of its own")
        else:
            affine = _affine(axes[0], found.origin, found.step, encoding)
            if found.missing:
                say(notes, path, f"{found.missing} of {found.count} slices of the stack are not in the file")
            return [Part(first, found.numbers, found.count, affine, True, name)]
    parts = []
    for k, row in enumerate(rows):
        affine = _affine(axes[k], positions[row], axes[k][:, 2] * encoding.voxel[2], encoding)
        suffix = name if len(rows) == 1 else f"{name}_slice{k}"
        parts.append(Part(int(row), np.zeros(1, np.int64), 1, affine, True, suffix))
    return parts


def _affine(axes: np.ndarray, position: np.ndarray, step: np.ndarray, encoding: Encoding) -> np.ndarray:
    """RAS affine of one stack: ``position`` is the centre of the encoded field of view, at index n // 2 of
    each encoded axis."""
    columns, height, depth = encoding.encoded
    affine = np.eye(4)
    affine[:3, 0] = axes[:, 0] * encoding.voxel[0]
    affine[:3, 1] = axes[:, 1] * encoding.voxel[1]
    affine[:3, 2] = step
    affine[:3, 3] = position - affine[:3, :3] @ np.array([columns // 2, height // 2, depth // 2])
    return LPS_TO_RAS @ affine
