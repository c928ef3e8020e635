"""ISMRMRD (HDF5): Cartesian acquisitions, 2-D (slices) or 3-D, sorted into k-space.

A readout is placed by what its header says, never by its number in the file:

- along the readout by ``center_sample``, after ``discard_pre`` and ``discard_post`` samples are taken off and
reversed lines turned;
- along the phase encodings by ``idx.kspace_encode_step_1, _2`` and the centre of the encoding limits;
- in the volume by ``position`` and the directions of its slice; each contrast, phase, repetition and set is a
volume of its own.

Lines of one ``average`` index after another are averaged, all lines the same number of times, so that the
noise stays white.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.data.raw import RawScan, slices_along_readout
from ambient_sci.data.readers.guard import (
    check_claim,
    check_lengths,
    hdf5_array,
    hdf5_member,
    listed,
    naming,
    open_hdf5,
    reading,
    say,
)
from ambient_sci.data.readers.ismrmrd_geometry import VOLUMES, parts_of
from ambient_sci.data.readers.ismrmrd_header import Encoding, Header, parse_header
from ambient_sci.errors import InputError

# Acquisition flags, numbered from 1.
_NOISE, _CALIBRATION, _CALIBRATION_AND_IMAGING, _REVERSE = 19, 20, 21, 22
_NOT_IMAGING = {
    23: "navigator",
    24: "phase correction",
    26: "HP feedback",
    27: "dummy",
    28: "RT feedback",
    29: "surface coil correction",
    30: "phase stabilisation reference",
    31: "phase stabilisation",
}
_COMPRESSED = (53, 54, 55, 56)
_SEPARATE_CALIBRATION = ("separate", "external")


def read_ismrmrd(path: Path) -> RawScan:
    """A Cartesian ISMRMRD file.

    Raises: InputError for other trajectories, several data sets, compressed or contradictory acquisitions,
        and damaged files.
    """
    header, records = _load(path)
    # A damaged file may have fields of any type and shape, so any look at one may fail.
    with reading(path, "ISMRMRD file"), naming(path):
        return _scan(header, records, path)


def _scan(header: Header, records: np.ndarray, path: Path) -> RawScan:
    heads = records["head"]
    notes: list[str] = []
    noise = _flagged(heads, _NOISE)
    imaging = _imaging(heads, noise, header, path, notes)
    encoding = header.encodings[int(heads["encoding_space_ref"][imaging][0])]
    _check_alike(heads[imaging], encoding, path)
    scan = _sort(records[imaging], encoding, header, path, notes)
    if noise.any():
        scan.noise = _noise_readouts(records[noise], heads[imaging][0], header, path) / math.sqrt(
            scan.averages
        )
    return scan


def _load(path: Path) -> tuple[Header, np.ndarray]:
    with open_hdf5(path, "ISMRMRD file") as file:
        groups = [
            g
            for n in file
            if isinstance(g := hdf5_member(file, n, path), h5py.Group) and {"xml", "data"} <= set(g)
        ]
        if len(groups) != 1:
            names = [str(g.name) for g in groups]
            raise InputError(f"{path}: expected one ISMRMRD data set, got {listed(names) or 'none'}")
        text = np.atleast_1d(np.asarray(hdf5_array(groups[0], "xml", path)))
        header = parse_header(text[0] if text.size else b"", str(path))
        _check_encodings(header, path)
        data = hdf5_member(groups[0], "data", path)
        if isinstance(data, h5py.Dataset):
            check_lengths(data, path)
        records = hdf5_array(groups[0], "data", path)
        assert records is not None
        fields = records.dtype.names or ()
        if records.ndim != 1 or "head" not in fields or "data" not in fields:
            raise InputError(f"{path}: expected ISMRMRD acquisitions (head, data), got {records.dtype}")
    return header, records


def _check_encodings(header: Header, path: Path) -> None:
    for number, encoding in enumerate(header.encodings):
        if encoding.trajectory != "cartesian" and len(header.encodings) == 1:
            raise InputError(f"{path}: expected a Cartesian trajectory, got {encoding.trajectory}")
        if encoding.multiband > 1:
            raise InputError(
                f"{path}: encoding {number} is multiband ({encoding.multiband} slices at once); not read"
            )


def _flagged(heads: np.ndarray, number: int) -> np.ndarray:
    return (heads["flags"] >> np.uint64(number - 1)) & np.uint64(1) == 1


def _imaging(
    heads: np.ndarray, noise: np.ndarray, header: Header, path: Path, notes: list[str]
) -> np.ndarray:
    """The acquisitions of the image (bool): of the first encoding that has any. What is left out is said."""
    spaces = heads["encoding_space_ref"].astype(int)
    if len(heads) and (spaces[~noise] >= len(header.encodings)).any():
        raise InputError(f"{path}: encoding_space_ref {spaces.max()} has no encoding in the header")
    imaging = ~noise
    for number, name in _NOT_IMAGING.items():
        found = imaging & _flagged(heads, number)
        if found.any():
            notes.append(f"{int(found.sum())} {name} acquisitions left out")
        imaging &= ~found
    separate = np.array([e.calibration in _SEPARATE_CALIBRATION for e in header.encodings])
    calibration = imaging & _flagged(heads, _CALIBRATION) & ~_flagged(heads, _CALIBRATION_AND_IMAGING)
    calibration &= separate[np.minimum(spaces, len(separate) - 1)]
    if calibration.any():
        notes.append(f"{int(calibration.sum())} acquisitions of a separate calibration left out")
    imaging &= ~calibration
    if not imaging.any():
        raise InputError(f"{path}: no imaging acquisition among {len(heads)}")
    first = int(spaces[imaging].min())
    other = imaging & (spaces != first)
    if other.any():
        say(
            notes,
            path,
            f"{int(other.sum())} acquisitions of encoding space {listed(sorted(set(spaces[other])))} left "
            "out, "
            f"the image is that of encoding space {first}",
        )
    return imaging & ~other


def _check_alike(heads: np.ndarray, encoding: Encoding, path: Path) -> None:
    """What must be the same in every line for y = M (F S x + sigma n) to hold."""
    if encoding.trajectory != "cartesian":
        raise InputError(f"{path}: expected a Cartesian trajectory, got {encoding.trajectory}")
    if (heads["trajectory_dimensions"] > 0).any():
        raise InputError(
            f"{path}: acquisitions carry a trajectory of their own; only Cartesian lines are read"
        )
    if any(_flagged(heads, number).any() for number in _COMPRESSED):
        raise InputError(f"{path}: the samples are compressed (ACQ_COMPRESSION); uncompress the file first")
    for name, what in (
        ("active_channels", "coils"),
        ("channel_mask", "active coils"),
        ("sample_time_us", "dwell time (another noise level)"),
        ("patient_table_position", "table position"),
    ):
        values = np.unique(heads[name].reshape(len(heads), -1), axis=0)
        if len(values) > 1 and (values.dtype.kind != "f" or np.ptp(values, axis=0).max() > 1e-3):
            some = listed([v.tolist() if len(v) > 1 else v[0] for v in values])
            raise InputError(f"{path}: expected one {what} ({name}) in every imaging acquisition, got {some}")


def _readout(record: Any, path: Path) -> np.ndarray:
    """One acquisition's samples (coils, samples) complex64, in the order of acquisition, discarded ones taken
    off."""
    head = record["head"]
    coils, samples = int(head["active_channels"]), int(head["number_of_samples"])
    data = np.ascontiguousarray(record["data"], np.float32)
    if data.size != 2 * coils * samples or data.size == 0:
        raise InputError(
            f"{path}: expected {coils} x {samples} samples in acquisition {int(head['scan_counter'])}, "
            f"got {data.size / 2:g}"
        )
    pre, post = int(head["discard_pre"]), int(head["discard_post"])
    if pre + post >= samples:
        raise InputError(
            f"{path}: discard_pre {pre} and discard_post {post} leave nothing of {samples} samples"
        )
    return data.view(np.complex64).reshape(coils, samples)[:, pre : samples - post]


def _noise_readouts(records: np.ndarray, imaging: Any, header: Header, path: Path) -> np.ndarray:
    """Noise readouts (N, n), brought to the bandwidth of the image: variance goes as 1 / dwell time."""
    coils = int(imaging["active_channels"])
    found = []
    for record in records:
        dwell = float(record["head"]["sample_time_us"]), float(imaging["sample_time_us"])
        ratio = dwell[0] / dwell[1] if min(dwell) > 0 else 1.0
        samples = _readout(record, path)
        if len(samples) != coils:
            raise InputError(f"{path}: expected noise of {coils} coils, got {len(samples)}")
        found.append(math.sqrt(ratio / header.noise_bandwidth) * samples)
    return np.concatenate(found, axis=1).astype(np.complex64)


# -- along the readout


@dataclass(frozen=True)
class _Readouts:
    """Lines turned and trimmed, and where each starts in the encoded matrix."""

    samples: list[np.ndarray]
    starts: np.ndarray


def _place_readouts(records: np.ndarray, columns: int, path: Path) -> _Readouts:
    """Every line in order of increasing k, its start from ``center_sample``.

    Writers count the centre of a reversed line either as it was acquired or as it lies after turning. The
    count is taken that fits the matrix and, if both do, that of the lines that are not reversed.
    """
    heads = records["head"]
    reverse = _flagged(heads, _REVERSE)
    samples = [_readout(r, path) for r in records]
    samples = [s[:, ::-1] if backwards else s for s, backwards in zip(samples, reverse, strict=True)]
    options = [
        _starts(h, s.shape[1], b, columns, path) for h, s, b in zip(heads, samples, reverse, strict=True)
    ]
    forward = {o[0] for o, b in zip(options, reverse, strict=True) if not b}
    starts = np.zeros(len(records), np.int64)
    for k, option in enumerate(options):
        chosen = option if len(option) == 1 else [s for s in option if s in forward]
        if len(chosen) != 1:
            raise InputError(
                f"{path}: a reversed readout of {samples[k].shape[1]} samples with center_sample "
                f"{int(heads['center_sample'][k])} "
                f"may start at {option} of {columns}; it cannot be placed"
            )
        starts[k] = chosen[0]
    return _Readouts(samples, starts)


def _starts(head: Any, count: int, backwards: bool, columns: int, path: Path) -> list[int]:
    """Where a line of ``count`` kept samples can start in a matrix of ``columns``."""
    pre, post = int(head["discard_pre"]), int(head["discard_post"])
    stated = int(head["center_sample"])
    if stated == 0 and count < columns:
        # 0 is what writers leave that do not state it; taken at its word it is a readout that begins at the
        # centre.
        raise InputError(
            f"{path}: center_sample 0 in a readout of {count} samples for a matrix of {columns}; it cannot "
            "be placed"
        )
    if stated == 0:
        centres = {count // 2}
    elif backwards:
        # Counted as acquired: the centre from the other end. Counted after turning: as it is, less what was
        # cut in front of it.
        centres = {count - 1 - (stated - pre), stated - post}
    else:
        centres = {stated - pre}
    starts = sorted({columns // 2 - c for c in centres if 0 <= columns // 2 - c <= columns - count})
    if not starts:
        raise InputError(
            f"{path}: an acquisition of {count} samples with center_sample {stated} (discard_pre {pre}) "
            "lies outside the "
            f"encoded matrix of {columns}"
        )
    return starts


# -- into k-space


def _sort(records: np.ndarray, encoding: Encoding, header: Header, path: Path, notes: list[str]) -> RawScan:
    """Every line at its place: volumes (contrast, phase, repetition, set), in them slices, in those lines."""
    heads = records["head"]
    idx = heads["idx"]
    keys = np.stack([idx[k].astype(np.int64) for k in (*VOLUMES, "slice")], axis=1)
    slices, number = np.unique(keys, axis=0, return_inverse=True)
    number = number.ravel()
    columns, height, depth = encoding.encoded
    line = idx["kspace_encode_step_1"].astype(int) + height // 2 - encoding.center[0]
    plane = idx["kspace_encode_step_2"].astype(int) + depth // 2 - encoding.center[1]
    outside = (line < 0) | (line >= height) | (plane < 0) | (plane >= depth)
    if outside.any():
        k = int(np.argmax(outside))
        raise InputError(
            f"{path}: an acquisition at line {line[k]}, partition {plane[k]} lies outside the encoded "
            f"matrix {encoding.encoded}"
        )
    readouts = _place_readouts(records, columns, path)
    coils = len(readouts.samples[0])
    shape = (len(slices), coils, columns, height, depth)
    check_claim(path, shape, 8, sum(s.nbytes for s in readouts.samples), "k-space")
    used = _equally_often(heads, np.stack([number, line, plane], axis=1), path, notes)
    kspace = np.zeros(shape, np.complex64)
    count = np.zeros((len(slices), columns, height, depth), np.int32)
    for k in np.flatnonzero(used):
        at = slice(readouts.starts[k], readouts.starts[k] + readouts.samples[k].shape[1])
        kspace[number[k], :, at, line[k], plane[k]] += readouts.samples[k]
        count[number[k], at, line[k], plane[k]] += 1
    times = np.unique(count[count > 0])
    if len(times) > 1:
        raise InputError(
            f"{path}: expected every sample measured equally often (white noise), got {times.tolist()} times"
        )
    kspace /= float(times[0])
    scan = RawScan(kspace[..., 0], header.patient or path.stem, str(path), readout_size=encoding.readout_size)
    scan.averages, scan.notes = int(times[0]), notes
    parts = parts_of(heads, slices, number, encoding, path, notes)
    mask = count > 0
    if depth > 1:
        # A slab is a volume by itself.
        scan.parts = parts
        return slices_along_readout(scan, kspace, mask)
    scan.parts, scan.mask = parts, mask[..., 0]
    return scan


def _equally_often(heads: np.ndarray, keys: np.ndarray, path: Path, notes: list[str]) -> np.ndarray:
    """Which lines are used (bool), so that each place is measured equally often: imaging lines before lines
    of a calibration, earlier ones before later ones.

    Raises: InputError when lines at one place differ in ``segment`` or ``user`` indices: they may be
        different things.
    """
    calibration = _flagged(heads, _CALIBRATION) & ~_flagged(heads, _CALIBRATION_AND_IMAGING)
    order = np.lexsort((np.arange(len(keys)), calibration, *keys.T[::-1]))
    same = np.r_[False, (np.diff(keys[order], axis=0) == 0).all(axis=1)]
    start = np.flatnonzero(~same)
    rank = np.arange(len(order)) - np.repeat(start, np.diff(np.r_[start, len(order)]))
    # Lines of a calibration beside imaging ones of the same place are the same line acquired for another
    # purpose.
    images_there = np.repeat(~calibration[order][start], np.diff(np.r_[start, len(order)]))
    again = calibration[order] & images_there
    totals = np.add.reduceat(~again, start)
    least = int(totals.min())
    kept = ~again & (rank < least)
    used = np.zeros(len(keys), bool)
    used[order[kept]] = True
    _check_repeats(heads, keys, used, order[start], path)
    if not used.all():
        say(
            notes,
            path,
            f"{int((~used).sum())} of {len(used)} lines were measured again (reference lines, further "
            "averages) and are left out: "
            f"every line is used {least} times",
        )
    return used


def _check_repeats(
    heads: np.ndarray, keys: np.ndarray, used: np.ndarray, first: np.ndarray, path: Path
) -> None:
    if used.sum() == len(first):
        return
    for name in ("segment", "user"):
        values = heads["idx"][name].reshape(len(heads), -1)
        reference = {tuple(keys[k]): values[k] for k in first}
        if any((values[k] != reference[tuple(keys[k])]).any() for k in np.flatnonzero(used)):
            raise InputError(
                f"{path}: lines at one place differ in idx.{name}; it is unknown whether they may be averaged"
            )
