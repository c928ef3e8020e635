"""Where images come from: arrays, npy/npz, image folders and zips, NIfTI volumes, reference files, packaged
slices.

Every source becomes an ``ImageSource``: N images (C, H, W) in their natural range that are read lazily, the
subject each shows, the scale (original = value * scale) and the geometry. 8- and 16-bit pictures and integer
arrays are divided by the largest value of their type; a volume by its 99.9th percentile; floating-point
arrays are left as they are.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.dicom import read_dicom_folder
from ambient_sci.data.files import ReferenceFile
from ambient_sci.data.images import SLICE_AXES, percentile_scale, resize, slices
from ambient_sci.data.layout import channels_to_complex, complex_to_channels, to_numpy
from ambient_sci.data.packaged import brains
from ambient_sci.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".pnm", ".bmp", ".tif", ".tiff", ".gif", ".webp")
VOLUMES = (".nii", ".nii.gz")


@dataclass
class ImageSource:
    """N images, read lazily by ``read(rows) -> (B, C, H, W)``."""

    image_shape: tuple[int, int, int]
    subjects: list[str]
    read: Callable[[np.ndarray], Tensor]
    origin: str
    scale: float | np.ndarray = 1.0
    geometry: dict[str, Any] = field(default_factory=dict)
    #: True when the numbers are magnitudes of MR images: their noise is Rician, not Gaussian.
    magnitude: bool = False

    def __len__(self) -> int:
        return len(self.subjects)

    def images(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) float32. InputError for NaN, infinities or a shape unlike the first image's."""
        images = self.read(rows)
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"{self.origin}: expected images {self.image_shape}, got {tuple(images.shape[1:])}"
            )
        bad = ~torch.isfinite(images).flatten(1).all(1)
        if bad.any():
            raise InputError(
                f"{self.origin}: NaN or infinite values in image {int(rows[int(bad.nonzero()[0, 0])])}"
            )
        return images

    def scale_of(self, rows: np.ndarray) -> Any:
        """The scale of some samples."""
        return self.scale[rows] if isinstance(self.scale, np.ndarray) else self.scale


def open_source(
    source: Any, *, size: int | None = None, plane: str = "axial", min_foreground: float = 0.0
) -> ImageSource:
    """Images from anything this module knows.

    source: array or tensor; path of .npy, .npz, .h5 (reference file), .nii, .nii.gz, a picture, a zip or
    folder of pictures, a folder of NIfTI volumes; or "brains:train", "brains:test".
    size: resize to squares of this many pixels (zero-padded, anti-aliased). plane, min_foreground: which
    slices of volumes are taken (axial, coronal, sagittal; those with more foreground than this fraction).

    Raises: InputError for anything missing, unreadable, of mixed shapes, or empty.
    """
    if size is not None and size < 1:
        raise InputError(f"size: expected at least 1 pixel, got {size}")
    if not isinstance(source, (str, os.PathLike)):
        return _resized(_from_array(to_numpy(source, "images"), "array"), size)
    if str(source).startswith("brains:"):
        images, subjects = brains(str(source).removeprefix("brains:"))
        found = ImageSource((1, 64, 64), subjects, lambda rows: images[rows], str(source))
        found.geometry = {"orientation": "RAS"}
        return _resized(found, size)
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    name = path.name.lower()
    if path.is_dir():
        return _from_folder(path, plane, min_foreground, size)
    if name.endswith(VOLUMES):
        return _from_volumes(_nifti_volumes([path]), str(path), plane, min_foreground, size)
    if name.endswith((".dcm", ".ima")):
        return _from_volumes(read_dicom_folder(path), str(path), plane, min_foreground, size)
    if name.endswith((".zip", *PICTURES)):
        return _from_pictures(path, size)
    if name.endswith((".npy", ".npz")):
        return _resized(_from_numpy(path), size)
    if name.endswith((".h5", ".hdf5")):
        return _resized(_from_reference(path), size)
    raise InputError(
        f"{path}: expected .npy, .npz, .h5, .nii, .nii.gz, .dcm, a picture, a zip, or a folder of pictures or volumes"
    )


