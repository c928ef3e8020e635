"""DICOM: series as volumes, placed by the position and orientation of each image; images without a position
as pictures.

A volume's slices lie where ImagePositionPatient says (of a frame: its plane position; of a dose grid: its
frame offsets), in RAS millimetres. Several images at one position are told apart by echo, time point, b-value
and the like, and become volumes of their own. A series that is no volume is left out, with a warning, when
there are others; alone it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.data.geometry import LPS_TO_RAS, check_affine, direction_cosines, places
from ambient_sci.data.readers import dicom_pixels
from ambient_sci.data.readers.guard import check_regular, listed, naming, one_line, reading, say
from ambient_sci.data.readers.volumes import Volume
from ambient_sci.data.subjects import subjects_of
from ambient_sci.errors import InputError

#: What tells images at one position apart, the usual ones first.
_DISCRIMINATORS = (
    "EchoNumbers",
    "EchoTime",
    "EffectiveEchoTime",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "DiffusionBValue",
    "InversionTime",
    "TriggerTime",
    "AcquisitionNumber",
    "StackID",
    "ImageType",
    "FrameType",
    "AcquisitionTime",
)


@dataclass
class Frames:
    """Images (N, C, H, W) without a place in space: rows and columns as displayed."""

    values: np.ndarray
    subject: str
    name: str
    magnitude: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class _Image:
    """One slice: a file, or a frame of one."""

    path: Path
    header: Any
    frame: int
    groups: dict[str, Any]
    position: np.ndarray | None
    axes: np.ndarray | None
    spacing: np.ndarray | None


def is_dicom(path: Path) -> bool:
    """By the letters DICM after 128 bytes of preamble."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (InputError, OSError):
        return False


