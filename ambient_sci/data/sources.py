"""Where images come from: arrays, npy/npz, pictures, volumes, DICOM, reference files, packaged slices.

Every source becomes an ``ImageSource``: N images (C, H, W) in their natural range that are read lazily, the
subject each shows, the scale (original = value * scale) and the geometry. 8- and 16-bit pictures and integer
arrays are divided by the largest value of their type; a volume by its 99.9th percentile; floating-point
arrays are left as they are. What a reader left out or guessed is in ``notes``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.clipping import Ends
from ambient_sci.data.files import ReferenceFile
from ambient_sci.data.image_source import ImageSource
from ambient_sci.data.images import SLICE_AXES, percentile_scale, resize, slices
from ambient_sci.data.layout import channels_to_complex, complex_to_channels
from ambient_sci.data.packaged import brains
from ambient_sci.data.picture_source import from_pictures
from ambient_sci.data.readers.arrays import as_array, channels_first, image_arrays, stated_noise
from ambient_sci.data.readers.dicom import Frames, is_dicom, read_dicom
from ambient_sci.data.readers.guard import listed, naming, say
from ambient_sci.data.readers.pictures import PICTURES, hidden
from ambient_sci.data.readers.volumes import Volume, header_file, is_volume, read_volumes
from ambient_sci.data.subjects import stem, subjects_of
from ambient_sci.errors import InputError


def open_source(
    source: Any,
    *,
    size: int | None = None,
    plane: str = "axial",
    min_foreground: float = 0.0,
    channel: int | str | None = None,
    mixed: bool = False,
) -> ImageSource:
    """Images from anything this module knows.

    Args:
        source: array or tensor; path of .npy, .npz, .h5 (reference file), a volume (NIfTI and what else
            nibabel reads), a DICOM file, a picture, a zip or folder of pictures, a folder of volumes or DICOM
            files; or "brains:train", "brains:test".
        size: resize to squares of this many pixels (zero-padded, anti-aliased): for clean images. For noisy
            ones see ``reductions``.
        plane: which slices of volumes are taken: axial, coronal, sagittal.
        min_foreground: those with more foreground than this fraction.
        channel: of TIFF files with several channels (axis C): the number of one, or "together".
        mixed: pictures may differ in size and channels; they are read one at a time then.

    Raises:
        InputError: anything missing, unreadable, ambiguous, of mixed shapes, or empty.
    """
    if size is not None and size < 1:
        raise InputError(f"size: expected at least 1 pixel, got {size}")
    if plane not in SLICE_AXES:
        raise InputError(f"plane: expected one of {', '.join(SLICE_AXES)}, got {plane!r}")
    if not isinstance(source, (str, os.PathLike)):
        return _resized(_from_array(as_array(source, "images"), "array"), size)
    if str(source).startswith("brains:"):
        images, subjects = brains(str(source).removeprefix("brains:"))
        found = ImageSource((1, 64, 64), subjects, lambda rows: images[rows], str(source))
        found.geometry = {"orientation": "RAS"}
        return _resized(found, size)
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    stacks = _Stacks(str(path), plane, min_foreground, size)
    name = path.name.lower()
    if path.is_dir():
        return _from_folder(path, stacks, channel, mixed)
    volume = path if is_volume(path) else header_file(path)
    if volume is not None:
        return stacks.source(read_volumes(volume, stem(path.name), stem(path.name)))
    if name.endswith((".zip", *PICTURES)):
        return from_pictures(path, size, channel, mixed)
    if name.endswith((".npy", ".npz")):
        return _resized(_from_numpy(path), size)
    if name.endswith((".h5", ".hdf5")):
        return _resized(_from_reference(path), size)
    if name.endswith((".dcm", ".ima")) or is_dicom(path):
        return stacks.source(read_dicom(path, [path]))
    raise InputError(
        f"{path}: expected .npy, .npz, .h5, a volume (.nii, .nii.gz, .mgz, .mnc, .par, .hdr), DICOM, a "
        "picture, a zip, or a "
        "folder of pictures or volumes"
    )


def _from_folder(path: Path, stacks: _Stacks, channel: int | str | None, mixed: bool) -> ImageSource:
    """Volumes, or else DICOM, or else pictures. Of pictures beside volumes or DICOM it is said that they are
    left out."""
    files = sorted(p for p in path.rglob("*") if not p.is_dir())
    seen = [p for p in files if not hidden(str(p.relative_to(path)))]
    volumes = [p for p in seen if is_volume(p)]
    dicom = [p for p in seen if not is_volume(p) and not p.name.lower().endswith(PICTURES) and is_dicom(p)]
    damaged = sorted({p for p in seen if p.name.lower().endswith((".dcm", ".ima"))} - set(dicom))
    if volumes and dicom:
        raise InputError(
            f"{path}: {len(volumes)} volumes ({volumes[0].name}) and {len(dicom)} DICOM files "
            f"({dicom[0].name}); import them separately"
        )
    if volumes:
        taken, sets = volumes, _each_volume(path, volumes)
    elif dicom:
        taken, sets = dicom, read_dicom(path, dicom)
    elif any(p.name.lower().endswith(PICTURES) for p in seen):
        return from_pictures(path, stacks.size, channel, mixed)
    else:
        what = f"only {listed([p.name for p in seen])}" if seen else "nothing"
        raise InputError(f"{path}: no pictures, volumes or DICOM files in it, got {what}")
    partners = {p.stem for p in taken}
    values = (".rec", ".brik", ".brik.gz", ".img", ".img.gz", ".mat")
    others = (
        set(seen) - set(taken) - {p for p in seen if p.name.lower().endswith(values) and p.stem in partners}
    )
    broken = [str(p.relative_to(path)) for p in damaged]
    rest = sorted(str(p.relative_to(path)) for p in others - set(damaged))
    found = stacks.source(sets)
    if broken:
        say(
            found.notes,
            path,
            f"{len(broken)} damaged DICOM files (no DICM in them) are left out: {listed(broken)}",
        )
    if rest:
        say(found.notes, path, f"{len(rest)} other files are left out: {listed(rest)}")
    if len(files) > len(seen):
        found.notes.append(f"{len(files) - len(seen)} hidden files left out")
    return found


def _each_volume(path: Path, files: list[Path]) -> Iterable[Volume]:
    names = [str(p.relative_to(path)) for p in files]
    for file, subject in zip(files, subjects_of(names), strict=True):
        yield from read_volumes(file, subject, subject)


def _resized(source: ImageSource, size: int | None) -> ImageSource:
    """The same source with every image resized. Affines no longer hold then, and are dropped."""
    if size is None or source.image_shape[1:] == (size, size):
        return source
    read = source.read
    source.read = lambda rows: torch.from_numpy(resize(read(rows).numpy(), size))
    source.image_shape = (source.image_shape[0], size, size)
    source.eight_bits = None
    source.geometry = {k: v for k, v in source.geometry.items() if k == "orientation"}
    source.notes.append(f"resized to {size} pixels; the noise is no longer white")
    return source


# -- arrays


def _unit_range(dtype: np.dtype) -> float:
    """What a stored value is divided by: the largest value of an unsigned integer type, 1 for anything
    else."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def _from_array(array: np.ndarray, origin: str, subjects: Sequence[str] | None = None) -> ImageSource:
    images, turned = channels_first(array, origin)
    scale = _unit_range(images.dtype)
    names = list(subjects) if subjects is not None else ["unknown"] * len(images)
    if len(names) != len(images):
        raise InputError(f"{origin}: expected {len(images)} subjects, one an image, got {len(names)}")

    ends = Ends(scale)

    def read(rows: np.ndarray) -> Tensor:
        for row in rows:
            ends.look(int(row), images[row])
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.ascontiguousarray(images[rows], dtype=np.float32) / np.float32(scale))

    found = ImageSource((images.shape[1], images.shape[2], images.shape[3]), names, read, origin, scale)
    # Complex numbers became two channels; what a detector clips are real numbers.
    found.ends = ends if array.dtype.kind != "c" else None
    if turned:
        found.notes.append(turned)
    if images.dtype.kind in "iu" and images.dtype.itemsize > 2 and int(np.abs(images).max()) > 1 << 24:
        say(found.notes, origin, "integers above 2^24 are rounded to float32")
    return found