def _from_folder(path: Path, plane: str, min_foreground: float, size: int | None) -> ImageSource:
    """NIfTI volumes if there are any, else pictures, else DICOM series (whose files have any name)."""
    names = sorted(p for p in path.rglob("*") if p.is_file())
    volumes = [p for p in names if p.name.lower().endswith(VOLUMES)]
    if volumes:
        return _from_volumes(_nifti_volumes(volumes), str(path), plane, min_foreground, size)
    if any(p.name.lower().endswith(PICTURES) for p in names):
        return _from_pictures(path, size)
    if not names:
        raise InputError(f"{path}: no pictures, volumes or DICOM files in it")
    return _from_volumes(read_dicom_folder(path), str(path), plane, min_foreground, size)


def _resized(source: ImageSource, size: int | None) -> ImageSource:
    """The same source with every image resized. Affines no longer hold then, and are dropped."""
    if size is None or source.image_shape[1:] == (size, size):
        return source
    read = source.read
    source.read = lambda rows: torch.from_numpy(resize(read(rows).numpy(), size))
    source.image_shape = (source.image_shape[0], size, size)
    source.geometry = {k: v for k, v in source.geometry.items() if k == "orientation"}
    return source


def _channels_first(array: np.ndarray, origin: str) -> np.ndarray:
    """(H, W), (N, H, W), (N, C, H, W) or (N, H, W, C) to (N, C, H, W); complex to two channels."""
    if array.ndim == 2:
        array = array[None]
    if array.dtype.kind == "c":
        if array.ndim != 3:
            raise InputError(f"{origin}: expected complex images (N, H, W), got {array.shape}")
        return complex_to_channels(array).numpy()
    if array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] > 4:
        array = np.moveaxis(array, -1, 1)
    array = array[:, None] if array.ndim == 3 else array
    if array.ndim != 4 or array.size == 0:
        raise InputError(
            f"{origin}: expected images (N, H, W), (N, C, H, W) or (N, H, W, C), got {array.shape}"
        )
    return array


def _unit_range(dtype: np.dtype) -> float:
    """What a stored value is divided by: the largest value of an unsigned integer type, 1 for anything
    else."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def _from_array(array: np.ndarray, origin: str, subjects: Sequence[str] | None = None) -> ImageSource:
    images = _channels_first(array, origin)
    scale = _unit_range(images.dtype)
    names = list(subjects) if subjects is not None else ["unknown"] * len(images)
    if len(names) != len(images):
        raise InputError(f"{origin}: expected {len(images)} subjects, one an image, got {len(names)}")

    def read(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(images[rows], dtype=np.float32) / np.float32(scale))

    return ImageSource((images.shape[1], images.shape[2], images.shape[3]), names, read, origin, scale)


def _from_numpy(path: Path) -> ImageSource:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _from_array(to_numpy(loaded, str(path)), str(path))
        with loaded as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable numpy file ({' '.join(str(error).split())})") from None
    pictures = [name for name, a in arrays.items() if a.dtype.kind in "fciub" and a.ndim >= 2]
    chosen = "images" if "images" in arrays else pictures[0] if len(pictures) == 1 else None
    if chosen is None:
        raise InputError(f"{path}: expected an array named 'images' or a single array, got {sorted(arrays)}")
    subjects = [str(s) for s in arrays["subjects"]] if "subjects" in arrays else None
    return _from_array(to_numpy(arrays[chosen], str(path)), str(path), subjects)


def _from_reference(path: Path) -> ImageSource:
    file = ReferenceFile(path)
    found = ImageSource(file.image_shape, file.subjects, file.images, str(path), file.scale, file.geometry)
    return found


def _decode_picture(data: bytes, name: str) -> tuple[np.ndarray, float]:
    """A picture as (C, H, W) and the largest value of its type; palettes and alpha become RGB."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in ("L", "RGB", "I;16", "I;16B", "I", "F"):
                picture = picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB")
            array = np.asarray(picture)
            sixteen = picture.mode.startswith("I")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name}: not a readable picture ({' '.join(str(error).split())})") from None
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return array, 65535.0 if sixteen else 255.0 if array.dtype == np.uint8 else 1.0


