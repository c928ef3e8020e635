"""Raw MR scans as scanners and toolboxes write them: fastMRI HDF5, ISMRMRD, BART cfl/hdr.

Every reader returns a ``RawScan``: Cartesian k-space (S, N, H, W) of S slices and N coils, zero frequency at
index n // 2, H the readout; where it was sampled; and whatever else the file says (noise readouts,
oversampling, geometry). Scans with a second phase-encoding direction are transformed along the readout, which
makes slices of them.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ambient_sci.errors import InputError

# ISMRMRD acquisition flags, numbered from 1.
_NOISE, _CALIBRATION, _CALIBRATION_AND_IMAGING, _REVERSE = 19, 20, 21, 22
_NOT_IMAGING = (
    23,
    24,
    26,
    27,
    28,
    29,
)  # navigator, phase correction, HP feedback, dummy, RT feedback, surface coil
_SEPARATE_CALIBRATION = ("separate", "external")


@dataclass
class RawScan:
    """One acquisition. ``noise``: noise readouts (N, n). ``noise_std``: per real channel, in the units of
    ``kspace``."""

    kspace: np.ndarray
    subject: str
    origin: str
    mask: np.ndarray | None = None
    noise: np.ndarray | None = None
    noise_std: float | None = None
    coil_maps: np.ndarray | None = None
    #: samples of the readout (axis H) that remain when its oversampling is removed; None: there is none
    readout_size: int | None = None
    affine: np.ndarray | None = None
    #: acquisitions that were averaged; ``noise`` is that of their mean
    averages: int = 1
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Header:
    """What an ISMRMRD XML header says about the first encoding; sizes are (x readout, y, z)."""

    encoded: tuple[int, int, int]
    recon: tuple[int, int, int]
    encoded_fov: tuple[float, float, float]
    recon_fov: tuple[float, float, float]
    center: tuple[int, int]
    trajectory: str
    calibration: str
    patient: str | None
    noise_bandwidth: float

    @property
    def readout_size(self) -> int | None:
        """Readout samples within the reconstructed field of view, None when it is not oversampled."""
        ratio = self.recon_fov[0] / self.encoded_fov[0] if self.encoded_fov[0] > 0 else 1.0
        size = 2 * round(self.encoded[0] * ratio / 2)
        return size if 0 < size < self.encoded[0] else None


def parse_header(text: str | bytes, origin: str) -> Header:
    """An ISMRMRD XML header. InputError when it is not one."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"{origin}: the ISMRMRD header is not XML ({error})") from None

    def find(path: str) -> str | None:
        node = root.find("/".join("{*}" + part for part in path.split("/")))
        return node.text.strip() if node is not None and node.text else None

    def numbers(path: str, default: float) -> tuple[float, float, float]:
        x, y, z = (float(find(f"{path}/{axis}") or default) for axis in "xyz")
        return x, y, z

    def sizes(path: str) -> tuple[int, int, int]:
        x, y, z = numbers(path, 0)
        return int(x), int(y), max(int(z), 1)

    encoded = sizes("encoding/encodedSpace/matrixSize")
    if min(encoded) < 1:
        raise InputError(f"{origin}: expected an encoded matrix size in the ISMRMRD header, got {encoded}")
    limits = [f"encoding/encodingLimits/kspace_encoding_step_{k}/center" for k in (1, 2)]
    return Header(
        encoded,
        sizes("encoding/reconSpace/matrixSize"),
        numbers("encoding/encodedSpace/fieldOfView_mm", 0),
        numbers("encoding/reconSpace/fieldOfView_mm", 0),
        (int(find(limits[0]) or encoded[1] // 2), int(find(limits[1]) or encoded[2] // 2)),
        (find("encoding/trajectory") or "cartesian").lower(),
        (find("encoding/parallelImaging/calibrationMode") or "").lower(),
        find("subjectInformation/patientID"),
        float(find("acquisitionSystemInformation/relativeReceiverNoiseBandwidth") or 1),
    )


def centred_fft(array: np.ndarray, axis: int, inverse: bool = False) -> np.ndarray:
    """Centred orthonormal Fourier transform along one axis, complex64."""
    import scipy.fft

    transform = scipy.fft.ifft if inverse else scipy.fft.fft
    moved = scipy.fft.ifftshift(array, axes=axis)
    return scipy.fft.fftshift(transform(moved, axis=axis, norm="ortho"), axes=axis).astype(np.complex64)


def read_fastmri(path: Path) -> RawScan:
    """A fastMRI file: ``kspace`` (S, N, H, W) or (S, H, W), ``ismrmrd_header``, and ``mask`` (W,) of test
    files.

    Raises: InputError for missing keys, real k-space, or an order of axes that contradicts the header.
    """
    try:
        with h5py.File(path, "r") as file:
            kspace = np.asarray(file["kspace"])
            mask = np.asarray(file["mask"]) if "mask" in file else None
            header = file["ismrmrd_header"][()] if "ismrmrd_header" in file else None
            patient = file.attrs.get("patient_id")
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable fastMRI file ({' '.join(str(error).split())})") from None
    if kspace.dtype.kind != "c" or kspace.ndim not in (3, 4):
        raise InputError(
            f"{path}: expected complex kspace (slices, coils, H, W) or (slices, H, W), got {kspace.dtype} {kspace.shape}"
        )
    scan = RawScan(kspace if kspace.ndim == 4 else kspace[:, None], path.stem, str(path))
    if patient is not None:
        scan.subject = patient.decode() if isinstance(patient, bytes) else str(patient)
    if header is not None:
        parsed = parse_header(header, str(path))
        if kspace.shape[-2] != parsed.encoded[0]:
            raise InputError(
                f"{path}: expected the readout of {parsed.encoded[0]} samples on axis -2 of kspace, got shape {kspace.shape}; "
                "is the order of axes (slices, coils, readout, phase)?"
            )
        scan.readout_size = parsed.readout_size
        scan.affine = _voxel_affine(parsed, scan.kspace.shape)
    if mask is not None:
        if mask.size != kspace.shape[-1]:
            raise InputError(f"{path}: expected a mask of {kspace.shape[-1]} columns, got {mask.shape}")
        scan.mask = np.broadcast_to(mask.reshape(1, 1, -1) != 0, (1, *kspace.shape[-2:]))
    return scan


def _voxel_affine(header: Header, shape: tuple[int, ...]) -> np.ndarray:
    """Voxel sizes without position: all that fastMRI files say about geometry."""
    x, y, z = header.recon_fov
    rows = header.readout_size or shape[-2]
    spacing = (x / rows, header.encoded_fov[1] / shape[-1], z)
    return np.diag([s if s > 0 else 1.0 for s in spacing] + [1.0])


def read_ismrmrd(path: Path) -> RawScan:
    """A Cartesian ISMRMRD file, 2-D (slices) or 3-D; averages are averaged, further repetitions become
    further slices.

    Raises: InputError for other trajectories, missing data, or lines measured a different number of times.
    """
    try:
        with h5py.File(path, "r") as file:
            group = next(g for g in file.values() if isinstance(g, h5py.Group) and {"xml", "data"} <= set(g))
            header = parse_header(np.atleast_1d(np.asarray(group["xml"]))[0], str(path))
            records = np.asarray(group["data"])
    except (OSError, KeyError, StopIteration) as error:
        raise InputError(f"{path}: not a readable ISMRMRD file ({' '.join(str(error).split())})") from None
    if header.trajectory != "cartesian":
        raise InputError(f"{path}: expected a Cartesian trajectory, got {header.trajectory}")
    heads = records["head"]

    def flagged(number: int) -> np.ndarray:
        return (heads["flags"] >> np.uint64(number - 1)) & np.uint64(1) == 1

    noise = flagged(_NOISE)
    imaging = ~noise & ~np.any([flagged(n) for n in _NOT_IMAGING], axis=0)
    if header.calibration in _SEPARATE_CALIBRATION:
        imaging &= ~flagged(_CALIBRATION) | flagged(_CALIBRATION_AND_IMAGING)
    if not imaging.any():
        raise InputError(f"{path}: no imaging acquisition among {len(heads)}")
    scan = _sort_acquisitions(records[imaging], flagged(_REVERSE)[imaging], header, path)
    if noise.any():
        factor = _noise_factor(heads[noise][0], heads[imaging][0], header) / math.sqrt(scan.averages)
        scan.noise = factor * np.concatenate([_readout(r) for r in records[noise]], axis=1)
    return scan


def _readout(record: Any) -> np.ndarray:
    """One acquisition's samples, (coils, samples) complex64."""
    coils, samples = int(record["head"]["active_channels"]), int(record["head"]["number_of_samples"])
    return np.ascontiguousarray(record["data"], np.float32).view(np.complex64).reshape(coils, samples)


def _noise_factor(noise: Any, imaging: Any, header: Header) -> float:
    """Noise readouts of another bandwidth, brought to that of the image: variance goes as 1 / dwell time."""
    dwell = float(noise["sample_time_us"]), float(imaging["sample_time_us"])
    ratio = dwell[0] / dwell[1] if min(dwell) > 0 else 1.0
    return math.sqrt(ratio / header.noise_bandwidth)


def _sort_acquisitions(records: np.ndarray, reverse: np.ndarray, header: Header, path: Path) -> RawScan:
    """Place every readout at its line, slice and repetition."""
    heads = records["head"]
    idx = heads["idx"]
    coils = int(heads["active_channels"][0])
    if (heads["active_channels"] != coils).any():
        raise InputError(
            f"{path}: expected {coils} coils in every acquisition, got {set(heads['active_channels'])}"
        )
    keys = np.stack([idx[k] for k in ("slice", "contrast", "phase", "repetition", "set")], axis=1)
    volumes, number = np.unique(keys, axis=0, return_inverse=True)
    columns, height, depth = header.encoded
    kspace = np.zeros((len(volumes), coils, columns, height, depth), np.complex64)
    count = np.zeros((len(volumes), columns, height, depth), np.int32)
    for record, volume, backwards in zip(records, number.ravel(), reverse, strict=True):
        samples = _readout(record)[:, :: -1 if backwards else 1]
        head = record["head"]
        centre = int(head["center_sample"]) or samples.shape[1] // 2
        start = columns // 2 - centre
        line = int(head["idx"]["kspace_encode_step_1"]) + height // 2 - header.center[0]
        plane = int(head["idx"]["kspace_encode_step_2"]) + depth // 2 - header.center[1]
        if not (0 <= start <= columns - samples.shape[1] and 0 <= line < height and 0 <= plane < depth):
            raise InputError(
                f"{path}: an acquisition of {samples.shape[1]} samples at line {line}, partition {plane} lies outside the encoded "
                f"matrix {header.encoded}"
            )
        kspace[volume, :, start : start + samples.shape[1], line, plane] += samples
        count[volume, start : start + samples.shape[1], line, plane] += 1
    times = np.unique(count[count > 0])
    if len(times) > 1:
        raise InputError(
            f"{path}: expected every line measured equally often (white noise), got {times.tolist()} times"
        )
    kspace /= float(times[0])
    affine = _scanner_affine(heads, idx["slice"], header)
    scan = RawScan(
        kspace[..., 0],
        header.patient or path.stem,
        str(path),
        affine=affine,
        readout_size=header.readout_size,
    )
    scan.averages = int(times[0])
    mask = count > 0
    if depth == 1:
        scan.mask = mask[..., 0]
        return scan
    return _slices_along_readout(scan, kspace, mask, header.readout_size)


def _slices_along_readout(scan: RawScan, kspace: np.ndarray, mask: np.ndarray, size: int | None) -> RawScan:
    """3-D k-space (V, N, X, Y, Z) with full readouts as V X slices (Y, Z): the transform along X is a unitary
    sum of its own."""
    lines = mask.any(axis=1)
    if (mask != lines[:, None]).any():
        raise InputError(f"{scan.origin}: expected full readouts in a 3-D scan, got a partial echo")
    hybrid = crop_centre(centred_fft(kspace, axis=2, inverse=True), axis=2, size=size or kspace.shape[2])
    scan.kspace = np.ascontiguousarray(
        np.moveaxis(hybrid, 2, 1).reshape(-1, hybrid.shape[1], *hybrid.shape[3:])
    )
    scan.mask = np.repeat(lines, hybrid.shape[2], axis=0)
    scan.readout_size, scan.affine = None, None
    scan.notes.append("3-D scan cut into slices along the readout")
    return scan


def crop_centre(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The central ``size`` entries of an axis, the centre (index n // 2) kept at index size // 2."""
    start = array.shape[axis] // 2 - size // 2
    return np.take(array, np.arange(start, start + size), axis=axis)


def _scanner_affine(heads: np.ndarray, slice_number: np.ndarray, header: Header) -> np.ndarray | None:
    """Affine of the volume (H, W, S) in RAS millimetres, from slice positions and directions; None when they
    are not given."""
    first = heads[np.argmin(slice_number)]
    directions = np.stack([first["read_dir"], first["phase_dir"], first["slice_dir"]], axis=1).astype(
        np.float64
    )
    if abs(np.linalg.det(directions)) < 0.5:
        return None
    rows = header.readout_size or header.encoded[0]
    last = heads[np.argmax(slice_number)]
    gaps = int(last["idx"]["slice"]) - int(first["idx"]["slice"])
    thickness = header.recon_fov[2] / header.recon[2] if header.recon_fov[2] else 1.0
    if gaps:
        thickness = float(np.linalg.norm(last["position"] - first["position"])) / gaps or thickness
    spacing = np.array([header.recon_fov[0] / rows, header.encoded_fov[1] / header.encoded[1], thickness])
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = first["position"] - affine[:3, :3] @ np.array([rows // 2, header.encoded[1] // 2, 0])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ISMRMRD is LPS, NIfTI is RAS


def read_cfl(path: Path) -> np.ndarray:
    """A BART array: NAME.hdr (dimensions) and NAME.cfl (complex64, Fortran order). InputError when they do
    not match."""
    base = path.with_suffix("") if path.suffix in (".cfl", ".hdr") else path
    try:
        lines = base.with_suffix(".hdr").read_text().splitlines()
        dimensions = [int(n) for n in lines[lines.index("# Dimensions") + 1].split()]
        data = np.fromfile(base.with_suffix(".cfl"), np.complex64)
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a readable BART cfl/hdr pair ({' '.join(str(error).split())})"
        ) from None
    if data.size != math.prod(dimensions) or data.size == 0:
        raise InputError(
            f"{path}: expected {math.prod(dimensions)} values for dimensions {dimensions}, got {data.size}"
        )
    return data.reshape(dimensions, order="F")


def read_bart(path: Path, maps: Path | None = None) -> RawScan:
    """BART k-space with dimensions READ, PHS1, PHS2, COIL (0 to 3), optionally SLICE (13), and matching coil
    maps.

    Raises: InputError for an unreadable pair or other dimensions in use.
    """
    kspace = _bart_slices(read_cfl(path), path)
    scan = RawScan(kspace[..., 0], path.stem, str(path))
    if kspace.shape[-1] > 1:
        volume = np.abs(kspace).sum(1) > 0
        lines = np.broadcast_to(volume.any(1, keepdims=True), volume.shape)
        if maps is not None:
            raise InputError(
                f"{maps}: coil maps of a 3-D BART scan cannot be used; let them be estimated slice by slice"
            )
        return _slices_along_readout(scan, kspace, lines, None)
    if maps is not None:
        found = _bart_slices(read_cfl(maps), maps)
        if found.shape[-1] > 1:
            raise InputError(f"{maps}: expected 2-D coil maps, got {found.shape[-1]} partitions")
        scan.coil_maps = found[..., 0]
    return scan


def _bart_slices(array: np.ndarray, path: Path) -> np.ndarray:
    """(S, N, X, Y, Z) from BART's dimension order."""
    shape = list(array.shape) + [1] * (16 - array.ndim)
    used = [d for d in range(4, 16) if shape[d] > 1 and d != 13]
    if used:
        raise InputError(
            f"{path}: expected BART dimensions 0-3 and 13 (slices), got sizes above 1 in dimensions {used}"
        )
    array = array.reshape(*shape[:4], shape[13])
    return np.ascontiguousarray(array.transpose(4, 3, 0, 1, 2))