def _from_numpy(path: Path) -> ImageSource:
    arrays, notes = image_arrays(path)
    subjects = [str(s) for s in arrays["subjects"].ravel()] if "subjects" in arrays else None
    found = _from_array(arrays["images"], str(path), subjects)
    found.notes += notes
    if "noise_std" in arrays:
        found.noise_std = stated_noise(arrays, path, len(found))
    return found


def _from_reference(path: Path) -> ImageSource:
    file = ReferenceFile(path)
    found = ImageSource(file.image_shape, file.subjects, file.images, str(path), file.scale, file.geometry)
    labels = file.labels()
    found.labels = None if labels is None else labels.numpy()
    found.eight_bits = file.eight_bits
    return found


# -- volumes


class _Stacks:
    """Slices of volumes and frames, collected into one source; each volume is scaled by its own 99.9th
    percentile."""

    def __init__(self, origin: str, plane: str, min_foreground: float, size: int | None):
        self.origin, self.plane, self.min_foreground, self.size = origin, plane, min_foreground, size
        self.stacks: list[np.ndarray] = []
        self.subjects: list[str] = []
        self.scales: list[float] = []
        self.geometry: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.names: list[str] = []

    def source(self, sets: Iterable[Volume | Frames]) -> ImageSource:
        """All slices of all of them.

        Raises: InputError for mixed shapes, empty volumes, or no slice with enough foreground.
        """
        placed, magnitude = [], False
        for one in sets:
            self.notes += [n for n in one.notes if n not in self.notes]
            placed.append(isinstance(one, Volume))
            magnitude |= one.magnitude
            self._add_volume(one) if isinstance(one, Volume) else self._add_frames(one)
        if not self.stacks or sum(map(len, self.stacks)) == 0:
            raise InputError(f"{self.origin}: no slice has more than {self.min_foreground:g} foreground")
        images = torch.from_numpy(np.concatenate(self.stacks))
        if not torch.isfinite(images).all():
            raise InputError(f"{self.origin}: values too large for float32")
        geometry: dict[str, Any] = {"orientation": "RAS"} if any(placed) else {}
        if not self.size and any(placed):
            geometry["volumes"] = self.geometry
        return ImageSource(
            (images.shape[1], images.shape[2], images.shape[3]),
            self.subjects,
            lambda rows: images[rows],
            self.origin,
            np.asarray(self.scales),
            geometry,
            magnitude=magnitude and images.shape[1] == 1,
            notes=self.notes,
        )

    def _add_volume(self, volume: Volume) -> None:
        with naming(f"{self.origin}: {volume.name}" if volume.name not in self.origin else self.origin):
            scale = percentile_scale(volume.values)
        if volume.present is not None and SLICE_AXES[self.plane] != volume.axis:
            own = next(plane for plane, axis in SLICE_AXES.items() if axis == volume.axis)
            raise InputError(
                f"{self.origin}: slices of {volume.name} are missing, so only the plane they were acquired "
                "in has whole images; "
                f"give plane {own}"
            )
        stack, numbers = slices(volume.values, self.plane, self.min_foreground)
        if volume.present is not None:
            kept = np.isin(numbers, volume.present)
            stack, numbers = stack[kept], numbers[kept]
        images = complex_to_channels(stack).numpy() if stack.dtype.kind == "c" else stack[:, None]
        self.geometry.append(
            {
                "name": volume.name,
                "affine": volume.affine.tolist(),
                "shape": list(volume.values.shape),
                "axis": SLICE_AXES[self.plane],
                "first": len(self.subjects),
                "slices": numbers.tolist(),
                **({} if volume.positioned else {"positioned": False}),
            }
        )
        self._append(images, scale, volume.subject, volume.name)

    def _add_frames(self, frames: Frames) -> None:
        with naming(self.origin):
            scale = percentile_scale(frames.values)
        num, _, height, width = frames.values.shape
        self.geometry.append(
            {
                "name": frames.name,
                "affine": np.eye(4).tolist(),
                "shape": [height, width, num],
                "axis": 2,
                "first": len(self.subjects),
                "slices": list(range(num)),
                "positioned": False,
            }
        )
        self._append(frames.values, scale, frames.subject, frames.name)

    def _append(self, images: np.ndarray, scale: float, subject: str, name: str) -> None:
        images = images / np.float32(scale)
        images = images if self.size is None or not len(images) else resize(images, self.size)
        if self.stacks and len(images) and images.shape[1:] != self.stacks[0].shape[1:]:
            raise InputError(
                f"{self.origin}: mixed volumes, {name} has slices {images.shape[1:]} and {self.names[0]} "
                f"{self.stacks[0].shape[1:]}; give a common size"
            )
        if len(images):
            self.stacks.append(images.astype(np.float32))
            self.names.append(name)
        self.subjects += [subject] * len(images)
        self.scales += [scale] * len(images)


def as_complex(images: Tensor) -> np.ndarray:
    """(B, 2, H, W) to complex64 (B, H, W) for a file."""
    return channels_to_complex(images.numpy())