def _from_pictures(path: Path, size: int | None) -> ImageSource:
    """Pictures of a folder, a zip or a single file. A picture's subject is the folder it lies in, or else its
    own name."""
    if path.suffix.lower() == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path}: not a readable zip file ({error})") from None
        names = [n for n in archive.namelist() if n.lower().endswith(PICTURES) and "__MACOSX" not in n]
        load = archive.read
    else:
        root = path if path.is_dir() else path.parent
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        names = [str(p.relative_to(root)) for p in files if p.name.lower().endswith(PICTURES)]

        def load(name: str) -> bytes:
            return (root / name).read_bytes()

    if not names:
        raise InputError(f"{path}: no pictures ({', '.join(PICTURES)}) in it")
    names.sort()
    first, largest = _decode_picture(load(names[0]), names[0])

    def read(rows: np.ndarray) -> Tensor:
        images = []
        for row in rows:
            picture, top = _decode_picture(load(names[row]), f"{path}/{names[row]}")
            if (
                top != largest
                or len(picture) != len(first)
                or (size is None and picture.shape != first.shape)
            ):
                raise InputError(
                    f"{path}: mixed pictures, {names[0]} is {first.shape} of {largest:g} and {names[row]} {picture.shape} "
                    f"of {top:g} grey levels; resize or sort them first"
                )
            picture = picture.astype(np.float32) / np.float32(top)
            images.append(picture if size is None else resize(picture[None], size)[0])
        return torch.from_numpy(np.stack(images))

    folders = [str(Path(n).parent) for n in names]
    by_folder = len(set(folders)) > 1
    subjects = folders if by_folder else [Path(n).stem for n in names]
    shape = first.shape if size is None else (len(first), size, size)
    return ImageSource((shape[0], shape[1], shape[2]), subjects, read, str(path), largest)


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI volume in RAS axes, float32 or complex64 (X, Y, Z), and its affine (4, 4)."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))  # pyright: ignore[reportArgumentType]
        volume = np.asarray(image.dataobj)  # pyright: ignore[reportAttributeAccessIssue]
        affine = np.asarray(image.affine, dtype=np.float64)  # pyright: ignore[reportAttributeAccessIssue]
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({' '.join(str(error).split())})") from None
    volume = volume[..., 0] if volume.ndim == 4 and volume.shape[-1] == 1 else volume
    volume = volume[..., None] if volume.ndim == 2 else volume
    if volume.ndim != 3 or volume.dtype.kind not in "fciu":
        raise InputError(f"{path}: expected a 3-D volume of numbers, got {volume.dtype} {volume.shape}")
    return volume.astype(np.complex64 if volume.dtype.kind == "c" else np.float32), affine


def _nifti_volumes(paths: list[Path]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for path in paths:
        yield path.name.removesuffix(".gz").removesuffix(".nii"), *read_volume(path)


def _from_volumes(
    volumes: Iterable[tuple[str, np.ndarray, np.ndarray]],
    origin: str,
    plane: str,
    min_foreground: float,
    size: int | None,
) -> ImageSource:
    """Slices of volumes (subject, RAS array, affine), each volume scaled by its own 99.9th percentile."""
    stacks: list[np.ndarray] = []
    subjects: list[str] = []
    scales: list[float] = []
    geometry: list[dict[str, Any]] = []
    for name, volume, affine in volumes:
        scale = percentile_scale(volume)
        stack, numbers = slices(volume, plane, min_foreground)
        images = _channels_first(stack, name) / np.float32(scale)
        images = images if size is None else resize(images, size)
        if stacks and images.shape[1:] != stacks[0].shape[1:]:
            raise InputError(
                f"{origin}: mixed volumes, {name} has slices {images.shape[1:]} and {subjects[0]} {stacks[0].shape[1:]}; "
                "give a common size"
            )
        geometry.append(
            {
                "name": name,
                "affine": affine.tolist(),
                "shape": list(volume.shape),
                "axis": SLICE_AXES[plane],
                "first": len(subjects),
                "slices": numbers.tolist(),
            }
        )
        stacks.append(images.astype(np.float32))
        subjects += [name] * len(numbers)
        scales += [scale] * len(numbers)
    images = torch.from_numpy(np.concatenate(stacks))
    if len(images) == 0:
        raise InputError(f"{origin}: no slice has more than {min_foreground:g} foreground")
    return ImageSource(
        (images.shape[1], images.shape[2], images.shape[3]),
        subjects,
        lambda rows: images[rows],
        origin,
        np.asarray(scales),
        {"orientation": "RAS"} | ({} if size else {"volumes": geometry}),
        magnitude=images.shape[1] == 1,
    )


def as_complex(images: Tensor) -> np.ndarray:
    """(B, 2, H, W) to complex64 (B, H, W) for a file."""
    return channels_to_complex(images.numpy())