def read_dicom(source: Path, paths: Sequence[Path]) -> list[Volume | Frames]:
    """The series in some files of a folder (or in one file), one after the other.

    Raises: InputError when none of them can be read; the reason is that of the first.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise InputError("reading DICOM needs pydicom: pip install 'ambient-sci[io]'") from None
    notes: list[str] = []
    series = _sorted_into_series(source, paths, notes)
    found: list[Volume | Frames] = []
    failed: list[InputError] = []
    for images in series:
        try:
            # Values are parsed when they are looked at, so any look at a header may fail.
            with reading(images[0][0][0], "DICOM series"):
                found += _read_series(*images)
        except InputError as error:
            failed.append(error)
    if not found:
        raise failed[0] if failed else InputError(f"{source}: no DICOM images in it")
    for error in failed:
        say(notes, source, f"a series is left out: {error}")
    found[0].notes[:0] = notes
    return found


def _sorted_into_series(
    source: Path, paths: Sequence[Path], notes: list[str]
) -> list[tuple[list[tuple[Path, Any]], str]]:
    """Files with their headers by series, and whose each is. What is no image, or damaged, is said."""
    import pydicom

    series: dict[str, list[tuple[Path, Any]]] = {}
    no_image, damaged = [], []
    root = source if source.is_dir() else source.parent
    for path in paths:
        try:
            check_regular(path)
            if not is_dicom(path):
                raise InputError(f"{path}: not a readable DICOM file (no DICM after a preamble of 128 bytes)")
            with reading(path, "DICOM file"):
                header = pydicom.dcmread(path, stop_before_pixels=True)
                image = int(header.get("Rows") or 0) > 0 and int(header.get("Columns") or 0) > 0
                uid = str(header.get("SeriesInstanceUID", "") or path.parent)
                kind = str(header.get("Modality", "") or header.get("SOPClassUID", "") or "no image")
        except InputError as error:
            damaged.append(error)
            continue
        if image:
            series.setdefault(uid, []).append((path, header))
        else:
            no_image.append(f"{path.name} ({one_line(kind, 40)})")
    if not series and (damaged or no_image):
        raise (
            damaged[0] if damaged else InputError(f"{source}: no DICOM images in it, got {listed(no_image)}")
        )
    for error in damaged:
        say(notes, source, f"left out, {error}")
    if no_image:
        say(notes, source, f"{len(no_image)} DICOM files without an image are left out: {listed(no_image)}")
    everything = [p for images in series.values() for p, _ in images]
    folders = dict(zip(everything, subjects_of([str(p.relative_to(root)) for p in everything]), strict=True))
    chosen = _without_localizers(list(series.values()), source, notes)
    return [(images, _subject(images[0][1], folders[images[0][0]])) for images in chosen]


def _without_localizers(series: list, source: Path, notes: list[str]) -> list:
    scouts = [s for s in series if "LOCALIZER" in [str(v).upper() for v in (s[0][1].get("ImageType") or [])]]
    if scouts and len(scouts) < len(series):
        say(notes, source, f"{len(scouts)} localizer series left out ({sum(map(len, scouts))} images)")
        return [s for s in series if not any(s is scout for scout in scouts)]
    return series


def _subject(header: Any, fallback: str) -> str:
    return one_line(header.get("PatientID") or header.get("PatientName") or fallback, 100)


# -- one series


def _read_series(files: list[tuple[Path, Any]], subject: str) -> list[Volume | Frames]:
    first, header = files[0]
    notes: list[str] = []
    files = _without_copies(files, notes)
    shapes = {(int(h.Rows), int(h.Columns)) for _, h in files}
    if len(shapes) > 1:
        raise InputError(f"{first}: slices of mixed shapes in one series, {sorted(shapes)}")
    kinds = {(str(h.get("PhotometricInterpretation")), str(h.get("Modality", ""))) for _, h in files}
    if len(kinds) > 1:
        raise InputError(f"{first}: mixed kinds of images in one series, {listed(sorted(kinds))}")
    if str(header.get("PhotometricInterpretation")) == "MONOCHROME1":
        say(notes, first, "MONOCHROME1: the grey scale is turned over, so that bright is large")
    images = [image for path, h in files for image in _images(path, h)]
    magnitude = str(header.get("Modality", "") or "MR") == "MR" and not dicom_pixels.is_colour(header)
    placed = [i.position is not None and i.axes is not None and i.spacing is not None for i in images]
    if all(placed) and not dicom_pixels.is_colour(header):
        return [_volume(g, subject, name, magnitude, notes) for name, g in _groups(images, subject, notes)]
    if any(placed) and not all(placed):
        raise InputError(
            f"{first}: only {sum(placed)} of {len(images)} images of the series state where they lie"
        )
    if any(i.position is not None for i in images):
        why = "colour images" if dicom_pixels.is_colour(header) else "orientation or spacing missing"
        say(notes, first, f"positions are not kept ({why})")
    else:
        notes.append("no position stated: pictures, rows and columns as displayed")
    images.sort(key=lambda i: (int(i.header.get("InstanceNumber") or 0), str(i.path), i.frame))
    values = np.stack([v.astype(np.float32) for v in _values(images, notes)])
    values = values[:, None] if values.ndim == 3 else np.moveaxis(values, -1, 1)
    return [Frames(values, subject, subject, magnitude, notes)]


def _without_copies(files: list[tuple[Path, Any]], notes: list[str]) -> list[tuple[Path, Any]]:
    """Files of different SOP instances: copies of one file count once, different images of one UID are
    refused."""
    seen: dict[str, Path] = {}
    chosen = []
    for path, header in files:
        uid = str(
            header.get("SOPInstanceUID", "") or header.file_meta.get("MediaStorageSOPInstanceUID", "") or path
        )
        if uid not in seen:
            seen[uid] = path
            chosen.append((path, header))
        elif path.read_bytes() != seen[uid].read_bytes():
            raise InputError(f"{path}: another image of the same SOPInstanceUID as {seen[uid].name}")
    if len(chosen) < len(files):
        say(notes, files[0][0], f"{len(files) - len(chosen)} copies of files are left out")
    return chosen


def _images(path: Path, header: Any) -> list[_Image]:
    """The frames of a file with where they lie."""
    with reading(path, "DICOM file, NumberOfFrames"):
        frames = int(header.get("NumberOfFrames") or 1)
        shared = _flat((header.get("SharedFunctionalGroupsSequence") or [None])[0])
        own = [_flat(item) for item in header.get("PerFrameFunctionalGroupsSequence") or []]
    if not 1 <= frames <= 1 << 16 or (own and len(own) != frames):
        raise InputError(f"{path}: {frames} frames, but functional groups of {len(own)}")
    offsets = _numbers(header, {}, "GridFrameOffsetVector", path, None)
    images = []
    for frame in range(frames):
        groups = {**shared, **(own[frame] if own else {})}
        position = _numbers(header, groups, "ImagePositionPatient", path, 3)
        cosines = _numbers(header, groups, "ImageOrientationPatient", path, 6)
        spacing = _numbers(header, groups, "PixelSpacing", path, 2)
        if spacing is not None and not (spacing > 0).all():
            raise InputError(f"{path}: expected PixelSpacing above 0, got {spacing.tolist()}")
        with naming(path):
            axes = None if cosines is None else direction_cosines(cosines[:3].tolist(), cosines[3:].tolist())
        if frames > 1 and not own:
            position = _frame_position(position, axes, offsets, frame, frames, path)
        images.append(_Image(path, header, frame, groups, position, axes, spacing))
    return images


def _frame_position(
    position: np.ndarray | None,
    axes: np.ndarray | None,
    offsets: np.ndarray | None,
    frame: int,
    frames: int,
    path: Path,
) -> np.ndarray | None:
    """Where a frame of a dose grid lies: offsets (from the first frame) along the normal. Without offsets
    nobody says."""
    if position is None or axes is None or offsets is None:
        return None
    if len(offsets) != frames:
        raise InputError(f"{path}: {frames} frames, but GridFrameOffsetVector has {len(offsets)}")
    if offsets[0] not in (0, position[2]):
        raise InputError(
            f"{path}: GridFrameOffsetVector begins with {offsets[0]:g}; expected 0 or the position"
        )
    return position + axes[:, 2] * (offsets[frame] - offsets[0])


def _flat(item: Any) -> dict[str, Any]:
    """The attributes of a functional group item and of the sequences in it, by keyword."""
    found: dict[str, Any] = {}
    for element in item if item is not None else []:
        if element.VR == "SQ" and element.value:
            found |= {e.keyword: e.value for e in element.value[0] if e.keyword and e.VR != "SQ"}
        elif element.VR != "SQ" and element.keyword:
            found[element.keyword] = element.value
    return found


def _numbers(
    header: Any, groups: dict[str, Any], name: str, path: Path, count: int | None
) -> np.ndarray | None:
    """An attribute of several numbers, None when it is absent or empty. InputError when it is something
    else."""
    with reading(path, f"DICOM file, {name}"):
        value = groups.get(name, header.get(name))
        numbers = None if value is None or value == "" else np.atleast_1d(np.array(value, dtype=np.float64))
    if numbers is None or numbers.size == 0:
        return None
    if (count is not None and len(numbers) != count) or not np.isfinite(numbers).all():
        raise InputError(
            f"{path}: expected {count} finite numbers for {name}, got {one_line(numbers.tolist(), 60)}"
        )
    return numbers


# -- volumes


def _groups(images: list[_Image], subject: str, notes: list[str]) -> list[tuple[str, list[_Image]]]:
    """Images of different positions, told apart by whatever differs between those at one."""
    first = images[0]
    for what, name in (("axes", "orientations"), ("spacing", "pixel spacings")):
        values = np.stack([np.asarray(getattr(i, what)) for i in images])
        if np.ptp(values, axis=0).max() > 1e-4:
            raise InputError(f"{first.path}: slices of mixed {name} in one series")
    if _distinct(images):
        return [(subject, images)]
    tags = [t for t in _DISCRIMINATORS if len({_tag(i, t) for i in images}) > 1]
    for chosen in [*[(t,) for t in tags], tuple(tags)]:
        groups: dict[tuple[str, ...], list[_Image]] = {}
        for image in images:
            groups.setdefault(tuple(_tag(image, t) for t in chosen), []).append(image)
        if chosen and all(_distinct(g) for g in groups.values()):
            say(notes, first.path, f"{len(groups)} images at one position: volumes by {', '.join(chosen)}")
            return [
                (subject + "".join(f"_{t}{v}" for t, v in zip(chosen, key, strict=True)), g)
                for key, g in groups.items()
            ]
    raise InputError(
        f"{first.path}: several images at one position (echoes or time points?), and nothing in the "
        "headers tells them apart"
    )


def _tag(image: _Image, name: str) -> str:
    return str(image.groups.get(name, image.header.get(name, "")))


def _distinct(images: list[_Image]) -> bool:
    assert images[0].axes is not None
    height = np.sort(np.stack([np.asarray(i.position) for i in images]) @ images[0].axes[:, 2])
    return len(height) < 2 or float(np.diff(height).min()) >= 1e-3


def _volume(images: list[_Image], subject: str, name: str, magnitude: bool, notes: list[str]) -> Volume:
    """Slices in their places along the normal, then the axes turned to RAS."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    first = images[0]
    assert first.axes is not None and first.spacing is not None
    normal = first.axes[:, 2]
    images = sorted(images, key=lambda i: float(np.asarray(i.position) @ normal))
    thickness = _thickness(first, len(images), notes)
    with naming(first.path):
        found = places(np.stack([np.asarray(i.position) for i in images]), normal, thickness)
    if found.rounding > 1e-4:
        notes.append(f"positions are rounded, by up to {found.rounding:.2g} mm")
    values = np.zeros((*_shape(first), found.count), np.float32)
    for number, one in zip(found.numbers, _values(images, notes), strict=True):
        values[..., number] = one
    affine = np.eye(4)
    affine[:3, 0] = first.axes[:, 0] * first.spacing[1]
    affine[:3, 1] = first.axes[:, 1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = found.step, found.origin
    with naming(first.path):
        affine = check_affine(LPS_TO_RAS @ affine)
    turn = io_orientation(affine)
    turned = apply_orientation(values.swapaxes(0, 1), turn)
    affine = affine @ inv_ornt_aff(turn, (*_shape(first)[::-1], found.count))
    volume = Volume(
        np.asarray(turned), affine, subject, name, axis=int(turn[2, 0]), magnitude=magnitude, notes=notes
    )
    if found.missing:
        say(
            notes,
            first.path.parent,
            f"{found.missing} of {found.count} slices of the series are missing (gaps in the positions)",
        )
        volume.present = np.sort(found.numbers if turn[2, 1] > 0 else found.count - 1 - found.numbers)
    return volume


def _shape(image: _Image) -> tuple[int, int]:
    return int(image.header.Rows), int(image.header.Columns)


def _thickness(image: _Image, count: int, notes: list[str]) -> float:
    """The extent of a single slice; that of several follows from their positions."""
    if count > 1:
        return 1.0
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = _numbers(image.header, image.groups, name, image.path, 1)
        if value is not None and value[0] > 0:
            return float(value[0])
    notes.append("slice thickness not stated, taken for 1 mm")
    return 1.0


def _values(images: list[_Image], notes: list[str]) -> list[np.ndarray]:
    """The values of each image, (rows, columns) or (rows, columns, 3), in its units. A file is decoded
    once."""
    import pydicom

    found: dict[int, np.ndarray] = {}
    padded = 0
    for path in dict.fromkeys(i.path for i in images):
        with reading(path, "DICOM file"):
            header = pydicom.dcmread(path)
        stored = dicom_pixels.decode(header, path)
        for k, image in enumerate(images):
            if image.path == path:
                one = stored[image.frame]
                padded += dicom_pixels.padded(one, header)
                colour = dicom_pixels.is_colour(header)
                values = one if colour else dicom_pixels.rescaled(one, header, image.groups, path)
                if not np.isfinite(values.astype(np.float32)).all():
                    raise InputError(f"{path}: NaN or infinite values")
                found[k] = values
    if padded:
        say(
            notes,
            images[0].path,
            f"{padded} pixels hold the padding value, where nothing was measured; they are kept as they are",
        )
    return [found[k] for k in range(len(images))]
